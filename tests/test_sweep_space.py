"""What a sweep's file writes, and what of it is refused before any values are combined."""

import pytest

from moejax.errors import ConfigError
from moejax.sweep_space import (
    Adaptive,
    Between,
    Cases,
    Chain,
    Equal,
    Grid,
    Objective,
    Product,
    Random,
    Sweep,
    Zip,
    check_sweep,
)

RATE, EXPERTS, K = "optim.learning_rate", "moe.num_experts", "moe.top_k"
BIAS = "moe.bias_update_rate"
ROUTERS = {"moe.router": ["softmax", "sigmoid_bias"], BIAS: [0.01, 0.1]}
BAD = [
    (Grid({"moe.num_expert": [1]}), {}, "unknown key 'moe.num_expert'; did you mean moe.num_exp"),
    (Grid({"moe": [1]}), {}, "moe is a section; set one of its keys"),
    (Grid({K: []}), {}, "moe.top_k has no values, so there is nothing to try"),
    (Grid({}), {}, "Grid varies nothing; name a key"),
    (Grid({K: 2}), {}, r"moe.top_k=2 is not a list of values.*for example \[2\]"),
    (Grid({K: ["two"]}), {}, "moe.top_k='two' is not a whole number"),
    (Grid({K: Between(1, 4)}), {}, "moe.top_k has a range, which Random and Adaptive draw from"),
    (Grid({"seed": [1, 2]}), {}, r"list the seeds of every trial in seeds=\(0, 1, 2\)"),
    (Zip({K: [1, 2], EXPERTS: [4]}), {}, "Zip of lists of unequal length"),
    (Chain([]), {}, "Chain of no spaces"),
    (Chain([Adaptive({K: [2]}, 1)]), {}, "Adaptive is not a space here"),
    (Product([Grid({K: [2]}), Grid({K: [2]})]), {}, "Product varies moe.top_k twice"),
    (Random({K: [2]}, 0), {}, "Random of trials=0; use 1 or more"),
    (Adaptive({RATE: Between(0, 1, log=True)}, 3), {}, "low is below high, above 0 with log=True"),
    (Adaptive({K: [2, 2]}, 3), {}, "has a value twice"),
    (Grid({"layers": Cases({})}), {}, "layers has no cases"),
    (Grid({K: Cases({"a": {}})}), {}, "Cases are called 'moe.top_k', a key"),
    (Grid({"a": Cases({"b": {"moe.topk": 1}})}), {}, "unknown key 'moe.topk'; did you mean moe.t"),
    (Grid({K: [2]}), {"seeds": (1, 1)}, r"seeds=\[1, 1\] must be at least one seed, each once"),
    (Grid({K: [2]}), {"finalists": 2}, "a list of points is tried with every seed"),
    (Adaptive({K: [2]}, 2), {"finalists": 2}, "finalists=2 with 1 seeds"),
    (Adaptive({K: [2]}, 2, pruner="half"), {}, "pruner='half'; use one of none, median"),
    (
        Adaptive({K: [2]}, 2, pruner="median"),
        {"objectives": (Objective(), Objective("step_seconds"))},
        "pruner='median' compares one number of an evaluation",
    ),
    (Grid({K: [2]}), {"objectives": ()}, "objectives is empty; give one"),
    (
        Grid({K: [2]}),
        {"objectives": (Objective("loss", "least"),)},
        "direction='least' of loss; use min or max",
    ),
    (Adaptive({K: [2]}, 2, startup=0), {}, "startup=0 is below 1"),
    (
        Chain([Grid({"a": Cases({"b": {}})}), Grid({"a": Cases({"c": {}})})]),
        {},
        "a has different Cases in the parts of the space",
    ),
    (Grid({K: [2]}), {"equal": (Equal("flops_per_token", multiple=0),)}, "multiple is at least 1"),
    (Grid({K: [2]}), {"objectives": (Objective("los"),)}, "unknown objective 'los'; did you mean"),
    (Grid({K: [2]}), {"conditions": {EXPERTS: {K: [2]}}}, "which is not varied"),
    (Grid({K: [2]}), {"equal": (Equal("flops"),)}, "unknown quantity 'flops'; use one of flops_"),
    (Grid({K: [2]}), {"equal": (Equal("flops_per_token", RATE),)}, "is no whole number"),
    (
        Grid(ROUTERS),
        {"conditions": {BIAS: {"moe.router": ["sigmoid_bais"]}}},
        "want moe.router='sigmoid_bais', which never comes; moe.router has 'softmax', 'sigmoid_bi",
    ),
    (
        Grid(ROUTERS),
        {"conditions": {BIAS: {"moe.router": "sigmoid_bias"}}},
        "want moe.router='sigmoid_bias', which is no list of values",
    ),
    (
        Grid({K: [2, 4], EXPERTS: [8, 16]}),
        {"conditions": {K: {EXPERTS: [8]}, EXPERTS: {K: [2]}}},
        "conditions of moe.num_experts, moe.top_k wait for one another",
    ),
    (
        Grid({"moe.expert_hidden": [64, 128]}),
        {"equal": (Equal("flops_per_token"),)},
        "moe.expert_hidden is solved for by a constraint and set by points",
    ),
    (
        Grid({K: [2]}),
        {"equal": (Equal("flops_per_token"), Equal("total_parameters"))},
        "moe.expert_hidden is solved for by 2 constraints",
    ),
]


@pytest.mark.parametrize(("space", "fields", "message"), BAD)
def test_what_cannot_be_is_refused(space, fields, message):
    with pytest.raises(ConfigError, match=message):
        check_sweep(Sweep("quickstart.py", space, **fields))
