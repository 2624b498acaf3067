"""Being asked to stop: SIGTERM, and the step after which every process saves and ends."""

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Notes SIGTERM while it is entered; `reached` answers alike on every process.

    Among several processes JAX's preemption service has the signal: it tells all of them, and has
    them agree on a step that none has passed. A process alone notes it itself, and a second SIGTERM
    ends it at once.
    """

    def __init__(self):
        self._noted = False
        self._alone = not jax.distributed.is_initialized()
        self._before = None

    def reached(self, step: int) -> bool:
        """Says whether to save and end after `step`; ask once a step, on every process."""
        return self._noted if self._alone else multihost_utils.reached_preemption_sync_point(step)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def __enter__(self) -> "Preemption":
        # Python lets only the main thread have a handler; in another one somebody else has it
        if self._alone and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
