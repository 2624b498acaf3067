"""What a sweep tries: points, conditions, solved widths, and what is refused before any trial."""

import dataclasses
import json
from pathlib import Path

import pytest

from moejax.config import ConfigError
from moejax.flops import active_parameters, flops_per_token, total_parameters
from moejax.overrides import build_config, config_values, load_config, read_overrides
from moejax.sweep_space import (
    Adaptive,
    Between,
    Cases,
    Chain,
    Equal,
    Grid,
    Objective,
    Prepared,
    Product,
    Random,
    Sweep,
    Zip,
    load_sweep,
    override_words,
    points,
    prepare,
    resolve,
    solve_width,
    sweep_from_json,
    sweep_to_json,
)

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = sorted(file for file in CONFIGS.glob("sweeps/*.py") if file.stem != "small_model")
RATE, EXPERTS, K = "optim.learning_rate", "moe.num_experts", "moe.top_k"


def sweep(space, **fields) -> Sweep:
    return Sweep(base="quickstart.py", space=space, **fields)


def prepared(space, overrides=None, **fields) -> Prepared:
    return prepare(sweep(space, **fields), CONFIGS, overrides or {})


def found(space, **fields) -> list[dict]:
    return list(points(sweep(space, **fields)))


# Points


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
    with pytest.raises(ConfigError, match=r"bias_update_rate=0.01 is not read by"):
        prepared(space)


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


# From a point to a training


def test_a_case_sets_its_keys_and_the_command_line_the_base():
    top_k = Cases({"one": {K: 1, "moe.normalize_weights": False}, "two": {}})
    made = prepared(Grid({"selected": top_k}), {"train.steps": 7}, fixed={EXPERTS: 4})
    one, two = (resolve(made, point, 3) for point in points(made.sweep))
    assert one.settings == {K: 1, "moe.normalize_weights": False, "seed": 3}
    assert (one.config.moe.top_k, two.config.moe.top_k) == (1, 2)
    for run in (one, two):
        assert (run.config.train.steps, run.config.moe.num_experts, run.config.seed) == (7, 4, 3)


def test_equal_flops_are_those_of_the_base_by_the_width():
    made = prepared(
        Grid({EXPERTS: [4, 64], K: [2, 4]}), equal=(Equal("flops_per_token", multiple=1),)
    )
    target = flops_per_token(load_config(str(CONFIGS / "quickstart.py")))
    widths = []
    for point in points(made.sweep):
        run = resolve(made, point, 0)
        assert flops_per_token(run.config) == pytest.approx(target, rel=0.01)
        assert run.config.moe.expert_hidden == run.solved["moe.expert_hidden"]
        widths.append(run.config.moe.expert_hidden)
    # by hand: k * 3 * 128 * F + 128 * E = 2 * 3 * 128 * 128 + 128 * 16 multiplications a layer
    assert widths == [130, 65, 120, 60]


def test_equal_parameters_solve_for_the_nearest_multiple():
    base = config_values(load_config(str(CONFIGS / "quickstart.py")))
    target = total_parameters(load_config(str(CONFIGS / "quickstart.py")))
    equal = Equal("total_parameters", multiple=8)
    width = solve_width(base, {EXPERTS: 8}, equal)

    def off(width: int) -> int:
        words = {**base, EXPERTS: 8, "moe.expert_hidden": width}
        return abs(total_parameters(build_config(words)) - target)

    assert width % 8 == 0
    assert off(width) < min(off(width - 8), off(width + 8))


BOTH = (
    Equal("active_parameters", multiple=1, tolerance=0.004),
    Equal("total_parameters", "moe.num_experts", multiple=1, tolerance=0.03),
)


def test_constraints_hold_together(monkeypatch):
    """More experts have more router weights, so the width moves again: both hold at the end."""
    fields = {"fixed": {"mesh.expert": 1}, "equal": BOTH}
    made = prepared(Grid({K: [3, 4]}), **fields)
    base = build_config(made.base)
    for point in points(made.sweep):
        run = resolve(made, point, 0)
        assert set(run.solved) == {"moe.expert_hidden", "moe.num_experts"}
        for quantity, near in ((active_parameters, 0.004), (total_parameters, 0.03)):
            assert quantity(run.config) == pytest.approx(quantity(base), rel=near)
    assert run.solved["moe.num_experts"] > 16, "narrower ones"
    monkeypatch.setattr("moejax.sweep_space.ROUNDS", 1)
    message = r"top_k=4: the constraints do not hold together: with moe.expert_hidden=64 .*s by \+"
    with pytest.raises(ConfigError, match=message):
        prepared(Grid({K: [4]}), **fields)


def test_the_number_of_experts_is_solved_for():
    """From as many as a token selects: fewer are refused by the config, and are not looked at."""
    made = prepared(
        Grid({"moe.top_k": [2, 6], "moe.expert_hidden": [64]}),
        fixed={"mesh.expert": 1},
        equal=(Equal("total_parameters", "moe.num_experts", multiple=1, tolerance=0.05),),
    )
    # by hand: half the width, so twice the 16 experts, less what their router weights take
    assert [resolve(made, p, 0).solved["moe.num_experts"] for p in points(made.sweep)] == [32, 32]


# Refused before any trial


BIAS = "moe.bias_update_rate"
ROUTERS = {"moe.router": ["softmax", "sigmoid_bias"], BIAS: [0.01, 0.1]}
BAD = [
    (Grid({"moe.num_expert": [1]}), {}, "unknown key 'moe.num_expert'; did you mean moe.num_exp"),
    (Grid({"moe": [1]}), {}, "moe is a section; set one of its keys"),
    (Grid({K: []}), {}, "moe.top_k has no values, so there is nothing to try"),
    (Grid({}), {}, "Grid varies nothing; name a key"),
    (Grid({K: 2}), {}, r"moe.top_k=2 is not a list of values.*for example \[2\]"),
    (Grid({K: ["two"]}), {}, "moe.top_k='two' is not a whole number"),
    (Grid({K: [99]}), {}, "moe.top_k=99: moe.top_k=99 is larger than moe.num_experts=16"),
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
    (Grid({"a": Cases({"b": {K: 2}}), K: [2]}), {}, "moe.top_k is set twice, once by moe.top_k"),
    (Grid({K: [2]}), {"seeds": (1, 1)}, r"seeds=\[1, 1\] must be at least one seed, each once"),
    (Grid({K: [2]}), {"seeds": (-1,)}, "seed=-1 is outside"),
    (Grid({K: [2]}), {"finalists": 2}, "a list of points is tried with every seed"),
    (Adaptive({K: [2]}, 2), {"finalists": 2}, "finalists=2 with 1 seeds"),
    (Adaptive({K: [2]}, 2, pruner="half"), {}, "pruner='half'; use one of none, median"),
    (
        Adaptive({K: [2]}, 2, pruner="median"),
        {"objectives": (Objective(), Objective("step_seconds"))},
        "pruner='median' compares one number of an evaluation",
    ),
    (Adaptive({K: [2]}, 2, pruner="median"), {"fixed": {"eval.every": None}}, "set eval.every"),
    (Adaptive({K: [98, 99]}, 3), {}, "none of 1000 random points of the search can be"),
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
    (Random({RATE: Between(0.1, 0.2)}, 200_000), {}, "the sweep has more than 100000 points"),
    (Grid({K: [2]}), {"equal": (Equal("flops_per_token", multiple=0),)}, "multiple is at least 1"),
    (Grid({K: [2]}), {"objectives": (Objective("los"),)}, "unknown objective 'los'; did you mean"),
    (Grid({K: [2]}), {"conditions": {EXPERTS: {K: [2]}}}, "which is not varied"),
    (Grid({K: [2]}), {"fixed": {"train.stepps": 1}}, "unknown key 'train.stepps'; did you mean"),
    (Grid({K: [2]}), {"equal": (Equal("flops"),)}, "unknown quantity 'flops'; use one of flops_"),
    (Grid({K: [2]}), {"equal": (Equal("flops_per_token", RATE),)}, "is no whole number"),
    (
        Grid({K: [8]}),
        {"equal": (Equal("flops_per_token", multiple=64),)},
        "moe.top_k=8: no moe.expert_hidden gives flops_per_token=4,577,280: the nearest multiple "
        "of 64 is 64, which is off by .*; use a larger tolerance, a smaller multiple",
    ),
    (
        Grid({K: [2]}),
        {"equal": (Equal("flops_per_token", "model.dense_hidden"),)},
        "does not depend on model.dense_hidden",
    ),
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
    (Grid({K: [99]}), {"equal": (Equal("flops_per_token"),)}, "top_k=99 is larger than moe.num"),
    (
        Grid({"moe.every": [None]}),
        {"objectives": (Objective("loss_at_capacity"),)},
        "loss_at_capacity is not measured with moe.router=softmax in 0 MoE layers",
    ),
]


@pytest.mark.parametrize(("space", "fields", "message"), BAD)
def test_what_cannot_be_is_refused(space, fields, message):
    with pytest.raises(ConfigError, match=message):
        prepared(space, **fields)


def test_a_varied_key_is_not_for_the_command_line():
    with pytest.raises(
        ConfigError, match=r"moe.top_k is given on the command line and set by each"
    ):
        prepared(Grid({K: [2]}), {K: 4})


def test_a_file_that_is_no_sweep_is_named(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def get_sweep():\n    return {}\n")
    with pytest.raises(ConfigError, match=r"x.py: get_sweep returned dict; return a moejax.sweep_"):
        load_sweep(str(file), {})
    with pytest.raises(ConfigError, match=r"quickstart.py does not define get_sweep"):
        load_sweep(str(CONFIGS / "quickstart.py"), {})


# Words and JSON


def test_words_give_the_settings_back():
    settings = {
        **{RATE: 1e-5, "eval.every": None, "model.tie_embeddings": True, K: 3},
        "moe.num_experts_by_layer": (4, 8),
        "moe.capacity_by_expert": (1.5,),
        "data.tokenizer": "a=b, c",
    }
    assert read_overrides(override_words(settings)) == settings


def test_a_sweep_of_another_format_is_refused():
    with pytest.raises(ConfigError, match="not a sweep of format 1 but of 0"):
        sweep_from_json({"format": 0})


@pytest.mark.parametrize("arg", ["", ":small"])
@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_shipped_sweep_can_be_run_and_stored(file, arg):
    made = load_sweep(f"{file}{arg}", {})
    back = sweep_from_json(json.loads(json.dumps(sweep_to_json(made))))
    assert back.base == made.base
    if not made.sweep.adaptive:
        assert [resolve(back, p, 0) for p in points(back.sweep)] == [
            resolve(made, p, 0) for p in points(made.sweep)
        ]
    assert sweep_to_json(back) == sweep_to_json(made)
    assert f"configs/sweeps/{file.name}{arg} --workdir" in file.read_text(), "its docstring"


def test_all_shipped_sweeps_of_the_issue_are_there():
    names = {"learning_rate", "capacity", "experts_equal_flops", "granularity", "routers"}
    assert {file.stem for file in SHIPPED} == names | {"balance", "expert_search"}
