"""What records are made of: fields from the sums of a step, and their tables as arrays. No JAX.

`metrics.FIELDS` has the unit and the shape of each field.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moejax.moe_config import FORCED, MoEConfig

DEAD_FRACTION = 0.01  # of the mean load: an expert below it is dead


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
