"""How much of a fault is made: in CI, on the page, in the long run."""

from typing import NamedTuple

EXAMPLES = 1000  # of malformed configs and inputs, each kind


class Size(NamedTuple):
    """How often the faults are made that are made often."""

    kills: int
    flips: int
    writers: int
    cycles: int


SIZES = {
    "short": Size(kills=10, flips=100, writers=4, cycles=40),
    "full": Size(kills=50, flips=100, writers=20, cycles=200),
    "long": Size(kills=200, flips=100, writers=20, cycles=200),
}
