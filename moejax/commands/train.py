"""`moejax train`: trains a model, or resumes it."""

import argparse

from moejax.command_line import Line, Verb, add_cpu_devices, add_workdir
from moejax.commands.common import start_jax
from moejax.workdir import check_workdir


def _options(parser: argparse.ArgumentParser) -> None:
    help = "folder of the run: config, checkpoints, metrics, plots; with checkpoints it is resumed"
    add_workdir(parser, help)
    add_cpu_devices(parser)
    help = "also log to Weights & Biases; WANDB_MODE=offline keeps it in the workdir"
    parser.add_argument("--wandb", action="store_true", help=help)


def _run(line: Line) -> int:
    config = line.load()
    workdir = check_workdir(line.options.workdir, config)
    start_jax(line.options.cpu_devices, preemptible=True)
    from moejax.loop import train

    return train(config, workdir, line.options.wandb)


VERB = Verb(
    "train",
    "train a model, or resume the training of a workdir",
    "moejax train CONFIG[:ARG] --workdir DIR [--cpu_devices N] [--wandb] [key=value ...]",
    """
  moejax train configs/quickstart.py --workdir runs/a --cpu_devices 8 train.steps=50 seed=1

CONFIG is a Python file that defines get_config(arg); ARG is passed to it. key=value overrides the
file, and the file overrides the defaults. --config=CONFIG and --config.key=value mean the same as
CONFIG and key=value. Numbers may be written as 1e4; None turns a key off.

A workdir that has checkpoints is resumed. Its config must then be the same, except for the number
of steps, the mesh, the accumulation, and how often to log, save and evaluate.""",
    _options,
    _run,
    ("*",),
    required=("workdir",),
)
