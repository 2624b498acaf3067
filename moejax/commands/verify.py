"""`moejax verify`: every layout against the oracle."""

import argparse

from moejax.command_line import Line, Verb, add_cpu_devices, add_json, add_option, output_file
from moejax.commands.common import start_jax


def _options(parser: argparse.ArgumentParser) -> None:
    add_cpu_devices(parser)
    help = "also check every router, dispatch and transport on a small layer (takes an hour)"
    parser.add_argument("--all", action="store_true", help=help)
    help = "with --all: also write the results to FILE as a Markdown table"
    add_option(parser, "--page", help, type=output_file, metavar="FILE")
    add_json(parser)


def _run(line: Line) -> int:
    config = line.load()
    start_jax(line.options.cpu_devices)
    from moejax.verify import verify

    return verify(config, line.options.all, line.options.json, line.options.page)


VERB = Verb(
    "verify",
    "check that every layout computes the same losses and gradients",
    "moejax verify CONFIG[:ARG] [--cpu_devices N] [--all [--page FILE]] [--json FILE] [key=value]",
    """
  moejax verify configs/quickstart.py --cpu_devices 8

Runs the config's model for a few steps with a small batch, on meshes that split the devices over
data, fsdp, expert and tensor, with and without accumulation, remat and capacity, and compares each
with a dense oracle: one row each. `--all` adds every router, dispatch and transport on a small
layer. Exit code 1 means that a difference is above tolerance.""",
    _options,
    _run,
    ("*",),
)
