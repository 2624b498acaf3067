"""Two pictures of a run, made from its records: the loss, and what every expert got to do.

Matplotlib is imported when a picture is made, and only its Figure: no window, no global state.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moejax.metrics import read_metrics
from moejax.records import relative_load
from moejax.workdir import EXPERT_LOAD_PLOT, LOSS_PLOT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]

_DPI = 150
_TRAIN, _EVAL, _GREY = "#2b6ca3", "#c8452e", "#666666"
_MAX_COLUMNS = 400  # of a heatmap: more records than that are averaged in runs


def plot_run(workdir: Path, has_experts: bool) -> list[Path]:
    """Draws what it can of a run that is through; returns the files.

    A run is worth more than its pictures: trouble with them is said, and raised to nobody.
    """
    plots = [(plot_loss, LOSS_PLOT)]
    if has_experts:
        plots.append((plot_expert_load, EXPERT_LOAD_PLOT))
    try:
        records = read_metrics(workdir)
        return [path for plot, name in plots if (path := plot(records, workdir / name))]
    except (OSError, ValueError) as error:
        print(f"moejax train: not drawn: {error}", file=sys.stderr)
        return []


def plot_loss(records: Sequence[Record], path: str | Path) -> Path | None:
    """Draws training and validation loss against tokens seen, and below it what else a step tells.

    Args:
        records: of `moejax.metrics.read_metrics`.
        path: the PNG to write.

    Returns:
        The path, or None when there is no loss to draw yet.
    """
    train = [record for record in records if record["split"] == "train"]
    evals = [record for record in records if record["split"] == "eval"]
    if not train and not evals:
        return None
    # A dense model, or one without drops, has fewer panels.
    below = [panel for panel in _PANELS if np.nan_to_num(_column(train, panel[0])).any()]
    heights = [2.2, 1.0] if below else [1.0]
    figure = _figure(9.0, 6.6 if below else 4.6)
    grid = figure.add_gridspec(len(heights), max(1, len(below)), height_ratios=heights)
    _draw_losses(figure.add_subplot(grid[0, :]), train, evals)
    for index, (name, label, scale) in enumerate(below):
        axes = figure.add_subplot(grid[1, index])
        marker = "o" if len(train) < 30 else ""
        values = scale * _column(train, name)
        axes.plot(_tokens(train), values, color=_TRAIN, linewidth=1, marker=marker, markersize=2.5)
        _style(axes, "tokens seen", label)
    figure.savefig(path)
    return Path(path)


def plot_expert_load(records: Sequence[Record], path: str | Path) -> Path | None:
    """Draws how much each expert got to do over training: a panel a layer, a row an expert.

    Colour is load over balanced load 1/E on a logarithmic scale: white is balance, red is more,
    blue is less.

    Args:
        records: of `moejax.metrics.read_metrics`; the train records count.
        path: the PNG to write.

    Returns:
        The path, or None when no record has an expert load (a dense model).
    """
    train = [r for r in records if r["split"] == "train" and r.get("expert_load")]
    if not train:
        return None
    edges, relative_sle = _binned_load(train)
    log_sle = np.log2(np.maximum(relative_sle, 1e-6))
    # The overloaded set the scale; a dead expert is darkest blue on any.
    limit = float(np.clip(np.ceil(np.nanpercentile(log_sle, 99.5)), 1, 3))
    layers = log_sle.shape[1]
    columns = 1 if layers <= 6 else math.ceil(math.sqrt(layers * 4 / 3))
    rows = math.ceil(layers / columns)
    figure = _figure(*_heatmap_size(rows, columns))
    last = train[-1]["expert_load"]
    experts_l = [len(row) for row in last]
    same = len(set(experts_l)) == 1
    grid = figure.subplots(rows, columns, sharex=True, sharey=same, squeeze=False)
    violations = [len(row) * np.max(np.array(row, np.float64)) - 1 for row in last]
    image = _draw_layers(grid, edges, log_sle, limit, experts_l, violations)
    _label_heatmap(figure, grid, image, limit, experts_l)
    figure.savefig(path)
    return Path(path)


# Field, axis label, factor: the panels below the loss.
_PANELS = (
    ("balance_loss", "load-balancing loss\n(sum over layers)", 1.0),
    ("grad_norm", "gradient norm", 1.0),
    ("drop_fraction", "dropped assignments (%)", 100.0),
)


def _draw_losses(axes: "Axes", train: list[Record], evals: list[Record]) -> None:
    """Training loss as it was (light) and smoothed, validation loss as points."""
    tokens, loss = _tokens(train), _column(train, "loss")
    if len(train) >= 30:
        axes.plot(tokens, loss, color=_TRAIN, linewidth=0.8, alpha=0.3)
        axes.plot(tokens, _smooth(loss), color=_TRAIN, linewidth=1.6, label="training, smoothed")
    elif train:
        axes.plot(tokens, loss, "o-", color=_TRAIN, linewidth=1.4, markersize=3, label="training")
    if evals:
        style = {"color": _EVAL, "markersize": 4, "linewidth": 1.4}
        axes.plot(_tokens(evals), _column(evals, "loss"), "o-", label="validation", **style)
        at_capacity = _column(evals, "loss_at_capacity")
        if np.isfinite(at_capacity).any():
            label = "validation at capacity"
            axes.plot(
                _tokens(evals), at_capacity, color=_EVAL, linewidth=1, linestyle=":", label=label
            )
        _annotate_last(axes, evals)
    _style(axes, "tokens seen", "loss (nats per token)")
    axes.legend(frameon=False, fontsize=9)
    _add_step_axis(axes, train or evals)


def _annotate_last(axes: "Axes", evals: list[Record]) -> None:
    """Writes the last validation loss beside its point."""
    loss = evals[-1].get("loss")
    if loss is not None and math.isfinite(loss):
        where = (_tokens(evals)[-1], loss)
        beside = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
        axes.annotate(f"{loss:.3f}", where, color=_EVAL, annotation_clip=False, **beside)


def _add_step_axis(axes: "Axes", records: list[Record]) -> None:
    """Steps along the top, where tokens and steps both rise."""
    tokens, steps = _tokens(records), _column(records, "step")
    if len(records) < 2 or not (np.all(np.diff(tokens) > 0) and np.all(np.diff(steps) > 0)):
        return
    slope = (steps[-1] - steps[0]) / (tokens[-1] - tokens[0])

    def to_steps(x):
        return steps[0] + (np.asarray(x, float) - tokens[0]) * slope

    def to_tokens(x):
        return tokens[0] + (np.asarray(x, float) - steps[0]) / slope

    top = axes.secondary_xaxis("top", functions=(to_steps, to_tokens))
    top.set_xlabel("step", fontsize=9, color=_GREY)
    top.tick_params(labelsize=8, colors=_GREY)


def _draw_layers(
    grid: np.ndarray,
    edges: tuple[float, float],
    log_sle: np.ndarray,
    limit: float,
    experts_l: list[int],
    violations: Sequence[float],
) -> Any:
    """Draws a heatmap a layer, experts from top to bottom; returns one, for the colour bar."""
    image = None
    layers = len(experts_l)
    for layer, axes in enumerate(grid.flat):
        if layer >= layers:
            axes.set_axis_off()
            continue
        image = axes.imshow(
            log_sle[:, layer, : experts_l[layer]].T,
            aspect="auto",
            interpolation="nearest",
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            extent=(*edges, experts_l[layer] - 0.5, -0.5),
        )
        title = f"layer {layer}, last MaxVio {violations[layer]:.2f}"
        axes.set_title(title, fontsize=8, loc="left", pad=3)
        if layer + grid.shape[1] >= layers:  # nothing below it
            axes.tick_params(labelbottom=True)
    return image


def _label_heatmap(
    figure: "Figure", grid: np.ndarray, image: Any, limit: float, experts_l: list[int]
) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    wide = grid.shape[1] > 1
    for axes in grid.flat:
        axes.tick_params(labelsize=7, length=2)
        every = MaxNLocator(min(*experts_l, 8), integer=True, steps=[1, 2, 4, 5, 8, 10])
        axes.yaxis.set_major_locator(every)
        axes.xaxis.set_major_locator(MaxNLocator(2 if wide else 8, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.spines[:].set_linewidth(0.4)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("expert", fontsize=10)
    balance = " or ".join(f"1/{experts}" for experts in sorted(set(experts_l)))
    figure.suptitle(f"Expert load over training, relative to balance ({balance})", fontsize=11)
    ticks = np.arange(-limit, limit + 1)
    size: dict[str, Any] = {"fraction": 0.015, "shrink": 0.5} if wide else {"fraction": 0.03}
    bar = figure.colorbar(image, ax=grid, extend="both", ticks=ticks, pad=0.01, aspect=30, **size)
    bar.ax.set_yticklabels([f"{2.0**tick:g}x" for tick in ticks], fontsize=8)
    bar.set_label("load / balanced load", fontsize=9)


def _heatmap_size(rows: int, columns: int) -> tuple[float, float]:
    """Inches; 256 experts still have a pixel each in a panel of the 48-layer grid."""
    if columns == 1:
        return 9.0, 1.2 + 1.5 * rows
    return 1.2 + 1.9 * columns, 1.2 + 2.1 * rows


def _binned_load(train: list[Record]) -> tuple[tuple[float, float], np.ndarray]:
    """Returns where the columns begin and end, in steps, and load over balanced load [S, L, E]."""
    steps = _column(train, "step")
    relative_sle = np.stack([relative_load(record["expert_load"]) for record in train])
    parts = min(len(steps), _MAX_COLUMNS)
    runs = np.array_split(np.arange(len(steps)), parts)
    binned_sle = np.stack([relative_sle[run].mean(axis=0) for run in runs])
    # A record stands in the middle of its column.
    half = (steps[-1] - steps[0]) / (2 * (len(steps) - 1)) if len(steps) > 1 else 0.5
    return (steps[0] - half, steps[-1] + half), binned_sle


def _tokens(records: list[Record]) -> np.ndarray:
    return _column(records, "tokens_seen")


def _column(records: list[Record], name: str) -> np.ndarray:
    """A field of every record as floats; what is missing or null is NaN, which leaves a gap."""
    values = [record.get(name) for record in records]
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred mean over 2% of the points (at least 5), over what is known of them."""
    width = max(5, len(values) // 50) | 1
    known = np.isfinite(values)
    kernel = np.ones(width)
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    count = np.convolve(known.astype(float), kernel, mode="same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white")


def _style(axes: "Axes", x_label: str, y_label: str) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(labelsize=8)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
