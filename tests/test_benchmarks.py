"""The benchmarks' own arithmetic and what they write; the measuring itself is not a test."""

import json
import sys
from pathlib import Path

import pytest
from test_compare import QUICKSTART, recorded_runs

from moejax.compare import Arm
from moejax.compare_runs import load_run
from moejax.config import Config
from moejax.overrides import apply_overrides
from moejax.workdir import open_workdir

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import common
    import compare
    import step

    yield common, compare, step
    for name in ("common", "compare", "step"):
        sys.modules.pop(name, None)


def test_table_replaces_what_is_between_the_markers(benchmarks, tmp_path):
    common, _, step = benchmarks
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{step.BEGIN}\nold\n{step.END}\nafter\n")
    rows = [common.Row("a", 1234.5, "tokens/s"), common.Row("b", 617.0, "tokens/s", "a", 0.5)]
    step.write_table(readme, rows)
    text = readme.read_text()
    assert text.startswith(f"before\n{step.BEGIN}\n")
    assert text.endswith(f"{step.END}\nafter\n")
    assert "old" not in text
    assert "| b | 617 tokens/s | 0.50 | a |" in text


def test_rows_reach_the_json(benchmarks, tmp_path, capsys):
    common, _, _ = benchmarks
    common.report("title", [common.Row("b", 617.0, "tokens/s", "a", 0.5)], tmp_path / "rows.json")
    row = json.loads((tmp_path / "rows.json").read_text())["rows"][0]
    assert row == {"name": "b", "value": 617.0, "unit": "tokens/s", "baseline": "a", "ratio": 0.5}
    assert "0.500" in capsys.readouterr().out


def _run(folder: Path, seed: int, losses: list[float]):
    """A run of 10 steps of 1 s between evaluations, 100 tokens a step."""
    workdir = open_workdir(folder / str(seed), apply_overrides(Config(), [f"seed={seed}"]))
    records = []
    for index, loss in enumerate(losses, start=1):
        step = {"step": 10 * index, "tokens_seen": 1000 * index}
        records.append({**step, "split": "train", "loss": loss, "step_seconds": 1.0})
        records.append({**step, "split": "eval", "loss": loss})
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    return load_run(workdir)


def test_compare_page_says_what_the_runs_say(benchmarks, tmp_path):
    """Margin 0.3 over a spread of 0.1; the MoE reaches the dense arm's 2.5 half way from 3 to 2."""
    _, compare, _ = benchmarks
    moe = tuple(_run(tmp_path / "moe", seed, [3.0, 2.0]) for seed in (0, 1, 2))
    ends = (2.5, 2.5, 2.6)
    dense = tuple(_run(tmp_path / "dense", seed, [3.1, end]) for seed, end in enumerate(ends))
    results = {
        "moe": compare.Result({3e-3: 2.2, 6e-3: 2.4}, 3e-3, Arm("MoE", moe)),
        "dense": compare.Result({3e-3: 2.6, 6e-3: 2.5}, 6e-3, Arm("dense", dense)),
    }
    configs = {arm: compare.load_config(str(ROOT / file)) for arm, file in compare.ARMS.items()}
    compare.write_page(tmp_path / "page.md", results, configs, [])
    text = (tmp_path / "page.md").read_text()
    assert "lower by **0.5333** nats on average, larger than" in text
    assert "of either arm (0.1000); seed by seed it is lower by 0.5000, 0.5000, 0.6000." in text
    assert "| learning rate chosen | 0.003 | 0.006 |" in text
    assert "with 0.73 of its tokens and 0.73 of its seconds" in text


def test_compare_page_of_finished_runs(benchmarks, tmp_path, monkeypatch):
    """What ran is not run again: the page of docs/quickstart.md, from its workdirs alone."""
    _, compare, _ = benchmarks
    monkeypatch.setattr(compare, "EXTENSIONS", 0)  # it was made without
    words = ["train.steps=900", "moe.capacity_factor=2.0"]
    recorded_runs(tmp_path, compare.ARMS, words)
    results = compare.run_arms(tmp_path, words)
    configs = {a: compare.load_config(str(ROOT / f), words) for a, f in compare.ARMS.items()}
    compare.write_page(tmp_path / "page.md", results, configs, words)
    text = (tmp_path / "page.md").read_text()
    for line in QUICKSTART:
        assert line in text
