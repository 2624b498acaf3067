"""What a compiled XLA program sends, multiplies and moves through memory, by its text.

Shapes are those of one device. A program that XLA scheduled for a TPU names operands without their
shapes, so they are looked up.

What is in a loop counts as often as the loop runs. Where XLA does not know how often that is, it
counts `unknown_trips` times: 0 leaves out the work that balanced routing does not need, 1 is
routing that overflows once. Of a conditional all branches count.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

BITS = {"pred": 8, "bf16": 16, "c64": 64}  # others end in their number of bits
KINDS = (
    "all-to-all",
    "ragged-all-to-all",
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "collective-permute",
)
SUMS = ("psum", "psum_invariant", "pmax")  # statistics, and gradients of what is replicated
ENDLESS = 10**14  # what XLA writes for cycles that it does not know is above this

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
_SHAPE = re.compile(r"\b(pred|bf16|c64|f8\w+|[suf]\d+)\[([\d,]*)\](\{[^}]*\})?")
_OPERAND = re.compile(r"%([\w.-]+)")
_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = type opcode(operands), attributes`; `root` is what its computation gives."""

    name: str
    type: str
    opcode: str
    operands: str
    attributes: str
    root: bool

    @property
    def operation(self) -> str:
        """The opcode; of the start of an asynchronous operation that of the operation."""
        return self.opcode.removesuffix("-start")

    @property
    def result(self) -> str:
        """The type of what it makes: of a start without its operands and the compiler's own parts.

        A start has the type (operands, result, ...), only a copy's is (result, operand, ...) and an
        all-reduce's the result alone.
        """
        if not self.opcode.endswith("-start") or self.operation == "all-reduce":
            return self.type
        return _tuple_parts(self.type)[0 if self.operation == "copy" else 1]

    @property
    def inputs(self) -> list[str]:
        return _OPERAND.findall(self.operands)

    @property
    def scope(self) -> str:
        scope = re.search(r'op_name="([^"]*)"', self.attributes)
        return scope[1] if scope else ""


@dataclasses.dataclass(frozen=True)
class Program:
    """The instructions of every computation, the entry's name, and how many devices run it."""

    computations: dict[str, list[Instruction]]
    entry: str
    devices: int

    @functools.cached_property
    def types(self) -> dict[str, dict[str, str]]:
        """The type of every instruction, by computation and name."""
        return {c: {i.name: i.type for i in found} for c, found in self.computations.items()}

    def trips(self, loop: Instruction, unknown_trips: int) -> int:
        """Returns how often a loop runs: as XLA notes it, or by its condition `i < constant`.

        A loop that JAX makes starts at 0 and goes in steps of 1.
        """
        noted = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if noted:
            return int(noted[1])
        condition = re.search(r"condition=%?([\w.-]+)", loop.attributes)
        instructions = self.computations[condition[1]] if condition else []
        by_name = {i.name: i for i in instructions}
        for i in instructions:
            if i.root and i.opcode == "compare" and "direction=LT" in i.attributes:
                limit = by_name[i.inputs[1]]
                if limit.opcode == "constant":
                    return int(limit.operands)
        return unknown_trips

    def runs(self, unknown_trips: int = 0) -> Iterator["Run"]:
        """Yields every instruction that runs, those inside a fusion too."""
        return self._runs(self.entry, 1, unknown_trips, "", None)

    def _runs(
        self, name: str, times: int, unknown_trips: int, loop: str, fusion: Instruction | None
    ) -> Iterator["Run"]:
        types = self.types[name]
        for i in self.computations[name]:
            yield Run(i, times, tuple(types.get(o, "") for o in i.inputs), name, loop, fusion)
            if i.opcode == "while":
                trips = times * self.trips(i, unknown_trips)
                body = re.search(r"body=%?([\w.-]+)", i.attributes)
                if body and trips:
                    inside = i.scope or loop
                    yield from self._runs(body[1], trips, unknown_trips, inside, fusion)
            elif i.operation in ("fusion", "call", "async", "conditional"):
                around = i if fusion is None and i.operation == "fusion" else fusion
                for inner in _called(i.attributes):
                    yield from self._runs(inner, times, unknown_trips, loop, around)

    def scope(self, run: "Run") -> str:
        """Returns the JAX operation that `run` comes from, with its `named_scope`s.

        What XLA made of several has none of its own: then that of the fusion around it, or of the
        sum that it takes within the loop that it stands in, or "". Collectives within one slice of
        several have lost theirs too: then that of what makes their operands.
        """
        reducer = re.search(r"to_apply=%?([\w.-]+)", run.instruction.attributes)
        near = [run.instruction, *([run.fusion] if run.fusion else [])]
        near += [i for i in self.computations.get(reducer[1], []) if i.root] if reducer else []
        if run.instruction.operation in KINDS and not run.instruction.scope:
            near += self._makers(run)
        found = next((scope for i in near if (scope := i.scope)), "")
        return found if found.startswith("jit(") or not run.loop else f"{run.loop}/{found}"

    @functools.cached_property
    def _by_name(self) -> dict[str, dict[str, Instruction]]:
        return {c: {i.name: i for i in found} for c, found in self.computations.items()}

    def _makers(self, run: "Run") -> Iterator[Instruction]:
        """Yields what makes the operands of `run`, the nearest first, within its computation."""
        by_name = self._by_name[run.computation]
        names, seen = run.instruction.inputs, set()
        while names:
            found = [by_name[n] for n in dict.fromkeys(names) if n in by_name and n not in seen]
            yield from found
            seen.update(i.name for i in found)
            names = [n for i in found for n in i.inputs]


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction that a program runs: how often, its operands' types, where it stands."""

    instruction: Instruction
    times: int
    types: tuple[str, ...]
    computation: str
    loop: str  # scope of the loop that it is inside of, or ""
    fusion: Instruction | None  # that it is inside of: what it reads and writes stays on the chip


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a program.

    Attributes:
        sizes: bytes of each operand on one device.
        groups: int [groups, devices of a group]: numbers of devices in the program's order; of a
            permutation pairs of a sender and its receiver.
        times: how often it runs.
        scope: see `Program.scope`.
    """

    kind: str
    sizes: tuple[int, ...]
    groups: np.ndarray
    times: int
    scope: str

    @property
    def group(self) -> int:
        return self.groups.shape[1]

    @property
    def is_sum(self) -> bool:
        return self.kind == "all-reduce" and self.scope.rsplit("/", 1)[-1] in SUMS

    @property
    def size(self) -> int:
        """Bytes of all operands on one device.

        What a ragged all-to-all sends is in its operands at run time. It is counted for balanced
        routing: the smaller of its two buffers full.
        """
        return min(self.sizes[:2]) if self.kind == "ragged-all-to-all" else sum(self.sizes)

    @property
    def sent(self) -> float:
        """Bytes that a device sends to others, by a ring for what is reduced or gathered.

        Of an all-to-all a `group`-th of the buffer goes to each device.
        """
        away = (self.group - 1) / self.group
        factor = {
            "all-gather": self.group - 1,
            "all-reduce": 2 * away,
            "collective-permute": 1,
        }.get(self.kind, away)
        return self.size * factor * self.times

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """Returns the axes of a mesh along which the devices of a group differ.

        Args:
            mesh: sizes by axis, for devices in the order of the program's.
        """
        places = np.stack(np.unravel_index(self.groups, tuple(mesh.values())))
        moves = (places != places[..., :1]).any(axis=(1, 2))
        return tuple(axis for axis, along in zip(mesh, moves, strict=True) if along)


def nbytes(type_text: str, *, memory_only: bool = False) -> int:
    """Returns the bytes of a type, of a tuple those of all its parts; layout padding left out.

    With `memory_only` without what a TPU's layout puts in on-chip memory, marked S(1) and up.
    """
    total = 0
    for dtype, dims, layout in _SHAPE.findall(type_text):
        if memory_only and re.search(r"S\([1-9]", layout):
            continue
        bits = BITS.get(dtype) or (8 if dtype.startswith("f8") else int(dtype.lstrip("suf")))
        total += bits * math.prod(int(n) for n in dims.split(",") if n)
    return total // 8


def _tuple_parts(type_text: str) -> list[str]:
    """Returns the types in a tuple's type; a layout has commas and parentheses of its own."""
    parts, depth = [""], 0
    for char in type_text[1:-1]:
        depth += (char in "({[") - (char in ")}]")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def parse(text: str) -> Program:
    """Returns the program that an HLO text spells."""
    found: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line == "}":
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(_instruction(match[2], match[3], bool(match[1])))
        elif current:  # a kernel's metadata goes on over lines
            last = current[-1]
            current[-1] = dataclasses.replace(last, attributes=last.attributes + line)
    devices = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
    return Program(found, entry, int(devices[1]) if devices else 1)


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opening = rest.index("(", end)
    closing = _closing(rest, opening)
    opcode = rest[end:opening].strip()
    operands, attributes = rest[opening + 1 : closing], rest[closing + 1 :]
    return Instruction(name, rest[:end], opcode, operands, attributes, root)


def _closing(text: str, start: int) -> int:
    """Returns where the parenthesis that opens at `start` is closed."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"a parenthesis is never closed: {text[start : start + 80]!r}")


def _called(attributes: str) -> list[str]:
    one = r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)"
    branches = re.search(r"branch_computations=\{([^}]*)\}", attributes)
    return re.findall(one, attributes) + (_OPERAND.findall(branches[1]) if branches else [])


# What is sent


def collectives(program: Program, unknown_trips: int = 0) -> list[Collective]:
    """Returns the collectives that a program runs."""
    found, parts = [], set()
    for run in program.runs(unknown_trips):
        kind = run.instruction.operation
        if kind == "send" and (between := _between_slices(run, program)):
            found.append(between)
        if kind not in KINDS:
            continue
        # A TPU's reduce-scatter is a fusion of an all-reduce and the slice of it that is kept.
        if kind == "all-reduce" and run.computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        attributes = run.instruction.attributes
        # One that overlaps with work stands in several fusions, under one channel of its own.
        channel = re.search(r"channel_id=(\d+)", attributes)
        if run.fusion and channel and channel[1] != "1":
            if (kind, channel[1]) in parts:
                continue
            parts.add((kind, channel[1]))
        sizes = tuple(map(nbytes, run.types))
        groups = _groups(attributes, program.devices)
        found.append(Collective(kind, sizes, groups, run.times, program.scope(run)))
    return found


def _between_slices(run: Run, program: Program) -> Collective | None:
    """Returns what a TPU sends to other slices, which its runtime does from the host.

    Devices of the same number in each slice make a group; the program is that of one slice.
    """
    attributes = run.instruction.attributes
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', attributes)
    slices = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', attributes)
    if kind is None or slices is None:
        return None
    first, _, last = slices[1].partition(":")
    number = int(last) - int(first) + 1 if last else len(slices[1].split(","))
    groups = np.arange(number)[None] * program.devices
    name = kind[1].lower().replace("_", "-")
    return Collective(name, (nbytes(run.types[0]),), groups, run.times, program.scope(run))


def _groups(attributes: str, devices: int) -> np.ndarray:
    """Returns int [groups, devices of a group], from any of the ways in which XLA writes them."""
    if match := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", attributes):
        return _listed(match[1])
    if match := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes):
        return _listed(match[1])
    if match := re.search(r"replica_groups=(\[\d+,\d+\]<=\S+?),? ", attributes + " "):
        return _iota(match[1])
    named = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}"
    if match := re.search(named, attributes):
        return _by_axes(match[1], match[2], match[3])
    return np.arange(devices)[None]


def _listed(text: str) -> np.ndarray:
    rows = re.findall(r"\{([\d,]+)\}", text)
    return np.array([[int(n) for n in row.split(",")] for row in rows])


def _iota(text: str) -> np.ndarray:
    """Reads `[2,4]<=[4,2]T(1,0)`: numbers in a [4, 2], its axes swapped, as [2, 4]."""
    match = _IOTA.match(text)
    assert match is not None, text
    shape, start, order = (
        [int(n) for n in part.split(",")] if part else [] for part in match.groups()
    )
    numbers = np.arange(math.prod(shape)).reshape(start or shape)
    numbers = numbers.transpose(order) if order else numbers
    return numbers.reshape(shape) if start else numbers.reshape(-1)


def _by_axes(sizes: str, devices: str | None, axes: str) -> np.ndarray:
    """Reads `mesh['a'=2,'b'=4] {'b'}`, also with an order of its devices or a part of an axis.

    `'a':(2)4` is the axis of size 4 that lies within `a`, inside of an outer one of size 2.
    """
    shape = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
    asked = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)
    dims: list[int] = []
    inside: list[bool] = []
    for name, size in shape.items():
        part = next((a for a in asked if a[0] == name), None)
        if part is None or not part[1]:
            dims.append(size)
            inside.append(part is not None)
        else:
            outer, middle = int(part[1]), int(part[2])
            dims += [outer, middle, size // outer // middle]
            inside += [False, True, False]
    numbers = np.arange(math.prod(dims)) if devices is None else _iota(devices)
    numbers = numbers.reshape(dims)
    last = [i for i, along in enumerate(inside) if along]
    first = [i for i, along in enumerate(inside) if not along]
    group = math.prod(dims[i] for i in last)
    return numbers.transpose(first + last).reshape(-1, group)


# What is computed


@dataclasses.dataclass(frozen=True)
class Cost:
    """What an instruction costs over all its runs.

    Attributes:
        scope: see `Program.scope`.
        flops: of products; of a kernel what it is said to have, and of the attention kernel, which
            does not say, what a causal half of its scores needs: more than a window. A TPU's
            products are convolutions, batched ones over a dilated dimension, a GPU's are calls of
            cuBLAS.
        kernel: whether it is a kernel, which XLA estimates no cycles for.
        memory_bytes: read from and written to the device's memory: outside a fusion the operands
            and the result. Of an operand that is only sliced the slices count, of a result that is
            an operand with a slice replaced the slice. What a TPU keeps on the chip does not count.
        cycles: that a TPU's compiler estimates.
    """

    scope: str
    flops: int
    kernel: bool
    memory_bytes: int
    cycles: int


def costs(program: Program, unknown_trips: int = 0) -> Iterator[Cost]:
    """Yields what the instructions of a program cost, those that cost nothing left out."""
    for run in program.runs(unknown_trips):
        flops, kernel = _flops(run)
        moved, cycles = _memory_bytes(program, run), _cycles(run)
        if flops or moved or cycles:
            times = run.times
            yield Cost(program.scope(run), times * flops, kernel, times * moved, times * cycles)


def matmul_flops(program: Program, unknown_trips: int = 0) -> int:
    """Returns the FLOPs of a program's products and kernels; see `Cost`."""
    return sum(cost.flops for cost in costs(program, unknown_trips))


def _flops(run: Run) -> tuple[int, bool]:
    attributes = run.instruction.attributes
    if run.instruction.opcode == "convolution":
        return _convolution_flops(run), False
    if run.instruction.opcode == "dot":
        left = _dims(run.types[0])
        over = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", attributes)
        inner = [left[int(i)] for i in over[1].split(",") if i] if over else []
        return 2 * math.prod(_dims(run.instruction.type) + inner), False
    if '"__cublas$' in attributes:
        over = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', attributes)
        inner = [_dims(run.types[0])[int(i)] for i in re.findall(r"\d+", over[1] if over else "")]
        return 2 * math.prod(_dims(run.instruction.type) + inner), False
    if run.instruction.opcode == "custom-call":
        kernel = re.search(r'"cost_estimate":\{"flops":"(\d+)"', attributes)
        flops = int(kernel[1]) if kernel else _attention_flops(run)
        return flops, flops > 0
    return 0, False


# Of products with the width of a key and with that of a value, in each of splash attention's
# kernels: scores and values; scores, gradients of weights and queries; and those of keys and values
_ATTENTION_PRODUCTS = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}


def _attention_flops(run: Run) -> int:
    kernel = re.match(r"splash_m[hq]a_(fwd|dq|dkv)_", run.instruction.name)
    if kernel is None:
        return 0
    query, key, value = [_dims(t) for t in run.types if t.startswith(("bf16", "f32"))][:3]
    by_key, by_value = _ATTENTION_PRODUCTS[kernel[1]]
    seen = math.prod(query[:-1]) * key[-2] // 2
    return 2 * seen * (by_key * query[-1] + by_value * value[-1])


def _cycles(run: Run) -> int:
    estimate = re.search(r'"estimated_cycles":"(\d+)"', run.instruction.attributes)
    return int(estimate[1]) if estimate and int(estimate[1]) < ENDLESS else 0


def _convolution_flops(run: Run) -> int:
    attributes = run.instruction.attributes
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels is not None
    left, right = (_dims(t) for t in run.types)
    out = _dims(run.instruction.type)
    flops = 2 * out[labels[3].index("b")] * out[labels[3].index("f")] * right[labels[2].index("i")]
    for n, label in enumerate(sorted(set(labels[1]) - set("bf"))):
        sizes = left[labels[1].index(label)], out[labels[3].index(label)]
        flops *= _window_products(*sizes, **_window(attributes, n))
    return flops


def _window(attributes: str, n: int) -> dict[str, int]:
    """Returns what the window of a convolution is in spatial dimension `n`."""
    match = re.search(r"window=\{([^}]*)\}", attributes)
    written = dict(field.split("=") for field in match[1].split()) if match else {}
    values = {key: text.split("x")[n] for key, text in written.items()}
    numbers = {
        key: int(values.get(key, 1)) for key in ("size", "stride", "lhs_dilate", "rhs_dilate")
    }
    return numbers | {"pad": int(values.get("pad", "0_0").split("_")[0])}


def _window_products(
    left: int, out: int, *, size: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Returns how many products one spatial dimension takes; zeros of a dilation are none."""
    places = (o * stride - pad + w * rhs_dilate for o in range(out) for w in range(size))
    return sum(p % lhs_dilate == 0 and 0 <= p // lhs_dilate < left for p in places)


def _dims(type_text: str) -> list[int]:
    match = _SHAPE.search(type_text)
    return [int(n) for n in match[2].split(",") if n] if match else []


# What moves through memory

_MOVES_NOTHING = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "async", "after-all", "iota", "partition-id", "replica-id", "opt-barrier"),
)
_SLICES = ("dynamic-slice", "slice", "gather")


def _memory_bytes(program: Program, run: Run) -> int:
    i = run.instruction
    # What is asynchronous counts where it starts.
    if run.fusion or i.operation in _MOVES_NOTHING or i.opcode.endswith(("-update", "-done")):
        return 0
    return _read_bytes(program, run) + _written_bytes(program, run)


def _read_bytes(program: Program, run: Run) -> int:
    operation = run.instruction.operation
    if operation in _SLICES:
        # As large as the result, which may lie on the chip while the operand does not.
        on_chip = not nbytes(run.types[0], memory_only=True)
        return 0 if on_chip else nbytes(run.instruction.result)
    if operation == "dynamic-update-slice":
        return nbytes(run.types[1], memory_only=True)
    if operation != "fusion":
        return sum(nbytes(t, memory_only=True) for t in run.types)
    (inner,) = _called(run.instruction.attributes)
    return sum(
        _used_bytes(program, inner, index, nbytes(t, memory_only=True))
        for index, t in enumerate(run.types)
    )


def _used_bytes(program: Program, computation: str, index: int, whole: int) -> int:
    """Returns how much of parameter `index`, of `whole` bytes, a fused computation reads."""
    instructions = program.computations[computation]
    parameter = next(i for i in instructions if _is_parameter(i, index))
    return min(whole, _needed_bytes(program, computation, parameter.name, whole))


def _needed_bytes(program: Program, computation: str, name: str, whole: int) -> int:
    total = 0
    for user in program.computations[computation]:
        if name not in user.inputs:
            continue
        if user.opcode in _SLICES:
            total += nbytes(user.type)
        elif user.opcode == "dynamic-update-slice" and user.inputs[0] == name:
            continue  # what is not replaced stays where it is
        elif user.opcode == "bitcast":
            total += _needed_bytes(program, computation, user.name, whole)
        elif user.opcode == "fusion":
            (inner,) = _called(user.attributes)
            places = [n for n, operand in enumerate(user.inputs) if operand == name]
            total += sum(_used_bytes(program, inner, n, whole) for n in places)
        else:
            return whole
    return total


def _written_bytes(program: Program, run: Run) -> int:
    operation = run.instruction.operation
    if operation == "dynamic-update-slice":
        return nbytes(run.types[1], memory_only=True)
    written = nbytes(run.instruction.result, memory_only=True)
    if operation != "fusion" or not written:
        return written
    (inner,) = _called(run.instruction.attributes)
    return min(written, _made_bytes(program, inner))


def _made_bytes(program: Program, computation: str) -> int:
    """Returns the bytes that a fused computation makes anew."""
    by_name = {i.name: i for i in program.computations[computation]}
    root = next(i for i in by_name.values() if i.root)
    parts = [by_name[name] for name in root.inputs] if root.opcode == "tuple" else [root]
    total = 0
    for part in parts:
        while part.opcode == "bitcast":
            part = by_name[part.inputs[0]]
        if part.opcode == "dynamic-update-slice":
            total += nbytes(by_name[part.inputs[1]].type)
        elif part.opcode == "fusion":
            (inner,) = _called(part.attributes)
            total += min(nbytes(part.type), _made_bytes(program, inner))
        else:
            total += nbytes(part.type)
    return total


def _is_parameter(instruction: Instruction, index: int) -> bool:
    return instruction.opcode == "parameter" and instruction.operands == str(index)


def loop_carries(program: Program, trips: int) -> list[list[str]]:
    """Returns, for each loop that runs `trips` times, the types of the arrays that it carries."""
    loops = [i for found in program.computations.values() for i in found if i.opcode == "while"]
    return [
        [match[0] for match in _SHAPE.finditer(loop.type)]
        for loop in loops
        if program.trips(loop, 0) == trips
    ]


def array_shape(type_text: str) -> tuple[str, tuple[int, ...]]:
    """Returns the dtype as HLO spells it and the dims of an array's type."""
    match = _SHAPE.search(type_text)
    assert match is not None, type_text
    return match[1], tuple(_dims(type_text))
