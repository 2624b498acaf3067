"""The harness of `python -m faults` itself: its table, its results, its page. No training here."""

import ast
import json
import random
import re
import subprocess
from pathlib import Path

import pytest

from faults import __main__ as harness
from faults import bench, page, restores, suite
from faults.bench import Bench, Broken, Outcome
from faults.results import Results
from faults.size import EXAMPLES, SIZES
from faults.suite import Suite, node_id
from faults.table import GROUPS, ROWS, Row

ROOT = Path(__file__).parents[1]


def test_every_row_of_the_matrix_is_there_once_and_has_what_makes_it():
    names = [row.name for rows in GROUPS.values() for row in rows]
    assert names[:59] == [str(n) for n in range(1, 60)]
    assert len(names) == len(set(names)) == len(ROWS)
    for row in ROWS.values():
        assert row.run is not None or row.tests, row.name
        assert all((row.fault, row.made, row.expected)), row.name


def test_every_test_that_is_named_is_there():
    """A test that was renamed is a row that nothing holds."""
    functions = {}
    for test in {test for row in ROWS.values() for test in row.tests}:
        file, _, name = node_id(test).partition("::")
        if file not in functions:
            tree = ast.parse((ROOT / file).read_text())
            functions[file] = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        assert name in functions[file], test


def test_what_has_to_be_made_often_is():
    assert [SIZES[form].kills for form in ("short", "full", "long")] == [10, 50, 200]
    assert (SIZES["full"].flips, SIZES["full"].writers) == (100, 20)
    assert SIZES["short"].flips == 100
    assert EXAMPLES == 1000


def _row(name: str, run) -> Row:
    return Row(name, "fault", "made | so", "expected", run)


@pytest.fixture
def table(monkeypatch):
    """Two rows of which the second fails until it is mended."""
    state = {"broken": True, "ran": []}

    def good(*_):
        state["ran"].append("1")
        return Outcome("seen", 3, 40, 1.25)

    def bad(*_):
        state["ran"].append("2")
        bench.expect(not state["broken"], "a committed step was lost")
        return Outcome("mended", 1)

    groups = {"Group": (_row("1", good), _row("2", bad))}
    rows = {row.name: row for row in groups["Group"]}
    for module in (harness, page):
        monkeypatch.setattr(module, "ROWS", rows)
    monkeypatch.setattr(page, "GROUPS", groups)
    monkeypatch.setattr(harness, "FIRST", ())
    monkeypatch.setattr(Bench, "prepare", lambda self: None)
    return state


def test_a_row_that_fails_fails_the_harness_which_then_goes_on(table, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "PAGE", tmp_path / "faults.md")
    words = ["--folder", str(tmp_path), "--jobs", "1"]
    assert harness.main(words) == 1
    text = (tmp_path / "faults.md").read_text()
    assert "FAILED: rows 2" in text
    assert "| **FAILED**: a committed step was lost | 0 |" in text
    with open(tmp_path / "full.jsonl", "a") as stream:
        stream.write('{"row": "2", "ses')  # the harness is killed while it writes
    table["broken"] = False
    assert harness.main(words) == 0
    assert table["ran"] == ["1", "2", "2"], "what held is not run again"
    text = (tmp_path / "faults.md").read_text()
    assert "all 2 rows hold; 40 losses compared" in text
    assert "| 1 | fault | made \\| so | expected | seen | 3 | 40 | 1.2 |" in text
    assert "`make faults-long` (200 kills) was not run yet." in text
    assert harness.main(words) == 0
    assert table["ran"][3:] == ["1", "2"], "the next session begins from the first row"
    assert harness.main([*words, "--only", "2"]) == 0
    assert table["ran"][5:] == ["2"]


def test_what_was_not_run_or_only_shortly_is_said(table, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "PAGE", tmp_path / "faults.md")
    words = ["--folder", str(tmp_path), "--jobs", "1", "--only", "1"]
    assert harness.main(words) == 0
    text = (tmp_path / "faults.md").read_text()
    assert "not run yet: rows 2; 40 losses" in text
    assert "| 2 | fault | made \\| so | expected | not run yet |" in text
    table["broken"] = False
    assert harness.main([*words[:-1], "2", "--form", "short"]) == 0
    assert harness.main(words) == 0
    text = (tmp_path / "faults.md").read_text()
    assert "all 2 rows hold; run in the short form only: rows 2; 40 losses" in text


def test_the_long_run_stands_on_the_page_until_the_next_one(table, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "PAGE", tmp_path / "faults.md")
    table["broken"] = False
    words = ["--folder", str(tmp_path), "--jobs", "1"]
    assert harness.main(words) == 0
    assert harness.main([*words, "--form", "long"]) == 0
    said = re.search(
        r"`make faults-long`, 20.*: 3 SIGKILLs, 40 losses compared.*seen\.",
        (tmp_path / "faults.md").read_text(),
    )
    assert said
    assert harness.main(words) == 0
    assert said[0] in (tmp_path / "faults.md").read_text()


def _write(workdir: Path, losses: list[float]) -> None:
    workdir.mkdir(exist_ok=True)
    lines = [
        json.dumps({"step": n + 1, "split": "train", "loss": loss, "step_seconds": loss})
        for n, loss in enumerate(losses)
    ]
    (workdir / "metrics.jsonl").write_text("\n".join([*lines, '{"step']) + "")


def test_losses_that_differ_in_the_last_bit_are_found(tmp_path, monkeypatch):
    made = Bench(tmp_path, 0)
    monkeypatch.setattr(made, "undisturbed", lambda steps: tmp_path / "straight")
    _write(tmp_path / "straight", [3.0, 2.0, 1.0])
    _write(tmp_path / "run", [3.0, 2.0])
    assert made.same(tmp_path / "run", whole=False) == 2
    with pytest.raises(Broken, match="are missing"):
        made.same(tmp_path / "run")
    _write(tmp_path / "run", [3.0, 2.0000000000000004, 1.0])
    with pytest.raises(Broken, match=r"SILENT WRONG RESUME: step \(2, 'train'\) differs"):
        made.same(tmp_path / "run")


def test_where_a_training_says_that_it_goes_on():
    said = "moejax: 3 parameters, resuming after step 1,240 of 2,000\nstep 1241/2000  loss 1"
    assert bench.resumed_after(said) == 1240
    assert bench.resumed_after("step 1/2000  loss 1") == 0


def test_one_bit_is_flipped(tmp_path):
    file = tmp_path / "file"
    for seed in range(20):
        file.write_bytes(bytes(100))
        restores.flip(file, random.Random(seed))
        assert sum(byte.bit_count() for byte in file.read_bytes()) == 1


def test_a_row_of_tests_is_what_became_of_them(tmp_path):
    """A test that was skipped alone, or never ran, holds nothing."""
    file = tmp_path / "tests.jsonl"

    def outcome(*lines: tuple[str, str]) -> Outcome:
        file.unlink(missing_ok=True)
        made = Suite(file, ["test_a.test_x"])
        text = [json.dumps({"test": t, "outcome": o, "why": ""}) for t, o in lines]
        file.write_text("\n".join(text))
        return made.outcome(("test_a.test_x",))

    name = "tests/test_a.py::test_x"
    assert outcome((f"{name}[1]", "passed"), (f"{name}[2]", "skipped")).seen == (
        "1 tests passed, 1 skipped"
    )
    with pytest.raises(Broken, match="all were skipped"):
        outcome((name, "skipped"))
    with pytest.raises(Broken, match=r"test_x\[2\]"):
        outcome((f"{name}[1]", "passed"), (f"{name}[2]", "failed"))
    with pytest.raises(Broken, match="pytest ended with 4"):
        outcome()


def test_a_test_that_failed_is_run_again_by_the_next_harness(tmp_path, monkeypatch):
    file, asked = tmp_path / "tests.jsonl", []
    lines = [("tests/test_a.py::test_x", "failed"), ("tests/test_a.py::test_y", "passed")]
    file.write_text(
        "".join(json.dumps({"test": t, "outcome": o, "why": ""}) + "\n" for t, o in lines)
    )

    def run(words, **_):
        asked.extend(words[words.index("slow or not slow") + 1 :])
        with open(file, "a") as stream:
            stream.writelines(
                json.dumps({"test": test, "outcome": "passed", "why": ""}) + "\n" for test in asked
            )
        return subprocess.CompletedProcess(words, 0, "what pytest said")

    monkeypatch.setattr(suite.subprocess, "run", run)
    both = ("test_a.test_x", "test_a.test_y")
    assert Suite(file, [*both]).outcome(both).seen == "2 tests passed"
    assert asked == ["tests/test_a.py::test_x"]
    assert (tmp_path / "tests-test_a.log").read_text() == "what pytest said"


def test_results_are_read_back(tmp_path):
    results = Results(tmp_path, "full")
    results.add("1", True, "seen", 1, 2, 0.123, 4.0)
    results.add("2", False, "broken", 0, 0, None, 1.0)
    again = Results(tmp_path, "full")
    assert again.passed() == {"1"}
    assert again.newest()["1"].seconds_lost == 0.12
    again.finish()
    assert Results(tmp_path, "full").passed() == set()
