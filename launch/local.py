r"""Runs one `moejax` command as several processes on this machine, each with its own devices.

    python launch/local.py --processes 2 -- \
      train configs/quickstart.py --workdir runs/a --cpu_devices 4

`--cpu_devices` is per process. What process 0 prints is shown; the others write to --logs, and the
end of a log is shown when its process fails. The first process that fails ends the others; its exit
code is returned.
"""

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0


def free_port() -> int:
    """Returns a TCP port on the loopback interface that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(command: list[str], processes: int, logs: Path) -> list[subprocess.Popen]:
    """Starts `moejax command` once a process, with the coordinator's address in the environment."""
    address = f"127.0.0.1:{free_port()}"
    started = []
    for index in range(processes):
        environment = {
            **os.environ,
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(index),
        }
        with contextlib.ExitStack() as stack:
            output = None
            if index > 0:
                output = stack.enter_context(open(logs / f"process_{index}.log", "wb"))
            words = [sys.executable, "-m", "moejax", *command]
            started.append(subprocess.Popen(words, env=environment, stdout=output, stderr=output))
    return started


def wait(started: list[subprocess.Popen]) -> int:
    """Waits for all; if one fails, ends the others. Returns 0 or the first failure's exit code."""
    while True:
        codes = [process.poll() for process in started]
        failed = [code for code in codes if code]
        if failed:
            stop(started)
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if all(code == 0 for code in codes):
            return 0
        time.sleep(POLL_SECONDS)


def stop(started: list[subprocess.Popen]) -> None:
    """Asks every process that still runs to end, and kills those that do not."""
    for process in started:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in started:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, required=True, help="how many, at least 1")
    parser.add_argument("--logs", type=Path, help="folder of the other processes' output")
    parser.add_argument("command", nargs="+", help="after --: a verb of moejax and its words")
    options = parser.parse_args()
    if options.processes < 1:
        parser.error(f"--processes {options.processes} is below 1")
    logs = options.logs or Path(tempfile.mkdtemp(prefix="moejax-"))
    logs.mkdir(parents=True, exist_ok=True)
    started = start(options.command, options.processes, logs)
    try:
        code = wait(started)
    except KeyboardInterrupt:
        stop(started)
        return 130
    for index, process in enumerate(started):
        if index > 0 and process.returncode:
            text = (logs / f"process_{index}.log").read_text(errors="replace")
            ended = f"process {index} ended with {process.returncode}"
            print(f"{ended}:\n{text[-2000:]}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
