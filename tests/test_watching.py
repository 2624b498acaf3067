"""The contract of watching: real trainings in which the fault happens, under every policy.

Faults come from outside, by changing what a training reads: a batch with an id that has no
embedding, whose loss and gradients are NaN; a batch of noise, whose loss is far above the others.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from test_replicas import _flipped
from test_resume import CLOCK, SMALL, records

from moejax import loop, watch
from moejax.checkpoint import Checkpoints, Resumed
from moejax.config import Config, ConfigError
from moejax.data import TrainBatches
from moejax.errors import DIVERGED, DONE
from moejax.evaluate import restore_for_use
from moejax.events import read_events
from moejax.overrides import apply_overrides, config_to_json, load_config
from moejax.prepare import prepare
from moejax.replicas import Comparisons
from moejax.sharding import path_name
from moejax.step import parameter_group
from moejax.store import Store
from moejax.workdir import checkpoint_steps

ROOT = Path(__file__).parents[1]
TINY = [
    *("model.num_layers=1", "moe.num_experts=4", "mesh.expert=4", "mesh.data=2"),
    *("train.steps=12", "eval.every=None", "eval.batches=1", "data.sequence_length=16"),
    *("watch.collapse=off", "optim.warmup_steps=1"),
]
# What changes batches by their index, for a training in another process too.
FAULTS = """
import os
import numpy as np
from moejax.data import TrainBatches

def spoil(kind, bad):
    plain = TrainBatches.rows
    def rows(self, step, start=0, stop=None):
        batch = plain(self, step, start, stop)
        if step not in bad:
            return batch
        noise = np.random.default_rng(step).integers(0, 256, (2, *batch.tokens.shape))
        tokens, targets = noise.astype(np.int32)
        if kind == "nan":
            tokens[:, 3] = 999  # which has no embedding
        return batch._replace(tokens=tokens, targets=targets)
    TrainBatches.rows = rows
"""
DRIVER = (
    FAULTS
    + """
import sys
spoil("nan", {int(sys.argv[1])})
from moejax.cli import main
sys.exit(main(sys.argv[2:]))
"""
)


def _config(*words: str) -> Config:
    merged = {word.split("=")[0]: word for word in (*SMALL, *TINY, *words)}
    return load_config(str(ROOT / "configs/quickstart.py"), list(merged.values()))


def _spoiler():
    names: dict = {}
    exec(FAULTS, names)  # noqa: S102 - the text above
    return names["spoil"]


@pytest.fixture
def spoil(monkeypatch):
    """Returns `(kind, batches)`: spoils these batches of every training."""
    monkeypatch.setattr(TrainBatches, "rows", TrainBatches.rows)  # taken back at the end
    return _spoiler()


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Leaves out the sample at the end."""
    monkeypatch.setattr(loop.Training, "finish", lambda self: None)


def _train(config: Config, workdir: Path) -> int:
    workdir.mkdir(parents=True, exist_ok=True)
    return loop.train(config, workdir)


def _events(workdir: Path) -> list[dict]:
    """All but those of checkpoints and locks."""
    others = ("checkpoint_", "lock_", "leftover_")
    return [event for event in read_events(workdir) if not event["kind"].startswith(others)]


def _kinds(workdir: Path) -> list[tuple[str, int]]:
    return [(event["kind"], event["step"]) for event in _events(workdir)]


def _last(workdir: Path, config: Config) -> dict[str, np.ndarray]:
    """The arrays of the last checkpoint, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(_resumed(workdir, config).state))
    return {path_name(path): leaf for path, leaf in leaves}


def _resumed(workdir: Path, config: Config, at_most: int | None = None) -> Resumed:
    """What a run would go on from."""
    _, abstract = loop.make_train_step(config, loop.make_mesh(config.mesh))
    with Checkpoints(workdir, config.checkpoint, read_only=True) as checkpoints:
        found = checkpoints.resume(abstract, at_most)
    assert found is not None
    return found


def _assert_equal_states(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, leaf in a.items():
        np.testing.assert_array_equal(leaf, b[name], err_msg=name)


# Not finite


def test_stop_leaves_the_last_checkpoint_and_says_what_happened(spoil, tmp_path, capsys):
    spoil("nan", {9})
    config = _config("checkpoint.every=2", "checkpoint.keep=9")
    assert _train(config, tmp_path) == DIVERGED
    assert checkpoint_steps(tmp_path) == [2, 4, 6, 8]
    assert all(np.isfinite(leaf).all() for leaf in _last(tmp_path, config).values())
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(
        "moejax train: step 10: router logits of MoE layer 0 is the first of "
    )
    assert message.endswith("; the checkpoint of step 8 is kept")
    (event,) = _events(tmp_path)
    assert (event["kind"], event["step"], event["batch"]) == ("nonfinite", 10, 9)
    assert event["policy"] == "stop"
    assert event["quantities"][0] == "router logits of MoE layer 0"


@pytest.fixture(scope="module")
def skipped(tmp_path_factory):
    """A run of 12 steps that left step 6 without effect, undisturbed; and its config."""
    workdir, config = tmp_path_factory.mktemp("skipped"), _config("watch.nonfinite=skip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Training, "finish", lambda self: None)
        patch.setattr(TrainBatches, "rows", TrainBatches.rows)
        _spoiler()("nan", {5})
        assert _train(config, workdir) == DONE
    return workdir, config


def test_skip_goes_on_without_the_update(skipped):
    workdir, config = skipped
    assert _kinds(workdir) == [("nonfinite", 6)]
    found = records(workdir)
    assert [found[step, "train"]["skipped_updates"] for step in (5, 6, 12)] == [0, 1, 1]
    assert "loss" in found[6, "train"]["nonfinite"]
    assert found[6, "train"]["learning_rate"] == found[7, "train"]["learning_rate"]
    last = _last(workdir, config)
    assert all(np.isfinite(leaf).all() for leaf in last.values())
    assert (last["step"], last["watch/skipped"]) == (12, 1)


def test_skipped_killed_and_resumed_is_the_undisturbed_run(skipped, spoil, tmp_path):
    """SIGKILL after the skipped step 6, when the checkpoint of step 8 is there."""
    straight, config = skipped
    spoil("nan", {5})
    workdir = tmp_path / "killed"
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    merged = {word.split("=")[0]: word for word in (*SMALL, *TINY)}
    words = [*merged.values(), "watch.nonfinite=skip"]
    start = [sys.executable, str(script), "5", "train", str(ROOT / "configs/quickstart.py")]
    command = [*start, "--workdir", str(workdir), "--cpu_devices", "8", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 240
    while 8 not in checkpoint_steps(workdir):
        assert process.poll() is None, "it ended before step 8"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoint_steps(workdir)[-1] == 8, "it was killed too late to show anything"
    assert _train(config, workdir) == DONE
    assert records(workdir) == records(straight)
    _assert_equal_states(_last(workdir, config), _last(straight, config))


def test_a_changed_config_is_held_to_that_of_the_checkpoint(skipped, tmp_path):
    """A bit of config.json, given back as its message asks: the checkpoint's has a checksum."""
    straight, config = skipped
    workdir = Path(shutil.copytree(straight, tmp_path / "run"))
    config = apply_overrides(config, ["optim.learning_rate=0.007", "train.steps=15"])
    (workdir / "config.json").write_text(config_to_json(config))
    with pytest.raises(ConfigError, match=r"written with another config \(optim\.learning_rate"):
        _train(config, workdir)
    with pytest.raises(ConfigError, match=r"written with another config \(model\.rope_theta"):
        restore_for_use(apply_overrides(skipped[1], ["model.rope_theta=9"]), straight, None)


@pytest.mark.slow
def test_a_save_that_hangs_while_an_error_ends_the_run_ends_it_too(monkeypatch, tmp_path):
    """What is left then waits for the save: as long as slow things may take, not for ever."""
    codes, released = [], threading.Event()

    def leave(code: int) -> None:
        codes.append(code)
        released.set()

    class Impatient(loop.Watchdog):
        def __init__(self, *arguments):
            super().__init__(*arguments, leave)

        def ends(self):
            self._config = dataclasses.replace(self._config, slow_seconds=0.5)
            super().ends()

    def hangs(*_):
        released.wait(60)
        raise OSError(5, "Input/output error")

    def fails(self, step, *arguments):
        hooks(self, step, *arguments)
        if step == 3:
            raise RuntimeError("of this test")

    hooks = loop.Training._hooks
    monkeypatch.setattr(loop, "Watchdog", Impatient)
    monkeypatch.setattr(Store, "seal", hangs)
    monkeypatch.setattr(loop.Training, "_hooks", fails)
    with pytest.raises(RuntimeError, match="of this test"):
        _train(_config("checkpoint.every=2"), tmp_path)
    assert codes == [124]


def test_too_many_skips_in_a_row_stop(spoil, tmp_path, capsys):
    spoil("nan", range(4, 100))
    config = _config("watch.nonfinite=skip", "watch.max_consecutive_skips=3")
    assert _train(config, tmp_path) == DIVERGED
    kinds = [("nonfinite", 5), ("nonfinite", 6), ("nonfinite", 7), ("skips", 7)]
    assert _kinds(tmp_path) == kinds
    assert "step 7: 3 steps in a row were skipped" in capsys.readouterr().err
    assert all(np.isfinite(leaf).all() for leaf in _last(tmp_path, config).values())


def test_rollback_is_the_run_that_had_left_the_batches_out(spoil, tmp_path, capsys):
    """Step 10 is broken: back to step 8, without batches 8 and 9, in the same process."""
    spoil("nan", {9})
    config = _config("watch.nonfinite=rollback")
    workdir, asked = tmp_path / "back", tmp_path / "asked"
    assert _train(config, workdir) == DONE
    expected = [("nonfinite", 10), ("rollback", 10), ("skip_batches", 9)]
    assert _kinds(workdir) == expected
    back = _events(workdir)[1]
    assert (back["to"], back["first"], back["last"]) == (8, 8, 9)
    assert "step 10: back to step 8, without batches 8 to 9" in capsys.readouterr().err
    for step, batches in ((12, "8-9"), (8, "")):
        assert _resumed(workdir, config, step).meta["watch"]["skip_batches"] == batches
    assert _train(apply_overrides(config, ["watch.skip_batches=8-9"]), asked) == DONE
    assert _kinds(asked) == [("skip_batches", 9)]
    assert records(workdir) == records(asked)
    _assert_equal_states(_last(workdir, config), _last(asked, config))


@pytest.mark.slow
def test_the_list_of_a_run_that_went_back_is_honoured_on_resume(spoil, tmp_path):
    """Resumed at step 12 without a word about it, to step 15, as by who knew it all the time."""
    spoil("nan", {9})
    config, longer = (_config("watch.nonfinite=rollback", f"train.steps={n}") for n in (12, 15))
    for folder, words in (("back", []), ("asked", ["watch.skip_batches=8-9"])):
        assert _train(apply_overrides(config, words), tmp_path / folder) == DONE
        assert _train(longer, tmp_path / folder) == DONE
    _assert_equal_states(*(_last(tmp_path / folder, longer) for folder in ("back", "asked")))


@pytest.mark.slow
def test_a_rollback_is_known_to_the_next_process_before_any_save(spoil, tmp_path):
    """Killed between the rollback to step 8 and the next checkpoint: batches 8 and 9 stay out."""
    config, longer = (_config("watch.nonfinite=rollback", f"train.steps={n}") for n in (8, 12))
    assert _train(config, tmp_path) == DONE
    loop.Events(tmp_path).write("rollback", 10, to=8, first=8, last=9)
    spoil("nan", {9})
    assert _train(longer, tmp_path) == DONE
    assert _kinds(tmp_path) == [("rollback", 10), ("skip_batches", 9)], "not done a second time"
    assert _resumed(tmp_path, longer).meta["watch"]["skip_batches"] == "8-9"


def test_rollbacks_of_earlier_processes_count(spoil, tmp_path, capsys):
    config, longer = (_config("watch.nonfinite=rollback", f"train.steps={n}") for n in (8, 12))
    assert _train(config, tmp_path) == DONE
    for batch in range(8, 12):
        loop.Events(tmp_path).write("rollback", batch + 2, to=8, first=batch, last=batch)
    spoil("nan", {12})
    assert _train(longer, tmp_path) == DIVERGED
    assert "; went back 4 times; the checkpoint of step 8 is kept" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_two_processes_agree_on_what_to_do(spoil, tmp_path, policy):
    """4 devices each: the same events, lines and list as of one process with 8."""
    spoil("nan", {9})
    merged = {word.split("=")[0]: word for word in (*SMALL, *TINY, f"watch.nonfinite={policy}")}
    assert _train(_config(f"watch.nonfinite={policy}"), tmp_path / "one") == DONE
    (tmp_path / "sitecustomize.py").write_text(FAULTS + '\nspoil("nan", {9})\n')
    two = tmp_path / "two"
    launch = [sys.executable, "launch/local.py", "--processes", "2", "--logs", str(tmp_path)]
    train = ["train", "configs/quickstart.py", "--workdir", str(two), "--cpu_devices", "4"]
    done = subprocess.run(
        [*launch, "--", *train, *merged.values()],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=400,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert _kinds(two) == _kinds(tmp_path / "one")
    ours, theirs = records(two), records(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    for key, record in theirs.items():
        if record["loss"] is None:
            assert (ours[key]["loss"], policy, key[0]) == (None, "skip", 10)
            continue
        assert ours[key]["loss"] == pytest.approx(record["loss"], rel=1e-5)
        assert ours[key]["skipped_updates"] == record["skipped_updates"]


def test_going_back_again_and_again_ends(spoil, tmp_path, capsys):
    """Every batch from 9 on is broken: 3 times back to step 8, each time further on."""
    spoil("nan", range(9, 100))
    config = _config("watch.nonfinite=rollback")
    assert _train(config, tmp_path) == DIVERGED
    back = [e for e in _events(tmp_path) if e["kind"] == "rollback"]
    assert [(e["first"], e["last"]) for e in back] == [(8, 9), (10, 10), (11, 11)]
    assert "; went back 3 times; the checkpoint of step 8 is kept" in capsys.readouterr().err


def test_nothing_to_go_back_to(spoil, tmp_path, capsys):
    spoil("nan", {2})
    assert _train(_config("watch.nonfinite=rollback"), tmp_path) == DIVERGED
    assert "no checkpoint to go back to; there is no checkpoint yet" in capsys.readouterr().err


@pytest.mark.slow
def test_a_batch_that_was_seen_cannot_be_left_out_later(tmp_path):
    config = _config("train.steps=4")
    assert _train(config, tmp_path) == DONE
    seen = apply_overrides(config, ["train.steps=8", "watch.skip_batches=2"])
    with pytest.raises(ConfigError, match=r"skip_batches=2 has batches that the first 4 steps"):
        _train(seen, tmp_path)


# Spikes

STEADY = ["optim.learning_rate=0.02", "watch.grad_norm_spike=off"]


SLOW = pytest.mark.slow


@pytest.fixture
def soon(monkeypatch):
    """Has spikes be judged by 8 to 16 steps, so that the loss before has time to fall."""
    monkeypatch.setattr(watch, "WINDOW", 16)
    monkeypatch.setattr(watch, "NEEDED", 8)


@pytest.mark.parametrize(
    "policy", ["skip", *(pytest.param(p, marks=SLOW) for p in ("warn", "rollback", "stop", "off"))]
)
def test_a_batch_of_noise_is_a_spike(soon, spoil, tmp_path, capsys, policy):
    spoil("noise", {37})
    config = _config(*STEADY, "train.steps=40", "checkpoint.every=6", f"watch.loss_spike={policy}")
    code = _train(config, tmp_path)
    assert code == (DIVERGED if policy == "stop" else DONE)
    events = _events(tmp_path)
    said = capsys.readouterr().err
    if policy == "off":
        assert (events, "loss" in said) == ([], False)
        return
    spike = events[0]
    assert (spike["kind"], spike["step"], spike["batch"]) == ("spike", 38, 37)
    assert spike["value"] > spike["limit"]
    assert spike["policy"] == policy
    assert f"step 38: loss {spike['value']:.5g} is above {spike['limit']:.5g}" in said
    assert _kinds(tmp_path)[1:] == (
        [("rollback", 38), ("skip_batches", 37)] if policy == "rollback" else []
    )
    if policy == "stop":
        assert checkpoint_steps(tmp_path)[-1] == 36
    else:
        skipped = records(tmp_path)[40, "train"]["skipped_updates"]
        assert skipped == (policy == "skip")


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["warn", "skip", "rollback", "stop", "off"])
def test_a_batch_of_noise_is_a_spike_of_the_gradient(soon, spoil, tmp_path, policy):
    """Norms before it are 0.3 to 0.6, its own is 2.7; a sound one after it may be a spike too."""
    spoil("noise", {33})
    words = ["optim.learning_rate=0.02", "watch.loss_spike=off", "train.steps=40"]
    words += ["watch.spike_sigma=12"] if policy != "off" else []
    config = _config(*words, "checkpoint.every=6", f"watch.grad_norm_spike={policy}")
    assert _train(config, tmp_path) == (DIVERGED if policy == "stop" else DONE)
    spikes = [e for e in _events(tmp_path) if e["kind"] == "spike"]
    first = [(e["quantity"], e["step"]) for e in spikes[:1]]
    assert first == ([("grad_norm", 34)] if policy != "off" else [])
    assert ("rollback", 34) in _kinds(tmp_path) or policy != "rollback"
    if policy == "stop":
        assert max(step for step, _ in records(tmp_path)) == 34
    else:
        skipped = len(spikes) if policy == "skip" else 0
        assert records(tmp_path)[40, "train"]["skipped_updates"] == skipped


@pytest.mark.slow
def test_a_spike_that_is_not_watched_for_sets_the_model_back(soon, spoil, tmp_path):
    """The harm: after ten batches of noise the loss of the next one is higher than without."""
    spoil("noise", set(range(28, 38)))
    after = {}
    for policy in ("off", "skip"):
        words = [*STEADY, "train.steps=39", "optim.schedule=constant", "optim.clip_norm=None"]
        words += [f"watch.loss_spike={policy}"]
        assert _train(_config(*words), tmp_path / policy) == DONE
        after[policy] = records(tmp_path / policy)[39, "train"]["loss"]
    assert after["off"] > after["skip"] + 0.05
    assert _kinds(tmp_path / "off") == []


# Collapse


@pytest.mark.parametrize(
    "policy", ["stop", *(pytest.param(p, marks=SLOW) for p in ("warn", "off"))]
)
def test_a_router_that_sends_all_tokens_to_the_same_experts(monkeypatch, tmp_path, capsys, policy):
    """Its weights are 0, so that all logits tie and everybody goes to the first two of 4."""
    initial = loop.initial_state

    def collapsed(*arguments):
        def zero(path, leaf):
            return leaf * 0 if parameter_group(path_name(path)) == "router" else leaf

        state = initial(*arguments)
        params = jax.tree_util.tree_map_with_path(zero, state.params)
        return dataclasses.replace(state, params=params)

    monkeypatch.setattr(loop, "initial_state", collapsed)
    words = ["moe.router=softmax", "optim.learning_rate=0", "moe.balance_loss_weight=0"]
    words += ["train.steps=7", f"watch.collapse={policy}"]
    if policy != "off":
        words += ["watch.collapse_steps=3", "watch.max_dead_experts=0.4"]
    config = _config(*words)
    assert _train(config, tmp_path) == (DIVERGED if policy == "stop" else DONE)
    if policy == "off":  # the harm: half of the experts are trained by nothing, and all is well
        assert (_events(tmp_path), capsys.readouterr().err) == ([], "")
        assert records(tmp_path)[7, "train"]["dead_experts"] == [2]
        return
    collapses = [(e["step"], e["quantity"]) for e in _events(tmp_path)]
    assert (3, "dead_experts") in collapses
    assert ((6, "dead_experts") in collapses) == (policy == "warn")
    assert "the router collapses: dead_experts 0.5 is above watch.max_dead_experts=0.4 for 3" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_streaks_go_on_after_a_resume(tmp_path):
    """Over the limit from step 1 on: 3 steps before the resume and 3 after it are 6 in a row."""
    words = ["watch.collapse=warn", "watch.collapse_steps=6", "watch.max_violation=1e-6"]
    words += ["watch.max_dead_experts=None", "watch.max_drop_fraction=None"]
    words += ["watch.max_router_logit=None"]
    config = _config(*words, "train.steps=3")
    assert _train(config, tmp_path) == DONE
    assert _kinds(tmp_path) == []
    assert _train(apply_overrides(config, ["train.steps=7"]), tmp_path) == DONE
    assert _kinds(tmp_path) == [("collapse", 6)]


# Silent corruption


@pytest.mark.parametrize(
    "policy", ["stop", pytest.param("warn", marks=SLOW), pytest.param(None, marks=SLOW)]
)
def test_a_bit_that_flips_on_one_device(monkeypatch, tmp_path, capsys, policy):
    """Before step 5, in the copy of a norm on device 6; without the comparison nobody knows."""
    plain = Comparisons.step

    def struck(self, number, state, batch, choices=None):
        if number == 5:
            params = jax.tree_util.tree_map_with_path(
                lambda path, leaf: (
                    _flipped(leaf, device=6) if path_name(path) == "final_norm/scale" else leaf
                ),
                state.params,
            )
            state = dataclasses.replace(state, params=params)
        return plain(self, number, state, batch, choices)

    monkeypatch.setattr(Comparisons, "step", struck)
    words = ["watch.replicas_every=2"] if policy else []
    words += ["watch.mismatch=warn"] if policy == "warn" else []
    code = _train(_config(*words, "train.steps=8"), tmp_path)
    assert code == (DIVERGED if policy == "stop" else DONE)
    events = _events(tmp_path)
    if policy is None:
        assert events == []
        return
    assert (events[0]["kind"], events[0]["step"]) == ("mismatch", 6)
    assert events[0]["comparison"] == "replicas"
    assert events[0]["arrays"]["params/final_norm/scale"] == [6]
    error = capsys.readouterr().err
    assert "step 6: copies of the same array differ over devices: " in error
    assert "on devices 6; a device computes or keeps wrong" in error
    if policy == "stop":
        assert checkpoint_steps(tmp_path) == [4]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "warn", None])
def test_a_step_that_one_device_computes_wrong_once(monkeypatch, tmp_path, capsys, policy):
    """Step 6, in a part of the experts that no other device holds: copies tell nothing of it."""
    plain, steps = loop.make_train_step, []

    def make(*arguments, **keywords):
        step, abstract = plain(*arguments, **keywords)

        def struck(state, batch, choices=None):
            steps.append(int(state.step) + 1)
            after, metrics = step(state, batch, choices)
            if steps[-1] == 6 and steps.count(6) == 1:
                path = "runs/layer_0/moe/up"
                flip = lambda at, leaf: _flipped(leaf, 6) if path_name(at) == path else leaf  # noqa: E731
                params = jax.tree_util.tree_map_with_path(flip, after.params)
                after = dataclasses.replace(after, params=params)
            return after, metrics

        return struck, abstract

    words = ["train.steps=8", "watch.replicas_every=1", "mesh.data=1", "mesh.fsdp=2"]
    words += ["watch.recompute_every=3", f"watch.mismatch={policy}"] if policy else []
    config = _config(*words)
    assert _train(config, tmp_path / "sound") == DONE
    monkeypatch.setattr(loop, "make_train_step", make)
    code = _train(config, tmp_path / "struck")
    assert code == (DIVERGED if policy == "stop" else DONE)
    events = _events(tmp_path / "struck")
    if policy is None:  # the harm: another model, and nobody knows
        assert events == []
        ends = [_last(tmp_path / name, config) for name in ("sound", "struck")]
        name = "params/runs/layer_0/moe/up"
        assert not np.array_equal(ends[0][name], ends[1][name])
        return
    assert [(e["kind"], e["step"], e["comparison"]) for e in events] == [
        ("mismatch", 6, "recomputed")
    ]
    assert events[0]["arrays"] == {"params/runs/layer_0/moe/up": [6]}
    assert "step 6: a step computed twice gives other bits" in capsys.readouterr().err


# Memory


def test_out_of_memory_says_what_takes_it_and_leaves_the_checkpoints(monkeypatch, tmp_path):
    """Another error of the runtime stays as it is."""
    plain, said = (
        Comparisons.step,
        ["RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes", "other"],
    )

    def hungry(self, number, *arguments):
        if number == 4:
            raise jax.errors.JaxRuntimeError(said.pop(0))
        return plain(self, number, *arguments)

    monkeypatch.setattr(Comparisons, "step", hungry)
    config = _config("checkpoint.every=2")
    with pytest.raises(
        ConfigError, match=r"out of memory .*9 bytes\); state and gradients alone are [\d.]+ .?iB a"
    ):
        _train(config, tmp_path)
    assert checkpoint_steps(tmp_path) == [2]
    with pytest.raises(jax.errors.JaxRuntimeError, match="other"):
        _train(config, tmp_path)


# Data


def _prepared(folder: Path) -> Path:
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for i in range(30):
        (texts / f"{i:02}.txt").write_text(f"document {i} " + "x" * 10 * i)
    prepare([str(texts)], "bytes", str(folder / "out"), workers=1, show_progress=False)
    return folder / "out"


@pytest.mark.slow
def test_an_epoch_is_an_event(tmp_path):
    data = _prepared(tmp_path)
    config = _config("data.source=prepared", f"data.path={data}", "train.steps=60")
    assert _train(config, tmp_path / "run") == DONE
    events = _events(tmp_path / "run")
    assert {event["kind"] for event in events} == {"epoch"}
    tokens = json.loads((data / "meta.json").read_text())["splits"]["train"]["num_tokens"]
    sequences = -(-(tokens - 1) // 16)
    for event in events:  # the batch in which the first sequence of the epoch is
        assert event["batch"] == event["epoch"] * sequences // 8
        assert event["step"] == event["batch"] + 1
    assert [event["epoch"] for event in events] == list(range(1, len(events) + 1))


@pytest.mark.parametrize("policy", ["skip", pytest.param("stop", marks=SLOW)])
def test_a_file_that_is_cut_off_while_training(monkeypatch, tmp_path, caplog, policy):
    """After step 3; through a memory map this was SIGBUS, see tests/test_token_file.py."""
    data = _prepared(tmp_path)
    tokens, plain = data / "train" / "tokens.bin", TrainBatches.rows

    def rows(self, step, start=0, stop=None):
        if step == 3 and tokens.stat().st_size > 2000:
            os.truncate(tokens, 2000)
        return plain(self, step, start, stop)

    monkeypatch.setattr(TrainBatches, "rows", rows)
    words = ["data.source=prepared", f"data.path={data}", f"data.on_corrupt={policy}"]
    config = _config(*words, "train.steps=6", "checkpoint.every=2")
    if policy == "stop":
        with pytest.raises(ConfigError, match=r"tokens\.bin ends at byte 2000 of \d+: it was cut"):
            _train(config, tmp_path / "run")
        assert checkpoint_steps(tmp_path / "run")
        return
    assert _train(config, tmp_path / "run") == DONE
    events = [e for e in _events(tmp_path / "run") if e["kind"] == "corrupt_data"]
    lost = sum(event["sequences"] for event in events)
    assert lost > 0
    assert records(tmp_path / "run")[6, "train"]["corrupt_sequences"] == lost
    assert "is padding instead: " in caplog.text
    assert "tokens.bin ends at byte 2000" in caplog.text
    assert set(CLOCK).isdisjoint(records(tmp_path / "run")[6, "train"])
