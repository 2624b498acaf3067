"""What a run records: the fields of a record, the file `metrics.jsonl`, and TensorBoard events.

A record is one flat dict, one line of JSON. `FIELDS` is its schema; `docs/metrics.md` explains each
field. Nothing here imports JAX: a record holds Python numbers, lists and strings (NumPy scalars and
arrays are converted).
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moejax.config import ConfigError
from moejax.foreign import no_links
from moejax.moe_config import FORCED, MoEConfig
from moejax.workdir import METRICS, TENSORBOARD

DEAD_FRACTION = 0.01  # of the mean load: an expert below it is dead

_log = logging.getLogger("moejax")


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a record: its unit, its shape, and whether train and eval records hold it."""

    name: str
    unit: str
    shape: (
        str  # "scalar", "layers" (one a MoE layer), "layers x experts", "domains", "terms", "names"
    )
    splits: tuple[str, ...] = ("train", "eval")


_TRAIN, _EVAL = ("train",), ("eval",)
FIELDS = {
    field.name: field
    for field in (
        Field("step", "steps", "scalar"),
        Field("split", "train or eval", "scalar"),
        Field("loss", "nats per token", "scalar"),
        Field("total_loss", "nats per token", "scalar"),
        Field("balance_loss", "1 per layer at balance", "scalar"),
        Field("router_z_loss", "squared nats", "scalar"),
        Field("router_losses", "see below", "terms"),
        Field("grad_norm", "nats", "scalar", _TRAIN),
        Field("learning_rate", "1", "scalar", _TRAIN),
        Field("tokens", "tokens", "scalar"),
        Field("tokens_seen", "tokens", "scalar"),
        Field("routed_seen", "assignments", "scalar"),
        Field("dropped_seen", "assignments", "scalar"),
        Field("skipped_updates", "steps", "scalar"),
        Field("corrupt_sequences", "sequences", "scalar"),
        Field("tokens_per_second", "tokens per second", "scalar"),
        Field("step_seconds", "seconds", "scalar", _TRAIN),
        Field("mfu", "fraction", "scalar", _TRAIN),
        Field("goodput", "fraction", "scalar", _TRAIN),
        Field("host_seconds_least", "seconds", "scalar", _TRAIN),
        Field("host_seconds_most", "seconds", "scalar", _TRAIN),
        Field("slowest_process", "process", "scalar", _TRAIN),
        Field("routed", "assignments", "scalar"),
        Field("dropped", "assignments", "scalar"),
        Field("padding", "positions", "scalar"),
        Field("drop_fraction", "fraction", "scalar"),
        Field("expert_load", "fraction", "layers x experts"),
        Field("max_violation", "1", "layers"),
        Field("router_entropy", "nats", "layers"),
        Field("dead_experts", "experts", "layers"),
        Field("overflow_rounds", "rounds", "layers"),
        Field("forced_routing", "router", "scalar"),
        Field("router_bias", "score", "layers x experts", _TRAIN),
        Field("router_bias_norm", "score", "layers", _TRAIN),
        Field("router_threshold", "score", "layers x experts", _TRAIN),
        Field("l1_coefficient", "1", "scalar", _TRAIN),
        Field("bits_per_byte", "bits per byte", "scalar", _EVAL),
        Field("perplexity", "1", "scalar", _EVAL),
        Field("bytes", "bytes", "scalar", _EVAL),
        Field("seconds", "seconds", "scalar", _EVAL),
        Field("compile_seconds", "seconds", "scalar", _EVAL),
        Field("peak_memory_bytes", "bytes", "scalar", _EVAL),
        Field("capacity_factor", "1", "scalar", _EVAL),
        Field("loss_at_capacity", "nats per token", "scalar", _EVAL),
        Field("drop_fraction_at_capacity", "fraction", "scalar", _EVAL),
        Field("domains", "see below", "domains", _EVAL),
        Field("nonfinite", "see below", "names"),
    )
}
DOMAIN_FIELDS = ("loss", "perplexity", "bits_per_byte", "tokens", "bytes")


def layer_summary(counts_le: np.ndarray) -> dict[str, list]:
    """Returns the fields of a record that follow from how many assignments each expert received.

    Args:
        counts_le: [L, E] counts before any drop, one row a MoE layer.

    Returns:
        `expert_load` [L][E], fractions of a layer's assignments; `max_violation` [L], largest load
        over mean load, minus 1 (MaxVio, arXiv:2408.15664); `dead_experts` [L], experts below 1% of
        the mean load. A layer without a single assignment has load 0, violation 0 and no dead
        expert: nothing was measured.

    Raises:
        ValueError: the counts are not such a table.
    """
    counts_le = np.asarray(counts_le, dtype=np.float64)
    if (
        counts_le.ndim != 2
        or not counts_le.size
        or not np.isfinite(counts_le).all()
        or counts_le.min() < 0
    ):
        raise ValueError(
            f"counts of shape {counts_le.shape} are not finite, non-negative [layers, experts]; "
            "give one row for each MoE layer"
        )
    mean_l1 = counts_le.mean(axis=1, keepdims=True)
    safe_l1 = np.where(mean_l1 > 0, mean_l1, 1.0)
    relative_le = counts_le / safe_l1
    violation_l = np.where(mean_l1[:, 0] > 0, relative_le.max(axis=1) - 1.0, 0.0)
    dead_l = (counts_le < DEAD_FRACTION * mean_l1).sum(axis=1)
    return {
        "expert_load": (relative_le / counts_le.shape[1]).tolist(),
        "max_violation": violation_l.tolist(),
        "dead_experts": dead_l.tolist(),
    }


def host_record(seconds: Mapping[int, float]) -> dict[str, Any]:
    """Returns the fields of a record that say how long hosts hold up a step; none for one process.

    Args:
        seconds: of each process, what it did in a step besides waiting for devices.
    """
    if len(seconds) < 2:
        return {}
    slowest = max(seconds, key=lambda process: seconds[process])
    return {
        "host_seconds_least": min(seconds.values()),
        "host_seconds_most": seconds[slowest],
        "slowest_process": slowest,
    }


def encode_record(record: Mapping[str, Any]) -> str:
    """Returns a record as one line of strict JSON, without its newline.

    Floats are written so that they read back exactly; equal values print equal. JSON has no NaN or
    infinity: such a value is written as null, and `nonfinite` maps its name ("loss",
    "max_violation/3") to "nan", "inf" or "-inf". A null that is not listed there was unknown
    (`mfu`) or off.

    Raises:
        ValueError: a field is not in `FIELDS`, or `step` or `split` is missing or wrong.
    """
    return json.dumps(plain_record(record), allow_nan=False)


def plain_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `encode_record` writes, as JSON's own kinds; raises as it does."""
    _check_record(record)
    nonfinite: dict[str, str] = {}
    plain = {name: _plain(value, name, nonfinite) for name, value in record.items()}
    if nonfinite:
        plain["nonfinite"] = nonfinite
    return plain


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """Returns the records of a run, oldest first; empty when it has written none.

    A last line without its newline is being written, or was torn by a crash: it is left out.

    Raises:
        ValueError: another line is not a record.
    """
    return list(iterate_metrics(workdir))


def iterate_metrics(workdir: str | Path) -> Iterator[dict[str, Any]]:
    """Yields the records of `read_metrics` one at a time: those of a wide model fill memory."""
    path = Path(workdir) / METRICS
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            record = _decode_line(line)
            if record is not None:
                yield record
            elif line.endswith(b"\n"):
                raise ValueError(
                    f"{path} line {number} is not a record (a JSON object with an integer step): "
                    f"{line[:60]!r}; delete that line, or resume the run, which drops it"
                )


def board_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns every number of a record by its name on a board: `train/max_violation/layer_03`."""
    plain = json.loads(encode_record(record))
    return {f"{plain['split']}/{tag}": value for tag, value in _scalars(plain)}


class Board(Protocol):
    """Shows records somewhere else, and raises nothing."""

    def write(self, record: Mapping[str, Any]) -> None: ...


class MetricWriter:
    """Writes records to `workdir/metrics.jsonl` and to TensorBoard events in `workdir/tensorboard`.

    Opening it for a run that starts at `start_step` (0, or the step of the checkpoint that it
    resumes from) drops the lines of later steps and a torn last line, in one atomic replacement, so
    that each step appears once.

    A run is worth more than its log. If a write fails later (disk full, file server away), that is
    logged once; lines are kept in memory and written when the file takes them again. TensorBoard is
    switched off by its first failure.

    Args:
        workdir: folder of the run, made if missing.
        start_step: last step that is already done.
        enabled: False on every process but the first: nothing is opened or written.
        image_every: TensorBoard gets an image of the expert load at each evaluation and at each
            n-th train record.
        boards: that get every record too; they are neither opened nor closed here.

    Raises:
        ConfigError: the workdir cannot be written.
    """

    def __init__(
        self,
        workdir: str | Path,
        start_step: int,
        enabled: bool = True,
        *,
        image_every: int = 10,
        boards: Sequence[Board] = (),
    ):
        self._boards = boards
        self._lines: _LineFile | None = None
        self._board: _TensorBoard | None = None
        if not enabled:
            return
        workdir = Path(workdir)
        path = workdir / METRICS
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            _drop_lines_after(path, start_step)
            self._lines = _LineFile(path)
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written: {error.strerror or error}; give another --workdir"
            ) from error
        self._board = _TensorBoard(workdir / TENSORBOARD, start_step, image_every)

    @property
    def files(self) -> list[Path]:
        """What this writer writes: the metrics file, and the folder of TensorBoard events."""
        folders = [] if self._board is None else [self._board.folder]
        return ([] if self._lines is None else [self._lines.path]) + folders

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes a record; it is in the file when this returns. Raises as `encode_record` does."""
        line = encode_record(record)
        if self._lines is not None:
            self._lines.append(line)
        if self._board is not None:
            self._board.write(json.loads(line))
        for board in self._boards:
            board.write(record)

    def write_text(self, name: str, text: str) -> None:
        """Shows a text, such as the resolved config, under TensorBoard's Text tab."""
        if self._board is not None:
            self._board.write_text(name, text)

    def close(self) -> None:
        """Writes what is left and closes the files. Closing twice is harmless."""
        if self._lines is not None:
            self._lines.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _check_record(record: Mapping[str, Any]) -> None:
    unknown = sorted(set(record) - set(FIELDS))
    if unknown:
        raise ValueError(
            f"record has unknown fields {unknown}; known are {sorted(FIELDS)}; a new one needs an "
            "entry in moejax.metrics.FIELDS and a row in docs/metrics.md"
        )
    step, split = record.get("step"), record.get("split")
    if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or step < 0:
        raise ValueError(f"record has step={step!r}; it must be a whole number of at least 0")
    if split not in ("train", "eval"):
        raise ValueError(f"record of step {step} has split={split!r}; it must be 'train' or 'eval'")
    misplaced = sorted(name for name in record if split not in FIELDS[name].splits)
    if misplaced:
        raise ValueError(
            f"{split} record of step {step} has {misplaced}, which the other split holds"
        )


def _plain(value: Any, name: str, nonfinite: dict[str, str]) -> Any:
    """Turns a value into what JSON holds, noting where it was not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}/{key}", nonfinite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{name}/{index}", nonfinite) for index, item in enumerate(value)]
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return _plain(value.tolist(), name, nonfinite)
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite[name] = str(value)
        return None
    return value


def _decode_line(line: bytes) -> dict[str, Any] | None:
    """Returns the record on a whole line, None when there is none."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(record, dict) and isinstance(record.get("step"), int):
        return record
    return None


def _drop_lines_after(path: Path, step: int) -> None:
    """Keeps the lines up to `step`, none when it is 0, and drops what is not a record."""
    if not path.exists():
        return
    before = path.read_bytes()
    kept, unreadable = [], 0
    for line in before.splitlines(keepends=True):
        record = _decode_line(line)
        if record is None:
            unreadable += 1
        elif step > 0 and record["step"] <= step:
            kept.append(line)
    if unreadable:
        _log.warning("%s: dropped %d torn or unreadable lines", path, unreadable)
    after = b"".join(kept)
    if after != before:
        _replace_atomically(path, after)


def _replace_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "wb", opener=no_links) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class _LineFile:
    """Appends lines to a file, whole or not at all, and holds back what the file does not take."""

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115, closed by close()
        self._size = self._file.seek(0, os.SEEK_END)
        self._waiting: list[bytes] = []
        self._warned = False

    def append(self, line: str) -> None:
        self._waiting.append(line.encode() + b"\n")
        self._write_waiting()

    def close(self) -> None:
        if self._file.closed:
            return
        self._write_waiting()
        if self._waiting:
            _log.warning("%s: %d records could not be written", self.path, len(self._waiting))
        self._file.close()

    def _write_waiting(self) -> None:
        if not self._waiting:
            return
        block = b"".join(self._waiting)
        try:
            written = self._file.write(block)
            if written != len(block):
                raise OSError(f"only {written} of {len(block)} bytes were taken")
        except OSError as error:
            self._undo(error)
            return
        self._size += len(block)
        self._waiting.clear()

    def _undo(self, error: OSError) -> None:
        """Takes back half a line, so that the file stays readable."""
        if not self._warned:
            self._warned = True
            _log.warning(
                "cannot write %s (%s); training goes on, lines are kept in memory", self.path, error
            )
        with contextlib.suppress(OSError):  # if this fails too, the next resume drops the torn line
            self._file.truncate(self._size)


class _TensorBoard:
    """Writes records as TensorBoard events; its first failure switches it off.

    Events are written in this thread. tensorboardX's `SummaryWriter` hands them to another thread
    through a bounded queue: when that one dies (disk full), the trainer waits on it for ever.
    """

    def __init__(self, folder: Path, start_step: int, image_every: int):
        self.folder = folder
        self._image_every = image_every
        self._train_records = 0
        self._writer: Any = None
        self._attempt(self._open, start_step)

    def write(self, record: dict[str, Any]) -> None:
        if self._writer is not None:
            self._attempt(self._write_record, record)

    def write_text(self, name: str, text: str) -> None:
        if self._writer is not None:
            self._attempt(self._write_text, name, text)

    def close(self) -> None:
        if self._writer is not None:
            self._attempt(self._writer.close)
            self._writer = None

    def _attempt(self, function, *args) -> None:
        try:
            function(*args)
        except Exception as error:  # of any kind: a display must never end a training
            _log.warning("TensorBoard events in %s are off from here on: %r", self.folder, error)
            with contextlib.suppress(Exception):
                self._writer.close()
            self._writer = None

    def _open(self, start_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(self.folder / "events"), f".{os.getpid()}.{start_step}")
        if start_step:  # TensorBoard then forgets what an earlier process wrote from this step on
            protos = _protos()
            restart = protos.SessionLog(status=protos.SessionLog.START)
            self._writer.write_event(protos.Event(step=start_step + 1, session_log=restart))
        self._writer.flush()

    def _write_record(self, record: dict[str, Any]) -> None:
        from tensorboardX import summary

        split = record["split"]
        event = _protos().Event(wall_time=time.time(), step=record["step"])
        for tag, value in _scalars(record):
            event.summary.value.add(tag=f"{split}/{tag}", simple_value=value)
        due = split == "eval" or self._train_records % self._image_every == 0
        self._train_records += split == "train"
        for name, image in _images(record) if due else ():
            event.summary.MergeFrom(summary.image(f"{split}/{name}", image, dataformats="HWC"))
        self._write_event(event)

    def _write_text(self, name: str, text: str) -> None:
        from tensorboardX import summary

        content = summary.text(name, text)
        self._write_event(_protos().Event(wall_time=time.time(), step=0, summary=content))

    def _write_event(self, event: Any) -> None:
        self._writer.write_event(event)
        self._writer.flush()


def _protos() -> Any:
    """The message types of event files; protobuf makes their names when the module is imported."""
    from tensorboardX.proto import event_pb2

    return event_pb2


def _scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields (tag, value) for every number of a record, one a layer where a field has layers."""
    for name, value in record.items():
        shape = FIELDS[name].shape
        if name == "step" or value is None or isinstance(value, str):
            continue
        if shape == "scalar":
            yield name, value
        elif shape == "layers":
            for layer, item in enumerate(value):
                if item is not None:
                    yield f"{name}/layer_{layer:02d}", item
        elif shape == "terms":
            for term, items in value.items():
                for layer, item in enumerate(items):
                    if item is not None:
                        yield f"{name}/{term}/layer_{layer:02d}", item
        elif shape == "domains":
            for domain, fields in value.items():
                for field, item in fields.items():
                    if item is not None:
                        yield f"{name}/{domain}/{field}", item


def _images(record: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, image) for the fields of a record that have a cell a layer and expert."""
    if load := record.get("expert_load"):
        yield "expert_load", load_image(load)
    if bias := record.get("router_bias"):
        bias_le = table(bias)
        largest = np.nanmax(np.abs(bias_le), initial=1e-12)
        yield "router_bias", cell_image(1 + bias_le / largest)


def load_image(load_le: list[list[float | None]]) -> np.ndarray:
    """Returns expert load as an image: white is the balanced load 1/E, full red twice that."""
    return cell_image(relative_load(load_le))


def table(rows_le: Sequence[Sequence[float | None]]) -> np.ndarray:
    """Returns float64 [L, E] of the largest E; NaN for null and behind a shorter row."""
    table_le = np.full((len(rows_le), max(map(len, rows_le))), np.nan)
    for row_e, values in zip(table_le, rows_le, strict=True):
        row_e[: len(values)] = np.asarray(values, dtype=np.float64)  # null becomes NaN
    return table_le


def relative_load(load_le: Sequence[Sequence[float | None]]) -> np.ndarray:
    """Returns load over balanced load, 1 / E of the layer's own E, as a `table`."""
    experts_l1 = np.array([[len(row)] for row in load_le])
    return table(load_le) * experts_l1


def cell_image(relative_le: np.ndarray, *, pixels: int = 512) -> np.ndarray:
    """Returns values as an image [height, width, 3] of uint8: layers down, experts across.

    White is 1, red more (full at 2), blue less (full at 0), grey not known, or behind a layer's
    experts. A cell is whole pixels, so that the image of a wide model stays sharp.
    """
    layers, experts = relative_le.shape
    stops = [0.0, 0.5, 1.0, 1.5, 2.0]
    channels = (  # from blue over white to red
        [33, 146, 247, 244, 178],
        [102, 197, 247, 165, 24],
        [172, 222, 247, 130, 43],
    )
    image_lec = np.stack([np.interp(relative_le, stops, channel) for channel in channels], axis=-1)
    image_lec = np.where(np.isnan(image_lec), 128, image_lec).round().astype(np.uint8)
    cell_height, cell_width = (max(4, min(32, pixels // size)) for size in (layers, experts))
    return image_lec.repeat(cell_height, axis=0).repeat(cell_width, axis=1)


def routing_record(stats: Any, positions: int, tokens: int, moe: MoEConfig) -> dict[str, Any]:
    """Returns the routing fields of a record.

    Args:
        stats: `RouterStats` of NumPy arrays [layers, ...]; None for a dense model, whose lists are
            empty.
        positions: of the batch, padding included.
        tokens: real tokens among them.
    """
    record: dict[str, Any] = {"routed": 0, "dropped": 0, "padding": positions - tokens}
    if stats is None:
        lists = ("expert_load", "max_violation", "router_entropy", "dead_experts")
        return record | {"drop_fraction": 0.0} | {n: [] for n in (*lists, "overflow_rounds")}
    record["routed"] = int(stats.count_e.sum(dtype=np.int64))
    record["dropped"] = int(stats.dropped_e.sum(dtype=np.int64))
    record["drop_fraction"] = record["dropped"] / max(record["routed"], 1)
    entropy_l = np.asarray(stats.entropy, np.float64) / np.maximum(stats.tokens, 1)
    record |= {
        "router_entropy": entropy_l.tolist(),
        "overflow_rounds": np.asarray(stats.overflow_rounds).tolist(),
    }
    if moe.router in FORCED:
        record["forced_routing"] = moe.router  # loud: nothing is learned about routing
    return record | _layer_summaries(stats.count_e, moe)


def _by_layer(table_le: Any, moe: MoEConfig) -> list[np.ndarray]:
    """Returns the rows of a table, each as wide as the layer has experts, by stacks of layers."""
    return [
        table_le[stack.start : stack.stop, : stack.config.choices]
        for stack in moe.stacks(len(table_le))
    ]


def _layer_summaries(count_le: np.ndarray, moe: MoEConfig) -> dict[str, list]:
    """Returns `layer_summary` of all layers, each over its own experts."""
    summaries = [layer_summary(part_le) for part_le in _by_layer(count_le, moe)]
    return {name: [row for s in summaries for row in s[name]] for name in summaries[0]}


def loss_record(terms: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of auxiliary losses: [L] each, without weight; the two usual ones summed.

    Args:
        terms: float [L] by name; empty for a dense model.
    """
    by_layer = {name: np.asarray(value_l, np.float64).tolist() for name, value_l in terms.items()}
    return {
        "balance_loss": float(sum(by_layer.get("balance", []))),
        "router_z_loss": float(sum(by_layer.get("z", []))),
        "router_losses": by_layer,
    }


def state_record(state: Mapping[str, Any], moe: MoEConfig) -> dict[str, Any]:
    """Returns the fields of the router state after a step; none for routers that keep none."""

    def rows(name: str) -> list[list[float]]:
        parts = _by_layer(np.asarray(state[name], np.float64), moe)
        return [row for part_le in parts for row in part_le.tolist()]

    record: dict[str, Any] = {}
    if "bias" in state:
        record["router_bias"] = rows("bias")
        record["router_bias_norm"] = [float(np.linalg.norm(row)) for row in rows("bias")]
    if "threshold" in state:
        record["router_threshold"] = rows("threshold")
    if "l1" in state:
        record["l1_coefficient"] = float(np.mean(state["l1"]))
    return record
