"""The contract of resuming: a run that was killed and continued is the run that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from moejax import loop
from moejax.checkpoint import Checkpoints
from moejax.config import ConfigError
from moejax.data import TrainBatches
from moejax.evaluate import evaluate_workdir
from moejax.events import read_events
from moejax.metrics import read_metrics
from moejax.overrides import apply_overrides, load_config
from moejax.workdir import checkpoint_steps, read_config

ROOT = Path(__file__).parents[1]
# what may differ between equal runs
CLOCK = ("step_seconds", "tokens_per_second", "mfu", "goodput")
SMALL = [
    "model.num_layers=2",
    "model.d_model=16",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.head_dim=8",
    "moe.num_experts=8",
    "moe.expert_hidden=16",
    "moe.capacity_factor=1.0",
    "moe.router=sigmoid_bias",
    "data.sequence_length=32",
    "train.batch_size=8",
    "train.steps=20",
    "logging.every=1",
    "eval.every=10",
    "eval.batches=2",
    "checkpoint.every=4",
    "mesh.data=1",
    "mesh.expert=8",
]


def _override(words, others):
    """Returns `words` with those of `others` in place of the same key."""
    return list({word.split("=")[0]: word for word in (*words, *others)}.values())


def command(workdir: Path, *words: str, devices: int = 8) -> list[str]:
    start = [sys.executable, "-m", "moejax", "train", str(ROOT / "configs/quickstart.py")]
    on = ["--workdir", str(workdir), "--cpu_devices", str(devices)]
    return [*start, *on, *_override(SMALL, words)]


def train(workdir: Path, *words: str, devices: int = 8) -> subprocess.CompletedProcess:
    line = command(workdir, *words, devices=devices)
    return subprocess.run(line, capture_output=True, text=True, timeout=300)


def records(workdir: Path) -> dict[tuple[int, str], dict]:
    found = read_metrics(workdir)
    by_step = {(record["step"], record["split"]): record for record in found}
    assert len(by_step) == len(found), "a step is there twice"
    return {
        key: {k: v for k, v in record.items() if k not in CLOCK} for key, record in by_step.items()
    }


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A run of 20 steps that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("resume") / "straight"
    done = train(workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def test_killed_and_resumed_is_bit_for_bit_the_undisturbed_run(straight, tmp_path):
    """SIGKILL once the checkpoint of step 8 is committed; the rest of the file must be equal."""
    workdir = tmp_path / "killed"
    process = subprocess.Popen(
        command(workdir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not [step for step in checkpoint_steps(workdir) if step >= 8]:
        assert process.poll() is None, "it ended before step 8"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    reached = checkpoint_steps(workdir)[-1]
    assert reached < 20, "it was killed too late to show anything"
    (workdir / "config.json").unlink()
    resumed = train(workdir)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming after step {reached}" in resumed.stdout
    assert "config.json is missing; it is written again, with the config of" in resumed.stderr
    assert {"config_restored"} <= {event["kind"] for event in read_events(workdir)}
    assert read_config(workdir) == read_config(straight)
    assert "environment has changed" not in resumed.stderr
    assert records(workdir) == records(straight)


@pytest.mark.slow
def test_fewer_devices_go_on_to_rounding(straight, tmp_path):
    """From step 16 on 4 devices, from 18 on one: the losses of 8 devices, and what differs said."""
    workdir, expected = tmp_path / "elastic", records(straight)
    shutil.copytree(straight, workdir)
    for devices, start in ((4, 16), (1, 18)):
        shutil.rmtree(workdir / "checkpoints" / "20")
        words = ["checkpoint.every=2", f"mesh.expert={devices}"]
        resumed = train(workdir, *words, devices=devices)
        assert resumed.returncode == 0, resumed.stderr
        assert f"resuming after step {start}" in resumed.stdout
        before = {4: 8, 1: 4}[devices]
        said = f"environment has changed since step {start} (devices: {before} -> {devices};"
        assert said in resumed.stderr
        *_, event = (e for e in read_events(workdir) if e["kind"] == "environment")
        assert event["step"] == start
        assert f"-> {devices}" in str(event["differing"])
        found = records(workdir)
        assert found.keys() == expected.keys()
        for key, record in found.items():
            assert record["loss"] == pytest.approx(expected[key]["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once_with_its_checkpoints_intact(straight, tmp_path, number):
    """The first waits for a step that never ends; the second does not."""
    stuck = (
        "import sys, time; from moejax import loop\n"
        "after = loop.Training._hooks\n"
        "def hooks(self, step, late, preempted):\n"
        "    after(self, step, late, preempted)\n"
        "    if step == 9: self.checkpoints.wait(); print('stuck', flush=True); time.sleep(600)\n"
        "loop.Training._hooks = hooks\n"
        "from moejax.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    workdir = tmp_path / "twice"
    words = [sys.executable, "-c", stuck, *command(workdir)[3:]]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line == "stuck\n" for line in process.stdout)
        process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)
        process.send_signal(number)
        assert process.wait(2) == 128 + number
    assert checkpoint_steps(workdir) == [4, 8]
    resumed = train(workdir)
    assert resumed.returncode == 0, resumed.stderr
    assert records(workdir) == records(straight)


def test_stopped_by_sigterm_and_resumed_is_bit_for_bit_the_undisturbed_run(straight, tmp_path):
    """Exit 75 at the step that was running, saved though it is not one of checkpoint.every."""
    workdir, words = tmp_path / "stopped", ["checkpoint.every=19"]
    process = subprocess.Popen(
        command(workdir, *words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None, "it ended before step 1"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    (reached,) = checkpoint_steps(workdir)
    assert reached < 19, "it was stopped too late to show anything"
    assert f"stopped by SIGTERM, saved at step {reached}; the same command resumes" in errors
    resumed = train(workdir, *words)
    assert resumed.returncode == 0, resumed.stderr
    expected = records(straight)
    expected.pop((reached, "eval"), None)  # the grace time was for saving
    assert records(workdir) == expected


@pytest.mark.slow
def test_a_log_on_a_full_disk_does_not_end_a_training(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(command(tmp_path), stdout=full, stderr=full, timeout=300)
    assert done.returncode == 0
    assert checkpoint_steps(tmp_path)[-1] == 20


def test_the_last_checkpoints_are_kept(straight):
    """keep=2 of steps 4, 8, 12, 16, 20; the best, at 20, is among them."""
    assert checkpoint_steps(straight) == [16, 20]


@pytest.mark.slow
def test_checkpoint_evaluates_equally_on_every_number_of_devices(straight):
    config = read_config(straight)
    logged = records(straight)[20, "eval"]
    for expert in (1, 2, 4, 8):
        laid_out = apply_overrides(config, [f"mesh.expert={expert}"])
        record = evaluate_workdir(laid_out, straight, 20, jax.devices()[:expert])
        assert record["loss"] == pytest.approx(logged["loss"], rel=1e-5)
        assert record["loss_at_capacity"] == pytest.approx(logged["loss_at_capacity"], rel=1e-5)
        assert record["expert_load"] == logged["expert_load"]


def test_another_config_is_refused_with_the_keys_that_differ(straight):
    refused = train(straight, "optim.learning_rate=0.5", "train.steps=30")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "optim.learning_rate 0.003 -> 0.5" in refused.stderr
    assert "train.steps 20" not in refused.stderr


def test_missing_step_names_those_there(straight):
    config = read_config(straight)
    with (
        Checkpoints(straight, config.checkpoint) as checkpoints,
        pytest.raises(ConfigError, match=r"step 3 has no checkpoint .*there are steps 16, 20"),
    ):
        checkpoints.find(3)


def test_workdir_without_checkpoints(tmp_path):
    config = load_config(str(ROOT / "configs/quickstart.py"))
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        Checkpoints(tmp_path, config.checkpoint, read_only=True)
    assert not list(tmp_path.iterdir()), "looking makes nothing"


def test_a_run_stops_at_the_first_quantity_that_is_not_finite(tmp_path):
    """A learning rate that blows up: exit 17, step and quantity named, no checkpoint of garbage."""
    workdir = tmp_path / "diverges"
    words = ["optim.learning_rate=1e30", "optim.warmup_steps=0", "optim.clip_norm=None"]
    done = train(workdir, *words)
    assert done.returncode == 17
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("moejax train: step ")
    assert "quantities that are not finite" in message
    assert "optim.learning_rate=1e+30" in message
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert "nonfinite" in last
    assert all(step < last["step"] for step in checkpoint_steps(workdir))


def test_other_data_are_refused(straight, tmp_path, monkeypatch):
    """The same config on changed text: the position in the data would mean nothing."""

    class OtherText(TrainBatches):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.fingerprint = "0" * 64

    workdir = tmp_path / "copy"
    shutil.copytree(straight, workdir)
    monkeypatch.setattr(loop, "TrainBatches", OtherText)
    with pytest.raises(ConfigError, match=r"the data text of .* has changed"):
        loop.train(read_config(straight), workdir)
