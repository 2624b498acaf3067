"""Noticing that a process is gone: processes are threads here, and dying is a closed socket."""

import contextlib
import queue
import socket
import subprocess
import sys
import threading

import pytest

from moejax.lifeline import BYE, KEY, Lifeline


class _Client:
    def __init__(self):
        self.values, self._set = {}, threading.Event()

    def key_value_set(self, key, value):
        self.values[key] = value
        self._set.set()

    def blocking_key_value_get(self, key, milliseconds):
        if not self._set.wait(min(milliseconds, 10_000) / 1000):
            raise RuntimeError("DEADLINE_EXCEEDED")
        return self.values[key]


class Run:
    """Some processes with their lifelines, and what they were told."""

    def __init__(self, count: int, monkeypatch):
        monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS", raising=False)
        self.client, self.told = _Client(), queue.Queue()
        self.lines = [
            Lifeline(
                self.client, n, count, "127.0.0.1:1", lambda lost, n=n: self.told.put((n, lost))
            )
            for n in range(count)
        ]
        for line in self.lines:
            line.__enter__()

    def connected(self) -> "Run":
        while len(self.lines[0]._open) < len(self.lines) - 1:
            assert not threading.Event().wait(0.01)
        return self

    def dies(self, process: int) -> None:
        """Closes what the kernel would, without a goodbye."""
        line = self.lines[process]
        line._left = True
        for each in [*line._open, *([line._server] if line._server else [])]:
            with contextlib.suppress(OSError):  # its thread may be quicker
                each.shutdown(socket.SHUT_RDWR)

    def news(self, count: int) -> set:
        return {self.told.get(timeout=10) for _ in range(count)}


def test_one_that_dies_is_told_to_all_others(monkeypatch):
    run = Run(4, monkeypatch).connected()
    run.dies(2)
    assert run.news(3) == {(0, 2), (1, 2), (3, 2)}


def test_the_end_of_process_0_is_seen_by_all(monkeypatch):
    run = Run(3, monkeypatch).connected()
    run.dies(0)
    assert run.news(2) == {(1, 0), (2, 0)}


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_goodbye_is_no_loss(monkeypatch, first):
    run = Run(3, monkeypatch).connected()
    for process in (first, *({0, 1, 2} - {first})):
        run.lines[process].__exit__()
    with pytest.raises(queue.Empty):
        run.told.get(timeout=0.3)


def test_strangers_are_sent_away(monkeypatch):
    """Neither what they say nor their end means anything."""
    run = Run(2, monkeypatch).connected()
    port, token = run.client.values[KEY].split()
    silent = socket.create_connection(("127.0.0.1", int(port)), 5)  # holds nobody up
    foreign = (b"GET / HTTP/1.1\r\n\r\n", "é 1\n".encode())
    for said in (b"", *foreign, b"0123 1\n", f"{token} 7\n".encode(), BYE):
        with socket.create_connection(("127.0.0.1", int(port)), 5) as stranger:
            stranger.settimeout(5)
            stranger.sendall(said)
            if not said:
                stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(10) == b""
    with pytest.raises(queue.Empty):
        run.told.get(timeout=0.3)
    assert run.lines[0]._server.getsockname()[0] == "127.0.0.1", "of no other interface"
    run.dies(1)
    assert run.news(1) == {(0, 1)}
    silent.close()


def test_a_port_that_is_closed_is_said_and_harms_nothing(monkeypatch, capfd):
    client = _Client()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    client.key_value_set(KEY, f"{port} token")
    line = Lifeline(client, 1, 2, "127.0.0.1:1", lambda _: None)
    line._connect()
    assert "process 1 cannot hold a connection to process 0" in capfd.readouterr().err


def test_a_process_alone_has_none():
    with Lifeline(None, 0, 1, "", lambda _: None) as line:
        assert line._server is None


def test_who_is_told_ends():
    program = "from moejax.lifeline import leave; leave(1, 4, 3)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 69
    assert "process 1 of 4: error: process 3 was lost; look at its log" in done.stderr
