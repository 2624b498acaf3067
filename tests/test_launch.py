"""launch/local.py: two real processes train what one process trains."""

import subprocess
import sys
from pathlib import Path

import pytest

from moejax.metrics import read_metrics

ROOT = Path(__file__).parents[1]
SMALL = [
    "model.num_layers=1",
    "model.d_model=16",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.head_dim=8",
    "moe.num_experts=8",
    "moe.expert_hidden=16",
    "data.sequence_length=32",
    "train.batch_size=8",
    "train.steps=4",
    "logging.every=1",
    "eval.every=4",
    "eval.batches=1",
    "checkpoint.every=4",
    "mesh.data=1",
    "mesh.expert=8",
]


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=300, cwd=ROOT
    )


def launch(processes: int, workdir: Path, *words: str) -> subprocess.CompletedProcess:
    start = ["launch/local.py", "--processes", str(processes), "--logs", str(workdir / "logs")]
    train = ["--", "train", "configs/quickstart.py", "--workdir", str(workdir)]
    devices = ["--cpu_devices", str(8 // processes)]
    return run(*start, *train, *devices, *SMALL, *words)


def test_two_processes_train_what_one_does(tmp_path):
    losses = {}
    for processes in (1, 2):
        workdir = tmp_path / str(processes)
        done = launch(processes, workdir)
        assert done.returncode == 0, done.stderr
        found = read_metrics(workdir)
        assert [r["step"] for r in found] == [1, 2, 3, 4, 4], "metrics are written once"
        losses[processes] = [r["loss"] for r in found]
        assert "validation at step 4" in done.stdout
        if processes == 2:
            log = (workdir / "logs" / "process_1.log").read_text()
            assert "validation" not in log, "only the first process reports"
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)


def test_an_error_of_the_user_ends_all_processes_with_code_2(tmp_path):
    done = launch(2, tmp_path / "bad", "moe.top_k=99")
    assert done.returncode == 2
    assert "moe.top_k=99 is larger than moe.num_experts=8" in done.stderr
    assert "Traceback" not in done.stderr
