"""SIGTERM: what is asked of JAX's service among several processes, and of a process alone."""

import os
import signal

import pytest
from jax.experimental import multihost_utils

from moejax.preemption import Preemption


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
        assert not preemption.reached()


def test_a_process_alone_notes_the_signal_from_its_first_step_on():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        assert signal.getsignal(signal.SIGTERM) is before, "it would be swallowed by a compile"
        assert not preemption.reached()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "a second one ends it"
    assert signal.getsignal(signal.SIGTERM) is before
