"""What `moejax inspect` shows of an atlas: its tables."""

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console
from test_atlas import atlas

from moejax import atlas_show
from moejax.atlas_show import show_atlas


def _shown(**changes) -> str:
    console = Console(file=io.StringIO(), width=200, highlight=False)
    show_atlas(dataclasses.replace(atlas(), **changes), console)
    return console.file.getvalue()


def _experts(shown: str) -> list[tuple[str, str]]:
    """Returns layer and expert of each row of the table of experts."""
    rows = shown.split("without which the loss rises most")[1].splitlines()
    cells = [row.split() for row in rows]
    return [(row[0], row[1]) for row in cells if len(row) > 2 and row[0].isdigit()]


def test_layers_are_counted_without_their_padding():
    """The first layer has one expert, in arrays for three."""
    shown = _shown(experts_l=np.array([1, 3]), load_dle=np.ones((2, 2, 3), int))
    table = shown.split("experts without which")[0]
    (first,) = (line.split() for line in table.splitlines() if line.split()[:1] == ["1"])
    assert first[1:4] == ["1", "0", "1.00x"]


@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        ([[0.5, np.nan, np.nan], [np.nan, 0.7, np.nan]], [("3", "1"), ("1", "0"), ("3", "0")]),
        (np.full((2, 3), np.nan), [("1", "0"), ("3", "0"), ("3", "1")]),
    ],
    ids=["by what the loss rises", "by load where none was left out"],
)
def test_padding_takes_no_place_among_the_experts_shown(monkeypatch, removed, expected):
    """Experts that nobody removed, or chose, and padding are equal; only experts are shown."""
    monkeypatch.setattr(atlas_show, "SHOWN_EXPERTS", 3)
    removed_le = np.array(removed, np.float32)
    shown = _shown(
        experts_l=np.array([1, 3]), load_dle=np.zeros((2, 2, 3), int), removed_le=removed_le
    )
    assert _experts(shown) == expected
