"""Processes begin to run a program when all of them have compiled it.

On CPUs gloo gives another process 30 s to come to its first collective, however long that one
still compiles; a run of unequal or busy hosts ended there.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # as in cluster.py

DAY = 24 * 3600 * 1000  # ms; the lifeline ends the wait for one that is gone, the watchdog for all
_MEETINGS = itertools.count()


def wait_for_all() -> None:
    """Waits until every process has come here as often as this one. No collective.

    Raises:
        jax.errors.JaxRuntimeError: one is gone; `cluster.is_loss` knows it.
    """
    client = distributed.global_state.client
    if client is not None:
        client.wait_at_barrier(f"moejax/together/{next(_MEETINGS)}", DAY)


class CompiledTogether:
    """A step that is compiled at its first call, which waits for the others before it runs.

    Later calls have to have the shapes and shardings of the first.
    """

    def __init__(self, step: Any):
        self.lower = step.lower  # for whoever compiles it ahead
        self._compiled: Any = None

    def __call__(self, *args: Any) -> Any:
        if self._compiled is None:
            self._compiled = self.lower(*args).compile()
            wait_for_all()
        return self._compiled(*args)


def compiled_together(step: Callable) -> Callable:
    """Returns a jitted step as `CompiledTogether`; as it is where this process is alone."""
    return step if jax.process_count() == 1 else CompiledTogether(step)
