"""The pictures: they exist, have the promised size, and show what the records hold."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hostile import file_limit
from PIL import Image

from moejax.plots import _binned_load, _smooth, plot_expert_load, plot_loss, plot_run
from moejax.records import layer_summary


def _records(layers, experts, number, *, dead=()):
    """Balanced layers, but that the experts of `dead`, (layer, expert), get nothing."""
    counts = np.full((layers, experts), 100)
    for layer, expert in dead:
        counts[layer, expert] = 0
    records = []
    for step in range(10, 10 * number + 10, 10):
        common = {"step": step, "tokens_seen": 64 * step, "loss": 1 + 1 / step}
        train = {"split": "train", "grad_norm": 0.5, "drop_fraction": 0.1, "balance_loss": 4.0}
        records.append(common | train | layer_summary(counts))
        if step % 50 == 0:
            records.append(common | {"split": "eval", "loss_at_capacity": 2 + 1 / step})
    return records


def _pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def _share(pixels, red, green, blue, tolerance=12):
    return (np.abs(pixels - [red, green, blue]).max(axis=-1) <= tolerance).mean()


def test_pictures_that_cannot_be_drawn_do_not_end_a_run(tmp_path, capsys):
    """A disk that is full when a run is through must not hide what became of its last save."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps(_records(2, 4, 2)[0]) + "\n")
    with file_limit(1000):
        assert plot_run(tmp_path, has_experts=True) == []
    assert "not drawn: [Errno 27] File too large" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("torn\n")
    assert plot_run(tmp_path, has_experts=True) == []
    assert "metrics.jsonl line 1 is not a record" in capsys.readouterr().err


def test_loss_picture(tmp_path):
    path = plot_loss(_records(4, 8, 40), tmp_path / "loss.png")
    pixels = _pixels(path)
    assert pixels.shape == (990, 1350, 3)
    assert _share(pixels, 0x2B, 0x6C, 0xA3) > 0.001  # training
    assert _share(pixels, 0xC8, 0x45, 0x2E) > 0.001  # validation


def test_loss_picture_of_a_dense_model_is_one_panel(tmp_path):
    records = [{"step": s, "split": "train", "tokens_seen": s, "loss": 1.0 / s} for s in (1, 2, 3)]
    assert _pixels(plot_loss(records, tmp_path / "loss.png")).shape == (690, 1350, 3)


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_loss_picture_with_a_loss_that_is_not_a_number(tmp_path, loss):
    records = _records(2, 4, 10)
    records[-1]["loss"] = records[3]["loss"] = loss
    assert plot_loss(records, tmp_path / "loss.png").exists()


@pytest.mark.parametrize("keep", ["train", "eval"])
def test_loss_picture_of_one_split_or_one_record(tmp_path, keep):
    records = [record for record in _records(2, 4, 10) if record["split"] == keep]
    assert plot_loss(records, tmp_path / "all.png").exists()
    assert plot_loss(records[:1], tmp_path / "one.png").exists()


def test_nothing_to_draw_is_none(tmp_path):
    dense = [{"step": 1, "split": "train", "tokens_seen": 1, "loss": 1.0, "expert_load": []}]
    assert plot_loss([], tmp_path / "a.png") is None
    assert plot_expert_load(dense, tmp_path / "b.png") is None
    assert list(tmp_path.iterdir()) == []


def test_expert_load_shows_a_dead_expert(tmp_path):
    dark_blue = (5, 48, 97)  # the end of the scale
    balanced = _pixels(plot_expert_load(_records(4, 8, 20), tmp_path / "a.png"))
    records = _records(4, 8, 20, dead=[(1, 2)])
    with_dead = _pixels(plot_expert_load(records, tmp_path / "b.png"))
    assert balanced.shape == with_dead.shape == (1080, 1350, 3)
    # One row of 32; the panels fill about 70% of the picture.
    grown = _share(with_dead, *dark_blue) - _share(balanced, *dark_blue)
    assert 0.5 * 0.7 / 32 < grown < 1.5 * 0.7 / 32


def test_expert_load_of_a_wide_model(tmp_path):
    pixels = _pixels(plot_expert_load(_records(48, 256, 3), tmp_path / "wide.png"))
    assert pixels.shape == (2070, 2460, 3)


def test_expert_load_of_a_single_record_and_an_odd_number_of_layers(tmp_path):
    assert plot_expert_load(_records(7, 4, 1), tmp_path / "odd.png").exists()


def test_many_records_are_averaged_into_columns():
    records = [r for r in _records(1, 2, 1000, dead=[(0, 1)]) if r["split"] == "train"]
    edges, relative_sle = _binned_load(records)
    assert edges == (5.0, 10_005.0)  # steps 10 to 10000, each in the middle of its column
    assert relative_sle.shape == (400, 1, 2)
    np.testing.assert_array_equal(relative_sle[:, 0], np.tile([2.0, 0.0], (400, 1)))


def test_smoothing_keeps_a_constant_and_bridges_a_gap():
    values = np.full(60, 3.0)
    values[20] = np.nan
    np.testing.assert_allclose(_smooth(values), 3.0)


def test_importing_plots_does_not_import_matplotlib_or_jax():
    code = "import sys, moejax.plots; assert not {'matplotlib', 'jax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
