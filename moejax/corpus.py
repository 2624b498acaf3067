"""Documents as one array of tokens: embedded text, or what `moejax prepare` wrote. No JAX here."""

import dataclasses
import functools
import hashlib
import json
import lzma
import os
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np

from moejax.config import ConfigError, DataConfig
from moejax.tokenizer import Tokenizer, load_tokenizer

Split = Literal["train", "validation"]
VALIDATION_FRACTION = 0.05  # of the embedded documents

_ASSET = "bible_en_es.tsv.xz"
_DOMAINS = ("english", "spanish", "python")
_PYTHON_BYTES = 4_000_000  # about as much as each of the two translations
_PYTHON_SKIPPED = {  # tests, other people's packages, generated tables
    "__pycache__",
    "config",
    "dist-packages",
    "encodings",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_CHUNK_TOKENS = 1 << 24
_VERIFIED_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The documents of one split, one after the other; the last token of each is `end_of_document`.

    token_n: uint16 or uint32 [N], perhaps a read-only memory map.
    start_d: int64 [documents + 1], where each document starts; the last entry is N.
    domain_d: uint8 [documents], indices into `domains`.
    fingerprint: sha256 over all of these, hex.
    """

    token_n: np.ndarray
    start_d: np.ndarray
    domain_d: np.ndarray
    domains: tuple[str, ...]
    vocab_size: int
    end_of_document: int
    fingerprint: str

    @property
    def num_tokens(self) -> int:
        return int(self.start_d[-1])

    @property
    def num_documents(self) -> int:
        return len(self.domain_d)

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """Returns int64 [vocab_size]: how often each id occurs."""
        return np.bincount(self.token_n, minlength=vocab_size)


def load_corpus(config: DataConfig, split: Split) -> Corpus:
    """Returns a split of the data that `config` names. The split is fixed, by document.

    Raises:
        ConfigError: the data are not there, damaged, or made with another tokenizer.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    if config.source == "prepared":
        assert config.path is not None  # DataConfig checked
        return _load_prepared(Path(config.path).expanduser(), split, config.tokenizer, tokenizer)
    documents = [d for d in embedded_documents() if _split(d.key) == split]
    return make_corpus(
        [(d.domain, tokenizer.encode(d.text)) for d in documents], _DOMAINS, tokenizer
    )


def make_corpus(
    documents: Iterable[tuple[int, np.ndarray]],
    domains: tuple[str, ...],
    tokenizer: Tokenizer,
) -> Corpus:
    """Returns the corpus of (domain, ids [n]) documents, in this order, and ends each of them."""
    dtype = token_dtype(tokenizer.vocab_size)
    end = np.array([tokenizer.end_of_document], dtype)
    parts, lengths, domain = [], [], []
    for index, ids in documents:
        parts += [ids.astype(dtype), end]
        lengths.append(len(ids) + 1)
        domain.append(index)
    token_n = np.concatenate(parts) if parts else np.zeros(0, dtype)
    start_d = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    domain_d = np.asarray(domain, np.uint8)
    for array in (token_n, start_d, domain_d):
        array.flags.writeable = False
    digest = fingerprint(hashlib.sha256(token_n.data), start_d, domain_d, domains)
    return Corpus(
        token_n, start_d, domain_d, domains, tokenizer.vocab_size, tokenizer.end_of_document, digest
    )


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest dtype that `moejax` stores ids in, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def fingerprint(
    token_hash, start_d: np.ndarray, domain_d: np.ndarray, domains: tuple[str, ...]
) -> str:
    """Returns a corpus' fingerprint, hex; `token_hash` is a sha256 that has seen the tokens."""
    whole = token_hash.copy()
    whole.update(start_d.astype("<i8").tobytes())
    whole.update(domain_d.astype(np.uint8).tobytes())
    whole.update(json.dumps(domains).encode("utf-8"))
    return whole.hexdigest()


# The embedded text


@dataclasses.dataclass(frozen=True)
class Document:
    """`key` is a chapter ("Gen.1" in both languages) or a path in the standard library."""

    key: str
    domain: int
    text: str


@functools.lru_cache(maxsize=1)
def embedded_documents() -> tuple[Document, ...]:
    """Returns all embedded documents in a fixed pseudo-random order, so that domains mix."""
    documents = [*_chapters(), *_python_files()]
    return tuple(
        sorted(documents, key=lambda d: _fraction("order", f"{_DOMAINS[d.domain]}/{d.key}"))
    )


def _split(key: str) -> Split:
    return "validation" if _fraction("split", key) < VALIDATION_FRACTION else "train"


def _fraction(purpose: str, key: str) -> float:
    """A number in [0, 1) that depends on the two strings alone."""
    digest = hashlib.sha256(f"{purpose}:{key}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _chapters() -> list[Document]:
    verses: dict[str, tuple[list[str], list[str]]] = {}
    for line in lzma.decompress(_read_asset(_ASSET)).decode("utf-8").splitlines():
        verse, english, spanish = line.split("\t")
        chapter = verses.setdefault(verse.rpartition(".")[0], ([], []))
        chapter[0].append(english)
        chapter[1].append(spanish)
    return [
        Document(chapter, domain, "\n".join(lines) + "\n")
        for chapter, translations in verses.items()
        for domain, lines in enumerate(translations)
    ]


def _read_asset(name: str) -> bytes:
    folder = resources.files("moejax") / "assets"
    data = (folder / name).read_bytes()
    sums = {}
    for line in (folder / "SHA256SUMS").read_text("utf-8").splitlines():
        digest, file = line.split()
        sums[file] = digest
    actual = hashlib.sha256(data).hexdigest()
    if actual != sums[name]:
        raise ConfigError(
            f"{folder / name} is damaged: its sha256 is {actual[:16]}..., SHA256SUMS says "
            f"{sums[name][:16]}...; reinstall moejax, or run scripts/build_corpus.py"
        )
    return data


def _python_files() -> list[Document]:
    """Returns part of the interpreter's standard library, chosen by hash of the path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(_python_names(root), key=lambda name: _fraction("python", name))
    documents, size = [], 0
    for name in names:
        try:
            text = (root / name).read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text and size < _PYTHON_BYTES:
            documents.append(Document(name, _DOMAINS.index("python"), text))
            size += len(text)
    if not documents:
        raise ConfigError(
            f"no Python sources found in the standard library at {root} (a zipped or stripped "
            "interpreter?); use an interpreter with sources, or data.source=prepared"
        )
    return documents


def _python_names(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = [
            name
            for name in folders
            if name not in _PYTHON_SKIPPED and not name.startswith("config-")
        ]
        for name in files:
            # sitecustomize and _sysconfigdata are the machine's, not the library's.
            if name.endswith(".py") and not name.startswith(
                ("_sysconfigdata", "sitecustomize", "usercustomize")
            ):
                yield Path(folder, name).relative_to(root).as_posix()


# A folder that `moejax prepare` wrote


def _load_prepared(folder: Path, split: Split, name: str, tokenizer: Tokenizer) -> Corpus:
    meta = _read_meta(folder)
    if meta["tokenizer_fingerprint"] != tokenizer.fingerprint:
        raise ConfigError(
            f"{folder} was prepared with the tokenizer {meta['tokenizer']!r} (fingerprint "
            f"{meta['tokenizer_fingerprint'][:16]}), data.tokenizer={name!r} has "
            f"{tokenizer.fingerprint[:16]}; use data.tokenizer={meta['tokenizer']}, or prepare "
            "the text again"
        )
    about = meta["splits"][split]
    tokens, documents = folder / split / "tokens.bin", folder / split / "documents.npz"
    dtype = np.dtype(about["dtype"])
    _check_size(tokens, about["num_tokens"] * dtype.itemsize)
    _check_size(documents, about["documents_bytes"])
    try:
        with np.load(documents, allow_pickle=False) as arrays:
            start_d, domain_d = arrays["start_d"], arrays["domain_d"]
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{documents} is damaged ({error}); prepare the text again") from error
    token_n = np.memmap(tokens, dtype, mode="r", shape=(about["num_tokens"],))
    domains = tuple(meta["domains"])
    if token_n.nbytes <= _VERIFIED_BYTES:  # beyond, `check_tokens` looks at each batch
        digest = fingerprint(
            _verify_tokens(tokens, token_n, meta["vocab_size"]), start_d, domain_d, domains
        )
        if digest != about["fingerprint"]:
            raise ConfigError(
                f"{folder / split} was changed after it was prepared: its fingerprint is "
                f"{digest[:16]}, meta.json says {about['fingerprint'][:16]}; prepare the text "
                "again"
            )
    return Corpus(
        token_n,
        start_d,
        domain_d,
        domains,
        meta["vocab_size"],
        meta["end_of_document"],
        about["fingerprint"],
    )


def _read_meta(folder: Path) -> dict:
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"no prepared data at data.path={str(folder)!r} (looked for {path}: "
            f"{error.strerror}); write it with moejax prepare 'text/*.txt' --output {folder}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); prepare the text again") from error
    if (
        not isinstance(meta, dict)
        or meta.get("format") != "moejax-prepared"
        or meta.get("version") != 1
    ):
        raise ConfigError(
            f"{path} does not describe prepared data of version 1; write the folder with moejax "
            "prepare"
        )
    return meta


def _check_size(path: Path, expected: int) -> None:
    """Checks before mapping: reading a map beyond the end of its file kills the process."""
    try:
        actual = path.stat().st_size
    except OSError as error:
        raise ConfigError(
            f"{path} is missing ({error.strerror}); prepare the text again"
        ) from error
    if actual != expected:
        raise ConfigError(
            f"{path} has {actual} bytes and meta.json says {expected}; copy the folder again, or "
            "prepare the text again"
        )


def _verify_tokens(path: Path, token_n: np.ndarray, vocab_size: int):
    """Returns the sha256 of the tokens' bytes; checks that every id is below `vocab_size`."""
    digest = hashlib.sha256()
    for start in range(0, len(token_n), _CHUNK_TOKENS):
        chunk = np.ascontiguousarray(token_n[start : start + _CHUNK_TOKENS])
        if chunk.max() >= vocab_size:
            offset = start + int(np.argmax(chunk >= vocab_size))
            raise ConfigError(
                f"{path} has token id {token_n[offset]} at offset {offset}, not below the "
                f"vocabulary of {vocab_size} in meta.json; prepare the text again"
            )
        digest.update(chunk.data)
    return digest
