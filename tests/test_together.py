"""Compiling before running: a step runs when all have compiled. Real processes: test_launch*.py."""

import jax
import jax.numpy as jnp

from moejax import together
from moejax.together import CompiledTogether, compiled_together, wait_for_all


def test_a_step_waits_once_after_compiling_and_before_it_runs(monkeypatch):
    said = []
    monkeypatch.setattr(together, "wait_for_all", lambda: said.append("all have compiled"))

    @jax.jit
    def step(x):
        said.append("traced")
        jax.debug.callback(lambda: said.append("ran"))
        return x + 1

    both = CompiledTogether(step)
    assert both(jnp.float32(1)) == 2
    jax.effects_barrier()
    assert said == ["traced", "all have compiled", "ran"]
    assert both(jnp.float32(2)) == 3
    jax.effects_barrier()
    assert said[3:] == ["ran"]


def test_alone_there_is_nobody_to_wait_for():
    step = jax.jit(lambda x: x)
    assert compiled_together(step) is step
    wait_for_all()


def test_every_meeting_has_a_name_of_its_own(monkeypatch):
    names = []

    class Client:
        def wait_at_barrier(self, name: str, milliseconds: int) -> None:
            assert milliseconds > 3_600_000, "a compile may take an hour"
            names.append(name)

    monkeypatch.setattr(together.distributed.global_state, "client", Client())
    wait_for_all()
    wait_for_all()
    assert len(set(names)) == 2
