"""The batches that a training passes over, as ranges: `120-180,512`. No JAX."""

import dataclasses
import re

from moejax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class SkipList:
    """Batches, by their index in the order of the data, that no step sees.

    ranges: (first, stop), sorted, with a batch that is seen between any two.
    """

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def parse(cls, text: str | None) -> "SkipList":
        """Reads `120-180,512`, where 180 is passed over too; None is the empty list.

        Raises:
            ConfigError: it is not such a list.
        """
        found = []
        for part in text.split(",") if text else ():
            match = re.fullmatch(r"\s*(\d{1,10})\s*(?:-\s*(\d{1,10})\s*)?", part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if last < first:
                raise ConfigError(
                    f"{part!r} is not a range of batches; give indices and ranges with the lower "
                    "one first, for example 120-180,512"
                )
            found.append((first, last + 1))
        return cls._merged(found)

    @classmethod
    def _merged(cls, ranges: list[tuple[int, int]]) -> "SkipList":
        apart: list[tuple[int, int]] = []
        for first, stop in sorted(ranges):
            if apart and first <= apart[-1][1]:
                start, end = apart.pop()
                first, stop = start, max(end, stop)
            apart.append((first, stop))
        return cls(tuple(apart))

    def __str__(self) -> str:
        """What `parse` reads."""
        return ",".join(f"{a}-{b - 1}" if b - a > 1 else f"{a}" for a, b in self.ranges)

    def add(self, first: int, stop: int) -> "SkipList":
        """Returns the list with the batches first to stop - 1 too."""
        return self._merged([*self.ranges, (first, stop)])

    def union(self, other: "SkipList") -> "SkipList":
        """Returns the list of what is in either."""
        return self._merged([*self.ranges, *other.ranges])

    def before(self, index: int) -> "SkipList":
        """Returns the part of the list below `index`."""
        return SkipList(tuple((a, min(b, index)) for a, b in self.ranges if a < index))

    def batch(self, finished: int) -> int:
        """Returns the index of the batch after `finished` steps: number `finished` of the rest."""
        index = finished
        for first, stop in self.ranges:
            if index < first:
                break
            index += stop - first
        return index


def resumed_list(stored: SkipList, asked: SkipList, finished: int) -> SkipList:
    """Returns the list with which a run goes on after `finished` steps.

    What a run passed over, or was going to, stays; what the config adds lies ahead, for the batches
    behind were seen.

    Raises:
        ConfigError: the config adds batches that the run has seen.
    """
    position = stored.batch(finished)
    behind = asked.before(position)
    if stored.union(behind) != stored:
        raise ConfigError(
            f"watch.skip_batches={asked} has batches that the first {finished} steps of this run "
            f"have seen; only batches from {position} on can still be left out, or start from an "
            "earlier checkpoint"
        )
    return stored.union(asked)
