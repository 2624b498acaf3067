"""`moejax config`: the resolved config, and what differs from where it came from."""

from typing import Any

from moejax.command_line import Line, Verb
from moejax.errors import DONE
from moejax.foreign import printable
from moejax.overrides import (
    build_config,
    config_values,
    keys,
    load_values,
    read_overrides,
    sections,
    value_difference,
)


def _run(line: Line) -> int:
    assert line.config is not None
    in_file = load_values(line.config)
    values = config_values(build_config({**in_file, **read_overrides(line.overrides)}))
    for section in sections():
        print(f"{section}:")
        for name in values:
            if name.startswith(f"{section}."):
                print(f"  {name.removeprefix(f'{section}.')}: {values[name]}")
    for name in values:
        if "." not in name:
            print(f"{name}: {values[name]}")
    _show_difference(line.config, in_file, values)
    _show_difference("the defaults", {name: key.default for name, key in keys().items()}, values)
    return DONE


def _show_difference(than: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    differing = value_difference(theirs, ours)
    rows = [f"#   {key}: {before} -> {after}" for key, before, after in differing]
    title = printable(f"# differs from {than}")
    print(f"\n{title}: {'' if rows else 'nothing'}", *rows, sep="\n")


VERB = Verb(
    "config",
    "show the resolved config, and what differs from the file and from the defaults",
    "moejax config CONFIG[:ARG] [key=value ...]",
    """
  moejax config configs/quickstart.py moe.top_k=1 moe.normalize_weights=False""",
    lambda _: None,
    _run,
    ("*",),
)
