"""`moejax report`: a run as one HTML file."""

import argparse
from pathlib import Path

from moejax.command_line import (
    Line,
    Verb,
    add_cpu_devices,
    add_option,
    add_workdir,
    output_file,
    plain_text,
)
from moejax.commands.common import start_jax, stored_config
from moejax.config import ConfigError
from moejax.errors import DONE
from moejax.workdir import MAY_CHANGE_AFTER_TRAINING, read_config


def _options(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser, "folder that `moejax train` wrote")
    help = "HTML file to write (default: report.html in the workdir)"
    add_option(parser, "--output", help, type=output_file, metavar="FILE")
    help = "leave out single experts, which need an atlas of the newest checkpoint"
    parser.add_argument("--no_atlas", action="store_true", help=help)
    help = "show the experts of each token of this text too; repeatable"
    parser.add_argument(
        "--text", action="append", default=[], type=plain_text, metavar="TEXT", help=help
    )
    help = "show how far the last checkpoint of another run, with one tokenizer, routes alike"
    add_option(parser, "--against", help, metavar="DIR")
    add_cpu_devices(parser)


def _run(line: Line) -> int:
    options, config = line.options, stored_config(line, "report")
    from moejax.report import ATLAS_ALONE, report_workdir, wants_atlas

    workdir, looks = Path(options.workdir), ATLAS_ALONE
    if options.no_atlas and (options.text or options.against):
        raise ConfigError(
            "--text and --against are shown next to single experts, which --no_atlas leaves out; "
            "leave it out, or them"
        )
    against = options.against is not None
    other = read_config(options.against) if against else None
    wants = not options.no_atlas and wants_atlas(workdir, config)
    if wants or options.text or other:
        start_jax(options.cpu_devices)
        from moejax.inspect_command import agreement_of_workdirs, atlas_of_workdir, views_of_workdir

        if wants:
            atlas_of_workdir(config, workdir, None)
        if options.text:
            _, views = views_of_workdir(config, workdir, None, options.text)
            looks = looks._replace(views=tuple(views))
        if other:
            there = Path(options.against)
            found = agreement_of_workdirs(config, workdir, None, other, there, None)
            looks = looks._replace(against=(there.resolve().name, *found))
    print(report_workdir(workdir, options.output, looks, with_atlas=not options.no_atlas))
    return DONE


VERB = Verb(
    "report",
    "write a run as one HTML file: loss, load, balance, time, and each expert",
    "moejax report --workdir DIR [--no_atlas | --text TEXT --against DIR] [key=value ...]",
    """
  moejax report --workdir runs/a                           # runs/a/report.html
  moejax report --workdir runs/a --cpu_devices 1 mesh.expert=1
  moejax report --workdir runs/a --text "In the beginning" --against runs/b
  moejax report --workdir runs/a --no_atlas                # quick, also while the run trains

Makes the atlas of the newest checkpoint first if it is missing, as `moejax inspect` does. See
docs/report.md.""",
    _options,
    _run,
    MAY_CHANGE_AFTER_TRAINING,
    config=False,
    required=("workdir",),
)
