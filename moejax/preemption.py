"""Being asked to stop: SIGTERM or Ctrl-C, and the step after which every process saves and ends."""

import contextlib
import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

import jax
from jax.experimental import multihost_utils

from moejax.errors import INTERRUPTED, PREEMPTED, SAME_SECONDS

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preemption:
    """Notes the signals that ask to stop; `reached` answers alike on every process.

    Among several processes JAX's preemption service has SIGTERM, from the moment they join: it
    tells all of them, and has them agree on a step that none has passed. Here the signals are taken
    from it, to hand the first on and to end at the second. A process alone notes them once its
    first step is compiled: before that there is nothing to save, and a signal ends it at once.

    A second signal ends the process at once, wherever its main thread is: a thread hears of it.
    """

    def __init__(self, leave: Callable[[int], object] = os._exit):
        self._leave = leave
        self._asked, self._reached = 0, False
        self._alone = not jax.distributed.is_initialized()
        self._signal: signal.Signals | None = None  # the first that came
        self._since = 0.0
        self._service: int | None = None  # the handler of JAX's service, an address
        self._before = {}
        self._end: socket.socket | None = None  # into which Python writes the numbers of signals

    @property
    def name(self) -> str:
        """What asked to stop; SIGTERM where another process was asked."""
        return (self._signal or signal.SIGTERM).name

    @property
    def code(self) -> int:
        """The exit code of a training that was saved and stopped."""
        return INTERRUPTED if self._signal == signal.SIGINT else PREEMPTED

    def reached(self) -> bool:
        """Says whether to save and end after this step; ask once a step, on every process."""
        self._asked += 1
        if not self._alone:
            # The service counts from 0 at every start and waits for a number, not for what is past
            # it: a signal before the first question stops at question 1, whatever the step.
            # It says yes to one number only, and a roll-back may be raised in that step.
            self._reached = self._reached or multihost_utils.reached_preemption_sync_point(
                self._asked
            )
            return self._reached
        if self._asked == 1:
            self._take_signals()
        return self._signal is not None

    def _take_signals(self) -> None:
        # Python lets only the main thread have a handler; in another one somebody else has it
        if threading.current_thread() is not threading.main_thread():
            return
        if not self._alone:
            self._service = _handler_of_c(signal.SIGTERM)
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        # Python calls a handler between two lines of the main thread, which may wait in C++ for
        # long; the number of a signal is in this socket at once
        self._end, far = socket.socketpair()
        self._end.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._end.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, args=(far,), daemon=True)
        self._thread.start()

    def _listen(self, far: socket.socket) -> None:
        heard = 0
        with far:
            while received := far.recv(64):
                for number in filter(SIGNALS.__contains__, received):
                    heard += 1
                    # on a machine that is busy the handler may have been there long before
                    if heard > 1 or self._signal is None:
                        self._note(number)

    def _handle(self, number: int, _: FrameType | None) -> None:
        # Python calls it when the main thread leaves C++, long after the thread heard of the
        # signal: only the thread can tell whether it is a second one
        if self._signal is None:
            self._note(number)

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._since, self._signal = now, signal.Signals(number)
            if self._service is not None:
                ctypes.CFUNCTYPE(None, ctypes.c_int)(self._service)(signal.SIGTERM)
        elif now - self._since > SAME_SECONDS:
            _say("moejax train: a second signal ends it at once; committed checkpoints stay\n")
            self._leave(128 + number)

    def __enter__(self) -> "Preemption":
        if not self._alone:
            self._take_signals()
        return self

    def __exit__(self, *_) -> None:
        if self._end is None:
            return
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._service is not None:
            _libc().signal(signal.SIGTERM, self._service)
        self._end.close()  # which ends the thread
        self._thread.join()


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    return libc


def _handler_of_c(number: signal.Signals) -> int | None:
    """Takes the place of a handler that C++ installed, if one did, and returns its address."""
    if callable(signal.getsignal(number)):  # Python's; it knows nothing of those of C++
        return None
    handler = _libc().signal(number, None)
    return handler if handler not in (None, 1, ctypes.c_void_p(-1).value) else None


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a log on a full disk must not hold up what follows
        os.write(2, text.encode())  # in a signal handler a stream's lock may be taken
