"""What a compiled XLA program sends between devices, by its text; see `hlo.py`."""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from moejax.hlo import KINDS, Program, Run, nbytes

SUMS = ("psum", "psum_invariant", "pmax")  # statistics, and gradients of what is replicated
_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")


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
