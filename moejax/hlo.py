"""Reads the text of a compiled XLA program: its instructions, and how often each of them runs.

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

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
_SHAPE = re.compile(r"\b(pred|bf16|c64|f8\w+|[suf]\d+)\[([\d,]*)\](\{[^}]*\})?")
_OPERAND = re.compile(r"%([\w.-]+)")


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
                for inner in called(i.attributes):
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


def called(attributes: str) -> list[str]:
    """Returns the computations that an instruction calls, a loop's left out."""
    one = r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)"
    branches = re.search(r"branch_computations=\{([^}]*)\}", attributes)
    return re.findall(one, attributes) + (_OPERAND.findall(branches[1]) if branches else [])


def dims(type_text: str) -> list[int]:
    """Returns the dims of an array's type."""
    match = _SHAPE.search(type_text)
    return [int(n) for n in match[2].split(",") if n] if match else []


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
    return match[1], tuple(dims(type_text))
