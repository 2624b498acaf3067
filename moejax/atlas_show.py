"""What `moejax inspect` shows: tables, JSON, and a picture of one text. No JAX."""

import colorsys
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moejax.atlas import Atlas, TokenView
from moejax.progress import printable
from moejax.tallies import Agreement

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN_TOKENS = 6  # of an expert, in the table
SHOWN_EXPERTS = 12
SHOWN_LAYERS = 6  # of a text, in the table


def _table(console: Console | None, title: str, columns: Sequence[str], rows) -> None:
    """Prints a table: what comes from data is shown as it is, and steers no terminal."""
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number in (0, len(columns) - 1) else "right")
    console = console or Console(highlight=False)
    console.print(escape(printable(title)))
    for row in rows:
        cells = (printable(cell).encode(console.encoding, "backslashreplace") for cell in row)
        table.add_row(*(escape(cell.decode(console.encoding)) for cell in cells))
    console.print(table)


def _number(value: float, spec: str = ".4f") -> str:
    return "n/a" if math.isnan(value) else format(value, spec)


def visible(text: str) -> str:
    """Returns a token's text with what has no picture spelled out; a space is a mark."""
    return printable(text.replace("\n", "\\n").replace(" ", "\u2423")) or "\u2205"


# The atlas


def show_atlas(atlas: Atlas, console: Console | None = None) -> None:
    """Shows a row a layer, a row for some experts, and what there is to know of both."""
    load_le = atlas.load_dle.sum(0)
    rows = []
    for i, layer in enumerate(atlas.layers_l):
        load_e = load_le[i, : atlas.experts_l[i]]
        busiest = load_e.max() * len(load_e) / max(load_e.sum(), 1)
        same = _number(float(atlas.saturation_sl[-1, i]), ".1%") if _looks_back(atlas) else "n/a"
        row = (str(layer), str(len(load_e)), str(int((load_e == 0).sum())), f"{busiest:.2f}x")
        rows.append((*row, f"{atlas.information_l[i]:.4f}", same))
    before = (
        f"same as at step {atlas.saturation_steps[-1]}" if _looks_back(atlas) else "same before"
    )
    columns = ("layer", "experts", "dead", "busiest", "information", before)
    title = f"step {atlas.step}, {atlas.tokens:,} tokens of {', '.join(atlas.domains)}"
    _table(console, title, columns, rows)
    columns = ("layer", "expert", "share", "without it", "its own", "others", "takes over chance")
    rows = [_expert_row(atlas, load_le, *pair) for pair in _telling_experts(atlas)]
    _table(console, "\nexperts without which the loss rises most, in nats", columns, rows)
    for note in atlas.notes:
        (console or Console(highlight=False)).print(escape(f"note: {note}"))


def _looks_back(atlas: Atlas) -> bool:
    return len(atlas.saturation_steps) > 0


def _telling_experts(atlas: Atlas) -> list[tuple[int, int]]:
    """Returns the experts without which the loss rises most; if none was left out, the busiest."""
    value_le = atlas.removed_le
    if np.isnan(value_le).all():
        value_le = atlas.load_dle.sum(0).astype(np.float64)
    order = np.argsort(-np.nan_to_num(value_le, nan=-np.inf), axis=None)
    pairs = [divmod(int(i), value_le.shape[1]) for i in order]
    # layers with fewer experts are padded
    return [(layer, e) for layer, e in pairs if e < atlas.experts_l[layer]][:SHOWN_EXPERTS]


def _expert_row(atlas: Atlas, load_le: np.ndarray, layer: int, expert: int) -> tuple[str, ...]:
    ids, lifts = (leaf[layer, expert] for leaf in (atlas.top_token_lew, atlas.top_lift_lew))
    tokens = [
        f"{visible(atlas.text(int(token)))}:{lift:.1f}"
        for token, lift in zip(ids[:SHOWN_TOKENS], lifts, strict=False)
        if token >= 0
    ]
    rises = (atlas.removed_le, atlas.removed_own_le, atlas.removed_other_le)
    return (
        str(atlas.layers_l[layer]),
        str(expert),
        f"{load_le[layer, expert] / max(load_le[layer].sum(), 1):.1%}",
        *(_number(float(rise_le[layer, expert]), "+.4f") for rise_le in rises),
        "  ".join(tokens),
    )


def atlas_json(atlas: Atlas) -> dict[str, Any]:
    """Returns what `show_atlas` is made of, for every layer and expert; None for NaN."""
    load_le = atlas.load_dle.sum(0)
    experts = [
        {
            "layer": int(atlas.layers_l[layer]),
            "expert": expert,
            "assignments": int(load_le[layer, expert]),
            "assignments_by_domain": dict(
                zip(atlas.domains, atlas.load_dle[:, layer, expert].tolist(), strict=True)
            ),
            "norm": plain(atlas.norm_le[layer, expert]),
            "removed": plain(atlas.removed_le[layer, expert]),
            "removed_own": plain(atlas.removed_own_le[layer, expert]),
            "removed_other": plain(atlas.removed_other_le[layer, expert]),
            "tokens": [
                {"id": int(token), "text": atlas.text(int(token)), "lift": plain(lift)}
                for token, lift in zip(
                    atlas.top_token_lew[layer, expert],
                    atlas.top_lift_lew[layer, expert],
                    strict=True,
                )
                if token >= 0
            ],
        }
        for layer, count in enumerate(atlas.experts_l)
        for expert in range(count)
    ]
    return {
        "step": atlas.step,
        "tokens": atlas.tokens,
        "layers": atlas.layers_l.tolist(),
        "information": plain(atlas.information_l),
        "saturation": {
            str(step): plain(row)
            for step, row in zip(atlas.saturation_steps, atlas.saturation_sl, strict=True)
        },
        "experts": experts,
        "notes": list(atlas.notes),
    }


def plain(value: Any) -> Any:
    """Returns numbers as JSON has them: NaN is None."""
    if isinstance(value, np.ndarray | list):
        return [plain(entry) for entry in value]
    return None if math.isnan(value) else float(value)


# Agreement


def show_agreement(
    steps: tuple[int, int],
    tokens: int,
    layers_l: np.ndarray,
    found: Agreement,
    console: Console | None = None,
) -> None:
    """Shows a row a layer."""
    rows = [
        (str(layer), *(f"{share:.1%}" for share in shares))
        for layer, *shares in zip(
            layers_l, found.same_l, found.chance_l, found.matched_l, strict=True
        )
    ]
    title = f"routing at step {steps[0]} and at step {steps[1]}, {tokens:,} tokens"
    _table(console, title, ("layer", "same", "by chance", "renamed"), rows)


def agreement_json(
    steps: tuple[int, int], tokens: int, layers_l: np.ndarray, found: Agreement
) -> dict[str, Any]:
    return {
        "steps": list(steps),
        "tokens": tokens,
        "layers": layers_l.tolist(),
        "same": plain(found.same_l),
        "by_chance": plain(found.chance_l),
        "renamed": plain(found.matched_l),
        "names": found.match_le.tolist(),
    }


# One text


def show_view(
    step: int, view: TokenView, layers_l: np.ndarray, console: Console | None = None
) -> None:
    """Shows a row a token: its loss, and its experts with their weights in some layers."""
    shown = np.unique(
        np.linspace(0, len(layers_l) - 1, min(SHOWN_LAYERS, len(layers_l)), dtype=int)
    )
    rows = [
        (
            visible(token),
            _number(float(view.loss_t[t]), ".2f"),
            *(_choices(view, layer, t) for layer in shown),
        )
        for t, token in enumerate(view.tokens)
    ]
    columns = ("token", "loss", *(f"layer {layers_l[layer]}" for layer in shown))
    _table(console, f"experts and their weights at step {step}", columns, rows)


def _choices(view: TokenView, layer: int, t: int) -> str:
    pairs = zip(view.expert_ltk[layer, t], view.weight_ltk[layer, t], strict=True)
    return " ".join(f"{expert}:{weight:.2f}" for expert, weight in list(pairs)[:4] if expert >= 0)


def view_json(step: int, view: TokenView, layers_l: np.ndarray) -> dict[str, Any]:
    """Returns a view with a list a layer: for each token its experts and weights, strongest first.

    None stands for the loss of the first token, which has none.
    """
    by_layer = [
        {
            "layer": int(number),
            "experts": [[int(e) for e in row if e >= 0] for row in view.expert_ltk[i]],
            "weights": [
                [float(w) for e, w in zip(row, weights, strict=True) if e >= 0]
                for row, weights in zip(view.expert_ltk[i], view.weight_ltk[i], strict=True)
            ],
        }
        for i, number in enumerate(layers_l)
    ]
    return {
        "step": step,
        "name": view.name,
        "tokens": list(view.tokens),
        "loss": plain(view.loss_t),
        "layers": by_layer,
    }


COLUMNS = 48  # tokens of a row of the picture
MOST_TOKENS = 5 * COLUMNS  # of the picture
CELL = 0.24  # inches
LUMINANCE = np.array([0.299, 0.587, 0.114])  # of red, green and blue, Rec. 601


def expert_colour(expert: int) -> tuple[float, float, float]:
    """Returns the colour of an expert: neighbours are far apart on the wheel."""
    lightness = (0.45, 0.55, 0.65)[expert % 3]
    return colorsys.hls_to_rgb((expert * 0.618033988749895) % 1, lightness, 0.6)


def plot_view(view: TokenView, layers_l: np.ndarray, path: str | Path) -> None:
    """Draws each token's strongest expert: a row a layer, a column a token, in lines of `COLUMNS`.

    A colour is an expert, paler where its weight is smaller. Texts longer than `MOST_TOKENS` are
    cut, and the title says so.
    """
    from matplotlib.figure import Figure

    tokens = min(len(view.tokens), MOST_TOKENS)
    width, lines = min(tokens, COLUMNS), -(-tokens // COLUMNS)
    size = (max(6.0, 1.2 + CELL * width), 0.7 + lines * (0.5 + CELL * len(layers_l)))
    figure = Figure(figsize=size, dpi=150, layout="constrained", facecolor="white")
    grid = figure.subplots(lines, 1, squeeze=False)[:, 0]
    for line, axes in enumerate(grid):
        start = line * COLUMNS
        _draw_line(axes, view, layers_l, slice(start, min(start + COLUMNS, tokens)), width)
    cut = f"; the first {tokens} of {len(view.tokens)} tokens" if tokens < len(view.tokens) else ""
    figure.suptitle(f"Strongest expert of each token by layer, paler for less weight{cut}", size=9)
    figure.savefig(path)


def _draw_line(
    axes: "Axes", view: TokenView, layers_l: np.ndarray, part: slice, width: int
) -> None:
    expert_lt, weight_lt = view.expert_ltk[:, part, 0], view.weight_ltk[:, part, 0]
    colour_lt3 = np.ones((*expert_lt.shape, 3))
    for layer, t in np.argwhere(expert_lt >= 0):
        strength = 0.25 + 0.75 * min(1.0, float(weight_lt[layer, t]))
        full = np.array(expert_colour(int(expert_lt[layer, t])))
        colour_lt3[layer, t] = 1 - strength * (1 - full)
        dark = colour_lt3[layer, t] @ LUMINANCE < 0.5
        axes.text(
            float(t),
            float(layer),
            str(expert_lt[layer, t]),
            ha="center",
            va="center",
            size=5.5,
            color="white" if dark else "black",
        )
    axes.imshow(colour_lt3, aspect="auto", interpolation="nearest")
    axes.set_xlim(-0.5, width - 0.5)
    labels = [_drawable(visible(token)) for token in view.tokens[part]]
    turn = 90 if max(map(len, labels)) > 2 else 0  # longer ones would overlap
    axes.set_xticks(range(len(labels)), labels, fontsize=7, parse_math=False, rotation=turn)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(layers_l)), [str(layer) for layer in layers_l], fontsize=7)
    axes.set_ylabel("layer", fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _drawable(text: str) -> str:
    """Spells out what the font has no picture of; long tokens are cut."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    known = [c if font.get_char_index(ord(c)) else f"U+{ord(c):X}" for c in text]
    return "".join(known) if len(known) <= 5 else "".join(known[:4]) + "\u2026"
