"""`moejax plan --search`: layouts of a config on a pod, ranked on paper, the best ones compiled.

The paper model does not know how XLA arranges a step, so it only chooses what to compile. What is
said of a compiled layout is read from its program.
"""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import shlex
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from moejax.attend import QUERY_CHUNK
from moejax.config import (
    AXES,
    EXPERT_AXES,
    TOKEN_AXES,
    Config,
    ConfigError,
    MeshConfig,
    ModelConfig,
)
from moejax.describe import (
    Placement,
    bytes_text,
    is_layer_matrix,
    local_shape,
    output_console,
    placements,
)
from moejax.experts import HIDDEN_BYTES
from moejax.flops import flops_per_token
from moejax.foreign import write_json
from moejax.overrides import config_values
from moejax.plan import exchange_passes, forwards_ahead, make_plan
from moejax.plan_report import plan_record
from moejax.sharding import gathered_axes
from moejax.topology import Topology, topology_devices
from moejax.traffic import TRANSPORTS, buffer_rows, exchange_bytes, itemsize, local_tokens

TRIES = 4  # layouts that are compiled
FULL = 0.9  # of the memory: what the paper model leaves out has to fit too
EFFICIENCY = 0.7  # of the peak, in matmuls


@dataclasses.dataclass(frozen=True)
class Layout:
    """A config on a mesh, as the paper model sees it.

    Attributes:
        config: with the mesh, the remat policy, the microbatches and the transport of the layout.
        bytes: of memory, of a device.
        sent: bytes that a device sends in a step.
        compute, links: seconds of a step.
    """

    config: Config
    bytes: int
    sent: float
    compute: float
    links: float

    @property
    def seconds(self) -> float:
        return self.compute + self.links

    @property
    def words(self) -> list[str]:
        """What to write on a command line for it."""
        config, mesh = self.config, self.config.mesh
        words = [f"mesh.{axis}={getattr(mesh, axis)}" for axis in AXES]
        words += [f"model.remat={config.model.remat}"]
        words += [f"train.accumulation={config.train.accumulation}"]
        return words + ([f"moe.transport={config.moe.transport}"] if config.num_moe_layers else [])


def layouts(config: Config, topology: Topology, num_devices: int) -> list[Layout]:
    """Returns every layout of `config` on `num_devices` that is allowed, the fastest first.

    Meshes, remat policies, microbatches and transports vary; the model and the batch stay.
    """
    rows = placements(config, MeshConfig(data=1))
    found = []
    for mesh in _meshes(num_devices, config.mesh.context or 1):
        if (mesh.data or 1) % topology.slices:
            continue  # only data spans slices
        found += [_on_paper(changed, topology, rows) for changed in _variants(config, mesh)]
    return sorted(found, key=lambda layout: layout.seconds)


def _meshes(num_devices: int, context: int) -> Iterator[MeshConfig]:
    """Yields the meshes of `num_devices`; sequences are split as the config says."""
    divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    axes = [axis for axis in AXES if axis not in ("data", "context")]
    for sizes in itertools.product(divisors, repeat=len(axes)):
        data, rest = divmod(num_devices, math.prod(sizes) * context)
        if not rest:
            inner = dict(zip(axes, sizes, strict=True))
            yield MeshConfig(data=data, context=context, **inner)


def _variants(config: Config, mesh: MeshConfig) -> Iterator[Config]:
    """Yields the config with all that can vary on `mesh`, nothing where it cannot be laid out."""
    if not config.num_moe_layers and mesh.expert_fsdp != 1:
        return  # without experts the same as fsdp
    try:
        config.check_model_fits(mesh)
    except ConfigError:
        return
    groups, rest = divmod(config.train.batch_size, mesh.token_shards * config.moe.group_sequences)
    if rest:
        return
    policies = typing.get_args(typing.get_type_hints(ModelConfig)["remat"])
    splits = [n for n in range(1, groups + 1) if groups % n == 0]
    moves = mesh.expert_degree != 1 and config.num_moe_layers and config.moe.router != "soft"
    transports = TRANSPORTS if moves else (config.moe.transport,)
    for remat, accumulation, transport in itertools.product(policies, splits, transports):
        yield dataclasses.replace(
            config,
            mesh=mesh,
            model=dataclasses.replace(config.model, remat=remat),
            train=dataclasses.replace(config.train, accumulation=accumulation),
            moe=dataclasses.replace(config.moe, transport=transport),
        )


# The paper model


def on_paper(config: Config, topology: Topology) -> Layout:
    """Returns what the paper model says of a config whose mesh has all its sizes."""
    return _on_paper(config, topology, placements(config, MeshConfig(data=1)))


def _on_paper(config: Config, topology: Topology, rows: dict[str, list[Placement]]) -> Layout:
    chip, mesh = topology.chip, config.mesh
    useful = flops_per_token(config) * config.train.batch_size * config.data.sequence_length
    again = {"none": 1.0, "full": 4 / 3, "exchange": 4 / 3}.get(config.model.remat, 7 / 6)
    again += forwards_ahead(config) / 3
    compute = useful * again / mesh.num_devices / chip.flops / EFFICIENCY
    moves = list(_sent(config, topology, rows["parameters"]))
    sent, links = (sum(of_all) for of_all in zip(*moves, strict=True))
    return Layout(config, _bytes(config, topology, rows), sent, compute, links)


def _bytes(config: Config, topology: Topology, rows: dict[str, list[Placement]]) -> int:
    """Returns state, gradients, what is kept of the layers, and a layer's or the loss's own arrays.

    How many arrays of a layer live at once is fitted to compiled steps (docs/planning.md).
    """
    model, moe, mesh = config.model, config.moe, config.mesh
    width, tokens, tensor = itemsize(config), local_tokens(config, mesh), mesh.tensor or 1
    held = _held_bytes(config, rows)
    how = moe.transport_over(mesh.expert_degree)
    heads = _attention_numbers(model) // tensor
    hidden = moe.mean_selected * moe.expert_hidden if config.num_moe_layers else model.dense_hidden
    products = heads + 2 * model.d_model + 2 * hidden // tensor
    kept = {
        "none": products + 6 * 4 // width * model.d_model + hidden // tensor,  # norms in float32
        "full": 0,
        "exchange": 0,  # but for what was delivered, below
    }
    saved = tokens * model.num_layers * (model.d_model + kept.get(model.remat, products))
    if model.remat == "none" and mesh.fsdp_degree > 1:  # whole weights wait for the way back
        saved += model.num_layers * _layer_weights(config, rows["parameters"])
    if model.remat.startswith("exchange") and mesh.expert_degree > 1:
        saved += config.num_moe_layers * (
            _received_rows(config, how) * model.d_model + _dense_weights(config, rows["parameters"])
        )
    buffers = buffer_rows(config, mesh, how) * model.d_model
    experts = _received_rows(config, how) * moe.expert_hidden // tensor
    part = min(experts, HIDDEN_BYTES // width) if config.num_moe_layers else tokens * hidden
    layer = (5 if topology.chip.is_tpu else 3) * buffers + 6 * part + 3 * tokens * heads
    layer += 3 * _layer_weights(config, rows["parameters"])
    if not topology.chip.is_tpu:  # no attention kernel: scores in float32, twice
        queries = min(QUERY_CHUNK, config.data.sequence_length)
        layer += 8 // width * tokens * queries * model.num_heads // tensor
    return held + width * saved + max(width * layer, _loss_bytes(config))


def _held_bytes(config: Config, rows: dict[str, list[Placement]]) -> int:
    """Returns state and gradients of a device, and the matrices of layers in the compute dtype."""

    def local(row: Placement) -> int:
        part = math.prod(local_shape(row.shape, row.spec, config.mesh))
        return part * row.total // math.prod(row.shape)

    held = sum(
        local(row)
        for kind, of_kind in rows.items()
        for row in of_kind
        if row.total and kind != "gradients"
    )
    wide, narrow = np.dtype(config.model.param_dtype).itemsize, itemsize(config)
    for row in rows["parameters"]:
        cast = is_layer_matrix(row) and wide != narrow
        small = local(row) * narrow // wide if cast else 0
        summed = config.train.accumulation > 1 or not cast
        held += 2 * small + summed * local(row)
    return held


def _received_rows(config: Config, how: str) -> int:
    """Returns the rows of D that a device's experts work on at once."""
    rows = buffer_rows(config, config.mesh, how)
    if config.mesh.expert_degree == 1 or (how == "all_to_all" and config.moe.capacity_factor):
        return rows
    tokens = local_tokens(config, config.mesh)
    return min(rows, int(config.moe.buffer_factor * tokens * config.moe.mean_selected))


def _dense_weights(config: Config, parameters: Sequence[Placement]) -> int:
    """Returns the numbers in the dense matrices of a layer, whole over fsdp."""
    mesh = config.mesh
    dense = [r for r in parameters if is_layer_matrix(r) and "/moe/" not in r.name]
    whole = (
        math.prod(local_shape(r.shape, r.spec, mesh)) * _gathered_over(r, mesh)[0] for r in dense
    )
    return sum(whole) // max(1, config.model.num_layers)


def _attention_numbers(model: ModelConfig) -> int:
    """Returns the numbers in the queries, keys and values of a token in a layer."""
    return model.num_heads * model.qk_width + _key_numbers(model)


def _key_numbers(model: ModelConfig) -> int:
    """Returns the numbers in the keys and values of a token in a layer."""
    keys = model.num_heads if model.attention == "latent" else model.num_kv_heads
    return keys * (model.qk_width + model.v_width)


def _loss_bytes(config: Config) -> int:
    """Returns a chunk's logits and their gradient, the unembedding and its float32 gradient."""
    model, tokens = config.model, local_tokens(config, config.mesh)
    chunk = min(tokens, model.loss_chunk or tokens)
    column = 2 * 4 * chunk + (itemsize(config) + 4) * model.d_model
    return column * model.vocab_size // (config.mesh.tensor or 1)


def _layer_weights(config: Config, parameters: Sequence[Placement]) -> int:
    """Returns the numbers in a layer's weights on a device, whole over fsdp."""
    mesh = config.mesh
    stacks = [row for row in parameters if row.name.startswith(("prefix", "runs"))]
    whole = (
        math.prod(local_shape(row.shape, row.spec, mesh)) * _gathered_over(row, mesh)[0]
        for row in stacks
    )
    return sum(whole) // max(1, config.model.num_layers)


def _gathered_over(row: Placement, mesh: MeshConfig) -> tuple[int, str]:
    """Returns how many devices a parameter is gathered over, and the outermost of their axes."""
    axes = gathered_axes(row.spec)
    return math.prod(getattr(mesh, axis) for axis in axes), _outermost(axes or ("fsdp",), mesh)


def _outermost(axes: tuple[str, ...], mesh: MeshConfig) -> str:
    """Returns the first of the axes that is split, else the last."""
    return next((axis for axis in axes if getattr(mesh, axis) > 1), axes[-1])


def _sent(
    config: Config, topology: Topology, parameters: Sequence[Placement]
) -> Iterator[tuple[float, float]]:
    """Yields the bytes that a device sends in a step, and the seconds that they take."""
    mesh, steps, width = config.mesh, config.train.accumulation, itemsize(config)
    again = (config.model.remat != "none") + forwards_ahead(config)
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    tokens = local_tokens(config, mesh) * steps

    def speed(axis: str) -> float:
        return _speed(topology, mesh, axis)

    def over(axis: str, sent: float) -> tuple[float, float]:
        return sent, sent / speed(axis)

    degree = mesh.expert_degree
    if config.num_moe_layers and degree > 1:
        how = config.moe.transport_over(degree)
        routed = tokens * config.num_moe_layers * exchange_passes(config)
        sent = exchange_bytes(config, mesh, how) * routed
        yield sent, _exchange_seconds(topology, mesh, how, sent)
    # every device gathers keys and values of its sequences, and sends their gradients back
    keys = config.model.num_layers * tokens * _key_numbers(config.model) // sizes["tensor"]
    yield over("context", keys * width * (2 + again) * (sizes["context"] - 1))
    unembedding = "embedding" if config.model.tie_embeddings else "unembedding"
    for row in parameters:
        local = math.prod(local_shape(row.shape, row.spec, mesh)) * width * steps
        axes = {
            name for part in row.spec for name in ((part,) if isinstance(part, str) else part or ())
        }
        devices, outermost = _gathered_over(row, mesh)
        gathers = 1 + again * row.name.startswith(("prefix", "runs"))
        # chunks of the vocabulary add the gradient of the unembedding up in float32
        gradient = local * 4 // width if row.name == unembedding else local
        yield over(outermost, (gathers * local + gradient) * (devices - 1))
        summed = [axis for axis in (*TOKEN_AXES, "context") if axis not in (*axes, "fsdp")]
        for axis in summed:
            yield over(axis, 2 * gradient * (1 - 1 / sizes[axis]))
    sums = (4 + 2 * again) * config.model.num_layers * tokens * config.model.d_model * width
    yield over("tensor", 2 * sums * (1 - 1 / sizes["tensor"]))


def _exchange_seconds(topology: Topology, mesh: MeshConfig, how: str, sent: float) -> float:
    """Returns the seconds in which the experts' devices exchange what each of them sends."""
    chip, degree = topology.chip, mesh.expert_degree
    ring = sent / _speed(topology, mesh, _outermost(EXPERT_AXES, mesh))
    if how == "gather":
        return ring
    if chip.is_tpu or chip.network is None:
        # All-to-all over a ring of A: V * A / 4 for V bytes a device ("How To Scale Your Model").
        return ring * max(degree / 4, 1.0)
    here = _on_one_host(topology, mesh, EXPERT_AXES[-1], degree)
    part = sent / (degree - 1)
    return max((here - 1) * part / chip.link, (degree - here) * part / chip.network)


def _speed(topology: Topology, mesh: MeshConfig, axis: str) -> float:
    """Returns the bytes/s along an axis: a ring of a torus, or GPUs within and between hosts.

    A ring of GPUs goes from host to host over the network of all of its GPUs at one.
    """
    chip = topology.chip
    if chip.network is not None and axis == "data" and topology.slices > 1:
        return chip.network
    if chip.is_tpu or chip.network is None:
        return 2 * chip.link
    size = getattr(mesh, axis)
    here = _on_one_host(topology, mesh, axis, size)
    return chip.link if here == size else min(chip.link, here * chip.network)


def _on_one_host(topology: Topology, mesh: MeshConfig, axis: str, size: int) -> int:
    """Returns how many of `size` GPUs in a row, of which `axis` is the innermost, a host has."""
    inner = AXES[AXES.index(axis) + 1 :]  # the last axis is the one of neighbours
    stride = math.prod(getattr(mesh, name) for name in inner)
    return min(size, max(1, topology.shape[1] // stride))


# The search


@dataclasses.dataclass(frozen=True)
class Tried:
    """A layout and what its compiled program says; `error` is XLA's where there is no program."""

    layout: Layout
    record: dict[str, Any] | None
    error: str = ""

    @property
    def fits(self) -> bool:
        return self.record is not None and self.record["fits"]

    @property
    def seconds(self) -> float:
        """The middle of the estimate, by which layouts are ranked."""
        if self.record is None or not self.record["fits"]:
            return math.inf
        return (self.record["step_seconds_low"] + self.record["step_seconds_high"]) / 2


def search(
    config: Config,
    topology: Topology,
    num_devices: int,
    cache: Path,
    console: Console | None = None,
) -> tuple[list[Tried], list[Layout]]:
    """Compiles the best layouts; what was compiled before is read from `cache`.

    Returns:
        the layouts that were compiled, best first, and all that were thought of.

    Raises:
        ConfigError: no layout can be laid out, or none fits on paper.
    """
    found = layouts(config, topology, num_devices)
    room = topology.memory * FULL
    fitting = [layout for layout in found if layout.bytes <= room]
    if not found:
        raise ConfigError(
            f"no mesh of {num_devices} devices fits the model and train.batch_size="
            f"{config.train.batch_size}; use a batch that is a multiple of "
            f"{num_devices * config.moe.group_sequences}"
        )
    if not fitting:
        least = min(layout.bytes for layout in found)
        raise ConfigError(
            f"no layout of {topology.name} fits: the smallest needs {bytes_text(least)} a device, "
            f"which has {bytes_text(topology.memory)}; use more chips"
        )
    tried = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console or Console(stderr=True), transient=True) as progress:
        for number, layout in enumerate(fitting[:TRIES], start=1):
            words = " ".join(layout.words)
            task = progress.add_task(f"compiling {number} of {min(TRIES, len(fitting))}: {words}")
            tried.append(_try(layout, topology, cache))
            progress.remove_task(task)
    return sorted(tried, key=lambda t: t.seconds), found


def _try(layout: Layout, topology: Topology, cache: Path) -> Tried:
    file = cache / f"{_key(layout.config, topology)}.json"
    if file.exists():
        stored = json.loads(file.read_text(encoding="utf-8"))
        return Tried(layout, stored["record"], stored["error"])
    try:
        tried = Tried(layout, plan_record(make_plan(layout.config, topology)))
    except ConfigError as error:
        tried = Tried(layout, None, str(error))
    cache.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"record": tried.record, "error": tried.error})
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(file)  # an interrupted search leaves no half of a file
    return tried


def _key(config: Config, topology: Topology) -> str:
    """Returns a name for a result, of its config, pod, compiler and this package's source."""
    versions = {}
    for package in ("jax", "libtpu", "jax-cuda12-plugin"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        sources.update(path.read_bytes())
    parts = (config_values(config), topology.name, topology.fraction, versions, sources.hexdigest())
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


# Words


def search_plan(
    config: Config, topology: Topology, given: Sequence[str], json_path: Path | None
) -> bool:
    """Searches, prints what was found and writes it to `json_path`, if given.

    `given` are the words that the config came from, for the command that trains with the best.
    Returns whether a layout fits. What was compiled is kept in `~/.cache/moejax/plans`, so that an
    interrupted search goes on from there.

    Raises:
        ConfigError: see `search`.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "moejax", "plans")
    tried, found = search(config, topology, len(topology_devices(topology)), cache)
    if json_path is not None:
        rows = [{"words": t.layout.words, "error": t.error} | (t.record or {}) for t in tried]
        text = json.dumps({"considered": len(found), "compiled": rows}, indent=1)
        write_json(json_path, text)
    show_search(tried, found, topology, given)
    return tried[0].fits


def show_search(
    tried: Sequence[Tried],
    found: Sequence[Layout],
    topology: Topology,
    given: Sequence[str],
    console: Console | None = None,
) -> None:
    """Prints the ranking, why the others lost, and the command of the winner."""
    out = console or output_console()
    table = Table(title="layouts that were compiled, best first", title_justify="left")
    for column in ("layout", "memory", "step", "why not"):
        table.add_column(column, overflow="fold")
    best = tried[0]
    for one in tried:
        table.add_row(*_row(one, best))
    out.print(table, "")
    out.print(_rest(tried, found, topology))
    if best.fits:
        chosen = {word.partition("=")[0] for word in best.layout.words}
        kept = [word for word in given if word.partition("=")[0] not in chosen]
        words = ["moejax", "train", *kept, "--workdir", "runs/planned", *best.layout.words]
        out.print("\n" + shlex.join(words), soft_wrap=True)


def _row(one: Tried, best: Tried) -> tuple[str, str, str, str]:
    words = " ".join(one.layout.words)
    if one.record is None:
        return words, "", "", one.error
    memory = bytes_text(one.record["peak_bytes"])
    if not one.record["fits"]:
        over = bytes_text(one.record["peak_bytes"] - one.record["memory_limit"])
        return words, memory, "", f"does not fit, by {over}"
    step = f"{one.record['step_seconds_low']:.3g} to {one.record['step_seconds_high']:.3g} s"
    return words, memory, step, "" if one is best else _slower(one, best)


def _slower(one: Tried, best: Tried) -> str:
    """Returns by which limit a layout is slower than the best one."""
    assert one.record is not None
    assert best.record is not None
    mine, theirs = one.record["roofline"], best.record["roofline"]
    limit = max(mine, key=lambda name: mine[name] - theirs[name])
    more = one.seconds / best.seconds - 1
    return f"{more:.0%} slower; {limit} {mine[limit]:.3g} s against {theirs[limit]:.3g} s"


def _rest(tried: Iterable[Tried], found: Sequence[Layout], topology: Topology) -> str:
    room = topology.memory * FULL
    large = sum(layout.bytes > room for layout in found)
    slower = len(found) - large - len(list(tried))
    return (
        f"of {len(found)} layouts {large} do not fit on paper and {slower} were not compiled: on "
        "paper they are slower than these"
    )
