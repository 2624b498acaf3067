"""One run, one owner: the living is named, the dead is taken over."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
from hostile import file_limit

from moejax import lock as lock_module
from moejax.errors import ConfigError
from moejax.events import read_events
from moejax.lock import LOCK, RunLock

HOLD = """
import sys, time
from pathlib import Path
from moejax.lock import RunLock
with RunLock(Path(sys.argv[1])) as lock:
    lock.take()
    print("taken", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_run_is_refused_with_host_pid_and_start(tmp_path, owner):
    start = json.loads((tmp_path / LOCK).read_text())["start"]
    with RunLock(tmp_path) as lock, pytest.raises(ConfigError) as caught:
        lock.take()
    assert f"in use by process {owner.pid} on {socket.gethostname()} since {start}" in str(
        caught.value
    )
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == owner.pid, "left as it was"


def test_the_lock_of_a_dead_owner_is_taken_over_loudly(tmp_path, owner, capsys):
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    with RunLock(tmp_path) as lock:
        lock.take()
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert f"process {owner.pid} on" in capsys.readouterr().err
    (event,) = read_events(tmp_path)
    assert (event["kind"], event["owner"]["pid"]) == ("lock_taken_over", owner.pid)


@pytest.mark.parametrize("dies", [True, False])
def test_the_lock_of_another_host_is_waited_for(tmp_path, owner, monkeypatch, capsys, dies):
    """A file server keeps that of a host that died for a while; the living keeps it for longer."""
    said = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps(said | {"host": "node7"}))
    monkeypatch.setattr(lock_module, "LEASE_SECONDS", 30.0 if dies else 0.3)
    if dies:
        threading.Timer(0.3, owner.kill).start()
        with RunLock(tmp_path) as lock:
            lock.take()
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    else:
        with pytest.raises(ConfigError, match=rf"in use by process {owner.pid} on node7"):
            RunLock(tmp_path).take()
    assert "is in use on node7; waits" in capsys.readouterr().err


def test_without_the_kernels_lock_both_would_write(tmp_path, owner, monkeypatch, capsys):
    """The harm: where the file system has no locks, the second run starts; it is told."""

    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with RunLock(tmp_path) as lock:
        lock.take()
    assert "a second run in it would not be noticed" in capsys.readouterr().err


def test_who_lets_go_is_not_mourned(tmp_path, capsys):
    for _ in range(2):
        with RunLock(tmp_path) as lock:
            lock.take()
    for damage in ("[]", "[" * 4096):
        (tmp_path / LOCK).write_text(damage)
        with RunLock(tmp_path) as lock:
            lock.take()
    assert capsys.readouterr().err == ""
    assert read_events(tmp_path) == []


def test_a_lock_that_cannot_be_had_is_an_input_error(tmp_path, monkeypatch):
    (tmp_path / LOCK).symlink_to("/etc/hostname")
    with pytest.raises(ConfigError, match=r"lock\.json cannot be written"):
        RunLock(tmp_path).take()
    (tmp_path / LOCK).unlink()

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("fcntl.flock", broken)
    with pytest.raises(ConfigError, match="cannot be locked: Input/output error; mount") as e:
        RunLock(tmp_path).take()
    assert e.value.code == 69, "a file server that fails may do later"
    monkeypatch.undo()
    with (
        file_limit(0),
        RunLock(tmp_path) as lock,
        pytest.raises(ConfigError, match=r"lock\.json cannot be written: File too large; mak"),
    ):
        lock.take()


def test_what_a_lock_says_cannot_steer_the_terminal(tmp_path, capsys):
    (tmp_path / LOCK).write_text(json.dumps({"host": "\x1b[2J", "pid": 1, "start": "\r"}))
    with RunLock(tmp_path) as lock:
        lock.take()
    assert "process 1 on \\x1b[2J, which had" in capsys.readouterr().err
