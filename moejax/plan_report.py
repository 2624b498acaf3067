"""What `moejax plan` prints and writes; `plan.py` has the numbers."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moejax.config import AXES, Config
from moejax.describe import bytes_text, output_console, placements
from moejax.foreign import write_json
from moejax.plan import Plan, Traffic, Work, make_plan
from moejax.topology import GPU_FRACTION, Topology
from moejax.traffic import local_tokens


def plan(
    config: Config, topology: Topology, json_path: Path | None, console: Console | None = None
) -> bool:
    """Plans, prints the plan and writes it to `json_path`, if given; returns whether it fits.

    Raises:
        ConfigError: see `make_plan`.
    """
    made = make_plan(config, topology)
    if json_path is not None:
        write_json(json_path, json.dumps(plan_record(made), indent=1))
    show_plan(made, console or output_console())
    return made.fits


def plan_record(made: Plan) -> dict[str, Any]:
    """Returns what `--json` writes; docs/planning.md says what each key means."""
    record: dict[str, Any] = {
        "topology": made.topology.name,
        "chips": made.topology.num_chips,
        "slices": made.topology.slices,
        "devices": made.sizes.num_devices,
        "mesh": {axis: getattr(made.sizes, axis) for axis in AXES},
        "fits": made.fits,
        "memory_limit": made.topology.memory,
        "peak_bytes": made.peak_bytes,
        "argument_bytes": made.argument_bytes,
        "memory": dict(made.memory),
        "worst_rounds": made.rounds,
        "compile_seconds": made.compile_seconds,
    }
    if made.work is None or made.overflow is None:
        return record
    low, high = made.seconds
    return record | {
        **_work_record(made.overflow, made.topology),
        "balanced": _work_record(made.work, made.topology),
        "checks": [dataclasses.asdict(check) for check in made.checks],
        "roofline": made.roofline,
        "bound_by": made.bound_by,
        "step_seconds_low": low,
        "step_seconds_high": high,
        "tokens_per_second_per_chip": made.tokens_per_second(high),
        "tokens_per_second_per_chip_high": made.tokens_per_second(low),
        "mfu_bound": made.mfu_bound,
    }


def _work_record(work: Work, topology: Topology) -> dict[str, Any]:
    return {
        "wire_bytes": work.wire_bytes,
        "wire_bytes_by_kind": _sums(work.traffic, lambda t: t.kind),
        "wire_bytes_by_axis": _sums(work.traffic, lambda t: t.axes),
        "wire_bytes_by_kind_and_axis": _sums(work.traffic, lambda t: f"{t.kind} over {t.axes}"),
        "flops": work.flops,
        "memory_bytes": work.memory_bytes,
        "cycles": work.cycles if topology.chip.is_tpu else None,
    }


def _sums(traffic: Iterable[Traffic], key: Callable[[Traffic], str]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for t in traffic:
        sums[key(t)] = sums.get(key(t), 0.0) + t.sent
    return sums


def show_plan(made: Plan, out: Console) -> None:
    """Prints a plan."""
    for table in (_pod_table(made), _memory_table(made)):
        out.print(table, "")
    if made.work is None:
        out.print(verdict(made))
        return
    for table in (_parts_table(made.work), _traffic_table(made.work), _check_table(made)):
        out.print(table, "")
    out.print(_roofline_table(made), "")
    out.print(_estimate_table(made), "")
    out.print(verdict(made))


def verdict(made: Plan) -> str:
    """Returns in a sentence whether the plan fits, by how much, and if not, what would help."""
    limit = made.topology.memory
    peak, room = bytes_text(made.peak_bytes), bytes_text(limit)
    if made.fits:
        return f"fits: {peak} of {room} a device, {bytes_text(limit - made.peak_bytes)} free"
    over = bytes_text(made.peak_bytes - limit)
    return f"does not fit: {peak} of {room} a device, {over} too much. {remedy(made)}"


def remedy(made: Plan) -> str:
    """Returns what would make a plan smaller, by what it is full of."""
    config, sizes = made.config, made.sizes
    kinds = placements(config, sizes)
    state = sum(row.per_device for rows in kinds.values() for row in rows)
    options = []
    if 2 * state > made.topology.memory:
        fsdp = 2 * (sizes.fsdp or 1)
        options.append(
            f"state and gradients take {bytes_text(state)}: mesh.fsdp={fsdp} halves them, on twice "
            "the devices or in place of mesh.data"
        )
        if config.num_moe_layers and sizes.expert_degree < config.moe.num_experts:
            expert = 2 * (sizes.expert or 1)
            options.append(f"so does mesh.expert={expert}, for the experts")
    local = local_tokens(config, sizes) // config.data.sequence_length
    if config.model.remat != "full":
        options.append("model.remat=full keeps one activation a layer")
    if local > config.moe.group_sequences:
        twice = 2 * config.train.accumulation
        options.append(f"train.accumulation={twice} halves activations and buffers")
    chip = made.topology.chip
    if made.topology.memory < made.peak_bytes <= 0.9 * chip.memory:
        options.append(f"{GPU_FRACTION}=0.9 gives JAX {bytes_text(int(0.9 * chip.memory))}")
    options.append("mesh.tensor splits activations and weights of a layer")
    return "; ".join(options)


def _pod_table(made: Plan) -> Table:
    chip, sizes = made.topology.chip, made.sizes
    table = _table("plan", "", "")
    devices = f"{sizes.num_devices} devices" if sizes.num_devices != made.topology.num_chips else ""
    memory, part = made.topology.memory, made.topology.fraction
    usable = f"{bytes_text(memory)} usable"
    if part < 1:
        usable += f": {part:.0%} of its memory, {GPU_FRACTION}={part:g}"
    slow = ""
    if made.topology.slices > 1 and chip.network is not None:
        slow = f", to other slices {chip.network / 1e9:.3g} GB/s"
    rows = [
        ("pod", f"{made.topology.name}: {made.topology.num_chips} chips {devices}".strip()),
        ("mesh", " x ".join(f"{axis} {getattr(sizes, axis)}" for axis in AXES)),
        ("a device", f"{chip.flops / 1e12:,.0f} TFLOP/s bf16, {usable}"),
        ("", f"memory {chip.bandwidth / 1e9:,.0f} GB/s, a link {chip.link / 1e9:,.0f} GB/s{slow}"),
        ("tokens of a step", f"{made.tokens:,}, {made.tokens // sizes.num_devices:,} a device"),
        ("compiled in", f"{made.compile_seconds:.0f} s"),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _memory_table(made: Plan) -> Table:
    table = _table("memory of a device", "kind", "bytes", "", right=2)
    for kind, count in made.memory.items():
        table.add_row(kind, bytes_text(count), f"{count:,}")
    table.add_section()
    table.add_row("all at once", bytes_text(made.peak_bytes), f"{made.peak_bytes:,}")
    table.add_row("usable", bytes_text(made.topology.memory), "")
    return table


def _parts_table(work: Work) -> Table:
    table = _table(
        "work of a device and step", "place", "pass", "FLOP", "memory", "cycles", right=3
    )
    for part in work.parts[:MOST_ROWS]:
        numbers = (_amount(part.flops), bytes_text(part.memory_bytes), _amount(part.cycles))
        table.add_row(part.place, part.when, *numbers)
    table.add_section()
    total = (_amount(work.flops), bytes_text(work.memory_bytes), _amount(work.cycles))
    table.add_row("all", "", *total)
    return table


def _traffic_table(work: Work) -> Table:
    table = _table(
        "sent by a device in a step",
        *("collective", "mesh axes", "place", "pass", "calls", "bytes", "time"),
        right=3,
    )
    for t in work.traffic[:MOST_ROWS]:
        numbers = (f"{t.calls:,}", bytes_text(t.sent), _amount(t.seconds, "s"))
        table.add_row(t.kind, t.axes, t.place, t.when, *numbers)
    table.add_section()
    calls = f"{sum(t.calls for t in work.traffic):,}"
    total = (calls, bytes_text(work.wire_bytes), _amount(work.link_seconds, "s"))
    table.add_row("all", "", "", "", *total)
    return table


def _check_table(made: Plan) -> Table:
    columns = ("sent by a device in a step", "formula", "compiled", "expected", "ratio")
    table = _table("against the formulas", *columns, right=3)
    for check in made.checks:
        numbers = (bytes_text(check.sent), bytes_text(check.expected))
        table.add_row(check.name, check.formula, *numbers, f"{check.sent / check.expected:.2f}")
    return table


def _roofline_table(made: Plan) -> Table:
    assert made.work is not None
    table = _table("roofline: a step if nothing else limited it", "limit", "time", "")
    amounts = {
        "compute": f"{_amount(made.work.flops, 'FLOP')} at the chip's peak",
        "memory": f"{bytes_text(made.work.memory_bytes)} read and written",
        "links": f"{bytes_text(made.work.wire_bytes)} sent",
    }
    for limit, seconds in made.roofline.items():
        mark = "  <- bound by" if limit == made.bound_by else ""
        table.add_row(limit, _amount(seconds, "s"), amounts[limit] + mark)
    return table


def _estimate_table(made: Plan) -> Table:
    assert made.work is not None
    assert made.overflow is not None
    low, high = made.seconds
    fast, slow = _amount(low, "s"), _amount(high, "s")
    speeds = sorted(made.tokens_per_second(s) for s in (low, high))
    rows = [
        ("step", f"{fast} if all overlaps, {slow} if nothing does"),
        ("tokens/s of a chip", f"{speeds[0]:,.0f} to {speeds[1]:,.0f}"),
        ("MFU", f"at most {made.mfu_bound:.1%}"),
    ]
    if made.rounds > 1:
        clock = made.topology.chip.clock
        more = (made.overflow.flops - made.work.flops) / made.topology.chip.flops
        if clock is not None:
            more = (made.overflow.cycles - made.work.cycles) / clock
        more += made.overflow.link_seconds - made.work.link_seconds
        factor = made.config.moe.buffer_factor
        rows += [
            ("receive buffers", f"{factor:g} times the balanced load; nothing is dropped"),
            ("worst routing", f"{made.rounds} rounds over the same memory"),
            ("a round more in every layer", _amount(more, "s")),
        ]
    table = _table("estimate, from data sheets and the compiler; not measured", "", "")
    for row in rows:
        table.add_row(*row)
    return table


def _amount(value: float, unit: str = "") -> str:
    """Writes a number to three digits with the prefix of its size: 1.67 PFLOP, 42.1 ms."""
    if value == 0:
        return "0"
    power = min(max(math.floor(math.log10(abs(value)) / 3), -3), 5)
    scaled = value / 1000.0**power
    digits = max(0, 2 - math.floor(math.log10(abs(scaled))))
    prefix = ("n", "u", "m", "", "k", "M", "G", "T", "P")[power + 3]
    return f"{scaled:.{digits}f} {prefix}{unit}".rstrip()


MOST_ROWS = 24  # of a table; what is further down is in the total


def _table(title: str, *columns: str, right: int = 0) -> Table:
    """Returns an empty table; the last `right` columns hold numbers."""
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for number, column in enumerate(columns):
        numbers = number >= len(columns) - right
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    return table
