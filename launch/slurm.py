r"""Submits one `moejax` command to SLURM: one process per node, requeued when it is preempted.

    python launch/slurm.py --nodes 2 --gpus_per_node 8 --time 4:00:00 -- \
      train configs/quickstart.py --workdir runs/a
    python launch/slurm.py --nodes 1 --cpus_per_task 16 --array sweep.txt -- \
      train configs/quickstart.py --workdir runs/sweep

--array FILE has a line of `key=value` words for each run; they train in WORKDIR/0, WORKDIR/1 and so
on. The command line and config of every run are checked before anything is submitted. Each process
writes LOGS/JOB-PROCESS.log, and the script itself LOGS/JOB.log. --dry_run prints the script. A
training that fails is restarted on its nodes by `moejax supervise`, up to --restarts times in a
row.
"""

import argparse
import dataclasses
import os
import shlex
import subprocess
import sys
from pathlib import Path

from moejax.cli import VERBS
from moejax.errors import BAD_INPUT, PREEMPTED, ConfigError

PORTS = 61_440  # the first of those that jobs take, by their number: two on a node do not meet
# What every process waits for the others, once its own part of the work is done or has failed
WAIT_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Job:
    """What to run, once an override set, and what to ask SLURM for."""

    command: list[str]
    nodes: int
    runs: list[list[str]] | None = None  # override sets of an array; None is a single run
    copies: int | None = None  # tasks of an array that all run the same; None is no such array
    logs: Path = Path("logs")
    name: str = "moejax"
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None  # None is whole nodes
    time: str | None = None
    grace: int = 120
    restarts: int = 3
    sbatch: tuple[str, ...] = ()  # further options, as they stand


def read_runs(file: Path) -> list[list[str]]:
    """Returns the `key=value` words of each line that is not empty and no remark."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigError(f"--array {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--array {file} is not UTF-8: byte {error.object[error.start]:#04x} at offset "
            f"{error.start}; save it as UTF-8"
        ) from None
    runs = [_words(file, line) for line in lines if line.strip() and not line.startswith("#")]
    if not runs:
        raise ConfigError(
            f"--array {file} has no line; write one of key=value words for each run, for example "
            "optim.learning_rate=1e-3 seed=1"
        )
    return runs


def _words(file: Path, line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise ConfigError(
            f"--array {file}: {error} in {line!r}; close the quotation, or put a backslash before "
            "a quotation mark that is meant"
        ) from None


def commands(job: Job) -> list[list[str]]:
    """Returns the command of every run, checked as `moejax` checks it.

    Raises:
        ConfigError: `moejax` would refuse one.
    """
    if not job.command or job.command[0] not in VERBS:
        given = job.command[0] if job.command else "nothing"
        raise ConfigError(f"{given} is not a verb of moejax; for example train configs/x.py")
    verb = VERBS[job.command[0]]
    if job.copies is not None:
        found = [job.command] * job.copies
    elif job.runs is None:
        found = [job.command]
    else:
        verb.read(job.command[1:])
        if "--workdir" not in job.command:
            raise ConfigError(
                f"--array needs a workdir for its runs, which {job.command[0]} has to be given as "
                "--workdir DIR, two words; for example train configs/x.py --workdir runs/sweep"
            )
        at = job.command.index("--workdir") + 1
        workdir = job.command[at]
        found = [
            [*job.command[:at], f"{workdir}/{index}", *job.command[at + 1 :], *overrides]
            for index, overrides in enumerate(job.runs)
        ]
    for command in found:
        line = verb.read(command[1:])
        if line.config is not None:
            line.load()
    return found


def render(job: Job) -> str:
    """Returns the batch script."""
    found = commands(job)
    array = job.runs is not None or job.copies is not None
    folder, number = job.logs, "%A_%a" if array else "%j"
    asks = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,  # JAX drives all devices of a node from one process
        "gpus-per-node": job.gpus_per_node,
        "cpus-per-task": job.cpus_per_task,
        "time": job.time,
        "output": f"{folder}/{number}.log",
        "open-mode": "append",  # a job that is requeued goes on in its log
        "signal": f"TERM@{job.grace}",  # the partition may have a limit too
        "array": f"0-{len(found) - 1}" if array else None,
    }
    lines = [_directive(name, value) for name, value in asks.items() if value is not None]
    if job.cpus_per_task is None:
        lines.append("#SBATCH --exclusive")  # else SLURM gives a task one CPU
    lines += ["#SBATCH --requeue", *(f"#SBATCH {option}" for option in job.sbatch)]
    cpus = "" if job.cpus_per_task is None else f" --cpus-per-task={job.cpus_per_task}"
    words = [" ".join(map(shlex.quote, command)) for command in found]
    program = f"{shlex.quote(sys.executable)} -m moejax"
    again = f"supervise --restarts {job.restarts} --end_when_preempted"
    supervisor = f"{program} {again} -- \\\n  " if job.command[0] == "train" else ""
    cases = "\n".join(f"  {index}) set -- {text} ;;" for index, text in enumerate(words))
    return f"""#!/bin/bash
{chr(10).join(lines)}

case "${{SLURM_ARRAY_TASK_ID:-0}}" in
{cases}
esac

# Process 0 is on the first node, at the address by which SLURM reaches it.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
export JAX_COORDINATOR_ADDRESS="$address:$(({PORTS} + SLURM_JOB_ID % 4096))"

# A signal to the whole job is for the processes: this script has to outlive them.
trap : TERM
# The first process that ends does not end the others at once: they are about to, in order.
{supervisor}srun --kill-on-bad-exit=0 --wait={WAIT_SECONDS} --open-mode=append{cpus} \\
  --output={shlex.quote(f"{folder}/{number}")}-%t.log \\
  {program} "$@"
code=$?

# Saved and stopped by a signal: once more, unless it is SLURM that ends the job, to requeue or
# to cancel it.
if [ $code = {PREEMPTED} ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


def _directive(name: str, value: object) -> str:
    """Returns the line for sbatch, which reads quotes as a shell does, but for backslashes."""
    text = str(value)
    if "\\" in text or not text.isprintable():
        raise ConfigError(
            f"#SBATCH --{name}={text!r} cannot stand in a script; use no backslashes, tabs and "
            "line breaks"
        )
    return f"#SBATCH --{name}={shlex.quote(text)}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--nodes", type=int, required=True, help="number of nodes, with one process on each"
    )
    parser.add_argument(
        "--gpus_per_node", type=int, help="GPUs to ask for on each node (default: none)"
    )
    help = "CPUs of each node, for data and saving (default: whole nodes, exclusively)"
    parser.add_argument("--cpus_per_task", type=int, metavar="N", help=help)
    parser.add_argument("--time", help="time limit of the job, such as 4:00:00")
    help = "seconds before the limit at which to save and requeue (default: 120)"
    parser.add_argument("--grace", type=int, default=120, help=help)
    help = "restarts in a row without a newer checkpoint before giving up (default: 3)"
    parser.add_argument("--restarts", type=int, default=3, metavar="N", help=help)
    parser.add_argument(
        "--array", type=Path, help="file with a line of key=value words for each run"
    )
    help = "number of array tasks that all run the same, such as workers of a sweep"
    parser.add_argument("--copies", type=int, metavar="N", help=help)
    parser.add_argument("--name", default="moejax", help="name of the job (default: moejax)")
    parser.add_argument(
        "--logs", type=Path, default=Path("logs"), help="folder of the logs (default: logs)"
    )
    help = "one more option of sbatch, as in --sbatch=--partition=big; repeatable"
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help=help)
    parser.add_argument("--dry_run", action="store_true", help="print the script, submit nothing")
    parser.add_argument("command", nargs="+", help="after --: a verb of moejax and its words")
    options = vars(parser.parse_args())
    for name in ("nodes", "cpus_per_task", "restarts", "copies"):
        if options[name] is not None and options[name] < 1:
            parser.error(f"--{name} {options[name]} is below 1")
    if options["array"] is not None and options["copies"] is not None:
        parser.error("--array and --copies both make an array; give one")
    dry_run, array, sbatch = (options.pop(name) for name in ("dry_run", "array", "sbatch"))
    try:
        runs = None if array is None else read_runs(array)
        script = render(Job(**options, runs=runs, sbatch=tuple(sbatch)))
    except ConfigError as error:
        print(f"launch/slurm.py: error: {error}", file=sys.stderr)
        return BAD_INPUT
    if dry_run:
        print(script, end="")
        return 0
    options["logs"].mkdir(parents=True, exist_ok=True)  # SLURM writes no log without its folder
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=script, text=True, check=False)
    except FileNotFoundError:
        print(
            "launch/slurm.py: error: there is no sbatch here; run this on a login node of the "
            "cluster, or take --dry_run's script there",
            file=sys.stderr,
        )
        return BAD_INPUT
    return done.returncode


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")  # SLURM hands it on: logs are read while it runs
    sys.exit(main())
