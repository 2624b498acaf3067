"""How the processes of one run find each other, and check that they are one run.

The one place that starts `jax.distributed`. A launcher says where process 0 waits (`launch/`), or
SLURM or a TPU pod does; every process then joins within a time, or says which address it tried.
"""

import contextlib
import errno
import glob
import json
import os
import platform
import re
import secrets
import socket
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax._src import distributed  # its client has the key-value store, and no public name

import moejax
from moejax.errors import (
    BAD_INPUT,
    CHECK_FAILED,
    FINAL,
    INTERRUPTED,
    UNAVAILABLE,
    ConfigError,
    UnavailableError,
    file_error,
)
from moejax.foreign import printable

COORDINATOR, PROCESSES, PROCESS_ID = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)
BIND = "JAX_COORDINATOR_BIND_ADDRESS"
JOIN_SECONDS = "MOEJAX_JOIN_SECONDS"
DEFAULT_JOIN_SECONDS = 300  # on a cluster the slowest process still pulls its image
HEARTBEAT_SECONDS = 30  # after which a process that computes nothing with the others is lost
SHUTDOWN_SECONDS = 20
REFUSE_SECONDS = 1.5  # in which an error that all processes raise is raised by all
APPEAR_SECONDS = 30
SOFTWARE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
TPU_PORT = 8476 + 6  # beside those that libtpu takes
SLICES = "MEGASCALE_NUM_SLICES"
SLICE_ID = "MEGASCALE_SLICE_ID"
SLICES_COORDINATOR = "MEGASCALE_COORDINATOR_ADDRESS"


class Cluster(NamedTuple):
    """The processes of one run, and which of them this one is."""

    address: str  # host:port of process 0
    num_processes: int
    process_id: int


# Finding


def find_cluster(environment: Mapping[str, str]) -> Cluster | None:
    """Returns the cluster that the environment tells of; None for a process alone.

    A launcher's variables come first, then SLURM's, then those of a TPU pod on Kubernetes, then
    what a TPU virtual machine says of itself.

    Raises:
        ConfigError: variables are missing or do not fit together.
    """
    for find in (_from_launcher, _from_slurm, _from_tpu_pod, _from_tpu_vm):
        cluster = find(environment)
        if cluster is not None:
            return _checked(cluster)
    return None


def _checked(cluster: Cluster) -> Cluster | None:
    address, count, index = cluster
    if not re.fullmatch(r".+:\d+", address):
        raise ConfigError(
            f"the coordinator's address is {address!r}, not HOST:PORT; for example 10.0.0.1:8476"
        )
    if not 0 <= index < count:
        raise ConfigError(
            f"there is no process {index} of {count} (coordinator {address}): the first is 0, the "
            f"last is {count - 1}; start {PROCESSES} processes, each with its own {PROCESS_ID}"
        )
    return cluster if count > 1 else None


def _from_launcher(environment: Mapping[str, str]) -> Cluster | None:
    address = environment.get(COORDINATOR)
    missing = [name for name in (PROCESSES, PROCESS_ID) if name not in environment]
    if "SLURM_PROCID" in environment and (address is None or len(missing) == 2):
        return None
    if address is None:
        given = [name for name in (PROCESSES, PROCESS_ID) if name in environment]
        if not given:
            return None
        raise ConfigError(
            f"{given[0]}={environment[given[0]]} is set, but {COORDINATOR} is not: this process "
            f"would train alone; set {COORDINATOR} to HOST:PORT of process 0, or unset {given[0]}"
        )
    if missing:
        raise ConfigError(
            f"{COORDINATOR}={address} is set, but not {', '.join(missing)}; a launcher sets all "
            "three, see docs/launching.md"
        )
    return Cluster(address, _whole(environment, PROCESSES), _whole(environment, PROCESS_ID))


def _from_slurm(environment: Mapping[str, str]) -> Cluster | None:
    """Inside `srun`: one process a task, the first node the coordinator's, the port by the job."""
    nodes = environment.get("SLURM_STEP_NODELIST")
    if nodes is None or "SLURM_PROCID" not in environment:
        return None
    port = 61_440 + _whole(environment, "SLURM_JOB_ID") % 4096  # two jobs on a node do not meet
    address = environment.get(COORDINATOR) or f"{first_host(nodes)}:{port}"
    count, index = (_whole(environment, name) for name in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"))
    return Cluster(address, count, index)


def first_host(nodes: str) -> str:
    """Returns the first of SLURM's compressed list: `a[03-07,9]-x,b1` begins with `a03-x`."""
    match = re.match(r"([^,\[]*)(?:\[([^\],-]*)[^\]]*\]([^,\[]*))?", nodes)
    assert match is not None
    return "".join(part or "" for part in match.groups())


def _from_tpu_pod(environment: Mapping[str, str]) -> Cluster | None:
    """On Kubernetes: what GKE puts into every container that asks for TPUs."""
    if "TPU_WORKER_ID" not in environment or "TPU_WORKER_HOSTNAMES" not in environment:
        return None
    hosts = environment["TPU_WORKER_HOSTNAMES"].split(",")
    return _tpu_cluster(hosts, _whole(environment, "TPU_WORKER_ID"), environment)


def _from_tpu_vm(environment: Mapping[str, str]) -> Cluster | None:
    """On a virtual machine with TPUs: what its metadata server says."""
    on_cpu = environment.get("JAX_PLATFORMS") == "cpu" or "TPU_SKIP_MDS_QUERY" in environment
    if on_cpu or not (glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")):
        return None
    return tpu_vm_cluster(_metadata)


def tpu_vm_cluster(metadata: Callable[[str], str | None]) -> Cluster | None:
    """Returns the cluster of a TPU virtual machine; None where the metadata know of no TPU.

    Args:
        metadata: the value of an attribute of the instance, or None.
    """
    worker, endpoints = metadata("agent-worker-number"), metadata("worker-network-endpoints")
    if worker is None or endpoints is None:
        return None
    hosts = [endpoint.split(":")[-1] for endpoint in endpoints.split(",")]  # name:id:address
    slices = dict(re.findall(r"^(MEGASCALE_\w+):\s*'?([^'\n]*)", metadata("tpu-env") or "", re.M))
    return _tpu_cluster(hosts, int(worker), slices)


def _tpu_cluster(hosts: list[str], worker: int, slices: Mapping[str, str]) -> Cluster:
    """The hosts of a slice; of several slices all of their hosts, slice by slice."""
    first, number, index = hosts[0], 1, 0
    if (slices.get(SLICES) or "1") != "1":
        missing = [name for name in (SLICES_COORDINATOR, SLICE_ID) if not slices.get(name)]
        if missing:
            raise ConfigError(
                f"{SLICES}={slices[SLICES]} is set, but not {', '.join(missing)}; set all three "
                "to start several slices, see docs/launching.md"
            )
        first = slices[SLICES_COORDINATOR]  # the first host of slice 0
        number, index = _whole(slices, SLICES), _whole(slices, SLICE_ID)
    process = index * len(hosts) + worker
    return Cluster(f"{first.split(':')[0]}:{TPU_PORT}", number * len(hosts), process)


def _metadata(attribute: str) -> str | None:
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/attributes/{attribute}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, TimeoutError):  # not a machine of this cloud, or without TPU
        return None


def _whole(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not re.fullmatch(r"\d{1,9}", text):
        raise ConfigError(f"{name}={text!r} is not a whole number; see docs/launching.md")
    return int(text)


# Joining


def join_processes(preemptible: bool) -> None:
    """Joins the processes of this run, if it has several; else does nothing.

    Args:
        preemptible: whether SIGTERM is for `preemption.py` to answer; else it ends a process.

    Raises:
        ConfigError: the port of process 0 is taken, or the processes run different software.
        UnavailableError: process 0 does not answer in time.
    """
    if jax.distributed.is_initialized():
        return
    cluster = find_cluster(os.environ)
    if cluster is None:
        return
    seconds, bind = _join_seconds(), None
    if cluster.process_id == 0:
        bind = os.environ.get(BIND) or own_address(cluster.address, seconds)
        _check_port(bind)
    else:
        _await_coordinator(cluster, seconds)
    jax.config.update("jax_enable_preemption_service", preemptible)  # it swallows SIGTERM
    with _give_up_after(seconds, cluster):
        jax.distributed.initialize(
            cluster.address,
            cluster.num_processes,
            cluster.process_id,
            cluster_detection_method="deactivate",  # else on SLURM it sees one GPU of a node only
            initialization_timeout=seconds + 60,  # JAX aborts then; we say why before
            coordinator_bind_address=bind,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    check_agreement("software", software())


def software() -> dict[str, str]:
    """Returns the versions on which all processes of a run must agree."""
    ours = {"moejax": moejax.__version__, "python": platform.python_version()}
    return ours | {name: version(name) for name in SOFTWARE}


def _join_seconds() -> int:
    return _whole(os.environ, JOIN_SECONDS) if JOIN_SECONDS in os.environ else DEFAULT_JOIN_SECONDS


def own_address(address: str, seconds: float) -> str:
    """Returns `IP:PORT` of the coordinator's address, for process 0 to listen at nothing else.

    A name is looked up until it is known: on a cluster that may take as long as a start does.

    Raises:
        UnavailableError: the name is not known in that time.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
            ip = found[0][4][0]
            return f"[{ip}]:{port}" if ":" in str(ip) else f"{ip}:{port}"
        except OSError as error:
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"process 0 cannot look up the name of its own host {host}, at {address} "
                    f"({error.strerror or error}); set {COORDINATOR} to a name that process 0 "
                    f"knows, or {BIND} to the IP:PORT where it should listen"
                ) from None
        time.sleep(0.5)


def _check_port(bind: str) -> None:
    """Checks that nothing listens at `HOST:PORT`, where an empty host is every interface."""
    host, _, port = bind.rpartition(":")
    host = host.strip("[]")
    everywhere = host in ("", "::") and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if everywhere or ":" in host else socket.AF_INET
    try:
        socket.create_server((host, int(port)), family=family, dualstack_ipv6=everywhere).close()
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(
                f"process 0 cannot listen at {bind}: this machine has another address; start "
                f"process 0 on the host in {COORDINATOR}, or set {BIND} to an address of this "
                f"machine (0.0.0.0:{port} is all of them)"
            ) from None
        raise ConfigError(
            f"process 0 cannot listen on port {port} ({error.strerror or error}): another program "
            f"uses it; end that program, or set another port in {COORDINATOR} for every process"
        ) from None


def _await_coordinator(cluster: Cluster, seconds: int) -> None:
    """Waits until process 0 listens. JAX would wait too, and then abort without a Python error."""
    host, _, port = cluster.address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((host.strip("[]"), int(port)), max(0.1, min(5, left))).close()
            return
        except OSError as error:
            if left <= 0:
                reason = error.strerror or error
                raise UnavailableError(_unreached(cluster, seconds, reason)) from None
        time.sleep(min(0.2, max(0.0, left)))


def _unreached(cluster: Cluster, seconds: int, reason: object) -> str:
    return (
        f"process {cluster.process_id} of {cluster.num_processes} did not reach process 0 at "
        f"{cluster.address} in {seconds} s ({reason}); check that process 0 runs on that host, and "
        f"that its port can be reached from here; {JOIN_SECONDS} sets how long to wait"
    )


@contextlib.contextmanager
def _give_up_after(seconds: int, cluster: Cluster) -> Iterator[None]:
    """Ends this process with a line that says why, if the others do not come in time.

    The wait is inside C++, which no exception of Python interrupts.
    """

    def give_up() -> None:
        index, count = cluster.process_id, cluster.num_processes
        print(
            f"moejax: error: process {index} of {count} waited {seconds} s at {cluster.address}, "
            f"but not all {count} processes came; look at the logs of the others and start all of "
            f"them; {JOIN_SECONDS} sets how long to wait",
            file=sys.stderr,
            flush=True,
        )
        os._exit(UNAVAILABLE)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# Agreeing


def check_agreement(topic: str, mine: Mapping[str, object]) -> None:
    """Refuses the run, on every process alike, where one has another value than process 0.

    It goes through the coordinator, not through devices: nothing is compiled.

    Args:
        topic: what is compared; a name used once in a run.
        mine: the values of this process, which JSON can hold.

    Raises:
        ConfigError: which process has which value.
    """
    client = distributed.global_state.client
    if client is None:
        return
    index, values = distributed.global_state.process_id, json.dumps(dict(mine), default=str)
    if index == 0:
        client.key_value_set(f"moejax/{topic}/0", values)
    with _explained(topic):
        key = f"moejax/{topic}/0"
        first = json.loads(client.blocking_key_value_get(key, _join_seconds() * 1000))
    ours = json.loads(values)
    rows = [
        f"{name}={ours.get(name)!r} where process 0 has {first.get(name)!r}"
        for name in {**first, **ours}
        if first.get(name) != ours.get(name)
    ]
    refuse_together(topic, ", ".join(rows) and f"has {', '.join(rows)}")


def check_shared(folder: Path, what: str = "workdir") -> None:
    """Refuses the run unless every process sees in `folder` what process 0 writes there.

    Each process saves its part of a checkpoint: in folders of their own the parts would be lost.

    Raises:
        ConfigError: which process does not see it.
    """
    client = distributed.global_state.client
    if client is None:
        return
    key, complaint = f"moejax/shared/{what}", ""
    first = distributed.global_state.process_id == 0
    if first:
        mark = folder / f".seen-by-all-{secrets.token_hex(8)}"
        mark.touch()
        client.key_value_set(key, mark.name)
    else:
        with _explained(what):
            mark = folder / client.blocking_key_value_get(key, _join_seconds() * 1000)
        # exists() may not ask the server
        if not appears(lambda: folder.is_dir() and mark.name in os.listdir(folder)):
            complaint = f"does not see process 0's {what} {folder}; use a shared file system"
    try:
        refuse_together(f"shared {what}", complaint)
    finally:
        if first:
            mark.unlink()


@contextlib.contextmanager
def _explained(topic: str) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise UnavailableError(
            f"the processes could not compare their {topic}: one of them ended, or was not there "
            f"in {_join_seconds()} s ({str(error).splitlines()[0][:200]}); look at the logs of the "
            "others"
        ) from None


def appears(seen: Callable[[], bool]) -> bool:
    """Waits until `seen()`; False if it never is. File systems over a network show files late."""
    deadline = time.monotonic() + APPEAR_SECONDS
    while not seen():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def from_first(topic: str, compute: Callable[[], Any]) -> Any:
    """Returns on every process what `compute` gives on process 0; the others wait, without limit.

    Args:
        topic: a name used once in a run.
        compute: returns JSON; called on process 0 only.

    Raises:
        ConfigError: what it raised, on every process, with its exit code; or that it ended.
    """
    client = distributed.global_state.client
    if client is None:
        return compute()
    key = f"moejax/from-first/{topic}"
    if distributed.global_state.process_id == 0:
        answer = {"error": "it ended; look at its log", "details": "", "code": UNAVAILABLE}
        try:
            answer = {"value": compute()}
        except ConfigError as error:
            answer = {"error": str(error), "details": error.details, "code": error.code}
            raise
        finally:
            client.key_value_set(key, json.dumps(answer))
        return answer["value"]
    answer = json.loads(_wait_for(client, key, topic))
    if "error" in answer:
        error = ConfigError(f"process 0: {answer['error']}")
        error.details, error.code = answer["details"], answer["code"]
        raise error
    return answer["value"]


def _wait_for(client: Any, key: str, topic: str) -> str:
    """Waits without a limit: JAX ends this process when it loses process 0."""
    while True:
        try:
            return client.blocking_key_value_get(key, _join_seconds() * 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                with _explained(topic):
                    raise


def any_complains(topic: str, complaint: str) -> str:
    """Waits for all processes; returns the complaint of one that has any, the same on all; or "".

    Args:
        topic: a name used once in a run.
    """
    client, index = distributed.global_state.client, distributed.global_state.process_id
    if client is None:
        return complaint
    client.key_value_set(f"moejax/{topic}/{index}", complaint)
    with _explained(topic):
        client.wait_at_barrier(f"moejax/{topic}", _join_seconds() * 1000)
    given = sorted(client.key_value_dir_get(f"moejax/{topic}/"))
    return next((text for _, text in given if text), "")


@contextlib.contextmanager
def failing_together(topic: str) -> Iterator[None]:
    """Has every process end where one cannot go on; leaving it waits for all of them.

    Raises:
        ConfigError: what that process said, or on itself what the system said of a file.
    """
    try:
        try:
            yield
        except OSError as error:
            raise file_error(f"{error}; make it readable for every process", error) from error
    except ConfigError as error:
        with contextlib.suppress(ConfigError):  # the complaint itself, or the others are gone too
            refuse_together(topic, f"cannot go on: {error}", error.code)
        raise
    refuse_together(topic, "")


def refuse_together(topic: str, complaint: str, code: int = BAD_INPUT) -> None:
    """Waits for all processes; if any has a complaint, all of them raise it.

    Args:
        topic: a name used once in a run.
        complaint: of this process; "" for none.
        code: with which this process ends for it.

    Raises:
        ConfigError: the complaints, each with its process; its code is theirs, of several one by
            which another try would end alike.
    """
    client, index = distributed.global_state.client, distributed.global_state.process_id
    if client is None:
        return
    if complaint:
        said = json.dumps([f"process {index} {complaint}", code])
        client.key_value_set(f"moejax/{topic}/complaints/{index}", said)
    with _explained(topic):
        client.wait_at_barrier(f"moejax/{topic}", _join_seconds() * 1000)
    pairs = client.key_value_dir_get(f"moejax/{topic}/complaints/")
    complaints = sorted(json.loads(said) for _, said in pairs)
    if complaints:
        error = ConfigError(
            f"{'; '.join(text for text, _ in complaints[:3])}; start every process with the same "
            "command, the same files and the same software"
        )
        error.code = min((code for _, code in complaints), key=lambda code: code not in FINAL)
        raise error


# Ending


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Among several processes, has an error end this one at once, without the usual goodbyes.

    An orderly exit waits SHUTDOWN_SECONDS for the others, who meanwhile wait for this one in a
    collective. They notice within moments that a process is gone, and end the same way. An error
    that all processes raise alike, as most of ConfigError, goes the usual way.
    """
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        client = distributed.global_state.client
        if client is None:
            raise
        if isinstance(error, ConfigError) and _all_refuse(client):
            raise
        code = _say_why(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _all_refuse(client: Any) -> bool:
    """Says whether every process comes here within moments."""
    try:
        client.wait_at_barrier("moejax/refused", int(REFUSE_SECONDS * 1000))
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _say_why(error: BaseException) -> int:
    """Prints why this process ends, and returns its exit code."""
    state = distributed.global_state
    here = f"moejax: process {state.process_id} of {state.num_processes}"
    if isinstance(error, KeyboardInterrupt):
        print(f"{here}: interrupted", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, ConfigError):
        print(printable(f"{here}: error: {error}\n{error.details}".rstrip()), file=sys.stderr)
        return error.code
    if is_loss(error):
        reason = str(error).splitlines()[0][:200]
        print(
            f"{here}: error: another process was lost ({reason}); look at the logs of the others",
            file=sys.stderr,
        )
        return UNAVAILABLE
    traceback.print_exception(error)
    return CHECK_FAILED


def is_loss(error: BaseException) -> bool:
    """Says whether an error means that another process is gone: a collective that did not end.

    What this process did wrong itself, as far as JAX says so by a code, is none.
    """
    own = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
    return isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith(own)


# Hearing of each other


class Beats:
    """What the processes of a run last said of themselves, through the coordinator. No collective.

    A thread of its own tells and asks: a coordinator that does not answer holds up nobody else.

    Args:
        seconds: between two times.
    """

    def __init__(self, seconds: float = 2.0):
        state = distributed.global_state
        self.process = state.process_id or 0
        self.num_processes = state.num_processes or 1
        self._client, self._seconds = state.client, seconds
        self._mine, self._told = "", ""
        self._all: dict[int, dict[str, Any]] = {}
        self._stopped = threading.Event()
        if self._client is not None:
            threading.Thread(target=self._run, daemon=True).start()

    def say(self, **mine: object) -> None:
        """Sets what the others will hear of this process."""
        self._mine = json.dumps(mine)

    def heard(self) -> dict[int, dict[str, Any]]:
        """Returns what each process said when this one asked last; process 0 asks all the time."""
        return self._all

    def ask(self) -> None:
        """Tells the others and asks them now; waits as long as process 0 does not answer."""
        self._tell()
        if self._client is not None:
            pairs = self._client.key_value_dir_get("moejax/beat/")
            self._all = {int(key.rpartition("/")[2]): json.loads(text) for key, text in pairs}

    def _tell(self) -> None:
        if self._client is not None and self._mine != self._told:
            told = self._mine
            self._client.key_value_set(f"moejax/beat/{self.process}", told, allow_overwrite=True)
            self._told = told

    def close(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # others see to what is lost
                (self.ask if self.process == 0 else self._tell)()
