"""`moejax eval`: measures checkpoints."""

import argparse
import json
from pathlib import Path

from moejax.command_line import (
    Line,
    Verb,
    add_cpu_devices,
    add_json,
    add_option,
    add_step,
    add_workdir,
    between,
    whole,
)
from moejax.commands.common import start_jax, stored_config
from moejax.errors import DONE
from moejax.foreign import write_json
from moejax.overrides import apply_overrides, read_overrides
from moejax.workdir import MAY_CHANGE_AFTER_TRAINING


def _options(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser, "folder that `moejax train` wrote")
    add_step(parser)
    help = (
        "data to evaluate on (default: the validation split): `validation`, a folder of `moejax "
        "prepare`, one of its splits (DIR/train), or text; NAME=PATH names it; repeatable"
    )
    parser.add_argument("--data", action="append", default=[], metavar="PATH", help=help)
    help = "field of a .jsonl or .parquet row of --data that holds the text (default: text)"
    add_option(parser, "--field", help, default="text")
    help = "lm-eval tasks, as NAME or NAME,NAME: multiple choice, generation or perplexity"
    add_option(parser, "--tasks", help, metavar="NAMES")
    help = "folder of the tasks' YAML files (default: the tasks that lm-eval ships)"
    add_option(parser, "--tasks_path", help, type=Path, metavar="DIR")
    add_option(
        parser, "--limit", "examples of each task (default: all)", type=whole(1), metavar="N"
    )
    help = "evaluate each new checkpoint until the run is done, into eval.jsonl in the workdir"
    parser.add_argument("--watch", action="store_true", help=help)
    help = "with --watch: seconds between two looks (default: 10)"
    add_option(parser, "--poll_seconds", help, type=between(0, 1e6), metavar="X")
    help = "with --watch: give up after this many seconds without a sign of life (default: 3600)"
    add_option(parser, "--patience", help, type=between(0, 1e9), metavar="X")
    add_cpu_devices(parser)
    add_json(parser)


def _run(line: Line) -> int:
    from moejax.eval_command import evaluate_request, read_request, wait_for_run

    request = read_request(line.options)
    wait_for_run(request)
    config = stored_config(line, "eval")
    if request.data and "eval.batches" not in read_overrides(line.overrides):
        config = apply_overrides(config, ["eval.batches=None"])
    start_jax(line.options.cpu_devices)
    if not request.plain:
        report = evaluate_request(config, request)
        if line.options.json:
            text = json.dumps(report, allow_nan=False)
            write_json(line.options.json, text)
        return DONE
    from moejax.evaluate import evaluate_workdir
    from moejax.metrics import encode_record
    from moejax.progress import show_evaluation

    record = evaluate_workdir(config, request.workdir, request.step)
    show_evaluation(record)
    if line.options.json:
        write_json(line.options.json, encode_record(record))
    return DONE


VERB = Verb(
    "eval",
    "measure a checkpoint on the validation split, on other data, or on tasks",
    "moejax eval --workdir DIR [--step N | --watch] [--data PATH] [--tasks NAMES] [key=value]",
    """
  moejax eval --workdir runs/a --step 40 --cpu_devices 1 mesh.expert=1 --json out.json
  moejax eval --workdir runs/a --data validation --data data/mine --data 'law=text/law/*.txt'
  moejax eval --workdir runs/a --tasks my_choices,my_answers --tasks_path tasks
  moejax eval --workdir runs/a --watch

The config comes from the workdir. The result is the same on every mesh. Data other than the
validation split is read whole, unless eval.batches=N is given. Tasks need pip install
'moejax[lm-eval]'. Starting --watch again evaluates only what is new.""",
    _options,
    _run,
    MAY_CHANGE_AFTER_TRAINING,
    config=False,
    required=("workdir",),
)
