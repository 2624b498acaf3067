"""The watchdog, with a main thread that is really stuck, in processes of their own."""

import subprocess
import sys
import threading
import time
import types

import pytest

from moejax import watchdog as module
from moejax.cluster import Beats
from moejax.config import ConfigError, WatchdogConfig
from moejax.events import Events, read_events
from moejax.ledger import Ledger
from moejax.loop import Training
from moejax.observer import Diverged
from moejax.watchdog import Watchdog, behind_of


class Ended(Exception):
    pass


def guarded(tmp_path, *limits, leave) -> Watchdog:
    return Watchdog(WatchdogConfig(*limits), Events(tmp_path), Beats(), leave)


def test_a_main_thread_that_is_stuck_is_ended_with_its_stacks(tmp_path, capfd):
    """Within the limit and 2 s; whatever else the process does, in this test a sleep."""
    codes, left = [], threading.Event()

    def leave(code: int) -> None:
        codes.append(code)
        left.set()

    with guarded(tmp_path, 0.3, 60.0, leave=leave) as watchdog:
        watchdog.step(6)
        time.sleep(0.1)
        watchdog.step(7, 0.1)
        begun = time.monotonic()
        assert left.wait(20)
        assert 0.25 < time.monotonic() - begun < 2.3
    assert codes == [124]
    said = capfd.readouterr().err
    assert "process 0 of 1 made no progress for 0.3 s in step 7" in said
    assert "watchdog.step_seconds=0.3" in said
    assert "test_a_main_thread_that_is_stuck" in said, "the stack shows where"
    (event,) = read_events(tmp_path)
    assert (event["kind"], event["step"], event["process"]) == ("stuck", 7, 0)


@pytest.mark.parametrize("waits", ["finish", "explain"])
def test_waiting_for_a_save_has_the_limit_of_slow_things(tmp_path, waits):
    """At the end of a run, where others wait for process 0 too, and before it says why it stops."""
    seen = []
    with guarded(tmp_path, 5.0, 60.0, leave=seen.append) as watchdog:
        training = object.__new__(Training)
        training.watchdog, training._finish = watchdog, lambda: None
        training.ledger = Ledger(tmp_path, 0, enabled=False)
        training.checkpoints = types.SimpleNamespace(
            settle=lambda: seen.append(watchdog._limit),
            require_saved=lambda: seen.append(watchdog._limit),
            steps=[4],
        )
        watchdog.step(5)
        if waits == "finish":
            training.finish()
        else:
            said = training.explain(Diverged(5, "x"))
            assert said == "step 5: x; the checkpoint of step 4 is kept"
        assert (seen, watchdog._limit) == ([60.0], 5.0)
        training.ledger.close()


@pytest.mark.parametrize("limits", [(None, None), (0.2, None)])
def test_off_nobody_ends_it(tmp_path, limits):
    """The harm without it: it would stand still for ever."""

    def leave(_: int) -> None:
        raise AssertionError

    with guarded(tmp_path, *limits, leave=leave) as watchdog:
        with watchdog.slow("compile"):
            time.sleep(0.6)
        if limits[0] is None:
            watchdog.step(1)
            time.sleep(0.6)
    assert not read_events(tmp_path)


def test_slow_things_have_a_limit_of_their_own(tmp_path):
    codes = []
    with guarded(tmp_path, 0.3, 60.0, leave=codes.append) as watchdog:
        watchdog.step(1, compiles=True)
        time.sleep(0.7)
        watchdog.step(2)
        with watchdog.slow("evaluation"):
            time.sleep(0.7)
        time.sleep(0.1)
        watchdog.step(3)
    time.sleep(0.6)
    assert not codes, "a watchdog that was left ends nobody"


STUCK = """
import ctypes, sys
from pathlib import Path
from moejax import watchdog
from moejax.cluster import Beats
from moejax.config import WatchdogConfig
from moejax.events import Events
watchdog.BACKSTOP_SECONDS = 0.5
with watchdog.Watchdog(WatchdogConfig(0.3, 60.0), Events(Path(sys.argv[1])), Beats()) as dog:
    dog.step(1)
    library = {library}
    library.sleep(30)
"""


@pytest.mark.parametrize(
    ("library", "code"), [("ctypes.CDLL(None)", 124), ("ctypes.PyDLL(None)", 1)]
)
def test_c_code_that_is_stuck_is_ended_too(tmp_path, library, code):
    """Where it lets Python go on by the thread; where it holds Python's lock by the backstop."""
    program = STUCK.format(library=library)
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code, done.stderr
    assert time.monotonic() - begun < 25
    assert 'File "<string>", line 12 in <module>' in done.stderr


@pytest.mark.parametrize(
    ("steps", "behind"),
    [
        ({}, None),
        ({0: 7, 1: 7}, None),
        ({0: 7, 1: 6, 2: 7}, "process 1 (step 6, others at 7)"),
        ({0: 5, 1: 7, 2: 5}, "processes 0, 2 (step 5, others at 7)"),
        ({n: 1 + (n == 0) for n in range(12)}, "processes 1, 2, 3, 4, 5, 6, 7, 8 and 3 more (st"),
    ],
)
def test_who_is_behind(steps, behind):
    found = behind_of({process: {"step": step} for process, step in steps.items()})
    assert found == behind or (
        behind is not None and found is not None and found.startswith(behind)
    )


class _Heard(Beats):
    """Several processes, of which the first does not answer, or does."""

    def __init__(self, answers: bool):
        self.process, self.num_processes, self._answers = 1, 2, answers

    def say(self, **_):
        pass

    def heard(self):
        return {0: {"step": 9, "host_seconds": 0.25}, 1: {"step": 8, "host_seconds": 0.5}}

    def ask(self):
        if not self._answers:
            threading.Event().wait(30)

    def close(self):
        pass


@pytest.mark.parametrize(
    ("answers", "behind"),
    [(True, "process 1 (step 8, others at 9)"), (False, "process 0, which does not answer")],
)
def test_the_one_behind_is_named_in_time(tmp_path, monkeypatch, capfd, answers, behind):
    monkeypatch.setattr(module, "ASK_SECONDS", 0.2)
    codes = []
    dog = Watchdog(WatchdogConfig(5.0), Events(tmp_path), _Heard(answers), codes.append)
    assert dog.host_seconds() == {0: 0.25, 1: 0.5}
    with dog:
        dog.step(8)
        dog._end()
    assert codes == [124]
    assert f"; behind is {behind}; ends with exit code 124" in capfd.readouterr().err
    assert read_events(tmp_path)[0]["behind"] == behind


def test_a_limit_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"watchdog.step_seconds=0.0 must be a finite number abo"):
        WatchdogConfig(step_seconds=0.0)
    with pytest.raises(ConfigError, match=r"slow_seconds=2e\+20 is above 1e\+09 s.* use None"):
        WatchdogConfig(slow_seconds=2e20)


def test_the_longest_limit_is_one_that_clocks_take(tmp_path):
    with guarded(tmp_path, 1e9, 1e9, leave=print) as watchdog:
        watchdog.step(1)


def test_a_save_that_hangs_while_an_error_ends_the_run_is_watched(tmp_path):
    """It is waited for when all else is left; as long as slow things may take, no longer."""
    codes, released = [], threading.Event()

    def leave(code: int) -> None:
        codes.append(code)
        released.set()

    with guarded(tmp_path, 0.2, 1.0, leave=leave) as watchdog:
        watchdog.step(6)
        watchdog.ends()
        time.sleep(0.6)
        assert not codes, "a save may take longer than a step"
        assert released.wait(20)
    assert codes == [124]
