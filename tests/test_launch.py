"""launch/local.py: several real processes train what one does, stop together, refuse together."""

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax.evaluate import restore_for_use
from moejax.events import read_events
from moejax.ledger import totals
from moejax.metrics import read_metrics
from moejax.workdir import checkpoint_steps, read_config

ROOT = Path(__file__).parents[1]
# Between equal runs these may differ.
CLOCK = ("step_seconds", "tokens_per_second", "mfu", "goodput")
CLOCK += ("host_seconds_least", "host_seconds_most", "slowest_process")
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
    "train.steps=20",
    "logging.every=1",
    "eval.every=20",
    "eval.batches=1",
    "checkpoint.every=20",
    "mesh.data=1",
    "mesh.expert=8",
]


def _local():
    spec = importlib.util.spec_from_file_location("local", ROOT / "launch/local.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


local = _local()
share_devices = local.share_devices


def command(processes: int, workdir: Path, *words: str, options: tuple = ()) -> list[str]:
    start = [sys.executable, "launch/local.py", "--processes", str(processes), *options]
    logs = ["--logs", str(workdir / "logs")]
    train = ["--", "train", "configs/quickstart.py", "--workdir", str(workdir)]
    devices = ["--cpu_devices", str(8 // processes)]
    keys = {word.split("=")[0]: word for word in (*SMALL, *words)}
    return [*start, *logs, *train, *devices, *keys.values()]


def launch(processes: int, workdir: Path, *words: str, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(processes, workdir, *words, **more),
        capture_output=True,
        text=True,
        timeout=400,
        cwd=ROOT,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run of one process with all 8 devices."""
    workdir = tmp_path_factory.mktemp("launch") / "alone"
    done = launch(1, workdir)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, str]:
    """The run of two processes with 4 devices each, and what process 0 said."""
    workdir = tmp_path_factory.mktemp("launch") / "two"
    done = launch(2, workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def _params(workdir: Path):
    restored = restore_for_use(read_config(workdir), workdir, None)
    assert restored.step == 20
    return restored.params


def _same_training(found: Path, expected: Path) -> None:
    records = [read_metrics(workdir) for workdir in (found, expected)]
    assert [r["step"] for r in records[0]] == [*range(1, 21), 20], "metrics are written once"
    losses = [[record["loss"] for record in of_run] for of_run in records]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), _params(found), _params(expected)
    )


@pytest.mark.slow
def test_several_processes_train_what_one_does(alone, two):
    workdir, said = two
    _same_training(workdir, alone)
    assert "validation at step 20" in said
    log = (workdir / "logs" / "process_1.log").read_text()
    assert "validation" not in log, "only the first process reports"
    assert not list(workdir.glob(".seen-by-all*"))


@pytest.mark.slow
def test_four_processes_train_what_one_does(alone, tmp_path):
    done = launch(4, tmp_path)
    assert done.returncode == 0, done.stderr
    _same_training(tmp_path, alone)


def processes_of(launcher: subprocess.Popen) -> dict[int, int]:
    """Returns the ids of the processes that a launcher started, by their index."""
    found = {}
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for child in children:
        for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"JAX_PROCESS_ID="):
                found[int(entry.partition(b"=")[2])] = int(child)
    return found


def lives(process: int) -> bool:
    """Whether a process runs; one that ended is a zombie until its parent asks for its code."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition: Callable[[], bool], seconds: float = 240) -> float:
    """Waits; returns after how many seconds the condition held."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds
        time.sleep(0.02)
    return time.monotonic() - begun


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, str]:
    """A run whose process 1 was killed once it had a checkpoint, started again by the launcher."""
    workdir = tmp_path_factory.mktemp("launch") / "killed"
    words = command(2, workdir, "checkpoint.every=3", options=("--restarts", "1"))
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=ROOT) as launcher:
        until(lambda: max(checkpoint_steps(workdir), default=0) >= 3)
        members = processes_of(launcher)
        os.kill(members[1], signal.SIGKILL)
        assert until(lambda: not lives(members[0])) < 4, "it may be in a barrier, too"
        _, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, errors
    return workdir, errors


@pytest.mark.slow
def test_killed_and_started_again_is_bit_for_bit_the_undisturbed_run(two, killed):
    """Two processes with 4 devices each: a lost peer, the supervisor, the resume, all at once."""
    workdir, errors = killed
    told = re.search(r"process 0 of 2: error: (process 1|another process) was lost", errors)
    assert told or "gloo" in errors, "gloo's own abort may come first"
    assert re.search(r"ended with exit code 13[47]; starting it again in 1 s, after step", errors)
    assert "environment has changed" not in errors, "it is the same one"
    (event,) = (event for event in read_events(workdir) if event["kind"] == "restart")
    assert 3 <= event["step"] < 20, "it was killed too late to show anything"
    found, expected = ([strip(r) for r in read_metrics(run)] for run in (workdir, two[0]))
    assert found == expected
    spent = totals(workdir)
    assert spent.sessions == 2
    assert spent.seconds["restart"] > 1
    assert spent.goodput is not None


def strip(record: dict) -> dict:
    """Returns a record without what two equal runs differ in."""
    return {name: value for name, value in record.items() if name not in CLOCK}


@pytest.mark.slow
def test_two_processes_go_on_as_one_to_rounding(killed, alone, tmp_path):
    workdir = tmp_path / "one"
    shutil.copytree(killed[0], workdir)
    *_, before, last = checkpoint_steps(workdir)
    assert last == 20
    shutil.rmtree(workdir / "checkpoints" / "20")
    done = launch(1, workdir, "checkpoint.every=3")
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {before}" in done.stdout
    assert f"environment has changed since step {before} (processes: 2 -> 1)" in done.stderr
    (event,) = (event for event in read_events(workdir) if event["kind"] == "environment")
    assert event["differing"] == ["processes: 2 -> 1"]
    losses = [[record["loss"] for record in read_metrics(run)] for run in (workdir, alone)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_an_error_of_the_user_ends_all_processes_with_code_2(tmp_path):
    done = launch(2, tmp_path / "bad", "moe.top_k=99")
    assert done.returncode == 2
    assert "moe.top_k=99 is larger than moe.num_experts=8" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_sigterm_saves_on_every_process(tmp_path):
    """The launcher gets the signal; the checkpoint is of a step that nobody asked to save.

    Once more while the resumed run compiles: it stops there, and does not lose the signal.
    """
    words = ["train.steps=100000", "checkpoint.every=100000", "eval.every=None"]

    def stop_when(condition: Callable[[], bool]) -> int:
        process = subprocess.Popen(
            command(2, tmp_path, *words), stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        deadline = time.monotonic() + 240
        while not condition():
            assert process.poll() is None, "it ended before the signal"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 75, errors
        saved = checkpoint_steps(tmp_path)[-1]
        assert f"stopped by SIGTERM, saved at step {saved}" in errors
        assert read_metrics(tmp_path)[-1]["step"] == saved
        return saved

    metrics, config = tmp_path / "metrics.jsonl", tmp_path / "config.json"
    first = stop_when(lambda: metrics.exists() and len(read_metrics(tmp_path)) >= 3)
    written = config.stat().st_mtime_ns  # it is written again once the state is restored
    assert first < stop_when(lambda: config.stat().st_mtime_ns != written) <= first + 2


def test_a_taken_port_is_refused(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        done = launch(2, tmp_path, options=("--port", port))
    assert done.returncode == 2
    assert f"--port {port} cannot be used" in done.stderr
    assert "give another one" in done.stderr


# Processes that a launcher did not start alike

START = "import sys; from moejax.cli import main; sys.exit(main(sys.argv[1:]))"


def start(index: int, port: int, workdir: Path, *words: str, seconds=60, code=START):
    train = ["train", "configs/quickstart.py", "--workdir", str(workdir), "--cpu_devices", "4"]
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(index),
        "MOEJAX_JOIN_SECONDS": str(seconds),
    }
    keys = {word.split("=")[0]: word for word in (*SMALL, *words)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *train, *keys.values()],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def errors_of(*started: subprocess.Popen, code: int = 2) -> list[str]:
    """Waits for the processes, which have to refuse, and returns what they said."""
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [code] * len(started), said
    assert not any("Traceback" in text for text in said)
    return said


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def listening(port: int) -> set[str]:
    """Returns the addresses at which something listens on a port, as the kernel has them."""
    text = "".join(Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6"))
    pairs = [row.split()[1].split(":") for row in text.splitlines() if row.split()[3] == "0A"]
    return {address for address, number in pairs if int(number, 16) == port}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (0, "process 0 of 2 waited 2 s at {}, but not all 2 processes came"),
        (1, "process 1 of 2 did not reach process 0 at {} in 2 s"),
    ],
)
def test_a_process_that_stays_alone_says_where_it_waited(tmp_path, port, index, message):
    begun = time.monotonic()
    process = start(index, port, tmp_path, seconds=2)
    listens = set()
    while process.poll() is None:
        listens |= listening(port)
        time.sleep(0.05)
    assert bool(listens) == (index == 0)
    assert all(address.endswith("0100007F") for address in listens), "127.0.0.1, also as IPv6"
    (said,) = errors_of(process, code=69)
    assert message.format(f"127.0.0.1:{port}") in said
    assert "MOEJAX_JOIN_SECONDS" in said
    assert time.monotonic() - begun < 60, "JAX itself would wait longer"


def test_sigterm_ends_what_has_nothing_to_save(tmp_path, port):
    """Of several processes too, where JAX's preemption service would swallow it."""
    code = "import sys, time; from moejax.cluster import join_processes; join_processes(False)\n"
    code += "open(sys.argv[4], 'w'); time.sleep(60)"
    marks = [tmp_path / name for name in "01"]
    both = [start(index, port, marks[index], code=code) for index in (0, 1)]
    deadline = time.monotonic() + 60
    while not all(mark.exists() for mark in marks):
        assert time.monotonic() < deadline, [process.poll() for process in both]
        time.sleep(0.05)
    both[1].send_signal(signal.SIGTERM)
    both[0].send_signal(signal.SIGTERM)
    errors_of(*both, code=-signal.SIGTERM)


def test_another_config_is_refused_by_all(tmp_path, port):
    """Before anything is compiled; also by the process that has the right one."""
    both = [start(0, port, tmp_path), start(1, port, tmp_path, "train.steps=21")]
    for said in errors_of(*both):
        assert "process 1 has train.steps=21 where process 0 has 20" in said
        assert "start every process with the same command" in said


def test_other_software_is_refused_by_all(tmp_path, port):
    other = f"import moejax; moejax.__version__ = '9.9'; {START}"
    both = [start(0, port, tmp_path), start(1, port, tmp_path, code=other)]
    for said in errors_of(*both):
        assert "process 1 has moejax='9.9' where process 0 has" in said


def test_a_workdir_of_its_own_is_refused_by_all(tmp_path, port):
    """The part of a checkpoint that process 1 writes would be missing where process 0 looks."""
    both = [start(index, port, tmp_path / str(index)) for index in (0, 1)]
    for said in errors_of(*both):
        assert f"process 1 does not see process 0's workdir {tmp_path / '1'}" in said
        assert "use a shared file system" in said


# Shares of the accelerators of a machine

EIGHT = [str(i) for i in range(8)]


def test_gpus_are_shared_equally():
    key = "CUDA_VISIBLE_DEVICES"
    assert share_devices(2, {}, EIGHT, []) == [{key: "0,1,2,3"}, {key: "4,5,6,7"}]
    assert share_devices(2, {key: "3,5"}, EIGHT, []) == [{key: "3"}, {key: "5"}]
    assert share_devices(1, {}, EIGHT, []) == [{}]
    assert share_devices(2, {}, [], []) == [{}, {}]


def test_tpu_chips_are_shared_one_each():
    shares = share_devices(4, {}, [], EIGHT[:4])
    assert [share["TPU_VISIBLE_DEVICES"] for share in shares] == ["0", "1", "2", "3"]
    assert [share["CLOUD_TPU_TASK_ID"] for share in shares] == ["0", "1", "2", "3"]
    ports = [share["TPU_PROCESS_PORT"] for share in shares]
    addresses = ",".join(f"localhost:{p}" for p in ports)
    assert {share["TPU_PROCESS_ADDRESSES"] for share in shares} == {addresses}
    assert {share["TPU_PROCESS_BOUNDS"] for share in shares} == {"2,2,1"}


@pytest.mark.parametrize(
    ("processes", "gpus", "tpus", "message"),
    [
        (3, EIGHT, [], "--processes 3 cannot share the 8 GPUs .*; use 1, 2, 4, 8, or"),
        (2, [], EIGHT[:4], "--processes 2 cannot share the 4 TPU chips .*; use 1, 4, or"),
    ],
)
def test_unequal_shares_are_refused(processes, gpus, tpus, message):
    with pytest.raises(ValueError, match=message):
        share_devices(processes, {}, gpus, tpus)
