"""Tokens as text that can be shown: alone, in their place, and as the pieces of a whole."""

import itertools

import numpy as np

from moejax.tokenizer import ByteTokenizer, Tokenizer

BEFORE, AFTER = 60, 40  # characters around a token that is shown in its place


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Returns how to show one token: its text, or a name in angle brackets where it has none."""
    if token == tokenizer.end_of_document:
        return "<end of document>"
    text = tokenizer.decode([token])
    if text in ("", "\ufffd"):
        # only where ids are bytes does the id say which byte it is
        is_byte = isinstance(tokenizer, ByteTokenizer) and token < 256
        return f"<0x{token:02X}>" if is_byte else f"<{token}>"
    return text


def pieces(tokenizer: Tokenizer, token_t: np.ndarray) -> tuple[str, ...]:
    """Returns the part of the text that each token adds; together they are the text.

    Of a character that takes several tokens the first has it, and the others have nothing.
    """
    whole = tokenizer.decode(token_t)
    lengths = [len(tokenizer.decode(token_t[:stop])) for stop in range(1, len(token_t))]
    ends = np.minimum(np.maximum.accumulate([0, *lengths, len(whole)]), len(whole))
    ends[-1] = len(whole)
    return tuple(whole[a:b] for a, b in itertools.pairwise(ends))


def context(tokenizer: Tokenizer, token_t: np.ndarray, at: int) -> tuple[str, int, int]:
    """Returns a text around token `at`, and where in it the token begins and ends."""
    whole, before = tokenizer.decode(token_t), tokenizer.decode(token_t[:at])
    start, end = len(before), len(tokenizer.decode(token_t[: at + 1]))
    if token_t[at] == tokenizer.end_of_document:
        whole = before + token_text(tokenizer, int(token_t[at]))
        end = len(whole)
    elif end <= start:  # a further byte of one character
        start = max(0, end - 1)
    first = max(0, start - BEFORE)
    return whole[first : end + AFTER], start - first, end - first
