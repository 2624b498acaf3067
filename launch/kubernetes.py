r"""Runs one `moejax` command on Kubernetes: a JobSet whose pods are the processes, one per host.

    python launch/kubernetes.py --name a --image IMAGE --hosts 2 --gpus 8 --claim runs -- \
      train configs/quickstart.py --workdir /runs/a
    python launch/kubernetes.py --name a --image IMAGE --tpu tpu-v5p-slice --topology 2x2x4 \
      --claim runs -- train configs/quickstart.py --workdir /runs/a

The cluster needs the JobSet controller (jobset.sigs.k8s.io). IMAGE must have moejax, with its
configs in the working folder. --claim names a volume that all pods can write; it is mounted at
/runs, and the workdir must be there. Inside a pod, `moejax supervise` restarts a training that
fails. A pod that is preempted gets SIGTERM and saves; then, as when a pod is lost, all pods start
again and resume, up to --max_restarts times. An exit code that a restart cannot cure ends the
JobSet.
"""

import argparse
import dataclasses
import math
import re
import shlex
import subprocess
import sys
from typing import Any

import yaml

from moejax.cli import VERBS
from moejax.errors import BAD_INPUT, CHECK_FAILED, DONE, FINAL, ConfigError

PORT = 8476
MOUNT = "/runs"
GRACE_SECONDS = 120  # between SIGTERM and SIGKILL, for the checkpoint
JOIN_SECONDS = 1200  # the last host has pulled the image, or a node was made for it
# Chips of a host; slices of these types with at most 8 chips in one host are another machine
CHIPS_PER_HOST = {
    "tpu-v4-podslice": 4,
    "tpu-v5-lite-podslice": 4,
    "tpu-v5p-slice": 4,
    "tpu-v6e-slice": 4,
    "tpu7x": 4,
}
EXCLUSIVE = "alpha.jobset.sigs.k8s.io/exclusive-topology"
COMPLETION_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


@dataclasses.dataclass(frozen=True)
class Launch:
    """What to run and on what: `hosts` with GPUs each, or a TPU slice."""

    command: list[str]
    name: str
    image: str
    hosts: int = 1
    gpus: int | None = None
    tpu: str | None = None
    topology: str | None = None
    claim: str | None = None
    namespace: str | None = None
    max_restarts: int = 100

    def __post_init__(self):
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", self.name):
            raise ConfigError(
                f"--name {self.name!r} is no name of a host; use up to 40 small letters, digits "
                "and dashes, beginning with a letter"
            )
        if (self.tpu is None) != (self.topology is None):
            raise ConfigError("--tpu and --topology go together, as in tpu-v5p-slice and 2x2x4")
        if self.tpu is not None and (self.gpus is not None or self.hosts != 1):
            raise ConfigError("--tpu has its hosts from --topology; leave out --hosts and --gpus")
        if self.tpu is not None and self.tpu not in CHIPS_PER_HOST:
            raise ConfigError(f"--tpu {self.tpu} is not one of {', '.join(CHIPS_PER_HOST)}")
        for name in ("hosts", "gpus"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} {value} is below 1")
        if self.topology is not None:
            self._check_topology(self.topology)
        if not self.command or self.command[0] not in VERBS:
            raise ConfigError("the command is no verb of moejax; for example train configs/x.py")
        VERBS[self.command[0]].read(self.command[1:])  # the config file is in the image

    def _check_topology(self, topology: str) -> None:
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", topology):
            raise ConfigError(f"--topology {topology} is not like 4x4 or 2x2x4")
        if self.slice_chips % self.chips:
            raise ConfigError(
                f"--topology {topology} has {self.slice_chips} chips, not a multiple of the "
                f"{self.chips} of a host of {self.tpu}; use a topology that it comes in"
            )

    @property
    def slice_chips(self) -> int:
        assert self.topology is not None
        return math.prod(map(int, self.topology.split("x")))

    @property
    def chips(self) -> int:
        """TPU chips that one host of the slice has."""
        assert self.tpu is not None
        small = self.tpu in ("tpu-v5-lite-podslice", "tpu-v6e-slice") and self.slice_chips <= 8
        return min(self.slice_chips, 8 if small else CHIPS_PER_HOST[self.tpu])

    @property
    def processes(self) -> int:
        """One a host."""
        return self.hosts if self.topology is None else self.slice_chips // self.chips


def jobset(launch: Launch) -> dict[str, Any]:
    """Returns the JobSet, as plain values."""
    metadata: dict[str, Any] = {"name": launch.name}
    if launch.namespace is not None:
        metadata["namespace"] = launch.namespace
    if launch.tpu is not None:  # a slice is one node pool, for this job alone
        metadata["annotations"] = {EXCLUSIVE: "cloud.google.com/gke-nodepool"}
    job = {
        "backoffLimit": 0,  # processes go on together or not at all
        "completionMode": "Indexed",
        "completions": launch.processes,
        "parallelism": launch.processes,
        "podFailurePolicy": {"rules": [_fail_for_good()]},
        "template": {"spec": _pod(launch)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": launch.max_restarts,
                "rules": [
                    {
                        "name": "badInput",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": "host", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _fail_for_good() -> dict[str, Any]:
    values = sorted({CHECK_FAILED, *FINAL} - {DONE})
    codes = {"containerName": "moejax", "operator": "In", "values": values}
    return {"action": "FailJob", "onExitCodes": codes}


def _pod(launch: Launch) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": "moejax",
        "image": launch.image,
        "command": ["python", "-m", "moejax"],  # no shell: the signal has to reach Python
        "args": _supervised(launch.command),
        "env": _environment(launch),
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [container],
    }
    if launch.tpu is not None:
        container["resources"] = {"limits": {"google.com/tpu": str(launch.chips)}}
        pod["nodeSelector"] = {
            "cloud.google.com/gke-tpu-accelerator": launch.tpu,
            "cloud.google.com/gke-tpu-topology": launch.topology,
        }
    elif launch.gpus is not None:
        container["resources"] = {"limits": {"nvidia.com/gpu": str(launch.gpus)}}
    if launch.claim is not None:
        container["volumeMounts"] = [{"name": "runs", "mountPath": MOUNT}]
        pod["volumes"] = [{"name": "runs", "persistentVolumeClaim": {"claimName": launch.claim}}]
    return pod


def _supervised(command: list[str]) -> list[str]:
    """A training is started again in its pod, but not when the pod has to go."""
    if command[0] != "train":
        return command
    return ["supervise", "--end_when_preempted", "--", *command]


def _environment(launch: Launch) -> list[dict[str, Any]]:
    """Where process 0 waits. On TPUs the cluster says so itself."""
    values = {"MOEJAX_JOIN_SECONDS": str(JOIN_SECONDS), "PYTHONUNBUFFERED": "1"}
    if launch.tpu is None:
        values["JAX_COORDINATOR_ADDRESS"] = f"{launch.name}-host-0-0.{launch.name}:{PORT}"
        values["JAX_NUM_PROCESSES"] = str(launch.hosts)
    variables: list[dict[str, Any]] = [{"name": n, "value": v} for n, v in values.items()]
    if launch.tpu is None:
        index = {"fieldRef": {"fieldPath": COMPLETION_INDEX}}
        variables.append({"name": "JAX_PROCESS_ID", "valueFrom": index})
    return variables


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="name of the JobSet")
    parser.add_argument("--image", required=True, help="container image that has moejax")
    parser.add_argument(
        "--hosts", type=int, default=1, help="number of hosts, without --tpu (default: 1)"
    )
    parser.add_argument("--gpus", type=int, help="GPUs of each host")
    parser.add_argument("--tpu", help=f"type of the slice: {', '.join(CHIPS_PER_HOST)}")
    parser.add_argument("--topology", help="topology of the slice, such as 2x2x4")
    parser.add_argument("--claim", help=f"persistent volume claim to mount at {MOUNT}")
    parser.add_argument("--namespace", help="default: the one that kubectl uses")
    parser.add_argument(
        "--max_restarts",
        type=int,
        default=100,
        help="restarts of all pods before giving up (default: 100)",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the JobSet, apply nothing")
    parser.add_argument("command", nargs="+", help="after --: a verb of moejax and its words")
    options = vars(parser.parse_args())
    dry_run = options.pop("dry_run")
    try:
        launch = Launch(**options)
        if launch.claim is None and launch.processes > 1:
            raise ConfigError("several hosts need --claim: each writes its part of a checkpoint")
        text = yaml.safe_dump(jobset(launch), sort_keys=False)
        if dry_run:
            print(f"# {shlex.join(sys.argv)}\n{text}", end="")
            return 0
        return subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True).returncode
    except ConfigError as error:
        print(f"launch/kubernetes.py: error: {error}", file=sys.stderr)
    except FileNotFoundError:
        print(
            "launch/kubernetes.py: error: there is no kubectl here; install it, or take what "
            "--dry_run prints to where it is",
            file=sys.stderr,
        )
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
