"""How processes find each other: the variables of each launcher, by hand, and wrong ones."""

import http.server
import socket
import threading

import jax
import pytest

from moejax import cluster
from moejax.cluster import find_cluster, first_host, tpu_vm_cluster
from moejax.errors import ConfigError, UnavailableError

LAUNCHER = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_PROCID": "2",
}
GKE = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a-0.svc,a-1.svc"}
SECOND_SLICE = {
    "MEGASCALE_COORDINATOR_ADDRESS": "b-0.svc:8080",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        (LAUNCHER, ("10.0.0.1:8476", 4, 3)),
        (LAUNCHER | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (SLURM, ("gpu07:61441", 3, 2)),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "10.1.1.1:5"}, ("10.1.1.1:5", 3, 2)),
        (SLURM | LAUNCHER, ("10.0.0.1:8476", 4, 3)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}, None),  # a batch script, outside of srun
        (GKE, ("a-0.svc:8482", 2, 1)),
        (GKE | SECOND_SLICE, ("b-0.svc:8482", 4, 3)),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),  # compiling for TPUs where there is none
    ],
)
def test_each_environment(environment, found):
    assert find_cluster(environment) == found


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-4]", "n1"),
        ("n[003,007-015],host2", "n003"),
        ("rack[1-2]-node,x", "rack1-node"),
        ("a-b.example.org,c", "a-b.example.org"),
    ],
)
def test_first_host_of_a_compressed_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "JAX_NUM_PROCESSES, JAX_PROCESS_ID is not"),
        (LAUNCHER | {"JAX_PROCESS_ID": "4"}, "process 4 of 4 .*numbered from 0 to 3"),
        (LAUNCHER | {"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES='four' is not a whole"),
        (LAUNCHER | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "not HOST:PORT"),
    ],
)
def test_variables_that_do_not_fit(environment, message):
    with pytest.raises(ConfigError, match=message):
        find_cluster(environment)


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ({}, None),
        (
            {"agent-worker-number": "1", "worker-network-endpoints": "x:y:10.0.0.5,x:z:10.0.0.6"},
            ("10.0.0.5:8482", 2, 1),
        ),
        (
            {
                "agent-worker-number": "0",
                "worker-network-endpoints": "host-0",
                "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
                "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9:8080'\n",
            },
            ("10.0.0.9:8482", 2, 1),
        ),
    ],
)
def test_a_tpu_machine_by_its_metadata(metadata, found):
    assert tpu_vm_cluster(metadata.get) == found


class _Metadata(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        known = self.path.endswith("/instance/attributes/agent-worker-number")
        self.send_response(200 if known and self.headers["Metadata-Flavor"] == "Google" else 404)
        self.end_headers()
        self.wfile.write(b"3" if known else b"")

    def log_message(self, *_):
        pass


def test_the_metadata_server_is_asked(monkeypatch):
    with http.server.HTTPServer(("127.0.0.1", 0), _Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        assert cluster._metadata("agent-worker-number") == "3"
        assert cluster._metadata("tpu-env") is None
        server.shutdown()
    assert cluster._metadata("agent-worker-number") is None, "nobody answers any more"


@pytest.mark.parametrize("bind", ["127.0.0.1:{}", ":{}", "[::]:{}"])
def test_a_taken_port_is_refused(bind):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"process 0 cannot listen on port {port} "):
            cluster._check_port(bind.format(port))
    cluster._check_port(bind.format(port))


def test_how_long_to_wait_is_a_number(monkeypatch):
    monkeypatch.setenv("MOEJAX_JOIN_SECONDS", "soon")
    with pytest.raises(ConfigError, match="MOEJAX_JOIN_SECONDS='soon' is not a whole number"):
        cluster._join_seconds()


def test_a_peer_that_ended_is_explained():
    lost = jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: barrier timed out")
    with (
        pytest.raises(UnavailableError, match=r"compare their config: .*barrier timed out.*logs"),
        cluster._explained("config"),
    ):
        raise lost


def test_a_process_alone_agrees_with_itself(tmp_path):
    cluster.check_agreement("alone", {"a": 1})
    cluster.check_shared(tmp_path)
    assert not list(tmp_path.iterdir())
