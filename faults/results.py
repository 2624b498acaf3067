"""What was seen, a JSON line a row, so that a harness that was interrupted goes on."""

import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moejax.events import append_line


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one row in one session.

    Attributes:
        row: its name in the table.
        session: counts the runs of the harness that went through, in this form.
        form: short, full or long.
        date: UTC, day.
        passed: whether what had to happen happened.
        seen: one sentence, or what went wrong.
        runs, losses, seconds_lost: see `bench.Outcome`.
        took: seconds.
    """

    row: str
    session: int
    form: str
    date: str
    passed: bool
    seen: str
    runs: int
    losses: int
    seconds_lost: float | None
    took: float


class Results:
    """The file of all results of one form."""

    def __init__(self, folder: Path, form: str):
        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._form = folder / f"{form}.jsonl", form
        lines = self._read()
        self.session = 1 + sum("finished" in line for line in lines)
        self._results = [Result(**line) for line in lines if "row" in line]

    def _read(self) -> list[dict[str, Any]]:
        if not self._file.exists():
            return []
        lines = []
        for line in self._file.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:  # cut off by whoever interrupted the harness
                continue
        return lines

    def passed(self) -> set[str]:
        """The rows that are done in this session."""
        return {r.row for r in self._results if r.session == self.session and r.passed}

    def newest(self) -> dict[str, Result]:
        """The last result of each row, of whatever session."""
        return {result.row: result for result in self._results}

    def add(
        self,
        row: str,
        passed: bool,
        seen: str,
        runs: int,
        losses: int,
        seconds_lost: float | None,
        took: float,
    ) -> None:
        today = datetime.now(UTC).date().isoformat()
        rounded = None if seconds_lost is None else round(seconds_lost, 2)
        result = Result(
            *(row, self.session, self._form, today),
            *(passed, seen, runs, losses, rounded, round(took, 1)),
        )
        self._results.append(result)
        append_line(self._file, json.dumps(dataclasses.asdict(result)))

    def finish(self) -> None:
        """The next one begins from the first row."""
        append_line(self._file, json.dumps({"finished": self.session}))
