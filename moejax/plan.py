"""`moejax plan`: the real train step compiled for a pod that is not here, and what it would cost.

XLA's compiler for TPUs or GPUs compiles `step.make_train_step` for the whole pod. Memory is what
the compiler reserved; FLOPs, memory traffic and collectives are read from the compiled program with
its loops multiplied out (`hlo_costs.py`, `hlo_traffic.py`). Seconds are estimates from those and
from the chip's data sheet (`topology.py`), and are printed as such.
"""

import dataclasses
import itertools
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moejax import hlo, hlo_costs, hlo_traffic
from moejax.config import AXES, EXPERT_AXES, FSDP_AXES, Config, ConfigError, MeshConfig
from moejax.data import Batch
from moejax.describe import (
    Placement,
    gathered_weight_bytes,
    is_layer_matrix,
    local_shape,
    placements,
    resolve_mesh,
)
from moejax.flops import flops_per_token
from moejax.loss import needs_whole_step
from moejax.mesh import make_mesh
from moejax.sharding import batch_sharding, gathered_axes
from moejax.step import make_train_step
from moejax.topology import Topology, topology_devices
from moejax.traffic import buffer_rows, exchange_bytes, itemsize, local_tokens, worst_rounds

PASSES = ("forward", "recomputed", "backward")
PLACES = (
    *("attention", "ffn", "route", "assign", "dispatch", "exchange", "experts", "exchange_back"),
    *("combine", "weights", "shared", "free_experts", "loss", "optimizer", "moe"),
)

# dispatch and combine send nothing: on several slices XLA loses the exchange's own name, and what
# stands next to it names it
EXCHANGE = ("dispatch", "exchange", "exchange_back", "combine")
BETWEEN = " between slices"  # behind the axes of a collective


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over one set of mesh axes, at one place of the step.

    Attributes:
        place: the innermost profiler scope; "other" where XLA names none.
        when: one of PASSES.
        calls: how many run in a step.
        sent: bytes that a device sends in a step.
        seconds: at the full speed of the links; see `link_seconds`.
    """

    kind: str
    axes: str
    place: str
    when: str
    calls: int
    sent: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Check:
    """Bytes that a device sends in a step, as compiled and by a formula; `expected` is above 0."""

    name: str
    formula: str
    sent: float
    expected: float


@dataclasses.dataclass(frozen=True)
class Part:
    """What one device computes at one place of the step.

    Attributes:
        place, when: as in `Traffic`.
        flops: of products.
        memory_bytes: read and written.
        cycles: that a TPU's compiler estimates; of a kernel, for which it has no estimate, its
            FLOPs at the chip's peak. 0 for a GPU.
    """

    place: str
    when: str
    flops: int
    memory_bytes: int
    cycles: float


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does in a step, the largest first."""

    parts: tuple[Part, ...]
    traffic: tuple[Traffic, ...]

    @property
    def flops(self) -> int:
        return sum(part.flops for part in self.parts)

    @property
    def memory_bytes(self) -> int:
        return sum(part.memory_bytes for part in self.parts)

    @property
    def cycles(self) -> float:
        return sum(part.cycles for part in self.parts)

    @property
    def wire_bytes(self) -> float:
        return sum(t.sent for t in self.traffic)

    @property
    def link_seconds(self) -> float:
        return sum(t.seconds for t in self.traffic)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a config would cost on a pod.

    Attributes:
        memory: bytes of one device by kind; their sum is `peak_bytes`.
        argument_bytes: the training state and one batch.
        work: for routing that fits its buffers. None where the program does not fit: then there is
            no program to read.
        overflow: the same where routing overflows once in every layer, with one further round.
        rounds: that the worst routing takes.
    """

    config: Config
    topology: Topology
    sizes: MeshConfig
    memory: Mapping[str, int]
    argument_bytes: int
    peak_bytes: int
    compile_seconds: float
    work: Work | None
    overflow: Work | None
    checks: tuple[Check, ...]
    rounds: int

    @property
    def fits(self) -> bool:
        return self.work is not None and self.peak_bytes <= self.topology.memory

    @property
    def tokens(self) -> int:
        return self.config.train.batch_size * self.config.data.sequence_length

    @property
    def roofline(self) -> dict[str, float]:
        """Seconds that a step takes at least, by what would limit it; the largest one does."""
        chip, work = self.topology.chip, self.work
        assert work is not None
        return {
            "compute": work.flops / chip.flops,
            "memory": work.memory_bytes / chip.bandwidth,
            "links": work.link_seconds,
        }

    @property
    def bound_by(self) -> str:
        return max(self.roofline, key=self.roofline.__getitem__)

    @property
    def seconds(self) -> tuple[float, float]:
        """The step, if all overlaps, and if nothing does.

        The second is the compiler's own estimate of a TPU's cycles, or compute and memory one after
        the other, and then the links.
        """
        line, work, clock = self.roofline, self.work, self.topology.chip.clock
        assert work is not None
        alone = line["compute"] + line["memory"]
        if clock is not None:
            alone = max(work.cycles / clock, line["compute"], line["memory"])
        return max(line.values()), alone + line["links"]

    def tokens_per_second(self, seconds: float) -> float:
        """Returns tokens/s of a chip."""
        return self.tokens / seconds / self.topology.num_chips

    @property
    def mfu_bound(self) -> float:
        """MFU if all overlaps: useful FLOPs over what the devices could do in that time."""
        useful = flops_per_token(self.config) * self.tokens
        peak = self.topology.chip.flops * self.sizes.num_devices
        return useful / peak / self.seconds[0]


# Compiling


def make_plan(config: Config, topology: Topology) -> Plan:
    """Compiles the train step of `config` for `topology` and reads what it costs.

    Call `topology.start_compiler` before JAX is imported.

    Raises:
        ConfigError: the pod or the mesh does not exist, or they do not fit each other; or XLA does
            not compile the step for another reason than its size.
    """
    devices = topology_devices(topology)
    sizes = resolve_mesh(config, len(devices))
    mesh = make_mesh(sizes, devices)
    step, state = make_train_step(config, mesh)
    start = time.monotonic()
    try:
        compiled = step.lower(state, abstract_batch(config, mesh)).compile()  # pyright: ignore[reportFunctionMemberAccess]
    except jax.errors.JaxRuntimeError as error:
        asked = _refused_bytes(str(error))
        if asked is None:
            raise ConfigError(
                f"XLA does not compile this step for {topology.name}: {_first_line(error)}; try "
                "another moe.transport or mesh"
            ) from error
        return _too_large(config, topology, sizes, *asked, time.monotonic() - start)
    seconds = time.monotonic() - start
    program = hlo.parse(compiled.as_text())
    stats = compiled.memory_analysis()
    memory = _memory_by_kind(
        config, sizes, program, stats.argument_size_in_bytes, _beside_arguments(stats, topology)
    )
    work, overflow = (_work(topology, mesh, program, trips) for trips in (0, 1))
    return Plan(
        config,
        topology,
        sizes,
        memory,
        stats.argument_size_in_bytes,
        sum(memory.values()),
        seconds,
        work,
        overflow,
        tuple(_checks(config, sizes, work.traffic)),
        worst_rounds(config, sizes),
    )


def abstract_batch(config: Config, mesh: Mesh) -> Batch:
    """Returns the shapes of a step's batch with their sharding: [accumulation, B, T] each."""
    accumulation = config.train.accumulation
    shape = (
        accumulation,
        config.train.batch_size // accumulation,
        config.data.sequence_length,
    )

    def array(dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))

    numbers = {name: array(np.int32) for name in Batch._fields}
    return Batch(**numbers | {"loss_mask": array(np.bool_)})


def _beside_arguments(stats: Any, topology: Topology) -> int:
    """Returns the bytes of temporaries, and of results that are not written over arguments.

    What libtpu 0.0.42 calls temporaries holds some of the arguments and results, which part differs
    between chips; its peak is that of all that is alive.
    """
    if topology.chip.is_tpu:
        return stats.peak_memory_in_bytes - stats.argument_size_in_bytes
    written = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.temp_size_in_bytes + written


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:300]


def _refused_bytes(message: str) -> tuple[int, bool] | None:
    """Returns the bytes that XLA says are too many, and whether arguments are among them.

    None where it refused a program for another reason.
    """
    asked = re.search(r"(Used |temporaries \()([\d.]+)([KMGT])", message)
    if "RESOURCE_EXHAUSTED" not in message or asked is None:
        return None
    amount = round(float(asked[2]) * 1024 ** (1 + "KMGT".index(asked[3])))
    return amount, asked[1] == "Used "


def _too_large(
    config: Config,
    topology: Topology,
    sizes: MeshConfig,
    asked: int,
    with_arguments: bool,
    seconds: float,
) -> Plan:
    """Returns the plan of a step for which XLA found no room: there is no program to read."""
    state = {
        kind: sum(row.per_device for row in rows)
        for kind, rows in placements(config, sizes).items()
        if kind != "gradients"
    }
    held = sum(state.values())
    peak = asked if with_arguments else asked + held
    memory = state | {"gradients, activations and all else": max(peak - held, 0)}
    rounds = worst_rounds(config, sizes)
    return Plan(config, topology, sizes, memory, held, peak, seconds, None, None, (), rounds)


def _memory_by_kind(
    config: Config, sizes: MeshConfig, program: hlo.Program, arguments: int, temporaries: int
) -> dict[str, int]:
    """Splits what the compiler reserved by what it is for.

    State and gradients have the sizes of their shardings, activations those of what the loops over
    layers carry, buffers those of `traffic.buffer_rows`. What is left is XLA's; where parts are not
    alive at the same time that can be nothing, and the last part is cut to what is there.
    """
    kinds = placements(config, sizes)
    state = {
        k: sum(row.per_device for row in rows) for k, rows in kinds.items() if k != "gradients"
    }
    rest = arguments - sum(state.values())
    memory = {**state, "batch and layout": max(rest, 0)}
    copies, saved = _layer_carries(config, sizes, program)
    copies = max(0, copies - _narrow_gradients(config, kinds["parameters"]))
    how = config.moe.transport_over(sizes.expert_degree)
    rows = buffer_rows(config, sizes, how) if config.num_moe_layers else 0
    parts = {
        "gradients": sum(row.per_device for row in kinds["gradients"]),
        "activations kept for backward": saved,
        f"weights in {config.model.dtype}": copies,
        "dispatch buffers of a layer": rows * config.model.d_model * itemsize(config),
        "a layer's experts, gathered": (
            gathered_weight_bytes(config, sizes) if config.num_moe_layers else 0
        ),
    }
    left = temporaries + min(rest, 0)
    for name, size in parts.items():
        memory[name] = min(size, left)
        left -= memory[name]
    return memory | {"XLA's other temporaries": left}


def _narrow_gradients(config: Config, parameters: Iterable[Placement]) -> int:
    """Returns the bytes of gradients in the compute dtype, which the loops over layers carry."""
    wide = np.dtype(config.model.param_dtype).itemsize
    matrices = sum(row.per_device for row in parameters if is_layer_matrix(row))
    return matrices * itemsize(config) // wide


def _layer_carries(config: Config, sizes: MeshConfig, program: hlo.Program) -> tuple[int, int]:
    """Returns bytes of weights copied to the compute dtype, and of activations kept for backward.

    Both are what a loop over layers carries with a leading dim of layers: the first have the shape
    of a parameter.
    """
    parameters = {
        local_shape(row.shape, row.spec, sizes) for row in placements(config, sizes)["parameters"]
    }
    dtype = {"float32": "f32", "bfloat16": "bf16"}[config.model.dtype]
    copied = config.model.dtype != config.model.param_dtype
    copies = saved = 0
    prefix = config.moe.first_dense if config.num_moe_layers else config.model.num_layers
    lengths = {prefix, *(stack.num_layers for stack, _ in config.moe_stacks())}
    for layers in lengths - {0, 1}:  # a loop that runs once is none
        found = [[0, 0]]
        for carried in hlo.loop_carries(program, layers):
            sums = [0, 0]
            for array in carried:
                name, shape = hlo.array_shape(array)
                if shape[:1] != (layers,):
                    continue
                if shape not in parameters:
                    sums[1] += hlo.nbytes(array)
                elif copied and name == dtype:
                    sums[0] += hlo.nbytes(array)
            found.append(sums)
        copies += max(s[0] for s in found)
        saved += max(s[1] for s in found)
    return copies, saved


# Reading the program


def _work(topology: Topology, mesh: Mesh, program: hlo.Program, unknown_trips: int) -> Work:
    chip = topology.chip
    by_place: dict[tuple[str, str], list[float]] = {}
    for cost in hlo_costs.costs(program, unknown_trips):
        cycles = float(cost.cycles)
        if cost.kernel and chip.clock is not None:
            cycles += cost.flops * chip.clock / chip.flops
        row = by_place.setdefault(place_and_pass(cost.scope), [0, 0, 0])
        for i, value in enumerate((cost.flops, cost.memory_bytes, cycles)):
            row[i] += value
    parts = [Part(*key, int(row[0]), int(row[1]), row[2]) for key, row in by_place.items()]
    traffic = _traffic(topology, mesh, hlo_traffic.collectives(program, unknown_trips))
    return Work(tuple(sorted(parts, key=lambda p: (-p.cycles, -p.flops))), traffic)


def _traffic(
    topology: Topology, mesh: Mesh, collectives: Iterable[hlo_traffic.Collective]
) -> tuple[Traffic, ...]:
    sizes = {axis: mesh.shape[axis] for axis in AXES}
    devices = list(mesh.devices.flat)
    rows: dict[tuple[str, str, str, str], list[float]] = {}
    for c in collectives:
        axes = " + ".join(c.axes(sizes)) + BETWEEN * _between_slices(topology, devices, c)
        key = (c.kind, axes, *place_and_pass(c.scope))
        row = rows.setdefault(key, [0, 0.0, 0.0])
        for i, value in enumerate((c.times, c.sent, link_seconds(topology, devices, c))):
            row[i] += value
    found = [Traffic(*key, int(row[0]), row[1], row[2]) for key, row in rows.items()]
    return tuple(sorted(found, key=lambda t: -t.sent))


def _between_slices(topology: Topology, devices: Sequence[Any], c: hlo_traffic.Collective) -> bool:
    """Whether a collective of TPUs leaves their slice; the devices of one slice have no number."""
    members = [devices[i] for i in c.groups[0]]
    return topology.slices > 1 and len({device.slice_index for device in members}) > 1


def place_and_pass(scope: str) -> tuple[str, str]:
    """Returns where in the step an operation stands, and in which pass, from its scope."""
    words = re.split(r"[/()]+", scope)
    place = next((word for word in reversed(words) if word in PLACES), "other")
    if "rematted_computation" in words:
        return place, "recomputed"
    return place, "backward" if "transpose" in words else "forward"


def link_seconds(topology: Topology, devices: Sequence[Any], c: hlo_traffic.Collective) -> float:
    """Returns the seconds of a collective at the full speed of the links, alone on them.

    On a torus, with W the bytes/s of a ring both ways: what is sent over the sum of W of the
    dimensions that the group spans; an all-to-all takes V * A / (4 * W), of V bytes a device over a
    longest dimension of A ("How To Scale Your Model", chapter 3). Where a dimension is a line and
    not a ring, or only a part of it is taken, the half of W. GPUs send at the speed of NVLink
    inside a host. Between hosts a ring goes over the network of all GPUs of the group at a host; of
    an all-to-all each sends over its own what is for other hosts, and by NVLink what is not.
    """
    chip, members = topology.chip, [devices[i] for i in c.groups[0]]
    if not chip.is_tpu:
        per_host = topology.shape[1]
        hosts = [d.id // per_host for d in members]
        if len(set(hosts)) == 1:
            return c.sent / chip.link
        assert chip.network is not None
        if "all-to-all" in c.kind:
            part, here = c.size * c.times / c.group, min(map(hosts.count, hosts))
            return max((here - 1) * part / chip.link, (c.group - here) * part / chip.network)
        nics = len(hosts) / len(set(hosts))
        return max(c.sent / chip.link, c.sent / (chip.network * nics))
    if _between_slices(topology, devices, c):
        assert chip.network is not None
        return c.sent / chip.network
    places = np.array([d.coords[: chip.dims] for d in members])
    spans = [len(set(places[:, dim])) for dim in range(chip.dims)]
    if max(spans) == 1:
        return 0.0  # two devices of one chip
    rings = [topology.wraps(dim) and span == topology.shape[dim] for dim, span in enumerate(spans)]
    speeds = [chip.link * (2 if ring else 1) for ring in rings]
    if c.kind == "collective-permute":
        return c.sent / chip.link
    if "all-to-all" in c.kind:
        slowest = max(s / (4 * w) for s, w in zip(spans, speeds, strict=True) if s > 1)
        return c.size * c.times * slowest
    return c.sent / sum(w for s, w in zip(spans, speeds, strict=True) if s > 1)


def exchange_passes(config: Config) -> float:
    """Returns how often a step sends `traffic.exchange_bytes`.

    Where remat repeats the exchange it is the way there alone; Soft MoE mixes what comes back by
    weights, whose gradient needs it.
    """
    remat, ahead = config.model.remat, forwards_ahead(config)
    if remat == "none" or remat.startswith("exchange"):
        return 2 + ahead
    return ahead + (3 if config.moe.router == "soft" else 2.5)


def forwards_ahead(config: Config) -> int:
    """Returns how often a step runs forward before its gradients, for sums of all microbatches."""
    needed = config.num_moe_layers > 0 and needs_whole_step(config.moe)
    return int(config.train.accumulation > 1 and needed)


def _checks(config: Config, sizes: MeshConfig, traffic: Sequence[Traffic]) -> Iterable[Check]:
    """Yields what the compiled step sends next to what formulas say that it has to."""
    moe, steps = config.moe, config.train.accumulation
    again = (config.model.remat != "none") + forwards_ahead(config)
    degree = sizes.expert_degree
    experts = _joined(EXPERT_AXES, sizes)[-1:]

    def sent(axes: Sequence[str], kinds: Sequence[str], exchange: bool) -> float:
        found = (t for t in traffic if t.axes in axes and t.kind in kinds)
        return sum(t.sent for t in found if (t.place in EXCHANGE) == exchange)

    if config.num_moe_layers and degree > 1:
        how = moe.transport_over(degree)
        token = exchange_bytes(config, sizes, how)  # 0 where every device has all experts
        rows = local_tokens(config, sizes) * config.num_moe_layers * steps
        kinds = ("all-to-all", "ragged-all-to-all", "all-gather", "reduce-scatter", "all-reduce")
        measured = sent(experts, kinds, True)
        passes = exchange_passes(config)
        formula = f"{passes:g} passes of moejax.traffic's {how}"
        if token:
            yield Check("exchange over expert", formula, measured, token * rows * passes)
    if sizes.fsdp_degree > 1:
        rows = placements(config, sizes)["parameters"]
        width = itemsize(config)
        layers = ends = 0
        for row in rows:
            over = math.prod(getattr(sizes, axis) for axis in gathered_axes(row.spec))
            local = math.prod(local_shape(row.shape, row.spec, sizes)) * width
            if row.name.startswith(("prefix", "runs")):
                layers += local * (over - 1)
            else:
                ends += local * (over - 1)
        passes = 1 + again
        yield Check(
            "weights over fsdp",
            f"all-gather, {passes} a layer" if again else "all-gather once",
            sent(_joined(FSDP_AXES, sizes), ("all-gather",), False),
            (passes * layers + ends) * steps,
        )
        yield Check(
            "gradients over fsdp",
            "reduce-scatter once",
            sent(_joined(FSDP_AXES, sizes), ("reduce-scatter", "all-reduce"), False),
            (layers + ends) * steps,
        )


def _joined(axes: Sequence[str], sizes: MeshConfig) -> list[str]:
    """Returns how `Traffic.axes` names groups along some of the axes, all of them last."""
    split = [axis for axis in axes if getattr(sizes, axis) > 1]
    numbers = range(1, len(split) + 1)
    return [" + ".join(some) for n in numbers for some in itertools.combinations(split, n)]
