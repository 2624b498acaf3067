"""A sum over as many rounds as the routing needs, in the memory of one.

A receive buffer that holds every possible routing would be as many times larger as there are
devices on the expert axis. So it holds somewhat more than the balanced load, and what is left
takes further rounds over the same buffer.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def sum_rounds(
    run: Callable[[jax.Array | int, Any, Any], Any], operands: Any, fixed: Any, rounds: jax.Array
) -> Any:
    """Returns run(0, operands, fixed) + ... + run(rounds - 1, operands, fixed).

    Round 0 is differentiated as usual, so routing that fits costs one round forward and one
    backward. Further rounds keep nothing: the backward pass computes them again, one at a time.

    Args:
        run: gives a pytree of arrays; collectives inside are allowed where `rounds` is the same on
            every device that takes part.
        operands: what gradients flow to.
        fixed: whole numbers, without gradient.
        rounds: int32, at least 1.
    """
    return _sum_rounds(run, operands, fixed, rounds)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_rounds(run, operands, fixed, rounds):
    first = run(0, operands, fixed)
    return _add_rounds(first, rounds, lambda index: run(index, operands, fixed))


def _add_rounds(first, rounds, more):
    def body(carry):
        index, total = carry
        return index + 1, jax.tree.map(lax.add, total, more(index))

    return lax.while_loop(lambda carry: carry[0] < rounds, body, (_one_like(rounds), first))[1]


def _one_like(rounds: jax.Array) -> jax.Array:
    return lax.full_like(rounds, 1)


def _forward(run, operands, fixed, rounds):
    first, transpose = jax.vjp(lambda operands: run(0, operands, fixed), operands)
    total = _add_rounds(first, rounds, lambda index: run(index, operands, fixed))
    return total, (transpose, operands, fixed, rounds)


def _backward(run, saved, grad):
    transpose, operands, fixed, rounds = saved

    def more(index):
        _, transpose = jax.vjp(lambda operands: run(index, operands, fixed), operands)
        return transpose(grad)[0]

    return _add_rounds(transpose(grad)[0], rounds, more), None, None


_sum_rounds.defvjp(_forward, _backward)
