"""The records of a run: their fields, their line of JSON, and how `metrics.jsonl` is read.

A record is one flat dict, one line of JSON. `FIELDS` is its schema; `docs/metrics.md` explains each
field. Nothing here imports JAX: a record holds Python numbers, lists and strings (NumPy scalars and
arrays are converted). `records.py` makes records, `metric_writer.py` writes them.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moejax.workdir import METRICS


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
            record = decode_line(line)
            if record is not None:
                yield record
            elif line.endswith(b"\n"):
                raise ValueError(
                    f"{path} line {number} is not a record (a JSON object with an integer step): "
                    f"{line[:60]!r}; delete that line, or resume the run, which drops it"
                )


def decode_line(line: bytes) -> dict[str, Any] | None:
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
