"""The command line as a user meets it: forms, help, exit codes, and one line for every error."""

import errno
import functools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from rich.console import Console

from moejax.cli import VERBS, main
from moejax.command_line import checked_output, outliving_output
from moejax.config import Config, ConfigError
from moejax.errors import NO_SPACE
from moejax.overrides import config_values, keys, load_config, sections
from moejax.topology import parse_topology
from moejax.workdir import open_workdir

QUICKSTART = "configs/quickstart.py"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)


@pytest.fixture
def calls(monkeypatch):
    """Replaces what the verbs call; returns the calls as (function, arguments...)."""
    made = []

    def fake(module: str, answer=None, **functions):
        def record(name, answer):
            def call(*arguments, **keywords):
                made.append((name, *arguments, *keywords.values()))
                return answer

            return call

        recorded = {name: record(name, answer) for name, answer in functions.items()}
        monkeypatch.setitem(sys.modules, f"moejax.{module}", types.SimpleNamespace(**recorded))

    fake("mesh", start_jax=None)
    fake("loop", train=0)
    fake("evaluate", evaluate_workdir={"step": 40, "split": "eval", "loss": 1.5})
    fake("progress", show_evaluation=None)
    fake("generate", generate_workdir=[" world", "\x1b[2Jb"])
    fake("verify", verify=1)
    fake("describe", describe=None)
    fake("plan_report", plan=True)
    fake("search", search_plan=False)
    monkeypatch.setattr("moejax.topology.start_compiler", lambda pod: made.append(pod.name))
    split = {"num_documents": 3, "num_tokens": 4000}
    fake("prepare", prepare={"splits": {"train": split}, "vocab_size": 257})
    return made


@pytest.fixture
def workdir(tmp_path):
    return open_workdir(tmp_path / "run", Config(seed=3))


# Forms


@pytest.mark.parametrize(
    "line",
    [
        [QUICKSTART, "train.steps=1e3", "seed=2"],
        ["seed=2", "train.steps=1e3", QUICKSTART],
        [f"--config={QUICKSTART}", "--config.train.steps=1e3", "--config.seed=2"],
        ["--config", QUICKSTART, "--config.train.steps", "1e3", "--config.seed", "2"],
        ["--config.seed=2", QUICKSTART, "train.steps=1e3"],
    ],
)
def test_all_spellings_of_a_line_mean_the_same(line, tmp_path, calls):
    first, second = ["--cpu_devices", "8"], [f"--workdir={tmp_path / 'run'}"]
    expected = load_config(QUICKSTART, ["train.steps=1000", "seed=2"])
    assert expected.seed == 2
    for words in ([*first, *second, *line], [*first, *line, *second], [*line, *first, *second]):
        assert main(["train", *words]) == 0
        assert calls == [("start_jax", 8, True), ("train", expected, tmp_path / "run", False)]
        calls.clear()


def test_an_argument_of_the_config_may_hold_equal_signs(tmp_path, capsys):
    file = tmp_path / "x.py"
    file.write_text("def get_config(arg):\n return {'data': {'tokenizer': arg}}")
    for words in ([f"{file}:a=1,b=2"], [f"--config={file}:a=1,b=2"]):
        assert main(["config", *words]) == 0
        assert "  tokenizer: a=1,b=2\n" in capsys.readouterr().out


def test_eval_takes_its_config_from_the_workdir(workdir, calls, tmp_path):
    out = tmp_path / "out.json"
    line = ["--step", "40", "--cpu_devices=1", "mesh.expert=2", "--json", str(out)]
    assert main(["eval", "--workdir", str(workdir), *line]) == 0
    start, (name, config, folder, step), show = calls
    assert start == ("start_jax", 1, False), "SIGTERM ends it"
    assert (name, folder, step) == ("evaluate_workdir", workdir, 40)
    assert (config.seed, config.mesh.expert) == (3, 2)
    assert json.loads(out.read_text()) == show[1] == {"step": 40, "split": "eval", "loss": 1.5}


def test_generate_prints_each_prompt_with_its_continuation(workdir, calls, tmp_path, capsys):
    prompts = tmp_path / "prompts"
    # with the mark that Windows begins files with, and a character at which lines are not cut
    prompts.write_bytes("\ufeff\r\nb\u2028c\r\n".encode())
    line = ["--prompt", "hello", "--prompts", str(prompts), "--max_tokens", "5", "--seed=9"]
    assert main(["generate", "--workdir", str(workdir), *line, "--temperature", "0"]) == 0
    assert calls[1][2:] == (workdir, None, ["hello", "b\u2028c"], 5, 0.0, 0.95, 9)
    assert capsys.readouterr().out == "hello world\n\nb\\u2028c\\x1b[2Jb\n"


def test_verify_describe_and_prepare_pass_on_what_they_are_given(calls, tmp_path, capsys):
    config = load_config(QUICKSTART, ["seed=1"])
    assert main(["verify", QUICKSTART, "seed=1", "--all", "--cpu_devices", "8"]) == 1
    assert main(["describe", QUICKSTART, "seed=1", "--devices", "16"]) == 0
    words = ["a.py", "en=b/*.txt", "--output", "out", "--workers", "2", "--timeout_seconds", "9"]
    assert main(["prepare", *words]) == 0
    assert calls == [
        ("start_jax", 8, False),
        ("verify", config, True, None, None),
        ("describe", config, 16),
        ("prepare", ["a.py", "en=b/*.txt"], "bytes", "out", "text", 0.05, 2, 9.0),
    ]
    assert "train: 3 documents, 4,000 tokens\n" in capsys.readouterr().out
    page, file = tmp_path / "contract.md", tmp_path / "rows.json"
    main(["verify", QUICKSTART, "--all", "--page", str(page), "--json", str(file)])
    assert calls[-1][2:] == (True, file, page)


def test_plan_starts_the_compiler_of_its_pod_first(calls, tmp_path):
    config, file = load_config(QUICKSTART, ["seed=1"]), tmp_path / "plan.json"
    pod = parse_topology("v5e:2x4")
    line = ["plan", QUICKSTART, "seed=1", "--topology", "v5e:2x4"]
    assert main([*line, "--json", str(file)]) == 0
    assert calls == ["v5e:2x4", ("plan", config, pod, file)]
    assert main([*line, "--search"]) == 1  # nothing fits
    assert calls[2:] == ["v5e:2x4", ("search_plan", config, pod, [QUICKSTART, "seed=1"], None)]


def test_config_shows_the_values_and_what_differs(tmp_path, capsys):
    file = tmp_path / "x.py"
    file.write_text("def get_config():\n return {'train': {'steps': 20}, 'seed': 5}")
    assert main(["config", str(file), "train.steps=30", "moe.capacity_factor=None"]) == 0
    shown, from_file, from_defaults = capsys.readouterr().out.split("\n\n")
    lines = shown.splitlines()
    assert len(lines) == len(keys()) + len(sections())
    assert lines[lines.index("train:") + 1] == "  steps: 30"
    assert "  capacity_factor: None" in lines
    assert lines[-1] == "seed: 5"
    assert from_file.splitlines() == [
        f"# differs from {file}: ",
        "#   moe.capacity_factor: 1.25 -> None",
        "#   train.steps: 20 -> 30",
    ]
    assert "#   train.steps: 1000 -> 30\n#   seed: 0 -> 5\n" in from_defaults
    assert main(["config", str(file)]) == 0
    assert f"# differs from {file}: nothing\n" in capsys.readouterr().out


# Help


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb_has_an_example_its_options_and_its_keys(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"\n  moejax {verb} " in text
    assert max(map(len, text.splitlines())) <= 100
    shown = {name for name in keys() if f"    {name}=" in text}
    if verb in ("train", "verify", "describe", "plan", "config", "sweep"):
        assert shown == set(keys())
    elif verb in ("eval", "generate", "inspect", "report"):
        assert {"mesh.expert", "model.dtype"} <= shown
        assert "train.steps" not in shown
    else:
        assert shown == set()


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {verb} " in text for verb in VERBS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("moejax 0.")


# Errors

TRAIN = f"train {QUICKSTART} --workdir W"
ERRORS = [
    ("", "moejax: error: no verb; give one of train, eval, generate, fsck, "),
    ("trian", "moejax: error: unknown verb 'trian'; did you mean train?"),
    ("zzz", "moejax: error: unknown verb 'zzz'; give one of train, eval, "),
    ("train", "moejax train: error: --workdir is missing; see moejax train --help"),
    (
        "train --workdir W",
        "moejax train: error: no config; give a file, for example moejax train co",
    ),
    (
        f"{TRAIN} {QUICKSTART}",
        "moejax train: error: the config is given twice, as configs/quickstart",
    ),
    (
        f"{TRAIN} --config={QUICKSTART}",
        "moejax train: error: the config is given twice, as configs",
    ),
    (
        f"{TRAIN} --config configs",
        "moejax train: error: --config=configs is not a Python file; for ",
    ),
    (
        f"{TRAIN} runs/b",
        "moejax train: error: stray word 'runs/b'; expected configs/NAME.py or key=v",
    ),
    (
        f"{TRAIN} train.steps 5",
        "moejax train: error: stray word 'train.steps'; expected configs/NAM",
    ),
    (f"{TRAIN} --steps=5", "moejax train: error: unknown option --steps; "),
    ("train --wrkdir W", "moejax train: error: unknown option --wrkdir; did you mean --workdir?"),
    (f"{TRAIN} --work W", "moejax train: error: unknown option --work; did you mean --workdir?"),
    (f"{TRAIN} --workdir V", "moejax train: error: --workdir is given twice; give it once"),
    (
        f"{TRAIN} --cpu_devices 0",
        "moejax train: error: --cpu_devices: '0' is not a whole number fr",
    ),
    (f"{TRAIN} --cpu_devices", "moejax train: error: --cpu_devices: expected one argument"),
    (
        f"{TRAIN} --config.seed",
        "moejax train: error: --config.seed has no value; write --config.see",
    ),
    (
        f"{TRAIN} --config.seed --cpu_devices 1",
        "moejax train: error: --config.seed has no value; w",
    ),
    (
        f"{TRAIN} seed=1 --config.seed=2",
        "moejax train: error: seed is given twice, as 1 and as 2; ",
    ),
    (f"{TRAIN} lr=1", "moejax train: error: unknown key 'lr'; did you mean optim.learning_rate?"),
    (f"{TRAIN} moe-top=1", "moejax train: error: unknown key 'moe-top'"),
    (
        f"{TRAIN} train.steps=x",
        "moejax train: error: train.steps='x' is not a whole number; for ex",
    ),
    (
        f"{TRAIN} moe.top_k=99",
        "moejax train: error: moe.top_k=99 is larger than moe.num_experts=16; ",
    ),
    (
        f"{TRAIN} moe.top_k=1",
        "moejax train: error: moe.top_k=1 with moe.normalize_weights=True mak",
    ),
    ("train nothing.py --workdir W", "moejax train: error: config file nothing.py does not exist"),
    (f"train {QUICKSTART} --workdir Makefile", "moejax train: error: workdir Makefile is a file; "),
    (
        "eval --workdir docs",
        "moejax eval: error: docs/config.json does not exist; give a workdir th",
    ),
    (
        "eval --workdir W train.steps=5",
        "moejax eval: error: train.steps is fixed by the checkpoint",
    ),
    (
        "eval --workdir W mesh.exprt=5",
        "moejax eval: error: unknown key 'mesh.exprt'; did you mean ",
    ),
    (
        f"eval --workdir W {QUICKSTART}",
        "moejax eval: error: stray word 'configs/quickstart.py'; ex",
    ),
    (
        "fsck --workdir docs runs/a",
        "moejax fsck: error: stray word 'runs/a'; expected only options; see moejax fsck --help",
    ),
    (
        "claims C4",
        "moejax claims: error: stray word 'C4'; expected only options; see moejax claims",
    ),
    (
        "sweep_worker --workdir W seed=1",
        "moejax sweep_worker: error: stray word 'seed=1'; expected only options",
    ),
    (
        "eval --workdir W --step=-1",
        "moejax eval: error: --step: '-1' is not a whole number from 0 ",
    ),
    ("eval --workdir W --json no/x", "moejax eval: error: --json: no/x cannot be written; give a "),
    (
        "eval --workdir W --json docs",
        "moejax eval: error: --json: docs cannot be written; give a f",
    ),
    (
        "generate --workdir W --top_p 0",
        "moejax generate: error: --top_p: '0' is not a number above",
    ),
    (
        "generate --workdir W --top_p x",
        "moejax generate: error: --top_p: 'x' is not a number above",
    ),
    (
        "generate --workdir W --temperature nan",
        "moejax generate: error: --temperature: 'nan' is not",
    ),
    (
        "generate --workdir W --seed 4294967296",
        "moejax generate: error: --seed: '4294967296' is no",
    ),
    ("inspect --workdir docs", "moejax inspect: error: docs/config.json does not exist; give a"),
    (
        "inspect --workdir W --text a --against V",
        "moejax inspect: error: --text and --against do not go together; give one of them; see",
    ),
    (
        "inspect --workdir W --png x.png",
        "moejax inspect: error: --png draws a text; give --text too; see moejax inspect --help",
    ),
    (
        "inspect --workdir W --against_step 5",
        "moejax inspect: error: --against_step needs --against DIR; see ",
    ),
    (
        "inspect --workdir W --text a --remove 5",
        "moejax inspect: error: --remove is for the whole atlas only; see ",
    ),
    (
        "inspect --workdir W moe.top_k=1",
        "moejax inspect: error: moe.top_k is fixed by the checkpoint",
    ),
    (
        "describe",
        "moejax describe: error: no config; give a file, for example moejax describe conf",
    ),
    (
        f"plan {QUICKSTART}",
        "moejax plan: error: --topology is missing; see moejax plan --help",
    ),
    (
        f"plan {QUICKSTART} --topology v5p:4x4",
        "moejax plan: error: --topology v5p:4x4: v5p needs 3 sizes of its torus, for example",
    ),
    (
        "prepare --output x",
        "moejax prepare: error: no input; give files, folders or patterns, for ",
    ),
    ("prepare x.txt", "moejax prepare: error: --output is missing; see moejax prepare --help"),
    (
        "prepare x --output y --config=z.py",
        "moejax prepare: error: unknown option --config; see mo",
    ),
]


@pytest.mark.parametrize(("line", "message"), ERRORS)
def test_an_error_is_one_line_and_exit_code_2(line, message, capsys):
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert out == ""
    assert not Path("W").exists()


def test_generate_needs_a_prompt(workdir, tmp_path, capsys):
    (tmp_path / "empty").write_text("\n")
    for words, message in [
        ([], "no prompt; give --prompt"),
        (["--prompts", str(tmp_path / "empty")], "is empty; write one prompt per line"),
        (["--prompts", str(tmp_path)], "cannot be read: "),
    ]:
        assert main(["generate", "--workdir", str(workdir), *words]) == 2
        assert message in capsys.readouterr().err


def test_errors_of_what_a_verb_calls_are_one_line_too(calls, monkeypatch, tmp_path, capsys):
    def refuse(*_):
        raise ConfigError("mesh needs 8 devices\nand 1 is there")

    monkeypatch.setattr(sys.modules["moejax.loop"], "train", refuse)
    assert main(["train", QUICKSTART, "--workdir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "moejax train: error: mesh needs 8 devices and 1 is there\n"


def test_ctrl_c_is_130(calls, monkeypatch, tmp_path, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["moejax.loop"], "train", interrupt)
    assert main(["train", QUICKSTART, "--workdir", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "moejax train: interrupted\n"


# As a process


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["config", QUICKSTART, "moe.num_experts=4"], 0),
        (["train", QUICKSTART, "--workdir", "W", "lr=3"], 2),
        (["eval", "--workdir", "docs"], 2),
        (["zzz"], 2),
    ],
)
def test_answers_come_before_jax(words, code):
    program = (
        "import sys, moejax.cli\n"
        "try: code = moejax.cli.main(sys.argv[1:])\n"
        "except SystemExit as exit: code = exit.code\n"
        "heavy = {'jax', 'flax', 'orbax', 'grain', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import time; assert time.process_time() < 1, time.process_time()\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == (1 if code else 0)


def test_the_module_and_the_script_are_the_same_program():
    script = Path(sys.executable).with_name("moejax")
    for command in ([sys.executable, "-m", "moejax"], [str(script)]):
        done = subprocess.run(
            [*command, "config", "x"], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("moejax config: error: stray word 'x'; expected configs/NAM")


def test_a_closed_pipe_is_not_an_error():
    program = f"PYTHONUNBUFFERED= {sys.executable} -m moejax config {QUICKSTART}"
    command = f"{program} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (f"config {QUICKSTART} >/dev/full", 28, "stdout cannot be written (No space left on dev"),
        ("--help >/dev/full", 28, "stdout cannot be written"),
        ("config --help >/dev/full", 28, "stdout cannot be written"),
        (f"config {QUICKSTART} >/dev/full 2>&1", 28, ""),
        ("config x 2>/dev/full", 2, "error: stray word 'x'"),
        (f"config {QUICKSTART} 1</dev/null", 2, "stdout cannot be written (Bad file descriptor)"),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_an_error_of_one_line(line, code, said, unbuffered):
    """At once, where nothing is buffered, or at the flush at the end."""
    command = f"PYTHONUNBUFFERED={unbuffered} {sys.executable} -m moejax {line}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert said in done.stderr + done.stdout
    if "2>" not in line:
        assert done.stderr.count("\n") == 1
        assert done.stderr.rstrip().endswith("and start this again")


def test_a_failed_check_stays_one_where_its_output_is_lost(capfd):
    def full(*_):
        raise OSError(errno.EIO, "Input/output error")

    with open(os.devnull, "w") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "stdout", types.SimpleNamespace(write=full, flush=full, fileno=stream.fileno)
        )
        with checked_output("moejax fsck") as ending:
            ending.code = 1
        assert ending.code == 1
        with checked_output("moejax fsck") as ending:
            print("lost")
        assert ending.code == 69
        with pytest.raises(FileNotFoundError), checked_output("moejax fsck"):
            Path("/nowhere/at/all").read_text()
    assert capfd.readouterr().err.count("stdout cannot be written (Input/output error)") == 2


def test_every_shipped_config_loads():
    for file in sorted(Path("configs").glob("*.py")):
        assert set(config_values(load_config(str(file)))) == set(keys())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "--workdir", "x" * 5000], "cannot be used (File name too long)"),
        (["fsck", "--workdir", "W", "--json", "y" * 300], "cannot be used (File name too long)"),
        (
            ["generate", "--workdir", "W", "--prompts", "/dev/zero"],
            "is larger than 16 MiB; cut it",
        ),
        (["eval", "--workdir", "\x1b[2J"], "error: \\x1b[2J/config.json does not exist"),
    ],
)
def test_odd_paths_are_errors_of_one_line(workdir, words, message, capsys):
    assert main([str(workdir) if word == "W" else word for word in words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert "\x1b" not in error


def test_a_result_without_room_ends_with_its_code(workdir, capsys):
    assert main(["fsck", "--workdir", str(workdir), "--json", "/dev/full"]) == NO_SPACE
    assert "error: --json=/dev/full cannot be written: No space" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("say", "harm"),
    [(functools.partial(print, flush=True), BrokenPipeError), (Console().print, SystemExit)],
)
def test_what_nobody_hears_any_more_ends_no_training(monkeypatch, say, harm):
    """Behind `| head`, say, or `> log` on a disk that is full; rich would end the process."""
    for outlives in (True, False):
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w", buffering=1) as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            if outlives:
                with outliving_output():
                    say("lost")
                    assert not sys.stdout.isatty()
            else:
                with pytest.raises(harm):
                    say("lost")
                os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # for it to be closed
            assert sys.stdout is stream


def test_without_stdout_and_stderr_it_works_as_with_them():
    line = f"{sys.executable} -m moejax --version >&- 2>&-"
    assert subprocess.run(["sh", "-c", line]).returncode == 0
