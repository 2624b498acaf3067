"""Sweeps: which trial is next, what a killed one leaves, the ranking, and real trainings."""

import contextlib
import csv
import errno
import io
import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from moejax.cli import main
from moejax.config import ConfigError
from moejax.errors import BAD_INPUT, CHECK_FAILED, DIVERGED, NO_SPACE, UNAVAILABLE
from moejax.lock import RunLock
from moejax.metrics import read_metrics
from moejax.overrides import load_config
from moejax.supervisor import Forwarding
from moejax.sweep import Options, SlurmWorkers, _show_plan, table
from moejax.sweep import _run as run_workers
from moejax.sweep_report import _listed, _places, estimate, ranking, verdict, write_report
from moejax.sweep_runs import prepare, sweep_from_json
from moejax.sweep_space import Adaptive, Between, Cases, Grid, Objective, Sweep
from moejax.sweep_study import (
    Job,
    Study,
    TrialRecord,
    claim,
    create,
    open_study,
    shown_url,
    storage_url,
)
from moejax.sweep_worker import (
    core_share,
    describe_failure,
    gpu_share,
    is_behind,
    run_trial,
    wait_until_free,
)
from moejax.workdir import read_config

ROOT = Path(__file__).parents[1]
K, RATE = "moe.top_k", "optim.learning_rate"


def made(space, **fields):
    return prepare(Sweep("quickstart.py", space, **fields), ROOT / "configs", {})


@pytest.fixture
def study_of(tmp_path) -> Iterator[Callable]:
    """Returns `(space, **fields) -> Study` in `tmp_path`; nothing is trained."""
    with contextlib.ExitStack() as stack:

        def study_of(space, **fields) -> Study:
            study = create(tmp_path / "s", made(space, **fields), None)
            return stack.enter_context(contextlib.closing(study))

        yield study_of


def take(study: Study) -> Job:
    job = study.take()
    assert isinstance(job, Job)
    return job


def finish(study: Study, value: Callable[[Job], float]) -> list[Job]:
    """Completes trials until there is none left."""
    jobs = []
    while isinstance(job := study.take(), Job):
        study.complete(job.trial, [value(job)])
        os.close(job.claim)
        jobs.append(job)
    assert job == "done"
    return jobs


# Which trial is next


def test_a_list_is_tried_seed_by_seed(study_of):
    study = study_of(Grid({K: [2, 4, 8]}), seeds=(5, 6))
    jobs = finish(study, lambda job: 1.0)
    tried = [(job.run.config.moe.top_k, job.run.config.seed) for job in jobs]
    assert tried == [(2, 5), (4, 5), (8, 5), (2, 6), (4, 6), (8, 6)]
    assert [job.number for job in jobs] == list(range(6))


def test_a_claimed_trial_is_nobody_elses_until_its_owner_dies(study_of):
    study = study_of(Grid({K: [2, 4]}))
    first, second = take(study), take(study)
    assert study.take() == "wait"
    os.close(first.claim)  # what the kernel does for a process that dies
    again = take(study)
    assert again.number == first.number == 0
    assert again.run == first.run
    study.complete(again.trial, [1.0])
    study.fail(second.trial, "exit code 2: bad" + 2000 * "!")
    assert study.take() == "done"
    states = [(r.state, r.values, r.error) for r in study.records()]
    said = "exit code 2: bad" + 984 * "!" + " ..."  # the reason stands at the beginning
    assert states == [("complete", (1.0,), None), ("failed", (), said)]


def test_a_trial_whose_workers_die_is_given_up(study_of):
    study = study_of(Grid({K: [2]}))
    for _ in range(5):
        os.close(take(study).claim)
    assert study.take() in ("wait", "done")
    (record,) = study.records()
    assert record.state == "failed"
    assert "died 5 times without a newer checkpoint" in record.error


def test_a_failed_trial_is_tried_again_in_its_place(study_of, tmp_path):
    """Under its number, so from its checkpoint; only what crashed, unless all are asked for."""
    study = study_of(Grid({K: [2, 4, 8]}))
    for crashed, value in ((True, None), (False, None), (False, 1.0)):
        job = take(study)
        if value is None:
            study.fail(job.trial, "exit code 1: no", crashed=crashed)
        else:
            study.complete(job.trial, [value])
        os.close(job.claim)
    assert [r.number for r in study.retry("crashed")] == [0]
    assert [r.state for r in study.records()] == ["waiting", "failed", "complete"]
    assert study.retry("crashed") == [], "it waits already"
    job = take(study)
    assert (job.number, job.run.config.moe.top_k) == (0, 2)
    assert study.trial_dir(job.number).name == "000"
    os.close(job.claim)  # its worker dies: the next one takes the same
    job = take(study)
    assert job.number == 0
    study.fail(job.trial, "exit code 1: again", crashed=True)
    assert study.retry("crashed") == [], "its worker is just about to let go of it"
    os.close(job.claim)
    assert [r.number for r in study.retry("all")] == [0, 1]
    assert [job.number for job in finish(study, lambda job: 2.0)] == [0, 1]
    assert [(r.number, r.state, r.error) for r in study.records()] == [
        (number, "complete", None) for number in range(3)
    ]
    with contextlib.closing(open_study(tmp_path / "s", None)) as again:
        assert len(again.records()) == 3
        assert again.take() == "done", "none is put there anew"


@pytest.mark.filterwarnings("ignore:os.fork")  # JAX runs here, and in no worker of a sweep
def test_a_trial_that_crashes_is_told_from_one_that_cannot_be(study_of, monkeypatch):
    """By the exit code of its training: bad input and divergence are its config's."""
    study = study_of(Grid({K: [2, 3, 4, 5]}))
    crashed = []
    for code in (BAD_INPUT, DIVERGED, 1, NO_SPACE):
        command = [sys.executable, "-c", f"raise SystemExit({code})"]
        monkeypatch.setattr("moejax.sweep_worker._command", lambda *_, command=command: command)
        with Forwarding() as signals:
            run_trial(study, job := take(study), signals, None)
        os.close(job.claim)
        crashed.append(study.records()[job.number].crashed)
    assert crashed == [False, False, True, True]


def test_a_search_without_a_complete_trial_ends(study_of, capsys, monkeypatch):
    """No base config is trained that there is nothing to compare with."""
    study = study_of(Adaptive({K: [2, 4]}, 2, startup=1), seeds=(0, 1), finalists=1)
    while isinstance(job := study.take(), Job):
        study.fail(job.trial, "exit code 17: diverged")
        os.close(job.claim)
    assert job == "done"
    assert [r.stage for r in study.records()] == ["search", "search"]

    class NoWorkers:
        def __init__(self, *_):
            pass

        def left(self) -> bool:
            return False

    monkeypatch.setattr("moejax.sweep.LocalWorkers", NoWorkers)
    assert run_workers(study, Options(study.workdir)) == CHECK_FAILED
    said = capsys.readouterr().err
    assert "no trial is complete (2 failed); trial 000: exit code 17: diverged; see" in said
    assert "--resume --retry_failed all tries them again" in said


def test_a_sweep_from_before_a_key_is_resumed(study_of, tmp_path, capsys):
    space = Grid({K: [2]})
    study_of(space).close()
    file = tmp_path / "s/sweep.json"
    data = json.loads(file.read_text())
    del data["base"]["moe.expert_dropout"]
    del data["sweep"]["finalists"]
    file.write_text(json.dumps(data))
    with contextlib.closing(open_study(tmp_path / "s", None, made(space))) as study:
        _show_plan(study)
    assert "keys that are newer than this sweep have their defaults: moe.expert_dropout=0" in (
        capsys.readouterr().out
    )
    other = made(space, fixed={"moe.expert_dropout": 0.1})
    with pytest.raises(ConfigError, match=r"another sweep \(moe.expert_dropout 0.0 -> 0.1, fixed"):
        open_study(tmp_path / "s", None, other)


def test_what_was_tried_is_found_again_and_the_rest_added(study_of, tmp_path):
    study = study_of(Grid({K: [2, 4]}))
    job = take(study)
    study.complete(job.trial, [1.5])
    space = made(Grid({K: [2, 4]}))
    with contextlib.closing(open_study(tmp_path / "s", None, space)) as again:
        assert [(r.state, r.values) for r in again.records()] == [
            ("complete", (1.5,)),
            ("waiting", ()),
        ]


def test_a_search_learns_and_its_finalists_meet_the_base_on_other_seeds(study_of):
    """The loss is least at a rate of 0.01; the base has 0.003."""
    space = Adaptive({RATE: Between(1e-5, 1.0, log=True)}, 16, startup=6)
    study = study_of(space, seeds=(0, 1, 2), finalists=2)

    def loss(job: Job) -> float:
        config = job.run.config
        return abs(np.log10(config.optim.learning_rate) + 2) + 0.001 * config.seed

    jobs = finish(study, loss)
    records = study.records()
    searched = [r for r in records if r.stage == "search"]
    assert len(searched) == 16
    assert {r.seed for r in searched} == {0}
    random, late = [r.values[0] for r in searched[:6]], [r.values[0] for r in searched[-6:]]
    assert np.median(late) < 0.6 * np.median(random), "it learns"
    rest = [(r.stage, r.seed) for r in records if r.stage != "search"]
    assert rest == [("base", 1), ("base", 2)] + 2 * [("final", 1)] + 2 * [("final", 2)]
    best = sorted(searched, key=lambda r: r.values)[:2]
    assert [r.point for r in records if r.stage == "final"][:2] == [r.point for r in best]
    assert jobs[-1].run.config.train.steps == 600, "nothing else changed"

    rows = ranking(records, study.sweep)
    assert rows[-1].name == "base"
    assert "beats the base config" in verdict(rows, study.sweep)


def test_a_search_ends_when_all_points_were_tried(study_of):
    study = study_of(Adaptive({K: [2, 4]}, 10, startup=1))
    assert sorted(job.run.config.moe.top_k for job in finish(study, lambda job: 1.0)) == [2, 4]


def test_a_pruner_stops_what_is_behind(study_of):
    study = study_of(Adaptive({RATE: Between(0.1, 0.2)}, 8, pruner="halving"))
    kept = []
    for value in (1.0, 2.0, 3.0, 4.0, 0.5):
        job = take(study)
        job.trial.report(value, 150)
        kept.append(not job.trial.should_prune())
        if kept[-1]:
            study.complete(job.trial, [value])
        else:
            study.prune(job.trial)
    assert kept[0]
    assert kept[-1], "the best so far"
    assert not all(kept)
    assert [r.state for r in study.records()].count("pruned") == kept.count(False)


def test_finalists_are_never_stopped(study_of, tmp_path):
    """The search ends what is behind; the trainings that are compared at its end all finish."""
    space = Adaptive({RATE: Between(0.1, 0.2)}, 4, startup=1, pruner="halving")
    study = study_of(space, seeds=(0, 1, 2), finalists=1)
    stopped = []
    while isinstance(job := study.take(), Job):
        value = float(job.number)  # each is worse than all before
        (folder := tmp_path / str(job.number)).mkdir()
        record = {"step": 150, "split": "eval", "loss": value}
        (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        stopped.append((job.stage, is_behind(study, job, folder)))
        if stopped[-1][1]:
            study.prune(job.trial)
        else:
            study.complete(job.trial, [value])
        os.close(job.claim)
    assert stopped[:4] == [("search", False)] + [("search", True)] * 3
    assert sorted(stopped[4:]) == [("base", False)] * 2 + [("final", False)] * 2
    assert "did not beat the base config" in verdict(
        ranking(study.records(), study.sweep), study.sweep
    )


def test_a_training_is_not_stopped_at_its_end(study_of, tmp_path):
    """Successive halving has a rung at step 450, and one at the last of 450 or 451 steps."""
    stopped = []
    for steps in (450, 451):
        space = Adaptive({RATE: Between(0.1, 0.2)}, 3, startup=1, pruner="halving")
        prepared = made(space, fixed={"train.steps": steps})
        with contextlib.closing(create(tmp_path / str(steps), prepared, None)) as study:
            for value in (1.0, 2.0, 3.0):
                job = take(study)
                (folder := study.trial_dir(job.number)).mkdir()
                record = {"step": 450, "split": "eval", "loss": value}
                (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
                stopped.append(is_behind(study, job, folder))
                study.complete(job.trial, [value])
                os.close(job.claim)
    assert stopped == 3 * [False] + [False, True, True]


def test_the_table_shows_what_a_terminal_cannot_be_steered_by(study_of):
    study = study_of(Grid({K: [2, 4]}))
    job = take(study)
    study.fail(job.trial, "exit code 1: [/bold] \x1b[2J")
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(study, study.records()))
    text = console.export_text()
    assert "1 failed, 1 waiting" in text
    assert "000" in text
    assert "[/bold] \\x1b[2J" in text


def test_the_table_stays_short_with_many_workers(study_of):
    study = study_of(Grid({K: [2]}))
    for workers, ended in ((3, 17), (20, 0), (30, 0)):
        states = ["complete"] * 50 + ["running"] * workers
        records = [record(i, {K: 2}, 0, 1.0)._replace(state=s) for i, s in enumerate(states)]
        assert table(study, records).row_count == workers + ended


# Errors


def test_a_workdir_has_one_sweep(study_of, tmp_path):
    study_of(Grid({K: [2]}))
    other = made(Grid({K: [2, 4]}), fixed={"train.steps": 9})
    with pytest.raises(ConfigError, match=r"another sweep \(train.steps 600 -> 9, space, fixed\)"):
        open_study(tmp_path / "s", None, other)
    with pytest.raises(ConfigError, match="give the workdir of a `moejax sweep`"):
        open_study(tmp_path, None)


def test_a_storage_that_cannot_be_reached_is_named_without_its_password(tmp_path):
    space = made(Grid({K: [2]}))
    with pytest.raises(ConfigError, match=r"cannot be reached: unable to open database file; "):
        create(tmp_path / "a", space, f"sqlite:///{tmp_path}/none/x.db")
    with pytest.raises(ConfigError, match=r"mysql\+nothing://me:\*\*\*@h/x cannot be"):
        create(tmp_path / "b", space, "mysql+nothing://me:secret@h/x")
    with pytest.raises(ConfigError, match=r"cannot be reached: .*check the URL"):
        create(tmp_path / "c", space, "nonsense")
    assert shown_url("postgresql://me:a@b@h:5/x") == "postgresql://me:***@h:5/x"


def test_a_sweep_without_room_has_the_exit_code_of_it(tmp_path, monkeypatch):
    def full(file, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("moejax.sweep_study.write_atomically", full)
    with pytest.raises(ConfigError, match=r"written: No space .*another --workdir") as seen:
        create(tmp_path / "full", made(Grid({K: [2]})), None)
    assert seen.value.code == NO_SPACE


def test_a_workdir_that_cannot_be_used_is_named(tmp_path):
    space = made(Grid({K: [2]}))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written: .*; give another --workdir"):
        create(tmp_path / "file", space, None)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ConfigError, match=r"sweep.json cannot be read: "):
        open_study(tmp_path, None)


def test_one_sweep_at_a_time(study_of, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    study_of(Grid({"moe.capacity_factor": [1.0, None]}))
    held = claim(tmp_path / "s/claims/sweep")
    assert held is not None
    monkeypatch.setattr("moejax.sweep.load_sweep", lambda *_: read_sweep(tmp_path / "s"))
    line = ["sweep", "configs/sweeps/capacity.py", "--workdir", str(tmp_path / "s"), "--resume"]
    assert main(line) == BAD_INPUT
    assert "is in use by another `moejax sweep`" in capsys.readouterr().err
    os.close(held)


def test_a_storage_that_is_lost_ends_with_what_to_do(study_of, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    study_of(Grid({K: [2]}))
    monkeypatch.setattr("moejax.sweep.load_sweep", lambda *_: read_sweep(tmp_path / "s"))

    def lose(study: Study, _):
        with contextlib.closing(sqlite3.connect(study.workdir / "sweep.db")) as database:
            database.execute("drop table trials")
        study.records()

    monkeypatch.setattr("moejax.sweep._run", lose)
    line = ["sweep", "configs/sweeps/capacity.py", "--workdir", str(tmp_path / "s"), "--resume"]
    assert main(line) == UNAVAILABLE
    said = capsys.readouterr().err
    assert "was lost: no such table: trials; its trainings save and end; see" in said


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(ConfigError, match=r"x cannot be locked \(Function .* that locks \(Lustre"):
        claim(tmp_path / "x")
    with pytest.raises(ConfigError, match="next cannot be locked"):
        create(tmp_path / "s", made(Grid({K: [2]})), None)


def read_sweep(workdir: Path):
    return sweep_from_json(json.loads((workdir / "sweep.json").read_text()))


def test_without_optuna_the_remedy_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "optuna", None)
    for name in ("sweep", "sweep_report", "sweep_study", "sweep_worker"):
        monkeypatch.delitem(sys.modules, f"moejax.{name}")
    line = ["sweep", "configs/sweeps/capacity.py", "--workdir", str(tmp_path / "s")]
    assert main(line) == BAD_INPUT
    assert "pip install 'moejax[sweep]'" in capsys.readouterr().err


def test_slurm_without_its_programs_or_its_script(study_of, tmp_path, monkeypatch):
    study = study_of(Grid({K: [2]}))
    options = Options(study.workdir, launcher="slurm")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no sbatch here"):
        SlurmWorkers(study, options)
    monkeypatch.setattr("moejax.sweep.__file__", str(tmp_path / "site/moejax/sweep.py"))
    with pytest.raises(ConfigError, match="in the repository and not in the package"):
        SlurmWorkers(study, options)


def test_no_server_at_a_port(tmp_path):
    pytest.importorskip("psycopg", reason="no psycopg; get it: pip install 'moejax[postgres]'")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConfigError, match=r"me:\*\*\*@127.0.0.1.*cannot be reached: .*refused"):
        create(tmp_path, made(Grid({K: [2]})), f"postgresql://me:secret@127.0.0.1:{port}/x")


def test_the_storage_of_a_sweep_elsewhere_is_asked_for_again(study_of, tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path}/elsewhere.db"
    create(tmp_path / "s", made(Grid({K: [2]})), url).close()
    assert "elsewhere" in json.loads((tmp_path / "s/sweep.json").read_text())["storage"]
    with pytest.raises(ConfigError, match="give it by --storage or MOEJAX_SWEEP_STORAGE"):
        open_study(tmp_path / "s", None)
    monkeypatch.setenv("MOEJAX_SWEEP_STORAGE", url)
    with contextlib.closing(open_study(tmp_path / "s", None)) as study:
        assert len(study.records()) == 1
    assert storage_url(tmp_path, "postgres://h/x") == "postgresql+psycopg://h/x"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["configs/sweeps/capacity.py:smal"], "argument 'smal' is not known; use :small"),
        (["configs/sweeps/capacity.py:small", "seed=3"], "seed is given on the command line"),
        (["configs/sweeps/capacity.py:small", "moe.topk=3"], "did you mean moe.top_k?"),
        (["configs/sweeps/capacty.py"], "capacty.py does not exist; did you mean"),
        (["configs/sweeps/capacity.py", "--slurm=--time 1"], "is for --launcher slurm"),
        (["configs/sweeps/capacity.py", "--retry_failed", "all"], "give --resume too, or leave it"),
        (
            ["configs/sweeps/capacity.py", "--launcher=slurm", "--slurm='"],
            "No closing quotation; close the quotation",
        ),
        (["configs/sweeps/capacity.py", "--cpu_devices=3"], "not divisible by the expert axis (3)"),
    ],
)
def test_the_command_line_refuses(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["sweep", *words, "--workdir", str(tmp_path / "s")]) == BAD_INPUT
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


# Sharing the machine, and how a training ended


def test_workers_share_cores_and_gpus():
    assert [core_share(i, 2, [0, 1, 2, 3, 4]) for i in (0, 1)] == [[0, 1], [2, 3]]
    assert core_share(1, 4, [0, 1]) == [0, 1], "too few: all share all"
    assert gpu_share(1, 2, {}, ["0", "1", "2", "3"]) == {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert gpu_share(0, 2, {"CUDA_VISIBLE_DEVICES": "5,7"}, []) == {"CUDA_VISIBLE_DEVICES": "5"}
    assert gpu_share(0, 1, {}, ["0"]) == {}
    with pytest.raises(ConfigError, match=r"--workers 3 cannot share the 4 GPUs .* a divisor of 4"):
        gpu_share(0, 3, {}, ["0", "1", "2", "3"])


def test_a_failure_is_told_by_its_error(tmp_path):
    log = tmp_path / "log"
    log.write_text("step 1\nmoejax train: error: no\nmore\n\n")
    assert describe_failure(2, log) == "exit code 2: moejax train: error: no"
    log.write_text("step 1\n")
    assert describe_failure(-9, log) == "killed by SIGKILL: step 1"
    log.write_text("é moejax train: error: first\n")
    start = log.stat().st_size
    with log.open("a") as again:
        again.write("step 2\n")
    assert describe_failure(-9, log, start) == "killed by SIGKILL: step 2", "the error is older"


def test_a_workdir_that_stays_in_use_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("moejax.sweep_worker.LEAVE_SECONDS", 0.1)
    wait_until_free(tmp_path)
    with RunLock(tmp_path) as lock:
        lock.take()
        with pytest.raises(ConfigError, match=r"is in use by a process .*resume the sweep"):
            wait_until_free(tmp_path)


WORKER = """
import functools, os, subprocess, sys, time
from moejax.sweep_worker import end_with_parent
training = "import signal, sys; signal.signal(15, lambda *_: sys.exit(print('saved', flush=True)))"
training += "; print('begun', flush=True); signal.pause()"
subprocess.Popen(
    [sys.executable, "-c", training], preexec_fn=functools.partial(end_with_parent, os.getpid())
)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's death")
def test_a_training_saves_when_its_worker_is_killed():
    command = [sys.executable, "-c", WORKER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "begun\n"
        worker.kill()
        assert worker.stdout.read() == "saved\n"  # it ends when the training has


# The ranking


def record(number: int, point: dict, seed: int, *values: float, stage="list") -> TrialRecord:
    return TrialRecord(number, "complete", stage, point, seed, {}, {}, values, None)


def test_intervals_are_students():
    """Of 1, 2, 3: the mean 2, the error 1 / sqrt(3), and 4.303 of them at 2 degrees of freedom."""
    assert estimate([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.3027 / 3**0.5), rel=1e-4)
    assert estimate([1.5]) == (1.5, None)


def test_points_rank_by_their_mean_and_differ_by_pairs():
    """a is better than b by 0.2 on each seed, though seeds differ by 1; c has no seed 1."""
    rows = [({K: 2}, 0, 1.2), ({K: 2}, 1, 2.2), ({K: 4}, 0, 1.0), ({K: 4}, 1, 2.0), ({K: 8}, 0, 3)]
    records = [record(i, *row) for i, row in enumerate(rows)]
    best, second, third = ranking(records, Sweep("", Grid({K: [2, 4, 8]})))
    assert [row.name for row in (best, second, third)] == [f"{K}=4", f"{K}=2", f"{K}=8"]
    assert best.difference is None
    assert second.difference == pytest.approx((0.2, 0.0), abs=1e-9)
    assert (second.better, second.pairs, third.pairs) == (0, 2, 1)
    most = Sweep("", Grid({K: [2, 4, 8]}), objectives=(Objective("loss", "max"),))
    assert ranking(records, most)[0].name == f"{K}=8"


def test_several_objectives_have_a_front():
    """2 is fast, 4 is good, 8 is neither."""
    both = (Objective("loss"), Objective("tokens_per_second", "max"))
    records = [record(0, {K: 2}, 0, 2.0, 90.0), record(1, {K: 4}, 0, 1.0, 50.0)]
    records.append(record(2, {K: 8}, 0, 2.5, 40.0))
    rows = ranking(records, Sweep("", Grid({K: [2, 4, 8]}), objectives=both))
    assert [(row.name, row.best) for row in rows] == [
        (f"{K}=4", True),
        (f"{K}=2", True),
        (f"{K}=8", False),
    ]


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([0.90, 0.91, 0.89], "`moe.top_k=4` beats the base config**: loss -0.1000"),
        ([0.99, 0.60, 0.98], "is better than the base config on every seed**, by less than"),
        ([1.05, 0.90, 0.95], "did not beat the base config.** Its best, `moe.top_k=4`"),
        ([1.10, 1.20, 1.05], "did not beat the base config.** Its best, `moe.top_k=4`"),
    ],
)
def test_a_verdict_says_whether_the_search_won(losses, said):
    space = Sweep("", Adaptive({K: [4]}, 1), seeds=(0, 1, 2, 3), finalists=1)
    records = [record(9, {K: 4}, 0, 0.1, stage="search")]  # what it was chosen by does not count
    for seed, loss in enumerate(losses, start=1):
        records.append(record(seed, {}, seed, 1.0, stage="base"))
        records.append(record(seed + 3, {K: 4}, seed, loss, stage="final"))
    assert said in verdict(ranking(records, space), space)


def test_an_axis_has_numbers_by_size_and_words_as_listed():
    assert _places([8, 2, 8, 4], ["8", "4", "2"]) == {"2": 0.0, "4": 0.5, "8": 1.0}
    listed = ["1", "2", "10", "never tried"]
    assert _places(["10", "1", "2", "1"], listed) == {"1": 0.0, "2": 0.5, "10": 1.0}
    sweep = Sweep("", Grid({"width": Cases({"wide": {}, "thin": {}}), K: [4, 2]}))
    assert _listed(sweep) == {"width": ["wide", "thin"], K: ["4", "2"]}


def test_the_best_of_several_finalists_is_held_to_more():
    """With 2 degrees of freedom 4.3 errors are enough for one finalist, 6.2 for one of two."""
    losses = {4: (0.9, 0.9 + 0.035, 0.9 - 0.035), 8: (1.0, 1.1, 1.2)}  # 4.95 errors
    space = Sweep("", Adaptive({K: [4, 8]}, 2), seeds=(0, 1, 2, 3), finalists=2)
    rows = [({}, seed, 1.0) for seed in (1, 2, 3)]
    records = [record(i, *row, stage="base") for i, row in enumerate(rows)]
    for k, values in losses.items():
        records += [
            record(10 * k + s, {K: k}, s, x, stage="final") for s, x in enumerate(values, 1)
        ]
        said = verdict(ranking(records, space), space)
        assert ("`moe.top_k=4` beats the base config" in said) == (k == 4)
    assert "is better than the base config on every seed" in said
    assert "± 0.0869, ± 0.1254 as the best of 2" in said


def test_what_failed_is_told_next_to_the_mean_of_the_rest(study_of):
    """The higher rate diverges on one seed of two, and is better on the other."""
    study = study_of(Grid({RATE: [1e-3, 1e-1]}), seeds=(0, 1))
    while isinstance(job := study.take(), Job):
        if (job.run.config.optim.learning_rate, job.run.config.seed) == (0.1, 1):
            study.fail(job.trial, "exit code 17: <lambda>")
        else:
            study.complete(job.trial, [2 - job.run.config.optim.learning_rate])
        os.close(job.claim)
    first, second = ranking(study.records(), study.sweep)
    assert (first.name, first.text) == (f"{RATE}=0.1", "1.9000 (1 seed, 1 failed)")
    assert second.text == "1.9990 ± 0.0000 (2 seeds)"
    text = write_report(study).read_text()
    assert "| 1 | optim.learning_rate=0.1 | 1 | 1 | 1.9000 |" in text
    assert "Trainings that failed are in no mean" in text
    assert r"exit code 17: \<lambda>" in text, "no markup"
    with open(study.workdir / "ranking.csv", newline="") as file:
        one, two = csv.DictReader(file)
    assert (one["loss"], one["loss half_interval"], one["difference"]) == ("1.9", "", "")
    assert (two["loss"], two["loss half_interval"]) == ("1.999", "0.0")
    assert float(two["difference"]) == pytest.approx(0.099)
    assert (two["better"], two["pairs"], two["seeds"], one["failed"]) == ("0", "1", "2", "1")
    space = Sweep("", Adaptive({K: [4]}, 1), seeds=(0, 1, 2, 3), finalists=1)
    rows = [record(i, {}, i, 1.0, stage="base") for i in (1, 2, 3)]
    rows += [record(5, {K: 4}, 1, 0.9, stage="final"), record(6, {K: 4}, 2, 0.9, stage="final")]
    rows.append(record(7, {K: 4}, 3, stage="final")._replace(state="failed"))
    assert "`moe.top_k=4`, 1 failed; the others" in verdict(ranking(rows, space), space)


def is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return text == "" or math.isfinite(float(text))
    return False


def test_a_report_has_tables_and_pictures(study_of, monkeypatch):
    study = study_of(Grid({K: [2, 4, 8], RATE: [1e-3, 1e-2]}))
    finish(study, lambda job: 1 / job.run.config.moe.top_k + job.run.config.optim.learning_rate)
    text = write_report(study).read_text()
    assert "| 1 | moe.top_k=8 optim.learning_rate=0.001 | 1 | 0.1260 |" in text
    assert "The first" not in text
    monkeypatch.setattr("moejax.sweep_report.SHOWN", 4)
    assert (
        "The first 4 of 6; `ranking.csv`, `trials.csv` have all." in write_report(study).read_text()
    )
    with open(study.workdir / "ranking.csv", newline="") as file:
        ranks = list(csv.DictReader(file))
    texts = {name for row in ranks for name, value in row.items() if not is_number(value)}
    assert texts == {"point"}
    for name in ("parallel.png", "importance.png"):
        assert f"({name})" in text
        assert (study.workdir / name).read_bytes().startswith(b"\x89PNG")
    with open(study.workdir / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert rows[0]["flops_per_token"] == "4577280"
    assert (rows[1][K], rows[1][RATE], rows[1]["loss"]) == ("2", "0.01", "0.51")


# Real trainings


SMALL = {
    "model.num_layers": 1,
    "model.d_model": 16,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.head_dim": 8,
    "moe.num_experts": 4,
    "moe.expert_hidden": 16,
    "data.sequence_length": 32,
    "train.batch_size": 4,
    "train.steps": 6,
    "eval.batches": 1,
    "logging.every": 1,
}


def write_sweep(folder: Path, space: str, **fields) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    base = os.path.relpath(ROOT / "configs/quickstart.py", folder)
    (folder / "x.py").write_text(
        "from moejax.sweep_space import *\n\n\ndef get_sweep():\n"
        f"    return Sweep({base!r}, {space}, **{fields!r})\n"
    )
    return str(folder / "x.py")


def run(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "moejax", "sweep", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def records_of(workdir: Path) -> list[TrialRecord]:
    with contextlib.closing(open_study(workdir, None)) as study:
        return study.records()


@pytest.mark.slow
def test_a_failed_trial_does_not_stop_the_others(tmp_path):
    """One training, and one that ends at once: its mesh needs more devices than there are."""
    file = write_sweep(tmp_path, "Grid({'mesh.data': [3, 1]})", fixed=SMALL)
    workdir = tmp_path / "s"
    result = run(file, "--workdir", str(workdir), "--workers", "2")
    assert result.returncode == 0, result.stderr
    failed, done = records_of(workdir)
    assert (failed.state, done.state) == ("failed", "complete")
    assert "exit code 2: moejax train: error: mesh" in (failed.error or "")
    assert "needs 3 devices (available: 1)" in (failed.error or "")
    trial = workdir / "trials/001"
    (last,) = [r for r in read_metrics(trial) if r["split"] == "eval"][-1:]
    assert done.values == (last["loss"],)
    words = [f"{name}={value}" for name, value in SMALL.items()]
    alone = load_config(str(ROOT / "configs/quickstart.py"), [*words, "mesh.data=1", "seed=0"])
    assert read_config(trial) == alone
    assert "000 failed seed=0 mesh.data=3 exit code 2" in result.stdout
    assert "1. mesh.data=1: " in result.stdout
    assert "needs 3 devices" in (workdir / "report.md").read_text()
    again = run(file, "--workdir", str(workdir))
    assert again.returncode == BAD_INPUT
    assert "has a sweep; go on with it by --resume" in again.stderr


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not in {seconds} s"
        time.sleep(0.1)


def steps_of(trial: Path) -> list[int]:
    return [r["step"] for r in read_metrics(trial) if r["split"] == "train"]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(tmp_path):
    """kill -9 of the sweep in its second trial: the first is kept, the second resumed."""
    fixed = {**SMALL, "train.steps": 400, "checkpoint.every": 10}
    file = write_sweep(tmp_path, "Grid({'optim.learning_rate': [1e-3, 1e-2]})", fixed=fixed)
    workdir = tmp_path / "s"
    words = [file, "--workdir", str(workdir), "--resume", "--cpu_devices", "1"]
    sweep = subprocess.Popen([sys.executable, "-m", "moejax", "sweep", *words], cwd=ROOT)
    first, second = workdir / "trials/000", workdir / "trials/001"
    until(lambda: len(steps_of(second)) >= 30, 300, "30 steps of the second trial")
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    (step,) = steps_of(second)[-1:]
    assert step < 400, "it was killed too late to show anything"
    before = {f: f.stat().st_mtime_ns for f in first.rglob("*") if f.is_file()}
    assert [r.state for r in records_of(workdir)] == ["complete", "running"]

    result = run(*words)
    assert result.returncode == 0, result.stderr
    assert {f: f.stat().st_mtime_ns for f in first.rglob("*") if f.is_file()} == before
    assert [r.state for r in records_of(workdir)] == ["complete", "complete"]
    assert steps_of(second) == list(range(1, 401))
    log = (workdir / "logs/001.log").read_text()
    assert "resuming after step" in log
    assert (workdir / "report.md").exists()


@pytest.fixture
def postgres() -> Iterator[str]:
    """Starts a PostgreSQL server; gives its URL."""
    pytest.importorskip("psycopg", reason="no psycopg; get it: pip install 'moejax[postgres]'")
    if shutil.which("initdb") is None or shutil.which("pg_ctl") is None:
        pytest.skip("no initdb on the PATH; get it: apt-get install -y postgresql")
    root = os.geteuid() == 0
    become = ["runuser", "-u", "postgres", "--"] if root else []  # it refuses to be root's
    folder = Path(tempfile.mkdtemp(prefix="moejax-postgres-"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    if root:
        shutil.chown(folder, "postgres")
    run = [*become, "initdb", "-D", f"{folder}/data", "-U", "me", "--auth=trust"]
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
    server = [*become, "pg_ctl", "-D", f"{folder}/data", "-w", "-l", f"{folder}/log"]
    try:
        subprocess.run(run, check=True, capture_output=True, cwd=folder)
        subprocess.run([*server, "-o", options, "start"], check=True, cwd=folder)
        yield f"postgresql://me:secret@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*server, "-m", "fast", "stop"], check=False, cwd=folder)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_trials_in_postgresql(postgres, tmp_path, monkeypatch):
    """Two workers and a server; the password is in no file."""
    file = write_sweep(tmp_path, "Grid({'optim.learning_rate': [1e-3, 1e-2]})", fixed=SMALL)
    workdir = tmp_path / "s"
    monkeypatch.setenv("MOEJAX_SWEEP_STORAGE", postgres)
    result = run(file, "--workdir", str(workdir), "--workers", "2")
    assert result.returncode == 0, result.stderr
    assert [r.state for r in records_of(workdir)] == ["complete", "complete"]
    assert not (workdir / "sweep.db").exists()
    texts = [f.read_bytes() for f in workdir.rglob("*") if f.is_file()]
    assert not any(b"secret" in text for text in texts)
