"""`prepare`: each format, any number of workers, and what is said of input that cannot be read."""

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from hostile import file_limit

from moejax import prepare as prepare_module
from moejax import workers as workers_module
from moejax.config import ConfigError, DataConfig
from moejax.corpus import Corpus, load_corpus
from moejax.errors import NoSpaceError, UnavailableError
from moejax.prepare import prepare
from moejax.tokenizer import load_tokenizer
from moejax.workers import in_order


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def _prepare(*inputs, output="out", **options) -> dict:
    return prepare(
        list(inputs), "bytes", output, **({"workers": 1, "show_progress": False} | options)
    )


def _load(path="out") -> tuple[Corpus, Corpus]:
    config = DataConfig(source="prepared", path=path)
    return load_corpus(config, "train"), load_corpus(config, "validation")


def _documents(*corpora: Corpus) -> list[tuple[str, str]]:
    """(domain, text) of every document, in the order of the corpora."""
    decode = load_tokenizer("bytes").decode
    return [
        (corpus.domains[domain], decode(corpus.token_n[start : stop - 1]))
        for corpus in corpora
        for start, stop, domain in zip(
            corpus.start_d[:-1], corpus.start_d[1:], corpus.domain_d, strict=True
        )
    ]


def _write(path: str, data: str | bytes) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def _write_jsonl(path: str, texts, field="text") -> str:
    return _write(path, "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts))


def _write_parquet(path: str, texts, field="text", **options) -> str:
    pyarrow = importlib.import_module("pyarrow")
    table = pyarrow.table({"id": list(range(len(texts))), field: texts})
    importlib.import_module("pyarrow.parquet").write_table(table, path, **options)
    return path


def test_text_files_and_folders():
    for i in range(5):
        _write(f"books/{i}.txt", f"book {i}\r\n\u00e9")
        _write(f"letters/deep/er/{i}.txt", f"letter {i}")
    _write("letters/notes.pdf", "not text")
    meta = _prepare("books/*.txt", "mail=letters")
    train, validation = _load()
    assert train.domains == ("books", "mail")
    assert sorted(_documents(train, validation)) == sorted(
        [("books", f"book {i}\r\n\u00e9") for i in range(5)]
        + [("mail", f"letter {i}") for i in range(5)]
    )
    assert meta["num_files"] == 10
    assert meta == json.loads(Path("out/meta.json").read_text())
    assert sorted(path.name for path in Path().iterdir()) == ["books", "letters", "out"]


TEXTS = [f"text {i} \u00f1 \U0001f600 \n" for i in range(60)]


def test_jsonl_with_a_field_in_pieces_of_any_size(monkeypatch):
    _write_jsonl("shards/a.jsonl", TEXTS, field="body")
    expected = sorted(("shards", text) for text in TEXTS)
    _prepare("shards/a.jsonl", field="body", output="whole")
    assert sorted(_documents(*_load("whole"))) == expected
    for size in (1, 7, 100):  # pieces that end inside lines, on their ends, and hold none at all
        monkeypatch.setattr(prepare_module, "_PIECE_BYTES", size)
        _prepare("shards/a.jsonl", field="body", output=f"in{size}")
        for split, other in zip(_load("whole"), _load(f"in{size}"), strict=True):
            assert split.fingerprint == other.fingerprint


def test_jsonl_without_text_in_some_lines():
    _write(
        "a.jsonl", b'\xef\xbb\xbf{"text": "one"}\n\n{"text": null}\r\n{"text": ""}\n{"text": "two"}'
    )
    meta = _prepare("a.jsonl")
    assert sorted(text for _, text in _documents(*_load())) == ["one", "two"]
    assert meta["num_empty"] == 2


def test_parquet_with_row_groups():
    _write_parquet("a.parquet", [*TEXTS, None], field="body", row_group_size=7)
    meta = _prepare("p=a.parquet", field="body")
    assert sorted(_documents(*_load())) == sorted(("p", text) for text in TEXTS)
    assert meta["num_empty"] == 1


def test_the_folder_is_the_same_for_any_number_of_workers(monkeypatch):
    monkeypatch.setattr(prepare_module, "_PIECE_BYTES", 500)
    _write_jsonl("in/a.jsonl", TEXTS)
    _write_parquet("in/b.parquet", [text + "b" for text in TEXTS], row_group_size=20)
    for i in range(9):
        _write(f"in/{i}.txt", f"file {i} " * 30)
    for workers in (1, 2, 3):
        _prepare("in", output=f"out{workers}", workers=workers, show_progress=workers == 2)
    files = sorted(path.relative_to("out1") for path in Path("out1").rglob("*") if path.is_file())
    assert len(files) == 5
    for file in files:
        data = [Path(f"out{workers}", file).read_bytes() for workers in (1, 2, 3)]
        assert data[0] == data[1] == data[2], file
    corpus = _load("out3")[0]
    assert corpus.num_documents > 100


def _in_workers(groups: list[list[str]], workers: int = 2, seconds: float = 60.0):
    """The results of workers for groups of files."""
    pieces = [[prepare_module.Piece(path, 0, 0, 4, 4) for path in group] for group in groups]
    start = prepare_module._start_worker
    return in_order(prepare_module._work, pieces, workers, seconds, start, "bytes", "text")


def test_a_worker_that_is_killed_is_an_error_at_once():
    """By the kernel, for want of memory, say."""
    results = _in_workers([[_write(f"{i}.txt", "text")] for i in range(4)], workers=1)
    next(results)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    with pytest.raises(ConfigError, match=r"one of 1 worker processes died .*use --workers 1"):
        list(results)


def test_a_worker_that_hangs_is_an_error_that_names_the_file(monkeypatch):
    """A pipe that nobody writes into is a file server that does not answer. As long as a worker
    uses the processor it is waited for, whatever the limit: a document may be large."""
    os.mkfifo("pipe.txt")
    first, last = _write("a.txt", "text"), _write("b.txt", "text")
    results = _in_workers([[first], [last, "pipe.txt", first], [last]], seconds=3.0)
    assert next(results).length_d == [5]
    looks, measured = [], workers_module._processor_time

    def working(process: int) -> int:
        looks.append(process)
        return len(looks) if len(looks) < 25 else measured(process)

    monkeypatch.setattr(workers_module, "_processor_time", working)
    with pytest.raises(
        UnavailableError, match=r"process \d+ has done nothing for .*=3 .*pipe\.txt;"
    ):
        next(results)
    assert len(looks) >= 45
    assert not multiprocessing.active_children()


def test_workers_that_are_stopped_are_an_error_and_leave_nothing(monkeypatch):
    monkeypatch.setattr(prepare_module, "_PIECE_BYTES", 500)
    _write_jsonl("in/a.jsonl", TEXTS)
    ended = threading.Event()

    def stop() -> None:
        while not ended.wait(0.02):
            for child in multiprocessing.active_children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGSTOP)

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        with pytest.raises(UnavailableError, match=r"done nothing for .*=1 .*in/a\.jsonl;") as e:
            _prepare("in", workers=2, timeout_seconds=1)
    finally:
        ended.set()
        thread.join()
    assert e.value.code == 69
    assert not multiprocessing.active_children()
    assert [path.name for path in Path().iterdir()] == ["in"]


def test_an_error_does_not_wait_for_a_worker_that_hangs():
    os.mkfifo("pipe.txt")
    groups = [[_write("bad.txt", b"\xff")], ["pipe.txt"]]
    with pytest.raises(ConfigError, match=r"bad\.txt is not UTF-8"):
        list(_in_workers(groups, seconds=600.0))
    assert not multiprocessing.active_children()


def test_an_error_in_a_worker_comes_out_and_leaves_nothing(monkeypatch):
    monkeypatch.setattr(prepare_module, "_PIECE_BYTES", 500)
    _write_jsonl("in/a.jsonl", TEXTS)
    _write("in/b.jsonl", '{"text": "fine"}\n{"txt": 1}\n')
    with pytest.raises(ConfigError, match=r"b\.jsonl line 2 has no field 'text' but 'txt'"):
        _prepare("in", workers=2)
    assert [path.name for path in Path().iterdir()] == ["in"]


# The split


def test_the_split_goes_by_text():
    """About a tenth of many documents; equal texts are on one side wherever they are."""
    _write_jsonl("a.jsonl", [f"text {i % 500}" for i in range(1000)])
    _prepare("a.jsonl", validation_fraction=0.1)
    train, validation = _load()
    assert train.num_documents + validation.num_documents == 1000
    assert 50 <= validation.num_documents <= 150
    assert not set(_documents(train)) & set(_documents(validation))


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 5])
def test_each_split_has_a_document(fraction, count):
    _write_jsonl("a.jsonl", [f"text {i}" for i in range(count)])
    _prepare("a.jsonl", validation_fraction=fraction)
    train, validation = _load()
    few = validation if fraction < 0.5 else train
    assert train.num_documents + validation.num_documents == count
    assert [text for _, text in _documents(few)] == [f"text {count - 1}"]


def test_a_document_that_is_alone_is_cut():
    _write("only/a.txt", "x" * 95 + "y" * 4)  # and the end: 100 tokens
    _prepare("only/a.txt")
    train, validation = _load()
    assert _documents(train, validation) == [("only", "x" * 95), ("only", "y" * 4)]
    np.testing.assert_array_equal(train.token_n[-1:], 256)


# Errors


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"text": "a"}\n{"other": 1, "b": 2}\n', r"line 2 has no field 'text' but 'other', 'b';"),
        ("{}\n", r"line 1 has no field 'text' but none;"),
        ('{"text": "a"}\n\n{"text": \n', r"line 3 is not valid JSON \(.*and --field names"),
        ("[1]\n", r"line 1 is a list, not an object"),
        ('{"text": 5}\n', r"line 1 has a int in 'text'"),
        ('{"text": "\\ud800"}\n', r"line 1 has half of a surrogate pair in 'text'"),
        (b'{"text": "a"}\n{"text": "\xe9"}\n', r"is not UTF-8: byte 0xe9 at offset 24 \("),
        ("[" * 100_000, r"line 1 is not valid JSON"),
    ],
)
def test_bad_lines(data, message):
    _write("a.jsonl", data)
    with pytest.raises(ConfigError, match=r"a\.jsonl " + message):
        _prepare("a.jsonl")
    assert not Path("out").exists()


def test_line_numbers_far_into_a_file(monkeypatch):
    monkeypatch.setattr(prepare_module, "_PIECE_BYTES", 64)
    _write("a.jsonl", '{"text": "abc"}\n' * 99 + "oops\n")
    with pytest.raises(ConfigError, match=r"a\.jsonl line 100 is not valid JSON"):
        _prepare("a.jsonl")


def test_text_that_is_not_utf8():
    _write("a.txt", b"caf\xe9 au lait")
    with pytest.raises(ConfigError, match=r"a\.txt is not UTF-8: byte 0xe9 at offset 3 .*iconv"):
        _prepare("a.txt")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_cannot_be_read(name):
    """Gone after it was found. No permission comes the same way, but root has every permission."""
    piece = prepare_module.Piece(name, 0, 0, 10, 10)
    with pytest.raises(ConfigError, match=rf"{name} cannot be read \(No such file or directory\)"):
        list(prepare_module._read_texts(piece, "text"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_an_empty_file(name):
    _write(name, "")
    _write("b.txt", "text")
    with pytest.raises(ConfigError, match=rf"{name} is empty \(0 bytes\); remove it"):
        _prepare(name, "b.txt")


def test_no_text_at_all():
    _write("a.txt", " \n\n ")
    with pytest.raises(ConfigError, match=r"the inputs hold no text \(1 empty documents\)"):
        _prepare("a.txt")


@pytest.mark.parametrize("pattern", ["gone/*.txt", "a=gone.txt", "."])
def test_no_files(pattern):
    with pytest.raises(
        ConfigError, match=r"no files match '(gone/\*\.txt|gone\.txt|\.)' \(in .*quoted"
    ):
        _prepare(pattern)


def test_a_format_that_is_not_read():
    _write("a.pdf", "x")
    with pytest.raises(
        ConfigError, match=r"a\.pdf ends in '\.pdf'; moejax prepare reads \.txt, \.jsonl,"
    ):
        _prepare("a.*")


def test_a_parquet_file_without_the_column():
    _write_parquet("a.parquet", TEXTS, field="body")
    with pytest.raises(
        ConfigError, match=r"a\.parquet has no column 'text', only 'id', 'body'; .*--field"
    ):
        _prepare("a.parquet")
    with pytest.raises(
        ConfigError, match=r"a\.parquet has int64 in column 'id'; name a column of strings"
    ):
        _prepare("a.parquet", field="id")


def test_a_parquet_file_that_is_none():
    _write("a.parquet", "text")
    with pytest.raises(ConfigError, match=r"a\.parquet cannot be read as Parquet \("):
        _prepare("a.parquet")
    Path("a.parquet").unlink()
    importlib.import_module("pyarrow.parquet").write_table(
        importlib.import_module("pyarrow").table(
            {"text": importlib.import_module("pyarrow").array([], "string")}
        ),
        "a.parquet",
    )
    with pytest.raises(ConfigError, match=r"a\.parquet is empty \(0 rows\)"):
        _prepare("a.parquet")


def test_parquet_without_its_package(monkeypatch):
    _write_parquet("a.parquet", TEXTS)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"needs the package pyarrow.*'moejax\[parquet\]'"):
        _prepare("a.parquet")


def test_an_output_that_is_there():
    _write("a.txt", "text")
    _write("out/other.txt", "precious")
    with pytest.raises(
        ConfigError, match=r"--output .*out is there already and not empty; name another"
    ):
        _prepare("a.txt")
    assert [path.name for path in Path("out").iterdir()] == ["other.txt"]
    Path("empty").mkdir()
    _prepare("a.txt", output="empty")
    assert Path("empty/meta.json").exists()


def test_an_output_that_cannot_be_written():
    _write("a.txt", "text")
    with pytest.raises(
        ConfigError, match=r"--output .*a\.txt/out cannot be written \(Not a directory"
    ):
        _prepare("a.txt", output="a.txt/out")


def test_one_file_in_two_domains():
    _write("t/a.txt", "text")
    with pytest.raises(ConfigError, match=r"a\.txt is in two domains, 'x' and 'y'; let each file"):
        _prepare("x=t/*.txt", "y=t/a.txt")


def test_a_file_by_two_names_is_read_once():
    _write("t/a.txt", "text one")
    _write("t/b.txt", "text two")
    Path("t/c.txt").symlink_to("a.txt")
    assert _prepare("t/*.txt", "./t/a.txt", "t", str(Path("t/b.txt").absolute()))["num_files"] == 2
    assert len(_documents(*_load())) == 2


def test_too_many_domains():
    for i in range(257):
        _write(f"t/{i}.txt", "text")
    with pytest.raises(ConfigError, match=r"the inputs name 257 domains, more than 256; use name="):
        _prepare(*(f"d{i}=t/{i}.txt" for i in range(257)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 0.0}, r"validation_fraction=0\.0 is outside \(0, 1\)"),
        ({"workers": 0}, r"workers=0 is below 1"),
        ({"timeout_seconds": 0}, r"timeout_seconds=0 is not a finite number above 0"),
    ],
)
def test_options_out_of_range(options, message):
    _write("a.txt", "text")
    with pytest.raises(ConfigError, match=message):
        _prepare("a.txt", **options)


def test_a_parquet_file_that_is_damaged_inside():
    """Its footer is sound, its pages are not."""
    _write_parquet("a.parquet", [f"row {i} " * 9 for i in range(200)], compression="none")
    data = bytearray(Path("a.parquet").read_bytes())
    data[4:2000] = bytes(1996)
    _write("a.parquet", bytes(data))
    with pytest.raises(ConfigError, match=r"a\.parquet cannot be read as Parquet \("):
        _prepare("a.parquet")
    assert not Path("out").exists()


def test_a_disk_that_is_full_leaves_nothing():
    _write("a.txt", "text " * 20_000)
    with file_limit(1000), pytest.raises(NoSpaceError, match=r"did not get to --output .*out \("):
        _prepare("a.txt")
    assert sorted(path.name for path in Path().iterdir()) == ["a.txt"]


def test_an_unknown_home_is_a_name_like_any_other():
    _write("a.txt", "text")
    _prepare("a.txt", output="~no_such_user")
    assert Path("~no_such_user/meta.json").is_file()


def test_an_object_with_many_fields_is_not_printed_whole():
    _write("a.jsonl", json.dumps({f"field {i}": 1 for i in range(10_000)}))
    with pytest.raises(ConfigError, match="has no field 'text' but 'field 0'") as error:
        _prepare("a.jsonl")
    assert len(str(error.value)) < 600


def test_a_document_without_end_is_refused(monkeypatch):
    """Reading it would fill the memory; a sparse file of terabytes costs nobody anything."""
    _write("a.txt", "text")
    os.truncate("a.txt", 1 << 42)
    with pytest.raises(ConfigError, match=r"a\.txt has 4,398,046,511,104 bytes, and a \.txt"):
        _prepare("a.txt")
    monkeypatch.setattr(prepare_module, "_DOCUMENT_BYTES", 50)
    _write("b.jsonl", json.dumps({"text": "x"}) + "\n" + json.dumps({"text": "x" * 60}))
    with pytest.raises(ConfigError, match=r"b\.jsonl line 2 has 50 bytes or more"):
        _prepare("b.jsonl")
