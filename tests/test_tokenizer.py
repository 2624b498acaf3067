"""Tokenizers: bytes, Mixtral's own SentencePiece model, a byte-level BPE trained here."""

import importlib
import importlib.metadata
import json
import os

import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.tokenizer import load_tokenizer

TEXT = "In the beginning\n\n  él llamó: \u00bfQué? \U0001f600\tdef f(x):\n    return x</s> <s>\n"


@pytest.fixture(scope="module")
def mixtral_path() -> str:
    """Mixtral-8x7B's tokenizer, which mistral-common ships (the package is not imported)."""
    files = importlib.metadata.files("mistral-common") or []
    (path,) = [file for file in files if file.name == "tokenizer.model.v1"]
    return str(path.locate())


@pytest.fixture(scope="module")
def bpe_path(tmp_path_factory) -> str:
    tokenizers = importlib.import_module("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<pad>", "</s>"],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["the beginning of the beginning", "qué llamó"], trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode("\u00e9A")
    np.testing.assert_array_equal(ids, [0xC3, 0xA9, 65])
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)
    assert tokenizer.decode([0xC3, 0xA9, 256, 263, 65]) == "\u00e9A"
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    np.testing.assert_array_equal(tokenizer.bytes_v, [1] * 256 + [0])


def test_mixtral_round_trip(mixtral_path):
    tokenizer = load_tokenizer(mixtral_path)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.vocab_size == 32_000
    assert tokenizer.end_of_document == 2
    assert tokenizer.decode([*ids, 2, 40_000]) == TEXT
    assert not np.isin(ids, [0, 1, 2]).any()  # "</s>" in a text is text
    # The first piece holds a space that is not in the text; it is never a target.
    assert tokenizer.bytes_v[ids].sum() == len(TEXT.encode()) + 1
    np.testing.assert_array_equal(tokenizer.bytes_v[:4], [0, 0, 0, 1])  # unk, bos, eos, <0x00>


def test_byte_level_bpe_round_trip(bpe_path):
    tokenizer = load_tokenizer(bpe_path)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.end_of_document == 1
    assert tokenizer.vocab_size == 280
    assert len(ids) < len(TEXT.encode())
    assert tokenizer.decode([*ids, 1]) == TEXT
    assert not np.isin(ids, [0, 1]).any()
    assert tokenizer.bytes_v[ids].sum() == len(TEXT.encode())
    np.testing.assert_array_equal(tokenizer.bytes_v[:2], [0, 0])


def test_pieces_that_begin_with_number_signs_count_them(mixtral_path, bpe_path, tmp_path):
    """Headings of Markdown: only WordPiece writes ## before what goes on with a word."""
    text = "x\n## Heading\n#### deep"
    tokenizer = load_tokenizer(mixtral_path)
    ids = tokenizer.encode(text)
    assert "##" in [tokenizer.decode([i]) for i in ids]
    assert tokenizer.bytes_v[ids].sum() == len(text) + 1
    tokenizers = importlib.import_module("tokenizers")
    added = tokenizers.Tokenizer.from_file(bpe_path)
    added.add_tokens(["##", "<0x41>"])
    added.save(str(tmp_path / "added.json"))
    tokenizer = load_tokenizer(str(tmp_path / "added.json"))
    ids = tokenizer.encode("a ## b <0x41>")
    assert tokenizer.bytes_v[ids].sum() == 13
    assert np.isin([280, 281], ids).all()


@pytest.mark.parametrize(
    ("about", "sizes"),
    [
        ({"type": "WordPiece", "continuing_subword_prefix": "##"}, [2, 3, 7, 1, 0]),
        ({"type": "BPE", "end_of_word_suffix": "</w>", "merges": []}, [2, 5, 4, 1, 0]),
    ],
)
def test_affixes_of_pieces_are_no_text(tmp_path, about, sizes):
    """A suffix stands for the space after a word."""
    pieces = {"ab": 0, "##abc": 1, "abc</w>": 2, "b": 3, "?": 4}
    about |= {"unk_token": "?", "vocab": pieces, "max_input_chars_per_word": 9}
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": about}))
    np.testing.assert_array_equal(load_tokenizer(str(path)).bytes_v[:5], sizes)


def test_letters_that_a_bpe_would_leave_out_are_an_error(tmp_path):
    """Trained on English without the alphabet of all bytes, it has no id for an accent."""
    tokenizers = importlib.import_module("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=40, show_progress=False)
    tokenizer.train_from_iterator(["the beginning of the end"], trainer)
    assert tokenizer.encode("the é end").ids == tokenizer.encode("the  end").ids  # lost
    tokenizer.save(str(tmp_path / "x.json"))
    loaded = load_tokenizer(str(tmp_path / "x.json"))
    assert loaded.decode(loaded.encode("the end")) == "the end"
    with pytest.raises(ConfigError, match=r"no id for a part of ' é', which would be lost\); give"):
        loaded.encode("the é end")
    tokenizer.add_tokens(["<hr>"])  # which has an id without its letters
    tokenizer.save(str(tmp_path / "y.json"))
    added = load_tokenizer(str(tmp_path / "y.json"))
    assert added.decode(added.encode("the<hr>end")) == "the<hr>end"
    with pytest.raises(ConfigError, match="no id for a part of '<'"):
        added.encode("the<hr><end")


def test_end_of_document_is_added_where_there_is_none(bpe_path, tmp_path):
    with open(bpe_path, encoding="utf-8") as file:
        about = json.load(file)
    about["added_tokens"] = []
    about["model"]["vocab"] = {
        piece.replace("</s>", "plain"): number for piece, number in about["model"]["vocab"].items()
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(about), "utf-8")
    tokenizer = load_tokenizer(str(path))
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (281, 280)
    assert tokenizer.bytes_v.shape == (281,)
    assert tokenizer.bytes_v[280] == 0
    assert tokenizer.decode([*tokenizer.encode("the end"), 280]) == "the end"


def test_fingerprints_differ(bpe_path, mixtral_path):
    names = ("bytes", bpe_path, mixtral_path)
    assert len({load_tokenizer(name).fingerprint for name in names}) == 3
    assert load_tokenizer(bpe_path).fingerprint == load_tokenizer(bpe_path).fingerprint


@pytest.mark.parametrize("suffix", ["json", "model"])
def test_a_file_that_is_no_tokenizer(tmp_path, suffix):
    path = tmp_path / f"broken.{suffix}"
    path.write_bytes(b"\xffnot a tokenizer")
    with pytest.raises(ConfigError, match=rf"broken\.{suffix}' is not a .*ends in \.json is read"):
        load_tokenizer(str(path))


def test_no_file(tmp_path):
    with pytest.raises(
        ConfigError, match=r"data\.tokenizer='gone\.json' is not a file; use 'bytes'"
    ):
        load_tokenizer("gone.json")
    with pytest.raises(ConfigError, match=r"is a folder; use 'bytes'"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("fixture", "package"), [("bpe_path", "tokenizers"), ("mixtral_path", "sentencepiece")]
)
def test_a_package_that_is_missing(request, monkeypatch, fixture, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(
        ConfigError, match=rf"{package}, which is not installed; .*moejax\[tokenizers\]"
    ):
        load_tokenizer(request.getfixturevalue(fixture))


def _word_level(path, vocabulary: dict, unknown: str | None = None) -> str:
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": unknown or "[UNK]"}
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    return str(path)


@pytest.mark.parametrize(("vocabulary", "size"), [({}, "0"), ({"a": 2**31}, "2147483649")])
def test_a_vocabulary_without_ids_or_with_absurd_ones(tmp_path, vocabulary, size):
    with pytest.raises(ConfigError, match=rf"it has {size} ids, not 1 to 16777216"):
        load_tokenizer(_word_level(tmp_path / "x.json", vocabulary))


def test_a_text_that_a_tokenizer_has_no_ids_for(tmp_path):
    tokenizer = load_tokenizer(_word_level(tmp_path / "x.json", {"a": 0}))
    with pytest.raises(ConfigError, match=r"x\.json' cannot encode 'b' \(.*\); give one that has"):
        tokenizer.encode("b")


def test_a_file_without_end_and_an_unknown_home(tmp_path):
    path = tmp_path / "x.json"
    path.touch()
    os.truncate(path, 1 << 42)
    with pytest.raises(ConfigError, match="cannot be read: it is larger than 1024 MiB"):
        load_tokenizer(str(path))
    with pytest.raises(ConfigError, match="is not a file"):
        load_tokenizer("~no_such_user/x.json")
