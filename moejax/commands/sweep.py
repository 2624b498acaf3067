"""`moejax sweep`: trains many variants of a config."""

import argparse
from pathlib import Path

from moejax.command_line import Line, Verb, add_cpu_devices, add_option, add_workdir, whole
from moejax.commands.common import add_storage
from moejax.overrides import read_overrides


def _options(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser, "folder of the sweep: trials/NNN, report.md, plots")
    add_option(parser, "--workers", "trials at once (default: 1)", type=whole(1), default=1)
    help = "run workers as local processes or as tasks of a SLURM array (default: local)"
    add_option(parser, "--launcher", help, choices=["local", "slurm"], default="local")
    help = "options of launch/slurm.py, quoted: --slurm='--time 4:00:00 --gpus_per_node 1'"
    add_option(parser, "--slurm", help, default="", metavar="WORDS")
    parser.add_argument(
        "--resume", action="store_true", help="resume the sweep in the workdir, if it has one"
    )
    help = "with --resume: try trials again that crashed, or also those that their config failed"
    add_option(parser, "--retry_failed", help, choices=["crashed", "all"])
    add_storage(parser)
    add_cpu_devices(parser)


def _run(line: Line) -> int:
    from moejax.sweep import Options, sweep

    options = {name: value for name, value in vars(line.options).items() if name != "given"}
    options["workdir"] = Path(line.options.workdir)
    assert line.config is not None
    return sweep(line.config, read_overrides(line.overrides), Options(**options))


VERB = Verb(
    "sweep",
    "train many variants of a config, and rank them",
    "moejax sweep SWEEP[:ARG] --workdir DIR [--workers N] [--resume] [options] [key=value ...]",
    """
  moejax sweep configs/sweeps/learning_rate.py:small --workdir sweeps/rate --cpu_devices 1

SWEEP is a Python file that defines get_sweep(arg): which keys of a base config to vary, and how.
key=value changes the base config. Everything is checked before anything trains. Each trial is an
ordinary workdir in DIR/trials. --resume continues a sweep that was stopped or killed.""",
    _options,
    _run,
    ("*",),
    required=("workdir",),
)
