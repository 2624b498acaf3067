"""Checkpoints that are damaged, restored by the real code in one process; bit by bit compared.

    python -m faults.restores FOLDER SEED FLIPS CYCLES ROW

FOLDER has a workdir `base` with checkpoints of steps 20, 40 and 60. Prints a JSON object.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.bench import Bench, Broken, Outcome, expect
from faults.size import Size

LAST, BEFORE = 60, 40


def make_base(bench: Bench) -> Path:
    """Returns a workdir with checkpoints of steps 20, 40 and 60."""
    return bench.trained("restores/base", f"train.steps={LAST}", "checkpoint.every=20")


def in_process(row: str) -> Callable[[Bench, Size], Outcome]:
    """Returns what runs one row of this module as a process."""

    def run(bench: Bench, size: Size) -> Outcome:
        folder = make_base(bench).parent
        numbers = [str(number) for number in (bench.seed, size.flips, size.cycles)]
        words = [sys.executable, "-m", "faults.restores", str(folder), *numbers, row]
        done = bench.run(*words, log=f"restores-{row}").wait(900)
        expect(done.code == 0, f"ended with {done.code}: {done.err[-400:]}")
        found = json.loads(done.out.strip().splitlines()[-1])
        expect("broken" not in found, found.get("broken", ""))
        return Outcome(**found)

    return run


class Restorer:
    """Breaks copies of a run, and resumes each as `moejax train` does."""

    def __init__(self, folder: Path, seed: int):
        import jax

        from moejax.mesh import make_mesh
        from moejax.step import make_train_step
        from moejax.workdir import read_config

        self.folder, self.base = folder, folder / "base"
        self.rng = random.Random(seed)
        self.config = read_config(self.base)
        mesh = make_mesh(self.config.mesh, jax.devices()[:1])
        self.abstract = make_train_step(self.config, mesh)[1]
        self.right = {}
        for step in (BEFORE, LAST):
            workdir = self.copy()
            for later in (20, BEFORE, LAST):
                if later > step:
                    shutil.rmtree(workdir / "checkpoints" / str(later))
            resumed, _ = self.resume(workdir)
            self.right[step] = _digest(resumed)
        expect(len(set(self.right.values())) == 2, "two steps are the same")

    def copy(self) -> Path:
        """Returns a fresh copy of the run; no file of it is linked to another."""
        workdir = self.folder / f"copy-{os.getpid()}"
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(self.base, workdir, symlinks=True)
        shutil.rmtree(workdir / "tensorboard", ignore_errors=True)
        return workdir

    def resume(self, workdir: Path) -> tuple[Any, str]:
        """Returns the state that a training would go on from, and what was said on stderr."""
        from moejax.checkpoint import Checkpoints

        said = io.StringIO()
        with (
            contextlib.redirect_stderr(said),
            Checkpoints(workdir, self.config.checkpoint) as checkpoints,
        ):
            return checkpoints.resume(self.abstract), said.getvalue()

    def falls_back(self, workdir: Path, what: str) -> str:
        """Resumes; it must be step 40, bit for bit, with the damaged one set aside, loudly."""
        resumed, said = self.resume(workdir)
        said = said or ""
        expect(resumed is not None, f"{what}: nothing was resumed")
        expect(resumed.step == BEFORE, f"{what}: NOT FOUND, resumed at step {resumed.step}")
        expect(_digest(resumed) == self.right[BEFORE], f"{what}: SILENT WRONG RESUME")
        aside = workdir / "checkpoints" / f"{LAST}.corrupt"
        expect(aside.is_dir() and "is UNSOUND" in said, f"{what}: it was not set aside loudly")
        return said

    def is_last(self, workdir: Path, what: str) -> str:
        """Resumes; it must be step 60, bit for bit, with nothing set aside."""
        resumed, said = self.resume(workdir)
        expect(resumed is not None and resumed.step == LAST, f"{what}: not resumed at step {LAST}")
        expect(_digest(resumed) == self.right[LAST], f"{what}: SILENT WRONG RESUME")
        expect(not list(workdir.glob("checkpoints/*.corrupt*")), f"{what}: something was set aside")
        return said

    def refused(self, workdir: Path, what: str, says: str) -> None:
        from moejax.errors import ConfigError

        before = sorted(path.name for path in (workdir / "checkpoints").iterdir())
        try:
            self.resume(workdir)
        except ConfigError as error:
            expect(says in str(error), f"{what}: it says only {error}")
        else:
            raise Broken(f"{what}: it was resumed")
        after = sorted(path.name for path in (workdir / "checkpoints").iterdir())
        expect(before == after, f"{what}: {before} became {after}")


def _digest(resumed: Any) -> str:
    import jax
    import numpy as np

    found = hashlib.sha256(json.dumps(resumed.meta, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(resumed.state):
        array = np.asarray(leaf)
        found.update(f"{path} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def kinds(folder: Path) -> dict[str, list[Path]]:
    """Returns the files of a checkpoint by kind: names that are hashes count as one."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size:
            parts = path.relative_to(folder).parts
            name = "HASH" if len(path.name) >= 30 else path.name
            found.setdefault("/".join((*parts[:-1], name)), []).append(path)
    return found


def flip(file: Path, rng: random.Random) -> str:
    """Flips a bit of a file; returns which."""
    content = bytearray(file.read_bytes())
    byte, bit = rng.randrange(len(content)), rng.randrange(8)
    content[byte] ^= 1 << bit
    file.write_bytes(content)
    return f"bit {bit} of byte {byte} of {file.name}"


def flips(bench: Restorer, number: int) -> Outcome:
    seen: dict[str, int] = {}
    named = 0
    for index in range(number):
        workdir = bench.copy()
        by_kind = kinds(workdir / "checkpoints" / str(LAST))
        kind = sorted(by_kind)[index % len(by_kind)]
        file = bench.rng.choice(by_kind[kind])
        what = f"{kind}: {flip(file, bench.rng)}"
        said = bench.falls_back(workdir, what)
        named += file.name in said
        seen[kind] = seen.get(kind, 0) + 1
    expect(named == number, f"only {named} of {number} messages name the file")
    return Outcome(
        f"{number} of {number} found, in {len(seen)} kinds of files; each time the file was named, "
        "the step before restored and compared bit by bit, the damaged one renamed to N.corrupt",
        number,
    )


def everywhere(bench: Restorer, _: int) -> Outcome:
    for index in range(5):
        workdir = bench.copy()
        for step in (20, BEFORE, LAST):
            by_kind = kinds(workdir / "checkpoints" / str(step))
            flip(bench.rng.choice(by_kind[bench.rng.choice(sorted(by_kind))]), bench.rng)
        bench.refused(workdir, f"try {index}", "none is sound")
    return Outcome("refused with what is wrong with each; nothing renamed, nothing begun anew", 5)


HARMS: dict[str, Callable[[Path], object]] = {
    "cut in half": lambda f: _cut(_largest(f), 0.5),
    "last byte missing": lambda f: _largest(f).write_bytes(_largest(f).read_bytes()[:-1]),
    "a byte more": lambda f: _largest(f).write_bytes(_largest(f).read_bytes() + b"x"),
    "a file of data deleted": lambda f: _largest(f).unlink(),
    "ocdbt manifest deleted": lambda f: (f / "model" / "manifest.ocdbt").unlink(),
    "_sharding deleted": lambda f: (f / "training" / "_sharding").unlink(),
    "commit marker deleted": lambda f: (f / "commit_success.txt").unlink(),
    "commit marker emptied": lambda f: (f / "commit_success.txt").write_text("gone"),
    "a file too many": lambda f: (f / "model" / "more").write_bytes(b"x"),
    "no manifest": lambda f: (f / "MANIFEST.json").unlink(),
    "manifest of {}": lambda f: (f / "MANIFEST.json").write_text("{}"),
    "manifest cut": lambda f: _cut(f / "MANIFEST.json", 0.5),
    "manifest nested": lambda f: (f / "MANIFEST.json").write_text("[" * 9999),
    "a folder as a link": lambda f: _as_link(f / "model"),
}
EMPTY = ("model/_METADATA", "training/_METADATA", "_CHECKPOINT_METADATA", "MANIFEST.json")


def _largest(folder: Path) -> Path:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "MANIFEST.json")
    return max(files, key=lambda p: p.stat().st_size)


def _cut(file: Path, part: float) -> None:
    os.truncate(file, int(file.stat().st_size * part))


def _as_link(folder: Path) -> None:
    elsewhere = folder.parents[2] / "elsewhere"
    shutil.rmtree(elsewhere, ignore_errors=True)
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)


def harms(bench: Restorer, _: int) -> Outcome:
    for name, harm in HARMS.items():
        workdir = bench.copy()
        harm(workdir / "checkpoints" / str(LAST))
        bench.falls_back(workdir, name)
    return Outcome(f"all fell back to the step before: {', '.join(HARMS)}", len(HARMS))


def empty_files(bench: Restorer, _: int) -> Outcome:
    number = 0
    for name in EMPTY:
        workdir = bench.copy()
        file = workdir / "checkpoints" / str(LAST) / name
        if file.exists():
            file.write_bytes(b"")
            bench.falls_back(workdir, f"{name} empty")
            number += 1
    workdir = bench.copy()
    folder = workdir / "checkpoints" / str(LAST)
    metadata = next((folder / "meta").rglob("metadata"))
    metadata.write_bytes(b"")
    bench.falls_back(workdir, "the JSON item empty")
    return Outcome("an empty file is a damaged one: the step before", number + 1)


def foreign(bench: Restorer, _: int) -> Outcome:
    """Folders of others, and what a crash of this run left."""
    workdir = bench.copy()
    root = workdir / "checkpoints"
    run = json.loads((workdir / "run.json").read_text())["run"]
    planted = ["2023", "logs", "5.orbax-checkpoint-tmp", "80.orbax-checkpoint-tmp"]
    for name in planted:
        (root / name).mkdir()
        (root / name / "file").write_text("mine")
    shutil.copytree(root / str(LAST), root / "70")
    (root / "70" / "MANIFEST.json").unlink()
    (root / ".unfinished").mkdir(exist_ok=True)
    (root / ".unfinished" / "70").write_text(run)
    said = bench.is_last(workdir, "foreign folders")
    expect(not (root / "70").exists(), "what a crash left is still there")
    expect("70: left by a process that was killed; removed" in said, "it was removed in silence")
    for name in planted:
        expect((root / name / "file").read_text() == "mine", f"{name} was touched")
    return Outcome("its own leftover was removed with a line, 4 foreign folders untouched", 5)


def not_checkpoints(bench: Restorer, _: int) -> Outcome:
    workdir = bench.copy()
    root = workdir / "checkpoints"
    (root / "999").mkdir()
    (root / "998").symlink_to(root / str(LAST))
    (root / "0070").mkdir()
    other = root / "90"
    shutil.copytree(root / str(LAST), other)
    manifest = json.loads((other / "MANIFEST.json").read_text())
    tables = {
        item: {name: (tuple(shape), dtype) for name, (shape, dtype) in table.items()}
        for item, table in manifest["tables"].items()
    }
    (other / "MANIFEST.json").unlink()
    from moejax.manifest import write_manifest

    write_manifest(other, "f" * 16, 90, tables, {}, {})
    said = bench.is_last(workdir, "what is no checkpoint")
    expect("90 is a checkpoint of another run; left alone" in said, "nothing was said of it")
    kept = ("999", "998", "0070", "90")
    expect(all(os.path.lexists(root / name) for name in kept), "something was removed")
    return Outcome("none was taken for one, none was touched; a line about the other run's", 4)


def not_finite(bench: Restorer, _: int) -> Outcome:
    import jax
    import jax.numpy as jnp

    from moejax.checkpoint import Checkpoints

    for value in (jnp.nan, jnp.inf):
        workdir = bench.copy()
        resumed = bench.resume(workdir)[0]
        shutil.rmtree(workdir / "checkpoints" / str(LAST))
        done = [False]

        def spoil(leaf, done=done, value=value):
            if done[0] or not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.ndim < 2:
                return leaf
            done[0] = True
            return leaf.at[(0,) * leaf.ndim].set(value)

        params = jax.tree.map(spoil, resumed.state.params)
        state = resumed.state
        broken = state.__class__(
            state.step, params, state.opt_state, state.router_state, state.rng, state.watch
        )
        with Checkpoints(workdir, bench.config.checkpoint) as checkpoints:
            expect(checkpoints.save(broken, resumed.meta, None), "it cannot be saved")
        said = bench.falls_back(workdir, f"a parameter is {value}")
        expect("has a value that is not finite" in said, "it does not say why")
    return Outcome("fits its manifest, and was set aside as not finite: the step before", 2)


def hostile_shapes(bench: Restorer, _: int) -> Outcome:
    import tensorstore

    from moejax.manifest import read_manifest, write_manifest

    for change in (
        {"shape": [1 << 20, 1 << 20], "chunks": [1 << 20, 1 << 20]},
        {"dtype": "<i4"},
    ):
        workdir = bench.copy()
        folder = workdir / "checkpoints" / str(LAST)
        store = tensorstore.KvStore.open(
            {"driver": "ocdbt", "base": f"file://{folder}/model/"}
        ).result()
        keys = [key for key in store.list().result() if key.endswith(b"/.zarray")]
        arrays = {key: json.loads(store.read(key).result().value) for key in keys}
        key = next(k for k, array in arrays.items() if len(array["shape"]) == 2)
        store.write(key, json.dumps({**arrays[key], **change}).encode()).result()
        manifest = read_manifest(folder)
        (folder / "MANIFEST.json").unlink()
        write_manifest(folder, manifest.run, manifest.step, manifest.tables, {}, manifest.about)
        bench.falls_back(workdir, f"metadata say {change}")
    return Outcome("with a manifest that fits: refused before any array is opened, no abort", 2)


class _Payload:
    """What runs when it is unpickled."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return Path.touch, (self.sentinel,)


def planted_code(bench: Restorer, _: int) -> Outcome:
    from moejax.errors import ConfigError
    from moejax.workdir import read_config

    sentinel = bench.folder / "was-run"
    payload = pickle.dumps(_Payload(sentinel))
    python = f"open({str(sentinel)!r}, 'w')"
    names = ("state.pkl", "checkpoint.pt", "params.npy", "sitecustomize.py", "config.py")
    workdir = bench.copy()
    for place in (workdir, workdir / "checkpoints"):
        for name in names:
            (place / name).write_bytes(python.encode() if name.endswith(".py") else payload)
    bench.is_last(workdir, "code next to checkpoints")
    for name in names:
        workdir = bench.copy()
        content = python.encode() if name.endswith(".py") else payload
        (workdir / "checkpoints" / str(LAST) / "model" / name).write_bytes(content)
        bench.falls_back(workdir, f"{name} in a checkpoint")
    (workdir / "config.json").write_text(
        f"!!python/object/apply:builtins.open [{str(sentinel)!r}, w]"
    )
    try:
        read_config(workdir)
    except ConfigError:
        pass
    else:
        raise Broken("YAML with Python in it was read as a config")
    expect(not sentinel.exists(), "PLANTED CODE WAS RUN")
    return Outcome(
        "pickles, Python and YAML objects next to and in checkpoints: nothing of it was run; "
        "inside a checkpoint a file too many makes it unsound",
        2 * len(names) + len(names) + 1,
    )


def cycles(bench: Restorer, number: int) -> Outcome:
    """Saves, and restores every tenth; what the process holds after a fifth must not grow.

    A restore alone keeps 0.3 MiB: TensorStore 0.1.86 keeps whatever `Spec.to_json` gives.
    """
    import dataclasses

    from moejax.checkpoint import Checkpoints

    workdir = bench.copy()
    resumed, _ = bench.resume(workdir)
    held = []
    with Checkpoints(workdir, bench.config.checkpoint) as checkpoints:  # one, as in a training
        for cycle in range(number):
            step = LAST + 1 + cycle
            state = dataclasses.replace(resumed.state, step=resumed.state.step + 1 + cycle)
            expect(checkpoints.save(state, resumed.meta, None), f"step {step} was not saved")
            checkpoints.wait()
            if cycle % 10 == 9:
                found = checkpoints.resume(bench.abstract)
                expect(found is not None and found.step == step, f"step {step} was not restored")
            if cycle >= number // 5:
                held.append((len(os.listdir("/proc/self/fd")), threading.active_count(), _rss()))
    # the least of some cycles: a save has threads of its own, which come and go
    (files, threads, rss), (files_after, threads_after, rss_after) = (
        tuple(map(min, zip(*part, strict=True))) for part in (held[:10], held[-10:])
    )
    expect(files_after <= files + 2, f"open files went from {files} to {files_after}")
    expect(threads_after <= threads + 2, f"threads went from {threads} to {threads_after}")
    grown = rss_after - rss
    expect(grown < 50, f"{grown:.0f} MiB were kept in {len(held)} cycles")
    return Outcome(
        f"open files {files} to {files_after}, threads {threads} to {threads_after}, resident "
        f"memory {grown:+.0f} MiB over the last {len(held)} of {number} saves",
        number,
    )


def _rss() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


RUN = {
    "5": foreign,
    "8": empty_files,
    "12": flips,
    "13": everywhere,
    "14": harms,
    "15": not_checkpoints,
    "16": not_finite,
    "50": hostile_shapes,
    "54": planted_code,
    "59": cycles,
}


def main(words: list[str]) -> int:
    folder, (seed, flips, cycles), row = Path(words[0]), map(int, words[1:4]), words[4]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from moejax.mesh import start_jax

    start_jax(1)
    try:
        outcome = RUN[row](Restorer(folder, seed), cycles if row == "59" else flips)._asdict()
    except Broken as error:
        outcome = {"broken": str(error)}
    print(json.dumps(outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
