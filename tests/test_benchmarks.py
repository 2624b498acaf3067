"""The benchmarks' own arithmetic and what they write; the measuring itself is not a test."""

import json
import sys
from pathlib import Path

import pytest

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


def _records(losses: list[float]) -> list[dict]:
    """A run of 10 steps of 1 s between evaluations, 100 tokens a step."""
    records = []
    for index, loss in enumerate(losses, start=1):
        step = {"step": 10 * index, "tokens_seen": 1000 * index}
        records.append({**step, "split": "train", "loss": loss, "step_seconds": 1.0})
        records.append({**step, "split": "eval", "loss": loss})
    return records


def test_compare_page_says_what_the_runs_say(benchmarks, tmp_path):
    """Margin 0.3 over a spread of 0.1; the MoE reaches the dense arm's 2.5 half way from 3 to 2."""
    _, compare, _ = benchmarks
    moe = compare.Arm({3e-3: 2.2, 6e-3: 2.4}, 3e-3, {s: _records([3.0, 2.0]) for s in (0, 1, 2)})
    dense = compare.Arm({3e-3: 2.6, 6e-3: 2.5}, 6e-3, {s: _records([3.1, 2.5]) for s in (0, 1)})
    dense.runs[2] = _records([3.1, 2.6])
    configs = {arm: compare.load_config(str(ROOT / file)) for arm, file in compare.ARMS.items()}
    compare.write_page(tmp_path / "page.md", {"moe": moe, "dense": dense}, configs, [])
    text = (tmp_path / "page.md").read_text()
    assert "lower by **0.5333** nats on average, larger than" in text
    assert "of either arm (0.1000); seed by seed it is lower by 0.5000, 0.5000, 0.6000." in text
    assert "| learning rate chosen | 0.003 | 0.006 |" in text
    assert "with 0.73 of its tokens and 0.73 of its seconds" in text
    costs = {10: 1000.0, 20: 2000.0}
    assert compare.cost_to_reach(costs, _records([3.0, 2.0]), 2.5) == pytest.approx(1500)
    assert compare.cost_to_reach(costs, _records([3.0, 2.0]), 1.0) is None
    compare.plot({"moe": moe, "dense": dense}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
