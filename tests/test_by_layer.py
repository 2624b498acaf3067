"""Experts that differ by layer: each layer is what it is in a model of layers like it.

What all layers share (statistics, router state, choices) is as wide as the largest layer, and what
is behind a layer's own experts must count nowhere.
"""

import dataclasses
import io
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from moejax import verify
from moejax.attention import packed_tokens
from moejax.config import Config, ConfigError, DataConfig, MeshConfig, ModelConfig, TrainConfig
from moejax.describe import describe, gathered_weight_bytes
from moejax.evaluate import evaluate_workdir
from moejax.flops import active_counts, active_experts, flops_per_token, parameter_counts
from moejax.loop import train
from moejax.loss import auxiliary_loss, auxiliary_part, layer_terms, microbatch_balance, totals
from moejax.mesh import make_mesh
from moejax.metrics import read_metrics
from moejax.model import LayerRouting, Run
from moejax.moe import MoE
from moejax.moe_config import MoEConfig
from moejax.overrides import apply_overrides
from moejax.plots import _binned_load, plot_expert_load
from moejax.records import relative_load, routing_record, state_record
from moejax.replay import load_choices, save_choices
from moejax.router_state import hash_table, initial_router_state, update_router_state
from moejax.router_stats import RouterStats, of_stack
from moejax.sharding import path_name
from moejax.state import model_graph, split_model
from moejax.step import parameter_group
from moejax.tensorboard import load_image
from moejax.traffic import TRANSPORTS, buffer_rows, exchange_bytes
from moejax.workdir import checkpoint_steps

B, T, V = 2, 8, 16
EXPERTS, HIDDEN = (4, 8, 8), (32, 16, 16)
CONFIG = Config(
    model=ModelConfig(
        num_layers=3, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, vocab_size=V
    ),
    moe=MoEConfig(
        num_experts=8,
        num_experts_by_layer=EXPERTS,
        expert_hidden=32,
        expert_hidden_by_layer=HIDDEN,
        capacity_factor=1.0,
    ),
    data=DataConfig(sequence_length=T),
    train=TrainConfig(batch_size=8),
)
TOKEN_BT = np.random.default_rng(0).integers(V, size=(B, T)).astype(np.int32)
SEGMENT_BT = np.array([[1] * T, [1, 1, 1, 2, 2, 2, 0, 0]], np.int32)
# Two layers of 4 and 8 experts, as most tables by hand here.
TWO = MoEConfig(num_experts=8, num_experts_by_layer=(4, 8), capacity_factor=None)


def _moe(config: Config = CONFIG, **changes) -> Config:
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, **changes))


def _two(**changes) -> MoEConfig:
    return dataclasses.replace(TWO, **changes)


def _alike(layer: int, config: Config = CONFIG) -> Config:
    """Returns the config of a model all of whose layers are like one of `config`."""
    return dataclasses.replace(config, moe=config.moe.of_layer(layer))


# Layouts


@pytest.mark.slow
def test_layouts_train_the_same():
    """All axes, accumulation, remat and two transports, against the oracle on one device."""
    config = apply_overrides(
        _moe(router="sigmoid_bias", balance_loss_weight=0.1, importance_loss_weight=0.1),
        ["model.vocab_size=264", "data.sequence_length=16"],
    )
    chosen = [
        verify.Layout(1, 2, 2, 1, 2, 2, "full", "capacity by all_to_all"),
        verify.Layout(2, 1, 4, 1, 1, 1, "none", "dropless by ragged"),
    ]
    found = list(verify.check(config, chosen, 8))
    assert [row.failures for row in found] == [[]] * 2
    assert all(max(row.groups.values()) > 0 for row in found), "nothing was compared"
    assert [row.dropped > 0 for row in found] == [True, False]


# A layer of a mixed model is the layer of a model of its like


KINDS = {
    "bias, free and shared experts": {
        **{"router": "sigmoid_bias", "zero_experts": 1, "constant_experts": 1},
        **{"shared_experts": 1},
    },
    "threshold": {"router": "threshold", "capacity_factor": None},
    "hash": {"router": "hash"},
}


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_layers_are_those_of_models_of_their_like(mesh, params_of, changes):
    """Hidden states, statistics, choices, losses and the update of the router state."""
    config = _moe(**changes)
    moe, params = config.moe, params_of(config, mesh)
    state = initial_router_state(moe, 3, V)
    tokens = packed_tokens(jnp.asarray(SEGMENT_BT))
    alike = [_alike(layer, config) for layer in range(3)]
    own_state = [
        {
            name: leaf[layer, : alike[layer].moe.choices]
            if name in ("bias", "threshold")
            else leaf[layer]
            for name, leaf in state.items()
        }
        for layer in range(3)
    ]

    @jax.jit
    def one_by_one(params):
        x_btd, found = params["embedding"][TOKEN_BT], []
        for layer, (stack, index) in enumerate((("runs", 0), ("runs_1", 0), ("runs_1", 1))):
            made = nnx.eval_shape(
                lambda one=alike[layer]: Run(one, mesh, (True,), rngs=nnx.Rngs(0))
            )
            weights = jax.tree.map(lambda leaf, i=index: leaf[i], params[stack])
            routing = LayerRouting(own_state[layer], jnp.int32(layer), jnp.asarray(TOKEN_BT), None)
            run = nnx.merge(nnx.split(made)[0], weights)
            x_btd, routed, _ = run(x_btd, tokens, routing, None)
            found.append(routed)
        return x_btd * jax.lax.rsqrt(jnp.mean(x_btd**2, -1, keepdims=True) + 1e-6), found

    @jax.jit
    def whole(params):
        out = nnx.merge(model_graph(config, mesh), params)(TOKEN_BT, tokens, state)
        return out, auxiliary_loss(out.stats, None, moe), update_router_state(state, out.stats, moe)

    expected_btd, by_layer = one_by_one(params)
    out, loss, new_state = whole(params)
    np.testing.assert_allclose(out.hidden_btd, expected_btd, rtol=1e-4, atol=1e-5)
    stats, expected_loss = out.stats, 0.0
    for layer, (own, choice_bts) in enumerate(by_layer):
        one = alike[layer].moe
        for name, leaf in stats._asdict().items():
            mine, theirs = np.asarray(leaf[layer]), np.asarray(getattr(own, name))
            if theirs.ndim:
                assert not mine[one.choices :].any(), name
                mine = mine[: one.choices]
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5, err_msg=name)
        width = one.slots_per_token
        np.testing.assert_array_equal(out.choice_lbts[layer, ..., :width], choice_bts)
        assert (np.asarray(out.choice_lbts[layer, ..., width:]) == moe.choices).all()
        own_stats = jax.tree.map(lambda leaf: leaf[None], own)
        expected_loss += auxiliary_loss(own_stats, None, one)
        if moe.router == "hash":
            continue
        before = {name: leaf[None] for name, leaf in own_state[layer].items()}
        for name, after in update_router_state(before, own_stats, one).items():
            assert not new_state[name][layer, one.choices :].any()
            found = new_state[name][layer, : one.choices]
            np.testing.assert_allclose(found, after[0], rtol=1e-5, atol=1e-6)
            assert np.abs(found - own_state[layer][name]).max() > 0
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)


def test_layers_that_are_alike_are_the_model_without_the_keys(mesh):
    """The same stack, the same names, the same values: an old checkpoint restores."""
    plain = _moe(num_experts_by_layer=None, expert_hidden_by_layer=None)
    spelled = _moe(num_experts_by_layer=(8,) * 3, expert_hidden_by_layer=(32,) * 3)
    draw = jax.jit(lambda key: [split_model(c, mesh, key)[1] for c in (plain, spelled)])
    ours, theirs = draw(jax.random.key(0))
    assert "runs_1" not in ours
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)


# By hand, where counting what is behind a layer's experts would show


def _stats(**tables) -> RouterStats:
    """Returns sums of two layers; what is not given is 0."""
    zero_le, zero_l = jnp.zeros((2, 8)), jnp.zeros(2)
    fields = {name: zero_le if name.endswith("_e") else zero_l for name in RouterStats._fields} | {
        "level_eb": jnp.zeros((2, 8, 0), jnp.int32)
    }
    given = {name: jnp.asarray(value) for name, value in tables.items()}
    return RouterStats(**fields | given)


COUNT_LE = np.array([[6, 2, 0, 0, 0, 0, 0, 0], [1] * 8], np.int32)
STATS = _stats(
    count_e=COUNT_LE,
    first_e=COUNT_LE // 2,
    dropped_e=np.zeros((2, 8), np.int32),
    tokens=np.array([4, 4], np.int32),
    probability_e=np.array([[2, 1, 0.5, 0.5, 0, 0, 0, 0], [0.5] * 8], np.float32),
    importance_e=np.array([[2, 2, 0, 0, 0, 0, 0, 0], [0.5] * 8], np.float32),
)


def test_a_record_counts_the_experts_that_a_layer_has():
    """Over 8 experts the first layer's MaxVio were 5, and 6 of its experts dead."""
    record = routing_record(jax.tree.map(np.asarray, STATS), 8, 4, TWO)
    assert record["expert_load"] == [[0.75, 0.25, 0.0, 0.0], [0.125] * 8]
    assert record["max_violation"] == [2.0, 0.0]
    assert record["dead_experts"] == [2, 0]


def test_auxiliary_losses_are_over_the_experts_of_a_layer():
    """4 tokens, k = 2. Balance: 4 * (6/8 * 2/4 + 2/8 * 1/4); importance: mean 1, variance 1."""
    terms = layer_terms(STATS, _two(importance_loss_weight=1.0))
    np.testing.assert_allclose(terms["balance"], [1.75, 1.0])
    np.testing.assert_allclose(terms["importance"], [1.0, 0.0])
    total = totals(jnp.ones((1, 4), bool), jnp.ones((1, 4), jnp.int32))
    np.testing.assert_allclose(microbatch_balance(STATS, total, TWO), [1.75, 1.0])


def test_device_groups_divide_the_experts_of_a_layer():
    """Two groups of 2 experts: shares (6 + 2)/8/2*4, means (2 + 1)/4; of 4: 1 * 1/2 twice."""
    config = _two(device_groups=2, device_balance_loss_weight=1.0)
    terms = layer_terms(STATS, config)
    np.testing.assert_allclose(terms["device_balance"], [2 * 0.75 + 0 * 0.25, 1.0])


def test_a_microbatch_gets_no_slope_behind_the_experts_of_a_layer():
    config = _two(importance_loss_weight=1.0)

    def value(probability_le, importance_le):
        part = STATS._replace(probability_e=probability_le, importance_e=importance_le)
        return auxiliary_part(part, STATS, None, config)

    gradients = jax.grad(value, (0, 1))(STATS.probability_e, STATS.importance_e)
    for gradient_le in gradients:
        assert not gradient_le[0, 4:].any()
        assert gradient_le[0, :4].any()


def test_the_bias_is_recentred_over_the_experts_of_a_layer():
    """Loads 6, 2, 0, 0 around 2 move by -1, 0, 1, 1 halves; their mean 1/8 comes off."""
    config = _two(router="sigmoid_bias", bias_update_rate=0.5)
    after = update_router_state(initial_router_state(config, 2, V), STATS, config)["bias"]
    np.testing.assert_allclose(after[0], [-0.625, -0.125, 0.375, 0.375, 0, 0, 0, 0])
    np.testing.assert_array_equal(after[1], np.zeros(8))
    record = state_record({"bias": np.asarray(after)}, config)
    assert record["router_bias"] == [[-0.625, -0.125, 0.375, 0.375], [0.0] * 8]
    assert record["router_bias_norm"][0] == pytest.approx(0.6875**0.5)


def test_a_threshold_starts_at_the_share_of_its_own_layer():
    """2 of 4: half of the scores exceed 0.5. 2 of 8: a quarter exceed sigmoid(0.1 * 0.6745)."""
    config = _two(router="threshold")
    start = initial_router_state(config, 2, V)["threshold"]
    np.testing.assert_allclose(start[0], [0.5] * 4 + [0.0] * 4, atol=1e-6)
    np.testing.assert_allclose(start[1], [1 / (1 + np.exp(-0.06745))] * 8, rtol=1e-5)
    record = state_record({"threshold": np.asarray(start)}, config)
    assert [len(row) for row in record["router_threshold"]] == [4, 8]


def test_a_hash_table_names_the_experts_of_its_own_layer():
    config = _two(router="hash")
    table = np.asarray(initial_router_state(config, 2, V)["table"])
    assert table.shape == (2, V, 2)
    assert table[0].max() == 3
    assert table[1].max() == 7
    np.testing.assert_array_equal(table[0], hash_table((1,) * V, config.of_layer(0), 0))


@pytest.mark.parametrize(("open_gates", "factor"), [(8, 1.0), (9, 1.2), (7, 1 / 1.2)])
def test_l1_holds_the_mean_of_open_gates_over_layers(open_gates, factor):
    """4 tokens, k = 2: 8 open gates a layer are wanted, in the mean over layers; 12 and 4 are so.

    The mean of their shares, 12 / 16 and 4 / 32, would be above the mean of 2 / 4 and 2 / 8.
    """
    config = _two(router="relu", l1_coefficient=1e-3)
    counts = np.zeros((2, 8), np.int32)
    counts[:, 0] = 12, open_gates - 4
    counts[1, 0] += open_gates - 8
    stats = STATS._replace(count_e=jnp.asarray(counts))
    after = update_router_state(initial_router_state(config, 2, V), stats, config)
    np.testing.assert_allclose(after["l1"], np.full(2, 1e-3 * factor), rtol=1e-6)


def test_a_stack_is_as_wide_as_its_experts():
    first, second = TWO.stacks(2)
    assert (first.start, first.stop, second.start, second.stop) == (0, 1, 1, 2)
    assert of_stack(STATS, first).count_e.shape == (1, 4)
    assert of_stack(STATS, second).count_e.shape == (1, 8)
    assert of_stack(STATS, first).tokens.shape == (1,)


# Pictures


def test_pictures_are_relative_to_the_layer_s_own_balance():
    load = [[0.25] * 4, [0.125] * 8]
    np.testing.assert_array_equal(relative_load(load), [[1] * 4 + [np.nan] * 4, [1] * 8])
    image = load_image(load)
    cell = image.shape[1] // 8
    assert (image[0, : 4 * cell] == 247).all()  # white: balance
    assert (image[0, 4 * cell :] == 128).all()  # grey: no expert
    assert (image[-1] == 247).all()


def test_the_plot_of_expert_load_has_a_row_an_expert(tmp_path):
    records = [
        {"step": s, "split": "train", "expert_load": [[0.75, 0.25, 0.0, 0.0], [0.125] * 8]}
        for s in (1, 2, 3)
    ]
    _, relative_sle = _binned_load(records)
    np.testing.assert_array_equal(relative_sle[0, 0, :4], [3, 1, 0, 0])
    assert np.isnan(relative_sle[:, 0, 4:]).all()
    assert plot_expert_load(records, tmp_path / "load.png").exists()


# Sizes


def test_parameters_and_flops_are_sums_over_layers(mesh):
    counts = parameter_counts(CONFIG)
    assert counts["router"] == 16 * (4 + 8 + 8)
    assert counts["experts"] == 3 * 16 * (4 * 32 + 8 * 16 + 8 * 16)
    active = active_counts(CONFIG)
    assert active["experts"] == 3 * 16 * 2 * (32 + 16 + 16)
    assert active_experts(CONFIG) == 2
    layers = [flops_per_token(_alike(layer)) for layer in range(3)]
    assert flops_per_token(CONFIG) == sum(layers) / 3  # all else is the same in each
    shapes = jax.eval_shape(lambda: split_model(CONFIG, mesh, jax.random.key(0))[1])
    drawn = dict.fromkeys(counts, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        drawn[parameter_group(path_name(path))] += leaf.size
    assert drawn == counts


@pytest.mark.parametrize("how", TRANSPORTS)
def test_traffic_is_the_mean_and_memory_that_of_the_largest_layer(how):
    sizes = MeshConfig(data=1, fsdp=1, expert=4, tensor=1)
    alike = [_alike(layer) for layer in range(3)]
    sent = [exchange_bytes(config, sizes, how) for config in alike]
    assert exchange_bytes(CONFIG, sizes, how) == pytest.approx(sum(sent) / 3)
    held = [buffer_rows(config, sizes, how) for config in alike]
    assert buffer_rows(CONFIG, sizes, how) == max(held)
    assert gathered_weight_bytes(CONFIG, sizes) == 4 * 3 * 16 * 8 * 16 // 4


def test_describe_names_the_layers():
    file = io.StringIO()
    describe(CONFIG, 1, Console(file=file, width=160, force_terminal=False))
    for words in (
        "experts of MoE layer 0",
        "4 of hidden width 32",
        "experts of MoE layers 1-2",
        "8 of hidden width 16",
        "2 of 4 or 8 experts a token",
        "capacity, MoE layer 0",
        "4 slots per expert and group of 1 x 8 tokens",
        "2 slots per expert and group of 1 x 8 tokens",
        "runs_1/layer_0/moe/gate",
    ):
        assert words in file.getvalue(), words


# A run


WORDS = [
    "model.vocab_size=264",
    "moe.router=sigmoid_bias",
    "moe.capacity_factor=None",
    "data.sequence_length=32",
    "train.batch_size=4",
    "train.steps=4",
    "optim.warmup_steps=0",
    "checkpoint.every=2",
    "eval.every=2",
    "eval.batches=1",
    "logging.every=1",
    "logging.choices=True",
    "mesh.data=1",
]
CLOCK = ("step_seconds", "tokens_per_second", "mfu", "goodput")


def _train_on(config: Config, devices: int, workdir) -> list[dict]:
    """Trains on the first devices of this process; returns the records."""
    with pytest.MonkeyPatch.context() as patch:
        found = jax.devices()[:devices]
        patch.setattr("moejax.loop.make_mesh", lambda sizes: make_mesh(sizes, found))
        assert train(config, workdir) == 0
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in read_metrics(workdir)]


@pytest.mark.slow
def test_a_run_resumes_evaluates_and_is_replayed(tmp_path):
    config = apply_overrides(CONFIG, WORDS)
    straight = _train_on(config, 1, tmp_path / "straight")
    assert [len(row) for row in straight[-1]["expert_load"]] == [4, 8, 8]
    assert (tmp_path / "straight" / "expert_load.png").exists()

    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "4")
    assert checkpoint_steps(tmp_path / "resumed") == [2]
    assert _train_on(config, 1, tmp_path / "resumed") == straight

    split = apply_overrides(config, ["mesh.expert=4"])
    evaluated = evaluate_workdir(split, tmp_path / "straight", 4, jax.devices()[:4])
    assert evaluated["loss"] == pytest.approx(straight[-1]["loss"], rel=1e-5)
    assert evaluated["expert_load"] == straight[-1]["expert_load"]

    replay = apply_overrides(
        config,
        [f"train.replay={tmp_path / 'straight'}", "mesh.expert=2", "logging.choices=False"],
    )
    replayed = _train_on(replay, 2, tmp_path / "replayed")
    for ours, theirs in zip(replayed, straight, strict=True):
        if theirs["split"] == "train":
            assert ours["expert_load"] == theirs["expert_load"]
            np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)


def test_choices_of_experts_that_a_layer_lacks_are_refused(tmp_path, mesh):
    choices = np.full((1, 3, 8, T, 2), 7, np.int32)
    save_choices(tmp_path, 1, choices)
    replay = apply_overrides(CONFIG, [f"train.replay={tmp_path}"])
    with pytest.raises(ConfigError, match=r"expert 7 in MoE layers 0 to 0, which have 4 here"):
        load_choices(replay, mesh, 1)
    choices[:, 0] = 4  # a layer's number of choices is none of them
    save_choices(tmp_path, 1, choices)
    assert load_choices(replay, mesh, 1).shape == (1, 3, 8, T, 2)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_experts_by_layer": (4, 8)},
            r"num_experts_by_layer=\(4, 8\) and moe.expert_hidden_by_layer=.* differ in length",
        ),
        (
            {"num_experts_by_layer": (4, 8), "expert_hidden_by_layer": None},
            r"has a number for 2 MoE layers and the model has 3 .*; give one for each",
        ),
        (
            {"every": None},
            r"by_layer=\(4, 8, 8\) and moe.every=None, which has no MoE layer; leave one out",
        ),
        ({"num_experts_by_layer": ()}, "num_experts_by_layer is empty; give a number for each"),
        ({"num_experts": 16}, r"num_experts=16 with .*\(4, 8, 8\).*use moe.num_experts=8"),
        ({"expert_hidden": 64}, r"expert_hidden=64 with .*use moe.expert_hidden=32"),
        ({"num_experts_by_layer": (0, 8, 8)}, r"MoE layer 0 .*moe.num_experts=0"),
        ({"top_k": 6}, r"MoE layer 0 .*moe.top_k=6 is larger than moe.num_experts=4"),
        (
            {"expert_groups": 8, "groups_per_token": 2},
            r"MoE layer 0 .*moe.expert_groups=8 does not divide moe.num_experts=4",
        ),
        (
            {"device_groups": 8, "device_balance_loss_weight": 0.1},
            r"MoE layer 0 .*moe.device_groups=8 does not divide moe.num_experts=4",
        ),
        (
            {"capacity_by_expert": (1.0,) * 8},
            r"MoE layer 0 .*one finite number above 0 for each of moe.num_experts=4",
        ),
        (
            {"balance_convention": "huggingface"},
            r"'huggingface' pools the experts of all layers.*use one of megatron",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        _moe(**changes)


def test_pooling_needs_equal_numbers_alone():
    moe = _moe(balance_convention="huggingface", num_experts_by_layer=(8,) * 3).moe
    assert len(moe.stacks(3)) == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"expert": 8}, r"num_experts_by_layer\[0\]=4 is not divisible by the expert axis \(8\)"),
        ({"tensor": 32}, r"hidden_by_layer\[1\]=16 is not divisible by the tensor axis \(32\)"),
    ],
)
def test_every_layer_has_to_fit_the_mesh(sizes, message):
    with pytest.raises(ConfigError, match=message):
        CONFIG.check_model_fits(MeshConfig(data=1, **sizes))


def test_one_layer_takes_a_config_of_one_layer():
    with pytest.raises(ConfigError, match=r"give it config.of_layer\(0\)"):
        MoE(CONFIG.moe, 16, rngs=nnx.Rngs(0))
    assert CONFIG.moe.of_layer(0).num_experts == 4


def test_the_command_line_spells_a_list():
    words = ["moe.num_experts_by_layer=4,8,4", "moe.expert_hidden_by_layer=None"]
    moe = apply_overrides(CONFIG, words).moe
    assert moe.num_experts_by_layer == (4, 8, 4)
    assert [(s.start, s.stop, s.config.num_experts) for s in moe.stacks(3)] == [
        (0, 1, 4),
        (1, 2, 8),
        (2, 3, 4),
    ]
    with pytest.raises(ConfigError, match=r"for example moe.num_experts_by_layer=4,8"):
        apply_overrides(CONFIG, ["moe.num_experts_by_layer=4.5,8,8"])
