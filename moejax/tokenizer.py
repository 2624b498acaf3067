"""Text to ids and back: bytes, or a tokenizer of Hugging Face or SentencePiece. No JAX here."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moejax.config import ConfigError
from moejax.foreign import MIB, read_file

_MOST_IDS = 1 << 24  # of a vocabulary; a table of all its ids is made
_END_NAMES = (
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<eos>",
    "<|eot_id|>",
    "<|im_end|>",
    "[SEP]",
)


class Tokenizer(Protocol):
    """What the data layer needs of a tokenizer. `load_tokenizer` makes one.

    `bytes_v` is int32 [V]: how many bytes of text an id stands for, 0 for special ids, so that
    bits per byte = nats / ln 2 / sum of bytes_v[targets].
    """

    vocab_size: int
    end_of_document: int
    bytes_v: np.ndarray
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, int32 [n], without the end of document."""
        ...

    def decode(self, ids) -> str:
        """Returns the text of `ids`; special ids and ids beyond the vocabulary give none."""
        ...


def load_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer `name`: "bytes", or a path of a tokenizer.json or SentencePiece model.

    Raises:
        ConfigError: no such file, not a tokenizer, or its package is not installed.
    """
    if name == "bytes":
        return ByteTokenizer()
    path = Path(os.path.expanduser(name))
    if not os.path.isfile(path):
        kind = "is a folder" if os.path.isdir(path) else "is not a file"
        raise ConfigError(
            f"data.tokenizer={name!r} {kind}; use 'bytes', or the path of a Hugging Face "
            "tokenizer.json or of a SentencePiece model"
        )
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


class ByteTokenizer:
    """Id b is byte b of the UTF-8 text; id 256 ends a document."""

    vocab_size = 257
    end_of_document = 256
    fingerprint = "bytes"

    def __init__(self):
        self.bytes_v = np.ones(self.vocab_size, np.int32)
        self.bytes_v[self.end_of_document] = 0

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids) -> str:
        ids = np.asarray(ids, np.int64)
        return (
            ids[(ids >= 0) & (ids < 256)]
            .astype(np.uint8)
            .tobytes()
            .decode("utf-8", errors="replace")
        )


class HuggingFaceTokenizer:
    """A tokenizer.json. Where it has no known end-of-document token, one more id is added for it.

    Special tokens that are spelled out in a text are text: a document cannot forge its own end.
    """

    def __init__(self, path: Path):
        tokenizers = _import_extra("tokenizers", path)
        data, kind = _read(path), "Hugging Face tokenizer.json"
        with _explained(lambda error: _not_a_tokenizer(path, kind, error)):
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self._size = max(vocabulary.values(), default=-1) + 1
        _check_size(path, kind, self._size)
        special = {
            token.content: number
            for number, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        self.end_of_document = next((special[n] for n in _END_NAMES if n in special), self._size)
        self.vocab_size = max(self._size, self.end_of_document + 1)
        self.bytes_v = np.zeros(self.vocab_size, np.int32)
        about = json.loads(data)
        model, byte_level = about["model"], '"ByteLevel"' in json.dumps(about.get("decoder"))
        prefix, suffix = (
            model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix")
        )
        added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        for piece, number in vocabulary.items():
            if piece in added:
                self.bytes_v[number] = 0 if piece in special else len(piece.encode("utf-8"))
            elif piece != model.get("unk_token"):
                text = piece.removeprefix(prefix).removesuffix(suffix)
                # One character of a byte-level piece is one byte.
                self.bytes_v[number] = len(text) if byte_level else _piece_bytes(text)
                self.bytes_v[number] += bool(suffix) and piece.endswith(suffix)  # a space
        self.fingerprint, self._path = hashlib.sha256(data).hexdigest(), path
        self._letters = None
        if "merges" in model and not (model.get("unk_token") or model.get("byte_fallback")):
            # such a BPE leaves out, without a word, the letters that are no piece
            whole = (piece.removeprefix(prefix).removesuffix(suffix) for piece in vocabulary)
            letters = {piece for piece in whole if len(piece) == 1}
            if not (byte_level and len(letters) >= 256):
                self._letters = letters
        plain = sorted(added - special.keys(), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, plain)) or "(?!)")  # or nothing

    def encode(self, text: str) -> np.ndarray:
        with _explained(lambda error: _cannot_encode(self._path, text, error)):
            if self._letters is not None:
                self._check_letters(text, self._letters)
            return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def _check_letters(self, text: str, letters: set[str]) -> None:
        """Raises ValueError for a word of `text` of which a letter would be lost."""
        normalizer, cutter = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        for part in self._added.split(text):  # an added token needs no letters
            plain = part if normalizer is None else normalizer.normalize_str(part)
            words = [(plain, (0, len(plain)))] if cutter is None else cutter.pre_tokenize_str(plain)
            for word, (start, stop) in words:
                if set(word) - letters:
                    shown = plain[start:stop][:40]
                    raise ValueError(f"it has no id for a part of {shown!r}, which would be lost")

    def decode(self, ids) -> str:
        kept = [int(i) for i in ids if 0 <= i < self._size]
        return self._tokenizer.decode(kept, skip_special_tokens=True)


class SentencePieceTokenizer:
    """A SentencePiece model. Where it has no end-of-sentence id, one more id is added for it.

    The space that many models put before a text counts in the first piece's bytes; the first token
    of a document is never a target, so bits per byte stay exact.
    """

    def __init__(self, path: Path):
        sentencepiece = _import_extra("sentencepiece", path)
        data, kind = _read(path), "SentencePiece model"
        self._model = sentencepiece.SentencePieceProcessor()
        with _explained(lambda error: _not_a_tokenizer(path, kind, error)):
            self._model.LoadFromSerializedProto(data)
        self._size: int = self._model.vocab_size()
        _check_size(path, kind, self._size)
        end = self._model.eos_id()
        self.end_of_document: int = end if end >= 0 else self._size
        self.vocab_size = max(self._size, self.end_of_document + 1)
        self.bytes_v = np.zeros(self.vocab_size, np.int32)
        for number in range(self._size):
            if not (self._model.is_control(number) or self._model.is_unknown(number)):
                self.bytes_v[number] = _piece_bytes(self._model.id_to_piece(number))
        self.fingerprint = hashlib.sha256(data).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._model.encode(text), np.int32)

    def decode(self, ids) -> str:
        return self._model.decode([int(i) for i in ids if 0 <= i < self._size])


def _piece_bytes(piece: str) -> int:
    """Bytes of text that a SentencePiece or WordPiece piece stands for, without its affixes."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return 1
    return len(piece.replace("\u2581", " ").encode("utf-8"))


def _read(path: Path) -> bytes:
    try:
        return read_file(path, 1024 * MIB, links=True)
    except OSError as error:
        raise ConfigError(
            f"data.tokenizer={str(path)!r} cannot be read: {error.strerror}; use 'bytes', or "
            "another file"
        ) from None


@contextlib.contextmanager
def _explained(explain: Callable[[BaseException], ConfigError]) -> Iterator[None]:
    """Has whatever a library raises of a file that is not sound become an error of ours."""
    try:
        yield
    except BaseException as error:
        # the bindings promise no class; that of a panic in Rust is no Exception
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise explain(error) from error
        raise


def _check_size(path: Path, kind: str, size: int) -> None:
    if not 0 < size <= _MOST_IDS:
        error = ValueError(f"it has {size} ids, not 1 to {_MOST_IDS}")
        raise _not_a_tokenizer(path, kind, error)


def _cannot_encode(path: Path, text: str, error: BaseException) -> ConfigError:
    reason = " ".join(str(error).split())
    return ConfigError(
        f"data.tokenizer={str(path)!r} cannot encode {text[:40]!r} ({reason}); give one that has "
        "ids for any text"
    )


def _import_extra(package: str, path: Path) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"data.tokenizer={str(path)!r} needs the package {package}, which is not installed; "
            "pip install 'moejax[tokenizers]', or use data.tokenizer=bytes"
        ) from error


def _not_a_tokenizer(path: Path, kind: str, error: BaseException) -> ConfigError:
    reason = " ".join(str(error).split())
    return ConfigError(
        f"data.tokenizer={str(path)!r} is not a {kind} ({reason}); a name that ends in .json is "
        "read as Hugging Face's, any other as SentencePiece's"
    )
