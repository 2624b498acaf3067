"""Being asked to stop: SIGTERM, and the step after which every process saves and ends."""

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Notes SIGTERM from the first step on; `reached` answers alike on every process.

    Among several processes JAX's preemption service has the signal, from the moment they join: it
    tells all of them, and has them agree on a step that none has passed. A process alone notes it
    itself, once its first step is compiled: before that there is nothing to save, and the signal
    ends it at once. So does a second one.
    """

    def __init__(self):
        self._asked = 0
        self._noted = False
        self._alone = not jax.distributed.is_initialized()
        self._before = None

    def reached(self) -> bool:
        """Says whether to save and end after this step; ask once a step, on every process."""
        self._asked += 1
        if not self._alone:
            # The service counts from 0 at every start and waits for a number, not for what is past
            # it: a signal before the first question stops at question 1, whatever the step.
            return multihost_utils.reached_preemption_sync_point(self._asked)
        if self._asked == 1:
            self._take_signal()
        return self._noted

    def _take_signal(self) -> None:
        # Python lets only the main thread have a handler; in another one somebody else has it
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def __enter__(self) -> "Preemption":
        return self

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
