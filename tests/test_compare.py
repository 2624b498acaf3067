"""`moejax compare`: runs that are written by hand, and the recorded runs of docs/quickstart.md."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_compare_runs import runs_of, write_run

from moejax import compare as c
from moejax.cli import main
from moejax.compare_runs import load_runs
from moejax.flops import flops_per_token
from moejax.overrides import load_config
from moejax.workdir import open_workdir

ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "tests" / "data" / "quickstart"
CONFIGS = {"moe": "configs/quickstart.py", "dense": "configs/quickstart_dense.py"}
# Lines of docs/quickstart.md as of 2026-11-22, whose runs were recorded.
QUICKSTART = [
    "| parameters, total | 3,419,520 | 671,104 |",
    "| parameters, active | 667,008 | 671,104 |",
    "| FLOPs per token | 4,577,280 | 4,601,856 |",
    "| loss, learning rate 0.003, seed 0 | 1.5060 | 1.5663 |",
    "| loss, learning rate 0.006, seed 0 | 1.5366 | 1.5732 |",
    "| learning rate chosen | 0.003 | 0.003 |",
    "| loss, seed 0 | 1.5060 | 1.5663 |",
    "| loss, seed 1 | 1.5275 | 1.5570 |",
    "| loss, seed 2 | 1.4944 | 1.5412 |",
    "| loss, mean of seeds | **1.5093** | **1.5548** |",
    "| seconds in steps, mean | 565 | 436 |",
    "The MoE's loss is lower by **0.0455** nats on average, larger than the largest spread over "
    "seeds of either arm (0.0332); seed by seed it is lower by 0.0603, 0.0294, 0.0468.",
    "It reaches the dense model's final loss with 0.86 of its tokens and 1.17 of its seconds;",
]


def recorded_runs(folder, files=CONFIGS, words=("train.steps=900", "moe.capacity_factor=2.0")):
    """Writes the workdirs of docs/quickstart.md: their configs, and what was recorded of them."""
    for file in sorted(RECORDED.glob("*.jsonl")):
        arm, rate, seed = re.fullmatch(r"(\w+)_lr([\d.]+)_seed(\d)", file.stem).groups()
        own = [f"optim.learning_rate={rate}", f"seed={seed}", "mesh.expert=1", "mesh.data=1"]
        own += ["logging.every=10", "eval.every=225", "eval.batches=16", "checkpoint.every=100000"]
        config = load_config(str(ROOT / files[arm]), [*own, *words])
        workdir = open_workdir(folder / file.stem, config)
        (workdir / "metrics.jsonl").write_text(file.read_text())


# The quickstart


def test_the_quickstart_is_reproduced_from_its_workdirs(tmp_path, capsys):
    recorded_runs(tmp_path)
    dense, moe = (sorted(map(str, tmp_path.glob(f"{arm}_lr0.003*"))) for arm in ("dense", "moe"))
    page = tmp_path / "page.md"
    assert main(["compare", *dense, *moe, "--markdown", str(page)]) == 0
    shown, written = capsys.readouterr().out, page.read_text().replace("\\", "")
    for number in ("3,419,520", "667,008", "671,104", "4,577,280", "4,601,856"):
        assert number in shown
    assert "| dense_lr0.003 | 3 | 1.5548 | 0.0127 | 900 | 1.843M | 435.9 | 8.48T |" in written
    assert "| moe_lr0.003 | 3 | 1.5093 | 0.0168 | 900 | 1.843M | 565 | 8.435T |" in written
    row = next(line for line in written.splitlines() if "± " in line)
    assert row == (
        "| moe_lr0.003 | 1.843M | -0.0455 ± 0.0348 | 0.023 (n=3, 3) | 0.036 (n=3) | 0.86 | 1.17 "
        "| 0.86 |"
    )
    for loss, difference in (("1.5060", "-0.0603"), ("1.5275", "-0.0294"), ("1.4944", "-0.0468")):
        assert re.search(rf"seed\d \| moe_lr0.003 \| \d \| {loss} \| {difference} ", written)
    assert "| moe.every | None | 1 |" in written
    assert "optim.learning_rate" not in written  # equal in both
    found = c.compare([tmp_path])
    assert [arm.name for arm in found.arms] == [
        *("moe_lr0.003", "moe_lr0.006", "dense_lr0.003", "dense_lr0.006"),
    ]
    assert [f"{arm.losses[0]:.4f}" for arm in found.arms] == [
        "1.5060",
        "1.5366",
        "1.5663",
        "1.5732",
    ]


def test_it_needs_no_jax_and_no_second(tmp_path):
    write_run(tmp_path / "a", [3.0, 2.0])
    write_run(tmp_path / "b", [3.0, 2.5], "optim.learning_rate=0.1")
    code = (
        "import sys; from moejax.cli import main; main(['compare', *sys.argv[1:]]);"
        "assert not {'jax', 'matplotlib', 'scipy.stats', 'scipy.optimize'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a"), str(tmp_path / "b")]
    assert "+0.5000" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


# Arithmetic, by hand


def test_cost_and_loss_between_evaluations(tmp_path):
    (run,) = runs_of(write_run(tmp_path / "a", [4.0, 3.0, 2.0], tokens=50, seconds=2.0))
    assert c.cost_to_reach(run, "tokens", 2.5) == pytest.approx(1250)
    assert c.cost_to_reach(run, "seconds", 2.5) == pytest.approx(50)
    assert c.cost_to_reach(run, "tokens", 5.0) == 500  # at the first evaluation
    assert c.cost_to_reach(run, "tokens", 1.0) is None
    assert c.loss_at(run, "tokens", 750) == pytest.approx(3.5)
    assert c.loss_at(run, "tokens", 1500.9) == 2.0  # a token more: the same end
    assert math.isnan(c.loss_at(run, "tokens", 100))
    assert math.isnan(c.loss_at(run, "tokens", 2000))
    assert run.cost("flops") == 1500 * flops_per_token(run.config)


def test_relative_cost_is_paired_by_seed(tmp_path):
    """Seed 0 gets to 2.5 after 15 of 20 steps, seed 1 to 2.0 after 20 of 20."""
    a, b = (
        c.Arm(name, tuple(runs_of(*(write_run(tmp_path / f"{name}{s}", own, f"seed={s}")
                                   for s, own in enumerate(losses)))))
        for name, losses in (("a", ([3, 2], [3, 2])), ("b", ([3, 2.5], [3, 2])))
    )  # fmt: skip
    assert c.relative_cost(a, b, "tokens") == c.Ratio(pytest.approx((0.75 + 1) / 2), 2, 2)
    assert c.relative_cost(b, a, "tokens") == c.Ratio(None, 1, 2)
    alone = c.Arm("c", tuple(runs_of(write_run(tmp_path / "c", [2.5, 2.25], "seed=7"))))
    # against the means of b, 2.25 at 2000 tokens
    assert c.relative_cost(alone, b, "tokens") == c.Ratio(pytest.approx(1.0), 1, 1)


def test_a_loss_that_rises_again_is_no_cheaper_for_its_equal(tmp_path):
    """The baseline ends at 2.5, which it first had half way from 3 to 2: after 15 of 30 steps."""
    losses = [3, 2, 2.5]
    base, same, late = (
        c.Arm(name, tuple(runs_of(write_run(tmp_path / name, own, *words))))
        for name, own, words in (
            ("base", losses, ()),
            ("same", losses, ()),
            ("late", [3, 2.5, 2], ("seed=7",)),
        )
    )
    assert c.relative_cost(same, base, "tokens") == c.Ratio(pytest.approx(1.0), 1, 1)
    assert c.relative_cost(late, base, "tokens") == c.Ratio(pytest.approx(20 / 15), 1, 1)


def test_runs_of_other_lengths_are_compared_where_both_have_been(tmp_path):
    write_run(tmp_path / "short", [3.0, 2.5])
    write_run(tmp_path / "long", [3.2, 2.4, 1.9, 1.5])
    found = c.compare([tmp_path / "short", tmp_path / "long"])
    assert found.versus[0].budget == 2000
    assert found.versus[0].difference == pytest.approx(-0.1)
    assert any("read before their end" in note for note in found.notes)
    assert found.keys == {"train.steps": (20, 40)}


def test_by_seconds(tmp_path):
    write_run(tmp_path / "slow", [3.0, 2.0], seconds=3.0)
    write_run(tmp_path / "fast", [3.0, 2.5], "optim.learning_rate=0.1", seconds=1.5)
    row = c.compare([tmp_path / "slow", tmp_path / "fast"], "seconds").versus[0]
    assert row.budget == 30
    assert row.difference == pytest.approx(-0.5)  # 2.5, where the slow one still has 3.0


# Arms


def test_runs_that_differ_in_their_seed_are_one_arm(tmp_path):
    for seed in (2, 0, 1):
        words = (f"seed={seed}", f"logging.every={seed + 1}", "checkpoint.keep=5")
        write_run(tmp_path / "trials" / f"{7 - seed:03d}", [3.0, 2.0 + seed], *words)
    write_run(tmp_path / "trials" / "003", [3.0, 1.0], "moe.top_k=1", "moe.normalize_weights=False")
    found = c.compare([tmp_path])
    assert [[run.config.seed for run in arm.runs] for arm in found.arms] == [[0], [0, 1, 2]]
    names = [arm.name for arm in found.arms]
    assert names == [
        "moe.top_k=1 moe.normalize_weights=False",
        "moe.top_k=2 moe.normalize_weights=True",
    ]
    assert set(found.keys) == {"moe.top_k", "moe.normalize_weights"}
    assert list(found.versus[0].by_seed) == [0]


def test_equal_runs_are_told_apart_by_where_they_were_found(tmp_path):
    for folder, best in (("before", 2.0), ("after", 1.9)):
        for seed in (0, 1):
            write_run(tmp_path / folder / f"s{seed}", [3.0, best + seed], f"seed={seed}")
    found = c.compare([tmp_path / "before", tmp_path / "after"])
    assert [len(arm.runs) for arm in found.arms] == [2, 2]
    assert [arm.name.rpartition("/")[2] for arm in found.arms] != ["", ""]
    assert "before" in found.arms[0].name
    assert "after" in found.arms[1].name
    assert list(found.versus[0].by_seed.values()) == pytest.approx([-0.1, -0.1])
    one = tmp_path / "before" / "s0"
    assert len(load_runs([one, one, tmp_path / "before"])[0]) == 2  # each once
    copies = c.arms(runs_of(one, tmp_path / "after" / "s0"))
    assert len(copies) == 2


def test_the_first_path_is_what_others_are_held_against(tmp_path):
    write_run(tmp_path / "base", [3.0, 2.5])
    for rate, loss in ((0.1, 2.2), (0.2, 2.1), (0.3, 2.9)):
        words = f"optim.learning_rate={rate}"
        write_run(tmp_path / "sweep" / "trials" / f"{rate}", [3.0, loss], words)
    found = c.compare([tmp_path / "base", tmp_path / "sweep"])
    assert [arm.loss for arm in found.arms] == [2.5, 2.1, 2.2, 2.9]
    found = c.compare([tmp_path / "sweep", tmp_path / "base"])
    assert [arm.loss for arm in found.arms] == [2.1, 2.2, 2.9, 2.5]
