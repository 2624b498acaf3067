"""Documents as one array of tokens: embedded text, or what `moejax prepare` wrote. No JAX here."""

import dataclasses
import functools
import hashlib
import itertools
import json
import lzma
import os
import sysconfig
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np

from moejax.config import ConfigError, DataConfig
from moejax.foreign import MIB, open_file, read_file
from moejax.token_file import CHUNK_BYTES, CorruptData, TokenFile
from moejax.tokenizer import Tokenizer, load_tokenizer

Split = Literal["train", "validation"]
PREPARED_VERSION = 3  # of what `moejax prepare` writes
_READABLE = (2, 3)  # 2 has no SHA-256 of documents.npz
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
_VERIFIED_BYTES = 1 << 30  # of tokens: up to so many are read through when a run starts


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The documents of one split, one after the other; the last token of each is `end_of_document`.

    token_n: uint16 or uint32 [N]; an array, or a file that is sliced as one.
    start_d: int64 [documents + 1], where each document starts; the last entry is N.
    domain_d: uint8 [documents], indices into `domains`.
    fingerprint: sha256 over all of these, hex.
    skip_corrupt: whether a sequence of a part that cannot be read becomes padding, or an error.
    """

    token_n: np.ndarray | TokenFile
    start_d: np.ndarray
    domain_d: np.ndarray
    domains: tuple[str, ...]
    vocab_size: int
    end_of_document: int
    fingerprint: str
    skip_corrupt: bool = False

    @property
    def num_tokens(self) -> int:
        return int(self.start_d[-1])

    @property
    def num_documents(self) -> int:
        return len(self.domain_d)

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """Returns int64 [vocab_size]: how often each id occurs."""
        counts = np.zeros(vocab_size, np.int64)
        for piece in pieces(self.token_n):
            counts += np.bincount(piece, minlength=vocab_size)
        return counts

    def place(self, offset: int) -> str:
        """Returns where token `offset` stands, for messages: file, document, offset in it."""
        document = int(np.searchsorted(self.start_d, offset, side="right")) - 1
        file = self.token_n.path if isinstance(self.token_n, TokenFile) else "the embedded text"
        return (
            f"{file}, document {document} of domain {self.domains[self.domain_d[document]]!r}, "
            f"token {offset - int(self.start_d[document])} of it, {offset} of all"
        )


def load_corpus(config: DataConfig, split: Split) -> Corpus:
    """Returns a split of the data that `config` names. The split is fixed, by document.

    Raises:
        ConfigError: the data are not there, damaged, or made with another tokenizer.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    if config.source == "prepared":
        assert config.path is not None  # DataConfig checked
        return _load_prepared(Path(os.path.expanduser(config.path)), split, config, tokenizer)
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


def pieces(token_n: np.ndarray | TokenFile) -> Iterable[np.ndarray]:
    """Returns all ids in arrays that fit into memory, in order."""
    return token_n.pieces() if isinstance(token_n, TokenFile) else (token_n,)


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


def _load_prepared(folder: Path, split: Split, config: DataConfig, tokenizer: Tokenizer) -> Corpus:
    meta, name = read_meta(folder), config.tokenizer
    if meta["tokenizer_fingerprint"] != tokenizer.fingerprint:
        raise ConfigError(
            f"{folder} was prepared with the tokenizer {meta['tokenizer']!r} (fingerprint "
            f"{meta['tokenizer_fingerprint'][:16]}), data.tokenizer={name!r} has "
            f"{tokenizer.fingerprint[:16]}; use data.tokenizer={meta['tokenizer']}, or prepare "
            "the text again"
        )
    about = meta["splits"][split]
    dtype = token_dtype(tokenizer.vocab_size)
    if about["dtype"] != dtype.str:
        raise ConfigError(
            f"{folder / 'meta.json'} says that {split} has ids of dtype {about['dtype']!r}, and a "
            f"vocabulary of {tokenizer.vocab_size} has {dtype.str!r}; prepare the text again"
        )
    documents = folder / split / "documents.npz"
    start_d, domain_d, checksum_c = _read_documents(documents, about, meta["domains"], dtype)
    tokens = TokenFile(folder / split / "tokens.bin", dtype, about["num_tokens"], checksum_c)
    corpus = Corpus(
        tokens,
        start_d,
        domain_d,
        tuple(meta["domains"]),
        tokenizer.vocab_size,
        tokenizer.end_of_document,
        about["fingerprint"],
        skip_corrupt=config.on_corrupt == "skip",
    )
    if tokens.nbytes <= _VERIFIED_BYTES and not corpus.skip_corrupt:
        _verify(corpus, folder / split)  # else each chunk and id when it is first read
    return corpus


def _read_documents(
    path: Path, about: dict, domains: list[str], dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns where documents start, their domains, and the checksums of the tokens' chunks."""
    _check_size(path, about["documents_bytes"])
    try:
        with open_file(path, links=True) as file:
            if "documents_sha256" in about:  # a zip file has bytes that nothing reads
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest != about["documents_sha256"]:
                    raise ValueError("it has another SHA-256 than when it was written")
                file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                # they are stored as they are: a file that unpacks to more was not written by us
                if (
                    sum(entry.file_size for entry in arrays.zip.infolist())
                    > about["documents_bytes"]
                ):
                    raise ValueError("it is larger inside than outside")
                start_d, domain_d, checksum_c = (
                    arrays[name] for name in ("start_d", "domain_d", "checksum_c")
                )
    except Exception as error:  # NumPy and zipfile raise a dozen kinds, by where the damage is
        raise ConfigError(f"{path} is damaged ({error}); prepare the text again") from error
    count = about["num_tokens"]
    kinds = start_d.dtype, domain_d.dtype, checksum_c.dtype
    chunks = -(-count * dtype.itemsize // CHUNK_BYTES)
    shapes = (len(domain_d) + 1,), (len(domain_d),), (chunks,)
    whole = (
        kinds == (np.dtype("<i8"), np.dtype(np.uint8), np.dtype("<u4"))
        and (start_d.shape, domain_d.shape, checksum_c.shape) == shapes
        and start_d[0] == 0
        and start_d[-1] == count
        and bool((np.diff(start_d) > 0).all())
        and domain_d.max(initial=0) < len(domains)
    )
    if not whole:
        raise ConfigError(
            f"{path} does not fit the {count} tokens and {len(domains)} domains of meta.json; copy "
            "the folder again, or prepare the text again"
        )
    return start_d, domain_d, checksum_c


def _verify(corpus: Corpus, folder: Path) -> None:
    """Checks every id, checksum, and the fingerprint of a prepared split."""
    digest = hashlib.sha256()
    for start, chunk in zip(
        itertools.count(0, CHUNK_BYTES // corpus.token_n.dtype.itemsize), pieces(corpus.token_n)
    ):
        check_ids(corpus, chunk, start)
        digest.update(chunk.data)
    found = fingerprint(digest, corpus.start_d, corpus.domain_d, corpus.domains)
    if found != corpus.fingerprint:
        raise ConfigError(
            f"{folder} was changed after it was prepared: its fingerprint is {found[:16]}, "
            f"meta.json says {corpus.fingerprint[:16]}; prepare the text again"
        )


def check_ids(corpus: Corpus, token_n: np.ndarray, start: int) -> None:
    """Checks ids on the host: a device would clamp one without an embedding in silence.

    Args:
        token_n: ids of the corpus, from offset `start` on.

    Raises:
        CorruptData: which id, where, and what the vocabulary is.
    """
    if token_n.size and int(token_n.max()) >= corpus.vocab_size:
        offset = int(np.argmax(token_n >= corpus.vocab_size))
        raise CorruptData(
            f"token id {token_n[offset]} is not below the vocabulary of {corpus.vocab_size}: "
            f"{corpus.place(start + offset)}; prepare the text again"
        )


def read_meta(folder: Path) -> dict:
    """Returns what `moejax prepare` says of a folder; raises ConfigError where it says nothing."""
    path = folder / "meta.json"
    try:
        meta = json.loads(read_file(path, 16 * MIB, links=True))
    except OSError as error:
        raise ConfigError(
            f"no prepared data at data.path={str(folder)!r} (looked for {path}: "
            f"{error.strerror}); write it with moejax prepare 'text/*.txt' --output {folder}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); prepare the text again") from error
    if (
        not isinstance(meta, dict)
        or meta.get("format") != "moejax-prepared"
        or meta.get("version") not in _READABLE
    ):
        raise ConfigError(
            f"{path} does not describe prepared data of version "
            f"{' or '.join(map(str, _READABLE))}; write the folder with moejax prepare"
        )
    _check_meta(path, meta)
    return meta


def _check_meta(path: Path, meta: dict) -> None:
    """Checks that everything that is read of meta.json is there, and what it has to be."""

    def is_count(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48

    splits = meta.get("splits")
    splits = splits if isinstance(splits, dict) else {}
    names = meta.get("domains")
    named = ("tokenizer", "tokenizer_fingerprint")
    wrong = [k for k in named if not isinstance(meta.get(k), str)]
    if not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
        wrong.append("domains")
    for split in ("train", "validation"):
        about = splits.get(split)
        about = about if isinstance(about, dict) else {}
        counts = ("num_tokens", "documents_bytes")
        wrong += [f"splits.{split}.{k}" for k in counts if not is_count(about.get(k))]
        texts = ("dtype", "fingerprint")
        texts += ("documents_sha256",) if meta["version"] > 2 else ()
        wrong += [f"splits.{split}.{k}" for k in texts if not isinstance(about.get(k), str)]
    if wrong:
        raise ConfigError(
            f"{path} lacks a usable {', '.join(wrong)}; copy it again, or prepare the text again"
        )


def _check_size(path: Path, expected: int) -> None:
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
