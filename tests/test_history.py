"""What a run remembers besides arrays, without a training."""

import json

import pytest

from moejax.errors import ConfigError
from moejax.history import COUNTERS, History
from moejax.watch_config import WatchConfig


def _history(skip_batches=None):
    return History(WatchConfig(skip_batches=skip_batches))


def _batches(history, steps):
    return [history.batch(finished) for finished in range(steps)]


def test_a_checkpoint_brings_back_all_of_it():
    """Through JSON, into a run that was asked to leave out another batch ahead."""
    before = _history("1")
    before.counters["tokens_seen"] = 70
    before.streaks = {"max_violation": 2}
    meta = json.loads(json.dumps(before.meta()))
    after = _history("1,6")
    after.counters["dropped_seen"] = 5  # of a step that is done again
    after.restore(3, meta)
    assert after.counters == dict.fromkeys(COUNTERS, 0) | {"tokens_seen": 70}
    assert after.streaks == {"max_violation": 2}
    assert _batches(after, 6) == [0, 2, 3, 4, 5, 7]


def test_meta_is_of_its_moment():
    history = _history()
    meta = history.meta()
    history.counters["tokens_seen"] += 1
    assert meta["counters"]["tokens_seen"] == 0


def test_batches_that_were_seen_cannot_be_left_out_any_more():
    with pytest.raises(ConfigError, match="only batches from 3 on can still be left out"):
        _history("2").restore(3, _history().meta())


def test_a_rollback_leaves_out_what_led_to_it():
    """Step 10 is broken and step 8 is kept: without batches 8 and 9; then step 10 again."""
    history = _history()
    assert history.count_rollback(8) == 0
    assert history.leave_out(8, 10) == (8, 9)
    history.restore(8, _history().meta())
    assert _batches(history, 11)[7:] == [7, 10, 11, 12]
    assert history.count_rollback(8) == 1
    assert history.leave_out(8, 10) == (10, 11)
    assert history.count_rollback(4) == 0, "of another checkpoint"


def test_rollbacks_of_earlier_processes_count():
    history = _history()
    history.recall_rollbacks(8, [(8, 9), (10, 11)])
    assert _batches(history, 10)[7:] == [7, 12, 13]
    assert history.count_rollback(8) == 2
