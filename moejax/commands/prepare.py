"""`moejax prepare`: turns text into a data set."""

import argparse

from moejax.command_line import Line, Verb, add_option, between, whole
from moejax.config import ConfigError
from moejax.errors import DONE
from moejax.foreign import printable


def _options(parser: argparse.ArgumentParser) -> None:
    help = "`bytes`, or the path of a tokenizer.json or a SentencePiece model (default: bytes)"
    add_option(parser, "--tokenizer", help, default="bytes", metavar="NAME")
    add_option(parser, "--output", "folder to write, for data.path", metavar="DIR")
    add_option(
        parser,
        "--field",
        "field of a .jsonl or .parquet row that holds the text (default: text)",
        default="text",
    )
    help = "share of the documents kept for validation (default: 0.05)"
    add_option(
        parser,
        "--validation_fraction",
        help,
        type=between(0, 1, open_low=True),
        default=0.05,
        metavar="X",
    )
    add_option(parser, "--workers", "processes (default: one per core)", type=whole(1), metavar="N")
    help = "give up when a process does nothing for this many seconds (default: 600)"
    seconds = between(0, 1e6, open_low=True)
    add_option(parser, "--timeout_seconds", help, type=seconds, default=600.0, metavar="X")


def _run(line: Line) -> int:
    if not line.words:
        raise ConfigError(
            "no input; give files, folders or patterns, for example moejax prepare 'text/*.txt'"
        )
    from moejax.prepare import prepare

    options = line.options
    meta = prepare(
        line.words,
        options.tokenizer,
        options.output,
        field=options.field,
        validation_fraction=options.validation_fraction,
        workers=options.workers,
        timeout_seconds=options.timeout_seconds,
    )
    for name, split in meta["splits"].items():
        print(f"{name}: {split['num_documents']:,} documents, {split['num_tokens']:,} tokens")
    keys = f"data.source=prepared data.path={options.output} data.tokenizer={options.tokenizer}"
    print(printable(f"train on it with {keys} model.vocab_size={meta['vocab_size']}"))
    return DONE


VERB = Verb(
    "prepare",
    "turn text into a data set for data.path",
    "moejax prepare INPUT [INPUT ...] --output DIR [options]",
    """
  moejax prepare 'text/*.txt' --tokenizer path/to/tokenizer.json --output data/mine
  moejax train configs/quickstart.py --workdir runs/mine data.source=prepared data.path=data/mine

INPUT is a file (.txt, .jsonl, .parquet), a folder or a quoted pattern. A prefix names its domain,
as in en='books/*.txt'; without one, the domain is the name of the folder.""",
    _options,
    _run,
    config=False,
    required=("output",),
    takes_words=True,
)
