"""The points of a sweep: each name that is varied, with its value.

A point is plain data, so that it can be stored and compared; `sweep_runs.py` makes it a training.
"""

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

from moejax.errors import require
from moejax.sweep_space import Between, Chain, Grid, Product, Random, Sweep, choices

MOST_TRIALS = 100_000  # of a list of points: more is a mistake

Point = dict[str, Any]  # by the name of what is varied: a value, or the name of a case


def points(sweep: Sweep) -> Iterator[Point]:
    """Yields the points of a sweep that is not adaptive, in order, each once.

    Raises:
        ConfigError: there are more than `MOST_TRIALS`.
    """
    seen = set()
    for number, point in enumerate(_points(sweep, sweep.space)):
        require(number < MOST_TRIALS, f"the sweep has more than {MOST_TRIALS} points; try fewer")
        kept = held(sweep, point)
        if (key := point_key(kept)) not in seen:
            seen.add(key)
            yield kept


def _points(sweep: Sweep, space: Any) -> Iterator[Point]:
    if isinstance(space, Chain):
        for part in space.spaces:
            yield from _points(sweep, part)
    elif isinstance(space, Product):
        parts = [list(_points(sweep, part)) for part in space.spaces]
        for combination in itertools.product(*parts):
            yield {name: value for part in combination for name, value in part.items()}
    elif isinstance(space, Random):
        generator = random.Random(space.seed)
        for _ in range(space.trials):
            yield draw(space.values, generator)
    else:
        lists = [choices(values, name) for name, values in space.values.items()]
        rows = itertools.product(*lists) if isinstance(space, Grid) else zip(*lists, strict=True)
        for row in rows:
            yield dict(zip(space.values, row, strict=True))


def draw(values: Mapping[str, Any], generator: random.Random) -> Point:
    """Returns a point of all names: a condition may look at another part of a product."""
    point = {}
    for name, domain in values.items():
        if isinstance(domain, Between):
            point[name] = _draw_between(domain, generator)
        else:
            point[name] = generator.choice(choices(domain, name))
    return point


def _draw_between(domain: Between, generator: random.Random) -> float:
    low, high = domain.low, domain.high
    if domain.step is not None:
        return low + domain.step * generator.randint(0, int((high - low) / domain.step + 1e-9))
    if domain.log:
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
    elif domain.whole:
        return generator.randint(int(low), int(high))
    else:
        value = generator.uniform(low, high)
    return round(value) if domain.whole else value


def applies(sweep: Sweep, name: str, point: Mapping[str, Any]) -> bool:
    """Says whether the conditions let `name` vary, given the other values of a point."""
    wanted = sweep.conditions.get(name, {})
    return all(other in point and point[other] in values for other, values in wanted.items())


def held(sweep: Sweep, point: Point) -> Point:
    """Returns a point without what conditions leave out; one can depend on another."""
    kept = {name: value for name, value in point.items() if applies(sweep, name, point)}
    return kept if kept == point else held(sweep, kept)


def point_key(point: Mapping[str, Any]) -> str:
    """Returns what two equal points have in common, whatever the order of their names."""
    return json.dumps(point, sort_keys=True)


def describe_point(point: Mapping[str, Any]) -> str:
    """Returns a point as `key=value` words; that of the base config is `base`."""
    return " ".join(f"{name}={value_text(value)}" for name, value in point.items()) or "base"


def value_text(value: Any) -> str:
    """Returns a value as `key=value` words spell it."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value)) + ("," if len(value) == 1 else "")
    return str(value)
