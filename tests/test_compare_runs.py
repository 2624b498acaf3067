"""The runs of a comparison, written by hand: what they say while they live, and what is refused."""

import errno
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from moejax import compare_runs
from moejax import workdir as workdir_module
from moejax.cli import main
from moejax.compare import compare
from moejax.compare_runs import find_workdirs, load_run, seconds_at
from moejax.config import Config, ConfigError
from moejax.errors import StorageError
from moejax.overrides import apply_overrides
from moejax.store import Store, start_run
from moejax.workdir import CHECKPOINTS, COMMITTED, open_workdir


def write_run(path, losses, *words, tokens=100, seconds=1.0, steps=None):
    """A run that is evaluated every 10 of its steps, each of so many tokens and seconds."""
    words = [f"train.steps={steps or 10 * len(losses)}", *words]
    workdir = open_workdir(path, apply_overrides(Config(), words))
    records = []
    for index, loss in enumerate(losses, start=1):
        step = {"step": 10 * index, "tokens_seen": 10 * tokens * index}
        speed = {"step_seconds": seconds, "tokens_per_second": tokens / seconds}
        records.append({**step, "split": "train", "loss": loss, **speed})
        bits = None if loss is None else 2 * loss
        records.append({**step, "split": "eval", "loss": loss, "bits_per_byte": bits})
    write_lines(workdir, records)
    return workdir


def write_lines(workdir, records):
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))


def with_text(workdir, text):
    """Gives a workdir a checkpoint whose manifest names its validation text."""
    store = Store(workdir / CHECKPOINTS, start_run(workdir))
    folder = store.begin(10)
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "data").write_bytes(b"numbers")
    (folder / COMMITTED).write_text("")
    store.seal(10, {}, {}, {"validation": text})
    return workdir


def runs_of(*workdirs):
    return [load_run(workdir) for workdir in workdirs]


def test_seconds_are_those_of_steps(tmp_path):
    """Nothing for the step that compiles; then each line's pace, or the one before."""
    lines = [(1, None), (10, 2.0), (20, 4.0), (30, None), (40, 1.0)]
    records = [{"step": s, "split": "train", "step_seconds": seconds} for s, seconds in lines]
    # 9 steps of 2 s, 10 of 4, 10 of which only the 4 before is known, 10 of 1
    seconds_n = seconds_at(records, np.array([1, 10, 15, 20, 30, 40, 45]))
    np.testing.assert_allclose(seconds_n, [0, 18, 38, 58, 98, 108, 113])


# What runs look like while they live


def test_of_steps_that_were_done_again_the_last_line_counts(tmp_path):
    workdir = write_run(tmp_path / "a", [4.0, 3.0, 2.0])
    file = workdir / "metrics.jsonl"
    again = {"step": 20, "split": "train", "tokens_seen": 2000, "step_seconds": 5.0}
    evaluated = {"step": 20, "split": "eval", "tokens_seen": 2000, "loss": 2.9}
    with open(file, "a") as stream:
        stream.write(f"{json.dumps(again)}\n{json.dumps(evaluated)}\n" + '{"step": 30, "spl')
    (run,) = runs_of(workdir)
    assert run.step_n.tolist() == [10, 20]
    assert run.loss_n.tolist() == [4.0, 2.9]
    assert run.cost("seconds") == 10 + 50
    assert not run.complete


def test_a_run_in_training_is_told_as_such(tmp_path, capsys):
    write_run(tmp_path / "a", [3.0, 2.0])
    write_run(tmp_path / "b", [3.0, 2.2], steps=100)
    assert main(["compare", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "20 of 100" in shown
    assert "note: not complete: " in shown


def test_a_loss_that_is_not_finite_is_last_and_says_so(tmp_path, capsys):
    write_run(tmp_path / "a", [3.0, None])
    write_run(tmp_path / "b", [3.0, 2.0], "optim.learning_rate=0.1")
    assert main(["compare", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\n b .*\n a .*not finite", shown)
    assert "note: the last loss is not finite: " in shown


def test_forced_routing_and_other_evaluations_are_noted(tmp_path):
    write_run(tmp_path / "a", [3.0, 2.0])
    forced = write_run(tmp_path / "b", [3.0], "eval.batches=3")
    evaluated = {"step": 10, "split": "eval", "tokens_seen": 1, "loss": 1.0}
    write_lines(forced, [{**evaluated, "forced_routing": "balanced"}])
    notes = compare([tmp_path]).notes
    assert any("routing was forced" in note for note in notes)
    assert any("different numbers of tokens" in note for note in notes)


# What cannot be compared


def test_what_is_no_run_is_refused(tmp_path, capsys):
    run = str(write_run(tmp_path / "a", [3.0, 2.0]))
    (tmp_path / "empty").mkdir()
    for words, error in (
        ([], "no run to compare; give workdirs or sweeps"),
        ([run], f"only one run to compare, {run}; give another workdir, or a sweep"),
        ([run, str(tmp_path / "none")], "none does not exist; give a workdir"),
        ([run, str(tmp_path / "empty")], "empty has no run in it; give a workdir"),
        ([run, "--by", "hours"], "--by: invalid choice: 'hours'"),
        ([run, run, "--reach", "-1"], "--reach: '-1' is not a number above 0"),
    ):
        assert main(["compare", *words]) == 2
        assert error in capsys.readouterr().err


def test_a_run_without_metrics_is_refused_where_it_is_named(tmp_path):
    a = write_run(tmp_path / "a", [3.0, 2.0])
    b = write_run(tmp_path / "b", [3.0, 2.2], "optim.learning_rate=0.1")
    new = open_workdir(tmp_path / "new", Config())
    with pytest.raises(ConfigError, match=r"new has no metrics yet; train it .*, or leave it out"):
        compare([a, new])
    train = {"step": 7, "split": "train", "tokens_seen": 1, "loss": 1.0}
    write_lines(new, [train])
    message = "not evaluated up to step 7, with eval.every=100 and train.steps=1000; wait for it"
    with pytest.raises(ConfigError, match=message):
        compare([a, new])
    (tmp_path / "two").mkdir()
    for workdir in (a, new):
        (tmp_path / "two" / workdir.name).symlink_to(workdir)
    with pytest.raises(
        ConfigError, match=r"only one run to compare, .*two/a \(left out: .*new was"
    ):
        compare([tmp_path / "two"])
    found = compare([tmp_path])  # in a folder it may be a trial that failed
    assert len(found.runs) == 2
    assert any(note.startswith(f"left out: {new} was not evaluated") for note in found.notes)
    with pytest.raises(ConfigError, match="has no loss_at_capacity; give another --metric"):
        compare([a, b], metric="loss_at_capacity")
    for workdir in (a, b):
        (workdir / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"no run under .* can be compared: left out: .*no met"):
        compare([tmp_path])


def test_a_damaged_line_is_refused(tmp_path):
    workdir = write_run(tmp_path / "a", [3.0, 2.0])
    lines = (workdir / "metrics.jsonl").read_text()
    (workdir / "metrics.jsonl").write_text("{broken\n" + lines)
    with pytest.raises(ConfigError, match=r"line 1 is not a record .*; delete that line"):
        load_run(workdir)


def failing(function, name, code=errno.EIO):
    """The function, on a disk that fails for paths with `name` in them."""

    def call(path, *rest, **options):
        if name in str(path):
            raise OSError(code, "Input/output error", str(path))
        return function(path, *rest, **options)

    return call


@pytest.mark.parametrize("reads", ["read_config", "read_metrics"])
def test_a_disk_that_fails_costs_its_own_run_only(reads, tmp_path, monkeypatch):
    for name in ("a", "b", "bad"):
        write_run(tmp_path / name, [3.0, 2.0], f"moe.top_k={1 + len(name)}", f"seed={ord(name[0])}")
    inner = "moejax.workdir.read_file" if reads == "read_config" else "moejax.compare_runs." + reads
    module, _, name = inner.rpartition(".")
    monkeypatch.setattr(inner, failing(getattr(sys.modules[module], name), "/bad"))
    found = compare([tmp_path])
    assert sorted(run.workdir.name for run in found.runs) == ["a", "b"]
    assert any(re.match("left out: .*bad.*nput/output error", note) for note in found.notes)
    with pytest.raises(StorageError, match=r"bad.* cannot be read: .*nput/output error"):
        compare([tmp_path / "a", tmp_path / "bad"])


def test_a_disk_that_fails_where_runs_are_looked_for_costs_its_own_run_only(tmp_path, monkeypatch):
    for name in ("a", "b", "bad"):
        write_run(tmp_path / name, [3.0, 2.0], f"moe.top_k={1 + len(name)}", f"seed={ord(name[0])}")
    for module, name in ((Path, "is_file"), (workdir_module, "read_file")):
        monkeypatch.setattr(module, name, failing(getattr(module, name), "/bad"))
    found = compare([tmp_path])
    assert sorted(run.workdir.name for run in found.runs) == ["a", "b"]
    assert any(re.match("left out: .*bad.*nput/output error", note) for note in found.notes)


def test_a_folder_that_may_not_be_entered_is_left_out(tmp_path, monkeypatch):
    """Such as the lost+found of a disk."""
    for name in ("a", "b"):
        write_run(tmp_path / name, [3.0, 2.0], f"seed={ord(name)}")
    (tmp_path / "lost+found").mkdir()
    refused = failing(Path.is_file, "lost+found", errno.EACCES)
    monkeypatch.setattr(Path, "is_file", refused)
    monkeypatch.setattr(os, "access", lambda path, mode: "lost+found" not in str(path))
    found = compare([tmp_path])
    assert sorted(run.workdir.name for run in found.runs) == ["a", "b"]
    assert any("lost+found is not yours to read; ask its owner" in note for note in found.notes)


def test_a_file_server_that_fails_leaves_the_text_unknown(tmp_path, monkeypatch):
    for name in ("a", "b"):
        with_text(write_run(tmp_path / name, [3.0, 2.0], f"seed={ord(name)}"), "1" * 64)
    for function in ("read_manifest", "committed_steps"):
        with monkeypatch.context() as patch:
            inner = getattr(compare_runs, function)
            patch.setattr(compare_runs, function, failing(inner, "/b/", errno.ESTALE))
            notes = compare([tmp_path]).notes
        assert any("no checkpoint says yet which text" in note for note in notes)


def test_a_folder_on_a_disk_that_fails_is_named(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(compare_runs, "_find_workdirs", failing(lambda path: [path], ""))
        with pytest.raises(StorageError, match="cannot be read: Input/output error; see whether"):
            compare([tmp_path])


def test_another_vocabulary_is_refused(tmp_path):
    write_run(tmp_path / "a", [3.0, 2.0])
    write_run(tmp_path / "b", [3.0, 2.0], "data.tokenizer=x.json", "model.vocab_size=999")
    message = r"another vocabulary \(data.tokenizer 'bytes' and 'x.json', model.vocab_size 264 and"
    with pytest.raises(ConfigError, match=f"{message} 999.*compare --metric bits_per_byte"):
        compare([tmp_path])
    found = compare([tmp_path], metric="bits_per_byte")
    assert found.arms[0].loss == 4.0
    with_text(tmp_path / "a", "1")
    found = compare([tmp_path], metric="bits_per_byte")
    assert any("that the text is the same is on you" in note for note in found.notes)


def test_another_text_is_refused(tmp_path):
    """By the fingerprint where checkpoints tell, whatever the paths say; else by the paths."""
    prepared = ("data.source=prepared", "data.path=there")
    a = with_text(write_run(tmp_path / "a", [3.0, 2.0]), "1" * 64)
    b = with_text(write_run(tmp_path / "b", [3.0, 2.5], "optim.learning_rate=0.1"), "2" * 64)
    with pytest.raises(
        ConfigError, match=r"another text \(fingerprints 111111111111 and 22.*same Python where"
    ):
        compare([a, b])
    same = with_text(write_run(tmp_path / "same", [3.0, 2.0], *prepared), "1" * 64)
    assert not [n for n in compare([a, same]).notes if "text" in n]
    new = write_run(tmp_path / "new", [3.0, 2.0], *prepared)
    with pytest.raises(
        ConfigError, match=r"another text \(data.source 'embedded' and 'prepared', data.path None"
    ):
        compare([a, new])
    assert any("which text was evaluated" in note for note in compare([same, new]).notes)


def test_a_run_whose_config_is_gone_is_not_left_out(tmp_path):
    """Its checkpoint has the config."""
    for name in ("a", "b"):
        shutil.copytree(Path(__file__).parent / "data" / "format_1", tmp_path / name)
    (tmp_path / "notes").mkdir()
    (tmp_path / "a" / "config.json").unlink()
    assert find_workdirs(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    assert find_workdirs(tmp_path / "a") == [tmp_path / "a"]
    with pytest.raises(ConfigError, match="notes has no run in it"):
        find_workdirs(tmp_path / "notes")
