"""What backward sends again, and what waits for what: in the compiled programs of 4 devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import hlo
from moejax.config import Config, ModelConfig, MoEConfig
from moejax.data import Batch
from moejax.hlo_traffic import collectives
from moejax.moe import apply_moe
from moejax.parameters import moe_parameters
from moejax.routing import RouterInputs
from moejax.sharding import path_name, tree_shardings
from moejax.state import model_graph
from moejax.step import Microbatch, gradients

LAYERS, V = 2, 24
CONFIG = Config(
    model=ModelConfig(
        num_layers=LAYERS, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, vocab_size=V
    ),
    moe=MoEConfig(num_experts=8, expert_hidden=12, capacity_factor=None, buffer_factor=100.0),
)
# What crosses the expert axis before the experts of a layer, and so under `full` again. What comes
# back is weighted, so that nothing needs it again; but for `soft`, which mixes it by weights.
WAYS = {
    "slots": ({"capacity_factor": 1.0}, 2),  # rows and their weights
    "padded": ({"transport": "all_to_all"}, 3),  # the expert of each row too
    "padded, rounds": ({"transport": "all_to_all", "buffer_factor": 1.0}, 3),
    "ragged": ({"transport": "ragged"}, 3),  # rows, weights and counts, all by all-gathers here
    "gather": ({"transport": "gather"}, 3),
    "soft": ({"router": "soft", "soft_slots": 2, "allow_noncausal": True}, 2),  # there and back
}
MOVES = ("all-to-all", "all-gather", "reduce-scatter")


def _compiled(mesh, params, remat: str, changes: dict):
    """Returns the compiled gradient of a step, and what it gives for some tokens."""
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, remat=remat),
        moe=dataclasses.replace(CONFIG.moe, **changes),
    )
    token_abt = np.random.default_rng(0).integers(0, V, (1, 4, 10), np.int32)
    ones = np.ones_like(token_abt)
    batch = Batch(token_abt, token_abt[..., ::-1].copy(), ones > 0, ones, 0 * ones)
    part = Microbatch(batch, jnp.zeros((1, 4, 2), jnp.uint32), None)
    graph = model_graph(config, mesh)
    run = jax.jit(lambda params: gradients(config, graph, params, {}, part)[:2])
    compiled = run.lower(params).compile()
    return compiled.as_text(), compiled(params)


def _moves(text: str) -> int:
    """Counts what moves tokens, in all layers; further rounds, of unknown number, not."""
    return sum(c.times for c in collectives(hlo.parse(text)) if c.kind in MOVES)


SLOW = [pytest.param(*way, id=name, marks=pytest.mark.slow) for name, way in WAYS.items()]


@pytest.mark.parametrize(("changes", "repeated"), [WAYS["slots"], *SLOW[1:]])
def test_backward_repeats_no_exchange_that_is_kept(mesh_of, params_of, changes, repeated):
    mesh = mesh_of(1, 1, 4, 1)
    moe = dataclasses.replace(CONFIG.moe, **changes)
    params = params_of(dataclasses.replace(CONFIG, moe=moe), mesh)
    params = jax.device_put(params, tree_shardings(mesh, params))
    plain, (expected, losses) = _compiled(mesh, params, "none", changes)
    full, _ = _compiled(mesh, params, "full", changes)
    kept, (found, kept_losses) = _compiled(mesh, params, "exchange", changes)
    sent = _moves(plain)
    assert sent >= 4 * LAYERS
    assert _moves(full) == sent + repeated * LAYERS
    assert _moves(kept) == sent
    np.testing.assert_allclose(kept_losses.total, losses.total, rtol=1e-6)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True
    ):
        atol = 1e-5 * np.abs(a).max()
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol, err_msg=path_name(path))


def test_shared_experts_and_the_exchange_do_not_wait_for_each_other(mesh_of):
    """In the compiled layer, forward and backward: a scheduler may run them at the same time.

    The loss is linear in the layer's output, else its gradient would wait for all of the output.
    """
    mesh, config = mesh_of(1, 1, 4, 1), MoEConfig(num_experts=8, expert_hidden=12, shared_experts=2)
    random = np.random.default_rng(0)
    weights = {
        name: random.normal(size=parameter.shape).astype(np.float32)
        for name, parameter in moe_parameters(config, 16).items()
    }
    x_btd, grad_btd = random.normal(size=(2, 4, 10, 16)).astype(np.float32)
    inputs = RouterInputs(np.ones((4, 10), bool), None, None, None)

    def value(weights, x_btd):
        y_btd, _, _ = apply_moe(weights, x_btd, inputs, {}, config=config, mesh=mesh)
        return jnp.vdot(y_btd, grad_btd)

    text = jax.jit(jax.value_and_grad(value, (0, 1))).lower(weights, x_btd).compile().as_text()
    program = hlo.parse(text)
    instructions = program.computations[program.entry]
    operands = {i.name: i.inputs for i in instructions}

    def reached(names: set[str]) -> set[str]:
        """Returns all that the instructions wait for."""
        seen, front = set(), set(names)
        while front:
            front = {o for name in front for o in operands.get(name, ())} - seen
            seen |= front
        return seen

    exchanges = {i.name for i in instructions if i.opcode == "all-to-all"}
    shared = {
        i.name
        for i in instructions
        if i.opcode in ("dot", "custom-call", "fusion") and "shared" in i.attributes
        if "dot_general" in i.attributes
    }
    assert len(exchanges) == 6
    assert len(shared) >= 3 + 3  # three products forward, and at least as many back
    assert not reached(exchanges) & shared
    assert not reached(shared) & exchanges
