"""Checkpoints: Orbax, asynchronous and sharded, in one module, and what Orbax does not promise.

A step's folder holds three items: `model` (step, parameters, router state: all that evaluation
needs), `training` (optimizer state, rng, watch) and `meta` (config, data fingerprint, versions,
counters). It is a checkpoint once its manifest is written (`manifest.py`); before anything of it is
restored, its files are compared with the manifest, and its arrays with those of the config.
"""

import contextlib
import itertools
import logging
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from moejax.cluster import any_complains, appears, check_shared, from_first, refuse_together
from moejax.config import CheckpointConfig, ConfigError
from moejax.errors import FULL, NO_SPACE, NoSpaceError, StorageError
from moejax.events import EVENTS, Events
from moejax.foreign import printable
from moejax.manifest import (
    MANIFEST,
    Newer,
    Table,
    Unsound,
    fingerprint,
    read_manifest,
    sync_file,
)
from moejax.metrics import FIELDS
from moejax.sharding import path_name, replicated
from moejax.state import TrainState
from moejax.store import Store, find_run, require_first_start, start_run
from moejax.workdir import CHECKPOINTS, METRICS, checkpoint_roots

ITEMS = ("model", "training", "meta")
# What a run reads of the meta.
META = {"counters": dict, "watch": dict, "environment": dict, "data": str, "validation": str}
_SHOWN_ROWS = 20  # of the differences between a checkpoint and a config
_NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory")
_NO_SPACE = re.compile(r"No space left|Disk quota exceeded|File too large")


class Resumed(NamedTuple):
    """What a training goes on from."""

    step: int
    state: TrainState
    meta: dict[str, Any]


class Model(NamedTuple):
    """What evaluation and generation need of a checkpoint."""

    step: int
    params: Any
    router_state: dict[str, jax.Array]
    meta: dict[str, Any]


def _split(state: Any) -> dict[str, dict[str, Any]]:
    model = {"step": state.step, "params": state.params, "router_state": state.router_state}
    training = {"opt_state": state.opt_state, "rng": state.rng, "watch": state.watch}
    return {"model": model, "training": training}


class Checkpoints:
    """The checkpoints of one run. A context manager: leaving it waits for the last save.

    Args:
        workdir: of the run.
        config: where, how often and how many.
        read_only: for evaluation, also while a training goes on; nothing is renamed or removed.

    Raises:
        ConfigError: it holds no checkpoint (read-only), cannot be written, or not every process
            sees `checkpoint.local`.
    """

    def __init__(self, workdir: Path, config: CheckpointConfig, *, read_only: bool = False):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # what Orbax logs it raises, too
        self._workdir, self._config, self._read_only = workdir.resolve(), config, read_only
        self._first = jax.process_index() == 0
        self._events = Events(self._workdir, enabled=self._first and not read_only)
        self._count = itertools.count()
        self._rejected: dict[tuple[int, int], str] = {}  # (store, step) -> why
        self._thread: threading.Thread | None = None
        self._error: StorageError | None = None  # of the last save
        self._patience = 0.0  # seconds that saves may still wait for the one under way
        run = self._agree(self._look if read_only else self._open)
        self._stores = self._stores_of(run)
        if config.local and not read_only:
            check_shared(self._stores[1].root, "checkpoint.local")
        atomicity = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                *ITEMS, composite_options=ocp.CompositeOptions(atomicity_options=atomicity)
            ),
            atomicity_options=atomicity,
        )

    def _stores_of(self, run: str | None) -> list[Store]:
        roots = checkpoint_roots(self._workdir, self._config.local, run)
        return [Store(root, run) for root in roots]

    def _look(self) -> str | None:
        run = find_run(self._workdir)
        stores = self._stores_of(run)
        if not any(store.steps() for store in stores):
            require_first_start(self._workdir, stores[0])
            raise ConfigError(
                f"{self._workdir / CHECKPOINTS} holds no checkpoint; train first, or wait for the "
                "first checkpoint.every steps"
            )
        return run

    def _open(self) -> str:
        Store(self._workdir / CHECKPOINTS, None).open()
        run = start_run(self._workdir)
        for store in self._stores_of(run):
            store.open()
            for step in store.sweep():
                folder = str(store.folder(step))
                self._tell(f"{folder}: left by a process that was killed; removed")
                self._events.write("leftover_removed", step, folder=folder)
            for step in store.strangers():
                folder = str(store.folder(step))
                self._tell(f"{folder} is a checkpoint of another run; left alone")
                self._events.write("checkpoint_ignored", step, folder=folder)
        return run

    def _agree(self, compute: Callable[[], Any]) -> Any:
        """Returns what process 0 computes; all processes come here in the same order."""
        return from_first(f"checkpoint {next(self._count)}", compute)

    def _tell(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the log may be on the disk that is full
            print(f"moejax: {printable(text)}", file=sys.stderr, flush=True)

    @property
    def steps(self) -> list[int]:
        """The steps of this run's checkpoints on disk, in order; whether they are sound is open."""
        return sorted({step for store in self._stores for step in store.steps()})

    # Restoring

    def resume(self, abstract: TrainState, at_most: int | None = None) -> Resumed | None:
        """Returns the newest sound checkpoint, laid out as `abstract`, whatever mesh saved it.

        Those that are found unsound on the way are set aside, loudly.

        Args:
            at_most: the last step to look at.

        Returns:
            None: there is no checkpoint at all.

        Raises:
            ConfigError: there are, and none is sound; or it is of another config.
        """
        found = self._load(_split(abstract), None, at_most)
        if found is None:
            return None
        step, items, meta = found
        return Resumed(step, TrainState(**items["model"], **items["training"]), meta)

    def load_model(self, abstract: TrainState, step: int | None) -> Model:
        """Returns the model of `step`, or of the newest sound checkpoint for None.

        Raises:
            ConfigError: there is no such checkpoint, it is unsound, or it is of another config.
        """
        model = {"model": _split(abstract)["model"]}
        found = self._load(model, None if step is None else self.find(step))
        assert found is not None, "it was opened with checkpoints"
        step, items, meta = found
        return Model(step, items["model"]["params"], items["model"]["router_state"], meta)

    def _load(
        self, abstract: dict[str, Any], step: int | None, at_most: int | None = None
    ) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        while True:
            found = self._agree(lambda: self._find_sound(step, at_most))
            if found is None:
                return None
            index, sound = found
            folder = self._stores[index].folder(sound)
            seen = appears(lambda folder=folder: (folder / MANIFEST).is_file())
            complaint = f"does not see {folder}; use a shared file system"
            refuse_together(f"checkpoint {next(self._count)}", "" if seen else complaint)
            items, meta, complaint = self._read(folder, abstract)
            complaint = any_complains(f"checkpoint {next(self._count)}", complaint)
            complaint = complaint or _not_finite(items)
            if not complaint:
                self._agree(self._set_aside)
                return sound, items, meta
            self._rejected[index, sound] = complaint
            if step is not None:
                raise self._unsound(step, complaint)

    def _find_sound(self, step: int | None, at_most: int | None) -> tuple[int, int] | None:
        """Returns (store, step) of the newest checkpoint whose files are as they were written."""
        pairs = [(s, -i) for i, store in enumerate(self._stores) for s in store.steps()]
        pairs = sorted((pair for pair in pairs if step in (None, pair[0])), reverse=True)
        for found, index in ((s, -i) for s, i in pairs if at_most is None or s <= at_most):
            if (index, found) in self._rejected:
                continue
            try:
                self._stores[index].check(found)
            except Newer as error:
                folder = self._stores[index].folder(found)
                raise ConfigError(f"{folder}: {error}; use that moejax") from None
            except Unsound as error:
                self._rejected[index, found] = str(error)
                continue
            return index, found
        reasons = [f"step {s}: {why}" for (_, s), why in sorted(self._rejected.items())]
        reasons += [str(path) for store in self._stores for path in store.set_aside_ones()]
        if step is not None:
            raise self._unsound(step, "; ".join(reasons[:1]))
        if reasons and (at_most is None or pairs == []):
            raise ConfigError(
                f"{self._workdir} has checkpoints, and none is sound ({'; '.join(reasons[:5])}); "
                "bring them back from a copy, or give another --workdir to begin anew"
            )
        if at_most is None and not pairs:
            require_first_start(self._workdir, self._stores[0])
        return None

    def _unsound(self, step: int, reason: str) -> ConfigError:
        return ConfigError(
            f"the checkpoint of step {step} is unsound: {reason}; give another --step, or none for "
            "the last sound one; moejax fsck checks all"
        )

    def _set_aside(self) -> None:
        """Renames what was found unsound, now that something sound was restored."""
        for (index, step), reason in sorted(self._rejected.items()):
            store = self._stores[index]
            if self._read_only:
                self._tell(f"{store.folder(step)} is UNSOUND: {reason}; passed over")
            elif store.folder(step).exists():
                folder = str(store.set_aside(step))
                self._tell(f"{store.folder(step)} is UNSOUND: {reason}; renamed to {folder}")
                self._events.write("checkpoint_corrupt", step, reason=reason, folder=folder)
        if not self._read_only:
            self._rejected.clear()  # the same step may be saved again, soundly

    def _read(
        self, folder: Path, abstract: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any], str]:
        """Returns items, meta and what is wrong with them, "" for nothing.

        Raises:
            ConfigError: the checkpoint is of another config, or memory is too small for it.
        """
        try:
            manifest = read_manifest(folder)
        except Unsound as error:  # process 0 found it sound; this one sees something else
            return {}, {}, str(error)
        tables = {item: table_of(tree) for item, tree in abstract.items()}
        _check_tables(folder, {item: manifest.tables.get(item, {}) for item in tables}, tables)
        try:
            for item in tables:
                _check_stored(folder / item, manifest.tables[item])
            args = {item: ocp.args.StandardRestore(tree) for item, tree in abstract.items()}  # pyright: ignore[reportCallIssue]
            restored = self._orbax.restore(
                folder,
                args=ocp.args.Composite(**args, meta=ocp.args.JsonRestore()),  # pyright: ignore[reportCallIssue]
            )
        except Exception as error:  # whatever Orbax and TensorStore raise, they name no class
            if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
                raise ConfigError(
                    f"{folder} is sound, and there is no memory here to restore it "
                    f"({_first_line(error)}); use more devices by mesh.fsdp, or free some"
                ) from error
            return {}, {}, f"it cannot be restored: {_first_line(error)}"
        return {item: restored[item] for item in tables}, restored["meta"], ""

    def find(self, step: int) -> int:
        """Returns `step`.

        Raises:
            ConfigError: there is no such checkpoint.
        """
        if step not in self.steps:
            raise ConfigError(
                f"step {step} has no checkpoint in {self._workdir / CHECKPOINTS}; there are steps "
                f"{', '.join(map(str, self.steps))}"
            )
        return step

    # Saving

    def save(
        self,
        state: TrainState,
        meta: dict[str, Any],
        validation_loss: float | None,
        *,
        local: bool = False,
        final: bool = False,
    ) -> bool:
        """Starts to save; returns when the arrays are copied, and they may be donated.

        A save that fails, now or later, is reported and leaves nothing; the next one tries again.

        Args:
            meta: JSON.
            validation_loss: of these parameters, nats; None if they were not evaluated.
            local: into `checkpoint.local`, not the workdir.
            final: nothing is saved after it: it waits for the one before however long that takes.

        Returns:
            Whether it was started; False if the one before is still being written.
        """
        step, items = int(state.step), _split(state)
        tables = {item: table_of(tree) for item, tree in items.items()}
        store = self._stores[1 if local else 0]
        if not self._agree(lambda: self._begin(store, step, final)):
            return False
        self.wait()
        self._error = None
        about = {name: value for name, value in meta.items() if name != "config"}
        about["config"] = fingerprint(meta.get("config"))
        metrics = {} if validation_loss is None else {"loss": validation_loss}
        args = {item: ocp.args.StandardSave(tree) for item, tree in items.items()}  # pyright: ignore[reportCallIssue]
        try:
            self._orbax.save(
                store.folder(step),
                args=ocp.args.Composite(**args, meta=ocp.args.JsonSave(meta)),  # pyright: ignore[reportCallIssue]
            )
        except Exception as error:  # as in _read
            self._failed(store, step, error)
            return False
        self._patience = self._config.wait_seconds
        self._thread = threading.Thread(
            target=self._finish, args=(store, step, tables, metrics, about), name="save"
        )
        self._thread.start()
        return True

    def _begin(self, store: Store, step: int, final: bool) -> bool:
        """Says whether a save can start, and notes that it did."""
        if self._thread is not None:
            start = time.monotonic()
            self._thread.join(None if final else self._patience)
            waited = time.monotonic() - start
            self._patience = max(0.0, self._patience - waited)
            if self._thread.is_alive():
                self._tell(
                    f"step {step} is not saved: the save before it takes {waited:.1f} s more"
                )
                self._events.write("checkpoint_skipped", step, folder=str(store.folder(step)))
                return False
        if step in store.steps():
            raise RuntimeError(f"step {step} already exists in {store.root}")
        try:
            store.begin(step)
        except OSError as error:
            self._failed(store, step, error, clear=False)
            return False
        return True

    def _finish(self, store: Store, step: int, tables, metrics, about) -> None:
        """Waits for Orbax, in the background, then makes what it wrote a checkpoint."""
        start = time.monotonic()
        try:
            self._orbax.wait_until_finished()  # on process 0: the others have written theirs
            if not self._first:
                return
            # a resume keeps the lines up to the checkpoint: they are not written again
            for name in (METRICS, EVENTS):
                sync_file(self._workdir / name)
            manifest = store.seal(step, tables, metrics, about)
        except Exception as error:  # as in _read
            self._failed(store, step, error)
            return
        folder, seconds = str(store.folder(step)), round(time.monotonic() - start, 3)
        self._events.write(
            "checkpoint_saved", step, folder=folder, bytes=manifest.bytes, seconds=seconds
        )
        try:
            store.retain(self._config.keep if store is self._stores[0] else 1)
        except OSError as error:
            self._tell(f"old checkpoints in {store.root} cannot be deleted: {_first_line(error)}")

    def _failed(self, store: Store, step: int, error: Exception, *, clear: bool = True) -> None:
        """Reports a save that failed, and removes what it left."""
        text = _first_line(error)
        if clear and self._first:
            with contextlib.suppress(OSError):  # what is said of the save matters more
                store.clear(step)
        try:
            free = shutil.disk_usage(store.root).free
        except OSError:
            free = 0
        where = f"{store.root}, {free / 2**20:,.0f} MiB free"
        self._tell(f"the checkpoint of step {step} was NOT SAVED: {text} ({where})")
        self._events.write(
            "checkpoint_failed", step, folder=str(store.folder(step)), error=text, free_bytes=free
        )
        full = getattr(error, "errno", None) in FULL or _NO_SPACE.search(str(error))
        kind = NoSpaceError if full else StorageError
        self._error = kind(
            f"the checkpoint of step {step} was not saved: {text} ({where}); make room or mend the "
            "storage, and give the same command: it goes on from the last checkpoint"
        )

    def require_saved(self) -> None:
        """Waits for the last save; all processes call it.

        Raises:
            StorageError: it failed, on process 0 or here.
        """
        self.wait()
        ours = self._error and [self._error.code, str(self._error)]
        failed = self._agree(lambda: ours) or ours
        if failed:
            code, message = failed
            raise (NoSpaceError if code == NO_SPACE else StorageError)(message)

    def wait(self) -> None:
        """Waits until everything is written, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def settle(self) -> None:
        """Waits on every process until process 0 has sealed the last save, too."""
        self.wait()
        self._agree(lambda: None)

    def close(self) -> None:
        """Waits, and lets go of the folder. Closing twice is harmless."""
        self.wait()
        self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()


# What is compared


def require_meta(meta: Any, step: int, names: tuple[str, ...] = tuple(META)) -> None:
    """Checks that a checkpoint says of itself what is needed: its manifest may be anybody's.

    Args:
        names: of META; a training needs all of them.

    Raises:
        ConfigError: what is missing or of another kind.
    """
    meta = meta if isinstance(meta, dict) else {}
    sound = {name: isinstance(meta.get(name), kind) for name, kind in META.items()}
    if sound["counters"]:
        counters = meta["counters"].items()
        sound["counters"] = all(name in FIELDS and _is_count(n) for name, n in counters)
    if sound["watch"]:
        streaks, skipped = (meta["watch"].get(name) for name in ("streaks", "skip_batches"))
        steps = isinstance(streaks, dict) and all(map(_is_count, streaks.values()))
        sound["watch"] = steps and isinstance(skipped, str)
    wrong = [name for name in names if not sound[name]]
    if wrong:
        raise ConfigError(
            f"the checkpoint of step {step} has no usable {', '.join(wrong)} in its meta: this "
            "moejax did not write it; move it away, or give another step"
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def table_of(tree: Any) -> Table:
    """Returns shape and dtype of every array by its name.

    Raises:
        ValueError: two names would be one in the files of a checkpoint.
    """
    table: Table = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = [path_name((part,)) for part in path]
        if any("." in part or "/" in part or part == "" for part in parts):
            raise ValueError(f"{parts}: a key of the state has '.' or '/' in it, or is empty")
        table["/".join(parts)] = (tuple(leaf.shape), str(np.dtype(leaf.dtype)))
    return table


def _shown(entry: tuple[tuple[int, ...], str] | None) -> str:
    return "none" if entry is None else f"{entry[1]} {list(entry[0])}"


def _check_tables(folder: Path, stored: Mapping[str, Table], asked: Mapping[str, Table]) -> None:
    rows = [
        (f"{item}/{name}", _shown(stored[item].get(name)), _shown(asked[item].get(name)))
        for item in asked
        for name in sorted({*stored[item], *asked[item]})
        if stored[item].get(name) != asked[item].get(name)
    ]
    if not rows:
        return
    shown = [("key", "checkpoint", "config"), *rows[:_SHOWN_ROWS]]
    widths = [max(len(row[column]) for row in shown) for column in range(3)]
    lines = ["  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)) for row in shown]
    if len(rows) > _SHOWN_ROWS:
        lines.append(f"and {len(rows) - _SHOWN_ROWS} more")
    error = ConfigError(
        f"{folder} is of another model or optimizer than the config: {len(rows)} arrays differ; "
        "give the config that it was trained with"
    )
    error.details = "\n".join(line.rstrip() for line in lines)
    raise error


def _check_stored(folder: Path, table: Table) -> None:
    """Compares what the files say of their arrays with the manifest, before any is opened.

    TensorStore takes their word: it would end the process for want of 4 TiB.

    Raises:
        Unsound: they differ.
    """
    metadata = ocp.StandardCheckpointHandler().metadata(epath.Path(folder))
    found: Table = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(getattr(metadata, "tree", metadata))[0]:
        if getattr(leaf, "shape", None) is None:
            continue
        name = path_name(path)
        found[name] = (tuple(leaf.shape), str(np.dtype(leaf.dtype)))
        chunk = leaf.storage.chunk_shape if leaf.storage is not None else ()
        if any(c > max(s, 1) for c, s in zip(chunk or (), leaf.shape, strict=False)):
            raise Unsound(f"{folder.name}/{name} has chunks {list(chunk)} of {list(leaf.shape)}")
    for name in sorted({*found} | {*table}):
        if found.get(name) != table.get(name):
            says = f"{_shown(found.get(name))}, not {_shown(table.get(name))}"
            raise Unsound(f"{folder.name}/{name} is stored as {says}")


def _not_finite(items: Mapping[str, Any]) -> str:
    """Returns which array is not finite, alike on every process; "" if all are."""
    leaves = jax.tree_util.tree_flatten_with_path(dict(items))[0]
    floats = {path_name(p): leaf for p, leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)}
    if not floats:
        return ""
    everywhere = replicated(next(iter(floats.values())).sharding.mesh)
    finite = jax.jit(_finite, out_shardings=everywhere)([*floats.values()])
    broken = [name for name, good in zip(floats, np.asarray(finite), strict=True) if not good]
    return f"{broken[0]} has a value that is not finite" if broken else ""


def _finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
