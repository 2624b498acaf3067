"""What a sweep tries, as data: points over dotted keys, conditions, and widths that are solved for.

A file in `configs/sweeps/` defines `get_sweep(arg)` and returns a `Sweep`. A point names what is
varied and its values; `resolve` makes it the config of a training. Neither JAX nor Optuna is
imported.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from moejax.config import Config
from moejax.errors import ConfigError, require
from moejax.flops import active_parameters, flops_per_token, total_parameters
from moejax.metrics import FIELDS
from moejax.overrides import (
    build_config,
    convert,
    find_key,
    keys,
    load_values,
    run_file,
    suggest,
)

FORMAT = 1  # of what `sweep_to_json` writes
MOST_TRIALS = 100_000  # of a list of points: more is a mistake
TRIES = 1000  # points of an adaptive search that are looked at to find one that can be
ROUNDS = 20  # in which constraints are solved in turn until all hold
WIDEST = 1 << 20  # times `Equal.multiple`; a width that no config takes below is given up

Point = dict[str, Any]  # by the name of what is varied: a value, or the name of a case
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


class Run(NamedTuple):
    """What one training of a point is.

    Attributes:
        config: of the training.
        settings: by dotted key, what differs from the base config.
        solved: by dotted key, the width that a constraint asked for.
    """

    config: Config
    settings: dict[str, Any]
    solved: dict[str, int]


# From a file to a checked sweep


class Prepared(NamedTuple):
    """A checked sweep: all that workers need, without the files that it came from.

    Attributes:
        sweep: as in the file.
        base: flat values of the base config, with what is fixed and what the command line sets.
    """

    sweep: Sweep
    base: dict[str, Any]


def load_sweep(file_with_arg: str, overrides: Mapping[str, Any]) -> Prepared:
    """Runs a sweep's file and checks every key, value and constraint of it.

    Args:
        overrides: keys of the base config that the command line sets.

    Raises:
        ConfigError: something in it cannot be; the message names it.
    """
    path, found = run_file(file_with_arg, "get_sweep")
    try:
        if not isinstance(found, Sweep):
            raise ConfigError(
                f"get_sweep returned {type(found).__name__}; return a moejax.sweep_space.Sweep"
            )
        return prepare(found, path.parent, overrides)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def prepare(sweep: Sweep, folder: Path, overrides: Mapping[str, Any]) -> Prepared:
    """Checks a sweep whose base config is relative to `folder`; see `load_sweep`."""
    _check_shape(sweep)
    given = {**_settings_of(sweep.fixed), **overrides}
    prepared = Prepared(sweep, {**load_values(str(folder / sweep.base)), **given})
    varied = varied_keys(sweep)
    for key in overrides:
        require(
            key not in varied,
            f"{key} is given on the command line and set by each point of the sweep; leave it out",
        )
    _check_runs(prepared)
    return prepared


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


def ranges(space: Any) -> Iterator[tuple[str, Any]]:
    """Yields each name that a space varies with its values, list, range or cases."""
    if isinstance(space, Chain | Product):
        for part in space.spaces:
            yield from ranges(part)
    else:
        yield from space.values.items()


def _check_shape(sweep: Sweep) -> None:
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
            _settings_of(settings)
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


def _settings_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values by dotted key, each converted to its key's type."""
    return {find_key(name).name: convert(value, find_key(name)) for name, value in settings.items()}


def _check_runs(prepared: Prepared) -> None:
    """Builds the config of every point of a list, or finds a point of a search that can be."""
    sweep = prepared.sweep
    if not sweep.adaptive:
        found = list(points(sweep))
        require(len(found) > 0, "the sweep has no point; conditions and lists leave nothing to try")
        for point in found:
            resolve(prepared, point, sweep.seeds[0])
        return
    base = build_config({**prepared.base, "seed": sweep.seeds[0]})
    require(
        sweep.space.pruner == "none" or base.eval.every is not None,
        f"pruner={sweep.space.pruner!r} looks at evaluations, and eval.every=None; set eval.every, "
        f"for example {max(1, base.train.steps // 4)}",
    )
    generator, error = random.Random(0), None
    for _ in range(TRIES):
        try:
            resolve(prepared, _held(sweep, _draw(sweep.space.values, generator)), sweep.seeds[0])
            return
        except ConfigError as found_error:
            error = found_error
    raise ConfigError(f"none of {TRIES} random points of the search can be; the last: {error}")


def untried_point(prepared: Prepared, tried: Collection[str]) -> Point | None:
    """Returns a random point of a search that can be and is not among the keys of `tried`."""
    sweep = prepared.sweep
    generator = random.Random(len(tried))
    for _ in range(TRIES):
        point = _held(sweep, _draw(sweep.space.values, generator))
        if point_key(point) not in tried:
            with contextlib.suppress(ConfigError):
                resolve(prepared, point, sweep.seeds[0])
                return point
    return None


# Points


def points(sweep: Sweep) -> Iterator[Point]:
    """Yields the points of a sweep that is not adaptive, in order, each once.

    Raises:
        ConfigError: there are more than `MOST_TRIALS`.
    """
    seen = set()
    for number, point in enumerate(_points(sweep, sweep.space)):
        require(number < MOST_TRIALS, f"the sweep has more than {MOST_TRIALS} points; try fewer")
        kept = _held(sweep, point)
        if (key := point_key(kept)) not in seen:
            seen.add(key)
            yield kept


def point_key(point: Mapping[str, Any]) -> str:
    """Returns what two equal points have in common, whatever the order of their names."""
    return json.dumps(point, sort_keys=True)


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
            yield _draw(space.values, generator)
    else:
        lists = [choices(values, name) for name, values in space.values.items()]
        rows = itertools.product(*lists) if isinstance(space, Grid) else zip(*lists, strict=True)
        for row in rows:
            yield dict(zip(space.values, row, strict=True))


def choices(values: Any, name: str | None = None) -> list[Any]:
    """Returns the values of a list, of `name`'s type, or the names of cases."""
    if isinstance(values, Cases):
        return list(values.cases)
    return list(values) if name is None else [convert(v, find_key(name)) for v in values]


def _draw(values: Mapping[str, Any], generator: random.Random) -> Point:
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


def _held(sweep: Sweep, point: Point) -> Point:
    """Returns a point without what conditions leave out; one can depend on another."""
    kept = {name: value for name, value in point.items() if applies(sweep, name, point)}
    return kept if kept == point else _held(sweep, kept)


# From a point to a training


def resolve(prepared: Prepared, point: Mapping[str, Any], seed: int) -> Run:
    """Returns the training of a point: its checked config, and what a constraint set.

    Raises:
        ConfigError: the values do not go together, or a constraint has no solution.
    """
    sweep = prepared.sweep
    try:
        settings = {**_point_settings(sweep, point), "seed": seed}
        # the base needs no solving: it is the measure
        solved = _solve(prepared.base, settings, sweep.equal) if point else {}
        config = build_config({**prepared.base, **settings, **solved})
        _check_measured(sweep, config)
    except ConfigError as error:
        raise ConfigError(f"{describe_point(point)}: {error}") from None
    return Run(config, {**settings, **solved}, solved)


def _point_settings(sweep: Sweep, point: Mapping[str, Any]) -> dict[str, Any]:
    settings, domains = {}, dict(ranges(sweep.space))
    for name, value in point.items():
        domain = domains[name]
        found = domain.cases[value] if isinstance(domain, Cases) else {name: value}
        for key, setting in _settings_of(found).items():
            require(key not in settings, f"{key} is set twice, once by {name}; leave one out")
            settings[key] = setting
    return settings


def describe_point(point: Mapping[str, Any]) -> str:
    """Returns a point as `key=value` words; that of the base config is `base`."""
    return " ".join(f"{name}={value_text(value)}" for name, value in point.items()) or "base"


def _check_measured(sweep: Sweep, config: Config) -> None:
    """Checks that evaluation gives the objectives: a training is not paid for to find out."""
    routed = config.num_moe_layers > 0 and config.moe.takes_capacity
    for objective in sweep.objectives:
        require(
            routed or not objective.name.endswith("_at_capacity"),
            f"the objective {objective.name} is not measured with moe.router={config.moe.router} "
            f"in {config.num_moe_layers} MoE layers, which takes no capacity; use loss, or leave "
            "the point out",
        )


def _solve(
    base: Mapping[str, Any], settings: Mapping[str, Any], equals: Sequence[Equal]
) -> dict[str, int]:
    """Returns the widths with which all constraints hold.

    They are solved in turn, again and again: one width moves what another constraint holds.

    Raises:
        ConfigError: one has no solution, or together they have none.
    """
    solved: dict[str, int] = {}
    for _ in range(ROUNDS):
        for equal in equals:
            others = {name: width for name, width in solved.items() if name != equal.solve}
            solved[equal.solve] = solve_width(base, {**settings, **others}, equal)
        config = build_config({**base, **settings, **solved})
        off = [QUANTITIES[e.quantity](config) / _target(base, e) - 1 for e in equals]
        if all(abs(x) <= equal.tolerance for x, equal in zip(off, equals, strict=True)):
            return solved
    told = ", ".join(f"{e.quantity} by {x:+.1%}" for x, e in zip(off, equals, strict=True))
    raise ConfigError(
        f"the constraints do not hold together: with {describe_point(solved)} they are off, "
        f"{told}; solve for keys that move one quantity each, use larger tolerances, or leave the "
        "point out"
    )


def _target(base: Mapping[str, Any], equal: Equal) -> float:
    return QUANTITIES[equal.quantity](build_config(base)) if equal.to is None else equal.to


def solve_width(base: Mapping[str, Any], settings: Mapping[str, Any], equal: Equal) -> int:
    """Returns the multiple of `equal.multiple` whose config comes nearest to the quantity asked.

    Raises:
        ConfigError: none is within the tolerance, or the quantity does not depend on the width.
    """
    measure, unit, target = QUANTITIES[equal.quantity], equal.multiple, _target(base, equal)

    def at(count: int) -> int:
        return measure(build_config({**base, **settings, equal.solve: count * unit}))

    low = _least(at)
    high = low + 1
    require(
        at(low) < at(high),
        f"{equal.quantity} does not depend on {equal.solve} here; solve for another width",
    )
    while at(high) < target:
        low, high = high, 2 * high
    while high - low > 1:  # it grows with the width
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) < target else (low, middle)
    best = min((low, high), key=lambda count: abs(at(count) - target))
    off = at(best) / target - 1
    require(
        abs(off) <= equal.tolerance,
        f"no {equal.solve} gives {equal.quantity}={target:,.0f}: the nearest multiple of {unit} is "
        f"{best * unit}, which is off by {off:+.1%}, and tolerance={equal.tolerance}; use a larger "
        "tolerance, a smaller multiple, or leave the point out",
    )
    return best * unit


def _least(at: Callable[[int], int]) -> int:
    """Returns the least count that a config takes: fewer experts than a token selects cannot be.

    Raises:
        ConfigError: of count 1, where none can be.
    """

    def refusal(count: int) -> ConfigError | None:
        try:
            at(count)
        except ConfigError as error:
            return error
        return None

    if (error := refusal(1)) is None:
        return 1
    below, least = 1, 2
    while refusal(least) is not None:
        below, least = least, 2 * least
        if below >= WIDEST:
            raise error
    while least - below > 1:
        middle = (below + least) // 2
        below, least = (below, middle) if refusal(middle) is None else (middle, least)
    return least


# Words and JSON


def value_text(value: Any) -> str:
    """Returns a value as `key=value` words spell it."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value)) + ("," if len(value) == 1 else "")
    return str(value)


def override_words(settings: Mapping[str, Any]) -> list[str]:
    """Returns the words that give these settings to `moejax train`."""
    return [f"{name}={value_text(value)}" for name, value in settings.items()]


_DATA = (Sweep, Grid, Zip, Chain, Product, Random, Adaptive, Cases, Between, Equal, Objective)
_KINDS = {kind.__name__: kind for kind in _DATA}


def sweep_to_json(prepared: Prepared) -> dict[str, Any]:
    """Returns a prepared sweep as plain data, which `sweep_from_json` reads back."""
    return {"format": FORMAT, "sweep": _encoded(prepared.sweep), "base": prepared.base}


def sweep_from_json(data: Mapping[str, Any]) -> Prepared:
    """Reads what `sweep_to_json` wrote.

    Raises:
        ConfigError: it is of another format, or a config of it cannot be any more.
    """
    if data.get("format") != FORMAT:
        raise ConfigError(f"not a sweep of format {FORMAT} but of {data.get('format')!r}")
    return Prepared(_decoded(data["sweep"]), _settings_of(data["base"]))


def _encoded(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _encoded(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {"kind": "dict", "items": [[name, _encoded(item)] for name, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_encoded(item) for item in value]
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decoded(item) for item in value)
    if not isinstance(value, dict):
        return value
    kind, fields = value["kind"], {k: v for k, v in value.items() if k != "kind"}
    if kind == "dict":
        return {name: _decoded(item) for name, item in fields["items"]}
    return _KINDS[kind](**{name: _decoded(item) for name, item in fields.items()})


def config_quantities(config: Config) -> dict[str, int]:
    """Returns `QUANTITIES` of a config."""
    return {name: measure(config) for name, measure in QUANTITIES.items()}
