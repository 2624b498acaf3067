"""`moejax compare`: runs at equal cost."""

import argparse
from pathlib import Path

from moejax.command_line import Line, Verb, add_option, between, output_file
from moejax.config import ConfigError
from moejax.errors import DONE


def _options(parser: argparse.ArgumentParser) -> None:
    from moejax.compare_runs import AXES, METRICS

    help = "compare runs at equal tokens, seconds or FLOPs (default: tokens)"
    add_option(parser, "--by", help, choices=tuple(AXES), default="tokens")
    help = "what to compare; lower is better (default: loss)"
    add_option(parser, "--metric", help, choices=METRICS, default="loss")
    help = "also show what each arm spent to reach this loss"
    add_option(parser, "--reach", help, type=between(0, 1e6, open_low=True), metavar="LOSS")
    help = "fit a scaling law: loss against active parameters, tokens and expansion"
    parser.add_argument("--scaling", action="store_true", help=help)
    add_option(parser, "--csv", "write a row per run to FILE", type=output_file, metavar="FILE")
    add_option(parser, "--markdown", "write the tables to FILE", type=output_file, metavar="FILE")
    help = "folder to write: the page, CSV, plots, and hparams for TensorBoard"
    add_option(parser, "--output", help, type=Path, metavar="DIR")


def _run(line: Line) -> int:
    if not line.words:
        raise ConfigError(
            "no run to compare; give workdirs or sweeps: moejax compare runs/a runs/b"
        )
    from moejax.compare_report import Output, run_compare

    options = line.options
    output = Output(options.csv, options.markdown, options.output)
    run_compare(line.words, options.by, options.metric, options.reach, options.scaling, output)
    return DONE


VERB = Verb(
    "compare",
    "compare runs: loss at equal cost, significance over seeds, cost to reach a loss",
    "moejax compare DIR [DIR ...] [--by tokens|seconds|flops] [--scaling] [options]",
    """
  moejax compare runs/dense runs/moe sweeps/capacity --by seconds --output runs/compared

DIR is a workdir, a sweep, or a folder of workdirs; runs may still be training. Runs that differ
only in their seed form one arm. The other arms are compared with the first DIR, or with its best
arm if it has several. Reads only configs, metrics and ledgers, and changes nothing in them.""",
    _options,
    _run,
    config=False,
    takes_words=True,
)
