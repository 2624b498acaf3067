"""`moejax supervise`: restarts a training that fails."""

import argparse
import sys
from collections.abc import Container
from functools import partial

from moejax.command_line import Line, Verb, add_option, safe_path, whole
from moejax.config import ConfigError


def _options(parser: argparse.ArgumentParser) -> None:
    help = "restarts in a row without a newer checkpoint before giving up (default: 3)"
    add_option(parser, "--restarts", help, type=whole(1), default=3, metavar="N")
    parser.add_argument(
        "--end_when_preempted",
        action="store_true",
        help="on preemption, return exit code 75 for a scheduler that restarts the whole job",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def _run(verbs: Container[str], line: Line) -> int:
    from moejax.supervisor import Retries, supervise_command

    options = line.options
    command = options.command[options.command[:1] == ["--"] :]
    if not command:
        raise ConfigError("no command; give one after --, for example train configs/x.py ...")
    if command[0] in verbs:
        command = [sys.executable, *safe_path(), "-m", "moejax", *command]
    return supervise_command(command, Retries(options.restarts, options.end_when_preempted))


def verb(verbs: Container[str]) -> Verb:
    """Returns the verb; a command that begins with one of `verbs` is one of moejax itself."""
    return Verb(
        "supervise",
        "run a training, and restart it when it fails",
        "moejax supervise [--restarts N] [--end_when_preempted] -- train CONFIG --workdir DIR ...",
        """
  moejax supervise -- train configs/quickstart.py --workdir runs/a --cpu_devices 8

After -- comes a command of moejax, or a program that runs one, such as srun. It is restarted after
a crash, a signal, or a lost or stuck process, but not after an error that a restart cannot cure.
SIGTERM and Ctrl-C are passed on to it and end both. After --restarts restarts in a row without a
newer checkpoint, supervise gives up with exit code 70.""",
        _options,
        partial(_run, verbs),
        config=False,
    )
