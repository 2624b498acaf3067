"""SIGTERM and Ctrl-C: what is asked of JAX's service among several processes, and of one alone."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import pytest
from jax.experimental import multihost_utils

from moejax.config import Config
from moejax.loop import Training
from moejax.overrides import apply_overrides
from moejax.preemption import SIGNALS, Preemption


class _Service:
    """JAX's preemption service as one process sees it: it stops at a number, not after it."""

    def __init__(self):
        self.asked, self.stop_at = 0, None

    def notify(self):
        self.stop_at = self.asked + 1

    def reached(self, number: int) -> bool:
        self.asked = number
        return number == self.stop_at


@pytest.mark.parametrize("steps_before", [0, 1, 7])
def test_a_signal_stops_at_the_next_question_of_this_start(monkeypatch, steps_before):
    """Also one that comes before the first, while a resumed run restores and compiles."""
    service = _Service()
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", service.reached)
    with Preemption() as preemption:
        assert not any(preemption.reached() for _ in range(steps_before))
        service.notify()
        assert preemption.reached()
        assert preemption.reached(), "also where a roll-back was raised in that step"


def test_a_process_alone_notes_the_signals_from_its_first_step_on():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Preemption() as preemption:
        now = [signal.getsignal(number) for number in SIGNALS]
        assert now == before, "it would be swallowed by a compile"
        assert not preemption.reached()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached()
        assert (preemption.name, preemption.code) == ("SIGTERM", 75)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1, "nothing is left behind"


def test_ctrl_c_saves_too_and_is_not_started_again():
    with Preemption() as preemption:
        assert not preemption.reached()
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.reached()
        assert (preemption.name, preemption.code) == ("SIGINT", 130)


def test_one_request_that_is_delivered_twice_is_one(capfd):
    """By a terminal and by a launcher; a second request is one that comes later."""
    codes = []
    with Preemption(codes.append) as preemption:
        preemption.reached()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached()
        time.sleep(0.2)  # until the thread heard both
        assert not codes
        preemption._since -= 1.5
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not codes:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert codes == [143]
    assert "a second signal ends it at once" in capfd.readouterr().err


def test_one_signal_while_the_main_thread_is_long_in_c_is_one():
    """Python calls its handler only after it, long after the thread heard of the signal."""
    codes = []
    with Preemption(codes.append) as preemption:
        assert not preemption.reached()
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        ctypes.CDLL(None).system(b"sleep 2")
        assert preemption.reached()
        assert codes == []


def test_a_log_that_cannot_be_written_holds_up_no_second_signal(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    codes, preemption = [], Preemption(lambda code: codes.append(code))
    preemption._note(signal.SIGTERM)
    preemption._since -= 5
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        preemption._note(signal.SIGTERM)
    assert codes == [143]


def test_one_signal_that_the_thread_hears_late_is_one():
    """On a machine that is busy: the handler took it more than a second before."""
    codes = []
    with Preemption(codes.append) as preemption:
        assert not preemption.reached()
        preemption._note(signal.SIGTERM)
        preemption._since -= 5
        os.kill(os.getpid(), signal.SIGTERM)  # whose number the thread hears first
        time.sleep(0.3)
        assert codes == []
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not codes:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert codes == [143]


@pytest.mark.parametrize(
    ("preempted", "expected"), [(False, ["evaluate", "save"]), (True, ["save"])]
)
def test_a_preempted_step_is_saved_without_evaluating(preempted, expected):
    """The grace time may not do for both."""
    done = []
    training = object.__new__(Training)
    training.config = apply_overrides(
        Config(), ["eval.every=4", "checkpoint.every=4", "train.steps=12"]
    )
    training.state = None
    training.ledger = types.SimpleNamespace(write=lambda: None)
    training.checkpoints = types.SimpleNamespace(save=lambda *_, **__: done.append("save"))
    training._slow = lambda _: contextlib.nullcontext()
    training._meta = dict
    training._evaluate = lambda _: done.append("evaluate") or 1.0
    late = types.SimpleNamespace(flush=lambda: None, restart_clock=lambda: None)
    training._hooks(8, late, preempted)
    assert done == expected


SERVICE = """
import sys, time, jax
from moejax.preemption import SIGNALS, Preemption
{ignore}
jax.config.update("jax_num_cpu_devices", 1)
jax.distributed.initialize("127.0.0.1:{port}", 1, 0)
with Preemption() as preemption:
    print("up", flush=True)
    while not preemption.reached():
        time.sleep(0.02)
    print("reached", preemption.code, flush=True)
    while True:  # a signal cuts a sleep short
        __import__("ctypes").CDLL(None).sleep(60)
"""


@pytest.mark.parametrize("taken", [True, False])
def test_the_service_hears_the_first_signal_and_the_second_ends_the_process(taken):
    """With JAX's real service; the main thread is inside C when the second signal comes.

    Where the signals are left to the service, which is how JAX has it, the second one does nothing.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    program = SERVICE.format(
        port=port, ignore="" if taken else "Preemption._take_signals = lambda self: None"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            process.terminate()
            assert process.stdout.readline() == b"reached 75\n"
            time.sleep(1.2)
            process.terminate()
            if taken:
                assert process.wait(2) == 143
            else:
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(2)
        finally:
            process.kill()
