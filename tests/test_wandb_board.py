"""`moejax train --wandb`, with the real wandb in its offline mode."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
from test_resume import ROOT, SMALL

from moejax.config import Config, ConfigError
from moejax.metric_writer import MetricWriter
from moejax.metrics import read_metrics
from moejax.store import start_run
from moejax.wandb_board import WandbBoard
from moejax.workdir import open_workdir

needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="needs pip install 'moejax[wandb]'"
)
BLOCK, HEADER = 32768, 7  # of the log format of LevelDB, which .wandb files have
LOGS = """
import sys
from pathlib import Path
from moejax.metric_writer import MetricWriter
from moejax.wandb_board import WandbBoard
from moejax.workdir import read_config

workdir = Path(sys.argv[1])
board = WandbBoard(workdir, read_config(workdir))
layers = {"max_violation": [0.5, None], "loss": float("nan"), "mfu": None}
with MetricWriter(workdir, 0, boards=[board]) as writer:
    writer.write({"step": 1, "split": "train", **layers})
    writer.write({"step": 1, "split": "eval", "loss": 2.5})
board.restart()
board.write({"step": 1, "split": "train", "loss": 3.0})
board.close()
board.close()
board.write({"step": 2, "split": "train", "loss": 2.0})  # off: nothing happens
"""


def _records(file):
    """Reads a .wandb file: blocks of records, each whole (1) or cut into first, middle and last."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, part, found = file.read_bytes(), HEADER, b"", []
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        part += content[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4):
            found.append(Record.FromString(part))
            part = b""
    return found


@pytest.fixture
def environment(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))  # nobody's login, nobody's settings


@needs_wandb
def test_offline_it_has_every_record_and_an_id_an_attempt(tmp_path, environment):
    workdir = open_workdir(tmp_path / "run", Config(seed=7))
    run = start_run(workdir)
    subprocess.run([sys.executable, "-c", LOGS, str(workdir)], check=True, capture_output=True)
    files = sorted(workdir.glob("wandb/offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime)
    assert len(files) == 2
    first, second = map(_records, files)
    about = [next(r.run for r in records if r.HasField("run")) for records in (first, second)]
    assert [a.run_group for a in about] == [f"run-{run}"] * 2
    assert all(re.fullmatch(f"{run}-[0-9a-f]{{8}}", a.run_id) for a in about)
    assert about[0].run_id != about[1].run_id
    config = {item.key: json.loads(item.value_json) for item in about[0].config.update}
    assert config["seed"] == 7
    assert config["moe.num_experts"] == 8

    def history(records):
        rows = [r.history for r in records if r.HasField("history")]
        return [
            {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in row.item}
            for row in rows
        ]

    rows = [{k: v for k, v in row.items() if k[0] != "_"} for row in history(first)]
    assert rows == [
        {"step": 1, "train/max_violation/layer_00": 0.5},
        {"step": 1, "eval/loss": 2.5},
    ]
    assert [row["train/loss"] for row in history(second)] == [3.0]
    assert (workdir / "metrics.jsonl").read_text().count("\n") == 2


@needs_wandb
def test_without_a_login_it_is_refused_with_the_remedy(tmp_path, environment, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    code = LOGS.replace("board = ", "try: board = ").replace(
        "layers =", "except Exception as error: print(repr(error)); sys.exit()\nlayers ="
    )
    workdir = open_workdir(tmp_path / "run", Config())
    command = [sys.executable, "-c", code, str(workdir)]
    result = subprocess.run(
        command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert "No API key configured" in result.stdout
    assert "set WANDB_MODE=offline and `wandb sync` later" in result.stdout
    assert result.stdout.startswith("ConfigError(")


def test_without_wandb_it_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"--wandb: .*pip install 'moejax\[wandb\]'"):
        WandbBoard(tmp_path, Config())


def test_what_fails_later_is_off_and_stops_nothing(tmp_path, caplog):
    board = object.__new__(WandbBoard)

    class Broken:
        def log(self, row):
            raise OSError("gone")

    board._run = Broken()
    with MetricWriter(tmp_path, 0, boards=[board]) as writer:
        for step in (1, 2):
            writer.write({"step": step, "split": "train", "loss": 1.0})
    assert caplog.text.count("Weights & Biases is off from here on: OSError('gone')") == 1
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


@needs_wandb
@pytest.mark.slow
def test_a_training_and_its_resumption_are_two_attempts_of_a_group(tmp_path, environment):
    workdir = tmp_path / "run"
    for steps in (4, 6):
        words = [*SMALL, f"train.steps={steps}", "eval.every=None", "eval.batches=1"]
        words += ["mesh.expert=1", "checkpoint.every=100", "data.sequence_length=16"]
        command = [sys.executable, "-m", "moejax", "train", str(ROOT / "configs/quickstart.py")]
        command += ["--workdir", str(workdir), "--cpu_devices", "1", "--wandb"]
        command += list({word.split("=")[0]: word for word in words}.values())
        subprocess.run(command, check=True, capture_output=True)
    files = sorted(workdir.glob("wandb/offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime)
    records = [_records(file) for file in files]
    about = [next(r.run for r in some if r.HasField("run")) for some in records]
    assert len({a.run_id for a in about}) == 2
    assert len({a.run_group for a in about}) == 1
    losses = [_numbers(some, "train/loss") for some in records]
    kept = {r["step"]: r["loss"] for r in read_metrics(workdir) if r["split"] == "train"}
    assert losses[0] | losses[1] == kept
    assert [sorted(some) for some in losses] == [[1, 2, 3, 4], [5, 6]]


def _numbers(records, name):
    """Returns a number of the history by step."""
    rows = [r.history.item for r in records if r.HasField("history")]
    found = [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in r} for r in rows]
    return {int(row["step"]): row[name] for row in found if name in row}
