"""Evaluation, recounted by NumPy from the logits of the same model."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from moejax.attention import packed_tokens
from moejax.config import MeshConfig
from moejax.evaluate import Evaluator, at_eval_capacity, dropless, with_moe
from moejax.mesh import make_mesh
from moejax.overrides import apply_overrides, load_config
from moejax.state import model_graph, split_model
from moejax.tokenizer import load_tokenizer

SMALL = [
    *("model.num_layers=1", "model.d_model=16", "model.num_heads=2", "model.num_kv_heads=1"),
    *("model.head_dim=8", "moe.num_experts=4", "moe.expert_hidden=8", "data.sequence_length=32"),
    *("train.batch_size=8", "eval.batches=3", "moe.eval_capacity_factor=0.5"),
]


@pytest.fixture(scope="module")
def config():
    return load_config("configs/quickstart.py", SMALL)


def evaluate(config, mesh_sizes=(1, 1, 1, 1)):
    sizes = MeshConfig(*mesh_sizes)
    mesh = make_mesh(sizes, jax.devices()[: sizes.num_devices])
    _, params = split_model(config, mesh, jax.random.key(3))
    return Evaluator(config, mesh)(params, {}), params


@pytest.fixture(scope="module")
def result(config):
    return evaluate(config)


def recount(config, params) -> dict[str, tuple[float, int, int]]:
    """Returns nats, targets and bytes by domain, from logits, one target at a time."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    evaluator = Evaluator(config, mesh)
    model = nnx.merge(model_graph(with_moe(config, dropless(config.moe)), mesh), params)
    bytes_v = load_tokenizer("bytes").bytes_v
    sums = {name: [0.0, 0, 0] for name in evaluator._corpus.domains}
    for index in range(len(evaluator._batches)):
        batch = evaluator._batches.rows(index)
        out = model(batch.tokens, packed_tokens(batch.segments), {})
        logit_btv = np.asarray(model.unembed(out.hidden_btd), np.float64)
        for row, position in np.argwhere(batch.loss_mask):
            logit_v = logit_btv[row, position]
            target = batch.targets[row, position]
            entry = sums[evaluator._corpus.domains[batch.domains[row, position]]]
            entry[0] += math.log(np.exp(logit_v - logit_v.max()).sum()) + logit_v.max()
            entry[0] -= logit_v[target]
            entry[1] += 1
            entry[2] += bytes_v[target]
    return sums


def test_losses_are_those_counted_by_hand(config, result):
    record, params = result
    sums = recount(config, params)
    total = np.sum(list(sums.values()), axis=0)
    assert record["tokens"] == total[1]
    assert record["loss"] == pytest.approx(total[0] / total[1], rel=1e-5)
    assert record["bits_per_byte"] == pytest.approx(total[0] / math.log(2) / total[2], rel=1e-5)
    assert set(record["domains"]) == {name for name, entry in sums.items() if entry[1]}
    for name, fields in record["domains"].items():
        nats, targets, _ = sums[name]
        assert fields["tokens"] == targets
        assert fields["loss"] == pytest.approx(nats / targets, rel=1e-5)


def test_auxiliary_losses_are_those_of_the_whole_split(config, result):
    """E * sum_e f_e P_e of all validation tokens at once, not a mean over batches."""
    record, params = result
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    evaluator = Evaluator(config, mesh)
    model = nnx.merge(model_graph(with_moe(config, dropless(config.moe)), mesh), params)
    count_e, probability_e, z, tokens = 0, 0, 0, 0
    for index in range(len(evaluator._batches)):
        batch = evaluator._batches.rows(index)
        stats = model(batch.tokens, packed_tokens(batch.segments), {}).stats
        count_e = count_e + np.asarray(stats.count_e[0], np.int64)
        probability_e = probability_e + np.asarray(stats.probability_e[0], np.float64)
        z, tokens = z + float(stats.z[0]), tokens + int(stats.tokens[0])
    balance = 4 * np.sum(count_e / (2 * tokens) * probability_e / tokens)
    assert record["balance_loss"] == pytest.approx(balance, rel=1e-5)
    assert record["router_z_loss"] == pytest.approx(z / tokens, rel=1e-5)
    assert record["router_losses"] == {
        "balance": [pytest.approx(balance, rel=1e-5)],
        "z": [pytest.approx(z / tokens, rel=1e-5)],
    }
    moe = config.moe
    weighed = moe.balance_loss_weight * balance + moe.router_z_loss_weight * z / tokens
    assert weighed > 0.005
    assert record["total_loss"] - record["loss"] == pytest.approx(weighed, rel=1e-4)


def test_the_state_of_a_router_weighs_its_loss(config):
    """ReMoE's coefficient is in the router state: after training it is another one."""
    relu = apply_overrides(config, ["moe.router=relu", "eval.batches=1"])
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    _, params = split_model(relu, mesh, jax.random.key(3))
    evaluator = Evaluator(relu, mesh)
    small, large = (evaluator(params, {"l1": np.full(1, c, np.float32)}) for c in (0.1, 0.3))
    (l1,) = small["router_losses"]["l1"]
    assert small["total_loss"] - small["loss"] == pytest.approx(0.1 * l1, rel=1e-4)
    assert large["total_loss"] - large["loss"] == pytest.approx(0.3 * l1, rel=1e-4)
    assert small["balance_loss"] == small["router_z_loss"] == 0


def test_a_router_that_needs_no_capacity_is_evaluated_once(config):
    dense = apply_overrides(
        config, ["moe.router=dense", "moe.eval_capacity_factor=2", "eval.batches=1"]
    )
    record, _ = evaluate(dense)
    assert not {"loss_at_capacity", "drop_fraction_at_capacity", "capacity_factor"} & set(record)
    assert record["expert_load"] == [[0.25] * 4]


def test_dropless_first_and_capacity_as_a_second_number(config, result):
    """Half the slots that balance would need: half the assignments drop, and another loss."""
    record, _ = result
    assert record["dropped"] == 0
    assert record["capacity_factor"] == 0.5
    assert record["drop_fraction_at_capacity"] >= 0.5
    assert record["loss_at_capacity"] != record["loss"]
    assert at_eval_capacity(config.moe).capacity_factor == 0.5
    assert dropless(config.moe).capacity_factor is None
    unequal = dataclasses.replace(
        config.moe, capacity_factor=1.0, capacity_by_expert=(1.0, 1.0, 2.0, 0.5)
    )
    assert dropless(unequal).capacity_factor is None
    assert at_eval_capacity(unequal).capacity_by_expert == (1.0, 1.0, 2.0, 0.5)


@pytest.mark.parametrize(("mesh", "group"), [((2, 1, 4, 1), 1), ((1, 4, 2, 1), 2)])
def test_same_on_every_mesh_also_where_the_batch_does_not_split(config, result, mesh, group):
    """8 sequences; in groups of 2 on 8 devices a batch needs 16 rows, and gets 8 of padding."""
    config = with_moe(config, dataclasses.replace(config.moe, group_sequences=group))
    record, _ = evaluate(config, mesh)
    assert record["loss"] == pytest.approx(result[0]["loss"], rel=1e-5)
    assert record["tokens"] == result[0]["tokens"]
    assert record["expert_load"] == result[0]["expert_load"]


def test_accumulation_changes_nothing(config, result):
    record, _ = evaluate(apply_overrides(config, ["train.accumulation=2"]))
    assert record["loss"] == pytest.approx(result[0]["loss"], rel=1e-6)
    assert record["loss_at_capacity"] == pytest.approx(result[0]["loss_at_capacity"], rel=1e-6)
