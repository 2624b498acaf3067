"""How processes notice within moments that one of them is gone, whatever they wait in.

A collective fails when a process of it dies; a barrier of the coordination service, which saves
wait in, or a compile does not, before the heartbeats have been missed for HEARTBEAT_SECONDS. But a
kernel closes the connections of a process that died at once: each has one to process 0, which tells
the others. A host that is gone closes nothing; that is what heartbeats are for.
"""

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

from jax._src import distributed  # as in cluster.py

from moejax.cluster import BIND, HEARTBEAT_SECONDS, own_address
from moejax.errors import UNAVAILABLE

KEY = "moejax/lifeline"  # in the coordinator: port and token
CONNECT_SECONDS = 30.0
BYE = b"bye\n"


def leave(process: int, num_processes: int, lost: int) -> None:
    """Says that a process was lost, and ends this one."""
    print(
        f"moejax: process {process} of {num_processes}: error: process {lost} was lost; look at "
        "its log, or at that of its host where it has none",
        file=sys.stderr,
        flush=True,
    )
    os._exit(UNAVAILABLE)


class Lifeline:
    """Holds a connection to process 0, or on process 0 one to each other one, while it is entered.

    Leaving it says goodbye, so that only a process that was cut short counts as lost.

    Args:
        client: of the coordinator, or None for a process alone: nothing is done then.
        process: the number of this process.
        num_processes: of the run.
        address: `HOST:PORT` of the coordinator; the port is not used.
        lost: called in a thread with the number of the first process that was lost.
    """

    def __init__(
        self,
        client: Any,
        process: int,
        num_processes: int,
        address: str,
        lost: Callable[[int], object],
    ):
        self._client, self._process, self._count = client, process, num_processes
        self._address, self._lost = address, lost
        self._lock = threading.Lock()
        self._left = False  # this process says goodbye, or one is lost: nothing is news any more
        self._server: socket.socket | None = None
        self._open: dict[socket.socket, int] = {}  # to which process a connection leads

    def __enter__(self) -> "Lifeline":
        if self._client is None:
            return self
        target = self._connect
        if self._process == 0:
            host = (os.environ.get(BIND) or own_address(self._address, 0)).rpartition(":")[0]
            host = host.strip("[]")
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._server = socket.create_server((host, 0), family=family, backlog=self._count)
            self._token = secrets.token_hex(16)
            port = self._server.getsockname()[1]
            self._client.key_value_set(KEY, f"{port} {self._token}")
            target = self._serve
        threading.Thread(target=target, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        with self._lock:
            self._left = True
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.sendall(BYE)
            for connection in [*self._open, *([self._server] if self._server else [])]:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)  # wakes the thread, which closes it

    def _tell(self, process: int) -> None:
        """Hands the news of a loss on, once."""
        with self._lock:
            if self._left:
                return
            self._left = True
            for connection, other in self._open.items():
                if other != process:
                    with contextlib.suppress(OSError):
                        connection.sendall(f"lost {process}\n".encode())
        self._lost(process)

    # Process 0

    def _serve(self) -> None:
        assert self._server is not None
        with selectors.DefaultSelector() as selector, self._server:
            selector.register(self._server, selectors.EVENT_READ)
            while not self._left:
                for key, _ in selector.select():
                    if key.fileobj is not self._server:
                        self._hear(selector, key.fileobj)  # pyright: ignore[reportArgumentType]
                    elif not self._left:
                        self._accept(selector)
            with self._lock:  # the goodbyes are said
                for key in selector.get_map().values():
                    key.fileobj.close()  # pyright: ignore[reportAttributeAccessIssue]

    def _accept(self, selector: selectors.BaseSelector) -> None:
        assert self._server is not None
        try:
            connection, _ = self._server.accept()
        except OSError:  # no file descriptors left: those that are not connected have heartbeats
            selector.unregister(self._server)
            return
        selector.register(connection, selectors.EVENT_READ)  # a stranger may say nothing, ever

    def _hear(self, selector: selectors.BaseSelector, connection: socket.socket) -> None:
        said = b""
        with contextlib.suppress(OSError):
            said = connection.recv(256)
        with self._lock:
            process = self._open.pop(connection, None)
            if process is None and (named := self._process_named(said)) is not None:
                self._open[connection] = named
                return
        selector.unregister(connection)
        connection.close()
        if process is not None and said != BYE:
            self._tell(process)

    def _process_named(self, said: bytes) -> int | None:
        """Returns which process says so of itself; None of a stranger."""
        try:
            token, number = said.split()
            process = int(number)
        except ValueError:
            return None
        known = secrets.compare_digest(token, self._token.encode())
        return process if known and 0 < process < self._count else None

    # The others

    def _connect(self) -> None:
        host = self._address.rpartition(":")[0].strip("[]")
        try:
            said = self._client.blocking_key_value_get(KEY, int(CONNECT_SECONDS * 1000))
            port, token = said.split()
            connection = socket.create_connection((host, int(port)), CONNECT_SECONDS)
        except (OSError, RuntimeError, ValueError) as error:
            if not self._left:
                print(
                    f"moejax: process {self._process} cannot hold a connection to process 0 "
                    f"({error}): a process that is lost is noticed after {HEARTBEAT_SECONDS} s; "
                    "open the ports of process 0 among the hosts",
                    file=sys.stderr,
                )
            return
        connection.settimeout(None)
        with connection:
            with self._lock:
                left = self._left
                if not left:
                    connection.sendall(f"{token} {self._process}\n".encode())
                    self._open[connection] = 0
            said = b""
            with contextlib.suppress(OSError):
                said = b"" if left else connection.recv(256)
            with self._lock:
                self._open.clear()
            if said != BYE and not left:
                words = said.split()
                self._tell(int(words[1]) if len(words) == 2 else 0)


def lifeline() -> Lifeline:
    """Returns that of this process, which ends it when another one is lost."""
    state = distributed.global_state
    process, count = state.process_id or 0, state.num_processes or 1
    address = state.coordinator_address or ""
    return Lifeline(state.client, process, count, address, lambda lost: leave(process, count, lost))
