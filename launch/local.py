r"""Runs one `moejax` command as several processes on this machine, each with its own devices.

    python launch/local.py --processes 2 -- \
      train configs/quickstart.py --workdir runs/a --cpu_devices 4

`--cpu_devices` is per process. Without it, the processes share the machine's GPUs or TPUs equally.
The output of process 0 is shown; the others write to --logs, and the end of a log is shown when its
process fails. The first process that fails ends the others, and its exit code is returned; with
--restarts N all are restarted instead, as by `moejax supervise`. SIGTERM and Ctrl-C are passed on
to every process: `train` then saves and ends with exit code 75 or 130; a second one kills them.
"""

import argparse
import contextlib
import glob
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from moejax.command_line import outliving_output
from moejax.supervisor import Group, Retries, supervise, workdir_of

JOIN_SECONDS = 60  # the processes start together
# How the TPU chips of a host lie next to each other, for one process a chip
TPU_BOUNDS = {4: "2,2,1", 8: "2,4,1"}
TPU_PORT = 8476


def choose_port(port: int | None) -> int:
    """Returns `port`, or one that is free for None.

    Raises:
        ValueError: something listens on it.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one just let go of will do
        try:
            listener.bind(("127.0.0.1", port or 0))
        except OSError as error:
            raise ValueError(
                f"--port {port} cannot be used ({error.strerror}); give another one, or leave it "
                "out to take a free one"
            ) from None
        return listener.getsockname()[1]


def numbered(pattern: str) -> list[str]:
    """Returns the numbers that end the files of a pattern: the chips of this machine, in order."""
    found = (re.search(r"\d+$", path) for path in glob.glob(pattern))
    return [str(n) for n in sorted(int(match[0]) for match in found if match)]


def share_devices(
    processes: int, environment: Mapping[str, str], gpus: list[str], tpus: list[str]
) -> list[dict[str, str]]:
    """Returns the variables that give each process its share of this machine's accelerators.

    Args:
        environment: what the user set already: CUDA_VISIBLE_DEVICES limits the GPUs to share.
        gpus: the numbers of the GPUs that are there.
        tpus: the numbers of the TPU chips.

    Raises:
        ValueError: they cannot be shared equally.
    """
    if "CUDA_VISIBLE_DEVICES" in environment:
        gpus = [gpu for gpu in environment["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    kind, chips = ("GPUs", gpus) if gpus else ("TPU chips", tpus)
    if processes == 1 or not chips:
        return [{} for _ in range(processes)]
    sizes = [n for n in range(1, len(chips) + 1) if len(chips) % n == 0]
    if not gpus:  # a chip each, or all in one
        sizes = [n for n in sizes if n == 1 or (n == len(chips) and n in TPU_BOUNDS)]
    if processes not in sizes:
        fit = ", ".join(map(str, sizes))
        raise ValueError(
            f"--processes {processes} cannot share the {len(chips)} {kind} of this machine "
            f"equally; use {fit}, or --cpu_devices N in the command"
        )
    size = len(chips) // processes
    parts = [chips[i * size : (i + 1) * size] for i in range(processes)]
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in parts]
    addresses = ",".join(f"localhost:{TPU_PORT + i}" for i in range(processes))
    return [
        {
            "TPU_VISIBLE_DEVICES": chip,
            "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
            "TPU_PROCESS_BOUNDS": TPU_BOUNDS[processes],
            "TPU_PROCESS_ADDRESSES": addresses,
            "TPU_PROCESS_PORT": str(TPU_PORT + i),
            "CLOUD_TPU_TASK_ID": str(i),
        }
        for i, (chip,) in enumerate(parts)
    ]


def start(command: list[str], shares: list[dict[str, str]], port: int, logs: Path) -> Group:
    """Starts `moejax command` once a share, with the coordinator's address in the environment."""
    address = f"127.0.0.1:{port}"  # nobody outside of this machine can connect
    started = []
    for index, share in enumerate(shares):
        environment = {
            "MOEJAX_JOIN_SECONDS": str(JOIN_SECONDS),
            **os.environ,
            **share,
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_COORDINATOR_BIND_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(len(shares)),
            "JAX_PROCESS_ID": str(index),
        }
        with contextlib.ExitStack() as stack:
            output = None
            if index > 0:
                output = stack.enter_context(open(log_of(logs, index), "ab"))
            words = [sys.executable, "-m", "moejax", *command]
            started.append(subprocess.Popen(words, env=environment, stdout=output, stderr=output))
    return Group(started)


def log_of(logs: Path, index: int) -> Path:
    return logs / f"process_{index}.log"


def show_failures(group: Group, logs: Path) -> None:
    """Shows how the logs of the processes that failed end."""
    for index, process in enumerate(group.started):
        if index > 0 and process.returncode:
            text = log_of(logs, index).read_text(errors="replace")
            ended = f"process {index} ended with {process.returncode}"
            print(f"{ended}:\n{text[-2000:]}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--processes", type=int, required=True, help="number of processes, at least 1"
    )
    parser.add_argument("--port", type=int, help="port of process 0 (default: a free one)")
    parser.add_argument("--logs", type=Path, help="folder for the output of the other processes")
    help = "restarts in a row without a newer checkpoint before giving up (default: 0)"
    parser.add_argument("--restarts", type=int, default=0, metavar="N", help=help)
    parser.add_argument("command", nargs="+", help="after --: a verb of moejax and its words")
    options = parser.parse_args()
    if options.processes < 1:
        parser.error(f"--processes {options.processes} is below 1")
    if options.restarts < 0:
        parser.error(f"--restarts {options.restarts} is below 0")
    on_cpu = any(word.startswith("--cpu_devices") for word in options.command)
    gpus = [] if on_cpu else numbered("/dev/nvidia[0-9]*")
    tpus = [] if on_cpu else numbered("/dev/accel[0-9]*") or numbered("/dev/vfio/[0-9]*")
    environment = {} if on_cpu else os.environ
    logs = options.logs or Path(tempfile.mkdtemp(prefix="moejax-"))
    try:
        shares = share_devices(options.processes, environment, gpus, tpus)
        choose_port(options.port)
    except ValueError as error:
        parser.error(str(error))
    logs.mkdir(parents=True, exist_ok=True)
    for index in range(1, options.processes):
        log_of(logs, index).unlink(missing_ok=True)
    groups: list[Group] = []

    def once_more() -> Group:
        if groups:
            show_failures(groups[-1], logs)
        port = options.port or choose_port(None)
        groups[:] = [start(options.command, shares, port, logs)]
        return groups[0]

    workdir = workdir_of(options.command)
    with outliving_output():
        code = supervise(once_more, workdir, Retries(options.restarts))
        show_failures(groups[0], logs)
    return code


if __name__ == "__main__":
    sys.exit(main())
