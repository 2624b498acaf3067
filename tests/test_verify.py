"""verify: it passes when layouts agree, and names the guilty group when an error is put in."""

import dataclasses
import itertools
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax.exchange
import moejax.moe
import moejax.step
from moejax import contract, verify
from moejax.overrides import load_config
from moejax.routing import route

QUICKSTART = str(Path(__file__).parents[1] / "configs/quickstart.py")
SMALL = [
    "model.num_layers=2",
    "model.d_model=16",
    "model.num_heads=2",
    "model.num_kv_heads=2",
    "model.head_dim=8",
    "moe.num_experts=8",
    "moe.expert_hidden=16",
    "moe.capacity_factor=1.0",
    "moe.router=sigmoid_bias",
    "data.sequence_length=16",
    "moe.balance_loss_weight=0.1",
]


@pytest.fixture(scope="module")
def config():
    return load_config(QUICKSTART, SMALL)


def rows(config, *layouts: verify.Layout) -> list[verify.Row]:
    return list(verify.check(config, list(layouts), 8))


EXPERT_8 = verify.Layout(1, 1, 8, 1, 1, 1, "none", "capacity by all_to_all")


@pytest.mark.slow
def test_layouts_agree(config):
    """Every axis, both accumulations, remat, and each way to move what is and is not dropped."""
    found = rows(
        config,
        verify.Layout(1, 2, 2, 1, 2, 2, "full", "capacity by all_to_all"),
        verify.Layout(1, 2, 4, 1, 1, 2, "none", "capacity by gather"),
        verify.Layout(2, 1, 4, 1, 1, 1, "none", "dropless by gather"),
        verify.Layout(1, 2, 4, 1, 1, 2, "none", "dropless by ragged"),
        verify.Layout(1, 1, 8, 1, 1, 1, "none", "dropless by all_to_all"),
        verify.Layout(1, 2, 2, 1, 1, 2, "none", "capacity by all_to_all", expert_fsdp=2),
    )
    assert [row.failures for row in found] == [[]] * 6
    assert all(max(row.groups.values()) > 0 for row in found), "nothing was compared"
    assert [row.dropped > 0 for row in found] == [True, True, False, False, False, True]
    assert set(found[0].groups) == {"router", "experts", "attention", "norms", "embeddings"}


def test_expert_gradients_scaled_by_the_expert_degree_are_found(config, monkeypatch):
    """The commonest bug of expert parallelism: forward equal, expert gradients Z times too big."""
    honest = moejax.exchange.gather_experts

    @jax.custom_vjp
    def scaled(w):
        return w

    scaled.defvjp(lambda w: (w, None), lambda _, grad: (grad * 8,))
    monkeypatch.setattr(
        moejax.exchange, "gather_experts", lambda w, axis, dtype: scaled(honest(w, axis, dtype))
    )
    (row,) = rows(config, EXPERT_8)
    assert "gradient of experts" in row.failures
    assert "grad_norm" in row.failures
    assert row.groups["experts"] == pytest.approx(7, rel=0.2)
    assert "/moe/" in row.worst


def test_balance_loss_lost_under_accumulation_is_found(config, monkeypatch):
    """The counts of the whole step made zeros: the reported loss stays, the gradient goes."""
    honest = moejax.step._step_stats

    def lost(*arguments):
        stats = honest(*arguments)
        return None if stats is None else stats._replace(count_e=jnp.zeros_like(stats.count_e))

    monkeypatch.setattr(moejax.step, "_step_stats", lost)
    (row,) = rows(config, EXPERT_8._replace(accumulation=2, data=2, expert=4))
    assert "gradient of router" in row.failures
    assert row.groups["router"] > 100 * verify.GRADIENT_TOLERANCE


def test_padding_that_is_counted_is_found(config, monkeypatch):
    def careless(x_btd, weights, state, inputs, moe_config):
        inputs = inputs._replace(mask_bt=jnp.ones_like(inputs.mask_bt))
        return route(x_btd, weights, state, inputs, moe_config)

    monkeypatch.setattr(moejax.moe, "route", careless)
    (row,) = rows(config, EXPERT_8)
    assert "counts" in row.failures
    assert row.counts > 0


def test_a_tie_is_no_error_and_more_than_a_few_are_one(config, monkeypatch):
    """One token ranks its two experts the other way round; then every tenth one does.

    Either moves a first choice. A few are taken for ties and replayed, and the replay is equal.
    """
    honest, every = verify.trace, 0

    def tied(config, data, starts, choices=()):
        found = honest(config, data, starts, choices)
        if config.moe.transport == "reference" or choices:
            return found
        first = found.metrics[0]
        chosen = first.choice_albts.copy()
        rows = chosen.reshape(-1, chosen.shape[-1])[::every]
        rows[:] = rows[:, ::-1]
        first_e = first.stats.first_e.copy()
        first_e[0, :2] += np.array([1, -1])
        first = first._replace(choice_albts=chosen, stats=first.stats._replace(first_e=first_e))
        return found._replace(metrics=[first, *found.metrics[1:]])

    monkeypatch.setattr(verify, "trace", tied)
    monkeypatch.setattr(verify, "TIES", 1e-3)  # 1 of 2 layers x 16 sequences x 16 tokens x 2 steps
    every = 10**6
    (row,) = rows(config, EXPERT_8)
    assert (row.ties, row.failures) == (1, [])
    every = 10
    (row,) = rows(config, EXPERT_8)
    assert (row.ties, row.failures) == (0, ["counts"])


def test_a_tie_moves_no_more_first_choices_than_there_are_ties():
    """Three tokens of two experts: a first choice that moved is one, wherever it went."""
    theirs = types.SimpleNamespace(first_e=np.array([[3, 5, 0]]))
    assert verify._moved_firsts(theirs, theirs) == 0
    assert verify._moved_firsts(types.SimpleNamespace(first_e=np.array([[2, 5, 1]])), theirs) == 1
    assert verify._moved_firsts(types.SimpleNamespace(first_e=np.array([[5, 1, 2]])), theirs) == 4


def test_layouts_are_those_that_fit(config):
    found = verify.layouts(config, 8)
    assert len(set(found)) == len(found)
    meshes = {tuple(layout.sizes.values()) for layout in found}
    assert (1, 1, 1, 8, 1, 1) in meshes
    assert (2, 2, 1, 2, 1, 1) in meshes
    assert (1, 2, 2, 2, 1, 1) in meshes
    assert (1, 1, 8, 1, 1, 1) in meshes
    assert all(layout.tensor <= 2 for layout in found), "2 heads do not split over 4"
    dense = dataclasses.replace(config, moe=dataclasses.replace(config.moe, every=None))
    assert {layout.dispatch for layout in verify.layouts(dense, 8)} == {"dropless by gather"}


def _with_moe(config, **changes):
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, **changes))


def test_dispatches_are_those_that_the_router_has(config):
    ways = ("gather", "all_to_all", "ragged")
    dropless, capacity = ([f"{how} by {way}" for way in ways] for how in ("dropless", "capacity"))
    assert sorted(verify.dispatches(config)) == sorted(dropless + capacity)
    dense = _with_moe(config, router="dense", capacity_factor=None)
    assert sorted(verify.dispatches(dense)) == sorted(dropless)
    soft = _with_moe(config, router="soft", capacity_factor=None, allow_noncausal=True)
    assert verify.dispatches(soft) == ("dropless by all_to_all",)
    assert {layout.dispatch for layout in verify.layouts(soft, 8)} == {"dropless by all_to_all"}


def test_a_loss_of_microbatches_is_compared_at_one_microbatch(config):
    """It changes with accumulation by its definition, which is no error of a layout."""
    assert {layout.accumulation for layout in verify.layouts(config, 8)} == {1, 2}
    config = _with_moe(config, microbatch_balance_loss_weight=0.1)
    assert {layout.accumulation for layout in verify.layouts(config, 8)} == {1}


def test_a_layout_s_config_drops_or_takes_further_rounds(config):
    """Otherwise two of the three ways would never be tried where they are hard."""
    layout = verify.Layout(1, 2, 4, 1, 1, 2, "full", "dropless by ragged")
    found = verify.laid_out(_with_moe(config, capacity_factor=2.0), layout, 8)
    assert (found.moe.capacity_factor, found.moe.transport) == (None, "ragged")
    assert found.moe.buffer_factor == 1
    narrow = dataclasses.replace(config.model, dtype="bfloat16", param_dtype="bfloat16")
    found = verify.laid_out(dataclasses.replace(config, model=narrow), layout, 8)
    assert (found.model.dtype, found.model.param_dtype) == ("float32", "float32")
    assert (found.mesh.fsdp, found.mesh.expert, found.model.remat) == (2, 4, "full")
    layout = layout._replace(dispatch="capacity by all_to_all")
    found = verify.laid_out(_with_moe(config, capacity_factor=2.0), layout, 8)
    assert (found.moe.capacity_factor, found.moe.transport) == (1, "all_to_all")
    unequal = _with_moe(config, capacity_by_expert=(2.0, *(1.0,) * 7))
    assert verify.laid_out(unequal, layout, 8).moe.capacity_by_expert == (2.0, *(1.0,) * 7)
    dropless = layout._replace(dispatch="dropless by gather")
    assert verify.laid_out(unequal, dropless, 8).moe.capacity_factor is None
    oracle = verify.oracle(config, layout, 8)
    assert (oracle.moe.transport, oracle.mesh.num_devices) == ("reference", 1)
    assert (oracle.train.accumulation, oracle.train.batch_size) == (1, found.train.batch_size)


def test_covering_has_every_pair_of_settings(config):
    """Recounted by hand: split or not for each axis, accumulation, remat, dispatch."""
    candidates = verify.layouts(config, 8)
    chosen = verify.covering(candidates)

    def settings(layout):
        others = layout.accumulation, layout.remat, layout.dispatch
        return [*(size > 1 for size in layout.sizes.values()), *others]

    def pairs(layouts):
        return {
            (i, a, j, b)
            for layout in layouts
            for (i, a), (j, b) in itertools.combinations(enumerate(settings(layout)), 2)
        }

    assert pairs(chosen) == pairs(candidates)
    assert len(chosen) < len(candidates) / 5
    assert any(layout.expert == 8 for layout in chosen)


def test_factorisations():
    assert sorted(verify.factorisations(4, 2)) == [(1, 4), (2, 2), (4, 1)]
    assert len(list(verify.factorisations(8, 4))) == 20


def test_report_and_exit_code(config, monkeypatch, tmp_path, capsys):
    """Two made-up rows, one bad: exit code 1, row and group are named, the JSON says so too."""
    good = verify.Row("good", 1e-7, 1e-7, 1e-6, {"router": 1e-6}, "a/moe/router", 0, 9, 0.0, 1.0)
    bad = dataclasses.replace(good, layout="bad", groups={"router": 0.5})
    monkeypatch.setattr(verify, "check", lambda *_: iter([good, bad]))
    assert verify.verify(config, False, tmp_path / "v.json") == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "FAIL bad: gradient of router; worst parameter a/moe/router" in shown
    assert "1 of 2 layouts train the same" in shown
    content = json.loads((tmp_path / "v.json").read_text())
    assert [row["failures"] for row in content["rows"]] == [[], ["gradient of router"]]
    monkeypatch.setattr(verify, "check", lambda *_: iter([good]))
    assert verify.verify(config, False, None) == 0


def test_the_contract_counts_too_and_is_written_where_asked(config, monkeypatch, tmp_path, capsys):
    """With --all: one cell above the tolerance is exit code 1, though every layout agrees."""
    good = verify.Row("good", 1e-7, 1e-7, 1e-6, {"router": 1e-6}, "a/moe/router", 0, 9, 0.0, 1.0)
    monkeypatch.setattr(verify, "check", lambda *_: iter([good]))
    columns = contract.columns()
    cells = [
        contract.Cell("softmax", columns[0], 1e-6, "y"),
        contract.Cell("noisy", columns[1], 0.5, "up"),
    ]
    monkeypatch.setattr(contract, "check_matrix", lambda _: ([cell] for cell in cells))
    page, file = tmp_path / "contract.md", tmp_path / "v.json"
    assert verify.verify(config, True, file, page) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert f"FAIL noisy, {columns[1]}: 5.0e-01 in up" in shown
    content = json.loads(file.read_text())
    assert not content["passed"]
    assert [cell["case"] for cell in content["matrix"]] == ["softmax", "noisy"]
    assert "1 of 2 cells pass." in page.read_text()
    cells.pop()
    assert verify.verify(config, True, file, page) == 0
    assert verify.verify(config, False, file) == 0
    assert "matrix" not in json.loads(file.read_text())
