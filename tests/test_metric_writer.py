"""The file that survives crashes, resumes and a full disk."""

import pytest
from hostile import file_limit
from test_metrics import train_record

from moejax.config import ConfigError
from moejax.errors import NoSpaceError
from moejax.metric_writer import MetricWriter
from moejax.metrics import read_metrics


def write_steps(workdir, steps, start_step=0):
    with MetricWriter(workdir, start_step) as writer:
        for step in steps:
            writer.write(train_record(step))


def test_a_record_is_in_the_file_when_write_returns(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    writer.write(train_record(1))
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    writer.close()
    writer.close()
    assert [path.exists() for path in writer.files] == [True, True]


def test_resume_drops_later_steps_so_that_each_appears_once(tmp_path):
    write_steps(tmp_path, range(1, 12))
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:8]
    write_steps(tmp_path, range(9, 21), start_step=8)
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 21))
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:8] == before


def test_resume_drops_a_torn_line(tmp_path, caplog):
    write_steps(tmp_path, range(1, 9))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "split": "tr')  # kill -9 in the middle of a line
    assert len(read_metrics(tmp_path)) == 8
    write_steps(tmp_path, [9], start_step=8)
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 10))
    assert "dropped 1 torn" in caplog.text


def test_a_whole_last_record_without_newline_is_torn_too(tmp_path):
    # Its newline never came, so the next append would glue two records into one line.
    write_steps(tmp_path, [1])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 2, "split": "train"}')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    write_steps(tmp_path, [2, 3], start_step=1)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_start_at_zero_begins_a_new_file(tmp_path):
    # The first process died before its first checkpoint.
    write_steps(tmp_path, [1, 2, 3])
    write_steps(tmp_path, [1, 2])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("enabled", [True, False])
def test_a_run_that_goes_back_writes_its_steps_again(tmp_path, enabled):
    class Board:
        def __init__(self):
            self.heard = []

        def write(self, record):
            self.heard.append(record["step"])

        def restart(self):
            self.heard.append("restart")

    board = Board()
    with MetricWriter(tmp_path, 0, enabled, boards=[board]) as writer:
        for step in (1, 2, 3):
            writer.write(train_record(step))
        writer.go_back(1)
        writer.write(train_record(2))
    assert board.heard == [1, 2, 3, "restart", 2]
    if enabled:
        assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    else:
        assert list(tmp_path.iterdir()) == []


def test_resume_that_changes_nothing_leaves_the_file_alone(tmp_path):
    write_steps(tmp_path, [1, 2])
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    write_steps(tmp_path, [3], start_step=2)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == inode


def test_disabled_writer_touches_nothing(tmp_path):
    with MetricWriter(tmp_path / "run", 0, enabled=False) as writer:
        writer.write(train_record(1))
        writer.write_text("config", "{}")
    assert writer.files == []
    assert not (tmp_path / "run").exists()


def test_unwritable_workdir_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"cannot be written: .*; make room, or give ano"):
        MetricWriter(tmp_path / "file", 0)


def test_a_disk_that_is_full_when_a_run_goes_back_is_no_space_left(tmp_path):
    """A roll-back opens the file again, and drops the steps that are done once more."""
    write_steps(tmp_path, [1, 2, 3])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with (
        file_limit(10),
        pytest.raises(NoSpaceError, match=r"metrics\.jsonl cannot be written") as e,
    ):
        MetricWriter(tmp_path, 2)
    assert e.value.code == 28
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


class _FullDisk:
    """A file that takes half of what it is given, until there is room."""

    closed = False

    def __init__(self, file):
        self.file, self.full = file, True

    def write(self, block):
        return self.file.write(block[: len(block) // 2] if self.full else block)

    def truncate(self, size):
        return self.file.truncate(size)

    def close(self):
        self.file.close()


def test_full_disk_does_not_stop_training_and_loses_nothing(tmp_path, caplog):
    writer = MetricWriter(tmp_path, 0)
    writer.write(train_record(1))
    disk = writer._lines._file = _FullDisk(writer._lines._file)
    writer.write(train_record(2))
    writer.write(train_record(3))
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    assert caplog.text.count("training goes on") == 1
    disk.full = False
    writer.write(train_record(4))
    writer.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_records_that_never_found_room_are_counted(tmp_path, caplog):
    writer = MetricWriter(tmp_path, 0)
    writer._lines._file = _FullDisk(writer._lines._file)
    writer.write(train_record(1))
    writer.close()
    assert "1 records could not be written" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
