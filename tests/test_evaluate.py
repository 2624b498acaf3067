"""Evaluation, recounted by NumPy from the logits of the same model."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from moejax.config import MeshConfig
from moejax.evaluate import Evaluator, at_eval_capacity, dropless, with_moe
from moejax.mesh import make_mesh
from moejax.model import packed_tokens
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
        hidden_btd, _, _ = model(batch.tokens, packed_tokens(batch.segments), {})
        logit_btv = np.asarray(model.unembed(hidden_btd), np.float64)
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


def test_dropless_first_and_capacity_as_a_second_number(config, result):
    """Half the slots that balance would need: half the assignments drop, and another loss."""
    record, _ = result
    assert record["dropped"] == 0
    assert record["capacity_factor"] == 0.5
    assert record["drop_fraction_at_capacity"] >= 0.5
    assert record["loss_at_capacity"] != record["loss"]
    assert at_eval_capacity(config.moe).capacity_factor == 0.5
    assert dropless(config.moe).capacity_factor is None


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
