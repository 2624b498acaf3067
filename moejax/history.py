"""What a run remembers besides arrays: what it counted, and which batches no step sees. No JAX."""

from collections.abc import Mapping, Sequence
from typing import Any

from moejax.skip_list import SkipList, resumed_list
from moejax.watch_config import WatchConfig

# Sums over all steps so far; every record has them.
COUNTERS = (
    *("tokens_seen", "routed_seen", "dropped_seen"),
    *("skipped_updates", "corrupt_sequences"),
)


class History:
    """What a checkpoint has besides arrays, and how often the run went back.

    Args:
        config: the batches to leave out from the start.

    Attributes:
        counters: by COUNTERS.
        streaks: steps in a row over each limit of collapse, by its name.
    """

    def __init__(self, config: WatchConfig):
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.streaks: dict[str, int] = {}
        self._skip_list = SkipList.parse(config.skip_batches)
        self._rollbacks: dict[int, int] = {}  # by the step of the checkpoint

    def batch(self, finished: int) -> int:
        """Returns the index of the batch after `finished` steps."""
        return self._skip_list.batch(finished)

    def meta(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of it; `restore` reads it."""
        return {
            "counters": dict(self.counters),
            "watch": {"skip_batches": str(self._skip_list), "streaks": self.streaks},
        }

    def restore(self, step: int, meta: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint; batches that are left out already stay so.

        Raises:
            ConfigError: `watch.skip_batches` has batches that the checkpoint's run has seen.
        """
        self.counters = dict.fromkeys(COUNTERS, 0) | meta["counters"]
        self.streaks = meta["watch"]["streaks"]
        stored = SkipList.parse(meta["watch"]["skip_batches"])
        self._skip_list = resumed_list(stored, self._skip_list, step)

    def recall_rollbacks(self, step: int, left_out: Sequence[tuple[int, int]]) -> None:
        """Takes the rollbacks of earlier processes to the checkpoint of `step`.

        The checkpoint lacks them if the process ended between a rollback and its next save.

        Args:
            left_out: the first and the last batch of each.
        """
        self._rollbacks[step] = len(left_out)
        for first, last in left_out:
            self._skip_list = self._skip_list.add(first, last + 1)

    def count_rollback(self, step: int) -> int:
        """Counts a rollback to the checkpoint of `step`; returns how many were before it."""
        times = self._rollbacks.get(step, 0)
        self._rollbacks[step] = times + 1
        return times

    def leave_out(self, finished: int, step: int) -> tuple[int, int]:
        """Leaves out the batches from after `finished` steps to that of `step`; returns both."""
        first, last = self.batch(finished), self.batch(step - 1)
        self._skip_list = self._skip_list.add(first, last + 1)
        return first, last
