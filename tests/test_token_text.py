"""Tokens as text: alone, in their place, and as the pieces of a whole."""

import numpy as np

from moejax.token_text import context, pieces, token_text
from moejax.tokenizer import ByteTokenizer


def test_pieces_are_the_text():
    tokenizer = ByteTokenizer()
    for text in ("plain", "ñandú 🙂!", "\x00\n"):
        ids = tokenizer.encode(text)
        found = pieces(tokenizer, ids)
        assert "".join(found) == text
        assert len(found) == len(ids)
    assert pieces(tokenizer, tokenizer.encode("ñx")) == ("ñ", "", "x")


def test_context_marks_the_token():
    tokenizer = ByteTokenizer()
    ids = np.append(tokenizer.encode("x" * 80 + "señor" + "y" * 80), tokenizer.end_of_document)
    for at, marked in ((80, "s"), (82, "ñ"), (83, "ñ"), (84, "o"), (166, "<end of document>")):
        text, start, end = context(tokenizer, ids, at)
        assert text[start:end] == marked
        assert start == min(60, at) or at > 82
        assert len(text) <= 60 + 17 + 40
    assert [token_text(tokenizer, token) for token in (97, 0xC3)] == ["a", "<0xC3>"]


def test_only_ids_of_bytes_are_shown_as_bytes():
    """In a byte-level BPE the id 163 is a part of a character, and not the byte 0xA3."""

    class Other:
        end_of_document, bytes_v = 2, np.ones(300, np.int32)

        def decode(self, ids):
            return "\ufffd"

    assert token_text(Other(), 163) == "<163>"
    assert token_text(ByteTokenizer(), 263) == "<263>"  # a vocabulary that was rounded up
