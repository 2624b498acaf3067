"""python -m faults [--form short|full|long] [--only 12 29] [--jobs 2]; see docs/faults.md.

What is done stays in runs/faults: a harness that was interrupted goes on where it was.
"""

import argparse
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults.bench import ROOT, Bench, Broken, Outcome
from faults.page import write_long, write_page
from faults.results import Results
from faults.size import SIZES
from faults.suite import Suite
from faults.table import ROWS, Row

PAGE = ROOT / "docs" / "faults.md"
FIRST = ("1", "60", "59", "12", "29", "22", "27", "43")  # they take longest


class Harness:
    """Runs rows and keeps what was seen.

    Args:
        form: short, full or long.
        folder: of results and of all trainings.
        only: names of rows; those are run whether they were or not. None: all that are left.
        seed: of all that is random.
    """

    def __init__(self, form: str, folder: Path, only: Sequence[str] | None, seed: int):
        folder = folder.resolve()  # tests may change the folder that they are in
        self.form, self.size, self.folder = form, SIZES[form], folder
        self.results = Results(folder, form)
        self.only = only
        self.bench = Bench(folder / form, seed)
        again = f"-{time.time_ns()}" if only else ""
        tests = folder / f"{form}-tests-{self.results.session}{again}.jsonl"
        self.suite = Suite(tests, [test for row in self.rows() for test in row.tests])
        self._lock = threading.Lock()

    def all(self) -> list[Row]:
        """The rows of this form, those that take longest first."""
        names = sorted(ROWS, key=lambda name: (*FIRST, name).index(name))
        rows = [ROWS[name] for name in names]
        if self.form == "long":
            return [ROWS["1"]]
        if self.form == "short":  # make test and make test-slow run the tests
            return [row for row in rows if row.run is not None]
        return rows

    def rows(self) -> list[Row]:
        """The rows that are to be run."""
        if self.only:
            return [row for row in self.all() if row.name in self.only]
        done = self.results.passed()
        return [row for row in self.all() if row.name not in done]

    def run(self, row: Row) -> bool:
        """Runs a row; returns whether it held."""
        begun = time.monotonic()
        try:
            passed, outcome = True, self._outcome(row)
        except Exception as error:  # a row that fails in any way is a row that fails
            said = str(error) if isinstance(error, Broken) else repr(error)
            passed, outcome = False, Outcome(said or "failed", 0)
        took = time.monotonic() - begun
        with self._lock:
            self.results.add(row.name, passed, *outcome, took)
            state = "ok" if passed else "FAILED"
            print(f"{row.name:>3} {state:6} {took:6.1f} s  {outcome.seen}", flush=True)
        return passed

    def _outcome(self, row: Row) -> Outcome:
        tests = row.tests if self.form == "full" or row.run is None else ()
        ran = row.run(self.bench, self.size) if row.run is not None else None
        tested = self.suite.outcome(tests) if tests else None
        if ran is None or tested is None:
            found = ran or tested
            assert found is not None, "every row has one or the other"
            return found
        return ran._replace(seen=f"{ran.seen}; {tested.seen}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--form", choices=sorted(SIZES), default="full", help="default: full")
    parser.add_argument("--only", nargs="+", choices=[*ROWS], metavar="ROW", help="run these rows")
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time (default 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "faults")
    options = parser.parse_args(argv)
    harness = Harness(options.form, options.folder, options.only, options.seed)
    begun = time.monotonic()
    harness.bench.prepare()
    with ThreadPoolExecutor(options.jobs) as pool:
        held = list(pool.map(harness.run, harness.rows()))
    return finish(harness, all(held), time.monotonic() - begun)


def finish(harness: Harness, held: bool, took: float) -> int:
    """Writes what was seen on the page; returns the exit code."""
    found = harness.results.newest()
    if held and not harness.only:
        harness.results.finish()
    if harness.form == "long":
        write_long(PAGE, found["1"])
    elif harness.form == "full":
        short = Results(harness.folder, "short").newest()
        write_page(PAGE, {**short, **found})
    print(f"{harness.form}: {'all rows hold' if held else 'ROWS FAILED'}, {took / 60:.1f} minutes")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
