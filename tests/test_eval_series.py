"""Which checkpoints of a run that trains elsewhere are evaluated: each once. Without JAX."""

import json
import shutil

import pytest
from hostile import file_limit
from test_store import add

from moejax.config import Config
from moejax.errors import UNAVAILABLE, ConfigError, UnavailableError
from moejax.eval_series import (
    EVAL_SERIES,
    Series,
    Watching,
    find_checkpoints,
    read_series,
    recipe_id,
    wait_for_config,
    watch,
)
from moejax.overrides import apply_overrides
from moejax.store import Store, start_run
from moejax.workdir import CHECKPOINTS, open_workdir

RECIPE = recipe_id({"data": "text"})


class Run:
    """A workdir and a clock: what a training does happens while the watch sleeps."""

    def __init__(self, workdir, later=()):
        self.workdir, self.later, self.now = workdir, list(later), 0.0
        self.run = start_run(workdir)
        self.root = workdir / CHECKPOINTS
        self.evaluated = []

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.later:
            self.later.pop(0)()

    def save(self, step: int, content: int | None = None) -> None:
        add(self.root, step, content, run=self.run)
        if content is not None:  # other parameters, at the same step
            folder = self.root / str(step)
            (folder / "MANIFEST.json").unlink()
            (folder / "model" / "data").write_bytes(b"%d" % content)
            Store(self.root, self.run).seal(step, {}, {}, {})

    def evaluate(self, step: int, checkpoint: str):
        self.evaluated.append(step)
        return {"step": step, "checkpoint": checkpoint, "recipe": RECIPE, "n": len(self.evaluated)}

    def watch(self, recipe: str = RECIPE) -> int:
        how = Watching(10, 100, self.sleep, lambda: self.now)
        with Series(self.workdir, recipe) as series:
            return watch(self.workdir, series, self.evaluate, how)


@pytest.fixture
def run(tmp_path):
    config = apply_overrides(Config(), ["train.steps=40"])
    return Run(open_workdir(tmp_path / "run", config))


def test_each_checkpoint_is_evaluated_once_until_the_last_step(run):
    run.save(10)
    run.later = [lambda: run.save(20), lambda: None, lambda: (run.save(30), run.save(40))]
    assert run.watch() == 4
    assert run.evaluated == [10, 20, 30, 40]
    assert [line["step"] for line in read_series(run.workdir, RECIPE)] == [10, 20, 30, 40]
    assert run.watch() == 0, "a second watch has nothing to do"
    assert len((run.workdir / EVAL_SERIES).read_text().splitlines()) == 4


def test_a_killed_watch_goes_on_and_a_torn_line_is_done_again(run):
    for step in (10, 20, 40):
        run.save(step)
    assert run.watch() == 3
    file = run.workdir / EVAL_SERIES
    file.write_bytes(file.read_bytes()[:-20])  # killed while it wrote of step 40
    assert run.watch() == 1
    assert run.evaluated == [10, 20, 40, 40]
    assert [line["step"] for line in read_series(run.workdir)] == [10, 20, 40]


def test_after_a_rollback_the_new_checkpoint_of_the_same_step_is_evaluated(run):
    run.save(10)
    run.save(20)

    def roll_back() -> None:
        Store(run.root, run.run).delete(20)

    run.later = [roll_back, lambda: run.save(20, 7), lambda: run.save(40)]
    assert run.watch() == 4
    assert run.evaluated == [10, 20, 20, 40]
    steps = {line["step"]: line["n"] for line in read_series(run.workdir)}
    assert steps == {10: 1, 20: 3, 40: 4}, "of step 20 the later one counts"


def test_a_checkpoint_that_was_renamed_or_damaged_is_not_waited_for(run):
    run.save(10)
    run.save(20)
    shutil.move(run.root / "20", run.root / "20.corrupt")
    run.save(30)
    (run.root / "30" / "MANIFEST.json").write_text("{")
    run.save(40)
    assert run.watch() == 2
    assert run.evaluated == [10, 40]


def test_one_that_goes_away_is_passed_over_and_tried_no_more(run):
    run.save(10)
    run.save(40)
    tried = []

    def evaluate(step, checkpoint):
        tried.append(step)
        return None if step == 10 else Run.evaluate(run, step, checkpoint)

    run.evaluate = evaluate
    assert run.watch() == 1
    assert tried == [10, 40]


def test_another_recipe_is_another_series_in_the_same_file(run):
    run.save(40)
    assert run.watch() == 1
    other = recipe_id({"data": "other text"})
    with Series(run.workdir, other) as series:
        assert find_checkpoints(run.workdir)[40] not in series
        series.append({"step": 40, "checkpoint": "c", "recipe": other})
    assert run.watch() == 0
    assert len(read_series(run.workdir)) == 2
    assert [line["recipe"] for line in read_series(run.workdir, other)] == [other]


def test_two_watches_of_one_run_are_refused(run):
    message = "another moejax eval --watch writes .*; end that one first"
    with Series(run.workdir, RECIPE), pytest.raises(ConfigError, match=message):
        Series(run.workdir, RECIPE).__enter__()
    with Series(run.workdir, RECIPE):
        pass


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"eval.jsonl cannot be written: No such .*; make the"):
        Series(tmp_path / "nothing", RECIPE).__enter__()


def test_a_full_disk_is_an_input_error(run):
    with (
        Series(run.workdir, RECIPE) as series,
        file_limit(0),
        pytest.raises(ConfigError, match=r"eval\.jsonl cannot be written: File too large; mak"),
    ):
        series.append({"step": 40, "checkpoint": "c", "recipe": RECIPE})


def test_the_watch_gives_up_when_nobody_trains(run):
    """100 s without a sign of life end it; a line of the ledger is one."""
    run.save(10)
    alive = [lambda n=n: (run.workdir / "ledger.jsonl").write_text("x" * n) for n in range(20)]
    run.later = alive
    with pytest.raises(UnavailableError, match=r"step 10\); .* give the same command") as caught:
        run.watch()
    assert caught.value.code == UNAVAILABLE
    assert run.now == pytest.approx(20 * 10 + 100, abs=10)


def test_it_waits_for_a_training_that_has_not_begun(tmp_path, capsys):
    how = Watching(1, 5, lambda _: None, iter(range(100)).__next__)
    with pytest.raises(ConfigError, match="does not exist; give that of a run"):
        wait_for_config(tmp_path / "nothing", how)
    with pytest.raises(UnavailableError, match="it has no checkpoint"):
        wait_for_config(tmp_path, how)

    begins = Watching(1, 5, lambda _: open_workdir(tmp_path, Config()) and None, lambda: 0.0)
    wait_for_config(tmp_path, begins)
    assert "waiting for a training to begin" in capsys.readouterr().err
    wait_for_config(tmp_path, Watching(sleep=lambda _: pytest.fail("nothing to wait for")))


def test_lines_that_are_no_evaluations_are_left_out(run):
    lines = [{"step": 1}, [1], {"step": 2, "checkpoint": "c", "recipe": "r"}]
    text = "\n".join(map(json.dumps, lines))
    (run.workdir / EVAL_SERIES).write_text(f"{text}\nnot JSON\n")
    assert [line["step"] for line in read_series(run.workdir)] == [2]
