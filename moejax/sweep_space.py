"""What a file in `configs/sweeps/` writes: a space over dotted keys, conditions, constraints.

The file defines `get_sweep(arg)` and returns a `Sweep`. `check_sweep` holds names and values to the
config; what combinations of them give is seen in `sweep_runs.py`. Neither JAX nor Optuna is
imported.
"""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from moejax.errors import require
from moejax.flops import active_parameters, flops_per_token, total_parameters
from moejax.metrics import FIELDS
from moejax.overrides import convert, find_key, keys, suggest

Quantity = Literal["flops_per_token", "active_parameters", "total_parameters"]
QUANTITIES = {
    "flops_per_token": flops_per_token,
    "active_parameters": active_parameters,
    "total_parameters": total_parameters,
}
# Measured by a run: eval fields are taken from its last evaluation, the others are medians.
MEASURED = ("loss", "bits_per_byte", "loss_at_capacity", "drop_fraction_at_capacity")
MEDIANS = ("tokens_per_second", "step_seconds")


@dataclasses.dataclass(frozen=True)
class Cases:
    """Named choices that each set several keys: `Cases({"all": {}, "half": {"moe.every": 2}})`."""

    cases: Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Between:
    """A range, with both ends; of whole numbers where both ends and the step are."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        return all(isinstance(n, int) for n in (self.low, self.high, self.step or 1))


@dataclasses.dataclass(frozen=True)
class Grid:
    """Every combination of the values of each key; a key's values are a list, or `Cases`."""

    values: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Zip:
    """The first values of all keys, then the second ones, and so on."""

    values: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Chain:
    """The points of one space after those of another."""

    spaces: Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Product:
    """Every point of one space together with every point of the others."""

    spaces: Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Random:
    """`trials` points drawn from ranges (`Between`), lists and `Cases`, the same for a seed."""

    values: Mapping[str, Any]
    trials: int
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """Points that a tree-structured Parzen estimator asks for after it saw the earlier ones.

    The first `startup` of `trials` points are random. A pruner stops a training whose loss at an
    evaluation is behind: the median of earlier ones, or successive halving (ASHA), or Hyperband.
    """

    values: Mapping[str, Any]
    trials: int
    startup: int = 10
    pruner: Literal["none", "median", "halving", "hyperband"] = "none"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Equal:
    """What all trials have in common: `solve` is set so that `quantity` is that of the base config.

    `to` is another number for it. The width is a multiple of `multiple`, and what it reaches is off
    by at most `tolerance`, relative.
    """

    quantity: Quantity
    solve: str = "moe.expert_hidden"
    to: float | None = None
    multiple: int = 8
    tolerance: float = 0.02


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is made least (or most), of `MEASURED`, `MEDIANS` or `QUANTITIES`."""

    name: str = "loss"
    direction: Literal["min", "max"] = "min"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep as its file gives it.

    A list of points is tried with every seed. An adaptive search tries each point with the first
    seed; then its `finalists` best ones and the base config are tried with the other seeds, which
    the search did not choose by.

    Attributes:
        base: config file with its argument, relative to the folder of the sweep's file.
        space: Grid, Zip, Chain, Product, Random or Adaptive.
        fixed: keys set over those of the base file; a point can set them again.
        conditions: by name, the values of others with which it is varied at all.
        equal: constraints, solved in order.
        seeds: of the trainings.
        objectives: the first one ranks.
        finalists: see above; 0 without an adaptive search.
    """

    base: str
    space: Any
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    conditions: Mapping[str, Mapping[str, Sequence[Any]]] = dataclasses.field(default_factory=dict)
    equal: Sequence[Equal] = ()
    seeds: Sequence[int] = (0,)
    objectives: Sequence[Objective] = (Objective(),)
    finalists: int = 0

    @property
    def adaptive(self) -> bool:
        return isinstance(self.space, Adaptive)


# What it varies


def ranges(space: Any) -> Iterator[tuple[str, Any]]:
    """Yields each name that a space varies with its values, list, range or cases."""
    if isinstance(space, Chain | Product):
        for part in space.spaces:
            yield from ranges(part)
    else:
        yield from space.values.items()


def varied_keys(sweep: Sweep) -> set[str]:
    """Returns the dotted keys that points, constraints and seeds set."""
    return {"seed", *(equal.solve for equal in sweep.equal), *_set_by_points(sweep)}


def _set_by_points(sweep: Sweep) -> set[str]:
    found = set()
    for name, values in ranges(sweep.space):
        if isinstance(values, Cases):
            found.update(key for case in values.cases.values() for key in case)
        else:
            found.add(name)
    return found


def choices(values: Any, name: str | None = None) -> list[Any]:
    """Returns the values of a list, of `name`'s type, or the names of cases."""
    if isinstance(values, Cases):
        return list(values.cases)
    return list(values) if name is None else [convert(v, find_key(name)) for v in values]


def settings_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values by dotted key, each converted to its key's type."""
    return {find_key(name).name: convert(value, find_key(name)) for name, value in settings.items()}


# What is refused before values are combined


def check_sweep(sweep: Sweep) -> None:
    """Checks names and values, before any of them is combined."""
    _check_space(sweep.space, inner=False)
    names = {name for name, _ in ranges(sweep.space)}
    for name, values in ranges(sweep.space):
        same = [other for found, other in ranges(sweep.space) if found == name]
        require(
            not isinstance(values, Cases) or all(other == values for other in same),
            f"{name} has different Cases in the parts of the space; give them different names",
        )
    for name, wanted in sweep.conditions.items():
        for other in (name, *wanted):
            require(
                other in names,
                f"conditions name {other!r}, which is not varied{suggest(other, names)}; varied "
                f"are {', '.join(sorted(names))}",
            )
        for other, values in wanted.items():
            _check_wanted(sweep, name, other, values)
    _check_order(sweep, names)
    known = [*MEASURED, *MEDIANS, *QUANTITIES]
    assert set(MEASURED + MEDIANS) <= set(FIELDS)
    for objective in sweep.objectives:
        require(
            objective.name in known,
            f"unknown objective {objective.name!r}{suggest(objective.name, known)}; use one of "
            f"{', '.join(known)}",
        )
        require(
            objective.direction in ("min", "max"),
            f"direction={objective.direction!r} of {objective.name}; use min or max",
        )
    seeds = list(sweep.seeds)
    require(len(sweep.objectives) > 0, "objectives is empty; give one, such as Objective('loss')")
    require(
        len(seeds) == len(set(seeds)) > 0,
        f"seeds={seeds} must be at least one seed, each once; for example (0, 1, 2)",
    )
    for seed in seeds:
        convert(seed, find_key("seed"))
    _check_adaptive(sweep)
    for equal in sweep.equal:
        _check_equal(equal)
    _check_solved(sweep)


def _check_wanted(sweep: Sweep, name: str, other: str, values: Any) -> None:
    """Checks the values of `other` with which `name` is varied: one that never comes hides it."""
    require(
        isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0,
        f"conditions of {name} want {other}={values!r}, which is no list of values; for example "
        f"[{values!r}]",
    )
    domains = [domain for found, domain in ranges(sweep.space) if found == other]
    if any(isinstance(domain, Between) for domain in domains):
        return
    there = [v for d in domains for v in choices(d, None if isinstance(d, Cases) else other)]
    for value in values:
        require(
            value in there,
            f"conditions of {name} want {other}={value!r}, which never comes; {other} has "
            f"{', '.join(map(repr, there))}",
        )


def _check_order(sweep: Sweep, names: Collection[str]) -> None:
    """Checks that some name can be varied first, and then the others one by one."""
    left = set(names)
    while ready := {n for n in left if not left & set(sweep.conditions.get(n, {}))}:
        left -= ready
    require(
        not left,
        f"conditions of {', '.join(sorted(left))} wait for one another; leave one of them out",
    )


def _check_solved(sweep: Sweep) -> None:
    """Checks that each width has one source."""
    solved = [equal.solve for equal in sweep.equal]
    for name in solved:
        require(
            solved.count(name) == 1,
            f"{name} is solved for by {solved.count(name)} constraints; solve each for another key",
        )
        require(
            name not in _set_by_points(sweep),
            f"{name} is solved for by a constraint and set by points of the sweep, whose values "
            "would not count; leave it out of one",
        )


def _check_adaptive(sweep: Sweep) -> None:
    space, finalists = sweep.space, sweep.finalists
    if not isinstance(space, Adaptive):
        require(
            finalists == 0,
            f"finalists={finalists} are chosen by an adaptive search, and a list of points is "
            "tried with every seed; leave it at 0",
        )
        return
    require(
        finalists >= 0 and (finalists > 0) == (len(sweep.seeds) > 1),
        f"finalists={finalists} with {len(sweep.seeds)} seeds: the search takes the first seed and "
        "its finalists the others; give finalists=2 and seeds=(0, 1, 2, 3), or no finalists and "
        "one seed",
    )
    pruners = ("none", "median", "halving", "hyperband")
    require(
        space.pruner in pruners,
        f"pruner={space.pruner!r}; use one of {', '.join(pruners)}",
    )
    first = sweep.objectives[0].name
    require(
        space.pruner == "none" or (len(sweep.objectives) == 1 and first in MEASURED),
        f"pruner={space.pruner!r} compares one number of an evaluation, and the objectives are "
        f"{', '.join(o.name for o in sweep.objectives)}; use one of {', '.join(MEASURED)}, or "
        "pruner='none'",
    )
    require(space.startup >= 1, f"startup={space.startup} is below 1; 10 is usual")


def _check_space(space: Any, inner: bool) -> None:
    if isinstance(space, Chain | Product):
        require(len(space.spaces) > 0, f"{type(space).__name__} of no spaces; give at least one")
        for part in space.spaces:
            _check_space(part, inner=True)
        if isinstance(space, Product):
            names = [name for part in space.spaces for name in {n for n, _ in ranges(part)}]
            twice = sorted({name for name in names if names.count(name) > 1})
            require(not twice, f"Product varies {', '.join(twice)} twice; leave it out of one")
        return
    kinds = Grid | Zip | Random if inner else Grid | Zip | Random | Adaptive
    allowed = ", ".join(kind.__name__ for kind in get_args(kinds))
    require(
        isinstance(space, kinds),
        f"{type(space).__name__} is not a space here; use {allowed}, Chain or Product",
    )
    drawn = isinstance(space, Random | Adaptive)
    require(
        not drawn or space.trials >= 1,
        f"{type(space).__name__} of trials={getattr(space, 'trials', 0)}; use 1 or more",
    )
    require(len(space.values) > 0, f"{type(space).__name__} varies nothing; name a key")
    for name, values in space.values.items():
        _check_values(name, values, drawn)
    if isinstance(space, Zip):
        lengths = {name: len(choices(values)) for name, values in space.values.items()}
        require(len(set(lengths.values())) == 1, f"Zip of lists of unequal length: {lengths}")


def _check_values(name: str, values: Any, drawn: bool) -> None:
    """Checks that a name is a key and its values are of the key's type."""
    if isinstance(values, Cases):
        require(name not in keys(), f"Cases are called {name!r}, a key; use another name")
        require(len(values.cases) > 0, f"{name} has no cases; give at least one")
        for settings in values.cases.values():
            settings_of(settings)
        return
    key = find_key(name)
    require(name != "seed", "seed is varied; list the seeds of every trial in seeds=(0, 1, 2)")
    if isinstance(values, Between):
        require(drawn, f"{name} has a range, which Random and Adaptive draw from; give a list")
        require(
            math.isfinite(values.high)
            and values.low < values.high
            and (values.low > 0 or not values.log)
            and (values.step is None or (values.step > 0 and not values.log)),
            f"{name}={values}: low is below high, above 0 with log=True, and log has no step",
        )
        for end in (values.low, values.high):
            convert(end, key)
        return
    require(
        isinstance(values, Sequence) and not isinstance(values, str),
        f"{name}={values!r} is not a list of values, a Between or Cases; for example [{values!r}]",
    )
    require(len(values) > 0, f"{name} has no values, so there is nothing to try; give at least one")
    converted = [convert(value, key) for value in values]
    require(
        len(set(converted)) == len(converted) or not drawn,
        f"{name}={list(values)} has a value twice; give each once",
    )


def _check_equal(equal: Equal) -> None:
    require(
        equal.quantity in QUANTITIES,
        f"unknown quantity {equal.quantity!r}{suggest(equal.quantity, QUANTITIES)}; use one of "
        f"{', '.join(QUANTITIES)}",
    )
    key = find_key(equal.solve)
    require(
        key.annotation is int,
        f"solve={equal.solve!r} is no whole number; solve for a width, such as moe.expert_hidden",
    )
    require(
        equal.multiple >= 1 and 0 <= equal.tolerance < 1 and (equal.to is None or equal.to > 0),
        f"{equal}: multiple is at least 1, tolerance in [0, 1), to above 0",
    )
