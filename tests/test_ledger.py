"""The ledger: kinds add up to the time that passed, whatever died, whatever a clock did."""

import json
import re
import threading
import time
from pathlib import Path

import pytest

from moejax.ledger import KINDS, LEDGER, Ledger, last_step, read_ledger, totals


class Clocks:
    """A monotonic clock and one on the wall, which somebody can set."""

    def __init__(self):
        self.now, self.wall_offset = 1000.0, 1.7e9

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now + self.wall_offset

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clocks(monkeypatch) -> Clocks:
    """Without the thread that writes: each line stands where the test wants it."""
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    return Clocks()


def session(workdir, clocks, step, begun=None, **more) -> Ledger:
    return Ledger(workdir, step, begun, clock=clocks.monotonic, wall=clocks.wall, **more)


def test_a_run_with_a_crash_is_counted_to_the_second(tmp_path, clocks):
    """Steps of 10 s, a checkpoint after step 2, a crash in step 5; 60 s later it goes on from 2."""
    begun = clocks.now
    clocks.pass_(7)
    first = session(tmp_path, clocks, 0, begun)  # 7 s of start
    first.switch("compile")
    clocks.pass_(30)
    first.switch("productive")
    for step in (1, 2, 3, 4):
        with first.during("data"):
            clocks.pass_(1)
        clocks.pass_(10)
        first.finished(step)
        if step == 2:
            with first.during("checkpoint"):
                clocks.pass_(3)
            first.write()
    first.write()
    clocks.pass_(5)  # of step 5; then SIGKILL: nobody has written since
    clocks.pass_(60)

    begun = clocks.now
    clocks.pass_(4)
    second = session(tmp_path, clocks, 2, begun)
    second.switch("productive")
    clocks.pass_(20)
    second.finished(4)
    second.close(done=True)

    expected = dict.fromkeys(KINDS, 0.0) | {
        "start": 7 + 4,
        "compile": 30,
        "data": 4,
        "productive": 20 + 20,
        "lost": 20,  # steps 3 and 4
        "checkpoint": 3,
        "restart": 5 + 60,
    }
    found = totals(tmp_path)
    assert found.seconds == pytest.approx(expected)
    assert found.elapsed == pytest.approx(clocks.now - 1000.0)
    assert found.goodput == pytest.approx(40 / found.elapsed)
    assert second.totals() == found
    assert (found.sessions, last_step(tmp_path)) == (2, 4)


def test_a_fallback_beyond_a_session_loses_of_those_before_too(tmp_path, clocks):
    """0-4, then 4-6, then from 2 again, where the later checkpoints were unsound."""
    for start, stop in ((0, 4), (4, 6)):
        ledger = session(tmp_path, clocks, start)
        ledger.switch("productive")
        for step in range(start + 1, stop + 1):
            clocks.pass_(10)
            ledger.finished(step)
            ledger.write()
    session(tmp_path, clocks, 2)
    found = totals(tmp_path).seconds
    assert (found["productive"], found["lost"]) == pytest.approx((20, 40))


def test_going_back_within_a_process_is_lost_too(tmp_path, clocks):
    ledger = session(tmp_path, clocks, 0)
    ledger.switch("productive")
    for step in (1, 2, 3):
        clocks.pass_(10)
        ledger.finished(step)
        ledger.write()
    clocks.pass_(1)
    ledger.rolled_back(1)
    clocks.pass_(10)
    found = ledger.totals()
    assert (found.seconds["productive"], found.seconds["lost"]) == pytest.approx((20, 21))
    assert found.elapsed == pytest.approx(41)
    ledger.close()
    assert totals(tmp_path) == found


def test_a_clock_on_the_wall_that_jumps_changes_no_duration(tmp_path, clocks):
    first = session(tmp_path, clocks, 0)
    first.switch("productive")
    clocks.pass_(5)
    clocks.wall_offset -= 3600
    clocks.pass_(5)
    first.finished(1)
    first.close()
    clocks.wall_offset -= 3600
    second = session(tmp_path, clocks, 1)
    assert second.totals().seconds["productive"] == pytest.approx(10)
    assert second.totals().seconds["restart"] == 0
    assert all(value >= 0 for value in second.totals().seconds.values())


def test_time_after_a_complete_run_is_not_its(tmp_path, clocks):
    session(tmp_path, clocks, 5).close(done=True)
    clocks.pass_(86_400)
    assert session(tmp_path, clocks, 5).totals().elapsed == 0


def test_lines_that_are_spoilt_are_passed_over(tmp_path, clocks):
    """By a crash, by a bit, by a hand: a ledger never stops a run."""
    ledger = session(tmp_path, clocks, 0)
    clocks.pass_(2)
    ledger.close()
    good = (tmp_path / LEDGER).read_text().splitlines()
    entry = json.loads(good[-1])
    del entry["seconds"]["compile"]
    spoilt = [json.dumps(entry), "[]", "3", '{"session": 1}', good[-1].replace("start", "st\0rt")]
    (tmp_path / LEDGER).write_text("\n".join([*good, *spoilt, good[-1][:40]]))
    assert len(read_ledger(tmp_path)) == len(good)
    assert totals(tmp_path).seconds["start"] == 2


def test_a_line_that_was_cut_off_does_not_spoil_the_next(tmp_path, clocks):
    session(tmp_path, clocks, 0)
    with open(tmp_path / LEDGER, "a") as stream:
        stream.write('{"time": 17')
    session(tmp_path, clocks, 4)
    assert [line["step"] for line in read_ledger(tmp_path)] == [0, 4]


def test_every_kind_is_documented():
    page = (Path(__file__).parents[1] / "docs/metrics.md").read_text()
    section = page.partition("\n## Where the time went")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^;|]*\w)", section, re.M))
    assert {kind: rows[kind][:20] for kind in rows} == {k: v[:20] for k, v in KINDS.items()}


def test_a_full_disk_is_said_once(tmp_path, clocks, capsys):
    (tmp_path / LEDGER).mkdir()
    ledger = session(tmp_path, clocks, 0)
    ledger.write()
    ledger.close()
    assert capsys.readouterr().err.count("cannot be written") == 1
    assert read_ledger(tmp_path) == []


def test_others_than_the_first_process_write_nothing(tmp_path, clocks):
    session(tmp_path, clocks, 0, enabled=False).close()
    assert not (tmp_path / LEDGER).exists()


def test_a_long_step_is_written_down_while_it_runs(tmp_path, monkeypatch):
    """The thread, which nothing in the main thread feeds."""
    monkeypatch.setattr("moejax.ledger.WRITE_SECONDS", 0.02)
    ledger = Ledger(tmp_path, 0)
    ledger.switch("compile")
    deadline = time.monotonic() + 20
    while totals(tmp_path).seconds["compile"] < 0.05:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    ledger.close()
    lines = len(read_ledger(tmp_path))
    time.sleep(0.1)
    assert len(read_ledger(tmp_path)) == lines, "a closed ledger is not written to"
