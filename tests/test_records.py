"""What records are made of, counted by hand."""

import math

import numpy as np
import pytest
from test_metrics import strict, train_record

from moejax.config import MoEConfig
from moejax.metrics import FIELDS, encode_record
from moejax.records import (
    host_record,
    layer_summary,
    loss_record,
    routing_record,
    state_record,
)
from moejax.router_stats import RouterStats

# Layer summaries: two layers of four experts, counted by hand.


def test_layer_summary_by_hand():
    summary = layer_summary(np.array([[10, 10, 10, 10], [30, 10, 0, 0]]))
    assert summary["expert_load"] == [[0.25, 0.25, 0.25, 0.25], [0.75, 0.25, 0.0, 0.0]]
    assert summary["max_violation"] == [0.0, 2.0]  # 30 over a mean of 10, minus 1
    assert summary["dead_experts"] == [0, 2]


def test_dead_means_below_one_percent_of_the_mean():
    # A mean of 1000: 10 is exactly 1% and alive, 9 is dead.
    assert layer_summary(np.array([[1990, 10]]))["dead_experts"] == [0]
    assert layer_summary(np.array([[1991, 9]]))["dead_experts"] == [1]


def test_layer_without_tokens_is_all_zero():
    summary = layer_summary(np.zeros((1, 4), np.int32))
    assert summary == {"expert_load": [[0.0] * 4], "max_violation": [0.0], "dead_experts": [0]}


def test_layer_summary_does_not_round_large_counts():
    # 2**24 + 1 is not a float32.
    summary = layer_summary(np.array([[2**24 + 1, 2**24]], np.int32))
    assert summary["max_violation"][0] == pytest.approx(0.5 / (2**24 + 0.5), rel=1e-9)


@pytest.mark.parametrize("counts", [[1, 2], [[1, -1]], [[1.0, math.nan]], np.zeros((2, 0))])
def test_layer_summary_refuses_what_is_not_counts(counts):
    with pytest.raises(ValueError, match="give one row for each MoE layer"):
        layer_summary(np.array(counts))


# From the sums of a step to a record.

# Two layers of three experts, 5 real tokens, 2 choices each; one assignment found no slot.
STATS = RouterStats(
    count_e=np.array([[5, 3, 2], [10, 0, 0]], np.int32),
    first_e=np.array([[3, 2, 0], [5, 0, 0]], np.int32),
    dropped_e=np.array([[1, 0, 0], [0, 0, 0]], np.int32),
    tokens=np.array([5, 5], np.int32),
    padding=np.array([3, 3], np.int32),
    probability_e=np.ones((2, 3), np.float32),
    importance_e=np.ones((2, 3), np.float32),
    load_e=np.zeros((2, 3), np.float32),
    z=np.ones(2, np.float32),
    entropy=np.array([5.0, 2.5], np.float32),
    sequence_balance=np.ones(2, np.float32),
    sequences=np.array([1, 1], np.int32),
    level_eb=np.zeros((2, 3, 0), np.int32),
    overflow_rounds=np.array([0, 2], np.int32),
)


def test_routing_record_by_hand():
    assert routing_record(STATS, 8, 5, MoEConfig()) == {
        "routed": 20,
        "dropped": 1,
        "padding": 3,
        "drop_fraction": 1 / 20,
        "expert_load": [pytest.approx([0.5, 0.3, 0.2]), [1.0, 0.0, 0.0]],
        "max_violation": [pytest.approx(0.5), 2.0],
        "router_entropy": [1.0, 0.5],
        "dead_experts": [0, 2],
        "overflow_rounds": [0, 2],
    }


def test_counts_of_a_large_step_do_not_overflow():
    stats = STATS._replace(count_e=np.full((2, 3), 2**30, np.int32))
    assert routing_record(stats, 8, 5, MoEConfig())["routed"] == 6 * 2**30


def test_a_dense_model_and_a_step_of_padding_have_no_routing():
    assert routing_record(None, 8, 5, MoEConfig(every=None)) == {
        "routed": 0,
        "dropped": 0,
        "padding": 3,
        "drop_fraction": 0.0,
        **{n: [] for n in ("expert_load", "max_violation", "router_entropy", "dead_experts")},
        "overflow_rounds": [],
    }
    nothing = RouterStats(*map(np.zeros_like, STATS))
    record = routing_record(nothing, 8, 0, MoEConfig())
    assert (record["padding"], record["drop_fraction"]) == (8, 0.0)
    assert record["router_entropy"] == record["max_violation"] == [0.0, 0.0]


@pytest.mark.parametrize("router", ["random", "balanced"])
def test_a_router_that_is_for_benchmarks_is_named_in_every_record(router):
    assert routing_record(STATS, 8, 5, MoEConfig(router=router))["forced_routing"] == router


def test_loss_record_by_hand():
    terms = {
        "balance": np.array([1.0, 1.5], np.float32),
        "z": np.array([0.25, 0.5], np.float32),
        "importance": np.array([2.0, 0.0], np.float32),
    }
    assert loss_record(terms) == {
        "balance_loss": 2.5,
        "router_z_loss": 0.75,
        "router_losses": {"balance": [1.0, 1.5], "z": [0.25, 0.5], "importance": [2.0, 0.0]},
    }
    nothing = loss_record({})
    assert nothing == {"balance_loss": 0.0, "router_z_loss": 0.0, "router_losses": {}}
    assert type(nothing["balance_loss"]) is float


def test_state_record_by_hand():
    assert state_record({}, MoEConfig()) == {}
    bias = np.array([[3.0, -4.0], [0.0, 0.0]], np.float32)
    assert state_record({"bias": bias}, MoEConfig()) == {
        "router_bias": [[3.0, -4.0], [0.0, 0.0]],
        "router_bias_norm": [5.0, 0.0],
    }
    threshold = np.array([[0.5, 0.25]], np.float32)
    record = state_record({"threshold": threshold}, MoEConfig())
    assert record == {"router_threshold": [[0.5, 0.25]]}
    l1 = np.array([1.0, 3.0], np.float32)
    assert state_record({"l1": l1}, MoEConfig()) == {"l1_coefficient": 2.0}


def test_what_a_step_gives_is_a_record():
    """Names, splits and types: `encode_record` refuses a field that FIELDS does not have."""
    routing = routing_record(STATS, 8, 5, MoEConfig(router="random"))
    terms = {"balance": np.ones(2, np.float32)}
    line = encode_record(train_record(1) | routing | loss_record(terms))
    assert strict(line)["router_losses"] == {"balance": [1.0, 1.0]}
    for state in ({"bias": np.ones((2, 3))}, {"threshold": np.ones((2, 3))}, {"l1": np.ones(2)}):
        record = state_record(state, MoEConfig())
        assert set(strict(encode_record(train_record(1, **record)))) > set(record)
        with pytest.raises(ValueError, match="which the other split holds"):
            encode_record({"step": 1, "split": "eval"} | record)


def test_the_slowest_host_is_named():
    assert host_record({}) == host_record({0: 0.5}) == {}
    found = host_record({0: 0.25, 1: 0.5, 2: 0.125})
    assert list(found.values()) == [0.125, 0.5, 1]
    assert set(found) <= set(FIELDS)
