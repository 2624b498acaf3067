"""The section `watch`: which policy makes sense for what, and which keys are read."""

import pytest

from moejax.config import Config
from moejax.errors import ConfigError
from moejax.overrides import apply_overrides, config_from_json, config_to_json


def test_the_section_goes_through_json():
    words = ["watch.nonfinite=rollback", "watch.skip_batches=3-5,9", "watch.max_router_logit=None"]
    config = apply_overrides(Config(), words)
    assert config_from_json(config_to_json(config)) == config
    assert config.watch.skip_batches == "3-5,9"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("nonfinite=off", r"watch\.nonfinite=off: once applied, a NaN stays .*use stop, skip"),
        ("nonfinite=warn", r"watch\.nonfinite=warn: once applied, a NaN"),
        ("collapse=skip", r"watch\.collapse=skip: a router collapses over many steps"),
        ("collapse=rollback", r"watch\.collapse=rollback: .*raise moe\.balance_loss_weight"),
        ("loss_spike=explode", "one of off, warn, skip, rollback, stop"),
        ("spike_sigma=0", r"watch\.spike_sigma=0.* must be a finite number above 0"),
        ("max_dead_experts=1", r"watch\.max_dead_experts=1.* is outside \(0, 1\)"),
        ("max_drop_fraction=0", r"watch\.max_drop_fraction=0.* is outside"),
        ("max_router_logit=-1", r"watch\.max_router_logit=-1.* above 0"),
        ("collapse_steps=0", r"watch\.collapse_steps=0 is below 1"),
        ("replicas_every=0", r"watch\.replicas_every=0 is below 1"),
        ("skip_batches=7-3", r"watch\.skip_batches: '7-3' is not a range"),
        ("max_consecutive_skips=4", "is not read; .*watch.nonfinite=skip"),
        ("max_rollbacks=4", "is not read; .*watch.nonfinite=rollback"),
        ("mismatch=warn", "is not read; .*watch.replicas_every=100"),
    ],
)
def test_a_wrong_value_is_refused(word, message):
    with pytest.raises(ConfigError, match=message):
        apply_overrides(Config(), [f"watch.{word}"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["collapse=off", "collapse_steps=5"], "is not read; .*watch.collapse=warn"),
        (
            ["max_dead_experts=None", "max_drop_fraction=None", "max_router_logit=None"],
            "watch.collapse='warn' has no limit to check",
        ),
        (
            ["loss_spike=off", "grad_norm_spike=off", "spike_sigma=4"],
            "is not read; .*watch.loss_spike=warn",
        ),
    ],
)
def test_keys_that_do_not_go_together(words, message):
    with pytest.raises(ConfigError, match=message):
        apply_overrides(Config(), [f"watch.{word}" for word in words])


def test_a_dense_model_has_no_router_to_watch():
    dense = apply_overrides(Config(), ["moe.every=None"])
    apply_overrides(dense, ["watch.collapse=off"])
    with pytest.raises(ConfigError, match=r"watch\.collapse=stop and moe\.every=None"):
        apply_overrides(dense, ["watch.collapse=stop"])


@pytest.mark.parametrize("word", ["watch.skip_batches=3", "watch.loss_spike=rollback"])
def test_a_replay_has_its_batches(word):
    with pytest.raises(ConfigError, match=r"train\.replay=runs/a repeats the choices recorded"):
        apply_overrides(Config(), ["train.replay=runs/a", word])


def test_only_prepared_data_can_be_damaged():
    with pytest.raises(ConfigError, match=r"data\.on_corrupt='skip' is not read by data\.source"):
        apply_overrides(Config(), ["data.on_corrupt=skip"])
    with pytest.raises(ConfigError, match=r"data\.timeout_seconds=0.* above 0"):
        apply_overrides(Config(), ["data.timeout_seconds=0"])
