"""`moejax compare`: what `compare` finds as tables, CSV, Markdown, pictures and TensorBoard."""

import csv
import io
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moejax import scaling
from moejax.compare import Arm, Comparison, Ratio, Versus, compare, mean_cost_to_reach
from moejax.compare_runs import AXES, Run
from moejax.errors import file_error
from moejax.flops import active_parameters, flops_per_token, total_parameters
from moejax.overrides import config_values
from moejax.progress import printable
from moejax.significance import spread

HEADS = {"tokens": "tokens", "seconds": "seconds", "flops": "FLOPs"}
CURVES, SCALING, PAGE, RUNS = "compare.png", "scaling.png", "compare.md", "runs.csv"
TENSORBOARD = "tensorboard"
SIZES = {
    "parameters, total": total_parameters,
    "parameters, active": active_parameters,
    "FLOPs per token": flops_per_token,
}
MOST_COLUMNS = 6  # of the table of keys: more arms than that are its rows
RUNS_TITLE = "Runs; difference: at equal cost, to the run of the same seed"
MOST_RUNS = 24  # that the terminal lists one by one; the files have all


class Sheet(NamedTuple):
    """A table, ready to be shown."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


class Output(NamedTuple):
    """Where to write: a CSV file, a Markdown file, and a folder of everything."""

    csv: Path | None = None
    markdown: Path | None = None
    folder: Path | None = None


def run_compare(
    paths: Sequence[str],
    axis: str,
    metric: str,
    reach: float | None,
    fits: bool,
    output: Output,
    console: Console | None = None,
) -> None:
    """Compares the runs under `paths`, shows it, and writes what `output` asks for.

    Args:
        paths: workdirs, sweeps, or folders of workdirs.
        axis: one of compare_runs.AXES, on which cost is equal.
        metric: one of compare_runs.METRICS.
        reach: a loss, to which costs are told; None tells none.
        fits: whether a scaling law is fitted.

    Raises:
        ConfigError: see `compare.compare` and `scaling.fit`.
    """
    found = compare(paths, axis, metric)
    law = scaling.fit(found) if fits else None
    tables = sheets(found, reach, law)
    lines = [*(f"note: {note}" for note in found.notes)] + (scaling.describe(law) if law else [])
    wide = None if sys.stdout.isatty() else 160  # a file or a pipe need not fold
    _show(tables, lines, len(found.runs), console or Console(highlight=False, width=wide))
    try:
        _write(found, tables, lines, law, output)
    except OSError as error:
        raise file_error(f"{error}; give another file or folder", error) from None


def _write(
    found: Comparison,
    tables: list[Sheet],
    lines: list[str],
    law: scaling.Law | None,
    output: Output,
) -> None:
    if output.csv:
        output.csv.write_text(to_csv(found), encoding="utf-8")
    if output.markdown:
        output.markdown.write_text(to_markdown(tables, lines), encoding="utf-8")
    if output.folder:
        output.folder.mkdir(parents=True, exist_ok=True)
        pictures = [CURVES]
        plot_curves(found.arms, output.folder / CURVES, found.metric)
        if law:
            pictures.append(SCALING)
            scaling.plot(law, output.folder / SCALING)
        page = to_markdown(tables, lines, pictures)
        (output.folder / PAGE).write_text(page, encoding="utf-8")
        (output.folder / RUNS).write_text(to_csv(found), encoding="utf-8")
        write_tensorboard(found, output.folder / TENSORBOARD)


# Tables


def sheets(
    found: Comparison, reach: float | None = None, law: scaling.Law | None = None
) -> list[Sheet]:
    """Returns the tables of a comparison."""
    tables = [_arms_sheet(found), _sizes_sheet(found)]
    if found.versus:
        tables.append(_versus_sheet(found))
    if reach is not None:
        tables.append(_reach_sheet(found, reach))
    if found.keys:
        tables.append(_keys_sheet(found))
    if law:
        tables.append(_law_sheet(law))
    return [*tables, _runs_sheet(found)]


def _arms_sheet(found: Comparison) -> Sheet:
    header = ("arm", "seeds", found.metric, "sd", "step", *HEADS.values())
    rows = []
    for arm in found.arms:
        told = (str(len(arm.runs)), _loss(arm.loss), _loss(spread(arm.losses)), _step(arm))
        rows.append((arm.name, *told, *(_amount(arm.cost(axis)) for axis in AXES)))
    return Sheet("Arms: means over seeds, at the last evaluation", header, rows)


def _sizes_sheet(found: Comparison) -> Sheet:
    rows = []
    for arm in found.arms:
        speeds = [run.tokens_per_second for run in arm.runs if run.tokens_per_second]
        counts = (f"{size(arm.config):,}" for size in SIZES.values())
        rows.append((arm.name, *counts, _amount(mean(speeds)) if speeds else ""))
    return Sheet("Sizes", ("arm", *SIZES, "tokens per second"), rows)


def _step(arm: Arm) -> str:
    steps = sorted({int(run.step_n[-1]) for run in arm.runs})
    reached = str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    complete = all(run.complete for run in arm.runs)
    return reached if complete else f"{reached} of {arm.config.train.steps}"


def _versus_sheet(found: Comparison) -> Sheet:
    base = found.arms[0].name
    title = (
        f"Against {base}, at equal {found.axis}; x: cost of its last {found.metric}, over its own"
    )
    header = ("arm", f"at {found.axis}", "difference", "p, Welch", "p, paired")
    header += tuple(f"{head} x" for head in HEADS.values())
    rows = [
        (arm.name, *_versus_row(row)) for arm, row in zip(found.arms[1:], found.versus, strict=True)
    ]
    return Sheet(title, header, rows)


def _versus_row(row: Versus) -> tuple[str, ...]:
    ours, theirs = row.seeds
    told = "" if math.isnan(row.difference) else f"{row.difference:+.4f}"
    told += "" if row.interval is None else f" ± {row.interval:.4f}"
    welch = "" if row.p_welch is None else f"{row.p_welch:.2g} (n={ours}, {theirs})"
    paired = "" if row.p_paired is None else f"{row.p_paired:.2g} (n={len(row.by_seed)})"
    ratios = (_ratio(row.ratios[axis], f"{row.ratios[axis].value or 0:.2f}") for axis in AXES)
    return (_amount(row.budget), told, welch, paired, *ratios)


def _ratio(ratio: Ratio, told: str) -> str:
    return f"{ratio.reached} of {ratio.of}" if ratio.value is None else told


def _reach_sheet(found: Comparison, reach: float) -> Sheet:
    rows = []
    for arm in found.arms:
        costs = {axis: mean_cost_to_reach(arm, axis, reach) for axis in AXES}
        rows.append((arm.name, *(_ratio(cost, _amount(cost.value)) for cost in costs.values())))
    return Sheet(f"Cost to reach {found.metric} {reach:g}", ("arm", *HEADS.values()), rows)


def _keys_sheet(found: Comparison) -> Sheet:
    names = tuple(arm.name for arm in found.arms)
    title = "Keys of the config that differ"
    if len(names) <= MOST_COLUMNS:
        rows = [(key, *map(str, row)) for key, row in found.keys.items()]
        return Sheet(title, ("key", *names), rows)
    columns = zip(*found.keys.values(), strict=True)
    rows = [(name, *map(str, column)) for name, column in zip(names, columns, strict=True)]
    return Sheet(title, ("arm", *found.keys), rows)


def _runs_sheet(found: Comparison) -> Sheet:
    header = ("run", "arm", "seed", found.metric, "difference", "step", "seconds")
    header += ("elapsed", "goodput")
    rows = []
    for arm, row in zip(found.arms, (None, *found.versus), strict=True):
        by_seed = row.by_seed if row else {}
        for run in arm.runs:
            goodput, seed = run.spent.goodput, run.config.seed
            difference = f"{by_seed[seed]:+.4f}" if seed in by_seed else ""
            of = "" if run.complete else f" of {run.config.train.steps}"
            told = (str(run.workdir), arm.name, str(seed), _loss(run.loss), difference)
            told += (f"{int(run.step_n[-1])}{of}", _amount(run.cost("seconds")))
            told += (_amount(run.spent.elapsed or None),)
            rows.append((*told, "" if goodput is None else f"{goodput:.0%}"))
    return Sheet(RUNS_TITLE, header, rows)


def _law_sheet(law: scaling.Law) -> Sheet:
    rows = []
    for point, beyond, low, high in scaling.predictions(law):
        where = "within the runs" if beyond <= 1.001 else f"EXTRAPOLATED {beyond:.3g} x"
        amounts = (_amount(point.N), _amount(point.D), f"{point.E:.3g}")
        rows.append((*amounts, f"{point.loss:.4f}", f"{low:.4f} to {high:.4f}", where))
    header = ("N", "D", "E", "loss by the law", "95% of resamples", "where")
    return Sheet("Scaling law", header, rows)


def _loss(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def _amount(value: float | None) -> str:
    """Returns four digits and a letter, as 1.843M."""
    if value is None or not math.isfinite(value):
        return ""
    for power, letter in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.4g}{letter}"
    return f"{value:.4g}"


def _show(tables: list[Sheet], lines: list[str], runs: int, console: Console) -> None:
    for sheet in tables:
        if sheet.title == RUNS_TITLE and runs > MOST_RUNS:
            continue
        table = Table(title=escape(printable(sheet.title)), title_justify="left", box=None)
        for index, name in enumerate(sheet.header):
            right = index and sheet.rows and re.match(r"[+-]?[\d.]", sheet.rows[0][index])
            justify = "right" if right else "left"
            table.add_column(escape(printable(name)), overflow="fold", justify=justify)
        for row in sheet.rows:
            table.add_row(*(escape(printable(cell)) for cell in row))
        console.print(table)
        console.print()
    for line in lines:
        console.print(escape(printable(line)), soft_wrap=True)


def to_markdown(tables: Sequence[Sheet], lines: Sequence[str], pictures: Sequence[str] = ()) -> str:
    """Returns a page of the tables."""
    parts = ["# Comparison"]
    for sheet in tables:
        rows = [sheet.header, ("---",) * len(sheet.header), *sheet.rows]
        body = "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)
        parts.append(f"## {_cell(sheet.title)}\n\n{body}")
    parts += [f"- {_cell(line)}" for line in lines]
    parts += [f"![{Path(picture).stem}]({picture})" for picture in pictures]
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    safe = printable(text).replace("\n", " ")
    return re.sub(r"([|<>*_`\[\]\\])", r"\\\1", safe)


def to_csv(found: Comparison) -> str:
    """Returns a row a run, with all digits, and the keys that differ."""
    fields = ["run", "arm", "seed", "step", "steps", found.metric, *AXES, "tokens_per_second"]
    fields += ["elapsed_seconds", "goodput", *SIZES]
    file = io.StringIO()
    writer = csv.DictWriter(file, [*fields, *found.keys], lineterminator="\n")
    writer.writeheader()
    for arm in found.arms:
        values = config_values(arm.config)
        for run in arm.runs:
            writer.writerow(_run_row(arm, run, found) | {key: values[key] for key in found.keys})
    return file.getvalue()


def _run_row(arm: Arm, run: Run, found: Comparison) -> dict[str, Any]:
    return {
        "run": run.workdir,
        "arm": arm.name,
        "seed": run.config.seed,
        "step": int(run.step_n[-1]),
        "steps": run.config.train.steps,
        found.metric: run.loss,
        **{axis: run.cost(axis) for axis in AXES},
        "tokens_per_second": run.tokens_per_second,
        "elapsed_seconds": run.spent.elapsed or None,
        "goodput": run.spent.goodput,
        **{name: size(run.config) for name, size in SIZES.items()},
    }


# Pictures


def plot_curves(
    arms: Sequence[Arm], path: Path, metric: str = "loss", axes: Sequence[str] = tuple(AXES)
) -> None:
    """Draws loss against each cost, a colour an arm, a line a run.

    Of more than ten arms only the best ten have a name, and the others are grey.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    best = sorted(arms, key=lambda arm: (math.isnan(arm.loss), arm.loss))[:10]
    named = [arm for arm in arms if arm in best]
    size = (1.0 + 4.6 * len(axes), 4.6)
    figure = Figure(figsize=size, dpi=120, layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    for panel, axis in zip(panels, axes, strict=True):
        for arm in arms:
            colour = colormaps["tab10"](named.index(arm)) if arm in named else "#bbbbbb"
            for index, run in enumerate(arm.runs):
                label = _label(arm.name) if arm in named and index == 0 else None
                marker = "o" if len(run.loss_n) < 12 else ""
                line = {"color": colour, "marker": marker, "markersize": 3, "alpha": 0.8}
                order = 2 if arm in named else 1
                panel.plot(run.cost_n[axis], run.loss_n, label=label, zorder=order, **line)
        panel.set_xlabel(AXES[axis])
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"validation: {metric}")
    panels[0].set_ylim(*_limits(arms))
    panels[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _label(name: str) -> str:
    """Returns a name that Matplotlib shows: it hides `_a`, and reads `$` as mathematics."""
    shown = name.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _limits(arms: Sequence[Arm]) -> tuple[float | None, float | None]:
    """Leaves the first fall of the loss out where there is much after it."""
    runs = [run for arm in arms for run in arm.runs]
    late = [run.loss_n[len(run.loss_n) // 10 :] for run in runs]
    known_n = np.concatenate(late)
    known_n = known_n[np.isfinite(known_n)]
    if not known_n.size:
        return None, None
    margin = 0.05 * (known_n.max() - known_n.min()) or 0.1
    return float(known_n.min() - margin), float(known_n.max() + margin)


# TensorBoard


def write_tensorboard(found: Comparison, folder: Path) -> None:
    """Writes a folder a run: its curve against each cost, and its keys and results as hparams.

    `tensorboard --logdir folder` shows them under Time Series and HParams. The curves' steps are
    tokens, seconds and GFLOPs.
    """
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2

    protos: Any = event_pb2  # protobuf makes their names when the module is imported
    unit = {"tokens": 1.0, "seconds": 1.0, "flops": 1e9}
    for number, arm in enumerate(found.arms):
        for run in arm.runs:
            name = re.sub(r"[^\w.=-]+", "_", f"{number:02d}_{arm.name}").rstrip("_")
            inside = folder / f"{name}_seed{run.config.seed}"
            inside.mkdir(parents=True, exist_ok=True)
            for old in inside.glob("events.*"):
                old.unlink()
            writer = EventsWriter(str(inside / "events"), ".compare")
            results = {f"last/{axis}": run.cost(axis) for axis in AXES}
            results[f"last/{found.metric}"] = run.loss
            for part in summary.hparams(_hparams(found, run), results):
                writer.write_event(protos.Event(step=0, summary=part))
            for tag, value in results.items():
                _add(writer, protos, tag, value, 0)
            for axis in AXES:
                for cost, loss in zip(run.cost_n[axis] / unit[axis], run.loss_n, strict=True):
                    _add(writer, protos, f"{found.metric}_by/{axis}", loss, round(cost))
            writer.close()


def _add(writer: Any, protos: Any, tag: str, value: float, step: int) -> None:
    event = protos.Event(step=step)
    event.summary.value.add(tag=tag, simple_value=float(value))
    writer.write_event(event)


def _hparams(found: Comparison, run: Run) -> dict[str, Any]:
    values = config_values(run.config)
    plain = {key: values[key] for key in ("seed", *found.keys)}
    return {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in plain.items()}
