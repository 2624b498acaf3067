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
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moejax.config import AXES, Config, MeshConfig
from moejax.dispatch import expert_capacity, grouped_rows
from moejax.experts import block_rows
from moejax.flops import active_parameters, flops_per_token, parameter_counts, total_parameters
from moejax.optim import make_optimizer
from moejax.sharding import path_name
from moejax.state import abstract_state

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
    out = console or _console()
    _print(out, _parameter_table(config))
    _print(out, _facts("compute", _compute_facts(config, sizes)))
    _print(out, _facts("mesh", _mesh_facts(config, sizes)))
    if config.num_moe_layers:
        _print(out, _facts("MoE layers", _moe_facts(config, sizes)))
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
    """
    shape = tuple(getattr(sizes, axis) for axis in AXES)
    mesh = AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    optimizer = make_optimizer(config.optim, config.train.steps)
    state = abstract_state(config, mesh, optimizer)
    parameters = _place(state.params)
    return {
        "parameters": parameters,
        "gradients": parameters,
        "optimizer state": _place(state.opt_state),
        "router state": _place(state.router_state),
        "step and rng": _place({"step": state.step, "rng": state.rng}),
    }


def _place(tree: Any) -> list[Placement]:
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        local = leaf.sharding.shard_shape(leaf.shape)
        width = leaf.dtype.itemsize
        total, per_device = math.prod(leaf.shape) * width, math.prod(local) * width
        rows.append(Placement(path_name(path), leaf.shape, leaf.sharding.spec, total, per_device))
    return rows


def layer_kinds(config: Config) -> list[str]:
    """Returns "dense" or "MoE" for each layer."""
    every, first = config.moe.every, config.moe.first_dense
    layers = range(config.model.num_layers)
    if every is None:
        return ["dense" for _ in layers]
    return ["MoE" if i >= first and (i - first + 1) % every == 0 else "dense" for i in layers]


def transport(config: Config) -> str:
    """Returns how tokens reach the experts: what `auto` stands for is spelled out."""
    if config.moe.transport == "reference":
        return "reference"
    if config.moe.capacity_factor is None:
        return "gather"
    return "gather" if config.moe.transport == "gather" else "all_to_all"


def group_tokens(config: Config) -> int:
    """Returns the positions of one capacity group."""
    return config.moe.group_sequences * config.data.sequence_length


def slots(config: Config, capacity_factor: float) -> int:
    """Returns the slots of an expert in a group without padding."""
    moe = config.moe
    return expert_capacity(group_tokens(config), moe.num_experts, moe.top_k, capacity_factor)


def local_tokens(config: Config, sizes: MeshConfig) -> int:
    """Returns the positions of a microbatch on one device."""
    microbatch = config.train.batch_size // config.train.accumulation
    return microbatch // sizes.token_shards * config.data.sequence_length


def exchange_bytes(config: Config, sizes: MeshConfig) -> float:
    """Returns the bytes that a token costs its device in one MoE layer, forward, over `expert`.

    With b bytes a number in the compute dtype and Z devices on the expert axis:

        all_to_all   2 * D * b * (E * C / group tokens) * (1 - 1/Z)
        gather       (2 * D * b + 8 * S) * (Z - 1)

    Empty slots are sent too, so E * C / group tokens, which is capacity_factor * S up to rounding,
    stands for S. `gather` also sends 8 bytes a selection: expert and weight. The backward pass
    sends as much again, but for the 4 bytes of the expert. Collectives over fsdp and tensor are not
    counted.
    """
    moe, degree = config.moe, sizes.expert
    assert degree is not None
    both_ways = 2 * config.model.d_model * _itemsize(config)
    how = transport(config)
    if how == "reference":
        return 0.0
    if how == "gather":
        return float((both_ways + 8 * moe.top_k) * (degree - 1))
    assert moe.capacity_factor is not None
    rows = moe.num_experts * slots(config, moe.capacity_factor) / group_tokens(config)
    return both_ways * rows * (1 - 1 / degree)


def buffer_rows(config: Config, sizes: MeshConfig) -> int:
    """Returns the rows [D] that one device holds between dispatch and combine, in one MoE layer.

    all_to_all: the buffer, G * E * C, the same before and after the exchange. gather: the tokens of
    the expert group, and their rows by expert. reference: 0, no buffer.
    """
    moe, tokens, degree = config.moe, local_tokens(config, sizes), sizes.expert
    assert degree is not None
    how = transport(config)
    if how == "reference":
        return 0
    if how == "gather":
        local, gathered = moe.num_experts // degree, tokens * degree
        block = block_rows(gathered * moe.top_k * local // moe.num_experts, local)
        return gathered + grouped_rows(gathered, moe.top_k, local, block)
    assert moe.capacity_factor is not None
    groups = tokens // group_tokens(config)
    return groups * moe.num_experts * slots(config, moe.capacity_factor)


def gathered_weight_bytes(config: Config, sizes: MeshConfig) -> int:
    """Returns the bytes of one MoE layer's experts on a device, whole over fsdp, compute dtype."""
    moe = config.moe
    if transport(config) == "reference":
        return 0
    assert sizes.expert is not None
    assert sizes.tensor is not None
    matrix = config.model.d_model * (moe.expert_hidden // sizes.tensor)
    return moe.num_experts // sizes.expert * 3 * matrix * _itemsize(config)


def _itemsize(config: Config) -> int:
    return jax.numpy.dtype(config.model.dtype).itemsize


# Words


def _compute_facts(config: Config, sizes: MeshConfig) -> list[tuple[str, str]]:
    model, flops = config.model, flops_per_token(config)
    positions = config.train.batch_size * config.data.sequence_length
    attention = model.num_layers * model.num_heads * model.head_dim * config.data.sequence_length
    return [
        ("FLOPs per token, forward and backward", f"{flops:,}"),
        ("  = 6 * N + 6 * L * H * K * T", f"6 * {flops // 6 - attention:,} + 6 * {attention:,}"),
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
        "expert": "sequences, and experts",
        "tensor": "heads, hidden widths, vocabulary",
    }
    rows = [(axis, f"{getattr(sizes, axis):>4}  splits {words[axis]}") for axis in AXES]
    free = [axis for axis in AXES if getattr(config.mesh, axis) is None]
    taken = f" ({free[0]} takes what is left: --devices N lays out more)" if free else ""
    return [*rows, ("devices", f"{sizes.num_devices:>4}{taken}")]


def _moe_facts(config: Config, sizes: MeshConfig) -> list[tuple[str, str]]:
    moe, kinds = config.moe, layer_kinds(config)
    by_kind = {k: [i for i, kind in enumerate(kinds) if kind == k] for k in ("MoE", "dense")}
    sent = exchange_bytes(config, sizes)
    return [
        ("MoE layers", _ranges(by_kind["MoE"])),
        ("dense layers", _ranges(by_kind["dense"])),
        ("router", f"{moe.router}, {moe.top_k} of {moe.num_experts} experts"),
        ("capacity", _capacity_words(config, moe.capacity_factor)),
        ("capacity in the second evaluation", _capacity_words(config, moe.eval_capacity_factor)),
        ("transport", f"{transport(config)} over expert={sizes.expert}"),
        ("bytes sent per token and layer, forward", f"{sent:,.0f} ({_formula(config)})"),
        ("  per device, microbatch and layer", _bytes(sent * local_tokens(config, sizes))),
    ]


def _formula(config: Config) -> str:
    return {
        "all_to_all": "2 * D * b * E * C / group tokens * (1 - 1/Z)",
        "gather": "(2 * D * b + 8 * S) * (Z - 1)",
        "reference": "every device computes every expert",
    }[transport(config)]


def _capacity_words(config: Config, factor: float | None) -> str:
    if factor is None:
        return "dropless"
    moe, tokens = config.moe, group_tokens(config)
    return (
        f"{slots(config, factor):,} slots per expert and group of {moe.group_sequences} x "
        f"{config.data.sequence_length:,} tokens: ceil({factor:g} * {moe.top_k} * {tokens:,} / "
        f"{moe.num_experts}), at most {tokens:,}"
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


def _console() -> Console:
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
    moe = config.moe
    for kind, count in parameter_counts(config).items():
        active = count // moe.num_experts * moe.top_k if kind == "experts" else count
        table.add_row(kind, f"{count:,}", f"{active:,}")
    table.add_section()
    table.add_row("all", f"{total_parameters(config):,}", f"{active_parameters(config):,}")
    return table


def _memory_table(config: Config, sizes: MeshConfig, kinds: dict[str, list[Placement]]) -> Table:
    table = _numbers("memory", "kind", "one copy", "per device", "bytes per device")
    for kind, rows in kinds.items():
        total, local = sum(r.total for r in rows), sum(r.per_device for r in rows)
        table.add_row(kind, _bytes(total), _bytes(local), f"{local:,}")
    table.add_section()
    local = sum(row.per_device for rows in kinds.values() for row in rows)
    table.add_row("state and gradients", "", _bytes(local), f"{local:,}")
    if config.num_moe_layers:
        table.add_section()
        rows = buffer_rows(config, sizes) * config.model.d_model * _itemsize(config)
        weights = gathered_weight_bytes(config, sizes)
        table.add_row("dispatch buffers of one MoE layer", "", _bytes(rows), f"{rows:,}")
        table.add_row("its experts, gathered over fsdp", "", _bytes(weights), f"{weights:,}")
    return table


def _sharding_table(rows: list[Placement]) -> Table:
    table = Table(title="parameters by layer stack", title_justify="left")
    for column in ("parameter", "shape", "mesh axes"):
        table.add_column(column, overflow="fold")
    for column in ("one copy", "per device"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        shape, spec = Text(str(list(row.shape))), Text(str(row.spec).removeprefix("PartitionSpec"))
        table.add_row(Text(row.name), shape, spec, _bytes(row.total), _bytes(row.per_device))
    return table


def _bytes(count: float) -> str:
    """Writes a number of bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.{2 if count < 10 else 1}f} {unit}"
