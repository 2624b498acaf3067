"""How processes find each other: the variables of each launcher, by hand, and wrong ones."""

import collections
import concurrent.futures
import http.server
import socket
import threading
import time
import types
from collections.abc import Callable

import jax
import pytest

from moejax import cluster
from moejax.cluster import find_cluster, first_host, tpu_vm_cluster
from moejax.errors import ConfigError, NoSpaceError, UnavailableError

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
SLICES = {
    "MEGASCALE_NUM_SLICES": "3",
    "MEGASCALE_SLICE_ID": "2",
    "MEGASCALE_COORDINATOR_ADDRESS": "b-0.svc:8081",
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
        (GKE | {"MEGASCALE_NUM_SLICES": "1"}, ("a-0.svc:8482", 2, 1)),
        (GKE | SLICES, ("b-0.svc:8482", 6, 5)),  # the second of the third slice
        (SLURM | {"JAX_PROCESS_ID": "2"}, ("gpu07:61441", 3, 2)),
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
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "is set, but not JAX_NUM_PROCESSES, JAX_PROCESS_ID; "),
        (
            LAUNCHER | {"JAX_PROCESS_ID": "4"},
            "no process 4 of 4 .*the first is 0, the last is 3; start",
        ),
        (LAUNCHER | {"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES='four' is not a whole"),
        (LAUNCHER | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "not HOST:PORT"),
        (
            {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"},
            "JAX_NUM_PROCESSES=4 is set, but JAX_COORDINATOR_ADDRESS is not: .*; set JAX_COORD",
        ),
        ({"JAX_PROCESS_ID": "0"}, "JAX_PROCESS_ID=0 is set, .* train alone"),
        (
            GKE | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "0"},
            "MEGASCALE_NUM_SLICES=2 is set, but not MEGASCALE_COORDINATOR_ADDRESS; set all three",
        ),
        (GKE | SLICES | {"MEGASCALE_SLICE_ID": "3"}, "no process 7 of 6 .*the last is 5; start"),
        (GKE | SLICES | {"MEGASCALE_NUM_SLICES": "two"}, "MEGASCALE_NUM_SLICES='two' is not a wh"),
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
    ],
)
def test_a_tpu_machine_by_its_metadata(metadata, found):
    assert tpu_vm_cluster(metadata.get) == found


def test_a_tpu_machine_of_several_slices():
    metadata = {
        "agent-worker-number": "0",
        "worker-network-endpoints": "host-0",
        "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
        "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9'\n",
    }
    assert tpu_vm_cluster(metadata.get) == ("10.0.0.9:8482", 2, 1)


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


@pytest.mark.parametrize(
    ("address", "own"),
    [("127.0.0.1:5", "127.0.0.1:5"), ("[::1]:7", "[::1]:7"), ("10.0.0.7:8476", "10.0.0.7:8476")],
)
def test_process_0_listens_at_its_own_address_only(address, own):
    assert cluster.own_address(address, 0) == own


def test_a_name_is_looked_up_until_it_is_known(monkeypatch):
    """On a cluster the name of a pod may come later than the pod."""
    answers = [socket.gaierror(-2, "Name or service not known")] * 2
    answers.append([(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.9", 5))])

    def look_up(*_, **__):
        found = answers.pop(0)
        if isinstance(found, OSError):
            raise found
        return found

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(cluster.time, "sleep", lambda _: None)
    assert cluster.own_address("a-0.a:5", 60) == "10.0.0.9:5"
    answers.append(socket.gaierror(-2, "Name or service not known"))
    with pytest.raises(
        UnavailableError, match=r"process 0 cannot look up .* own host a-0.a, at .*not known\)"
    ):
        cluster.own_address("a-0.a:5", -1)


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(
        ConfigError, match=r"cannot listen at 192.0.2.1:5: this machine has another"
    ):
        cluster._check_port("192.0.2.1:5")


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
        (ValueError("Gloo"), False),
    ],
)
def test_what_says_that_a_process_is_lost(error, lost):
    assert cluster.is_loss(error) == lost


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), ConfigError("x")])
def test_a_process_alone_ends_as_usual(error):
    with pytest.raises(type(error)), cluster.leaving_at_once():
        raise error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("of our own"), 1, "ValueError: of our own"),
        (jax.errors.JaxRuntimeError("UNKNOWN: gone"), 69, "process 0 was lost (UNKNOWN: gone)"),
        (KeyboardInterrupt(), 130, "process 1 of 2: interrupted"),
        (ConfigError("said by all"), None, ""),
    ],
)
def test_among_several_an_error_ends_the_process_at_once(monkeypatch, capfd, error, code, said):
    class Left(BaseException):
        pass

    def leave(code: int):
        raise Left(code)

    client = types.SimpleNamespace(wait_at_barrier=lambda *_: None)  # all come
    state = types.SimpleNamespace(client=client, process_id=1, num_processes=2)
    monkeypatch.setattr(cluster, "distributed", types.SimpleNamespace(global_state=state))
    monkeypatch.setattr(cluster.os, "_exit", leave)
    with pytest.raises(Left if code else ConfigError) as raised, cluster.leaving_at_once():
        raise error
    if code:
        assert raised.value.args == (code,)
    assert said.replace("process 0 was", "another process was") in capfd.readouterr().err


def test_names_in_an_error_cannot_steer_the_terminal(capsys):
    """Those of arrays and domains are the checkpoint's and the data's."""
    error = ConfigError("array 'a\x1b[2J' differs")
    error.details = "a\x1b[2J  none"
    assert cluster._say_why(error) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.endswith("array 'a\\x1b[2J' differs") for line in lines] == [True, False]
    assert lines[1] == "a\\x1b[2J  none"


def test_what_only_one_process_refuses_ends_it_at_once(monkeypatch, capfd):
    """The others are in a collective: an orderly exit would wait for them."""

    class Left(BaseException):
        pass

    def leave(code: int):
        raise Left(code)

    def nobody_comes(name: str, milliseconds: int):
        assert milliseconds == 1500
        raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: {name} timed out")

    client = types.SimpleNamespace(wait_at_barrier=nobody_comes)
    state = types.SimpleNamespace(client=client, process_id=1, num_processes=2)
    monkeypatch.setattr(cluster, "distributed", types.SimpleNamespace(global_state=state))
    monkeypatch.setattr(cluster.os, "_exit", leave)
    error = UnavailableError("no batch came")
    error.details = "row 1\nrow 2"
    with pytest.raises(Left) as raised, cluster.leaving_at_once():
        raise error
    assert raised.value.args == (69,)
    said = capfd.readouterr().err
    assert said == "moejax: process 1 of 2: error: no batch came\nrow 1\nrow 2\n"


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
    assert cluster.from_first("alone", lambda: 7) == 7
    assert cluster.any_complains("alone", "x") == "x"
    cluster.check_shared(tmp_path)
    assert not list(tmp_path.iterdir())


# Several processes, which here are threads with a coordinator's client of their own


class _Coordinator:
    """What the processes share: keys, and a barrier for each topic."""

    def __init__(self, processes: int):
        self.values, self.processes = {}, processes
        self.barriers = collections.defaultdict(lambda: threading.Barrier(processes))

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def blocking_key_value_get(self, key, milliseconds):
        deadline = time.monotonic() + milliseconds / 1000
        while key not in self.values:
            if time.monotonic() > deadline:
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")
            time.sleep(0.01)
        return self.values[key]

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]

    def wait_at_barrier(self, name, milliseconds):
        self.barriers[name].wait(min(milliseconds, 10_000) / 1000)


def _run_each(monkeypatch, functions: list[Callable]) -> list:
    """Returns what the function of each process returns, or the error that it raises."""
    state, client = threading.local(), _Coordinator(len(functions))
    monkeypatch.setattr(cluster, "distributed", types.SimpleNamespace(global_state=state))

    def run(index: int):
        state.client, state.process_id = client, index
        state.num_processes = len(functions)
        try:
            return functions[index]()
        except Exception as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, range(len(functions))))


def test_an_error_of_one_process_ends_all(monkeypatch):
    """Of a file that only process 1 cannot read; it says so itself, too."""

    def reads(error: Exception | None):
        with cluster.failing_together("inputs"):
            if error is not None:
                raise error

    missing = [
        (FileNotFoundError(2, "No such file", "a.bin"), 2),
        (OSError(116, "Stale file handle", "a.bin"), 69),
        (ConfigError("text of 3 bytes"), 2),
        (UnavailableError("a server that does not answer"), 69),
    ]
    for error, code in missing:
        first, second = _run_each(monkeypatch, [lambda: reads(None), lambda e=error: reads(e)])
        assert isinstance(first, ConfigError)
        assert isinstance(second, ConfigError)
        assert str(first).startswith(f"process 1 cannot go on: {error}; ")
        assert str(second).startswith(str(error))
        assert (first.code, second.code) == (code, code)
    assert _run_each(monkeypatch, [lambda: reads(None)] * 2) == [None, None]


def test_a_folder_that_a_process_does_not_share_is_refused_by_all(monkeypatch, tmp_path):
    """A disk that each host has for itself, as a place of checkpoints: parts of them were lost."""
    monkeypatch.setattr(cluster, "APPEAR_SECONDS", 0.3)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()

    def check(name: str):
        return lambda: cluster.check_shared(tmp_path / name, "checkpoint.local")

    assert _run_each(monkeypatch, [check("a"), check("a")]) == [None, None]
    for error in _run_each(monkeypatch, [check("a"), check("b")]):
        assert isinstance(error, ConfigError)
        assert "process 1 does not see process 0's checkpoint.local" in str(error)
        assert "use a shared file system" in str(error)
    assert list(tmp_path.glob("*/*")) == [], "nothing is left of it"


def test_an_error_of_a_process_alone_stays_as_it_is():
    with (
        pytest.raises(ConfigError, match=r"^text of 3 bytes$"),
        cluster.failing_together("inputs"),
    ):
        raise ConfigError("text of 3 bytes")


def test_what_process_0_computes_is_what_all_have(monkeypatch):
    """Process 1 is asked nothing, also where process 0 takes longer than a wait."""
    monkeypatch.setenv(cluster.JOIN_SECONDS, "1")

    def slow():
        time.sleep(1.5)
        return [0, 40]

    each = [
        lambda: cluster.from_first("checkpoint", slow),
        lambda: cluster.from_first("checkpoint", lambda: 1 / 0),
    ]
    assert _run_each(monkeypatch, each) == [[0, 40], [0, 40]]


def test_what_process_0_refuses_all_refuse(monkeypatch):
    def refuse():
        error = ConfigError("none is sound")
        error.details = "a  b"
        raise error

    first, second = _run_each(monkeypatch, [lambda: cluster.from_first("c", refuse)] * 2)
    assert str(first) == "none is sound"
    assert isinstance(second, ConfigError)
    assert (str(second), second.details) == ("process 0: none is sound", "a  b")
    assert second.code == 2


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (MemoryError(), "process 0: it ended; look at its log", 69),
        (NoSpaceError("full"), "process 0: full", 28),
    ],
)
def test_the_end_of_process_0_has_its_code_on_all(monkeypatch, error, said, code):
    """A crash is no bad input, with which nobody would start the run again."""

    def ends():
        raise error

    first, second = _run_each(monkeypatch, [lambda: cluster.from_first("c", ends)] * 2)
    assert first is error
    assert isinstance(second, ConfigError)
    assert (str(second), second.code) == (said, code)


def test_a_complaint_of_one_process_is_known_to_all(monkeypatch):
    each = [lambda t=text: cluster.any_complains("c", t) for text in ("", "unreadable")]
    assert _run_each(monkeypatch, each) == ["unreadable"] * 2
    assert _run_each(monkeypatch, [lambda: cluster.any_complains("c", "")] * 2) == ["", ""]


def test_processes_hear_of_each_other(monkeypatch):
    said = threading.Barrier(2)

    def tell(index: int):
        beats = cluster.Beats(seconds=60)
        beats.say(step=index)
        beats.say(step=index + 5)
        beats.ask()
        said.wait(10)
        beats.ask()
        beats.close()
        return beats.heard()

    heard = {0: {"step": 5}, 1: {"step": 6}}
    assert _run_each(monkeypatch, [lambda: tell(0), lambda: tell(1)]) == [heard, heard]
