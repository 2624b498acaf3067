"""`moejax describe`: what a config costs and where its arrays live, on a mesh of any size.

Shapes and shardings are those of `state.abstract_state` on an abstract mesh: no device is made, so
that a laptop can describe a pod.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moejax.config import AXES, EXPERT_AXES, Config, MeshConfig
from moejax.flops import (
    active_counts,
    active_experts,
    active_parameters,
    attention_products,
    flops_per_token,
    parameter_counts,
    total_parameters,
)
from moejax.moe_config import MoEConfig, Stack
from moejax.optim import make_optimizer
from moejax.parameters import AXES_OF, kind_of, moe_parameters
from moejax.sharding import gathered_axes, path_name
from moejax.state import abstract_state
from moejax.traffic import (
    FORMULAS,
    TRANSPORTS,
    buffer_rows,
    exchange_bytes,
    formula,
    group_tokens,
    itemsize,
    local_tokens,
    slots,
)

PLAIN_WIDTH = 160  # columns where there is no terminal


@dataclasses.dataclass(frozen=True)
class Placement:
    """An array of the state: its mesh axes, and its bytes, counted once and on one device."""

    name: str
    shape: tuple[int, ...]
    spec: P
    total: int
    per_device: int


def describe(config: Config, num_devices: int | None, console: Console | None = None) -> None:
    """Prints parameters, FLOPs, mesh, tokens, MoE layers, memory and the sharding table.

    Args:
        config: what to describe; it is not run.
        num_devices: that the mesh is laid on; None takes what the mesh asks for.
        console: where to; standard output unless told.

    Raises:
        ConfigError: the mesh does not fit the devices, the model or the batch.
    """
    sizes = resolve_mesh(config, num_devices)
    kinds = placements(config, sizes)
    out = console or output_console()
    _print(out, _parameter_table(config))
    _print(out, _facts("compute", _compute_facts(config, sizes)))
    _print(out, _facts("mesh", _mesh_facts(config, sizes)))
    if config.num_moe_layers:
        _print(out, _facts("MoE layers", _moe_facts(config, sizes)))
        _print(out, _transport_table(config, sizes))
    _print(out, _memory_table(config, sizes, kinds))
    _print(out, _sharding_table(kinds["parameters"]))


# Numbers


def resolve_mesh(config: Config, num_devices: int | None) -> MeshConfig:
    """Returns the mesh with every size known; without `num_devices` a free axis has size 1.

    Raises:
        ConfigError: the mesh does not fit the devices, the model or the batch.
    """
    if num_devices is None:
        known = [getattr(config.mesh, axis) for axis in AXES]
        num_devices = math.prod(size for size in known if size is not None)
    sizes = config.mesh.resolve(num_devices)
    config.check_mesh(sizes)
    return sizes


def placements(config: Config, sizes: MeshConfig) -> dict[str, list[Placement]]:
    """Returns the arrays of a training by kind, from the shardings that training uses.

    Gradients are not in the state; a step gives them the shapes and shardings of the parameters.
    Those of the layers' matrices have the compute dtype, where no microbatches are added up.
    """
    shape = tuple(getattr(sizes, axis) for axis in AXES)
    mesh = AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    optimizer = make_optimizer(config.optim, config.train.steps)
    state = abstract_state(config, mesh, optimizer)
    parameters = _place(state.params)
    return {
        "parameters": parameters,
        "gradients": [_gradient(config, row) for row in parameters],
        "optimizer state": _place(state.opt_state),
        "router state": _place(state.router_state),
        "step and rng": _place({"step": state.step, "rng": state.rng}),
    }


def _gradient(config: Config, row: Placement) -> Placement:
    if config.train.accumulation > 1 or not is_layer_matrix(row):
        return row
    narrow, wide = itemsize(config), jnp.dtype(config.model.param_dtype).itemsize
    total, per_device = (size * narrow // wide for size in (row.total, row.per_device))
    return dataclasses.replace(row, total=total, per_device=per_device)


def is_layer_matrix(row: Placement) -> bool:
    """Whether a parameter is one that a loop over layers takes in the compute dtype."""
    return row.name.startswith(("prefix", "runs")) and bool(gathered_axes(row.spec))


def _place(tree: Any) -> list[Placement]:
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        local = leaf.sharding.shard_shape(leaf.shape)
        width = leaf.dtype.itemsize
        total, per_device = math.prod(leaf.shape) * width, math.prod(local) * width
        rows.append(Placement(path_name(path), leaf.shape, leaf.sharding.spec, total, per_device))
    return rows


def local_shape(shape: tuple[int, ...], spec: P, sizes: MeshConfig) -> tuple[int, ...]:
    """Returns the shape of one device's part of an array."""
    axes = [*spec, *(None,) * (len(shape) - len(spec))]
    parts = [(axis,) if isinstance(axis, str) else axis or () for axis in axes]
    counts = (math.prod(getattr(sizes, name) for name in names) for names in parts)
    return tuple(size // count for size, count in zip(shape, counts, strict=True))


def layer_kinds(config: Config) -> list[str]:
    """Returns "dense" or "MoE" for each layer."""
    every, first = config.moe.every, config.moe.first_dense
    layers = range(config.model.num_layers)
    if every is None:
        return ["dense" for _ in layers]
    return ["MoE" if i >= first and (i - first + 1) % every == 0 else "dense" for i in layers]


def gathered_weight_bytes(config: Config, sizes: MeshConfig) -> int:
    """Returns the bytes of one MoE layer's experts on a device, whole over fsdp, compute dtype.

    Of layers that differ it is the largest, as one layer is computed at a time.
    """
    if config.moe.transport == "reference":
        return 0

    def layer(moe: MoEConfig) -> int:
        count = 0
        for name, parameter in moe_parameters(moe, config.model.d_model).items():
            if kind_of(name) == "experts":
                axes = AXES_OF.get(name, ())
                whole = [None if axis in gathered_axes(axes) else axis for axis in axes]
                count += math.prod(local_shape(parameter.shape, P(*whole), sizes))
        return count

    return max((layer(own.moe) for _, own in config.moe_stacks()), default=0) * itemsize(config)


# Words


def _compute_facts(config: Config, sizes: MeshConfig) -> list[tuple[str, str]]:
    flops, attention = flops_per_token(config), attention_products(config)
    positions = config.train.batch_size * config.data.sequence_length
    return [
        ("FLOPs per token, forward and backward", f"{flops:,}"),
        ("  = 6 * weights + 6 * attention", f"6 * {flops // 6 - attention:,} + 6 * {attention:,}"),
        ("  source", "PaLM, arXiv:2204.02311, appendix B; attention halved, it is causal"),
        ("tokens per step", _product(positions, config.train.batch_size, "sequences")),
        ("microbatches per step", str(config.train.accumulation)),
        ("tokens per device and microbatch", f"{local_tokens(config, sizes):,}"),
        ("FLOPs per step", f"{flops * positions:.3e}"),
    ]


def _product(positions: int, sequences: int, unit: str) -> str:
    return f"{positions:,} = {sequences:,} {unit} x {positions // sequences:,}"


def _mesh_facts(config: Config, sizes: MeshConfig) -> list[tuple[str, str]]:
    words = {
        "data": "sequences",
        "fsdp": "sequences, and every matrix",
        "expert_fsdp": "sequences, experts, and every matrix outside of them",
        "expert": "sequences, and experts",
        "context": "every sequence",
        "tensor": "heads, hidden widths, vocabulary",
    }
    rows = [(axis, f"{getattr(sizes, axis):>4}  splits {words[axis]}") for axis in AXES]
    free = [axis for axis in AXES if getattr(config.mesh, axis) is None]
    taken = f" ({free[0]} takes what is left: --devices N lays out more)" if free else ""
    return [*rows, ("devices", f"{sizes.num_devices:>4}{taken}")]


def _moe_facts(config: Config, sizes: MeshConfig) -> list[tuple[str, str]]:
    moe, kinds = config.moe, layer_kinds(config)
    by_kind = {k: [i for i, kind in enumerate(kinds) if kind == k] for k in ("MoE", "dense")}
    facts = [
        ("MoE layers", _ranges(by_kind["MoE"])),
        ("dense layers", _ranges(by_kind["dense"])),
        ("router", f"{moe.router}, {_selection_words(config)}"),
        *_capacity_facts("capacity", config, moe.capacity_factor),
    ]
    stacks = [stack for stack, _ in config.moe_stacks()]
    if len(stacks) > 1:
        facts[2:2] = [(f"experts of MoE {_layers(stack)}", _size_words(stack)) for stack in stacks]
    if moe.free_experts:
        numbers = (
            f"{moe.zero_experts} zero, {moe.copy_experts} copy, {moe.constant_experts} constant"
        )
        facts.append(("experts without a network", numbers))
    if moe.shared_experts:
        facts.append(("shared experts", f"{moe.shared_experts}, gate {moe.shared_gate}"))
    if moe.takes_capacity:
        name = "capacity in the second evaluation"
        facts += _capacity_facts(name, config, moe.eval_capacity_factor)
    how = moe.transport_over(sizes.expert_degree)
    split = [axis for axis in EXPERT_AXES if getattr(sizes, axis) > 1] or ["expert"]
    over = " x ".join(f"{axis}={getattr(sizes, axis)}" for axis in split)
    facts.append(("transport", f"{how} over {over}"))
    return facts


def _selection_words(config: Config) -> str:
    moe, mean = config.moe, active_experts(config)
    numbers = sorted({own.moe.num_experts for _, own in config.moe_stacks()})
    exact = f"{float(mean):g} of {' or '.join(map(str, numbers))} experts a token"
    return (
        exact if mean == moe.top_k and moe.slots_per_token == moe.top_k else f"{exact} on average"
    )


def _transport_table(config: Config, sizes: MeshConfig) -> Table:
    """What each transport would move and hold, the config's own first marked."""
    title = "transports, bytes over the expert axes per token and layer, forward"
    table = Table(title=title, title_justify="left")
    for column in ("transport", "bytes", "per device, microbatch and layer", "buffers", "formula"):
        table.add_column(column, justify="left" if column in ("transport", "formula") else "right")
    chosen = config.moe.transport_over(sizes.expert_degree)
    possible = ("all_to_all",) if config.moe.router == "soft" else TRANSPORTS
    for how in ("reference",) if chosen == "reference" else possible:
        sent = exchange_bytes(config, sizes, how)
        held = buffer_rows(config, sizes, how) * config.model.d_model * itemsize(config)
        table.add_row(
            f"{how} *" if how == chosen else how,
            f"{sent:,.0f}",
            bytes_text(sent * local_tokens(config, sizes)),
            bytes_text(held),
            FORMULAS[formula(config, sizes, how)],
        )
    return table


def _layers(stack: Stack) -> str:
    """Writes which of the MoE layers, counted from 0, are in a stack."""
    last = stack.stop - 1
    return f"layer {last}" if stack.num_layers == 1 else f"layers {stack.start}-{last}"


def _size_words(stack: Stack) -> str:
    return f"{stack.config.num_experts:,} of hidden width {stack.config.expert_hidden:,}"


def _capacity_facts(name: str, config: Config, factor: float | None) -> list[tuple[str, str]]:
    """Returns the capacity once where it is the same words for all layers, else by stack."""
    words = {_layers(stack): _capacity_words(own, factor) for stack, own in config.moe_stacks()}
    first, *others = dict.fromkeys(words.values())
    if not others:
        return [(name, first)]
    return [(f"{name}, MoE {layers}", each) for layers, each in words.items()]


def _capacity_words(config: Config, factor: float | None) -> str:
    if factor is None:
        return "dropless"
    moe, tokens = config.moe, group_tokens(config)
    by_expert = moe.capacity_by_expert
    own = "" if by_expert is None else f"{max(by_expert):g} * "
    return (
        f"{'up to ' if own else ''}{slots(config, factor):,} slots per expert and group of "
        f"{moe.group_sequences} x {config.data.sequence_length:,} tokens: "
        f"ceil({factor:g} * {own}{moe.mean_selected} * {tokens:,} / {moe.num_experts}), at most "
        f"{tokens:,}"
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Writes layer numbers in steps of equal size as `0-31` or `1-31 in steps of 2`."""
    if not numbers:
        return "none"
    first, last = numbers[0], numbers[-1]
    strides = {b - a for a, b in itertools.pairwise(numbers)}
    count = f"{len(numbers)}: "
    if len(strides) > 1:
        return count + ", ".join(map(str, numbers))
    stride = strides.pop() if strides else 1
    span = str(first) if first == last else f"{first}-{last}"
    return count + span + (f" in steps of {stride}" if stride > 1 else "")


# Tables


def output_console() -> Console:
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(width=PLAIN_WIDTH, force_terminal=False, no_color=True, highlight=False)


def _print(console: Console, table: Table) -> None:
    console.print(table)
    console.print()


def _facts(title: str, facts: Iterable[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(Text(name), Text(value))
    return table


def _numbers(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _parameter_table(config: Config) -> Table:
    table = _numbers("parameters", "kind", "total", "active per token")
    active = active_counts(config)
    for kind, count in parameter_counts(config).items():
        table.add_row(kind, f"{count:,}", f"{active[kind]:,}")
    table.add_section()
    table.add_row("all", f"{total_parameters(config):,}", f"{active_parameters(config):,}")
    return table


def _memory_table(config: Config, sizes: MeshConfig, kinds: dict[str, list[Placement]]) -> Table:
    table = _numbers("memory", "kind", "one copy", "per device", "bytes per device")
    for kind, rows in kinds.items():
        total, local = sum(r.total for r in rows), sum(r.per_device for r in rows)
        table.add_row(kind, bytes_text(total), bytes_text(local), f"{local:,}")
    table.add_section()
    local = sum(row.per_device for rows in kinds.values() for row in rows)
    table.add_row("state and gradients", "", bytes_text(local), f"{local:,}")
    if config.num_moe_layers:
        table.add_section()
        rows = (
            buffer_rows(config, sizes, config.moe.transport_over(sizes.expert_degree))
            * config.model.d_model
            * itemsize(config)
        )
        weights = gathered_weight_bytes(config, sizes)
        table.add_row("dispatch buffers of one MoE layer", "", bytes_text(rows), f"{rows:,}")
        table.add_row("its experts, gathered over fsdp", "", bytes_text(weights), f"{weights:,}")
    return table


def _sharding_table(rows: list[Placement]) -> Table:
    table = Table(title="parameters by layer stack", title_justify="left")
    for column in ("parameter", "shape", "mesh axes"):
        table.add_column(column, overflow="fold")
    for column in ("one copy", "per device"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        shape, spec = Text(str(list(row.shape))), Text(str(row.spec).removeprefix("PartitionSpec"))
        table.add_row(
            Text(row.name), shape, spec, bytes_text(row.total), bytes_text(row.per_device)
        )
    return table


def bytes_text(count: float) -> str:
    """Writes a number of bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.{2 if count < 10 else 1}f} {unit}"
