"""Rows that tests hold: pytest runs them, once each, a file a process."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from faults.bench import ROOT, Broken, Outcome, expect
from faults.size import EXAMPLES
from moejax.foreign import write_atomically

FILE_SECONDS = 1500.0


class Suite:
    """Outcomes of the tests that were run in this session.

    Args:
        file: JSON lines, of tests that have ended; those that did not fail are not run again.
        tests: `test_lock.test_name` of all rows, which are run together, a file at a time.
    """

    def __init__(self, file: Path, tests: list[str]):
        self._file, self._tests = file, sorted(set(tests))
        passed = [line for line in self._lines() if line["outcome"] != "failed"]
        if file.exists():
            write_atomically(file, "".join(f"{json.dumps(line)}\n" for line in passed))
        self._locks = {name.split(".")[0]: threading.Lock() for name in self._tests}

    def outcome(self, names: tuple[str, ...]) -> Outcome:
        """Runs what was not run and returns what became of the tests of a row.

        Raises:
            Broken: one failed, or was not there.
        """
        for module in sorted({name.split(".")[0] for name in names}):
            with self._locks[module]:
                self._run(module, names)
        found = [line for name in names for line in self._of(name)]
        failed = [line for line in found if line["outcome"] == "failed"]
        expect(not failed, "; ".join(f"{line['test']}: {line['why']}" for line in failed)[-600:])
        missing = [name for name in names if not self._of(name)]
        expect(not missing, f"not run: {', '.join(missing)}")
        passed = sum(line["outcome"] == "passed" for line in found)
        expect(passed > 0, "all were skipped")
        skipped = f", {len(found) - passed} skipped" if len(found) > passed else ""
        return Outcome(f"{passed} tests passed{skipped}", passed)

    def _run(self, module: str, names: tuple[str, ...]) -> None:
        wanted = [name for name in self._tests if name.startswith(f"{module}.")]
        if not any(not self._of(name) for name in wanted if name in names):
            return
        ids = [node_id(name) for name in wanted if not self._of(name)]
        options = ["-q", "-p", "faults.record", "-p", "no:cacheprovider", "-m", "slow or not slow"]
        words = [sys.executable, "-m", "pytest", *options, *ids]
        environment = os.environ | {
            "FAULTS_TESTS": str(self._file),
            "MOEJAX_FUZZ_EXAMPLES": str(EXAMPLES),
            "PYTHONPATH": str(ROOT),
        }
        try:
            done = subprocess.run(
                words,
                env=environment,
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=FILE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Broken(f"tests/{module}.py hangs") from None
        # whole: a row has room for the end of a failure only
        self._file.with_name(f"{self._file.stem}-{module}.log").write_text(done.stdout)
        expect(
            done.returncode in (0, 1), f"pytest ended with {done.returncode}: {done.stdout[-400:]}"
        )

    def _of(self, name: str) -> list[dict]:
        """The outcomes of a test, one for each of its parameters."""
        own = (e for e in self._lines() if e["test"].partition("[")[0] == node_id(name))
        return list({entry["test"]: entry for entry in own}.values())

    def _lines(self) -> list[dict]:
        if not self._file.exists():
            return []
        return list(map(json.loads, self._file.read_text(encoding="utf-8").splitlines()))


def node_id(name: str) -> str:
    """Returns `tests/test_lock.py::test_name` for `test_lock.test_name`."""
    module, _, function = name.partition(".")
    return f"tests/{module}.py::{function}"
