"""The trainings of a sweep: its file checked, and the config of each point.

A constraint's width is solved for here, by the formulas of `flops.py`: no training is needed to
know that a point cannot be.
"""

import contextlib
import dataclasses
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moejax.config import Config
from moejax.errors import ConfigError, require
from moejax.overrides import build_config, keys, load_values, run_file
from moejax.sweep_points import Point, describe_point, draw, held, point_key, points, value_text
from moejax.sweep_space import (
    QUANTITIES,
    Adaptive,
    Between,
    Cases,
    Chain,
    Equal,
    Grid,
    Objective,
    Product,
    Random,
    Sweep,
    Zip,
    check_sweep,
    ranges,
    settings_of,
    varied_keys,
)

FORMAT = 1  # of what `sweep_to_json` writes
TRIES = 1000  # points of an adaptive search that are looked at to find one that can be
ROUNDS = 20  # in which constraints are solved in turn until all hold
WIDEST = 1 << 20  # times `Equal.multiple`; a width that no config takes below is given up


class Prepared(NamedTuple):
    """A checked sweep: all that workers need, without the files that it came from.

    Attributes:
        sweep: as in the file.
        base: flat values of the base config, with what is fixed and what the command line sets.
    """

    sweep: Sweep
    base: dict[str, Any]


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
    check_sweep(sweep)
    given = {**settings_of(sweep.fixed), **overrides}
    prepared = Prepared(sweep, {**load_values(str(folder / sweep.base)), **given})
    varied = varied_keys(sweep)
    for key in overrides:
        require(
            key not in varied,
            f"{key} is given on the command line and set by each point of the sweep; leave it out",
        )
    _check_runs(prepared)
    return prepared


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
            resolve(prepared, held(sweep, draw(sweep.space.values, generator)), sweep.seeds[0])
            return
        except ConfigError as found_error:
            error = found_error
    raise ConfigError(f"none of {TRIES} random points of the search can be; the last: {error}")


def untried_point(prepared: Prepared, tried: Collection[str]) -> Point | None:
    """Returns a random point of a search that can be and is not among the keys of `tried`."""
    sweep = prepared.sweep
    generator = random.Random(len(tried))
    for _ in range(TRIES):
        point = held(sweep, draw(sweep.space.values, generator))
        if point_key(point) not in tried:
            with contextlib.suppress(ConfigError):
                resolve(prepared, point, sweep.seeds[0])
                return point
    return None


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
        for key, setting in settings_of(found).items():
            require(key not in settings, f"{key} is set twice, once by {name}; leave one out")
            settings[key] = setting
    return settings


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


def config_quantities(config: Config) -> dict[str, int]:
    """Returns `QUANTITIES` of a config."""
    return {name: measure(config) for name, measure in QUANTITIES.items()}


def override_words(settings: Mapping[str, Any]) -> list[str]:
    """Returns the words that give these settings to `moejax train`."""
    return [f"{name}={value_text(value)}" for name, value in settings.items()]


# JSON


_DATA = (Sweep, Grid, Zip, Chain, Product, Random, Adaptive, Cases, Between, Equal, Objective)
_KINDS = {kind.__name__: kind for kind in _DATA}


def sweep_to_json(prepared: Prepared) -> dict[str, Any]:
    """Returns a prepared sweep as plain data, which `sweep_from_json` reads back."""
    return {"format": FORMAT, "sweep": _encoded(prepared.sweep), "base": prepared.base}


def sweep_from_json(data: Mapping[str, Any]) -> Prepared:
    """Reads what `sweep_to_json` wrote. A key that it did not know takes its default, as in a run.

    Raises:
        ConfigError: it is of another format, or a config of it cannot be any more.
    """
    if data.get("format") != FORMAT:
        raise ConfigError(f"not a sweep of format {FORMAT} but of {data.get('format')!r}")
    return Prepared(_decoded(data["sweep"]), {**new_keys(data), **settings_of(data["base"])})


def new_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys that are newer than a stored sweep, with their defaults."""
    return {name: key.default for name, key in keys().items() if name not in data["base"]}


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
