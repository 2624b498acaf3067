"""`moejax eval` on other data and while a training goes on: numbers, records, refusals."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_score import CONFIG

from moejax.checkpoint import Checkpoints
from moejax.cli import main
from moejax.config import ConfigError, DataConfig, EvalConfig, TrainConfig
from moejax.corpus import load_corpus
from moejax.errors import UNAVAILABLE
from moejax.eval_command import EvalRequest, evaluate_request, spread
from moejax.eval_series import EVAL_SERIES, Watching, read_series
from moejax.evaluate import Evaluator
from moejax.history import COUNTERS
from moejax.metrics import read_metrics
from moejax.overrides import apply_overrides, config_to_dict
from moejax.prepare import prepare
from moejax.state import TrainState
from moejax.workdir import CHECKPOINTS, MANIFEST, open_workdir

WORDS = ("and it came to pass that the sun rose over the hills. ", "def main(): return 0\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prepared data of two domains, and text that is not prepared."""
    folder = tmp_path_factory.mktemp("data")
    for name, words in zip(("prose", "code"), WORDS, strict=True):
        (folder / name).mkdir()
        for number in range(6):
            (folder / name / f"{number}.txt").write_text(words * (number + 1) + str(number))
    (folder / "other").mkdir()
    (folder / "other" / "x.txt").write_text("Ñandú über Ærø. " * 30)
    inputs = [str(folder / "prose"), str(folder / "code")]
    prepare(
        inputs,
        "bytes",
        str(folder / "set"),
        validation_fraction=0.5,
        workers=1,
        show_progress=False,
    )
    return folder


@pytest.fixture(scope="module")
def config(data):
    return dataclasses.replace(
        CONFIG,
        data=DataConfig("prepared", sequence_length=128, path=str(data / "set")),
        train=TrainConfig(batch_size=8, steps=40),
        eval=EvalConfig(batches=1),
    )


def save(checkpoints, config, params, step: int, scale: float) -> None:
    """A checkpoint whose parameters are `params` times `scale`."""
    state = TrainState(
        step=jnp.asarray(step, jnp.int32),
        params=jax.tree.map(lambda leaf: leaf * np.float32(scale), params),
        opt_state={"mu": jnp.zeros(1)},
        router_state={},
        rng=jnp.asarray([1, step], jnp.uint32),
    )
    meta = {
        "config": config_to_dict(config),
        "counters": dict.fromkeys(COUNTERS, step),
        "validation": load_corpus(config.data, "validation").fingerprint,
    }
    assert checkpoints.save(state, meta, None)


@pytest.fixture(scope="module")
def params(mesh, params_of):
    return params_of(CONFIG, mesh)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, config, params):
    workdir = open_workdir(tmp_path_factory.mktemp("eval") / "run", config)
    with Checkpoints(workdir, dataclasses.replace(config.checkpoint, keep=9)) as checkpoints:
        for step, scale in ((20, 1.0), (30, 1.1), (40, 1.2)):
            save(checkpoints, config, params, step, scale)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.fixture(scope="module")
def report(saved, config, data):
    whole = apply_overrides(config, ["eval.batches=None"])
    words = ("validation", f"other={data / 'other'}", str(data / "set" / "train"))
    return evaluate_request(whole, EvalRequest(saved, 30, words))


def test_each_data_set_has_its_record(report, data):
    assert report["step"] == 30
    assert list(report["data"]) == ["validation", "other", str(data / "set" / "train")]
    for record in report["data"].values():
        assert (record["step"], record["split"], record["tokens_seen"]) == (30, "eval", 30)
        assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
        assert record["seconds"] > 0
        assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["seconds"])
        assert record["peak_memory_bytes"] > 1 << 24
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_domains_are_those_of_each_data_set(report):
    """Two domains and one share the compiled steps; none has another's tokens."""
    validation, other, train = report["data"].values()
    assert set(other["domains"]) == {"other"}
    assert set(validation["domains"]) | set(train["domains"]) == {"prose", "code"}
    for record in report["data"].values():
        total = sum(fields["tokens"] for fields in record["domains"].values())
        assert total == record["tokens"]


def test_bits_per_byte_are_of_the_bytes_of_the_text(report, data):
    """First tokens are nobody's target, and their bytes are not counted."""
    other = report["data"]["other"]
    size = len((data / "other" / "x.txt").read_bytes()) - 1
    assert other["bytes"] == other["domains"]["other"]["bytes"] == size
    assert other["tokens"] == size + 1, "the end of the document is a target too"
    bits = other["loss"] * other["tokens"] / math.log(2) / size
    assert other["bits_per_byte"] == pytest.approx(bits)


def test_bytes_of_a_part_of_a_text_are_those_of_its_ids(mesh, params, config, data):
    from moejax.eval_data import load_eval_data

    (found,) = load_eval_data([str(data / "other")], config.data)
    wrong = dataclasses.replace(found, bytes_n=np.array([10**6]))
    small = apply_overrides(config, ["train.batch_size=2", "moe.eval_capacity_factor=2.0"])
    record = Evaluator(small, mesh, wrong)(params, {})
    assert 200 < record["bytes"] <= record["tokens"] <= 256
    whole = apply_overrides(small, ["eval.batches=None"])
    assert Evaluator(whole, mesh, wrong)(params, {})["bytes"] == 10**6


def test_the_spread_over_data_sets(report):
    losses = {name: record["loss"] for name, record in report["data"].items()}
    row = report["spread"]["loss"]
    assert row["mean"] == pytest.approx(np.mean([*losses.values()]))
    assert row["deviation"] == pytest.approx(np.std([*losses.values()], ddof=1))
    assert losses[row["worst_data"]] == row["worst"] == max(losses.values())
    assert set(report["spread"]) == {"loss", "perplexity", "bits_per_byte"}


def test_a_loss_that_is_not_finite_is_the_worst():
    values = {"a": 2.0, "b": None}
    records = {d: {"loss": v, "perplexity": v, "bits_per_byte": v} for d, v in values.items()}
    worst = {"mean": None, "deviation": None, "worst": None, "worst_data": "b"}
    assert spread(records)["loss"] == worst


def test_watching_evaluates_what_comes_and_goes_on_where_it_was(workdir, config, params, capsys):
    """It begins with steps 20 and 40, is interrupted, and meets a damaged checkpoint,
    another one of its step, and one that is new."""
    shutil.move(workdir / CHECKPOINTS / "30", workdir / "thirty")
    shutil.move(workdir / CHECKPOINTS / "40", workdir / "forty")

    class Interrupted(Exception):
        pass

    def interrupt(_):
        raise Interrupted

    request = EvalRequest(workdir, watching=Watching(1, 60, interrupt))
    with pytest.raises(Interrupted):
        evaluate_request(config, request)
    (first,) = read_series(workdir)
    assert first["step"] == 20

    shutil.move(workdir / "thirty", workdir / CHECKPOINTS / "30")
    damaged = max((workdir / CHECKPOINTS / "30").rglob("*"), key=lambda f: f.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    steps = iter(range(3))

    def train(_):
        step = next(steps)
        if step == 0:  # somebody removed the damaged one, and another 30 was saved
            shutil.rmtree(workdir / CHECKPOINTS / "30")
            with Checkpoints(workdir, config.checkpoint) as checkpoints:
                save(checkpoints, config, params, 30, 1.5)
        else:
            shutil.move(workdir / "forty", workdir / CHECKPOINTS / "40")

    evaluate_request(config, EvalRequest(workdir, watching=Watching(1, 60, train)))
    lines = read_series(workdir)
    assert [line["step"] for line in lines] == [20, 30, 40]
    assert lines[0] == first, "what was evaluated stays"
    assert len((workdir / EVAL_SERIES).read_text().splitlines()) == 3
    losses = [line["data"]["validation"]["loss"] for line in lines]
    assert len(set(losses)) == 3
    err = capsys.readouterr().err
    assert "step 30 is passed over: the checkpoint of step 30 is unsound" in err
    assert "the training is done, and so are its evaluations: 2 new in eval.jsonl" in err


def test_a_checkpoint_that_goes_away_in_between_is_said(workdir, config, monkeypatch, capsys):
    from moejax import evaluate

    load = evaluate.load_for_use

    def gone(config, workdir, step, mesh):
        if step == 20:
            (workdir / CHECKPOINTS / "20" / MANIFEST).unlink()
        return load(config, workdir, step, mesh)

    monkeypatch.setattr(evaluate, "load_for_use", gone)
    monkeypatch.setattr(evaluate.Evaluator, "compile", lambda *_: 0.0)
    monkeypatch.setattr(evaluate, "evaluate_restored", lambda *_: {"step": 1, "split": "eval"})
    evaluate_request(config, EvalRequest(workdir, watching=Watching(1, 60)))
    assert [line["step"] for line in read_series(workdir)] == [30, 40]
    assert "step 20 was deleted or replaced before it could be evaluated" in capsys.readouterr().err


# The line


def test_the_line_reads_other_data_whole(workdir, data, monkeypatch, tmp_path, capsys):
    """eval.batches=1 of the run is for its validation split, not for data that are asked for."""
    seen = []
    monkeypatch.setattr("moejax.commands.eval.start_jax", lambda *_: None)

    def answer(config, request):
        seen.append((config.eval.batches, request))
        return {"step": 40}

    monkeypatch.setattr("moejax.eval_command.evaluate_request", answer)
    out, words = tmp_path / "out.json", ["eval", "--workdir", str(workdir)]
    line = [*words, "--data", "a=x", "--data", "y", "--field", "body", "--step", "40"]
    assert main([*line, "--json", str(out)]) == 0
    assert json.loads(out.read_text()) == {"step": 40}
    assert main([*line, "eval.batches=3"]) == 0
    assert main([*words, "--watch", "--patience", "5"]) == 0
    expected = EvalRequest(workdir, 40, ("a=x", "y"), "body")
    watching = EvalRequest(workdir, watching=Watching(patience=5.0))
    assert seen == [(None, expected), (3, expected), (1, watching)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--watch --step 20", "--watch goes through all checkpoints and --step names 20; leave"),
        ("--watch --json x.json", "--json x.json is for one checkpoint; --watch writes eval.jsonl"),
        ("--patience 5", "--patience 5.0 is not read without --watch; add that, or leave it out"),
        ("--poll_seconds 5", "--poll_seconds 5.0 is not read without --watch"),
        ("--field body", "--field body is not read without --data; leave it out"),
        ("--limit 5", "--limit 5 is not read without --tasks; add that, or leave it out"),
        ("--tasks_path docs", "--tasks_path docs is not read without --tasks"),
        ("--tasks a --tasks_path nowhere", "--tasks_path nowhere is not a folder; give one that"),
        ("--tasks ,", "--tasks ',' names no task; give names, as in a,b"),
    ],
)
def test_options_that_do_not_go_together_are_refused(line, message, saved, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    assert main(["eval", "--workdir", str(saved), *line.split()]) == 2
    assert capsys.readouterr().err.startswith(f"moejax eval: error: {message}")


def test_without_the_harness_the_error_says_how_to_get_it(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message = r"--tasks needs the package lm_eval, .*; pip install 'moejax\[lm-eval\]'"
    with pytest.raises(ConfigError, match=message):
        EvalRequest(saved, tasks=("a",))


def test_a_workdir_without_checkpoints_is_refused_or_waited_for(tmp_path, config, monkeypatch):
    workdir = open_workdir(tmp_path / "run", config)
    with pytest.raises(ConfigError, match="holds no checkpoint; train first, or wait for the"):
        evaluate_request(config, EvalRequest(workdir, data=("validation",)))
    now = iter(range(1000))
    how = Watching(1, 5, lambda _: None, now.__next__)
    with pytest.raises(ConfigError, match="it has no checkpoint") as caught:
        evaluate_request(config, EvalRequest(workdir, watching=how))
    assert caught.value.code == UNAVAILABLE


def test_several_processes_are_refused(saved, config, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="--watch run in one process, not in 2; leave the launch"):
        evaluate_request(config, EvalRequest(saved, data=("validation",)))


# As processes


@pytest.mark.slow
def test_a_watch_beside_a_training_killed_and_started_again(tmp_path):
    """Three processes: what trains, a watch that is killed after its first line, and another."""
    tiny = [
        *("model.num_layers=1", "model.d_model=16", "model.num_heads=2", "model.num_kv_heads=1"),
        *("model.head_dim=8", "moe.num_experts=4", "moe.expert_hidden=8", "train.batch_size=4"),
        *("data.sequence_length=64", "eval.batches=1", "train.steps=60", "checkpoint.every=10"),
        "checkpoint.keep=9",
    ]
    workdir = tmp_path / "run"
    workdir.mkdir()
    moejax = [sys.executable, "-m", "moejax"]
    train = ["train", "configs/quickstart.py", "--workdir", str(workdir), "--cpu_devices", "1"]
    watch = ["eval", "--workdir", str(workdir), "--watch", "--poll_seconds", "0.2"]
    started = [*moejax, *watch, "--patience", "500", "--cpu_devices", "2"]
    root = Path(__file__).parents[1]
    trainer = subprocess.Popen([*moejax, *train, *tiny], cwd=root, stdout=subprocess.DEVNULL)
    try:
        with subprocess.Popen(started, cwd=root, stdout=subprocess.DEVNULL) as first:
            while not read_series(workdir) and first.poll() is None:
                time.sleep(0.05)
            first.kill()
        assert trainer.wait() == 0
    finally:
        trainer.kill()
    before = len(read_series(workdir))
    assert before >= 1
    assert subprocess.run(started, cwd=root, stdout=subprocess.DEVNULL).returncode == 0
    lines = [json.loads(line) for line in (workdir / EVAL_SERIES).read_text().splitlines()]
    assert sorted(line["step"] for line in lines) == [10, 20, 30, 40, 50, 60]
    logged = {r["step"]: r["loss"] for r in read_metrics(workdir) if r["split"] == "eval"}
    assert lines[-1]["data"]["validation"]["loss"] == pytest.approx(logged[60], rel=1e-5)
