"""`moejax fsck`: reads all checkpoints of a run and says which are sound. JAX is not imported."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from moejax.config import ConfigError
from moejax.events import EVENTS
from moejax.foreign import MIB, open_file, read_file
from moejax.manifest import Newer, Unsound, list_files
from moejax.progress import printable
from moejax.store import Store, find_run, require_first_start
from moejax.workdir import (
    CHECKPOINTS,
    CONFIG,
    META_FILE,
    METRICS,
    RUN,
    checkpoint_roots,
    read_config,
    read_run,
    require_config_of,
    require_own,
)

SOUND = "sound"
_LINE_BYTES = 64 * MIB  # that a line of metrics or events may have


class Finding(NamedTuple):
    """About one checkpoint or file.

    Attributes:
        path: of the folder or file.
        step: None for what is not a checkpoint.
        verdict: `sound`, or what is wrong.
        bad: whether it makes the exit code 1.
        bytes: that were read.
    """

    path: str
    step: int | None
    verdict: str
    bad: bool = False
    bytes: int = 0


def fsck(workdir: Path, console: Console | None = None) -> list[Finding]:
    """Checks every checkpoint of a run against its manifest, and the files next to them.

    Nothing is changed. Whether values are finite is not looked at: `train` does when it restores.

    Raises:
        ConfigError: `workdir` is no folder of a run.
    """
    require_own(workdir)
    if not (workdir / CHECKPOINTS).is_dir() and not (workdir / CONFIG).is_file():
        raise ConfigError(f"{workdir} is not a workdir; give one that `moejax train` wrote")
    findings = [_config(workdir), *_json_lines(workdir)]
    local = None
    with contextlib.suppress(ConfigError):
        local = read_config(workdir).checkpoint.local
    run = find_run(workdir)
    stores = [Store(root, run) for root in checkpoint_roots(workdir, local, run)]
    findings.append(_run(workdir, stores))
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    total = sum(_size(store, step) for store in stores for step in store.steps())
    with Progress(
        *columns, TransferSpeedColumn(), console=console or Console(stderr=True), transient=True
    ) as progress:
        task = progress.add_task("reading", total=total)
        for store in stores:
            for step in store.steps():
                progress.update(task, description=f"step {step}")
                findings.append(_checkpoint(store, step, lambda n: progress.advance(task, n)))
            findings += _others(store)
    if not findings[0].bad:
        findings[0] = _config_of_checkpoints(workdir, findings)
    return findings


def _size(store: Store, step: int) -> int:
    try:
        return sum(list_files(store.folder(step)).values())
    except Unsound:
        return 0


def _checkpoint(store: Store, step: int, progress: Callable[[int], None]) -> Finding:
    folder = store.folder(step)
    try:
        manifest = store.check(step, progress)
    except Newer as error:  # nothing is wrong with it
        return Finding(str(folder), step, str(error))
    except Unsound as error:
        if step not in store.steps():  # a training that goes on has deleted it
            return Finding(str(folder), step, "deleted while it was read")
        return Finding(str(folder), step, str(error), bad=True)
    return Finding(str(folder), step, SOUND, bytes=manifest.bytes)


def _others(store: Store) -> list[Finding]:
    found = [(step, "of another run; left alone") for step in store.strangers()]
    found += [(step, "unfinished; removed at the next start") for step in store.unfinished()]
    findings = [Finding(str(store.folder(step)), step, verdict) for step, verdict in found]
    return findings + [
        Finding(str(path), None, "set aside as unsound") for path in store.set_aside_ones()
    ]


def _config(workdir: Path) -> Finding:
    file = workdir / CONFIG
    try:
        read_config(workdir)
    except ConfigError as error:
        return Finding(str(file), None, str(error), bad=True)
    if not file.exists():
        verdict = "missing; the checkpoints have the config: resuming the run writes it again"
        return Finding(str(file), None, verdict, bad=True)
    return Finding(str(file), None, SOUND)


def _config_of_checkpoints(workdir: Path, findings: list[Finding]) -> Finding:
    """Holds config.json to the newest sound checkpoint, whose config has a checksum."""
    file, sound = workdir / CONFIG, [f for f in findings if f.step is not None and f.bytes]
    stored = Path(max(sound, key=lambda f: f.step or 0).path) / META_FILE if sound else None
    if stored is None or not stored.is_file():
        return Finding(str(file), None, SOUND)
    try:
        meta = json.loads(read_file(stored, _LINE_BYTES))
        require_config_of(max(f.step or 0 for f in sound), meta.get("config"), read_config(workdir))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return Finding(str(file), None, str(error), bad=True)
    return Finding(str(file), None, SOUND)


def _run(workdir: Path, stores: list[Store]) -> Finding:
    file, verdict = str(workdir / RUN), SOUND
    if read_run(workdir) is None:
        run = find_run(workdir)
        verdict = "missing or damaged" + (f"; the manifests say {run}" if run else "")
    elif not any([*store.steps(), *store.set_aside_ones()] for store in stores):
        try:
            require_first_start(workdir, stores[0])
        except ConfigError as error:
            verdict = str(error)
    return Finding(file, None, verdict, bad=verdict != SOUND)


def _json_lines(workdir: Path) -> list[Finding]:
    findings = []
    for file in (workdir / METRICS, workdir / EVENTS):
        if file.exists():
            verdict = _first_bad_line(file)
            findings.append(Finding(str(file), None, verdict or SOUND, bad=bool(verdict)))
    return findings


def _first_bad_line(file: Path) -> str:
    """Returns which line is no JSON object; one that a crash cut off, the last one or an event, is
    none."""
    try:
        with open_file(file) as stream:
            lines = iter(lambda: stream.readline(_LINE_BYTES), b"")
            for number, line in enumerate(lines, start=1):
                if len(line) == _LINE_BYTES:
                    return f"line {number} is longer than {_LINE_BYTES >> 20} MiB"
                try:
                    if line.endswith(b"\n") and not isinstance(json.loads(line), dict):
                        return f"line {number} is not a JSON object"
                except (ValueError, RecursionError):
                    if file.name != EVENTS or line[:1] != b"{" or line.endswith(b"}\n"):
                        return f"line {number} is not JSON"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return ""


def show_findings(findings: list[Finding], console: Console | None = None) -> None:
    """Prints a row each."""
    table = Table(box=None, pad_edge=False)
    for column in ("step", "size", "verdict", "path"):
        table.add_column(column, overflow="fold", justify="right" if column == "size" else "left")
    for finding in findings:
        step = "" if finding.step is None else str(finding.step)
        size = f"{finding.bytes / 2**20:,.1f} MiB" if finding.bytes else ""
        verdict = f"BAD: {finding.verdict}" if finding.bad else finding.verdict
        table.add_row(step, size, escape(printable(verdict)), escape(printable(finding.path)))
    (console or Console(highlight=False)).print(table)
