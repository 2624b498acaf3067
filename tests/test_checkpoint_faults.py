"""What is broken on purpose, what a run then does, and the harm where nobody would have looked."""

import gc
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from hostile import file_limit
from test_checkpoint import abstract, make_state

from moejax import checkpoint
from moejax.checkpoint import Checkpoints, table_of
from moejax.config import CheckpointConfig, ConfigError
from moejax.errors import NoSpaceError, StorageError
from moejax.events import read_events
from moejax.manifest import read_manifest, write_manifest
from moejax.store import Store
from moejax.workdir import COMMITTED, MANIFEST, checkpoint_steps

CONFIG = CheckpointConfig(keep=5)


def random_state(step: int, mesh, size: int = 8):
    """Like a trained one: numbers that do not compress."""
    state = make_state(step, mesh)
    gate = state.params["runs"]["layer_0"]["moe"]["gate"]
    drawn = np.random.default_rng(step).normal(size=(1, 8, 4, size)).astype(np.float32)
    params = {"runs": {"layer_0": {"moe": {"gate": jax.device_put(drawn, gate.sharding)}}}}
    moments = jax.tree.map(lambda p: -p, params)
    return state.__class__(state.step, params, {"mu": moments}, state.router_state, state.rng)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, mesh):
    """A run with checkpoints of steps 20 and 40; tests break copies of it."""
    workdir = tmp_path_factory.mktemp("faults") / "run"
    with Checkpoints(workdir, CONFIG) as checkpoints:
        for step in (20, 40):
            assert checkpoints.save(random_state(step, mesh), {"counters": {"n": step}}, None)
    assert checkpoint_steps(workdir) == [20, 40]
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run"))


def resume(workdir, mesh, config=CONFIG, step=20):
    with Checkpoints(workdir, config) as checkpoints:
        return checkpoints.resume(abstract(random_state(step, mesh), mesh))


def gate_of(state):
    return np.asarray(state.params["runs"]["layer_0"]["moe"]["gate"])


def flip(file: Path, byte: int) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 4
    file.write_bytes(content)


def bless(folder: Path) -> None:
    """Writes a manifest that fits what is there now, as somebody hostile or a bad copy would."""
    manifest = read_manifest(folder)
    (folder / MANIFEST).unlink()
    write_manifest(folder, manifest.run, manifest.step, manifest.tables, {}, manifest.about)


def largest(folder: Path) -> Path:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return max(files, key=lambda p: p.stat().st_size)


def kinds(folder: Path) -> dict[str, Path]:
    """One file of each kind: names that are hashes or numbers of processes are one kind."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size]
    return {"/".join((*p.relative_to(folder).parts[:-1], p.name[:8])): p for p in files}


def test_a_flipped_bit_in_any_file_falls_back_loudly(workdir, mesh, capsys):
    rng = random.Random(0)
    good = workdir / "checkpoints" / "40"
    kept = shutil.copytree(good, workdir / "kept")
    names = sorted(kinds(good).values())
    assert len(names) > 15
    for file in names:
        flip(file, rng.randrange(file.stat().st_size))
        with Checkpoints(workdir, CONFIG, read_only=True) as checkpoints:
            found = checkpoints._find_sound(None, None)
            checkpoints._set_aside()
        assert found == (0, 20), file
        assert "is UNSOUND" in capsys.readouterr().err
        shutil.rmtree(good)
        shutil.copytree(kept, good)
    flip(largest(good), 50)
    resumed = resume(workdir, mesh)
    assert resumed is not None
    assert (resumed.step, resumed.meta["counters"]) == (20, {"n": 20})
    np.testing.assert_array_equal(gate_of(resumed.state), gate_of(random_state(20, mesh)))
    said = capsys.readouterr().err
    assert "40 is UNSOUND: " in said
    assert "another SHA-256" in said
    assert (workdir / "checkpoints" / "40.corrupt").is_dir()
    (event,) = [e for e in read_events(workdir) if e["kind"] == "checkpoint_corrupt"]
    assert event["step"] == 40
    assert checkpoint_steps(workdir) == [20]


def test_orbax_alone_restores_a_flipped_bit_in_silence(workdir, mesh):
    """The harm: other numbers, and no error."""
    folder = workdir / "checkpoints" / "60" / "model"
    state = random_state(60, mesh, size=2048)
    with Checkpoints(workdir, CONFIG) as checkpoints:
        assert checkpoints.save(state, {}, None)
    flip(largest(folder), largest(folder).stat().st_size // 2)
    wanted = abstract(state, mesh)
    tree = {"step": wanted.step, "params": wanted.params, "router_state": wanted.router_state}
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder, tree)
    got = np.asarray(restored["params"]["runs"]["layer_0"]["moe"]["gate"])
    assert not np.array_equal(got, gate_of(state))


@pytest.mark.parametrize(
    "harm",
    [
        lambda f: largest(f).write_bytes(largest(f).read_bytes()[:-1]),
        lambda f: (f / "model" / "_METADATA").write_bytes(b""),
        lambda f: (f / "training" / "_sharding").unlink(),
        lambda f: (f / "model" / "payload.pkl").write_bytes(b"x"),
        lambda f: (f / MANIFEST).unlink(),
        lambda f: (f / COMMITTED).unlink(),
        lambda f: (f / MANIFEST).write_text("{}"),
    ],
)
def test_cut_missing_extra_and_garbage_fall_back(workdir, mesh, harm):
    harm(workdir / "checkpoints" / "40")
    resumed = resume(workdir, mesh)
    assert resumed is not None
    assert resumed.step == 20
    assert (workdir / "checkpoints" / "40.corrupt").is_dir()


def test_where_none_is_sound_nothing_begins_anew(workdir, mesh):
    """Refused again and again, all left where it is; also once all were set aside by hand."""
    root = workdir / "checkpoints"
    for step in (20, 40):
        flip(largest(root / str(step)), 50)
    for _ in range(2):
        with pytest.raises(
            ConfigError, match=r"has checkpoints, and none is sound \(step 20: .*an"
        ):
            resume(workdir, mesh)
        assert checkpoint_steps(workdir) == [20, 40]
    for step in (20, 40):
        (root / str(step)).rename(root / f"{step}.corrupt")
    with pytest.raises(ConfigError, match=r"none is sound \(.*20\.corrupt; .*40\.corrupt\)"):
        resume(workdir, mesh)


def test_a_run_that_lost_its_name_or_its_checkpoints_does_not_begin_anew(workdir, mesh):
    """One bit of run.json, and all checkpoints are those of somebody else; then they are gone."""
    id_file = workdir / "run.json"
    sound = id_file.read_bytes()
    at = sound.index(b'"run": "') + 8
    digit = next(i for i in range(at, at + 16) if chr(sound[i] ^ 1) in "0123456789abcdef")
    id_file.write_bytes(sound[:digit] + bytes([sound[digit] ^ 1]) + sound[digit + 1 :])
    for read_only in (False, True):
        with (
            pytest.raises(ConfigError, match=r"another run only \(steps 20, 40\)"),
            Checkpoints(workdir, CONFIG, read_only=read_only) as checkpoints,
        ):
            checkpoints.resume(abstract(random_state(20, mesh), mesh))
    id_file.unlink()
    resumed = resume(workdir, mesh)
    assert resumed is not None
    assert resumed.step == 40, "as the message says"
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(ConfigError, match="tells of those of this run, the last of step 40; bring"):
        resume(workdir, mesh)


def test_what_cannot_be_restored_here_stays_where_it_is(workdir, mesh, monkeypatch):
    """Too little memory, say: the files are sound, and another machine may restore them.

    The older one, for which there would be room by then, is not taken in its place.
    """
    restore = ocp.AsyncCheckpointer.restore

    def no_memory(self, folder, *arguments, **keywords):
        if folder.name == "40":
            raise MemoryError("out of memory")
        return restore(self, folder, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.AsyncCheckpointer, "restore", no_memory)
        with pytest.raises(ConfigError, match=r"40 is sound, and there is no memory here .*fsdp"):
            resume(workdir, mesh)
    assert checkpoint_steps(workdir) == [20, 40]
    resumed = resume(workdir, mesh)
    assert resumed is not None
    assert resumed.step == 40


def test_a_step_that_was_unsound_and_is_saved_again_is_sound(workdir, mesh):
    wanted = abstract(random_state(20, mesh), mesh)
    flip(largest(workdir / "checkpoints" / "40"), 50)
    with Checkpoints(workdir, CONFIG) as checkpoints:
        resumed = checkpoints.resume(wanted)
        assert resumed is not None
        assert resumed.step == 20
        assert checkpoints.save(random_state(40, mesh), {}, None)
        checkpoints.settle()
        resumed = checkpoints.resume(wanted)
        assert resumed is not None
        assert resumed.step == 40
    assert checkpoint_steps(workdir) == [20, 40]


def test_a_checkpoint_of_a_newer_format_is_neither_passed_over_nor_renamed(workdir, mesh):
    file = workdir / "checkpoints" / "40" / MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2}))
    with pytest.raises(ConfigError, match=r"40: .*format 2, of a newer moejax; .*use that moejax"):
        resume(workdir, mesh)
    assert checkpoint_steps(workdir) == [20, 40]


def test_a_new_run_has_nothing_to_resume(tmp_path, mesh):
    assert resume(tmp_path / "new", mesh) is None


def test_reading_renames_nothing_and_a_step_that_is_asked_for_is_not_replaced(
    workdir, mesh, capsys
):
    wanted = abstract(random_state(20, mesh), mesh)
    flip(largest(workdir / "checkpoints" / "40"), 50)
    with Checkpoints(workdir, CONFIG, read_only=True) as checkpoints:
        assert checkpoints.load_model(wanted, None).step == 20
        assert "40 is UNSOUND: " in capsys.readouterr().err
        with pytest.raises(ConfigError, match=r"checkpoint of step 40 is unsound: .*SHA-256"):
            checkpoints.load_model(wanted, 40)
        with pytest.raises(ConfigError, match="step 30 has no checkpoint"):
            checkpoints.load_model(wanted, 30)
    assert checkpoint_steps(workdir) == [20, 40]


def _with_nan(workdir, mesh) -> None:
    """Saves step 60 with a NaN, as no watcher would have let happen."""
    state = random_state(60, mesh)
    params = jax.tree.map(lambda p: p.at[0, 3, 0, 0].set(jnp.nan), state.params)
    with Checkpoints(workdir, CONFIG) as checkpoints:
        broken = state.__class__(60, params, state.opt_state, state.router_state, state.rng)
        assert checkpoints.save(jax.device_put(broken), {}, None)


def test_nan_in_a_checkpoint_that_fits_its_manifest_falls_back(workdir, mesh, monkeypatch, capsys):
    _with_nan(workdir, mesh)
    with monkeypatch.context() as patch:  # the harm: unlooked, it is restored
        patch.setattr(checkpoint, "_not_finite", lambda items: "")
        resumed = resume(workdir, mesh)
        assert resumed is not None
        assert np.isnan(gate_of(resumed.state)).any()
    resumed = resume(workdir, mesh)
    assert resumed is not None
    assert resumed.step == 40
    assert "moe/gate has a value that is not finite; renamed" in capsys.readouterr().err


def test_another_dtype_or_shape_is_one_table_and_no_cast(workdir, mesh, monkeypatch, capfd):
    wanted = abstract(random_state(40, mesh), mesh)
    gate = wanted.params["runs"]["layer_0"]["moe"]["gate"]
    as_int = jax.ShapeDtypeStruct(gate.shape, jnp.int32, sharding=gate.sharding)
    wanted.params["runs"]["layer_0"]["moe"]["gate"] = as_int
    wanted.router_state["bias_of_more"] = wanted.router_state["bias"]
    with Checkpoints(workdir, CONFIG) as checkpoints:
        capfd.readouterr()
        with pytest.raises(
            ConfigError, match=r"another model or optimizer .* 2 arrays differ"
        ) as e:
            checkpoints.resume(wanted)
        assert capfd.readouterr().err == "", "no flood"
        lines = [line.split("  ") for line in e.value.details.splitlines()]
        assert [[cell.strip() for cell in line if cell] for line in lines] == [
            ["key", "checkpoint", "config"],
            [
                "model/params/runs/layer_0/moe/gate",
                "float32 [1, 8, 4, 8]",
                "int32 [1, 8, 4, 8]",
            ],
            ["model/router_state/bias_of_more", "none", "float32 [1, 8]"],
        ]
        assert checkpoint_steps(workdir) == [20, 40], "the checkpoint is sound"
        # The harm: Orbax casts without a word.
        del wanted.router_state["bias_of_more"]
        monkeypatch.setattr(checkpoint, "_check_tables", lambda *_: None)
        resumed = checkpoints.resume(wanted)
        assert resumed is not None
        assert gate_of(resumed.state).dtype == np.int32


def _hostile(folder: Path) -> None:
    """Has the gate's metadata say 4 TiB, in one chunk, and blesses that."""
    store = tensorstore.KvStore.open(
        {"driver": "ocdbt", "base": f"file://{folder}/model/"}
    ).result()
    key = b"params.runs.layer_0.moe.gate/.zarray"
    array = json.loads(store.read(key).result().value)
    array["shape"] = array["chunks"] = [1 << 20, 1 << 20, 1, 1]
    store.write(key, json.dumps(array).encode()).result()
    bless(folder)


def test_metadata_that_asks_for_4_tib_are_not_believed(workdir, mesh, capsys):
    _hostile(workdir / "checkpoints" / "40")
    resumed = resume(workdir, mesh)
    assert resumed is not None
    assert resumed.step == 20
    assert "gate is stored as float32 [1048576, 1048576, 1, 1], not float32" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_believed_they_end_the_process(workdir):
    """The harm: no exception, an abort."""
    folder = workdir / "checkpoints" / "40"
    _hostile(folder)
    code = (
        "import orbax.checkpoint as ocp\n"
        f"ocp.StandardCheckpointer().restore({str(folder / 'model')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode != 0


def test_a_checkpoint_of_another_run_is_left_alone_and_its_step_cannot_be_saved(
    workdir, tmp_path, mesh, capsys
):
    """Two runs on one folder: Orbax would take the highest number, whoever wrote it."""
    with Checkpoints(tmp_path / "other", CONFIG) as others:
        assert others.save(random_state(60, mesh), {}, None)
    shutil.copytree(tmp_path / "other" / "checkpoints" / "60", workdir / "checkpoints" / "60")
    assert checkpoint_steps(workdir)[-1] == 60
    with Checkpoints(workdir, CONFIG) as checkpoints:
        resumed = checkpoints.resume(abstract(random_state(20, mesh), mesh))
        assert resumed is not None
        assert resumed.step == 40
        assert "60 is a checkpoint of another run; left alone" in capsys.readouterr().err
        assert not checkpoints.save(random_state(60, mesh), {}, None, final=True)
        with pytest.raises(StorageError, match="step 60 was not saved"):
            checkpoints.require_saved()
    assert (
        read_manifest(workdir / "checkpoints" / "60").run
        != json.loads((workdir / "run.json").read_text())["run"]
    )


# A write that fails has TensorStore call an event loop that Orbax has closed
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_told_and_the_next_save_works(workdir, mesh, capsys):
    large = random_state(60, mesh, size=8192)
    with Checkpoints(workdir, CONFIG) as checkpoints:
        with file_limit(200_000):
            checkpoints.save(large, {}, None)
            checkpoints.wait()
        with pytest.raises(NoSpaceError, match=r"step 60 was not saved.* MiB free.*make room") as e:
            checkpoints.require_saved()
        assert e.value.code == 28
        assert "the checkpoint of step 60 was NOT SAVED: " in capsys.readouterr().err
        assert not (workdir / "checkpoints" / "60").exists(), "it does not eat the space"
        assert checkpoints.save(random_state(80, mesh), {}, None)
        checkpoints.require_saved()
    assert checkpoint_steps(workdir) == [20, 40, 80]
    kinds = [event["kind"] for event in read_events(workdir)]
    assert kinds[-2:] == ["checkpoint_failed", "checkpoint_saved"]
    gc.collect()


def test_the_lines_up_to_a_checkpoint_are_on_the_disk_before_it_is_one(workdir, mesh, monkeypatch):
    """A loss of power must not take records of steps that are not done again."""
    synced, plain = [], os.fsync

    def fsync(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        plain(descriptor)

    (workdir / "metrics.jsonl").write_text('{"step": 60, "split": "train"}\n')
    monkeypatch.setattr(os, "fsync", fsync)
    with Checkpoints(workdir, CONFIG) as checkpoints:
        assert checkpoints.save(random_state(60, mesh), {}, None)
    sealed = synced.index(f".{MANIFEST}.{os.getpid()}")
    assert {"metrics.jsonl", "events.jsonl"} <= {*synced[:sealed]}


def test_no_space_for_the_manifest_is_no_checkpoint(workdir, mesh, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with Checkpoints(workdir, CONFIG) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(Store, "seal", full)
            checkpoints.save(random_state(60, mesh), {}, None)
            checkpoints.wait()
        assert checkpoint_steps(workdir) == [20, 40]
        assert checkpoints.save(random_state(60, mesh), {}, None), "the same step can come again"
    assert checkpoint_steps(workdir) == [20, 40, 60]


def test_a_log_on_the_full_disk_hides_no_failure(workdir, mesh, monkeypatch):
    """Who says that a save failed may fail too: the run must not end as if it were saved."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "seal", full)
    with (
        Checkpoints(workdir, CONFIG) as checkpoints,
        open("/dev/full", "w", buffering=1) as log,
        monkeypatch.context() as patch,
    ):
        patch.setattr(sys, "stderr", log)
        with pytest.raises(OSError, match="No space left"):
            print("the harm", file=sys.stderr, flush=True)
        assert checkpoints.save(random_state(60, mesh), {}, None)
        with pytest.raises(NoSpaceError, match="step 60 was not saved"):
            checkpoints.require_saved()
        os.dup2(os.open(os.devnull, os.O_WRONLY), log.fileno())  # for it to be closed


def test_what_cannot_be_cleared_away_hides_no_failure(workdir, mesh, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "seal", full)
    monkeypatch.setattr(Store, "clear", full)
    with Checkpoints(workdir, CONFIG) as checkpoints:
        assert checkpoints.save(random_state(60, mesh), {}, None)
        with pytest.raises(NoSpaceError, match="step 60 was not saved"):
            checkpoints.require_saved()
    assert [e["step"] for e in read_events(workdir) if e["kind"] == "checkpoint_failed"] == [60]


def test_settled_is_what_process_0_has_sealed(workdir, mesh, monkeypatch):
    """On other processes `wait` returns when Orbax is done, before the manifest."""
    agreed = []

    def from_first(topic, compute):
        agreed.append(checkpoint_steps(workdir))
        return compute()

    with Checkpoints(workdir, CONFIG) as checkpoints:
        assert checkpoints.save(random_state(60, mesh), {}, None)
        monkeypatch.setattr(checkpoint, "from_first", from_first)
        checkpoints.settle()
    assert agreed == [[20, 40, 60]], "process 0 answers when it has sealed, and the others wait"


def test_a_save_that_is_still_running_when_the_next_is_due(workdir, mesh, monkeypatch):
    """It is waited for `wait_seconds`; the final save waits as long as it takes."""
    seal = Store.seal

    def slow(*arguments):
        time.sleep(1)
        return seal(*arguments)

    monkeypatch.setattr(Store, "seal", slow)
    with Checkpoints(workdir, CheckpointConfig(keep=9, wait_seconds=0.0)) as checkpoints:
        assert checkpoints.save(random_state(60, mesh), {}, None)
        assert not checkpoints.save(random_state(61, mesh), {}, None)
        assert checkpoints.save(random_state(62, mesh), {}, None, final=True)
    assert checkpoint_steps(workdir) == [20, 40, 60, 62]
    skipped = [e["step"] for e in read_events(workdir) if e["kind"] == "checkpoint_skipped"]
    assert skipped == [61]


def test_a_save_that_hangs_is_waited_for_once(workdir, mesh, monkeypatch):
    """Where storage hangs for hours every later save would else wait as long again."""
    seal, released = Store.seal, threading.Event()

    def hangs(*arguments):
        released.wait(60)
        return seal(*arguments)

    monkeypatch.setattr(Store, "seal", hangs)
    state = random_state(61, mesh)
    with Checkpoints(workdir, CheckpointConfig(keep=9, wait_seconds=2.0)) as checkpoints:
        assert checkpoints.save(random_state(60, mesh), {}, None)
        seconds = []
        for _ in range(3):
            start = time.monotonic()
            assert not checkpoints.save(state, {}, None)
            seconds.append(time.monotonic() - start)
        released.set()
        assert checkpoints.save(random_state(62, mesh), {}, None, final=True)
    assert seconds[0] >= 2.0
    assert max(seconds[1:]) < 1.0
    assert checkpoint_steps(workdir) == [20, 40, 60, 62]


def test_what_a_crash_left_is_removed_at_the_next_start(workdir, mesh, capsys):
    run = json.loads((workdir / "run.json").read_text())["run"]
    folder = Store(workdir / "checkpoints", run).begin(60)
    shutil.copytree(workdir / "checkpoints" / "40", folder)
    (folder / MANIFEST).unlink()  # killed between Orbax's commit and the manifest
    resumed = resume(workdir, mesh)
    assert resumed is not None
    assert resumed.step == 40
    assert not folder.exists()
    assert "60: left by a process that was killed; removed" in capsys.readouterr().err


def test_the_newest_of_the_local_and_the_durable_ones_wins(workdir, tmp_path, mesh):
    config = CheckpointConfig(keep=5, local=str(tmp_path / "fast"), local_every=5)
    with Checkpoints(workdir, config) as checkpoints:
        for step in (45, 50):
            assert checkpoints.save(random_state(step, mesh), {}, None, local=True)
        checkpoints.wait()
        assert checkpoints.steps == [20, 40, 50], "one is kept on the local disk"
    resumed = resume(workdir, mesh, config)
    assert resumed is not None
    assert resumed.step == 50
    flip(largest(next((tmp_path / "fast").iterdir()) / "50"), 50)
    resumed = resume(workdir, mesh, config)
    assert resumed is not None
    assert resumed.step == 40
    assert checkpoint_steps(workdir) == [20, 40]


@pytest.mark.parametrize("key", ["a.b", "a/b", ""])
def test_keys_that_would_become_one_are_refused(key):
    """{'a.b': x, 'a': {'b': y}}: Orbax restores the one for the other."""
    with pytest.raises(ValueError, match="a key of the state has"):
        table_of({key: np.zeros(1), "a": {"b": np.ones(1)}})


def test_a_folder_that_cannot_be_written_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(ConfigError, match="checkpoints cannot be written to"):
        Checkpoints(tmp_path, CONFIG)
    local = CheckpointConfig(local="/proc/x", local_every=1)
    with pytest.raises(ConfigError, match=r"cannot be written to /proc/x/.*checkpoint\.local"):
        Checkpoints(tmp_path / "other", local)


# What Orbax alone does: the harm that the above is for


def test_orbax_alone_restores_one_array_for_another_of_nearly_the_same_name(tmp_path):
    saved = {"a.b": jnp.zeros(2), "a": {"b": jnp.ones(2)}}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "x", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "x", saved)
    np.testing.assert_array_equal(restored["a.b"], restored["a"]["b"])


def test_orbax_alone_deletes_folders_of_others(tmp_path):
    """Whatever has a number for its name is an old checkpoint, as it writes by default."""
    (tmp_path / "2023").mkdir()
    (tmp_path / "2023" / "thesis.tex").write_text("mine")
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        assert manager.latest_step() == 2023
        manager.save(2024, args=ocp.args.StandardSave({"a": jnp.ones(2)}))  # pyright: ignore[reportCallIssue]
        manager.wait_until_finished()
    assert [path.name for path in tmp_path.iterdir()] == ["2024"]
