"""launch/slurm.py: its script with stand-ins for SLURM's programs, and a job on a real cluster."""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from moejax.metrics import read_metrics
from moejax.overrides import read_overrides
from moejax.sweep_study import open_study

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs/quickstart.py")


def run(*words: str, environment: dict | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "launch/slurm.py", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
    )


def render(*words: str) -> str:
    done = run("--dry_run", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


# The script, with programs that only say how they were called


@pytest.fixture
def execute(tmp_path) -> Callable:
    """Runs a script where `srun` ends with a code and `squeue` tells a state; returns its lines."""
    programs = {
        "srun": 'printf "%s|" srun "$JAX_COORDINATOR_ADDRESS" "$@"; echo; exit $CODE',
        "squeue": "echo $STATE",
        "scontrol": """case "$*" in
"show hostnames n[1-2]") echo n1; echo n2 ;;
"show node n1") echo "   NodeAddr=10.0.0.7 NodeHostName=n1 Port=6818" ;;
*) echo "scontrol $*" ;;
esac""",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def execute(script: str, code=0, state="RUNNING", task: int | None = None, ends=None):
        environment = {
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "5",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "CODE": str(code),
            "STATE": state,
        }
        if task is not None:
            environment["SLURM_ARRAY_TASK_ID"] = str(task)
        done = subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, env=environment
        )
        assert done.returncode == (code if ends is None else ends), done.stderr
        assert bool(done.stderr) == (ends is not None)
        return done.stdout.splitlines()

    return execute


TRAIN = ["--", "train", CONFIG, "--workdir", "runs/my run", "model.dtype=bfloat16"]


def test_one_process_a_node_runs_the_command(execute):
    names = ["--name", "my job", "--logs", "my logs"]
    script = render("--nodes", "2", "--gpus_per_node", "8", *names, *TRAIN)
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n#SBATCH --gpus-per-node=8" in script
    assert "#SBATCH --requeue" in script
    assert "#SBATCH --job-name='my job'\n" in script
    assert "#SBATCH --output='my logs/%j.log'\n" in script
    (line,) = execute(script)
    words = line.rstrip("|").split("|")
    assert words[1] == "10.0.0.7:61445", "the address of the first node, the port of the job"
    assert "--output=my logs/%j-%t.log" in words, "a log a process"
    assert words[words.index("-m") :] == ["-m", "moejax", *TRAIN[1:]]


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [
        (75, "RUNNING", True),  # a signal came: the time is up, or somebody wants the nodes
        (75, "COMPLETING", False),  # SLURM ends the job: it requeues, or was told to cancel
        (0, "RUNNING", False),
        (2, "RUNNING", False),
    ],
)
def test_what_is_requeued(execute, code, state, requeued):
    lines = execute(render("--nodes", "2", *TRAIN), code, state)
    assert ("scontrol requeue 5" in lines) == requeued
    assert sum(line.startswith("srun") for line in lines) == 1


def test_a_crash_is_started_again_on_the_nodes(execute):
    """By the supervisor, until it gives up; the job then ends with the code that says so."""
    lines = execute(render("--nodes", "2", "--restarts", "1", *TRAIN), 134, ends=70)
    assert [line.split("|")[0] for line in lines] == ["srun", "srun"]


def test_what_does_not_train_is_run_once(execute):
    script = render("--nodes", "1", "--", "describe", CONFIG)
    assert "supervise" not in script
    assert len(execute(script, 134)) == 1


@pytest.mark.parametrize("time", [["--time", "1:00:00"], []])
def test_the_signal_comes_before_the_limit(time):
    """Also before that of the partition, where the user gave none."""
    script = render("--nodes", "1", *time, "--grace", "300", *TRAIN)
    assert ("#SBATCH --time=1:00:00\n" in script) == bool(time)
    assert "#SBATCH --signal=TERM@300\n" in script


def test_a_task_has_all_cpus_of_its_node_or_those_asked_for(execute):
    """srun does not take over what sbatch was asked for."""
    whole, some = render("--nodes", "1", *TRAIN), render("--nodes=1", "--cpus_per_task=6", *TRAIN)
    assert "#SBATCH --exclusive\n" in whole
    assert "cpus-per-task" not in whole
    assert "#SBATCH --cpus-per-task=6\n" in some
    assert "--exclusive" not in some
    assert "--cpus-per-task=6" in execute(some)[0].split("|")


def test_a_workdir_may_be_called_like_another_word(execute, tmp_path):
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("seed=1")
    words = ["--array", str(sweep), "--", "train", CONFIG, "--workdir", "train"]
    (line,) = execute(render("--nodes", "1", *words), task=0)
    words = line.rstrip("|").split("|")
    assert words[words.index("-m") + 2 :] == ["train", CONFIG, "--workdir", "train/0", "seed=1"]


def test_an_array_is_a_run_a_line(execute, tmp_path):
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("# learning rates\noptim.learning_rate=1e-3 seed=1\n\nseed=2\n")
    script = render("--nodes", "2", "--array", str(sweep), "--sbatch=--partition=big", *TRAIN)
    assert "#SBATCH --array=0-1\n" in script
    assert "#SBATCH --partition=big\n" in script
    for task, overrides in enumerate((["optim.learning_rate=1e-3", "seed=1"], ["seed=2"])):
        (line,) = execute(script, task=task)
        assert "--output=logs/%A_%a-%t.log" in line
        expected = ["train", CONFIG, "--workdir", f"runs/my run/{task}", TRAIN[-1], *overrides]
        assert line.rstrip("|").split("|")[-len(expected) :] == expected


@pytest.mark.parametrize(
    ("sweep", "words", "message"),
    [
        ("seed=1\nmoe.top_k=99", TRAIN, "moe.top_k=99 is larger than moe.num_experts=16"),
        ("model.dtype=float32", TRAIN, "model.dtype is given twice"),
        ("", TRAIN, "has no line; write one of key=value words for each run"),
        ("seed=1", ["--", "train", CONFIG, "--workdir=a"], "as --workdir DIR, two words"),
        ("seed=1", ["--", "describe", CONFIG], "describe has to be given as --workdir DIR"),
        ("name=\xe9", TRAIN, "is not UTF-8: byte 0xe9 at offset 5; save it as UTF-8"),
        ("seed='1", TRAIN, 'No closing quotation in "seed=\'1"; close the quotation'),
        (None, ["--name", "a\\b", *TRAIN], "--job-name='a\\\\b' cannot stand in a script"),
        (None, ["--name", "a\n#SBATCH -N9", *TRAIN], "cannot stand in a script; use no"),
        (None, ["--cpus_per_task", "0", *TRAIN], "--cpus_per_task 0 is below 1"),
        (None, ["--", "trian", CONFIG], "trian is not a verb of moejax"),
        (None, [*TRAIN, "mesh.expret=2"], "did you mean mesh.expert?"),
    ],
)
def test_every_run_is_checked_before_it_is_submitted(tmp_path, sweep, words, message):
    array = []
    if sweep is not None:
        file = tmp_path / "sweep.txt"
        file.write_bytes(sweep.encode("latin-1"))
        array = ["--array", str(file)]
    done = run("--nodes", "1", *array, *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_without_sbatch_the_remedy_is_named(tmp_path):
    logs = ["--logs", str(tmp_path)]
    done = run("--nodes", "1", *logs, *TRAIN, environment={"PATH": str(tmp_path)})
    assert done.returncode == 2
    assert "run this on a login node" in done.stderr


# A real cluster: munge, a controller and two nodes on the loopback interface

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "sinfo")
CONF = """ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=none
MailProg=/bin/true
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=0,sched_interval=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in sockets]


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not in {seconds} s"
        time.sleep(0.2)


def ask(environment: dict, *words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, env=environment).stdout


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[dict]:
    """Starts a cluster; gives the environment in which SLURM's programs find it."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}; get them: apt-get install -y slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    text = CONF.format(
        host=socket.gethostname().partition(".")[0],
        user=getpass.getuser(),
        folder=folder,
        ports=free_ports(3),
    )
    (folder / "slurm.conf").write_text(text)
    key, conf = f"{folder}/munge.key", str(folder / "slurm.conf")
    subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True)
    names = {"socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    files = [f"--{option}={folder}/munge.{end}" for option, end in names.items()]
    daemons = [
        ["munged", "--foreground", "--force", f"--key-file={key}", *files],
        ["slurmctld", "-D", "-f", conf],
        ["slurmd", "-D", "-f", conf, "-N", "n1"],
        ["slurmd", "-D", "-f", conf, "-N", "n2"],
    ]
    environment = {**os.environ, "SLURM_CONF": conf}
    started = []
    with open(folder / "daemons.log", "wb") as log:
        try:
            for words in daemons:
                started.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log))
                time.sleep(0.5)
            idle = ["sinfo", "-h", "-o", "%T %D"]
            until(lambda: ask(environment, *idle).strip() == "idle 2", 60, f"two nodes, {folder}")
            yield environment
        finally:
            for process in reversed(started):
                process.terminate()
            for process in started:
                process.wait(20)


SMALL = [
    "model.num_layers=1",
    "model.d_model=16",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.head_dim=8",
    "moe.num_experts=8",
    "moe.expert_hidden=16",
    "data.sequence_length=32",
    "train.batch_size=8",
    "train.steps=40",
    "logging.every=1",
    "eval.every=None",
    "eval.batches=1",
    "checkpoint.every=40",
    "mesh.data=1",
    "mesh.expert=4",
]


@pytest.mark.slow
def test_a_job_that_is_stopped_midway_goes_on_to_the_same_losses(slurm, tmp_path):
    """Two nodes of two devices. SIGTERM, requeue, resume; the losses of an undisturbed run."""
    train = ["train", CONFIG, "--workdir", str(tmp_path / "stopped"), "--cpu_devices", "2", *SMALL]
    logs = tmp_path / "logs"
    done = run("--nodes", "2", "--logs", str(logs), "--", *train, environment=slurm)
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()

    def said() -> str:
        texts = [f"{file.name}:\n{file.read_text()}" for file in sorted(logs.glob("*.log"))]
        return ask(slurm, "scontrol", "show", "job", job) + "\n".join(texts)

    until(lambda: len(_records(tmp_path / "stopped")) >= 3, 240, "three steps")
    subprocess.run(["scancel", "--signal=TERM", job], env=slurm, check=True)
    until(lambda: "Restarts=1" in ask(slurm, "scontrol", "show", "job", job), 60, "requeued")
    stopped = len(_records(tmp_path / "stopped"))
    assert 3 <= stopped < 40, "it was stopped too late to show anything"

    until(lambda: "JobState=COMPLETED" in said(), 240, "completed")
    assert f"stopped by SIGTERM, saved at step {stopped}" in said()
    assert f"resuming after step {stopped}" in said()
    assert {file.name for file in logs.glob("*.log")} == {
        f"{job}{end}.log" for end in ("", "-0", "-1")
    }

    alone = ["train", CONFIG, "--workdir", str(tmp_path / "alone"), "--cpu_devices", "4", *SMALL]
    subprocess.run([sys.executable, "-m", "moejax", *alone], check=True, cwd=ROOT)
    steps, losses = zip(*_records(tmp_path / "stopped"), strict=True)
    assert list(steps) == list(range(1, 41))
    np.testing.assert_allclose(losses, [r[1] for r in _records(tmp_path / "alone")], rtol=1e-5)


def test_copies_are_an_array_of_the_same(execute):
    script = render("--nodes", "1", "--copies", "2", "--", "sweep_worker", "--workdir", "my sweep")
    assert "#SBATCH --array=0-1\n" in script
    for task in (0, 1):
        (line,) = execute(script, 75, task=task)[:1]
        assert line.rstrip("|").split("|")[-3:] == ["sweep_worker", "--workdir", "my sweep"]
    assert "scontrol requeue 5" in execute(script, 75, task=1), "a worker that was stopped"
    done = run("--nodes", "1", "--copies", "2", "--array", "x", *TRAIN)
    assert done.returncode == 2
    assert "--array and --copies both make an array" in done.stderr


@pytest.mark.slow
def test_two_workers_of_a_sweep(slurm, tmp_path):
    """A task on each node takes a trial; the study is one."""
    words = dict(word.split("=") for word in SMALL)
    fixed = {**words, "train.steps": "6", "mesh.expert": "1", "checkpoint.every": "6"}
    shown = {name: read_overrides([f"{name}={value}"])[name] for name, value in fixed.items()}
    (tmp_path / "x.py").write_text(
        "from moejax.sweep_space import Grid, Sweep\n\n\ndef get_sweep():\n"
        f"    space = Grid({{'optim.learning_rate': [1e-3, 1e-2]}})\n"
        f"    return Sweep({os.path.relpath(CONFIG, tmp_path)!r}, space, {shown!r})\n"
    )
    workdir = tmp_path / "s"
    asked = ["--launcher", "slurm", "--workers", "2", "--slurm=--time 0:20:00"]
    line = ["sweep", str(tmp_path / "x.py"), "--workdir", str(workdir), "--cpu_devices", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "moejax", *line, *asked],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=slurm,
    )
    logs = "\n".join(file.read_text() for file in sorted((workdir / "logs").glob("*.log")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert "of 2 workers" in done.stdout
    with contextlib.closing(open_study(workdir, None)) as study:
        trials = study.optuna.get_trials()
        assert [record.state for record in study.records()] == ["complete", "complete"]
    assert len({trial.user_attrs["worker"] for trial in trials}) == 2, "each took one"
    assert (workdir / "report.md").exists()


def _records(workdir: Path) -> list[tuple[int, float]]:
    if not (workdir / "metrics.jsonl").exists():
        return []
    return [(r["step"], r["loss"]) for r in read_metrics(workdir) if r["split"] == "train"]
