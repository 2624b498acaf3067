"""What `moejax compare` writes: CSV, Markdown, pictures, TensorBoard."""

import csv
import re

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2, plugin_hparams_pb2
from test_compare_runs import runs_of, write_run

from moejax.cli import main
from moejax.compare import Arm
from moejax.compare_report import plot_curves
from moejax.errors import NO_SPACE


@pytest.fixture
def written(tmp_path):
    """The folder that `--output` wrote for two arms, one of two seeds."""
    runs = tmp_path / "runs"
    for seed in (0, 1):
        write_run(runs / f"a|[red]_seed{seed}", [3.0, 2.0 + seed / 8], f"seed={seed}")
    write_run(runs / "b", [3.0, 2.5], "moe.num_experts_by_layer=(4, 8, 4, 8)", "moe.top_k=3")
    words = ["--reach", "2.75", "--output", str(tmp_path / "out"), "--csv", str(tmp_path / "x.csv")]
    assert main(["compare", str(runs), *words]) == 0
    return tmp_path / "out"


def test_csv_has_a_row_a_run_with_all_digits(written, tmp_path):
    text = (written / "runs.csv").read_text()
    assert (tmp_path / "x.csv").read_text() == text
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["seed"] for row in rows] == ["0", "1", "0"]
    assert [float(row["loss"]) for row in rows] == [2.0, 2.125, 2.5]
    assert rows[0]["arm"] == "a|[red]"
    assert rows[2]["moe.num_experts_by_layer"] == "(4, 8, 4, 8)"
    assert float(rows[0]["tokens"]) == 2000


def test_markdown_is_escaped_and_has_the_pictures(written):
    text = (written / "compare.md").read_text()
    assert r"a\|\[red\]" in text
    assert "| b | 1k to" not in text
    row = next(line for line in text.splitlines() if line.startswith("| b | 1.5k"))
    assert row.startswith("| b | 1.5k | 15 |")  # 2.75, half way from 3.0 to 2.5
    assert "![compare](compare.png)" in text
    with Image.open(written / "compare.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    blue = np.abs(pixels - [0x1F, 0x77, 0xB4]).max(axis=-1) < 60
    orange = np.abs(pixels - [0xFF, 0x7F, 0x0E]).max(axis=-1) < 60
    assert blue.sum() > 200
    assert orange.sum() > 200


def _events(folder):
    (file,) = folder.glob("events*")
    content, at, events = file.read_bytes(), 0, []
    while at < len(content):
        size = int.from_bytes(content[at : at + 8], "little")
        events.append(event_pb2.Event.FromString(content[at + 12 : at + 12 + size]))
        at += 16 + size
    return events


def test_tensorboard_has_curves_and_hparams(written):
    folders = sorted((written / "tensorboard").iterdir())
    assert [folder.name for folder in folders] == ["00_a_red_seed0", "00_a_red_seed1", "01_b_seed0"]
    values = [v for event in _events(folders[2]) for v in event.summary.value]
    numbers = {v.tag: v.simple_value for v in values}
    assert numbers["last/loss"] == 2.5
    assert numbers["last/tokens"] == 2000
    steps = [
        (event.step, value.simple_value)
        for event in _events(folders[2])
        for value in event.summary.value
        if value.tag == "loss_by/seconds"
    ]
    assert steps == [(10, 3.0), (20, 2.5)]
    start = next(v for v in values if v.tag == "_hparams_/session_start_info")
    data = plugin_hparams_pb2.HParamsPluginData.FromString(start.metadata.plugin_data.content)
    hparams = data.session_start_info.hparams
    assert hparams["moe.top_k"].number_value == 3
    assert hparams["moe.num_experts_by_layer"].string_value == "(4, 8, 4, 8)"
    assert set(hparams) == {"seed", "moe.top_k", "moe.num_experts_by_layer"}


def test_every_arm_is_in_the_legend_by_its_own_name(tmp_path, monkeypatch):
    """Matplotlib hides labels that begin with `_`, and would take $x$ for a formula."""
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, _: figures.append(self))
    run = runs_of(write_run(tmp_path / "a", [3.0, 2.0]))
    plot_curves([Arm(name, tuple(run)) for name in ("_a", "$x$ $\\bad$")], tmp_path / "x.png")
    (figure,) = figures
    figure.draw_without_rendering()
    legend = figure.axes[-1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [" _a", r"\$x\$ \$\bad\$"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, capsys):
    write_run(tmp_path / "a", [3.0, 2.0])
    write_run(tmp_path / "b", [3.0, 2.0], "seed=1")
    (tmp_path / "file").touch()
    assert main(["compare", str(tmp_path), "--output", str(tmp_path / "file" / "out")]) == 2
    assert "give another file or folder" in capsys.readouterr().err
    assert main(["compare", str(tmp_path), "--csv", "/dev/full"]) == NO_SPACE
    assert "No space left on device; give another file" in capsys.readouterr().err


def test_many_arms_are_rows_and_only_the_best_have_a_colour(tmp_path, capsys):
    for index in range(12):
        words = f"optim.learning_rate={0.001 * (index + 1)}"
        write_run(tmp_path / "trials" / f"{index:03d}", [3.0, 2.0 + index / 10], words)
    assert main(["compare", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"arm +optim.learning_rate *\n optim.learning_rate=0.001 +0.001", shown)
    with Image.open(tmp_path / "out" / "compare.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    grey = np.abs(pixels - [0xBB, 0xBB, 0xBB]).max(axis=-1) < 12
    assert grey.sum() > 100
