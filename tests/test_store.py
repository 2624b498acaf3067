"""A folder of checkpoints: what counts, what is kept, and that nothing of others is touched."""

import json
import os
import shutil

import pytest
from hostile import file_limit

from moejax.errors import ConfigError, NoSpaceError
from moejax.events import Events
from moejax.manifest import Unsound
from moejax.store import UNFINISHED, Store, find_run, require_first_start, start_run
from moejax.workdir import COMMITTED, MANIFEST, RUN

OURS, OTHERS = "0" * 16, "1" * 16


def add(root, step: int, loss: float | None = None, run: str = OURS) -> None:
    """A checkpoint as it is written: noted, filled, committed, sealed."""
    store = Store(root, run)
    folder = store.begin(step)
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "data").write_bytes(bytes([step % 256]) * 100)
    (folder / COMMITTED).write_text("")
    store.seal(step, {}, {} if loss is None else {"loss": loss}, {})


def names(root) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name != UNFINISHED)


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    store = Store(tmp_path, OURS)
    for step, loss in ((1, 2.0), (2, 1.0), (3, None), (4, 3.0)):
        add(tmp_path, step, loss)
    assert store.retain(1) == [1, 3]
    assert store.steps() == [2, 4]
    add(tmp_path, 5, 1.0)
    assert store.retain(1) == [2, 4], "of equals the later one is the best"
    assert store.retain(1) == []
    assert names(tmp_path) == ["5"]


def test_what_is_not_of_this_run_is_neither_taken_nor_touched(tmp_path):
    """Folders named by numbers, a link, leftovers and checkpoints of others, names that look so."""
    add(tmp_path, 40)
    (tmp_path / "2023").mkdir()
    (tmp_path / "2023" / "thesis.tex").write_text("mine")
    (tmp_path / "logs").mkdir()
    (tmp_path / "77").write_text("a file")
    (tmp_path / "78").symlink_to(tmp_path / "40")
    shutil.copytree(tmp_path / "40", tmp_path / "007")
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
    add(tmp_path, 50, run=OTHERS)
    Store(tmp_path, OTHERS).begin(60)
    (tmp_path / "60").mkdir()
    before = names(tmp_path)
    store = Store(tmp_path, OURS)
    assert store.steps() == [40]
    assert store.strangers() == [50]
    assert store.sweep() == []
    add(tmp_path, 41)
    assert store.retain(1) == [40]
    assert names(tmp_path) == sorted({*before, "41"} - {"40"})
    assert (tmp_path / "2023" / "thesis.tex").read_text() == "mine"
    with pytest.raises(FileExistsError, match="already something of that name"):
        store.begin(2023)
    store.clear(78)
    assert (tmp_path / "78").is_symlink()


def test_a_folder_of_another_step_or_run_is_unsound(tmp_path):
    add(tmp_path, 40)
    (tmp_path / "40").rename(tmp_path / "41")
    store = Store(tmp_path, OURS)
    with pytest.raises(Unsound, match=r"its MANIFEST\.json is of step 40"):
        store.check(41)
    (tmp_path / "41").rename(tmp_path / "40")
    with pytest.raises(Unsound, match="written by another run"):
        Store(tmp_path, OTHERS).manifest(40)


def test_a_killed_save_is_swept_and_a_finished_one_is_not(tmp_path):
    """Killed while Orbax wrote (10), before the manifest (20), before the note was struck (30)."""
    store = Store(tmp_path, OURS)
    for step in (10, 20):
        (store.begin(step) / "model").mkdir(parents=True)
    (tmp_path / "20" / COMMITTED).write_text("")
    add(tmp_path, 30)
    (tmp_path / UNFINISHED / "30").write_text(OURS)
    assert store.steps() == [30]
    assert store.strangers() == []
    assert store.sweep() == [10, 20]
    assert names(tmp_path) == ["30"]
    assert list((tmp_path / UNFINISHED).iterdir()) == []


@pytest.mark.parametrize("kill_at", range(6))
def test_a_kill_within_a_deletion_leaves_nothing_that_is_taken_for_a_checkpoint(
    tmp_path, monkeypatch, kill_at
):
    """The n-th file or folder that is removed is the last thing that the process does."""
    add(tmp_path, 1)
    add(tmp_path, 2)
    removed = []

    def dying(function):
        def call(*arguments, **options):
            if len(removed) >= kill_at:
                raise KeyboardInterrupt  # nothing catches it
            removed.append(arguments)
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", dying(os.unlink))
        patch.setattr(os, "rmdir", dying(os.rmdir))
        try:
            Store(tmp_path, OURS).retain(1)
        except KeyboardInterrupt:
            pass
        else:
            assert kill_at > 4
    store = Store(tmp_path, OURS)
    store.sweep()
    for step in store.steps():
        store.check(step)
    assert names(tmp_path) == (["1", "2"] if kill_at == 0 else ["2"])


def test_a_disk_without_room_for_a_note_gets_room(tmp_path, monkeypatch):
    """Else the last save that fitted would leave no room for the next, and nothing would go."""

    def full(*_):
        raise OSError(28, "No space left on device")

    add(tmp_path, 1)
    add(tmp_path, 2)
    monkeypatch.setattr(Store, "_note", full)
    assert Store(tmp_path, OURS).retain(1) == [1]
    assert names(tmp_path) == ["2"]


def test_what_cannot_lose_its_manifest_loses_nothing(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    add(tmp_path, 40)
    store = Store(tmp_path, OURS)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", denied)
        assert store.clear(40)
        with pytest.raises(PermissionError):
            store.delete(40)
    store.check(40)


def test_a_note_that_cannot_be_removed_spoils_no_checkpoint(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", denied)
        add(tmp_path, 40)
    store = Store(tmp_path, OURS)
    assert store.unfinished() == [40]
    assert store.sweep() == [], "it has its manifest"
    assert (store.steps(), store.unfinished()) == ([40], [])


def test_a_file_that_comes_while_a_failed_save_is_removed_goes_too(tmp_path, monkeypatch):
    """Orbax writes the items of a checkpoint at once; one may fail while another is written."""
    store, rmtree = Store(tmp_path, OURS), shutil.rmtree
    folder = store.begin(40)
    folder.mkdir()

    def late(*arguments, **options):
        rmtree(*arguments, **options)
        monkeypatch.undo()
        folder.mkdir()
        (folder / "_sharding").write_text("")

    monkeypatch.setattr(shutil, "rmtree", late)
    assert store.clear(40)
    assert (folder.exists(), store.unfinished()) == (False, [])


def test_unsound_ones_keep_their_files_under_another_name(tmp_path):
    store = Store(tmp_path, OURS)
    for _ in range(2):
        add(tmp_path, 40)
        store.set_aside(40)
    assert names(tmp_path) == ["40.corrupt", "40.corrupt.1"]
    assert store.set_aside_ones() == [tmp_path / "40.corrupt", tmp_path / "40.corrupt.1"]
    assert store.steps() == []
    add(tmp_path, 50)
    (tmp_path / "50.corrupt").symlink_to(tmp_path / "nowhere")
    assert store.set_aside(50) == tmp_path / "50.corrupt.1", "a link is a name that is taken"


@pytest.mark.parametrize("damage", [None, "", "{", "[" * 9999, '{"run": 5}', '{"run": "../../x"}'])
def test_a_lost_id_is_found_in_the_manifests(tmp_path, damage):
    run = start_run(tmp_path)
    assert start_run(tmp_path) == run == find_run(tmp_path)
    add(tmp_path / "checkpoints", 40, run=run)
    (tmp_path / RUN).unlink()
    if damage is not None:
        (tmp_path / RUN).write_text(damage)
    assert find_run(tmp_path) == run
    assert start_run(tmp_path) == run
    assert json.loads((tmp_path / RUN).read_text())["run"] == run


def test_two_ids_without_one_of_its_own_are_refused(tmp_path):
    add(tmp_path / "checkpoints", 40)
    add(tmp_path / "checkpoints", 50, run=OTHERS)
    with pytest.raises(ConfigError, match="has checkpoints of 2 runs"):
        start_run(tmp_path)


def test_where_nothing_can_be_written_is_said_at_once(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    for root in (tmp_path / "checkpoints", tmp_path / "checkpoints" / "x", "/proc/checkpoints"):
        with pytest.raises(ConfigError, match=r"checkpoints cannot be written to .*; give a"):
            Store(tmp_path / root, OURS).open()


def test_a_folder_without_manifest_is_a_checkpoint_that_is_unsound(tmp_path):
    add(tmp_path, 40)
    (tmp_path / "40" / MANIFEST).unlink()
    store = Store(tmp_path, OURS)
    assert store.steps() == [40]
    assert store.retain(1) == [], "it is not deleted either"
    with pytest.raises(Unsound, match="has no MANIFEST"):
        store.check(40)


def test_a_checkpoint_without_the_marker_of_orbax_is_not_overlooked(tmp_path):
    """It is damaged like any other; another program's folder is not taken for such a one."""
    add(tmp_path, 40)
    add(tmp_path, 50, run=OTHERS)
    for step in (40, 50):
        (tmp_path / str(step) / COMMITTED).unlink()
    (tmp_path / "2023").mkdir()
    (tmp_path / "2023" / MANIFEST).write_text("{}")
    for run in (OURS, None):
        store = Store(tmp_path, run)
        assert store.steps() == ([40] if run else [])
        assert store.strangers() == []
    with pytest.raises(Unsound, match=r"commit_success\.txt is missing"):
        Store(tmp_path, OURS).check(40)
    Store(tmp_path, OURS).begin(60)
    shutil.copytree(tmp_path / "40", tmp_path / "60")
    assert Store(tmp_path, OURS).clear(60)
    assert names(tmp_path) == ["2023", "40", "50"]


def test_a_link_or_a_pipe_among_the_notes_is_not_followed(tmp_path):
    """Notes are written and removed by name: through a link that would be elsewhere."""
    store = Store(tmp_path / "checkpoints", OURS)
    store.open()
    (store.root / UNFINISHED).mkdir()
    os.mkfifo(store.root / UNFINISHED / "7")
    assert store.unfinished() == []
    shutil.rmtree(store.root / UNFINISHED)
    (tmp_path / "outside").mkdir()
    (store.root / UNFINISHED).symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigError, match=r"\.unfinished is a link or no folder: .* remove it"):
        store.open()
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_note_is_not_written_through_a_link_and_no_pipe_is_waited_for(tmp_path):
    """In a run that was downloaded they can stand where the next save takes its note."""
    store = Store(tmp_path / "checkpoints", OURS)
    (store.root / UNFINISHED).mkdir(parents=True)
    (tmp_path / "precious").write_text("precious")
    (store.root / UNFINISHED / "7").symlink_to(tmp_path / "precious")
    os.mkfifo(store.root / UNFINISHED / "8")
    for step in (7, 8):
        store.begin(step)
    assert (tmp_path / "precious").read_text() == "precious"
    assert store.unfinished() == [7, 8]


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(tmp_path):
    """By a bit of run.json, or a folder that is not mounted; it would clear its metrics."""
    store = Store(tmp_path / "checkpoints", OURS)
    require_first_start(tmp_path, store)
    Events(tmp_path).write("checkpoint_saved", 5, folder=str(tmp_path / "fast" / OURS / "5"))
    require_first_start(tmp_path, store)  # of a local disk, which may be gone with its host
    Events(tmp_path).write("checkpoint_saved", 40, folder=str(store.folder(40)))
    with pytest.raises(ConfigError, match=r"no checkpoint, and .*events.* of step 40; bring the"):
        require_first_start(tmp_path, store)
    add(store.root, 40)
    with pytest.raises(ConfigError, match=r"another run only \(steps 40\).* delete it: the check"):
        require_first_start(tmp_path, Store(store.root, OTHERS))


def test_no_space_for_the_id_is_an_input_error(tmp_path):
    with (
        file_limit(0),
        pytest.raises(NoSpaceError, match=r"run\.json cannot be written: .*make ro"),
    ):
        start_run(tmp_path)
    assert list(tmp_path.iterdir()) == []
