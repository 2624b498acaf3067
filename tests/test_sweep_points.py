"""The points of a sweep: their order, conditions, and what is drawn."""

import dataclasses

import pytest

from moejax.errors import ConfigError
from moejax.sweep_points import points
from moejax.sweep_space import (
    Between,
    Chain,
    Grid,
    Product,
    Random,
    Sweep,
    Zip,
)

RATE, EXPERTS, K = "optim.learning_rate", "moe.num_experts", "moe.top_k"


def found(space, **fields) -> list[dict]:
    return list(points(Sweep("quickstart.py", space, **fields)))


def test_a_grid_is_every_combination_the_last_key_first():
    assert found(Grid({EXPERTS: [4, 8], K: [1, 2]})) == [
        {EXPERTS: 4, K: 1},
        {EXPERTS: 4, K: 2},
        {EXPERTS: 8, K: 1},
        {EXPERTS: 8, K: 2},
    ]


def test_a_zip_goes_in_step_and_a_chain_one_after_the_other():
    pairs = Zip({EXPERTS: [4, 8], K: [1, 2]})
    assert found(Chain([pairs, Grid({RATE: [0.1]})])) == [
        {EXPERTS: 4, K: 1},
        {EXPERTS: 8, K: 2},
        {RATE: 0.1},
    ]


def test_a_product_joins_every_point_of_its_parts():
    pairs = Zip({EXPERTS: [4, 8], K: [1, 2]})
    assert found(Product([pairs, Grid({RATE: [0.1, 0.2]})]))[1:3] == [
        {EXPERTS: 4, K: 1, RATE: 0.2},
        {EXPERTS: 8, K: 2, RATE: 0.1},
    ]


def test_a_point_that_comes_twice_is_tried_once():
    assert len(found(Chain([Grid({K: [1, 2]}), Grid({K: [2, 4]})]))) == 3


def test_conditions_leave_out_what_would_not_be_read():
    space = Grid({"moe.router": ["softmax", "sigmoid_bias"], "moe.bias_update_rate": [0.01, 0.1]})
    held = {"moe.bias_update_rate": {"moe.router": ["sigmoid_bias"]}}
    assert found(space, conditions=held) == [
        {"moe.router": "softmax"},
        {"moe.router": "sigmoid_bias", "moe.bias_update_rate": 0.01},
        {"moe.router": "sigmoid_bias", "moe.bias_update_rate": 0.1},
    ]


def test_conditions_may_look_at_another_part_of_a_product():
    space = Product(
        [
            Grid({"moe.router": ["softmax", "sigmoid_bias"]}),
            Random({"moe.bias_update_rate": Between(0.01, 0.1)}, 2),
        ]
    )
    points = found(space, conditions={"moe.bias_update_rate": {"moe.router": ["sigmoid_bias"]}})
    assert [sorted(point) for point in points] == [["moe.router"]] + 2 * [
        ["moe.bias_update_rate", "moe.router"]
    ]


def test_random_points_are_those_of_their_seed_and_range():
    space = Random({RATE: Between(1e-4, 1e-1, log=True), K: Between(1, 4), EXPERTS: [4, 8]}, 200)
    drawn = found(space)
    assert drawn == found(space)
    assert drawn != found(dataclasses.replace(space, seed=1))
    assert {p[K] for p in drawn} == {1, 2, 3, 4}
    assert {p[EXPERTS] for p in drawn} == {4, 8}
    below = sum(p[RATE] < 10**-2.5 for p in drawn)
    assert 70 < below < 130, "half of them, on a logarithmic scale"
    stepped = found(Random({"moe.weight_scale": Between(1.0, 2.0, step=0.25)}, 50))
    assert {p["moe.weight_scale"] for p in stepped} == {1.0, 1.25, 1.5, 1.75, 2.0}


def test_more_points_than_anybody_tries_are_refused():
    with pytest.raises(ConfigError, match="the sweep has more than 100000 points"):
        found(Random({RATE: Between(0.1, 0.2)}, 200_000))
