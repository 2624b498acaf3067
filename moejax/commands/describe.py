"""`moejax describe`: what a config costs."""

import argparse

from moejax.command_line import Line, Verb, add_option, whole
from moejax.errors import DONE


def _options(parser: argparse.ArgumentParser) -> None:
    help = "lay the mesh out on this many devices (default: as many as it needs)"
    add_option(parser, "--devices", help, type=whole(1), metavar="N")


def _run(line: Line) -> int:
    config = line.load()
    from moejax.describe import describe

    describe(config, line.options.devices)
    return DONE


VERB = Verb(
    "describe",
    "show parameters, FLOPs, memory, shardings and the mesh of a config",
    "moejax describe CONFIG[:ARG] [--devices N] [key=value ...]",
    """
  moejax describe configs/quickstart.py mesh.expert=8""",
    _options,
    _run,
    ("*",),
)
