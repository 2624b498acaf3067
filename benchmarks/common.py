"""What the benchmarks share: rows, the table, `--json`, and timing two sides in turn."""

import argparse
import dataclasses
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Row:
    """A measurement; `ratio` is its value over that of the row `baseline` of the same run."""

    name: str
    value: float
    unit: str
    baseline: str | None = None
    ratio: float | None = None


def arguments(description: str) -> argparse.ArgumentParser:
    """Returns a parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--repeats", type=int, default=9, help="timings of each side (default 9)")
    return parser


@dataclasses.dataclass
class Seconds:
    """Medians over the timings of one side: wall, and CPU of the whole process."""

    wall: float
    cpu: float


def alternate(sides: dict[str, Callable[[], None]], repeats: int) -> dict[str, Seconds]:
    """Times each side `repeats` times, in turn, so that a drift of the machine hits all alike."""
    for run in sides.values():
        run()  # compile and warm up
    timings: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            wall, cpu = time.perf_counter(), _cpu_seconds()
            run()
            timings[name].append((time.perf_counter() - wall, _cpu_seconds() - cpu))
    return {
        name: Seconds(*(statistics.median(column) for column in zip(*rows, strict=True)))
        for name, rows in timings.items()
    }


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def matmul_peak(size: int = 2048, repeats: int = 9) -> float:
    """Returns the machine's measured float32 matmul speed on one JAX device, FLOP/s."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(lambda a, b: a @ b)
    multiply(x, x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def compile_rows(
    measure: Callable[[int], tuple[float, int]], sizes: list[int], what: str, repeats: int
) -> list[Row]:
    """Returns the rows of a program compiled for several `sizes`, which take turns.

    Args:
        measure: size -> (CPU seconds to lower and compile, characters of the HLO).
        what: the word for a size; the first size is the baseline.
    """
    measure(sizes[0])  # imports and first-time work
    results: dict[int, list[tuple[float, int]]] = {size: [] for size in sizes}
    for _ in range(repeats):
        for size in sizes:
            results[size].append(measure(size))
    rows = []
    for kind, unit, column in (("compile", "CPU s", 0), ("HLO", "characters", 1)):
        base = statistics.median(r[column] for r in results[sizes[0]])
        for size in sizes:
            value = statistics.median(r[column] for r in results[size])
            baseline = f"{kind}, {sizes[0]} {what}"
            rows.append(Row(f"{kind}, {size} {what}", value, unit, baseline, value / base))
    return rows


def report(title: str, rows: list[Row], json_path: Path | None) -> None:
    """Prints the rows and writes them to `json_path`, if given."""
    table = Table(title=title)
    for column in ("name", "value", "unit", "baseline", "ratio"):
        table.add_column(column, justify="right" if column in ("value", "ratio") else "left")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        table.add_row(row.name, f"{row.value:,.4g}", row.unit, row.baseline or "", ratio)
    Console(highlight=False, width=110).print(table)
    if json_path is not None:
        content = {"title": title, "rows": [dataclasses.asdict(row) for row in rows]}
        json_path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
