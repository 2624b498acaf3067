"""Every config of configs/routers learns: 30 steps on the quickstart's text, made smaller."""

import math
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax.corpus import load_corpus
from moejax.data import TrainBatches
from moejax.evaluate import dropless, make_eval_step, with_moe
from moejax.metrics import encode_record
from moejax.optim import make_optimizer
from moejax.overrides import load_config
from moejax.records import loss_record, routing_record, state_record
from moejax.sharding import place_batch
from moejax.state import initial_state
from moejax.step import make_train_step

ROUTERS = sorted((Path(__file__).parents[1] / "configs" / "routers").glob("*.py"))
SMALLER = [
    "model.num_layers=1",
    "moe.every=1",
    "model.d_model=32",
    "model.num_heads=1",
    "model.num_kv_heads=1",
    "moe.expert_hidden=32",
    "data.sequence_length=64",
    "train.batch_size=4",
    "train.steps=30",
    "optim.warmup_steps=5",
    "optim.learning_rate=0.01",
]
DRAWS = ("noisy", "gshard", "jitter", "expert_dropout", "dense", "random_experts", "sinkhorn")


QUICK = ("sigmoid_bias", "expert_choice", "noisy")


def _slow_unless_quick(file: Path):
    marks = [] if file.stem in QUICK else [pytest.mark.slow]
    return pytest.param(file, marks=marks, id=file.stem)


@pytest.mark.parametrize("file", [_slow_unless_quick(file) for file in ROUTERS])
def test_a_router_learns_and_every_metric_holds(file, mesh):
    config = load_config(str(file), SMALLER)
    corpus = load_corpus(config.data, "train")
    data = TrainBatches(corpus, config.data.sequence_length, config.train.batch_size, 0)
    counts = corpus.token_counts(config.model.vocab_size)
    optimizer = make_optimizer(config.optim, config.train.steps)
    state = initial_state(config, mesh, optimizer, counts)
    step, _ = make_train_step(config, mesh)
    losses = []
    for number in range(config.train.steps):
        batch = place_batch(mesh, lambda a, b, n=number: data.rows(n, a, b), 4, 1)
        state, metrics = step(state, batch)
        losses.append(float(metrics.losses.loss))
    assert np.mean(losses[-5:]) < np.mean(losses[:3]) - 0.3, losses
    assert all(bool(finite) for finite in metrics.finite.values())
    _check_record(config, jax.device_get(metrics))
    if file.stem in DRAWS:
        _check_evaluation(config, mesh, state, batch)


def _check_record(config, metrics) -> None:
    """Loads, drops, entropy and dead experts are numbers, and add up."""
    record = {"step": 30, "split": "train"}
    record |= routing_record(metrics.stats, 256, int(metrics.totals.tokens), config.moe)
    record |= loss_record(metrics.losses.terms) | state_record(metrics.router_state, config.moe)
    assert "nonfinite" not in encode_record(record)
    stats, moe = metrics.stats, config.moe
    assert math.isclose(sum(record["expert_load"][0]), 1, rel_tol=1e-6)
    assert len(record["expert_load"][0]) == moe.choices
    assert 0 <= record["dropped"] <= record["routed"]
    assert record["dropped"] == 0 or moe.capacity_factor is not None
    assert 0 <= record["router_entropy"][0] <= math.log(moe.choices) * (1 + 1e-5)
    assert stats.first_e.sum() <= stats.tokens[0]
    assert ("forced_routing" in record) == (moe.router in ("random", "balanced"))
    assert ("router_bias_norm" in record) == (moe.router in ("sigmoid_bias", "quantile"))
    assert ("l1_coefficient" in record) == (moe.router == "relu")


def _check_evaluation(config, mesh, state, batch) -> None:
    """Evaluation draws nothing: twice is the same."""
    evaluate = make_eval_step(
        with_moe(config, dropless(config.moe)), mesh, np.ones(config.model.vocab_size), 8
    )
    first, second = (evaluate(state.params, state.router_state, batch) for _ in range(2))
    np.testing.assert_array_equal(first.nats_n, second.nats_n)
    assert np.isfinite(np.asarray(first.nats_n)).all()
