"""`moejax inspect`: what the experts of a checkpoint do."""

import argparse

from moejax.command_line import (
    Line,
    Verb,
    add_cpu_devices,
    add_json,
    add_option,
    add_step,
    add_workdir,
    output_file,
    plain_text,
    whole,
)
from moejax.commands.common import start_jax, stored_config
from moejax.config import ConfigError
from moejax.errors import DONE
from moejax.workdir import MAY_CHANGE_AFTER_TRAINING, read_config


def _options(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser, "folder that `moejax train` wrote")
    add_step(parser)
    add_cpu_devices(parser)
    help = "show the experts of each token of a text"
    add_option(parser, "--text", help, type=plain_text, metavar="TEXT")
    help = "compare routing with another workdir, or with another step of the same one"
    add_option(parser, "--against", help, metavar="DIR")
    help = "checkpoint of --against to compare with (default: the last)"
    add_option(parser, "--against_step", help, type=whole(0), metavar="N")
    help = "how many experts to leave out, one at a time, to see what is lost (default: 64)"
    add_option(parser, "--remove", help, type=whole(0), metavar="N")
    add_json(parser)
    add_option(
        parser, "--png", "write a picture of --text to FILE", type=output_file, metavar="FILE"
    )


def _run(line: Line) -> int:
    options = line.options
    text, against = options.text is not None, options.against is not None
    for ignored, remedy in (
        (text and against, "--text and --against do not go together; give one of them"),
        (options.png and not text, "--png draws a text; give --text too"),
        (options.against_step is not None and not against, "--against_step needs --against DIR"),
        (
            options.remove is not None and (text or against),
            "--remove is for the whole atlas only",
        ),
    ):
        if ignored:
            raise ConfigError(f"{remedy}; see moejax inspect --help")
    config = stored_config(line, "inspect")
    other = read_config(options.against) if against else None
    start_jax(options.cpu_devices)
    from moejax.inspect_command import inspect_workdir

    inspect_workdir(config, other, options)
    return DONE


VERB = Verb(
    "inspect",
    "show which tokens the experts of a checkpoint take, and what is lost without them",
    "moejax inspect --workdir DIR [--text TEXT | --against DIR] [options] [key=value ...]",
    """
  moejax inspect --workdir runs/a                          # the atlas, into runs/a/atlas
  moejax inspect --workdir runs/a --text "In the beginning" --png text.png --json text.json
  moejax inspect --workdir runs/a --against runs/a --against_step 100

Reads as much of the validation text as eval.batches says, without dropping tokens; see
docs/inspect.md.""",
    _options,
    _run,
    MAY_CHANGE_AFTER_TRAINING,
    config=False,
    required=("workdir",),
)
