"""What `moejax eval --data` takes, and how many bytes of text its targets stand for."""

import json

import numpy as np
import pytest

from moejax.config import ConfigError, DataConfig
from moejax.data import Sequences
from moejax.eval_data import load_eval_data
from moejax.prepare import prepare

BYTES = DataConfig()
TEXTS = {"a": "Le cœur a ses raisons.", "b": "Que sais-je ?\nRien."}


@pytest.fixture
def folder(tmp_path):
    for name, text in TEXTS.items():
        (tmp_path / "text" / name).mkdir(parents=True)
        (tmp_path / "text" / name / "one.txt").write_text(text)
        (tmp_path / "text" / name / "two.txt").write_text(2 * text)
    return tmp_path


def prepared(folder, **options):
    inputs = [f"{name}={folder / 'text' / name}" for name in TEXTS]
    prepare(inputs, "bytes", str(folder / "data"), show_progress=False, **options)
    return folder / "data"


def test_text_is_tokenized_whole_by_the_tokenizer_of_the_run(folder):
    (data,) = load_eval_data([f"french={folder / 'text'}"], BYTES)
    assert data.name == "french"
    assert data.corpus.domains == ("french",)
    assert data.corpus.num_documents == 4
    texts = [TEXTS["a"], 2 * TEXTS["a"], TEXTS["b"], 2 * TEXTS["b"]]
    ids = [byte for text in texts for byte in [*text.encode(), 256]]
    np.testing.assert_array_equal(data.corpus.token_n, ids)


def test_bytes_are_those_of_the_text_behind_first_tokens(folder):
    (data,) = load_eval_data([str(folder / "text")], BYTES)
    assert data.bytes_n is not None
    expected = sum(3 * len(text.encode()) - 2 for text in TEXTS.values())
    assert data.bytes_n.tolist() == [expected]
    sequences = Sequences(data.corpus, 16)
    batches = [sequences[i] for i in range(len(sequences))]
    targets = np.concatenate([batch.targets[batch.loss_mask] for batch in batches])
    assert (targets < 256).sum() == expected, "the table of the byte tokenizer says the same"


def test_bytes_of_a_text_that_the_tokenizer_changes(folder):
    """It writes all in lower case, and İ is 3 bytes there and 2 in the text; first pieces count
    by what they stand for in the text, a space that SentencePiece puts before it does not."""

    class Lower:
        vocab_size, end_of_document, fingerprint = 257, 256, "lower"
        bytes_v = np.r_[np.ones(256, np.int32), 0]

        def encode(self, text):
            return np.frombuffer(text.lower().encode(), np.uint8).astype(np.int32)

        def decode(self, ids):
            return bytes(int(i) for i in ids).decode(errors="replace")

    from moejax.prepare import text_corpus

    (folder / "x.txt").write_text("aİİ")
    corpus, bytes_n = text_corpus(str(folder / "x.txt"), Lower(), "text")
    assert bytes_n.tolist() == [4]
    assert Lower.bytes_v[corpus.token_n].sum() - 1 == 6


def test_a_prepared_folder_is_its_validation_split_or_the_one_that_is_named(folder):
    path = prepared(folder, validation_fraction=0.4)
    words = [str(path), f"again={path / 'validation'}", str(path / "train")]
    one, again, train = load_eval_data(words, BYTES)
    assert [one.name, again.name, train.name] == [str(path), "again", str(path / "train")]
    assert one.corpus.fingerprint == again.corpus.fingerprint != train.corpus.fingerprint
    assert one.corpus.domains == ("a", "b")
    assert one.corpus.num_documents + train.corpus.num_documents == 4
    assert one.bytes_n is None


def test_validation_is_the_split_of_the_run(folder):
    config = DataConfig(source="prepared", path=str(prepared(folder)))
    one, other = load_eval_data(["validation", f"other={folder / 'data'}"], config)
    assert one.name == "validation"
    assert one.corpus.fingerprint == other.corpus.fingerprint


def test_rows_and_their_field(folder):
    rows = [{"body": "abc"}, {"body": " "}, {"body": "defg"}]
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (data,) = load_eval_data([str(folder / "x.jsonl")], BYTES, "body")
    assert data.corpus.num_documents == 2
    assert data.bytes_n is not None
    assert data.bytes_n.tolist() == [5]
    with pytest.raises(ConfigError, match=r"line 1 has no field 'text' but 'body'"):
        load_eval_data([str(folder / "x.jsonl")], BYTES)


def test_another_vocabulary_is_refused(folder):
    path = prepared(folder)
    meta = json.loads((path / "meta.json").read_text())
    meta |= {"tokenizer": "other.json", "tokenizer_fingerprint": "f" * 64}
    (path / "meta.json").write_text(json.dumps(meta))
    message = (
        r"data has the vocabulary of the tokenizer 'other.json' \(fingerprint f{16}\), and the run "
        r"that of 'bytes' \(bytes\); give --data the text itself, or prepare it with --tokenizer b"
    )
    with pytest.raises(ConfigError, match=message):
        load_eval_data([str(path)], BYTES)


def test_what_is_not_there_or_empty_or_twice_is_refused(folder):
    with pytest.raises(ConfigError, match=r"no files match '.*nothing'"):
        load_eval_data([str(folder / "nothing")], BYTES)
    (folder / "empty.txt").write_text(" \n")
    with pytest.raises(ConfigError, match="holds no text, only empty documents"):
        load_eval_data([str(folder / "empty.txt")], BYTES)
    word = str(folder / "text")
    with pytest.raises(ConfigError, match=r"is given twice; give it once, or other names"):
        load_eval_data([word, word], BYTES)
