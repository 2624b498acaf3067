"""Two processes of which one dies, stops, or does not go on; and the harm without the protection.

Each is a training with real processes that is really disturbed, so all are slow. What a killed
worker does to the other one is in tests/test_launch.py, on every commit.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from test_launch import START, launch, lives, port, start, until

from moejax.events import read_events
from moejax.metrics import read_metrics

__all__ = ["port"]  # a fixture
pytestmark = pytest.mark.slow

LONG = ["train.steps=100000", "eval.every=None", "checkpoint.every=100000"]
LIMIT = "watchdog.step_seconds=3"

SLEEPS = """
import os, time
from moejax import loop
takes, calls = loop.Prefetch.__next__, []
def slower(self):
    calls.append(None)
    if os.environ["JAX_PROCESS_ID"] == "1" and {when}:
        time.sleep({seconds})
    return takes(self)
loop.Prefetch.__next__ = slower
"""
STUCK = SLEEPS.format(when="len(calls) == 6", seconds=600) + START
SLOW = SLEEPS.format(when="len(calls) > 1", seconds=0.3) + START
# process 1 compiles the step for longer than gloo waits for another
COMPILES_LONG = """
import os, sys, time
from jax._src import compiler
compiles = compiler.compile_or_get_cached
def slower(backend, computation, *more, **named):
    name = str(computation.operation.attributes["sym_name"])
    if os.environ["JAX_PROCESS_ID"] == "1" and "without_gradients" in name:
        print("compiles long", file=sys.stderr)
        time.sleep(40)
    return compiles(backend, computation, *more, **named)
compiler.compile_or_get_cached = slower
"""
ORDERLY = "import contextlib; from moejax import loop\n"
ORDERLY += f"loop.leaving_at_once = loop.lifeline = contextlib.nullcontext; {START}"


@contextmanager
def two_processes(port: int, workdir: Path, *words: str, **more) -> Iterator[list]:
    both = [start(index, port, workdir, *words, **more) for index in (0, 1)]
    try:
        yield both
    finally:
        for process in both:
            process.kill()
            process.communicate()


def steps_done(workdir: Path) -> int:
    records = read_metrics(workdir)
    return records[-1]["step"] if records else 0


def seconds_until_ended(*processes: subprocess.Popen, limit: float = 60) -> float:
    return until(lambda: all(process.poll() is not None for process in processes), limit)


def said_by(process: subprocess.Popen) -> str:
    assert process.stderr is not None
    return process.stderr.read()


def test_a_killed_coordinator_ends_the_others(port, tmp_path):
    with two_processes(port, tmp_path, *LONG) as both:
        until(lambda: steps_done(tmp_path) >= 3)
        both[0].kill()
        assert seconds_until_ended(both[1]) < 2
        assert both[1].returncode in (69, -signal.SIGABRT)


def test_without_leaving_at_once_the_other_one_lingers(port, tmp_path):
    """The harm: it holds its devices until JAX gives the lost one up at the exit."""
    with two_processes(port, tmp_path, *LONG, code=ORDERLY) as both:
        until(lambda: steps_done(tmp_path) >= 3)
        both[1].kill()
        time.sleep(6)
        assert lives(both[0].pid)


def test_a_stuck_peer_ends_both_in_time_and_is_named(port, tmp_path):
    with two_processes(port, tmp_path, *LONG, LIMIT, code=STUCK) as both:
        until(lambda: steps_done(tmp_path) >= 4)
        assert seconds_until_ended(*both) < 3 + 2 + 1  # the last one is of steps 5 and 6
        said = [said_by(process) for process in both]
        assert both[1].returncode == 124
        assert both[0].returncode in (124, 69, -signal.SIGABRT)
    assert "process 1 of 2 made no progress for 3 s in step 6" in said[1]
    assert "behind is process 1 (step 6, others at 7)" in said[1]
    assert "time.sleep" in said[1] or "in slower" in said[1], "its stack shows where"
    stuck = [event for event in read_events(tmp_path) if event["kind"] == "stuck"]
    assert stuck[0]["behind"].startswith("process 1 ")


def test_without_a_watchdog_they_stand_still(port, tmp_path):
    off = ["watchdog.step_seconds=None", "watchdog.slow_seconds=None"]
    with two_processes(port, tmp_path, *LONG, *off, code=STUCK) as both:
        until(lambda: steps_done(tmp_path) >= 4)
        time.sleep(8)
        assert all(lives(process.pid) for process in both)
        assert steps_done(tmp_path) <= 5


def test_a_stopped_peer_is_named_by_the_other_one(port, tmp_path):
    with two_processes(port, tmp_path, *LONG, LIMIT) as both:
        until(lambda: steps_done(tmp_path) >= 3)
        both[1].send_signal(signal.SIGSTOP)
        assert seconds_until_ended(both[0]) < 3 + 2 + 1
        assert both[0].returncode == 124
        assert "; behind is process 1 (step " in said_by(both[0])


def test_a_stopped_coordinator_is_named_by_the_other_one(port, tmp_path):
    with two_processes(port, tmp_path, *LONG, LIMIT) as both:
        until(lambda: steps_done(tmp_path) >= 3)
        both[0].send_signal(signal.SIGSTOP)
        assert seconds_until_ended(both[1]) < 3 + 2 + 1
        assert both[1].returncode == 124
        assert "behind is process 0, which does not answer" in said_by(both[1])


def test_a_pause_that_is_short_changes_nothing(port, tmp_path):
    undisturbed = launch(2, tmp_path / "undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr
    paused = tmp_path / "paused"
    with two_processes(port, paused) as both:
        until(lambda: steps_done(paused) >= 3)
        both[1].send_signal(signal.SIGSTOP)
        time.sleep(3)
        both[1].send_signal(signal.SIGCONT)
        seconds_until_ended(*both, limit=240)
        assert [process.returncode for process in both] == [0, 0], said_by(both[0])
    losses = [
        [r["loss"] for r in read_metrics(run)] for run in (paused, paused.parent / "undisturbed")
    ]
    np.testing.assert_array_equal(*losses)


def test_a_host_that_is_slow_is_named(port, tmp_path):
    """300 ms before each batch of process 1: nothing fails, and the records say who it is."""
    with two_processes(port, tmp_path, "train.steps=24", code=SLOW) as both:
        seconds_until_ended(*both, limit=240)
        assert [process.returncode for process in both] == [0, 0], said_by(both[0])
    last = [record for record in read_metrics(tmp_path) if record["split"] == "train"][-1]
    assert last["slowest_process"] == 1
    assert last["host_seconds_most"] > 0.28
    assert last["host_seconds_least"] < last["host_seconds_most"] - 0.2


def test_ctrl_c_to_one_saves_on_both(port, tmp_path):
    with two_processes(port, tmp_path, *LONG) as both:
        until(lambda: steps_done(tmp_path) >= 3)
        both[1].send_signal(signal.SIGINT)
        seconds_until_ended(*both)
        assert [process.returncode for process in both] == [75, 130]
        assert "saved at step" in said_by(both[0])
    assert os.listdir(tmp_path / "checkpoints")


@pytest.mark.parametrize("protected", [True, False])
def test_one_that_compiles_longer_than_gloo_waits(port, tmp_path, protected):
    """All wait until it has compiled; the harm without: the run ends."""
    alone = "" if protected else "from moejax import loop\nloop.compiled_together = lambda x: x\n"
    words = ["train.steps=3", "eval.every=None"]
    with two_processes(port, tmp_path, *words, code=f"{COMPILES_LONG}{alone}{START}") as both:
        seconds_until_ended(*both, limit=240)
        assert "compiles long" in said_by(both[1])
        if protected:
            assert [process.returncode for process in both] == [0, 0], said_by(both[0])
            assert steps_done(tmp_path) == 3
        else:
            assert both[0].returncode in (69, -signal.SIGABRT)
            assert steps_done(tmp_path) == 0
