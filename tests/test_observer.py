"""What is done with a step's metrics on the host, with metrics made by hand and no training."""

import types

import jax
import numpy as np
import pytest

from moejax.config import Config, ConfigError
from moejax.events import read_events
from moejax.history import History
from moejax.ledger import Ledger
from moejax.loss import Losses, Totals
from moejax.metric_writer import MetricWriter
from moejax.metrics import read_metrics
from moejax.observer import Diverged, LateMetrics, Observer, RollBack
from moejax.overrides import apply_overrides
from moejax.replicas import Mismatch
from moejax.step import StepMetrics
from moejax.watch import Finding, Verdict

SEQUENCES, TOKENS = 4, 64


@pytest.fixture
def observe(tmp_path):
    """Returns `(words) -> Observer` of a dense run in `tmp_path`; an epoch is 10 batches."""
    opened = []

    def make(*words: str) -> Observer:
        dense = ["moe.every=None", f"train.batch_size={SEQUENCES}", "train.steps=20"]
        config = apply_overrides(Config(), [*dense, *words])
        watchdog = types.SimpleNamespace(host_seconds=dict)
        ledger = Ledger(tmp_path, 0, enabled=False)
        writer = MetricWriter(tmp_path, 0, enabled=jax.process_index() == 0)
        data = types.SimpleNamespace(epoch=lambda batch: batch // 10)
        history = History(config.watch)
        observer = Observer(config, tmp_path, data, history, writer, ledger, watchdog)
        opened.extend([observer, ledger])
        observer.begin(0)
        return observer

    yield make
    for one in opened:
        one.close()


def metrics(loss=2.0, sequences=SEQUENCES, finite=True) -> StepMetrics:
    """Of a step, with numbers in place of arrays."""
    limits, spikes = (dict.fromkeys(("loss", "grad_norm"), x) for x in (np.inf, False))
    return StepMetrics(
        losses=Losses(loss, loss, {}),
        grad_norm=1.0,
        learning_rate=0.1,
        totals=Totals(TOKENS - SEQUENCES, TOKENS, sequences),
        stats=None,
        choice_albts=None,
        router_state={},
        finite={"loss": finite},
        verdict=Verdict(limits, spikes, skipped=False, in_a_row=0),
    )


def kinds(workdir) -> list[tuple[str, int]]:
    return [(event["kind"], event["step"]) for event in read_events(workdir)]


def test_metrics_are_handed_on_when_the_next_step_is_there():
    seen = []
    late = LateMetrics(lambda step, metrics, seconds: seen.append((step, metrics, seconds)))
    late.push(1, "a")
    assert (seen, late.fetched) == ([], False)
    late.push(2, "b")
    assert (seen, late.fetched) == ([(1, "a", None)], True), "the first has no step before it"
    late.flush()
    late.flush()
    assert [(step, of) for step, of, _ in seen] == [(1, "a"), (2, "b")]
    assert seen[1][2] >= 0


def test_time_between_steps_is_not_that_of_a_step(monkeypatch):
    now, seen = [0.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    late = LateMetrics(lambda *step: seen.append(step[2]))
    for step, at in ((1, 1.0), (2, 3.0), (3, 4.5)):
        late.push(step, "x")
        now[0] = at
    late.flush()
    assert seen == [None, 2.0, 1.5], "fetched at 1, 3 and 4.5"
    now[0] = 100.0  # an evaluation
    late.restart_clock()
    late.push(4, "x")
    now[0] = 101.0
    late.host_is_done()
    late.flush()
    assert (seen[3], late.host_seconds) == (1.0, 1.0)


def test_records_are_of_the_first_the_last_and_every_nth_step(observe, tmp_path, capsys):
    observer = observe("logging.every=8")
    for step in range(1, 21):
        observer.record(step, metrics(), None if step == 1 else 0.5)
    written = read_metrics(tmp_path)
    assert [record["step"] for record in written] == [1, 8, 16, 20]
    assert [record["tokens_seen"] for record in written] == [60, 480, 960, 1200]
    assert [record["tokens_per_second"] for record in written] == [None, 120, 120, 120]
    assert kinds(tmp_path) == [("epoch", 11)]
    shown = capsys.readouterr().out
    assert [f"step {step}/20 " in shown for step in (1, 2, 8)] == [True, False, True]


def test_a_resumed_run_shows_its_first_step_and_does_not_record_it(observe, tmp_path, capsys):
    observer = observe("logging.every=8")
    observer.begin(12)
    observer.record(13, metrics(), None)
    assert "step 13/20 " in capsys.readouterr().out
    assert not read_metrics(tmp_path)


def test_a_finding_is_recorded_in_its_step(observe, tmp_path):
    observer = observe("logging.every=8")
    observer.record(1, metrics(), None)
    with pytest.raises(Diverged, match=r"^loss is the first of 1 quantities") as raised:
        observer.record(3, metrics(loss=np.nan, finite=False), 0.5)
    assert raised.value.step == 3
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 3]
    assert kinds(tmp_path) == [("nonfinite", 3)]


@pytest.mark.parametrize(
    ("policies", "ends", "said"),
    [
        (("warn", "skip"), None, ["m0", "m1; the step was left without effect"]),
        (("warn", "rollback"), (RollBack, "m1"), ["m0", "m1"]),
        (("rollback", "warn", "stop", "stop"), (Diverged, "m2"), []),
    ],
)
def test_the_strongest_policy_decides(observe, tmp_path, capsys, policies, ends, said):
    """And each finding is an event; what stops the run is said once, where it ends."""
    found = [Finding("spike", policy, f"m{i}", {}) for i, policy in enumerate(policies)]
    observer = observe()
    if ends is None:
        observer._act(5, found)
    else:
        with pytest.raises(ends[0], match=f"^{ends[1]}$"):
            observer._act(5, found)
    assert [event["policy"] for event in read_events(tmp_path)] == list(policies)
    assert {event["batch"] for event in read_events(tmp_path)} == {4}
    assert capsys.readouterr().err.splitlines() == [f"moejax train: step 5: {m}" for m in said]


@pytest.mark.parametrize("policy", ["warn", "stop"])
def test_devices_that_differ(observe, tmp_path, capsys, policy):
    observer = observe("watch.replicas_every=2", f"watch.mismatch={policy}")
    found = {"replicas": [Mismatch("params/norm", (3,))]}
    if policy == "stop":
        with pytest.raises(Diverged, match="params/norm, on devices 3; a device computes"):
            observer.compared(4, found)
    else:
        observer.compared(4, found)
        assert "step 4: copies of the same array differ" in capsys.readouterr().err
    (event,) = read_events(tmp_path)
    assert (event["kind"], event["arrays"]) == ("mismatch", {"params/norm": [3]})


def test_sequences_that_could_not_be_read(observe, tmp_path):
    """Some are counted; a batch without any ends the run."""
    observer = observe()
    observer.record(1, metrics(sequences=3), None)
    assert read_metrics(tmp_path)[0]["corrupt_sequences"] == 1
    with pytest.raises(ConfigError, match="step 2: no sequence of batch 1 could be read"):
        observer.record(2, metrics(sequences=0), None)
    assert kinds(tmp_path) == [("corrupt_data", 1), ("corrupt_data", 2)]


def test_only_the_first_process_writes(monkeypatch, observe, tmp_path, capsys):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    observer = observe()
    observer.record(1, metrics(sequences=3), None)
    observer.went_back(9, 8, (8, 8))
    observer.stopped(9, "SIGTERM")
    observer.show_result({}, "")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")
