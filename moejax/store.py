"""A folder of checkpoints: which are there, which are sound, which go. JAX is not imported.

Everything that deletes or renames a checkpoint is here. Only what this run is known to have written
is touched: a folder with its manifest, or one that stands in `.unfinished`, the list of the folders
that are being written or deleted. What Orbax finished and no sound manifest says the owner of is
renamed, never deleted. Anything else in the folder belongs to somebody else.
"""

import contextlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moejax.errors import FULL, ConfigError, StorageError, file_error
from moejax.events import EVENTS, read_events
from moejax.foreign import has_link, read_file, write_atomically
from moejax.manifest import (
    MANIFEST,
    Manifest,
    Table,
    Unsound,
    check_files,
    read_manifest,
    sync_folder,
    write_manifest,
)
from moejax.workdir import (
    CHECKPOINTS,
    RUN,
    committed_steps,
    read_run,
    steps_with,
)

UNFINISHED = ".unfinished"  # in a folder of checkpoints: a file a step, which holds the run's id
CORRUPT = "corrupt"  # N.corrupt is the checkpoint N that was found unsound
_TRIES = 4  # to remove a folder: where one item's save failed, Orbax may still write another


def find_run(workdir: Path) -> str | None:
    """Returns the id of the run of a workdir; None before its first start.

    Where `run.json` is lost, the manifests tell.

    Raises:
        ConfigError: they are of several runs.
    """
    run = read_run(workdir)
    if run is not None:
        return run
    root, runs = workdir / CHECKPOINTS, set()
    for step in committed_steps(root):
        with contextlib.suppress(Unsound):
            runs.add(read_manifest(root / str(step)).run)
    if len(runs) > 1:
        raise ConfigError(
            f"{root} has checkpoints of {len(runs)} runs ({', '.join(sorted(runs))}) and "
            f"{workdir / RUN} does not say which is its own; move those of the others away"
        )
    return runs.pop() if runs else None


def start_run(workdir: Path) -> str:
    """Returns the id of the run, which its first start draws."""
    run = find_run(workdir)
    if run is None or read_run(workdir) is None:
        run = run or secrets.token_hex(8)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            write_atomically(workdir / RUN, json.dumps({"run": run, "started": started}) + "\n")
        except OSError as error:
            raise file_error(
                f"{workdir / RUN} cannot be written: {error.strerror}; make room, or give another "
                "--workdir",
                error,
            ) from None
    return run


def require_first_start(workdir: Path, store: "Store") -> None:
    """Checks that a run without a checkpoint never had one, before it begins at step 0.

    Args:
        store: of the workdir; what a local disk had may be lost with its host.

    Raises:
        ConfigError: there are only those of other runs, or events tell of one that is gone.
    """
    others = store.strangers()
    if others:
        steps = ", ".join(map(str, others[:10]))
        raise ConfigError(
            f"{store.root} has checkpoints of another run only (steps {steps}) than the one that "
            f"{workdir / RUN} names; if that file was damaged or replaced, delete it: the "
            "checkpoints know whose they are; else move them away, or give another --workdir"
        )
    saved = [
        event["step"]
        for event in read_events(workdir)
        if event.get("kind") == "checkpoint_saved"
        and Path(str(event.get("folder"))).parent.name == store.root.name
        and isinstance(event.get("step"), int)
    ]
    if saved:
        raise ConfigError(
            f"{store.root} has no checkpoint, and {workdir / EVENTS} tells of those of this run, "
            f"the last of step {saved[-1]}; bring the folder back, or give another --workdir to "
            "begin anew"
        )


class Store:
    """The checkpoints of one run in one folder.

    Args:
        root: the folder, which may be missing.
        run: the id of the run; None for a run that has none yet.
    """

    def __init__(self, root: Path, run: str | None):
        self.root, self._run = root, run

    def folder(self, step: int) -> Path:
        return self.root / str(step)

    def open(self) -> None:
        """Makes the folder.

        Raises:
            ConfigError: it cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise file_error(
                f"checkpoints cannot be written to {self.root}: {error.strerror or error}; give a "
                "folder that this process may write, by --workdir or checkpoint.local",
                error,
            ) from None
        if has_link(self.root, (UNFINISHED,), folders=True):
            raise ConfigError(
                f"{self.root / UNFINISHED} is a link or no folder: a run writes nothing outside of "
                "its folder; remove it"
            )

    # What is there

    def steps(self) -> list[int]:
        """The steps that have a checkpoint of this run, sound or not, in order."""
        committed = committed_steps(self.root)
        # damage may have taken Orbax's marker; then only a manifest that fits says whose it is
        unmarked = {*steps_with(self.root, MANIFEST)} - {*committed}
        found = [step for step in committed if self._is_ours(step)]
        unmarked = [step for step in unmarked if self._owner(step) == (self._run or "")]
        return sorted(found + unmarked)

    def strangers(self) -> list[int]:
        """The steps that have a checkpoint of another run."""
        ours = {*self.steps(), *self.unfinished()}
        return [step for step in committed_steps(self.root) if step not in ours]

    def set_aside_ones(self) -> list[Path]:
        """The checkpoints that were found unsound."""
        found = self.root.glob(f"*.{CORRUPT}*")
        return sorted(path for path in found if path.name.split(".")[0].isdecimal())

    def _is_ours(self, step: int) -> bool:
        if not (self.folder(step) / MANIFEST).exists():
            return step not in self.unfinished()
        return self._owner(step) in (self._run, None)  # None: it is told so when somebody asks

    def _owner(self, step: int) -> str | None:
        """Returns the run that a manifest names; None where it is damaged or cannot be read now."""
        try:
            return read_manifest(self.folder(step)).run
        except (Unsound, StorageError):
            return None

    def manifest(self, step: int) -> Manifest:
        """Returns the manifest of a step.

        Raises:
            Unsound: there is none that fits.
        """
        manifest = read_manifest(self.folder(step))
        if manifest.step != step:
            raise Unsound(f"its {MANIFEST} is of step {manifest.step}")
        if manifest.run != self._run:
            raise Unsound(f"it was written by another run, {manifest.run}")
        return manifest

    def check(self, step: int, progress: Callable[[int], None] | None = None) -> Manifest:
        """Reads all of a checkpoint and returns its manifest.

        Raises:
            Unsound: why it must not be used.
        """
        manifest = self.manifest(step)
        check_files(self.folder(step), manifest, progress)
        return manifest

    # Writing

    def begin(self, step: int) -> Path:
        """Notes that a checkpoint is being written and returns its folder, which is not there yet.

        Raises:
            OSError: of the file system, or the folder is there.
        """
        folder = self.folder(step)
        if os.path.lexists(folder):
            raise FileExistsError(17, "there is already something of that name", str(folder))
        self._note(step)
        return folder

    def seal(
        self,
        step: int,
        tables: Mapping[str, Table],
        metrics: Mapping[str, float],
        about: Mapping[str, Any],
    ) -> Manifest:
        """Makes what Orbax has written a checkpoint.

        Raises:
            OSError, Unsound: as `write_manifest`.
        """
        assert self._run is not None
        manifest = write_manifest(self.folder(step), self._run, step, tables, metrics, about)
        self._strike(step)
        return manifest

    def _note(self, step: int) -> None:
        (self.root / UNFINISHED).mkdir(parents=True, exist_ok=True)
        # under another name first: one that is there may be a link, or a pipe
        write_atomically(self.root / UNFINISHED / str(step), self._run or "")
        sync_folder(self.root / UNFINISHED)

    def _strike(self, step: int) -> None:
        with contextlib.suppress(OSError):  # a note too many is harmless: the next start strikes it
            (self.root / UNFINISHED / str(step)).unlink()

    def unfinished(self) -> list[int]:
        """The steps that this run was writing or deleting when it ended."""
        found = []
        for note in (self.root / UNFINISHED).glob("*"):
            with contextlib.suppress(OSError, ValueError):
                if note.name.isdecimal() and read_file(note, 100).decode() == self._run:
                    found.append(int(note.name))
        return sorted(found)

    # Removing

    def sweep(self) -> list[int]:
        """Removes what saves and deletions that did not end have left; returns their steps."""
        removed = []
        for step in self.unfinished():
            if (self.folder(step) / MANIFEST).exists():
                self._strike(step)
            elif self.clear(step):
                removed.append(step)
        return removed

    def clear(self, step: int) -> bool:
        """Removes what an unfinished save has left, as far as it can; says if there was any."""
        folder = self.folder(step)
        there = folder.is_dir() and not folder.is_symlink()
        try:  # at no moment is a part of it a checkpoint
            if there:
                (folder / MANIFEST).unlink(missing_ok=True)
        except OSError:
            return there
        for tried in range(_TRIES if there else 0):
            time.sleep(0.1 * tried)
            shutil.rmtree(folder, ignore_errors=True)
            if not os.path.lexists(folder):
                break
        if not os.path.lexists(folder):
            self._strike(step)
        return there

    def delete(self, step: int) -> None:
        """Deletes a checkpoint.

        Raises:
            OSError: it cannot be, and nothing of it was.
        """
        try:
            self._note(step)
        except OSError as error:
            if error.errno not in FULL:
                raise  # without room for a note only this makes some
        (self.folder(step) / MANIFEST).unlink(missing_ok=True)
        self.clear(step)

    def retain(self, keep: int) -> list[int]:
        """Deletes all but the last `keep` checkpoints and the best by validation loss.

        Only checkpoints with a manifest count, and only they are deleted.
        """
        losses: dict[int, float | None] = {}
        for step in self.steps():
            with contextlib.suppress(Unsound, StorageError):
                losses[step] = self.manifest(step).metrics.get("loss")
        known = {step: loss for step, loss in losses.items() if loss is not None}
        kept = {*sorted(losses)[-keep:]}
        if known:
            kept.add(min(known, key=lambda step: (known[step], -step)))
        deleted = [step for step in losses if step not in kept]
        for step in deleted:
            self.delete(step)
        return deleted

    def set_aside(self, step: int) -> Path:
        """Renames an unsound checkpoint, so that nothing takes it for one; returns its new name."""
        names = (f"{step}.{CORRUPT}{f'.{n}' if n else ''}" for n in range(1000))
        target = next(self.root / n for n in names if not os.path.lexists(self.root / n))
        os.rename(self.folder(step), target)
        sync_folder(self.root)
        return target
