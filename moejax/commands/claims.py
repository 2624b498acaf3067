"""`moejax claims`: small experiments on claims of the literature."""

import argparse
from pathlib import Path

from moejax.command_line import Line, Verb, add_option, output_file
from moejax.commands.common import start_jax
from moejax.errors import CHECK_FAILED, DONE


def _options(parser: argparse.ArgumentParser) -> None:
    help = "claims to test, for example C4 or C4,C6 (default: all)"
    add_option(parser, "--only", help, metavar="IDS")
    help = "folder of the results, which a later call reuses (default: runs/claims)"
    add_option(parser, "--workdir", help, default="runs/claims", metavar="DIR")
    help = "Markdown file to write, plots beside it (default: claims.md in the workdir)"
    add_option(parser, "--page", help, type=output_file, metavar="FILE")


def _run(line: Line) -> int:
    start_jax(1)
    from moejax.claims.page import run_claims

    only = line.options.only
    names = None if only is None else [name.strip() for name in only.split(",")]
    verdicts = run_claims(names, Path(line.options.workdir), line.options.page)
    return DONE if all(verdicts.values()) else CHECK_FAILED


VERB = Verb(
    "claims",
    "test claims of the literature at a size for CPUs",
    "moejax claims [--only IDS] [--workdir DIR] [--page FILE]",
    """
  moejax claims --only C4

Trains what the claims need, with at least 3 seeds, and writes a page with the paper's number, ours,
pass or fail, and plots. Exit code 1 means that a claim did not hold.""",
    _options,
    _run,
    config=False,
)
