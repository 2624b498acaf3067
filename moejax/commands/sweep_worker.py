"""`moejax sweep_worker`: trains trials of a running sweep."""

import argparse
from pathlib import Path

from moejax.command_line import Line, Verb, add_cpu_devices, add_workdir
from moejax.commands.common import add_storage


def _options(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser, "folder of the sweep")
    add_storage(parser)
    add_cpu_devices(parser)


def _run(line: Line) -> int:
    from moejax.sweep_worker import work

    options = line.options
    return work(Path(options.workdir), options.storage, options.cpu_devices)


VERB = Verb(
    "sweep_worker",
    "train trials of a running sweep on this machine",
    "moejax sweep_worker --workdir DIR [--storage URL] [--cpu_devices N]",
    """
  moejax sweep_worker --workdir sweeps/rate

`moejax sweep` starts its workers itself. Start more by hand on any machine that sees the workdir.
A worker ends when no trial is left.""",
    _options,
    _run,
    config=False,
    required=("workdir",),
)
