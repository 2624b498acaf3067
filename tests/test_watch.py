"""Judging a step: limits by hand, updates that are left out bit for bit, and what the host says."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import watch as watch_module
from moejax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimConfig, TrainConfig
from moejax.data import Batch
from moejax.optim import make_optimizer
from moejax.sharding import place_batch
from moejax.state import abstract_state
from moejax.step import make_train_step
from moejax.watch import (
    NEEDED,
    WINDOW,
    Verdict,
    findings_of_router,
    findings_of_step,
    initial_watch,
    judge,
    router_health,
)
from moejax.watch_config import WatchConfig

B, T, V = 8, 8, 24
CONFIG = Config(
    model=ModelConfig(
        num_layers=1, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4, vocab_size=V
    ),
    moe=MoEConfig(num_experts=4, top_k=2, expert_hidden=8, router="sigmoid_bias"),
    data=DataConfig(sequence_length=T),
    optim=OptimConfig(learning_rate=0.01, warmup_steps=2),
    train=TrainConfig(steps=10, batch_size=B),
)
SKIP = WatchConfig(nonfinite="skip", loss_spike="skip", grad_norm_spike="skip")


def _watched(**changes) -> Config:
    return dataclasses.replace(CONFIG, watch=WatchConfig(**changes))


# The limits


def _judge(config: WatchConfig, state, loss: float, norm: float = 1.0, finite: bool = True):
    values = {"loss": jnp.float32(loss), "grad_norm": jnp.float32(norm)}
    return jax.jit(functools.partial(judge, config))(state, values, jnp.asarray(finite))


def _filled(losses, norms=None):
    """The state after these losses, the oldest first."""
    state = initial_watch()
    norms = np.ones(len(losses)) if norms is None else norms
    for name, values in (("loss", losses), ("grad_norm", norms)):
        ring = np.zeros(WINDOW, np.float32)
        for index, value in enumerate(values):
            ring[index % WINDOW] = value
        state[name] = jnp.asarray(ring)
    return state | {"seen": jnp.asarray(len(losses), jnp.int32)}


@pytest.mark.parametrize("seen", [NEEDED, WINDOW - 1, WINDOW, WINDOW + 70])
def test_the_limit_is_mean_plus_deviations_of_the_last_steps(seen):
    losses = np.random.default_rng(seen).normal(3.0, 0.2, seen)
    last = losses[-WINDOW:]
    verdict, state = _judge(WatchConfig(), _filled(losses), 3.0)
    assert verdict.limits["loss"] == pytest.approx(last.mean() + 6 * last.std(), rel=1e-5)
    assert not verdict.spikes["loss"]
    assert state["seen"] == seen + 1
    assert state["loss"][seen % WINDOW] == 3.0


def test_too_few_steps_say_nothing():
    verdict, _ = _judge(SKIP, _filled(np.ones(NEEDED - 1)), 1e9)
    assert math.isinf(verdict.limits["loss"])
    assert not verdict.spikes["loss"]
    verdict, _ = _judge(SKIP, _filled(np.ones(NEEDED)), 1e9)
    assert verdict.spikes["loss"]


def test_losses_that_hardly_move_leave_room_for_rounding():
    """Deviation 0, taken for a thousandth of the mean: 2 + 6 * 0.002."""
    verdict, _ = _judge(WatchConfig(), _filled(np.full(WINDOW, 2.0)), 2.011)
    assert verdict.limits["loss"] == pytest.approx(2.012, rel=1e-5)
    assert not verdict.spikes["loss"]


def test_a_spike_does_not_hide_the_next_one():
    """Taken as it is, 100 would lift the limit of losses around 1 to about 60 for 128 steps."""
    losses = np.random.default_rng(0).normal(1.0, 0.05, WINDOW)
    _, state = _judge(WatchConfig(), _filled(losses), 100.0)
    verdict, _ = _judge(WatchConfig(), state, 2.0)
    assert verdict.spikes["loss"]
    hidden = np.append(losses[1:], 100.0)
    assert hidden.mean() + 6 * hidden.std() > 50


def test_a_level_that_stays_is_accepted():
    """A skip for ever would keep out what every batch now has."""
    losses = np.random.default_rng(0).normal(1.0, 0.05, WINDOW)
    state, skipped = _filled(losses), 0
    for _ in range(WINDOW):
        verdict, state = _judge(SKIP, state, 2.0)
        skipped += int(verdict.skipped)
        if not verdict.skipped:
            break
    assert 3 < skipped < 40
    assert state["skipped"] == skipped
    assert state["in_a_row"] == 0


def test_what_is_not_finite_enters_no_window():
    state = _filled(np.ones(WINDOW))
    verdict, after = _judge(SKIP, state, math.nan, finite=False)
    assert verdict.skipped
    assert not verdict.spikes["loss"]
    np.testing.assert_array_equal(after["loss"], state["loss"])
    assert after["seen"] == WINDOW
    assert _judge(WatchConfig(), state, math.inf, finite=False)[0].skipped == False  # noqa: E712


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_each_spike_has_its_own_policy(name):
    config = WatchConfig(**{f"{name}_spike": "skip"})
    state = _filled(np.ones(WINDOW))
    loss, norm = (9.0, 1.0) if name == "loss" else (1.0, 9.0)
    assert _judge(config, state, loss, norm)[0].skipped
    assert not _judge(config, state, norm, loss)[0].skipped


# The step


def _rows(seed: int, *, broken: bool = False) -> Batch:
    random = np.random.default_rng(seed)
    stream = random.integers(V, size=(B, T + 1)).astype(np.int32)
    tokens = stream[:, :-1].copy()
    if broken:
        tokens[3, 4] = V + 5  # whose embedding is NaN
    ones = np.ones((B, T), np.int32)
    return Batch(tokens, stream[:, 1:], ones, ones.astype(bool), np.zeros_like(ones))


def _place(mesh, rows: Batch):
    return place_batch(mesh, lambda a, b: Batch(*(leaf[a:b] for leaf in rows)), B, 1)


@functools.cache
def _step(config, mesh):
    return make_train_step(config, mesh, donate=False)[0]


@pytest.fixture(scope="module")
def start(mesh_of, params_of):
    """Returns the state before the first step, on a mesh of 4 devices, and the mesh."""
    mesh = mesh_of(1, 1, 4, 1)
    abstract = abstract_state(CONFIG, mesh, make_optimizer(CONFIG.optim, CONFIG.train.steps))
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), abstract)
    state = dataclasses.replace(zeros, params=params_of(CONFIG, mesh))
    return jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), state, abstract), mesh


def _model(state):
    return state.params, state.opt_state, state.router_state


def _equal(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def _finite(tree) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(tree)))


def test_a_broken_batch_is_left_without_effect_bit_for_bit(start):
    state, mesh = start
    step = _step(_watched(nonfinite="skip"), mesh)
    before, _ = step(state, _place(mesh, _rows(0)))
    after, metrics = step(before, _place(mesh, _rows(1, broken=True)))
    assert math.isnan(metrics.losses.loss)
    assert metrics.verdict.skipped
    assert _equal(_model(after), _model(before))
    assert (after.step, after.watch["skipped"], after.watch["in_a_row"]) == (2, 1, 1)
    # the optimizer did not count it: the next step has the rate that this one would have had
    following, later = step(after, _place(mesh, _rows(2)))
    assert later.learning_rate == metrics.learning_rate
    assert not later.verdict.skipped
    assert following.watch["in_a_row"] == 0
    undisturbed, _ = step(before, _place(mesh, _rows(2)))
    assert _equal(_model(following), _model(undisturbed))


def test_without_protection_one_broken_batch_is_in_every_parameter_for_ever(start):
    """The harm: Adam's moments never forget it."""
    state, mesh = start
    step = _step(CONFIG, mesh)
    state, metrics = step(state, _place(mesh, _rows(1, broken=True)))
    assert not metrics.verdict.skipped
    for seed in range(2, 5):
        state, metrics = step(state, _place(mesh, _rows(seed)))
        assert math.isnan(metrics.losses.loss)
    leaves = jax.tree.leaves(jax.device_get(state.params))
    assert all(np.isnan(leaf).any() for leaf in leaves)
    assert not _finite(state.opt_state)


def test_a_spike_is_left_without_effect_bit_for_bit(start):
    state, mesh = start
    low = _filled(np.random.default_rng(0).normal(0.5, 0.01, WINDOW), np.full(WINDOW, 1e3))
    state = dataclasses.replace(state, watch=jax.device_put(low, state.step.sharding))
    step = _step(dataclasses.replace(CONFIG, watch=SKIP), mesh)
    after, metrics = step(state, _place(mesh, _rows(0)))
    assert metrics.verdict.spikes["loss"]
    assert not metrics.verdict.spikes["grad_norm"]
    assert metrics.verdict.skipped
    assert _equal(_model(after), _model(state))


def test_watching_changes_no_bit_of_a_sound_step(start):
    """Whatever is watched for, with whatever policy."""
    state, mesh = start
    off = _watched(loss_spike="off", grad_norm_spike="off", collapse="off")
    ends = []
    for config in (off, CONFIG, dataclasses.replace(CONFIG, watch=SKIP)):
        end = state
        for seed in range(3):
            end, _ = _step(config, mesh)(end, _place(mesh, _rows(seed)))
        ends.append(end)
    assert _equal(ends[0], ends[1])
    assert _equal(ends[0], ends[2])


# What the host says


def _verdict(**changes) -> Verdict:
    plain = Verdict(
        limits={"loss": np.float32(2.5), "grad_norm": np.float32(1.5)},
        spikes={"loss": np.bool_(False), "grad_norm": np.bool_(False)},
        skipped=np.bool_(False),
        in_a_row=np.int32(0),
    )
    return plain._replace(**changes)


SOUND = {"loss": np.bool_(True), "grad_norm": np.bool_(True)}
VALUES = {"loss": 3.0, "grad_norm": 1.0}


def test_a_sound_step_has_no_findings():
    assert findings_of_step(CONFIG, _verdict(), VALUES, SOUND) == []


def test_what_is_not_finite_is_named_first_to_last():
    finite = {"loss": np.bool_(False), "grad_norm": np.bool_(False)}
    (found,) = findings_of_step(CONFIG, _verdict(), VALUES, finite)
    assert (found.kind, found.policy) == ("nonfinite", "stop")
    assert found.fields == {"quantities": ["loss", "grad_norm"]}
    assert found.message.startswith(
        "loss is the first of 2 quantities that are not finite; lower optim.learning_rate=0.01"
    )


def test_parameters_that_are_broken_already_are_not_mended_by_skipping():
    broken = SOUND | {"parameters after the step": np.bool_(False)}
    (found,) = findings_of_step(_watched(nonfinite="skip"), _verdict(), VALUES, broken)
    assert found.policy == "stop"


def test_a_spike_is_said_with_value_and_limit():
    spikes = {"loss": np.bool_(True), "grad_norm": np.bool_(False)}
    (found,) = findings_of_step(CONFIG, _verdict(spikes=spikes), VALUES, SOUND)
    assert (found.kind, found.policy) == ("spike", "warn")
    assert found.fields == {"quantity": "loss", "value": 3.0, "limit": 2.5}
    assert "loss 3 is above 2.5, which is mean + watch.spike_sigma=6 deviations" in found.message
    off = _watched(loss_spike="off")
    assert findings_of_step(off, _verdict(spikes=spikes), VALUES, SOUND) == []


def test_too_many_skips_in_a_row_stop():
    config = _watched(nonfinite="skip", max_consecutive_skips=3)
    finite = SOUND | {"loss": np.bool_(False)}
    for row in (1, 2, 3):
        verdict = _verdict(skipped=np.bool_(True), in_a_row=np.int32(row))
        found = findings_of_step(config, verdict, VALUES, finite)
        assert [f.policy for f in found] == ["skip", "stop"][: 2 if row == 3 else 1]
    assert "3 steps in a row were skipped, watch.max_consecutive_skips=3" in found[1].message


@dataclasses.dataclass
class _Stats:
    z: np.ndarray
    tokens: np.ndarray


def test_the_health_of_a_router_is_that_of_its_worst_layer():
    record = {
        "expert_load": [[0.25] * 4, [1.0] + [0.0] * 7],
        "max_violation": [0.1, 3.0],
        "dead_experts": [0, 6],
        "drop_fraction": 0.2,
    }
    stats = _Stats(z=np.float32([40.0, 4000.0]), tokens=np.int32([10, 10]))
    assert router_health(stats, record) == {
        "max_violation": 3.0,
        "max_dead_experts": 0.75,
        "max_drop_fraction": 0.2,
        "max_router_logit": 20.0,
    }
    assert router_health(None, record) == {}


def test_collapse_is_found_after_so_many_steps_in_a_row():
    """3 steps over the limit, one below, 7 over: found at the third, and at each third after it."""
    config = WatchConfig(collapse="stop", collapse_steps=3, max_dead_experts=0.5)
    found, streaks = [], {}
    for index, dead in enumerate([0.6] * 3 + [0.5] + [0.6] * 7):
        health = {"max_dead_experts": dead, "max_violation": 9.0}  # which has no limit
        now, streaks = findings_of_router(config, health, streaks)
        found += [(index, finding) for finding in now]
    assert [index for index, _ in found] == [2, 6, 9]
    finding = found[1][1]
    assert (finding.kind, finding.policy) == ("collapse", "stop")
    assert finding.fields == {"quantity": "dead_experts", "value": 0.6, "limit": 0.5, "steps": 3}
    assert streaks == {"max_dead_experts": 7}
    off = dataclasses.replace(config, collapse="off", collapse_steps=50)
    assert findings_of_router(off, {"max_dead_experts": 1.0}, streaks) == ([], {})


def test_the_window_is_as_the_page_says():
    assert (watch_module.WINDOW, watch_module.NEEDED) == (128, 64)
