"""Manifests: every flipped bit, missing, extra or cut file is found, and so is hostile JSON."""

import json
import os
import random
import subprocess

import pytest

from moejax import manifest as module
from moejax.errors import StorageError
from moejax.manifest import MANIFEST, Newer, Unsound, check_files, read_manifest, write_manifest

RUN = "0123456789abcdef"
TABLES = {"model": {"params/w": ((2, 3), "float32"), "step": ((), "int32")}}
FILES = {"model/d/one": b"x" * 5000, "model/_METADATA": b"{}", "empty": b"", "meta/metadata": b"1"}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "40"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_manifest(folder, RUN, 40, TABLES, {"loss": 3}, {"data": "abc"})
    return folder


def check(folder) -> None:
    check_files(folder, read_manifest(folder))


def flip(file, byte: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1 << bit
    file.write_bytes(content)


def test_what_is_written_is_read_back(folder):
    manifest = read_manifest(folder)
    assert (manifest.run, manifest.step, manifest.tables) == (RUN, 40, TABLES)
    assert manifest.metrics == {"loss": 3.0}
    assert manifest.about == {"data": "abc"}
    assert {name: size for name, (size, _) in manifest.files.items()} == {
        name: len(content) for name, content in FILES.items()
    }
    assert manifest.bytes == 5003
    seen = []
    check_files(folder, manifest, seen.append)
    assert sum(seen) == 5003


def test_every_flipped_bit_is_found(folder):
    """Of 60 places over all files, and of each bit of the manifest in some 300 bytes."""
    rng = random.Random(0)
    files = [folder / name for name, content in FILES.items() if content]
    places = [(file, rng.randrange(file.stat().st_size)) for file in files for _ in range(20)]
    manifest = folder / MANIFEST
    places += [(manifest, byte) for byte in range(0, manifest.stat().st_size, 4)]
    for file, byte in places:
        bit = rng.randrange(8)
        flip(file, byte, bit)
        with pytest.raises(Unsound, match=MANIFEST if file == manifest else file.name):
            check(folder)
        flip(file, byte, bit)
    check(folder)


def test_the_size_alone_does_not_find_a_flipped_bit(folder):
    """The harm without checksums: the same files with the same sizes, and other contents."""
    flip(folder / "model/d/one", 9, 3)
    assert {name: len(FILES[name]) for name in FILES} == module.list_files(folder)
    with pytest.raises(Unsound, match=r"model/d/one has another SHA-256"):
        check(folder)


def _replace(folder, old: str, new: str) -> None:
    text = (folder / MANIFEST).read_text()
    assert old in text
    (folder / MANIFEST).write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda f: (f / "model/d/one").write_bytes(b"x" * 4999), "one has 4999 bytes, not 5000"),
        (lambda f: (f / "model/_METADATA").write_bytes(b""), "_METADATA has 0 bytes, not 2"),
        (lambda f: (f / "empty").unlink(), "empty is missing"),
        (lambda f: (f / "model/extra").write_bytes(b""), "model/extra is not its own"),
        (lambda f: (f / MANIFEST).unlink(), "it has no MANIFEST.json"),
        (lambda f: (f / MANIFEST).write_text(""), "MANIFEST.json is damaged"),
        (lambda f: (f / MANIFEST).write_text("[" * 5000), "MANIFEST.json is damaged"),
        (lambda f: _replace(f, "5000", "1e999"), "MANIFEST.json is damaged"),
        (lambda f: _replace(f, "5000", "Infinity"), "MANIFEST.json is damaged"),
        (lambda f: (f / MANIFEST).write_text("null"), "MANIFEST.json is damaged"),
        (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"), "MANIFEST.json is damaged"),
        (lambda f: os.truncate(f / MANIFEST, 300), "MANIFEST.json is damaged"),
    ],
)
def test_each_harm_is_named(folder, harm, reason):
    harm(folder)
    with pytest.raises(Unsound, match=reason):
        check(folder)


def test_a_file_server_that_does_not_answer_says_nothing_of_a_checkpoint(folder, monkeypatch):
    """It would be set aside, and the steps since the one before be lost; a bad sector is damage."""
    manifest = read_manifest(folder)
    for number, kind in ((116, StorageError), (110, StorageError), (5, Unsound)):

        def fails(*_, number=number, **__):
            raise OSError(number, os.strerror(number), "x")

        for name, look in (
            ("builtins.open", lambda: check_files(folder, manifest)),
            ("pathlib.Path.read_bytes", lambda: read_manifest(folder)),
            ("os.scandir", lambda: module.list_files(folder)),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(name, fails)
                with pytest.raises(kind, match=os.strerror(number)):
                    look()


def test_links_and_special_files_are_refused(folder, tmp_path):
    (tmp_path / "one").write_bytes(FILES["model/d/one"])
    (folder / "model/d/one").unlink()
    (folder / "model/d/one").symlink_to(tmp_path / "one")
    with pytest.raises(Unsound, match="model/d/one is neither a file nor a folder"):
        check(folder)
    (folder / "model/d/one").unlink()
    os.mkfifo(folder / "model/d/one")
    with pytest.raises(Unsound, match="neither a file"):
        check(folder)
    (folder / MANIFEST).rename(tmp_path / "manifest")
    (folder / MANIFEST).symlink_to(tmp_path / "manifest")
    with pytest.raises(Unsound, match=r"it has no MANIFEST\.json"):
        read_manifest(folder)


def test_a_later_format_and_a_huge_manifest_are_told_apart_from_damage(folder, monkeypatch):
    written = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**written, "format": 2}))
    with pytest.raises(Newer, match="has format 2, of a newer moejax; this one reads 1"):
        read_manifest(folder)
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    with pytest.raises(Unsound, match="is larger than"):
        read_manifest(folder)


def test_all_is_synced_before_the_manifest_has_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "40"
    folder.mkdir()
    (folder / "one").write_bytes(b"1")
    moves, sync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        moves.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def replaced(source, target):
        moves.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_manifest(folder, RUN, 40, {}, {}, {})
    named = moves.index("rename")
    assert {"one", "40"} <= {*moves[:named]}
    assert any(name.startswith(f".{MANIFEST}") for name in moves[:named])
    assert moves[named + 1 :] == ["40", tmp_path.name]


def test_a_disk_that_is_full_leaves_no_manifest(tmp_path, monkeypatch):
    folder = tmp_path / "40"
    folder.mkdir()
    (folder / "one").write_bytes(b"1")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_manifest(folder, RUN, 40, {}, {}, {})
    assert [path.name for path in folder.iterdir()] == ["one"]


def test_folders_without_end_are_no_checkpoint(folder):
    """By their full name they are too long for the system, so that they come piece by piece."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(before)
    try:
        with pytest.raises(Unsound, match="nested without end"):
            module.list_files(folder)
    finally:  # deeper than Python goes, which is how pytest would remove it
        subprocess.run(["rm", "-rf", str(folder)], check=True)
