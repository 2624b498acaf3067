"""launch/kubernetes.py: what it renders is a JobSet by the published schemas, and starts moejax."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from moejax.cluster import find_cluster

ROOT = Path(__file__).parents[1]
SCHEMA = json.loads((ROOT / "tests/data/jobset_v1alpha2.schema.json").read_text())
TRAIN = ["--", "train", "configs/quickstart.py", "--workdir", "/runs/a", "mesh.expert=8"]
GPU = ["--name", "a", "--image", "moejax:1", "--hosts", "2", "--gpus", "8", "--claim", "runs"]
TPU = ["--name", "a", "--image", "moejax:1", "--tpu", "tpu-v5p-slice", "--topology", "2x2x4"]


def run(*words: str, path: str | None = None) -> subprocess.CompletedProcess:
    environment = os.environ | ({} if path is None else {"PATH": path})
    return subprocess.run(
        [sys.executable, "launch/kubernetes.py", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )


def render(*words: str) -> dict:
    done = run(*words, "--dry_run", *TRAIN)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def job_of(jobset: dict) -> dict:
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def container_of(jobset: dict) -> dict:
    (container,) = job_of(jobset)["template"]["spec"]["containers"]
    return container


@pytest.mark.parametrize("words", [GPU, [*TPU, "--claim", "runs"], GPU[:4]])
def test_the_jobset_is_valid(words):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(render(*words, "--namespace", "research"), SCHEMA)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda j: job_of(j).update(completionMode="indexed"), "is not one of"),
        (lambda j: job_of(j).update(parallelsim=2), "'parallelsim' was unexpected"),
        (lambda j: container_of(j).pop("name"), "'name' is a required property"),
        (lambda j: j["spec"]["failurePolicy"].update(maxRestarts="3"), "is not of type 'integer'"),
        (lambda j: j["spec"]["failurePolicy"]["rules"][0].update(action="Stop"), "is not one of"),
    ],
)
def test_the_schema_sees_mistakes(broken, message):
    jobset = render(*GPU)
    broken(jobset)
    with pytest.raises(jsonschema.ValidationError, match=message):
        jsonschema.validate(jobset, SCHEMA)


def test_gpu_pods_find_process_0():
    """Each pod's variables, with its completion index, are a cluster of `--hosts` processes."""
    container = container_of(render(*GPU))
    variables = {v["name"]: v.get("value") for v in container["env"]}
    (index,) = (v for v in container["env"] if "valueFrom" in v)
    assert index["name"] == "JAX_PROCESS_ID"
    assert "job-completion-index" in index["valueFrom"]["fieldRef"]["fieldPath"]
    cluster = find_cluster(variables | {"JAX_PROCESS_ID": "1"})
    assert cluster == ("a-host-0-0.a:8476", 2, 1)
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "8"}}
    again = ["supervise", "--end_when_preempted", *TRAIN]
    assert container["command"] + container["args"] == ["python", "-m", "moejax", *again]


@pytest.mark.parametrize(
    ("tpu", "topology", "hosts", "chips"),
    [
        ("tpu-v5p-slice", "2x2x4", 4, "4"),
        ("tpu-v5-lite-podslice", "4x4", 4, "4"),
        ("tpu-v5-lite-podslice", "2x4", 1, "8"),
        ("tpu-v6e-slice", "2x2", 1, "4"),
        ("tpu-v5-lite-podslice", "1x1", 1, "1"),
    ],
)
def test_tpu_hosts_come_from_the_topology(tpu, topology, hosts, chips):
    words = ["--name", "a", "--image", "i", "--tpu", tpu, "--topology", topology, "--claim", "runs"]
    jobset = render(*words)
    job = job_of(jobset)
    assert job["completions"] == job["parallelism"] == hosts
    assert container_of(jobset)["resources"]["limits"]["google.com/tpu"] == chips
    assert job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology


def test_which_exit_codes_start_again():
    jobset = render(*GPU)
    (rule,) = job_of(jobset)["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [1, 2, 17, 28, 70, 130]
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*GPU[:-2]], "several hosts need --claim"),
        ([*TPU, "--gpus", "8"], "leave out --hosts and --gpus"),
        (["--name", "A_b", "--image", "i"], "is no name of a host"),
        (["--name", "a", "--image", "i", "--tpu", "v9", "--topology", "2x2"], "is not one of"),
        (["--name", "a", "--image", "i", "--tpu", "tpu7x"], "--tpu and --topology go together"),
        (["--name", "a", "--image", "i", "--hosts", "0"], "--hosts 0 is below 1"),
        ([*TPU[:-1], "2by2"], "is not like 4x4"),
        ([*TPU[:-1], "0x4"], "is not like 4x4"),
        ([*TPU[:-1], "2x3x5"], "2x3x5 has 30 chips, not a multiple of the 4 of a host"),
    ],
)
def test_what_cannot_be_is_refused(words, message):
    done = run(*words, *TRAIN)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_wrong_command_is_refused_before_it_costs_anything():
    done = run(*GPU, "--", "train", "configs/quickstart.py", "--wokdir", "/runs/a")
    assert done.returncode == 2
    assert "did you mean --workdir?" in done.stderr


def test_without_kubectl_the_remedy_is_named(tmp_path):
    done = run(*GPU, *TRAIN, path=str(tmp_path))
    assert done.returncode == 2
    assert "--dry_run" in done.stderr
