"""What `moejax eval --data` reads: any data set of `moejax prepare`, or text. No JAX here."""

import dataclasses
import os
import re
from pathlib import Path
from typing import get_args

import numpy as np

from moejax.config import ConfigError, DataConfig
from moejax.corpus import Corpus, Split, load_corpus, read_meta
from moejax.prepare import text_corpus
from moejax.tokenizer import load_tokenizer

VALIDATION = "validation"  # names the validation split of the run's own data


@dataclasses.dataclass(frozen=True)
class EvalData:
    """One data set to evaluate on.

    Attributes:
        name: under which results stand.
        corpus: its documents.
        bytes_n: int64 [domains]; bytes of text that its targets stand for, counted in the text;
            None: `Tokenizer.bytes_v` tells.
    """

    name: str
    corpus: Corpus
    bytes_n: np.ndarray | None = None


def load_eval_data(words: list[str], config: DataConfig, field: str = "text") -> list[EvalData]:
    """Returns the data sets that the words of `--data` name, each whole.

    A word is `validation`, a folder of `moejax prepare` (its validation split), a split of one
    (DIR/train, DIR/validation), or files, a folder or a pattern of text, which is tokenized here.
    `NAME=` before it names the results; else the word itself does.

    Args:
        config: of the run: whose tokenizer is used, and whose validation split is meant.
        field: the text in .jsonl and .parquet.

    Raises:
        ConfigError: nothing is there, it has another vocabulary, or two have one name.
    """
    found: dict[str, EvalData] = {}
    for word in words:
        data = _load(word, config, field)
        if data.name in found:
            raise ConfigError(
                f"--data {data.name} is given twice; give it once, or other names, as in "
                f"other={word}"
            )
        found[data.name] = data
    return list(found.values())


def _load(word: str, config: DataConfig, field: str) -> EvalData:
    named = re.fullmatch(r"([\w-]+)=(.+)", word)
    name, path = named.groups() if named and not os.path.exists(word) else (word, word)
    if path == VALIDATION:
        return EvalData(name, load_corpus(config, VALIDATION))
    folder, split = _prepared(Path(path).expanduser())
    if folder is not None:
        return EvalData(name, _load_prepared(folder, split, config))
    return EvalData(name, *text_corpus(word, load_tokenizer(config.tokenizer), field))


def _prepared(path: Path) -> tuple[Path | None, Split]:
    """Returns the folder and split of prepared data; None where `path` is none."""
    if (path / "meta.json").is_file():
        return path, VALIDATION
    for split in get_args(Split):
        if path.name == split and (path.parent / "meta.json").is_file():
            return path.parent, split
    return None, VALIDATION


def _load_prepared(folder: Path, split: Split, config: DataConfig) -> Corpus:
    meta, ours = read_meta(folder), load_tokenizer(config.tokenizer)
    if meta["tokenizer_fingerprint"] != ours.fingerprint:
        raise ConfigError(
            f"{folder} has the vocabulary of the tokenizer {meta['tokenizer']!r} (fingerprint "
            f"{meta['tokenizer_fingerprint'][:16]}), and the run that of {config.tokenizer!r} "
            f"({ours.fingerprint[:16]}); give --data the text itself, or prepare it with "
            f"--tokenizer {config.tokenizer}"
        )
    return load_corpus(dataclasses.replace(config, source="prepared", path=str(folder)), split)
