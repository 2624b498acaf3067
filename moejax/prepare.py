"""`moejax prepare`: text files to a folder of tokens for `data.source=prepared`. No JAX here.

Files are cut in pieces, pieces are tokenized in processes, and their results are written in the
order of the pieces: the folder is the same, byte for byte, for any number of workers.
"""

import array
import contextlib
import glob
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from moejax.config import ConfigError
from moejax.corpus import PREPARED_VERSION, Corpus, fingerprint, make_corpus, token_dtype
from moejax.errors import file_error
from moejax.token_file import chunk_checksums
from moejax.tokenizer import Tokenizer, load_tokenizer
from moejax.workers import in_order

SUFFIXES = (".txt", ".jsonl", ".parquet")
_PIECE_BYTES = 1 << 22
_DOCUMENT_BYTES = 1 << 30  # of a .txt, or of a line; it is in memory some times over
_BOM = b"\xef\xbb\xbf"
_MAX_DOMAINS = 256  # uint8


class Piece(NamedTuple):
    """Part of a file; [start, stop) are bytes, or row groups of a .parquet.

    A .jsonl piece holds the lines that begin in [start, stop); a .txt piece is the whole file.
    """

    path: str
    domain: int
    start: int
    stop: int
    size: int  # bytes, for the progress bar


class Documents(NamedTuple):
    """What became of some pieces; per document its length, domain, and place in [0, 1) by hash."""

    token_n: np.ndarray
    length_d: list[int]
    domain_d: list[int]
    place_d: list[float]
    num_empty: int
    size: int


def prepare(
    inputs: list[str],
    tokenizer: str,
    output: str,
    *,
    field: str = "text",
    validation_fraction: float = 0.05,
    workers: int | None = None,
    timeout_seconds: float = 600.0,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Tokenizes files into the folder `output` and returns what its meta.json holds.

    `inputs` are files, folders or glob patterns, each perhaps as `domain=pattern`; without a name,
    the domain is the name of the folder of the files. `field` is the text in .jsonl and .parquet.
    A document goes to validation by hash of its text; each split gets at least one document.
    `timeout_seconds` is how long a worker process may do nothing; one worker needs no process.

    Raises:
        ConfigError: nothing to read, text that cannot be read, or an output that is there already.
        NoSpaceError: the disk is full.
        UnavailableError: a worker hangs.
    """
    _check_options(validation_fraction, workers, timeout_seconds)
    loaded = load_tokenizer(tokenizer)
    files, domains = find_files(inputs)
    groups = _group([piece for path, domain in files for piece in _cut(path, domain, field)])
    target = Path(os.path.expanduser(output)).absolute()
    meta = _describe(tokenizer, loaded) | {"domains": list(domains), "num_files": len(files)}
    partial = _make_partial(target)
    try:
        with (
            _progress(sum(piece.size for group in groups for piece in group), show_progress) as bar,
            contextlib.closing(
                _tokenize_all(groups, tokenizer, loaded, field, workers, timeout_seconds)
            ) as results,
            _SplitWriter(partial / "train", loaded.vocab_size, domains) as train,
            _SplitWriter(partial / "validation", loaded.vocab_size, domains) as validation,
        ):
            shown = (bar(result) for result in results)
            meta["num_empty"] = _write_splits(shown, train, validation, validation_fraction)
            meta["splits"] = {"train": train.finish(), "validation": validation.finish()}
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", "utf-8")
        os.replace(partial, target)
    except OSError as error:
        raise file_error(
            f"the text did not get to --output {target} ({error}); see whether a disk is full or "
            "fails",
            error,
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return meta


def _check_options(validation_fraction: float, workers: int | None, timeout_seconds: float) -> None:
    if not 0 < validation_fraction < 1:
        raise ConfigError(
            f"validation_fraction={validation_fraction} is outside (0, 1); 0.05 is usual"
        )
    if workers is not None and workers < 1:
        raise ConfigError(f"workers={workers} is below 1; leave it out to use every core")
    if not 0 < timeout_seconds < math.inf:
        raise ConfigError(
            f"timeout_seconds={timeout_seconds} is not a finite number above 0; 600 is usual"
        )


def _describe(name: str, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "format": "moejax-prepared",
        "version": PREPARED_VERSION,
        "tokenizer": name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "end_of_document": tokenizer.end_of_document,
    }


@contextlib.contextmanager
def _progress(size: int, show: bool) -> Iterator[Callable[[Documents], Documents]]:
    """A progress bar over `size` bytes; gives a function that counts documents and returns them."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not show) as progress:
        task = progress.add_task("tokenizing", total=size)

        def count(documents: Documents) -> Documents:
            progress.advance(task, documents.size)
            return documents

        yield count


def text_corpus(pattern: str, tokenizer: Tokenizer, field: str) -> tuple[Corpus, np.ndarray]:
    """Returns all documents of text files, in memory, and how many bytes of text are to predict.

    Args:
        pattern: a file, a folder or a glob pattern, perhaps as `domain=pattern`.
        field: the text in .jsonl and .parquet.

    Returns:
        The corpus, and int64 [domains]: UTF-8 bytes of its documents without those of their first
        tokens, which nothing predicts. They are counted in the text: ids need not tell them, where
        a tokenizer changes a text before it cuts it.

    Raises:
        ConfigError: nothing to read, or text that cannot be read.
    """
    files, domains = find_files([pattern])
    bytes_n = np.zeros(len(domains), np.int64)

    def documents() -> Iterator[tuple[int, np.ndarray]]:
        for piece in (piece for path, domain in files for piece in _cut(path, domain, field)):
            for text in _read_texts(piece, field):
                if text.strip():
                    ids = tokenizer.encode(text)
                    size = len(text.encode("utf-8"))
                    bytes_n[piece.domain] += size - _first_bytes(text, ids, tokenizer)
                    yield piece.domain, ids

    corpus = make_corpus(documents(), domains, tokenizer)
    if corpus.num_documents == 0:
        raise ConfigError(f"{pattern!r} holds no text, only empty documents; give files with some")
    return corpus, bytes_n


def _first_bytes(text: str, ids: np.ndarray, tokenizer: Tokenizer) -> int:
    """Returns the bytes of `text` that its first id stands for."""
    first = tokenizer.decode(ids[:1])
    if first and text.startswith(first):  # not with a space that the tokenizer put before it
        return len(first.encode("utf-8"))
    return int(tokenizer.bytes_v[ids[:1]].sum())


# Which files


def find_files(inputs: list[str]) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    """Returns (path, index of its domain) of every file in order, and the domains' names."""
    domains: dict[str, int] = {}
    found: dict[str, tuple[str, int]] = {}  # by what a path leads to: ./a.txt is a.txt
    for text in inputs:
        named = re.fullmatch(r"([\w-]+)=(.+)", text)
        name, pattern = named.groups() if named and not os.path.exists(text) else (None, text)
        paths = _match(pattern)
        domain = domains.setdefault(name or _folder_name(pattern), len(domains))
        for path in paths:
            _, first = found.setdefault(os.path.realpath(path), (path, domain))
            if first != domain:
                raise ConfigError(
                    f"{path} is in two domains, {list(domains)[first]!r} and "
                    f"{list(domains)[domain]!r}; let each file match one input"
                )
    if len(domains) > _MAX_DOMAINS:
        raise ConfigError(
            f"the inputs name {len(domains)} domains, more than {_MAX_DOMAINS}; use name=pattern "
            "to put several folders in one domain"
        )
    return list(found.values()), tuple(domains)


def _match(pattern: str) -> list[str]:
    expanded = os.path.expanduser(pattern)
    if os.path.isdir(expanded):
        every = (str(path) for path in Path(expanded).rglob("*") if path.suffix in SUFFIXES)
    elif os.path.exists(expanded):
        every = [expanded]
    else:
        every = glob.iglob(expanded, recursive=True)
    paths = sorted(path for path in every if os.path.isfile(path))
    if not paths:
        raise ConfigError(
            f"no files match {pattern!r} (in {os.getcwd()}); give .txt, .jsonl or .parquet files, "
            "a folder that has some, or a quoted pattern such as 'text/**/*.txt'"
        )
    for path in paths:
        if Path(path).suffix not in SUFFIXES:
            raise ConfigError(
                f"{path} ends in {Path(path).suffix!r}; moejax prepare reads "
                f"{', '.join(SUFFIXES)}: rename or convert it"
            )
    return paths


def _folder_name(pattern: str) -> str:
    path = Path(os.path.expanduser(pattern))
    while glob.has_magic(str(path)) or path.is_file():
        path = path.parent
    return path.absolute().resolve().name or "text"


def _cut(path: str, domain: int, field: str) -> Iterator[Piece]:
    size = os.path.getsize(path)
    if size == 0:
        raise ConfigError(f"{path} is empty (0 bytes); remove it from the inputs")
    if path.endswith(".jsonl"):
        for start in range(0, size, _PIECE_BYTES):
            stop = min(start + _PIECE_BYTES, size)
            yield Piece(path, domain, start, stop, stop - start)
    elif path.endswith(".parquet"):
        groups = _open_parquet(path, field).num_row_groups
        for group in range(groups):
            yield Piece(path, domain, group, group + 1, size // groups)
    elif size > _DOCUMENT_BYTES:
        raise ConfigError(
            f"{path} has {size:,} bytes, and a .txt is one document of at most "
            f"{_DOCUMENT_BYTES:,}; cut it, or make it lines of a .jsonl"
        )
    else:
        yield Piece(path, domain, 0, size, size)


# Text out of files


def _read_texts(piece: Piece, field: str) -> Iterator[str]:
    if piece.path.endswith(".jsonl"):
        return _read_jsonl(piece, field)
    if piece.path.endswith(".parquet"):
        return _read_parquet(piece, field)
    with _open(piece.path) as file:
        return iter([_decode(file.read(), piece.path)])


def _open(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); make it readable, or leave it out"
        ) from error


def _decode(data: bytes, where: str, offset: int = 0) -> str:
    """Returns `data`, which stand at byte `offset` of a file, as text without a byte order mark."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where} is not UTF-8: byte {data[error.start]:#04x} at offset {offset + error.start} "
            f"({error.reason}); convert it, for example with iconv -f latin1 -t utf-8"
        ) from error
    return text.removeprefix("\ufeff") if offset == 0 else text


def _read_jsonl(piece: Piece, field: str) -> Iterator[str]:
    with _open(piece.path) as file:
        if piece.start > 0:  # the line that begins before belongs to the piece before
            file.seek(piece.start - 1)
            file.readline()
        offset = file.tell()
        while offset < piece.stop and (line := file.readline(_DOCUMENT_BYTES)):
            if len(line) == _DOCUMENT_BYTES:
                raise _bad_line(piece.path, offset, f"has {len(line):,} bytes or more", field)
            if line.strip() not in (b"", _BOM):
                yield _parse_line(line, offset, piece.path, field)
            offset += len(line)


def _parse_line(line: bytes, offset: int, path: str, field: str) -> str:
    """Returns the text of a line that begins at byte `offset`; a null is an empty text."""
    text = _decode(line, path, offset)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad_line(path, offset, f"is not valid JSON ({error})", field) from error
    if not isinstance(record, dict):
        raise _bad_line(path, offset, f"is a {type(record).__name__}, not an object", field)
    if field not in record:
        names = ", ".join(map(repr, record))[:300] or "none"
        raise _bad_line(path, offset, f"has no field {field!r} but {names}", field)
    value = record[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _bad_line(path, offset, f"has a {type(value).__name__} in {field!r}", field)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _bad_line(
            path, offset, f"has half of a surrogate pair in {field!r}", field
        ) from error
    return value


def _bad_line(path: str, offset: int, fault: str, field: str) -> ConfigError:
    with _open(path) as file:
        number = 1
        while offset > 0 and (data := file.read(min(offset, _PIECE_BYTES))):
            number += data.count(b"\n")
            offset -= len(data)
    return ConfigError(
        f'{path} line {number} {fault}; each line is an object such as {{"{field}": "..."}}, and '
        "--field names the field"
    )


def _open_parquet(path: str, field: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"{path} needs the package pyarrow, which is not installed; pip install "
            "'moejax[parquet]'"
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        schema = file.schema_arrow
    except Exception as error:  # by where the damage is, not only its own
        raise _bad_parquet(path, error) from error
    if field not in schema.names:
        raise ConfigError(
            f"{path} has no column {field!r}, only {', '.join(map(repr, schema.names))}; name the "
            "text's column with --field"
        )
    kind = schema.field(field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise ConfigError(
            f"{path} has {kind} in column {field!r}; name a column of strings with --field"
        )
    if file.metadata.num_rows == 0:
        raise ConfigError(f"{path} is empty (0 rows); remove it from the inputs")
    return file


def _read_parquet(piece: Piece, field: str) -> Iterator[str]:
    groups = list(range(piece.start, piece.stop))
    with _open_parquet(piece.path, field) as file:
        try:
            for batch in file.iter_batches(row_groups=groups, columns=[field]):
                for value in batch.column(0):
                    yield value.as_py() or ""
        except Exception as error:  # as in _open_parquet
            raise _bad_parquet(piece.path, error) from error


def _bad_parquet(path: str, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())[:300]
    return ConfigError(f"{path} cannot be read as Parquet ({reason}); remove it from the inputs")


# Tokens out of text


def _tokenize(pieces: Iterable[Piece], tokenizer: Tokenizer, field: str) -> Documents:
    dtype = token_dtype(tokenizer.vocab_size)
    end = np.array([tokenizer.end_of_document], dtype)
    parts, lengths, domains, places, num_empty, size = [], [], [], [], 0, 0
    for piece in pieces:
        size += piece.size
        for text in _read_texts(piece, field):
            if not text.strip():
                num_empty += 1
                continue
            ids = tokenizer.encode(text)
            parts += [ids.astype(dtype), end]
            lengths.append(len(ids) + 1)
            domains.append(piece.domain)
            digest = hashlib.sha256(text.encode("utf-8")).digest()
            places.append(int.from_bytes(digest[:6], "big") / 2**48)
    token_n = np.concatenate(parts) if parts else np.zeros(0, dtype)
    return Documents(token_n, lengths, domains, places, num_empty, size)


_in_worker: tuple[Tokenizer, str]


def _tokenize_all(
    groups: list[list[Piece]],
    name: str,
    tokenizer: Tokenizer,
    field: str,
    workers: int | None,
    timeout_seconds: float,
) -> Generator[Documents, None, None]:
    """Yields the result of each group in order; `name` is the tokenizer's."""
    workers = min(workers or os.cpu_count() or 1, len(groups))
    if workers > 1:
        yield from in_order(_work, groups, workers, timeout_seconds, _start_worker, name, field)
    else:
        yield from (_tokenize(group, tokenizer, field) for group in groups)


def _start_worker(tokenizer: str, field: str) -> None:
    global _in_worker
    _in_worker = load_tokenizer(tokenizer), field


def _work(pieces: Iterable[Piece]) -> Documents:
    return _tokenize(pieces, *_in_worker)


def _group(pieces: list[Piece]) -> list[list[Piece]]:
    """Puts small neighbours together, so that a million small files are not a million messages."""
    groups: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if groups[-1] and size + piece.size > _PIECE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.size
    return groups


# Tokens into files


class _SplitWriter(contextlib.AbstractContextManager):
    """Writes one split: tokens as they come, offsets and domains at the end."""

    def __init__(self, folder: Path, vocab_size: int, domains: tuple[str, ...]):
        folder.mkdir()
        self._folder, self._names, self._dtype = folder, domains, token_dtype(vocab_size)
        self._file = (folder / "tokens.bin").open("wb")
        self._hash = hashlib.sha256()
        self._size, self._checksums = 0, []
        self._starts = array.array("q", [0])
        self._domains = array.array("B")

    def __len__(self) -> int:
        return len(self._domains)

    def add(self, ids: np.ndarray, domain: int) -> None:
        data = ids.astype(self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._size = chunk_checksums(data, self._checksums, self._size)
        self._starts.append(self._starts[-1] + len(ids))
        self._domains.append(domain)

    def finish(self) -> dict[str, Any]:
        """Writes what is left and returns what meta.json says of the split."""
        self._file.close()
        start_d, domain_d = np.asarray(self._starts, "<i8"), np.asarray(self._domains, np.uint8)
        documents = self._folder / "documents.npz"
        checksum_c = np.asarray(self._checksums, "<u4")
        np.savez(documents, start_d=start_d, domain_d=domain_d, checksum_c=checksum_c)
        with documents.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {
            "dtype": self._dtype.str,
            "num_tokens": int(start_d[-1]),
            "num_documents": len(self),
            "documents_bytes": documents.stat().st_size,
            "documents_sha256": digest,
            "fingerprint": fingerprint(self._hash, start_d, domain_d, self._names),
        }

    def __exit__(self, *_) -> None:
        self._file.close()


def _write_splits(
    results: Iterable[Documents], train: _SplitWriter, validation: _SplitWriter, fraction: float
) -> int:
    """Writes every document to its split; returns how many empty ones were left out.

    The last document waits for the end: it goes to the split that has none. A document that is
    alone is cut in two.
    """
    held, num_empty = None, 0
    for result in results:
        num_empty += result.num_empty
        start = 0
        for length, domain, place in zip(
            result.length_d, result.domain_d, result.place_d, strict=True
        ):
            if held is not None:
                (validation if held[2] < fraction else train).add(*held[:2])
            held = result.token_n[start : start + length], domain, place
            start += length
    if held is None:
        raise ConfigError(
            f"the inputs hold no text ({num_empty} empty documents); give files that have some"
        )
    ids, domain, place = held
    if len(train) and len(validation):
        (validation if place < fraction else train).add(ids, domain)
    elif len(train):
        validation.add(ids, domain)
    elif len(validation):
        train.add(ids, domain)
    else:
        cut = max(1, int(len(ids) * (1 - fraction)))
        train.add(np.append(ids[:cut], ids[-1]), domain)
        validation.add(ids[cut:], domain)
    return num_empty


def _make_partial(target: Path) -> Path:
    """Makes the folder that becomes `target` when it is whole."""
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise ConfigError(
                f"--output {target} is there already and not empty; name another folder, or "
                "remove it"
            )
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"--output {target} cannot be written ({error.strerror}: {error.filename}); name "
            "another folder"
        ) from error
    return partial
