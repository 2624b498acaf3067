"""launch/tpu_pod.sh: the words arrive at every host as they were written."""

import os
import shutil
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "launch/tpu_pod.sh"


def run(*words: str, path: Path) -> subprocess.CompletedProcess:
    """Runs the script with what is in the folder `path`, and a bash, as the only programs."""
    bash = shutil.which("bash")
    assert bash is not None
    if not (path / "bash").exists():
        (path / "bash").symlink_to(bash)
    environment = os.environ | {"PATH": str(path)}
    return subprocess.run([str(SCRIPT), *words], capture_output=True, text=True, env=environment)


def test_the_command_of_every_host(tmp_path):
    """A gcloud that runs --command here as the shell of a host would; a word with a space lives."""
    folder = tmp_path / "my clone"
    program = folder / ".venv/bin/moejax"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"\n')
    gcloud = tmp_path / "gcloud"
    gcloud.write_text('#!/bin/sh\necho "$1 $2 $3 $4 $5 $6 $7"\nbash -c "${8#--command=}"\n')
    for file in (program, gcloud):
        file.chmod(0o755)
    train = ["train", "configs/x.py", "--workdir", "/mnt/my runs", "model.dtype='bfloat16'"]
    done = run("pod", "us-east5-a", str(folder), *train, path=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "compute tpus tpu-vm ssh pod --zone=us-east5-a --worker=all"
    assert lines[1:] == [str(folder), "supervise", "--end_when_preempted", "--", *train]
    done = run("pod", "us-east5-a", str(folder), "eval", "--workdir", "a", path=tmp_path)
    assert done.stdout.splitlines()[1:] == [str(folder), "eval", "--workdir", "a"]


def test_too_few_words(tmp_path):
    done = run("pod", path=tmp_path)
    assert done.returncode == 2
    assert "usage: launch/tpu_pod.sh TPU ZONE FOLDER" in done.stderr


def test_no_gcloud(tmp_path):
    done = run("pod", "zone", "moejax", "train", path=tmp_path)
    assert done.returncode == 2
    assert "there is no gcloud here; install" in done.stderr
