"""The trainings of a sweep: their configs, solved widths, JSON, and what is refused before any."""

import json
from pathlib import Path

import pytest

from moejax.errors import ConfigError
from moejax.flops import active_parameters, flops_per_token, total_parameters
from moejax.overrides import build_config, config_values, load_config, read_overrides
from moejax.sweep_points import points
from moejax.sweep_runs import (
    Prepared,
    load_sweep,
    new_keys,
    override_words,
    prepare,
    resolve,
    solve_width,
    sweep_from_json,
    sweep_to_json,
)
from moejax.sweep_space import (
    Adaptive,
    Cases,
    Equal,
    Grid,
    Objective,
    Sweep,
)

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = sorted(file for file in CONFIGS.glob("sweeps/*.py") if file.stem != "small_model")
RATE, EXPERTS, K = "optim.learning_rate", "moe.num_experts", "moe.top_k"


def prepared(space, overrides=None, **fields) -> Prepared:
    made = Sweep("quickstart.py", space, **fields)
    return prepare(made, CONFIGS, overrides or {})


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
    monkeypatch.setattr("moejax.sweep_runs.ROUNDS", 1)
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


BAD = [
    (Grid({}), {}, "Grid varies nothing; name a key"),
    (Grid({"moe.bias_update_rate": [0.01]}), {}, "bias_update_rate=0.01 is not read by"),
    (Grid({K: [99]}), {}, "moe.top_k=99: moe.top_k=99 is larger than moe.num_experts=16"),
    (Grid({"a": Cases({"b": {K: 2}}), K: [2]}), {}, "moe.top_k is set twice, once by moe.top_k"),
    (Grid({K: [2]}), {"seeds": (-1,)}, "seed=-1 is outside"),
    (Adaptive({K: [2]}, 2, pruner="median"), {"fixed": {"eval.every": None}}, "set eval.every"),
    (Adaptive({K: [98, 99]}, 3), {}, "none of 1000 random points of the search can be"),
    (Grid({K: [2]}), {"fixed": {"train.stepps": 1}}, "unknown key 'train.stepps'; did you mean"),
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


def test_a_key_that_is_newer_than_a_sweep_takes_its_default():
    made = prepared(Grid({K: [2]}))
    data = json.loads(json.dumps(sweep_to_json(made)))
    del data["base"]["moe.expert_dropout"]
    back = sweep_from_json(data)
    assert dict(back.base) == made.base
    assert new_keys(data) == {"moe.expert_dropout": made.base["moe.expert_dropout"]}


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
