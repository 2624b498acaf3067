"""Runs claims and writes their page: verdicts, numbers, plots."""

import json
import platform
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from moejax.claims.arms import LANGUAGES, STEPS
from moejax.claims.catalog import CLAIMS, TIMES, Claim, Plot
from moejax.claims.images import ImageArm, run_image_arm
from moejax.claims.rules import Check, Results, measured, probed, spread
from moejax.claims.training import Arm, arm_file, initial_states, make_seeds, make_step, run_arm
from moejax.config import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AT_ONCE = 2  # arms: XLA uses about one core for models as small as these
TIMES_FILE = "times.json"
ROUNDS, STEPS_A_ROUND = 7, 5  # of the timings
COLOURS = ("#2b6ca3", "#c8452e", "#3a8f4d", "#8a5fb0", "#666666", "#b8860b")


def run_claims(
    only: Sequence[str] | None, workdir: Path, page: Path | None, *, fresh: bool = False
) -> dict[str, bool]:
    """Trains what the claims need, writes the page and its plots, and returns the verdicts.

    Results lie in `workdir` by arm; those that are there are used again, so an interrupted run goes
    on where it was. An arm is trained anew when its definition has changed.

    Args:
        only: ids of claims, such as C4; None for all.
        workdir: of the results.
        page: the Markdown file to write, with the plots in a folder of its name beside it; default
            `claims.md` in `workdir`. It holds the chosen claims.
        fresh: trains the arms anew.

    Raises:
        ConfigError: an unknown id, or a package for a claim's data is missing.
    """
    claims = choose(only)
    page = page or workdir / "claims.md"
    workdir.mkdir(parents=True, exist_ok=True)
    page.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    arms = needed_arms(claims)
    if fresh:
        for file in (*(arm_file(workdir, arm) for arm in arms), workdir / TIMES_FILE):
            file.unlink(missing_ok=True)
    results = train_arms(arms, workdir)
    results[TIMES] = step_times(claims, workdir)
    checks = {claim.id: claim.judge(results) for claim in claims}
    minutes = (time.perf_counter() - began) / 60
    print(f"{len(arms)} arms in {minutes:.0f} min; writing {page}", flush=True)
    write_page(page, claims, results, checks)
    return {name: all(check.passed for check in rows) for name, rows in checks.items()}


def choose(only: Sequence[str] | None) -> list[Claim]:
    """Returns the claims with these ids, in the order of the page."""
    by_id = {claim.id: claim for claim in CLAIMS}
    for name in only or ():
        if name not in by_id:
            raise ConfigError(f"unknown claim {name!r}; choose from {', '.join(by_id)}")
    return [claim for claim in CLAIMS if only is None or claim.id in only]


def needed_arms(claims: Sequence[Claim]) -> list[Arm | ImageArm]:
    """Returns every arm once; an arm stands behind the one that it starts from."""
    arms: dict[str, Arm | ImageArm] = {}

    def add(arm: Arm | ImageArm) -> None:
        if arm.start is not None:
            add(arm.start)
        assert arms.setdefault(arm.name, arm) == arm, f"two arms are called {arm.name}"

    for claim in claims:
        for arm in claim.arms:
            add(arm)
    return sorted(arms.values(), key=lambda arm: arm.steps_before)


def train_arms(arms: Sequence[Arm | ImageArm], workdir: Path) -> dict[str, Any]:
    """Returns results by arm; trains AT_ONCE at a time, and those that start from others last."""
    results: dict[str, Any] = {}

    def run(arm: Arm | ImageArm) -> None:
        began = time.perf_counter()
        if isinstance(arm, ImageArm):
            results[arm.name] = result = run_image_arm(arm, workdir)
        else:
            results[arm.name] = result = run_arm(arm, workdir)
        loss = spread(measured(results, arm.name))
        seconds = time.perf_counter() - began
        print(f"{arm.name}: loss {loss}, {result['steps']} steps, {seconds:.0f} s", flush=True)

    for before in sorted({arm.steps_before for arm in arms}):
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(run, [arm for arm in arms if arm.steps_before == before]))
    return results


def step_times(claims: Sequence[Claim], workdir: Path) -> dict[str, Any]:
    """Times a step of the claims' `timed` arms in turn, all seeds at once: the median of rounds."""
    arms = {arm.name: arm for claim in claims for arm in claim.timed}
    file = workdir / TIMES_FILE
    key = [arm.key for arm in arms.values()]
    if file.exists() and (stored := json.loads(file.read_text()))["key"] == key:
        return stored
    seeds, states, run = {}, {}, {}
    for name, arm in arms.items():
        seeds[name] = make_seeds(arm.task, tuple(range(arm.seeds)))
        states[name] = initial_states(arm, seeds[name], None)
        run[name] = make_step(arm)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(ROUNDS + 1):
        for name in arms:
            began = time.perf_counter()
            for _ in range(STEPS_A_ROUND):
                states[name], record = run[name](states[name], seeds[name])
                jax.block_until_ready(record)
            if number > 0:  # the first compiles
                seconds[name].append((time.perf_counter() - began) / STEPS_A_ROUND)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    file.write_text(json.dumps({"key": key, "step_seconds": medians}) + "\n", encoding="utf-8")
    return {"step_seconds": medians}


# The page

HEAD = """# Claims of the literature, on a CPU

`make claims` trains every arm below and writes this page; `moejax claims --only C4` does one claim.
The package's own decoder, routers, losses and train step do the work. A paper's numbers are from
models thousands of times as large: what is compared is the direction, by the rules in each table,
which were written down before the runs.

**Task.** Several random languages in one stream: the first token names the language, and each
symbol follows from the two before it by the language's own random table, except that one in ten is
any symbol. There are {facts:,} such facts to learn, and the least possible loss is {entropy:.3f}
nats.

**Training.** Width 48, 2 layers, 4 heads; {steps} steps of 2,048 tokens, no token twice; AdamW at
5e-3, warm-up 100, cosine to 5%, clipping at 1. Experts are SwiGLU of width 64 for top-1 and 32 for
top-2; routers start at a tenth of the usual deviation. Learning rates were not swept. Every arm has
the same seeds: a seed decides the languages, the data order, and the first values of all layers
that arms share.

**Numbers.** Loss is cross-entropy in nats a target, without auxiliary losses, on 32,768 fresh
tokens: mean ± standard deviation over seeds. Differences are paired by seed: the mean, half the
width of its 95% interval, then every seed. "Below" asks for the sign, or the margin, in every seed
and for an interval without 0. MaxVio, dead experts (below 1% of the mean load) and entropy are of
the dropless model on the same tokens; largest logit and I(domain; expert), in nats, on 512 other
sequences. All are means over layers.
"""


def write_page(
    page: Path,
    claims: Sequence[Claim],
    results: Results,
    checks: Mapping[str, list[Check]],
) -> None:
    """Writes the Markdown page and the plots beside it."""
    folder = page.with_suffix("")
    parts = [_head(results), _summary(claims, checks)]
    for claim in claims:
        image = None
        if claim.plot is not None:
            folder.mkdir(parents=True, exist_ok=True)
            draw(claim.plot(results), folder / f"{claim.id}.png")
            image = f"{folder.name}/{claim.id}.png"
        parts.append(_section(claim, results, checks[claim.id], image))
    page.write_text("\n".join(parts), encoding="utf-8")


def _head(results: Results) -> str:
    made = f"jax {jax.__version__} on {platform.machine()}, {jax.default_backend()}"
    facts = LANGUAGES.domains * LANGUAGES.symbols**2
    return (
        HEAD.format(facts=facts, entropy=LANGUAGES.entropy, steps=STEPS) + f"\nMade with {made}.\n"
    )


def _verdict(passed: bool) -> str:
    return "holds" if passed else "**fails**"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _summary(claims: Sequence[Claim], checks: Mapping[str, list[Check]]) -> str:
    rows = []
    for claim in claims:
        passed = [check.passed for check in checks[claim.id]]
        rows.append(
            [
                f"[{claim.id}](#{_anchor(claim)})",
                claim.title,
                f"{sum(passed)} of {len(passed)}",
                _verdict(all(passed)),
            ]
        )
    return _table(["", "claim", "checks", "verdict"], rows)


def _anchor(claim: Claim) -> str:
    text = re.sub(r"[^\w\- ]", "", f"{claim.id} {claim.title}".lower())
    return text.replace(" ", "-")


def _section(claim: Claim, results: Results, checks: list[Check], image: str | None) -> str:
    remarks = claim.remarks if isinstance(claim.remarks, str) else claim.remarks(results)
    rows = [[check.rule, check.found, _verdict(check.passed)] for check in checks]
    parts = [
        f"## {claim.id} {claim.title}\n",
        f"Paper: {claim.paper}. Equal here: {claim.matched}.\n",
        _table(["rule", "found", "verdict"], rows),
        _table(*_arms_table(claim, results)),
    ]
    if image is not None:
        parts.append(f"![{claim.title}]({image})\n")
    if remarks:
        parts.append(remarks + "\n")
    if claim.failing and not all(check.passed for check in checks):
        parts.append(f"**What was tried.** {claim.failing}\n")
    return "\n".join(parts)


def _arms_table(claim: Claim, results: Results) -> tuple[list[str], list[list[str]]]:
    header = ["arm", "parameters", "loss", "dropless loss", "drops", "MaxVio", "dead"]
    header += ["entropy", "largest logit", "I(domain; expert)"]
    return header, [_arm_row(arm, results) for arm in claim.arms]


def _arm_row(arm: Arm | ImageArm, results: Results) -> list[str]:
    result = results[arm.name]
    row = [arm.name, f"{result['parameters']:,}", spread(measured(results, arm.name))]
    if "dropless" not in result["evaluations"]:
        return row + [""] * 7
    drops = 100 * measured(results, arm.name, "as trained", "drop_fraction")

    def free(field: str, digits: int) -> str:
        return spread(measured(results, arm.name, "dropless", field), digits)

    row += [free("loss", 3), f"{spread(drops, 1)}%", free("max_violation", 2)]
    row += [free("dead_experts", 1), free("router_entropy", 2)]
    if "probe" not in result:
        return [*row, "", ""]
    return [*row, *(spread(probed(results, arm.name, f), 2) for f in ("max_logit", "information"))]


def draw(plot: Plot, path: Path) -> None:
    """Draws each series as the mean over seeds in a band from the lowest to the highest seed."""
    figure = _figure()
    axes = figure.add_subplot()
    for series, colour in zip(plot.series, COLOURS, strict=False):
        marker = "o" if len(series.x) < 12 else ""
        y_ns = np.asarray(series.y)
        axes.plot(
            series.x, y_ns.mean(1), color=colour, label=series.label, marker=marker, markersize=3
        )
        axes.fill_between(series.x, y_ns.min(1), y_ns.max(1), color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel=plot.xlabel, ylabel=plot.ylabel)
    if plot.logarithmic:
        axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _figure() -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(5.6, 3.4), dpi=100, layout="constrained")
