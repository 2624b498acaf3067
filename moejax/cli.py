"""The commands. Each imports what it runs only once the config is valid, so JAX starts late.

`errors.EXIT_CODES` has the exit codes; `moejax --help` lists them.
"""

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import moejax
from moejax.command_line import (
    Line,
    Verb,
    add_cpu_devices,
    add_json,
    add_option,
    add_step,
    add_workdir,
    between,
    outliving_output,
    output_file,
    plain_text,
    safe_path,
    whole,
)
from moejax.config import Config, ConfigError
from moejax.errors import CHECK_FAILED, DONE, EXIT_CODES, INTERRUPTED
from moejax.foreign import printable
from moejax.overrides import (
    apply_overrides,
    build_config,
    config_values,
    keys,
    load_values,
    read_overrides,
    sections,
    suggest,
    value_difference,
)
from moejax.workdir import MAY_CHANGE_AFTER_TRAINING, check_workdir, matches, read_config

OUTLIVING = ("train", "supervise")  # verbs that go on where nobody hears them any more


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # whoever started this process has closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the end
    if isinstance(sys.stdout, io.TextIOWrapper):  # for characters that its encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    verb = words[0] if words and not words[0].startswith("-") else None
    with outliving_output() if verb in OUTLIVING else contextlib.nullcontext():
        return _main(verb, words)


def _main(verb: str | None, words: list[str]) -> int:
    name = f"moejax {verb}" if verb in VERBS else "moejax"
    try:
        code = VERBS[verb].main(words[1:]) if verb in VERBS else _without_verb(words)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        line = " ".join(str(error).splitlines())
        print(f"{name}: error: {printable(line)}", file=sys.stderr)
        if error.details:
            print(printable(error.details), file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `moejax config ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


def _without_verb(words: list[str]) -> int:
    verbs = ", ".join(VERBS)
    if not words:
        raise ConfigError(f"no verb; give one of {verbs}, or --help")
    if words[0] in ("-h", "--help"):
        rows = "\n".join(f"  {name:12} {verb.summary}" for name, verb in VERBS.items())
        codes = "\n".join(f"  {row.code:>3}  {row.meaning}" for row in EXIT_CODES)
        print(f"{HELP}\nverbs:\n{rows}\n\nexit codes:\n{codes}")
        print("\nmoejax VERB --help tells more about each verb.")
    elif words[0] == "--version":
        print(f"moejax {moejax.__version__}")
    else:
        raise ConfigError(
            f"unknown verb {words[0]!r}{suggest(words[0], VERBS) or f'; give one of {verbs}'}"
        )
    return DONE


HELP = """moejax: train sparse mixture-of-experts models in JAX

  moejax train configs/quickstart.py --workdir runs/a --cpu_devices 8 train.steps=50
  moejax eval --workdir runs/a
"""


# Verbs


def _start_jax(cpu_devices: int | None, preemptible: bool = False) -> None:
    """Starts JAX. From here on importing it is allowed."""
    # XLA's own log lines would break the progress bar; set the variable to 0 to read them.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from moejax.mesh import start_jax

    start_jax(cpu_devices, preemptible)


def _train_options(parser: argparse.ArgumentParser) -> None:
    help = "folder of the run: config, checkpoints, metrics, plots; with checkpoints it is resumed"
    add_workdir(parser, help)
    add_cpu_devices(parser)
    help = "also log to Weights & Biases; WANDB_MODE=offline keeps it in the workdir"
    parser.add_argument("--wandb", action="store_true", help=help)


def _train(line: Line) -> int:
    config = line.load()
    workdir = check_workdir(line.options.workdir, config)
    _start_jax(line.options.cpu_devices, preemptible=True)
    from moejax.loop import train

    return train(config, workdir, line.options.wandb)


def _eval_options(parser: argparse.ArgumentParser) -> None:
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


def _stored_config(line: Line, verb: str) -> Config:
    """Returns the workdir's config with overrides of the keys that a checkpoint does not fix."""
    for name in read_overrides(line.overrides):
        if not matches(name, MAY_CHANGE_AFTER_TRAINING):
            allowed = ", ".join(MAY_CHANGE_AFTER_TRAINING)
            raise ConfigError(f"{name} is fixed by the checkpoint; {verb} can change {allowed}")
    return apply_overrides(read_config(line.options.workdir), line.overrides)


def _eval(line: Line) -> int:
    from moejax.eval_command import evaluate_request, read_request, wait_for_run

    request = read_request(line.options)
    wait_for_run(request)
    config = _stored_config(line, "eval")
    if request.data and "eval.batches" not in read_overrides(line.overrides):
        config = apply_overrides(config, ["eval.batches=None"])
    _start_jax(line.options.cpu_devices)
    if not request.plain:
        report = evaluate_request(config, request)
        if line.options.json:
            text = json.dumps(report, allow_nan=False)
            _write(line.options.json, text)
        return DONE
    from moejax.evaluate import evaluate_workdir
    from moejax.metrics import encode_record
    from moejax.progress import show_evaluation

    record = evaluate_workdir(config, request.workdir, request.step)
    show_evaluation(record)
    if line.options.json:
        _write(line.options.json, encode_record(record))
    return DONE


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--json={file} cannot be written: {error.strerror}; give another file"
        ) from None


def _fsck_options(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser, "folder that `moejax train` wrote")
    add_json(parser)


def _fsck(line: Line) -> int:
    from moejax.fsck import fsck, show_findings

    findings = fsck(Path(line.options.workdir))
    show_findings(findings)
    if line.options.json:
        rows = [finding._asdict() for finding in findings]
        _write(line.options.json, json.dumps(rows, indent=1))
    return CHECK_FAILED if any(finding.bad for finding in findings) else DONE


def _compare_options(parser: argparse.ArgumentParser) -> None:
    from moejax.compare_runs import AXES, METRICS

    help = "compare runs at equal tokens, seconds or FLOPs (default: tokens)"
    add_option(parser, "--by", help, choices=tuple(AXES), default="tokens")
    help = "what to compare; lower is better (default: loss)"
    add_option(parser, "--metric", help, choices=METRICS, default="loss")
    help = "also show what each arm spent to reach this loss"
    add_option(parser, "--reach", help, type=between(0, 1e6, open_low=True), metavar="LOSS")
    help = "fit a scaling law: loss against active parameters, tokens and expansion"
    parser.add_argument("--scaling", action="store_true", help=help)
    add_option(parser, "--csv", "write a row per run to FILE", type=output_file, metavar="FILE")
    add_option(parser, "--markdown", "write the tables to FILE", type=output_file, metavar="FILE")
    help = "folder to write: the page, CSV, plots, and hparams for TensorBoard"
    add_option(parser, "--output", help, type=Path, metavar="DIR")


def _compare(line: Line) -> int:
    if not line.words:
        raise ConfigError(
            "no run to compare; give workdirs or sweeps: moejax compare runs/a runs/b"
        )
    from moejax.compare_report import Output, run_compare

    options = line.options
    output = Output(options.csv, options.markdown, options.output)
    run_compare(line.words, options.by, options.metric, options.reach, options.scaling, output)
    return DONE


def _report_options(parser: argparse.ArgumentParser) -> None:
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


def _report(line: Line) -> int:
    options, config = line.options, _stored_config(line, "report")
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
        _start_jax(options.cpu_devices)
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


def _generate_options(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser, "folder that `moejax train` wrote")
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="text to continue; repeatable"
    )
    add_option(parser, "--prompts", "file with one prompt per line", type=Path, metavar="FILE")
    add_step(parser)
    add_cpu_devices(parser)
    add_option(
        parser,
        "--max_tokens",
        "new tokens per prompt (default: 100)",
        type=whole(1, 2**30),
        default=100,
        metavar="N",
    )
    help = "0 always takes the most likely token (default: 0.8)"
    add_option(parser, "--temperature", help, type=between(0, 100), default=0.8, metavar="X")
    help = "sample from the most likely tokens with this total probability (default: 0.95)"
    add_option(
        parser, "--top_p", help, type=between(0, 1, open_low=True), default=0.95, metavar="X"
    )
    add_option(
        parser,
        "--seed",
        "seed of the sampling (default: 0)",
        type=whole(0, 2**32 - 1),
        default=0,
        metavar="N",
    )


def _generate(line: Line) -> int:
    config, options = _stored_config(line, "generate"), line.options
    prompts = [*options.prompt, *_read_prompts(options.prompts)]
    if not prompts:
        raise ConfigError('no prompt; give --prompt "In the beginning" or --prompts FILE')
    _start_jax(options.cpu_devices)
    from moejax.generate import generate_workdir

    texts = generate_workdir(
        config,
        Path(options.workdir),
        options.step,
        prompts,
        options.max_tokens,
        options.temperature,
        options.top_p,
        options.seed,
    )
    shown = [printable(prompt + text) for prompt, text in zip(prompts, texts, strict=True)]
    print("\n\n".join(shown))
    return DONE


_PROMPT_BYTES = 16 << 20


def _read_prompts(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        with open(file, "rb") as stream:  # which may be a pipe
            content = stream.read(_PROMPT_BYTES + 1)
        prompts = [text for text in content.decode().splitlines() if text.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prompts={file} cannot be read: {error}") from None
    if len(content) > _PROMPT_BYTES:
        raise ConfigError(f"--prompts={file} is larger than {_PROMPT_BYTES >> 20} MiB; cut it")
    if not prompts:
        raise ConfigError(f"--prompts={file} is empty; write one prompt per line")
    return prompts


def _inspect_options(parser: argparse.ArgumentParser) -> None:
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


def _inspect(line: Line) -> int:
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
    config = _stored_config(line, "inspect")
    other = read_config(options.against) if against else None
    _start_jax(options.cpu_devices)
    from moejax.inspect_command import inspect_workdir

    inspect_workdir(config, other, options)
    return DONE


def _verify_options(parser: argparse.ArgumentParser) -> None:
    add_cpu_devices(parser)
    help = "also check every router, dispatch and transport on a small layer (takes an hour)"
    parser.add_argument("--all", action="store_true", help=help)
    help = "with --all: also write the results to FILE as a Markdown table"
    add_option(parser, "--page", help, type=output_file, metavar="FILE")
    add_json(parser)


def _verify(line: Line) -> int:
    config = line.load()
    _start_jax(line.options.cpu_devices)
    from moejax.verify import verify

    return verify(config, line.options.all, line.options.json, line.options.page)


def _claims_options(parser: argparse.ArgumentParser) -> None:
    help = "claims to test, for example C4 or C4,C6 (default: all)"
    add_option(parser, "--only", help, metavar="IDS")
    help = "folder of the results, which a later call reuses (default: runs/claims)"
    add_option(parser, "--workdir", help, default="runs/claims", metavar="DIR")
    help = "Markdown file to write, plots beside it (default: claims.md in the workdir)"
    add_option(parser, "--page", help, type=output_file, metavar="FILE")


def _claims(line: Line) -> int:
    _start_jax(1)
    from moejax.claims.page import run_claims

    only = line.options.only
    names = None if only is None else [name.strip() for name in only.split(",")]
    verdicts = run_claims(names, Path(line.options.workdir), line.options.page)
    return DONE if all(verdicts.values()) else CHECK_FAILED


def _describe_options(parser: argparse.ArgumentParser) -> None:
    help = "lay the mesh out on this many devices (default: as many as it needs)"
    add_option(parser, "--devices", help, type=whole(1), metavar="N")


def _describe(line: Line) -> int:
    config = line.load()
    from moejax.describe import describe

    describe(config, line.options.devices)
    return DONE


def _plan_options(parser: argparse.ArgumentParser) -> None:
    help = (
        "pod to compile for: v5p:4x4x8 (the chips of a TPU slice), v5p:4x4x8:2 (two slices), "
        "h100:16x8 (hosts x GPUs)"
    )
    add_option(parser, "--topology", help, metavar="CHIP:SIZES")
    help = "try many meshes, remat policies, microbatches and transports; compile and rank the best"
    parser.add_argument("--search", action="store_true", help=help)
    add_json(parser)


def _plan(line: Line) -> int:
    config = line.load()
    from moejax.topology import parse_topology, start_compiler

    topology = parse_topology(line.options.topology)
    start_compiler(topology)
    if line.options.search:
        from moejax.search import search_plan

        assert line.config is not None
        given = [line.config, *line.overrides]
        fits = search_plan(config, topology, given, line.options.json)
    else:
        from moejax.plan_report import plan

        fits = plan(config, topology, line.options.json)
    return DONE if fits else CHECK_FAILED


def _config(line: Line) -> int:
    assert line.config is not None
    in_file = load_values(line.config)
    values = config_values(build_config({**in_file, **read_overrides(line.overrides)}))
    for section in sections():
        print(f"{section}:")
        for name in values:
            if name.startswith(f"{section}."):
                print(f"  {name.removeprefix(f'{section}.')}: {values[name]}")
    for name in values:
        if "." not in name:
            print(f"{name}: {values[name]}")
    _show_difference(line.config, in_file, values)
    _show_difference("the defaults", {name: key.default for name, key in keys().items()}, values)
    return DONE


def _show_difference(than: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    differing = value_difference(theirs, ours)
    rows = [f"#   {key}: {before} -> {after}" for key, before, after in differing]
    title = printable(f"# differs from {than}")
    print(f"\n{title}: {'' if rows else 'nothing'}", *rows, sep="\n")


def _prepare_options(parser: argparse.ArgumentParser) -> None:
    help = "`bytes`, or the path of a tokenizer.json or a SentencePiece model (default: bytes)"
    add_option(parser, "--tokenizer", help, default="bytes", metavar="NAME")
    add_option(parser, "--output", "folder to write, for data.path", metavar="DIR")
    add_option(
        parser,
        "--field",
        "field of a .jsonl or .parquet row that holds the text (default: text)",
        default="text",
    )
    help = "share of the documents kept for validation (default: 0.05)"
    add_option(
        parser,
        "--validation_fraction",
        help,
        type=between(0, 1, open_low=True),
        default=0.05,
        metavar="X",
    )
    add_option(parser, "--workers", "processes (default: one per core)", type=whole(1), metavar="N")
    help = "give up when a process does nothing for this many seconds (default: 600)"
    seconds = between(0, 1e6, open_low=True)
    add_option(parser, "--timeout_seconds", help, type=seconds, default=600.0, metavar="X")


def _prepare(line: Line) -> int:
    if not line.words:
        raise ConfigError(
            "no input; give files, folders or patterns, for example moejax prepare 'text/*.txt'"
        )
    from moejax.prepare import prepare

    options = line.options
    meta = prepare(
        line.words,
        options.tokenizer,
        options.output,
        field=options.field,
        validation_fraction=options.validation_fraction,
        workers=options.workers,
        timeout_seconds=options.timeout_seconds,
    )
    for name, split in meta["splits"].items():
        print(f"{name}: {split['num_documents']:,} documents, {split['num_tokens']:,} tokens")
    keys = f"data.source=prepared data.path={options.output} data.tokenizer={options.tokenizer}"
    print(printable(f"train on it with {keys} model.vocab_size={meta['vocab_size']}"))
    return DONE


def _supervise_options(parser: argparse.ArgumentParser) -> None:
    help = "restarts in a row without a newer checkpoint before giving up (default: 3)"
    add_option(parser, "--restarts", help, type=whole(1), default=3, metavar="N")
    parser.add_argument(
        "--end_when_preempted",
        action="store_true",
        help="on preemption, return exit code 75 for a scheduler that restarts the whole job",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def _supervise(line: Line) -> int:
    from moejax.supervisor import Retries, supervise_command

    options = line.options
    command = options.command[options.command[:1] == ["--"] :]
    if not command:
        raise ConfigError("no command; give one after --, for example train configs/x.py ...")
    if command[0] in VERBS:
        command = [sys.executable, *safe_path(), "-m", "moejax", *command]
    return supervise_command(command, Retries(options.restarts, options.end_when_preempted))


def _sweep_options(parser: argparse.ArgumentParser) -> None:
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
    _storage(parser)
    add_cpu_devices(parser)


def _storage(parser: argparse.ArgumentParser) -> None:
    help = (
        "URL of an Optuna storage, such as postgresql://user@host/sweeps, for several machines, "
        "which share the workdir (default: MOEJAX_SWEEP_STORAGE, or SQLite in the workdir)"
    )
    add_option(parser, "--storage", help, metavar="URL")


def _sweep(line: Line) -> int:
    from moejax.sweep import Options, sweep

    options = {name: value for name, value in vars(line.options).items() if name != "given"}
    options["workdir"] = Path(line.options.workdir)
    assert line.config is not None
    return sweep(line.config, read_overrides(line.overrides), Options(**options))


def _sweep_worker_options(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser, "folder of the sweep")
    _storage(parser)
    add_cpu_devices(parser)


def _sweep_worker(line: Line) -> int:
    from moejax.sweep_worker import work

    options = line.options
    return work(Path(options.workdir), options.storage, options.cpu_devices)


def _no_options(parser: argparse.ArgumentParser) -> None:
    pass


_VERBS = [
    Verb(
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
        _train_options,
        _train,
        ("*",),
        required=("workdir",),
    ),
    Verb(
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
        _eval_options,
        _eval,
        MAY_CHANGE_AFTER_TRAINING,
        config=False,
        required=("workdir",),
    ),
    Verb(
        "generate",
        "continue prompts with a checkpoint's model",
        "moejax generate --workdir DIR --prompt TEXT [--prompt TEXT ...] [options] [key=value ...]",
        """
  moejax generate --workdir runs/a --prompt "In the beginning" --max_tokens 100 --temperature 0.8

The config comes from the workdir. A prompt that begins with a dash is written --prompt="- so".""",
        _generate_options,
        _generate,
        MAY_CHANGE_AFTER_TRAINING,
        config=False,
        required=("workdir",),
    ),
    Verb(
        "fsck",
        "read every checkpoint of a run and say which are sound",
        "moejax fsck --workdir DIR [--json FILE]",
        """
  moejax fsck --workdir runs/a

Compares every file's size and SHA-256 with the checkpoint's manifest, and reads config.json,
metrics.jsonl and events.jsonl. Changes nothing and needs no accelerator. Exit code 1 means that
something is damaged.""",
        _fsck_options,
        _fsck,
        config=False,
        required=("workdir",),
    ),
    Verb(
        "verify",
        "check that every layout computes the same losses and gradients",
        "moejax verify CONFIG[:ARG] [--cpu_devices N] [--all [--page FILE]] [--json FILE] "
        "[key=value]",
        """
  moejax verify configs/quickstart.py --cpu_devices 8

Runs the config's model for a few steps with a small batch, on meshes that split the devices over
data, fsdp, expert and tensor, with and without accumulation, remat and capacity, and compares each
with a dense oracle: one row each. `--all` adds every router, dispatch and transport on a small
layer. Exit code 1 means that a difference is above tolerance.""",
        _verify_options,
        _verify,
        ("*",),
    ),
    Verb(
        "claims",
        "test claims of the literature at a size for CPUs",
        "moejax claims [--only IDS] [--workdir DIR] [--page FILE]",
        """
  moejax claims --only C4

Trains what the claims need, with at least 3 seeds, and writes a page with the paper's number, ours,
pass or fail, and plots. Exit code 1 means that a claim did not hold.""",
        _claims_options,
        _claims,
        config=False,
    ),
    Verb(
        "describe",
        "show parameters, FLOPs, memory, shardings and the mesh of a config",
        "moejax describe CONFIG[:ARG] [--devices N] [key=value ...]",
        """
  moejax describe configs/quickstart.py mesh.expert=8""",
        _describe_options,
        _describe,
        ("*",),
    ),
    Verb(
        "inspect",
        "show which tokens the experts of a checkpoint take, and what is lost without them",
        "moejax inspect --workdir DIR [--text TEXT | --against DIR] [options] [key=value ...]",
        """
  moejax inspect --workdir runs/a                          # the atlas, into runs/a/atlas
  moejax inspect --workdir runs/a --text "In the beginning" --png text.png --json text.json
  moejax inspect --workdir runs/a --against runs/a --against_step 100

Reads as much of the validation text as eval.batches says, without dropping tokens; see
docs/inspect.md.""",
        _inspect_options,
        _inspect,
        MAY_CHANGE_AFTER_TRAINING,
        config=False,
        required=("workdir",),
    ),
    Verb(
        "plan",
        "compile the train step for a pod that you do not have: memory, traffic, time",
        "moejax plan CONFIG[:ARG] --topology CHIP:SIZES [--search] [--json FILE] [key=value ...]",
        """
  moejax plan configs/models/mixtral_8x7b.py --topology v5p:4x4x4

Needs no accelerator, only the compiler for its chips: pip install 'moejax[plan-tpu]' or
'moejax[plan-gpu]'. Takes minutes for a large model. `--search` also tries other meshes, remat
policies, microbatches and transports. Exit code 1 means that the step does not fit into the memory
of a device.""",
        _plan_options,
        _plan,
        ("*",),
        required=("topology",),
    ),
    Verb(
        "config",
        "show the resolved config, and what differs from the file and from the defaults",
        "moejax config CONFIG[:ARG] [key=value ...]",
        """
  moejax config configs/quickstart.py moe.top_k=1 moe.normalize_weights=False""",
        _no_options,
        _config,
        ("*",),
    ),
    Verb(
        "prepare",
        "turn text into a data set for data.path",
        "moejax prepare INPUT [INPUT ...] --output DIR [options]",
        """
  moejax prepare 'text/*.txt' --tokenizer path/to/tokenizer.json --output data/mine
  moejax train configs/quickstart.py --workdir runs/mine data.source=prepared data.path=data/mine

INPUT is a file (.txt, .jsonl, .parquet), a folder or a quoted pattern. A prefix names its domain,
as in en='books/*.txt'; without one, the domain is the name of the folder.""",
        _prepare_options,
        _prepare,
        config=False,
        required=("output",),
    ),
    Verb(
        "compare",
        "compare runs: loss at equal cost, significance over seeds, cost to reach a loss",
        "moejax compare DIR [DIR ...] [--by tokens|seconds|flops] [--scaling] [options]",
        """
  moejax compare runs/dense runs/moe sweeps/capacity --by seconds --output runs/compared

DIR is a workdir, a sweep, or a folder of workdirs; runs may still be training. Runs that differ
only in their seed form one arm. The other arms are compared with the first DIR, or with its best
arm if it has several. Reads only configs, metrics and ledgers, and changes nothing in them.""",
        _compare_options,
        _compare,
        config=False,
    ),
    Verb(
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
        _report_options,
        _report,
        MAY_CHANGE_AFTER_TRAINING,
        config=False,
        required=("workdir",),
    ),
    Verb(
        "supervise",
        "run a training, and restart it when it fails",
        "moejax supervise [--restarts N] [--end_when_preempted] -- train CONFIG --workdir DIR ...",
        """
  moejax supervise -- train configs/quickstart.py --workdir runs/a --cpu_devices 8

After -- comes a command of moejax, or a program that runs one, such as srun. It is restarted after
a crash, a signal, or a lost or stuck process, but not after an error that a restart cannot cure.
SIGTERM and Ctrl-C are passed on to it and end both. After --restarts restarts in a row without a
newer checkpoint, supervise gives up with exit code 70.""",
        _supervise_options,
        _supervise,
        config=False,
    ),
    Verb(
        "sweep",
        "train many variants of a config, and rank them",
        "moejax sweep SWEEP[:ARG] --workdir DIR [--workers N] [--resume] [options] [key=value ...]",
        """
  moejax sweep configs/sweeps/learning_rate.py:small --workdir sweeps/rate --cpu_devices 1

SWEEP is a Python file that defines get_sweep(arg): which keys of a base config to vary, and how.
key=value changes the base config. Everything is checked before anything trains. Each trial is an
ordinary workdir in DIR/trials. --resume continues a sweep that was stopped or killed.""",
        _sweep_options,
        _sweep,
        ("*",),
        required=("workdir",),
    ),
    Verb(
        "sweep_worker",
        "train trials of a running sweep on this machine",
        "moejax sweep_worker --workdir DIR [--storage URL] [--cpu_devices N]",
        """
  moejax sweep_worker --workdir sweeps/rate

`moejax sweep` starts its workers itself. Start more by hand on any machine that sees the workdir.
A worker ends when no trial is left.""",
        _sweep_worker_options,
        _sweep_worker,
        config=False,
        required=("workdir",),
    ),
]
VERBS = {verb.name: verb for verb in _VERBS}
