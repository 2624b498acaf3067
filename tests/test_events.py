from pathlib import Path

import pytest

from moejax import events
from moejax.errors import ConfigError
from moejax.events import EVENTS, KINDS, Events, read_events, rollbacks_to


def test_events_are_read_back_without_a_line_that_a_crash_cut_off(tmp_path, monkeypatch):
    monkeypatch.setitem(events.KINDS, "probe", "of this test")
    Events(tmp_path).write("probe", 3, value=1.5)
    Events(tmp_path, enabled=False).write("probe", 4)
    with open(tmp_path / EVENTS, "a") as stream:
        stream.write('{"time": "2026-')
    (event,) = read_events(tmp_path)
    assert (event["kind"], event["step"], event["value"]) == ("probe", 3, 1.5)
    Events(tmp_path).write("probe", 5)
    assert [event["step"] for event in read_events(tmp_path)] == [3, 5], "it spoils no other"
    assert read_events(tmp_path / "none") == []


def test_lines_of_a_damaged_disk_are_passed_over(tmp_path):
    good = '{"kind": "probe", "step": 3}'
    (tmp_path / EVENTS).write_bytes(b'\xff\xfe"\n' + b"[" * 100_000 + b"\n" + good.encode())
    (event,) = read_events(tmp_path)
    assert event["step"] == 3


def test_rollbacks_to_a_step_are_those_since_it_was_saved(tmp_path):
    log = Events(tmp_path)
    log.write("checkpoint_saved", 8)
    log.write("rollback", 10, to=8, first=8, last=9)
    log.write("checkpoint_saved", 12)
    log.write("rollback", 14, to=12, first=14, last=15)
    log.write("rollback", 10, to=8, first=10, last=11)
    assert rollbacks_to(read_events(tmp_path), 8) == [(8, 9), (10, 11)]
    assert rollbacks_to(read_events(tmp_path), 12) == [(14, 15)]
    log.write("checkpoint_saved", 8)
    assert rollbacks_to(read_events(tmp_path), 8) == []


def test_a_file_that_cannot_be_written_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(events.KINDS, "probe", "of this test")
    (tmp_path / EVENTS).mkdir()
    log = Events(tmp_path)
    log.write("probe", 1)
    log.write("probe", 2)
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_every_kind_is_documented_as_it_says():
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    section = page.partition("## Events\n")[2].partition("\n## ")[0]
    rows = [line[2:-2].split(" | ") for line in section.splitlines() if line.startswith("| `")]
    assert {kind.strip("`"): meaning for kind, meaning in rows} == KINDS


def test_lines_that_are_no_events_are_left_out(tmp_path):
    (tmp_path / EVENTS).write_text('[1]\n3\n{"kind": "epoch"}\n' + "[" * 100_000 + "\n")
    assert read_events(tmp_path) == [{"kind": "epoch"}]


@pytest.mark.parametrize(
    "line",
    [
        {},
        {"first": 8},
        {"first": "8", "last": 9},
        {"first": 9, "last": 8},
        {"first": 8, "last": 10**30},
    ],
)
def test_a_rollback_that_does_not_say_which_batches_is_refused(line):
    """It cannot be guessed what the run has left out."""
    with pytest.raises(ConfigError, match=r"events\.jsonl has a rollback without the batches"):
        rollbacks_to([{"kind": "rollback", "to": 8, **line}], 8)


def test_events_that_cannot_be_read_are_an_input_error(tmp_path):
    (tmp_path / EVENTS).mkdir()
    with pytest.raises(ConfigError, match=r"events\.jsonl cannot be read: it is no file; make it"):
        read_events(tmp_path)
