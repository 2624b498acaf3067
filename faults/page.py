"""docs/faults.md, from the newest result of every row."""

import re
from pathlib import Path

from faults.results import Result
from faults.size import SIZES
from faults.suite import node_id
from faults.table import GROUPS, ROWS, Row
from moejax.foreign import write_atomically

LONG = ("<!-- long:begin -->\n", "<!-- long:end -->\n")  # what `make faults` leaves as it is
NO_LONG = "`make faults-long` (200 kills) was not run yet.\n"
HEAD = """# Faults

What is broken on purpose, what has to happen, and what was seen. Written by `make faults`:
trainings are started as processes, on CPU, and really broken; rows without a process of their own
are held by tests, which the same command runs. The training is tiny (2 layers, width 32, a step of
milliseconds), so that saves are under way most of the time; all randomness is seeded.

```
make faults-short   # {short} kills and everything that needs no test suite; a part of .ci/run
make faults         # {full} kills, all rows, this page
make faults-long    # {long} kills, and the line about them below
```

**Losses** are records of steps (loss, gradient norm, expert loads and the rest, all but the
clock's) that were equal bit for bit to those of a run that nothing disturbed. **Seconds lost** are
what the run's own ledger says that a fault cost: steps done again, nothing running, starting and
compiling again; for SIGTERM, until the process had saved and ended. A row fails when one committed
step is lost, one number differs, anything hangs, or an error comes as a traceback where one line
was due.

"""


def write_page(file: Path, found: dict[str, Result]) -> None:
    """Writes the page; a row without a result says so."""
    kills = {form: size.kills for form, size in SIZES.items()}
    parts = [HEAD.format(**kills), _summary(found), LONG[0], _long_of(file), LONG[1]]
    for title, rows in GROUPS.items():
        parts.append(f"\n## {title}\n\n")
        parts.append("| # | fault | how made | expected | seen | runs | losses | seconds lost |\n")
        parts.append("|---|---|---|---|---|---|---|---|\n")
        parts += [_line(row, found.get(row.name)) for row in rows]
    parts.append("\n## Tests of the rows\n\n")
    for row in ROWS.values():
        if row.tests:
            names = ", ".join(f"`{node_id(test)}`" for test in row.tests)
            parts.append(f"- {row.name}: {names}\n")
    write_atomically(file, "".join(parts))


def write_long(file: Path, result: Result) -> None:
    """Puts the last long run's result on the page."""
    state = "" if result.passed else "FAILED: "
    text = (
        f"`make faults-long`, {result.date}: {state}{result.runs} SIGKILLs, {result.losses:,} "
        f"losses compared, {result.took / 60:.0f} minutes; {result.seen}.\n"
    )
    page = file.read_text(encoding="utf-8")
    before, _, rest = page.partition(LONG[0])
    _, _, after = rest.partition(LONG[1])
    write_atomically(file, f"{before}{LONG[0]}{text}{LONG[1]}{after}")


def _long_of(file: Path) -> str:
    if not file.exists():
        return NO_LONG
    match = re.search(f"{LONG[0]}(.*?){LONG[1]}", file.read_text(encoding="utf-8"), re.DOTALL)
    return match[1] if match else NO_LONG


def _summary(found: dict[str, Result]) -> str:
    seen = [found[name] for name in ROWS if name in found]
    failed = [result.row for result in seen if not result.passed]
    missing = [name for name in ROWS if name not in found]
    short = [result.row for result in seen if result.form == "short"]
    state = [f"all {len(ROWS)} rows hold" if len(failed + missing) == 0 else ""]
    state += [f"FAILED: rows {', '.join(failed)}" if failed else ""]
    state += [f"not run yet: rows {', '.join(missing)}" if missing else ""]
    state += [f"run in the short form only: rows {', '.join(short)}" if short else ""]
    dates = sorted({result.date for result in seen})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    compared = sum(result.losses for result in seen)
    said = "; ".join(part for part in state if part)
    return f"{when}: {said}; {compared:,} losses compared.\n\n"


def _line(row: Row, result: Result | None) -> str:
    if result is None:
        cells = (row.name, row.fault, row.made, row.expected, "not run yet", "", "", "")
        return f"| {' | '.join(_cell(cell) for cell in cells)} |\n"
    seconds = "" if result.seconds_lost is None else f"{result.seconds_lost:.1f}"
    losses = f"{result.losses:,}" if result.losses else ""
    seen = result.seen if result.passed else f"**FAILED**: {result.seen}"
    cells = (row.name, row.fault, row.made, row.expected, seen, result.runs, losses, seconds)
    return f"| {' | '.join(_cell(cell) for cell in cells)} |\n"


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").split())
