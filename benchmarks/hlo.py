"""What a compiled XLA program sends and multiplies, by its text.

Shapes are those of one device. A program that XLA scheduled for a TPU names operands without their
shapes, so they are looked up.

What is in a loop counts as often as the loop runs, and not at all where XLA does not know how often
that is: there is the work that balanced routing does not need. Of a conditional all branches count.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

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

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_SHAPE = re.compile(r"\b(pred|bf16|c64|[suf]\d+)\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: str
    attributes: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a program.

    Attributes:
        sizes: bytes of each operand on one device.
        group: how many devices take part.
        times: how often it runs.
        scope: the JAX operation that it comes from, with its `named_scope`s; "" if XLA made it.
    """

    kind: str
    sizes: tuple[int, ...]
    group: int
    times: int
    scope: str

    @property
    def is_sum(self) -> bool:
        return self.kind == "all-reduce" and self.scope.rsplit("/", 1)[-1] in SUMS

    @property
    def sent(self) -> float:
        """Bytes that a device sends to others, by a ring for what is reduced or gathered.

        What a ragged all-to-all sends is in its operands at run time. It is counted for balanced
        routing: the smaller of its two buffers full, and a `group`-th of it for each device.
        """
        size = min(self.sizes[:2]) if self.kind == "ragged-all-to-all" else sum(self.sizes)
        away = (self.group - 1) / self.group
        factor = {
            "all-gather": self.group - 1,
            "all-reduce": 2 * away,
            "collective-permute": 1,
        }.get(self.kind, away)
        return size * factor * self.times


def nbytes(type_text: str) -> int:
    """Returns the bytes of a type, of a tuple those of all its parts; layout padding left out."""
    total = 0
    for dtype, dims in _SHAPE.findall(type_text):
        bits = BITS.get(dtype) or int(dtype.lstrip("suf"))
        total += bits * math.prod(int(n) for n in dims.split(",") if n)
    return total // 8


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the instructions of every computation of an HLO text, and the entry's name."""
    found: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line == "}":
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(_instruction(match[1], match[2]))
    return found, entry


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opening = rest.index("(", end)
    closing = _closing(rest, opening)
    opcode = rest[end:opening].strip()
    return Instruction(name, rest[:end], opcode, rest[opening + 1 : closing], rest[closing + 1 :])


def _closing(text: str, start: int) -> int:
    """Returns where the parenthesis that opens at `start` is closed."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"a parenthesis is never closed: {text[start : start + 80]!r}")


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction that a program runs: how often, its operands' types and its computation."""

    instruction: Instruction
    times: int
    types: tuple[str, ...]
    computation: str


def collectives(text: str) -> list[Collective]:
    """Returns the collectives that a program runs."""
    found = []
    for run in _runs(*computations(text), 1):
        kind = run.instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            # A TPU's reduce-scatter is a fusion of an all-reduce and the slice of it that is kept.
            fused = run.computation.startswith("all-reduce-scatter")
            sizes, attributes = tuple(map(nbytes, run.types)), run.instruction.attributes
            scope = re.search(r'op_name="([^"]*)"', attributes)
            kind = "reduce-scatter" if fused and kind == "all-reduce" else kind
            found.append(
                Collective(kind, sizes, _group(attributes), run.times, scope[1] if scope else "")
            )
    return found


def matmul_flops(text: str) -> int:
    """Returns the FLOPs of a program's products, and of kernels what they are said to have.

    A TPU's products are convolutions, batched ones over a dilated dimension.
    """
    total = 0
    for run in _runs(*computations(text), 1):
        attributes = run.instruction.attributes
        if run.instruction.opcode == "convolution":
            total += run.times * _convolution_flops(run)
        elif run.instruction.opcode == "dot":
            left = _dims(run.types[0])
            over = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", attributes)
            inner = [left[int(i)] for i in over[1].split(",") if i] if over else []
            total += run.times * 2 * math.prod(_dims(run.instruction.type) + inner)
        elif run.instruction.opcode == "custom-call":
            kernel = re.search(r'"cost_estimate":\{"flops":"(\d+)"', attributes)
            total += run.times * int(kernel[1]) if kernel else 0
    return total


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


def _runs(found: dict[str, list[Instruction]], name: str, times: int) -> Iterator[Run]:
    types = {i.name: i.type for i in found[name]}
    for i in found[name]:
        operands = tuple(types.get(o, "") for o in _OPERAND.findall(i.operands))
        yield Run(i, times, operands, name)
        if i.opcode == "while":
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', i.attributes)
            body = re.search(r"body=%?([\w.-]+)", i.attributes)
            if trips and body:
                yield from _runs(found, body[1], times * int(trips[1]))
        elif i.opcode in ("fusion", "call", "async-start", "conditional"):
            for inner in _called(i.attributes):
                yield from _runs(found, inner, times)


def _called(attributes: str) -> list[str]:
    one = r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)"
    branches = re.search(r"branch_computations=\{([^}]*)\}", attributes)
    return re.findall(one, attributes) + (_OPERAND.findall(branches[1]) if branches else [])


def _group(attributes: str) -> int:
    """Returns the devices of a replica group; 2 for a permutation, which has none."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(match[1].split(","))
    match = re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes)
    return int(match[1]) if match else 2
