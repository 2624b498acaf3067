"""docs/routers.md: every router and config is there, and the words of every row are valid."""

import re
from pathlib import Path
from typing import get_args

import pytest

from moejax.config import Config
from moejax.moe_config import NOT_CAUSAL, Router
from moejax.overrides import load_config

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "routers.md").read_text()
CONFIGS = sorted((ROOT / "configs" / "routers").glob("*.py"))
QUICKSTART = str(ROOT / "configs" / "quickstart.py")


def _rows() -> list[tuple[str, list[str], str]]:
    """Returns (first cell, words, config) of each table row that names a config."""
    found = []
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if match := re.fullmatch(r"`(\w+\.py)` ?", cells[-1].rstrip("| ")):
            (words,) = [c for c in cells if re.fullmatch(r"`(\w+\.\w+=\S+ ?)+`", c)]
            found.append((cells[0], words.strip("`").split(), match[1]))
    return found


ROWS = _rows()


def test_every_router_is_selected_by_a_row():
    selected = {word.removeprefix("moe.router=") for _, words, _ in ROWS for word in words}
    assert set(get_args(Router)) <= selected


def test_every_config_is_named_by_a_row():
    named = {config for *_, config in ROWS}
    assert named == {file.name for file in CONFIGS} - {"base.py"}
    assert len(named) >= 22


@pytest.mark.parametrize(("words", "file"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_the_words_of_a_row_are_valid_and_ask_for_what_its_config_is(words, file):
    quick = load_config(QUICKSTART, words).moe
    small = load_config(str(ROOT / "configs" / "routers" / file)).moe
    assert quick.router == small.router
    for word in words:
        name = word.partition("=")[0].removeprefix("moe.")
        if name != "router":
            assert getattr(quick, name) == getattr(small, name), word
            assert getattr(quick, name) != getattr(load_config(QUICKSTART).moe, name), word


@pytest.mark.parametrize("router", get_args(Router))
def test_the_name_of_a_router_is_enough(router):
    words = [f"moe.router={router}"]
    if router in NOT_CAUSAL:
        words.append("moe.allow_noncausal=True")
    assert load_config(QUICKSTART, words).moe.router == router


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_configs_load_fit_and_say_how_to_run_them(file):
    config: Config = load_config(str(file))
    for devices in (1, 2, 4, 8):
        config.check_mesh(config.mesh.resolve(devices))
    source = file.read_text()
    assert f"moejax train configs/routers/{file.name} --workdir runs/" in source
    if config.moe.noncausal_reason:
        assert re.search("not causal", source, flags=re.IGNORECASE)
    else:
        assert not config.moe.allow_noncausal
