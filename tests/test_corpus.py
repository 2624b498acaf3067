"""Embedded text and prepared folders: what is in them, and what is said when that is wrong."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moejax import corpus as corpus_module
from moejax.config import ConfigError, DataConfig
from moejax.corpus import embedded_documents, fingerprint, load_corpus, make_corpus
from moejax.data import TrainBatches
from moejax.prepare import prepare
from moejax.token_file import CorruptData, chunk_checksums
from moejax.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def splits():
    return {split: load_corpus(DataConfig(), split) for split in ("train", "validation")}


def _texts(corpus) -> list[tuple[int, str]]:
    tokenizer = load_tokenizer("bytes")
    ranges = zip(corpus.start_d[:-1], corpus.start_d[1:], corpus.domain_d, strict=True)
    return [(int(d), tokenizer.decode(corpus.token_n[a : b - 1])) for a, b, d in ranges]


def test_every_embedded_document_is_in_one_split_whole(splits):
    found = _texts(splits["train"]) + _texts(splits["validation"])
    assert sorted(found) == sorted((d.domain, d.text) for d in embedded_documents())
    for corpus in splits.values():
        np.testing.assert_array_equal(corpus.token_n[corpus.start_d[1:] - 1], 256)
        assert (corpus.token_n == 256).sum() == corpus.num_documents


def test_the_domains_have_similar_weight(splits):
    corpus = splits["train"]
    assert corpus.domains == ("english", "spanish", "python")
    tokens = np.bincount(corpus.domain_d, weights=np.diff(corpus.start_d))
    assert tokens.min() > 3_000_000
    assert tokens.max() < 1.3 * tokens.min()
    validation = np.bincount(splits["validation"].domain_d, minlength=3)
    assert (validation / (validation + np.bincount(corpus.domain_d)) < 0.12).all()
    assert (validation > 5).all()


def test_a_chapter_and_its_translation_are_on_one_side(splits):
    keys = {(d.domain, d.text): d.key for d in embedded_documents()}
    sides = {}
    for split, corpus in splits.items():
        for document in _texts(corpus):
            sides.setdefault(keys[document], []).append(split)
    chapters = {key: found for key, found in sides.items() if not key.endswith(".py")}
    assert len(chapters) == 1189
    assert {len(found) for found in chapters.values()} == {2}
    assert all(len(set(found)) == 1 for found in sides.values())


def test_neighbours_are_of_all_domains(splits):
    domain_d = splits["train"].domain_d
    changes = (domain_d[1:] != domain_d[:-1]).mean()
    assert changes > 0.45  # 0.55 expected of a shuffle, 0.0 of a sorted list


def test_the_texts_are_clean():
    documents = {(d.key, d.domain): d.text for d in embedded_documents()}
    assert documents["Gen.1", 0].startswith(
        "In the beginning God created the heaven and the earth.\nAnd the earth was without form"
    )
    assert documents["Gen.1", 1].startswith("EN el principio crió Dios los cielos y la tierra.\n")
    assert (
        documents["Gen.50", 0].rstrip().endswith("put in a coffin in Egypt.")
    )  # last verse of a book
    for domain in (0, 1):
        prose = "".join(text for (_, d), text in documents.items() if d == domain)
        assert not set("<>&\\\t{}=") & set(prose)
        assert "  " not in prose
    assert not any(
        key.startswith(("test/", "site-packages/", "encodings/")) for key, _ in documents
    )


def test_loading_is_repeatable_in_another_process(splits):
    code = (
        "import sys; from moejax.corpus import load_corpus; from moejax.config import DataConfig\n"
        "import moejax.data, moejax.prepare, moejax.tokenizer\n"
        "print(load_corpus(DataConfig(), 'validation').fingerprint, 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [splits["validation"].fingerprint, "False"]


def test_the_fingerprint_sees_tokens_offsets_domains_and_names():
    tokenizer = load_tokenizer("bytes")
    ids = np.arange(6, dtype=np.int32)
    prints = {
        make_corpus(documents, names, tokenizer).fingerprint
        for documents, names in [
            ([(0, ids[:3]), (1, ids[3:])], ("a", "b")),
            ([(0, ids[:3]), (1, ids[3:])], ("a", "c")),
            ([(1, ids[:3]), (1, ids[3:])], ("a", "b")),
            ([(0, ids[:2]), (1, ids[2:])], ("a", "b")),
            ([(0, ids[:3]), (1, ids[3:] + 1)], ("a", "b")),
        ]
    }
    assert len(prints) == 5


def test_a_damaged_asset_is_detected(tmp_path, monkeypatch):
    shutil.copytree(Path(corpus_module.__file__).parent / "assets", tmp_path / "assets")
    asset = tmp_path / "assets" / "bible_en_es.tsv.xz"
    data = bytearray(asset.read_bytes())
    data[1000] ^= 1
    asset.write_bytes(data)
    monkeypatch.setattr(corpus_module.resources, "files", lambda package: tmp_path)
    with pytest.raises(ConfigError, match=r"tsv\.xz is damaged: its sha256 is .*reinstall moejax"):
        corpus_module._read_asset("bible_en_es.tsv.xz")


def test_an_interpreter_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"no Python sources found .*data\.source=prepared"):
        corpus_module._python_files()


def test_standard_library_selection(tmp_path, monkeypatch):
    """Tests, tables and files that are not UTF-8 stay out; the choice stops at the size."""
    for name in (
        "a.py",
        "b/c.py",
        "test/t.py",
        "b/tests/t.py",
        "encodings/cp1.py",
        "_sysconfigdata_x.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "empty.py").touch()
    monkeypatch.setattr(corpus_module.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert sorted(d.key for d in corpus_module._python_files()) == ["a.py", "b/c.py"]
    monkeypatch.setattr(corpus_module, "_PYTHON_BYTES", 1)
    assert len(corpus_module._python_files()) == 1


# Prepared folders


@pytest.fixture
def folder(tmp_path) -> Path:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i:02}.txt").write_text(f"document {i} {'x' * i}")
    prepare([str(texts)], "bytes", str(tmp_path / "out"), workers=1, show_progress=False)
    return tmp_path / "out"


def _config(folder: Path, **changes) -> DataConfig:
    return DataConfig(source="prepared", path=str(folder), **changes)


def test_prepared_round_trip(folder):
    train, validation = (load_corpus(_config(folder), split) for split in ("train", "validation"))
    texts = [text for corpus in (train, validation) for _, text in _texts(corpus)]
    assert sorted(texts) == sorted(f"document {i} {'x' * i}" for i in range(40))
    assert train.domains == ("texts",)
    assert validation.num_documents >= 1
    assert train.token_n.dtype == np.uint16
    counts = np.bincount(train.token_n[:], minlength=300)
    np.testing.assert_array_equal(train.token_counts(300), counts)
    rebuilt = make_corpus(
        [(0, load_tokenizer("bytes").encode(text)) for _, text in _texts(train)],
        ("texts",),
        load_tokenizer("bytes"),
    )
    assert rebuilt.fingerprint == train.fingerprint


def test_no_data_at_the_path(tmp_path):
    with pytest.raises(
        ConfigError, match=r"no prepared data at .*gone.*meta\.json.*moejax prepare"
    ):
        load_corpus(_config(tmp_path / "gone"), "train")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": "other"}', '{"format": "moejax-prepared"}']
)
def test_a_meta_file_of_something_else(tmp_path, text):
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(
        ConfigError, match=r"meta\.json (is not JSON|does not describe prepared data)"
    ):
        load_corpus(_config(tmp_path), "train")


@pytest.mark.parametrize("name", ["tokens.bin", "documents.npz"])
def test_a_file_of_another_size(folder, name):
    path = folder / "train" / name
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(
        ConfigError, match=rf"{name} has {size - 2} bytes and meta\.json says {size};"
    ):
        load_corpus(_config(folder), "train")
    path.unlink()
    with pytest.raises(ConfigError, match=rf"{name} is missing .*prepare the text again"):
        load_corpus(_config(folder), "train")


def test_a_token_beyond_the_vocabulary(folder):
    path = folder / "train" / "tokens.bin"
    tokens = np.fromfile(path, "<u2")
    tokens[17] = 300
    tokens.tofile(path)
    checksums(folder, tokens)
    with pytest.raises(
        ConfigError,
        match=r"token id 300 is not below the vocabulary of 257: .*tokens\.bin, document 1 of "
        r"domain 'texts', token 5 of it, 17 of all",
    ):
        load_corpus(_config(folder), "train")


def test_tokens_that_were_changed(folder):
    path = folder / "train" / "tokens.bin"
    tokens = np.fromfile(path, "<u2")
    tokens[17] = (tokens[17] + 1) % 256
    tokens.tofile(path)
    with pytest.raises(ConfigError, match=r"tokens\.bin was changed .*bytes 0 to \d+ have another"):
        load_corpus(_config(folder), "train")
    checksums(folder, tokens)  # as if somebody had prepared it so
    with pytest.raises(
        ConfigError, match=r"train was changed after it was prepared: its fingerprint"
    ):
        load_corpus(_config(folder), "train")


def checksums(folder: Path, tokens: np.ndarray) -> None:
    """Makes the checksums fit changed tokens."""
    path = folder / "train" / "documents.npz"
    arrays = dict(np.load(path))
    sums: list[int] = []
    chunk_checksums(tokens.tobytes(), sums, 0)
    np.savez(path, **arrays | {"checksum_c": np.array(sums, np.uint32)})
    vouch(folder)


def vouch(folder: Path) -> None:
    """Makes meta.json fit changed documents."""
    documents, file = folder / "train" / "documents.npz", folder / "meta.json"
    meta = json.loads(file.read_text())
    meta["splits"]["train"]["documents_bytes"] = documents.stat().st_size
    digest = hashlib.sha256(documents.read_bytes()).hexdigest()
    meta["splits"]["train"]["documents_sha256"] = digest
    file.write_text(json.dumps(meta))


def test_damage_is_found_when_it_is_read_where_it_may_be_skipped(folder):
    path = folder / "train" / "tokens.bin"
    data = bytearray(path.read_bytes())
    data[34] ^= 1
    path.write_bytes(data)
    corpus = load_corpus(_config(folder, on_corrupt="skip"), "train")
    assert corpus.skip_corrupt
    with pytest.raises(CorruptData, match=r"tokens\.bin was changed"):
        corpus.token_n[:5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domains": [1]}, "lacks a usable domains"),
        ({"domains": []}, "lacks a usable domains"),
        ({"splits": {"train": {}}}, r"lacks a usable splits\.train\.num_tokens, .*validation"),
        ({"tokenizer_fingerprint": None}, "lacks a usable tokenizer_fingerprint"),
    ],
)
def test_a_meta_file_with_a_hole(folder, change, message):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | change))
    with pytest.raises(ConfigError, match=message):
        load_corpus(_config(folder), "train")


@pytest.mark.parametrize("dtype", ["<u4", "<f2", ">u2", "object", "x"])
def test_ids_of_another_dtype(folder, dtype):
    meta = json.loads((folder / "meta.json").read_text())
    meta["splits"]["train"]["dtype"] = dtype
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ConfigError, match=rf"ids of dtype '{dtype}', and a vocabulary of 257 has"):
        load_corpus(_config(folder), "train")


@pytest.mark.parametrize("name", ["start_d", "domain_d", "checksum_c"])
def test_documents_that_do_not_fit_their_tokens(folder, name):
    path = folder / "train" / "documents.npz"
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {name: arrays[name][:-1]})
    vouch(folder)
    with pytest.raises(ConfigError, match=r"documents\.npz does not fit the \d+ tokens and 1 dom"):
        load_corpus(_config(folder), "train")


def test_every_flipped_bit_in_the_documents_is_found(folder):
    """Also in the bytes of a zip file that nothing reads."""
    path = folder / "train" / "documents.npz"
    before = path.read_bytes()
    for place in range(0, len(before), 5):
        data = bytearray(before)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=r"documents\.npz is damaged .*another SHA-256"):
            load_corpus(_config(folder), "train")


def test_data_that_an_older_version_prepared(folder):
    """Without the SHA-256 of its documents, which a newer one has to have."""
    file, train = folder / "meta.json", load_corpus(_config(folder), "train")
    meta = json.loads(file.read_text())
    for about in meta["splits"].values():
        del about["documents_sha256"]
    file.write_text(json.dumps(meta))
    with pytest.raises(ConfigError, match=r"lacks a usable splits\.train\.documents_sha256, spl"):
        load_corpus(_config(folder), "train")
    file.write_text(json.dumps(meta | {"version": 2}))
    older = load_corpus(_config(folder), "train")
    assert older.fingerprint == train.fingerprint
    np.testing.assert_array_equal(older.start_d, train.start_d)
    path = folder / "train" / "documents.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 4] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"documents\.npz (is damaged|does not fit)"):
        load_corpus(_config(folder), "train")


def test_an_empty_split(folder):
    """No tokens is no error of the file: who makes batches of it says so."""
    meta = json.loads((folder / "meta.json").read_text())
    path = folder / "train" / "documents.npz"
    np.savez(
        path,
        start_d=np.zeros(1, np.int64),
        domain_d=np.zeros(0, np.uint8),
        checksum_c=np.zeros(0, np.uint32),
    )
    (folder / "train" / "tokens.bin").write_bytes(b"")
    about = meta["splits"]["train"]
    about |= {"num_tokens": 0, "num_documents": 0}
    about["fingerprint"] = fingerprint(
        hashlib.sha256(), np.zeros(1, np.int64), np.zeros(0, np.uint8), ("texts",)
    )
    (folder / "meta.json").write_text(json.dumps(meta))
    vouch(folder)
    corpus = load_corpus(_config(folder), "train")
    with pytest.raises(ConfigError, match=r"0 tokens, 0 sequences .* fewer than"):
        TrainBatches(corpus, 8, 4, seed=0)


def test_documents_are_never_unpickled(folder):
    path = folder / "train" / "documents.npz"
    np.savez(path, start_d=np.array([{}], object), domain_d=np.zeros(1, np.uint8))
    vouch(folder)
    with pytest.raises(ConfigError, match=r"documents\.npz is damaged .*allow_pickle"):
        load_corpus(_config(folder), "train")


def test_prepared_with_another_tokenizer(folder):
    meta = json.loads((folder / "meta.json").read_text())
    meta |= {"tokenizer": "other.json", "tokenizer_fingerprint": hashlib.sha256(b"").hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(
        ConfigError, match=r"prepared with the tokenizer 'other\.json' .*use data\.token"
    ):
        load_corpus(_config(folder), "train")


# The script that builds the asset


def test_cleaning_markup():
    path = Path(__file__).parents[1] / "scripts" / "build_corpus.py"
    spec = importlib.util.spec_from_file_location("build_corpus", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    osis = (
        '<w lemma="a">Y</w><transChange type="added">es</transChange> el '
        '<divineName>Se&amp;ñor</divineName><note n="1">not <b>this</b></note>, <w>guárda</w>'
        '<transChange type="added">lo</transChange>,<lb/>\\nd  fin\u00b6.'
    )
    assert script.clean(osis) == "Y es el SE&ÑOR , guárdalo, fin ."


def test_documents_that_unpack_to_more_than_they_are(folder):
    """A bomb: a file of the size that meta.json says, which would fill the memory."""
    file = folder / "train" / "documents.npz"
    with np.load(file) as arrays:
        np.savez_compressed(file, **arrays, more=np.zeros(1 << 20))
    vouch(folder)
    with pytest.raises(ConfigError, match=r"documents.npz is damaged .*larger inside than outside"):
        load_corpus(_config(folder), "train")


@pytest.mark.parametrize("name", ["meta.json", "train/tokens.bin", "train/documents.npz"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    meta = folder / "meta.json"
    if name.endswith("npz"):  # of the size that a pipe has
        meta.write_text(re.sub(r'"documents_bytes": \d+', '"documents_bytes": 0', meta.read_text()))
    with pytest.raises(ConfigError, match="it is no file"):
        load_corpus(_config(folder), "train")
