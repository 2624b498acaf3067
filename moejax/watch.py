"""Watching a training: finds abnormal steps on the devices, and says on the host what to do.

The last 128 losses and gradient norms are part of the training's state, so a resumed run judges as
an undisturbed one would have. A step that a policy skips leaves parameters, optimizer and router
state as they were, bit for bit; the decision is made on device from values that are the same on
all of them, so no host waits and all processes agree.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import Config
from moejax.watch_config import WatchConfig

WINDOW, NEEDED = 128, 64  # steps that a limit is made of, and how many it needs
FLOOR = 1e-3  # of the mean: a deviation below it is taken for this, for losses that hardly move

WatchState = dict[str, jax.Array]


class Verdict(NamedTuple):
    """Whether a step is abnormal: scalars, the same on every device.

    Attributes:
        limits: float32 by quantity, `loss` and `grad_norm`; above it is a spike. Infinite until
            NEEDED steps were seen.
        spikes: bool by quantity.
        skipped: bool; the step was left without effect.
        in_a_row: int32; how many steps in a row were skipped, up to this one.
    """

    limits: dict[str, jax.Array]
    spikes: dict[str, jax.Array]
    skipped: jax.Array
    in_a_row: jax.Array


def initial_watch() -> WatchState:
    """Returns the state of watching before the first step.

    `loss` and `grad_norm` are float32 [WINDOW] rings, `seen` counts what entered them, `skipped`
    the steps without effect, `in_a_row` those at the end; int32.
    """
    zero = jnp.zeros((), jnp.int32)
    ring = jnp.zeros(WINDOW, jnp.float32)
    return {"loss": ring, "grad_norm": ring, "seen": zero, "skipped": zero, "in_a_row": zero}


def judge(
    config: WatchConfig, watch: WatchState, values: Mapping[str, jax.Array], finite: jax.Array
) -> tuple[Verdict, WatchState]:
    """Judges a step, in the step; returns the verdict and the next state.

    A spike enters the window as the limit that it broke: so it does not hide the next spike, and a
    lasting change of level is accepted after a while.

    Args:
        values: `loss` and `grad_norm` of the step.
        finite: bool; whether these and all gradients are.
    """
    values = {name: value.astype(jnp.float32) for name, value in values.items()}
    limits = {name: _limit(watch[name], watch["seen"], config.spike_sigma) for name in values}
    spikes = {name: finite & (values[name] > limits[name]) for name in values}
    skipped = ~finite if config.nonfinite == "skip" else jnp.zeros((), bool)
    for name, policy in (("loss", config.loss_spike), ("grad_norm", config.grad_norm_spike)):
        if policy == "skip":
            skipped |= spikes[name]
    here = jnp.arange(WINDOW, dtype=jnp.int32) == watch["seen"] % WINDOW
    rings = {
        name: jnp.where(here & finite, jnp.minimum(values[name], limits[name]), watch[name])
        for name in values
    }
    one = skipped.astype(jnp.int32)
    in_a_row = (watch["in_a_row"] + 1) * one
    state = rings | {
        "seen": watch["seen"] + finite.astype(jnp.int32),
        "skipped": watch["skipped"] + one,
        "in_a_row": in_a_row,
    }
    return Verdict(limits, spikes, skipped, in_a_row), state


def _limit(ring: jax.Array, seen: jax.Array, sigma: float) -> jax.Array:
    """Returns mean + sigma deviations of what is in the ring; infinite before NEEDED entries."""
    filled = jnp.arange(WINDOW, dtype=jnp.int32) < seen
    count = jnp.maximum(filled.sum(dtype=jnp.int32), 1).astype(jnp.float32)
    mean = jnp.where(filled, ring, 0.0).sum() / count
    deviation = jnp.sqrt(jnp.where(filled, jnp.square(ring - mean), 0.0).sum() / count)
    deviation = jnp.maximum(deviation, FLOOR * jnp.abs(mean))
    return jnp.where(seen < NEEDED, jnp.inf, mean + sigma * deviation)


# On the host, one step late


class Finding(NamedTuple):
    """Something that was found in a step, and the policy for it.

    Attributes:
        kind: of `events.KINDS`.
        policy: warn, skip, rollback or stop.
        message: with values, rule and remedy.
        fields: of the event.
    """

    kind: str
    policy: str
    message: str
    fields: dict[str, Any]


def findings_of_step(
    whole: Config, verdict: Verdict, values: Mapping[str, Any], finite: Mapping[str, Any]
) -> list[Finding]:
    """Returns the findings of a step's verdict, each with its policy.

    Args:
        whole: the config, whose values the remedies name.
        verdict: on the host.
        values: `loss` and `grad_norm`.
        finite: by quantity, in the order of the computation.
    """
    config, optim, found = whole.watch, whole.optim, []
    broken = [name for name, is_finite in finite.items() if not is_finite]
    if broken:
        # parameters that are broken already stay so, whatever is skipped
        policy = "stop" if config.nonfinite == "skip" and not verdict.skipped else config.nonfinite
        message = (
            f"{broken[0]} is the first of {len(broken)} quantities that are not finite; lower "
            f"optim.learning_rate={optim.learning_rate} or optim.clip_norm={optim.clip_norm}, or "
            f"raise moe.router_z_loss_weight={whole.moe.router_z_loss_weight}"
        )
        found.append(Finding("nonfinite", policy, message, {"quantities": broken}))
    for name, policy in (("loss", config.loss_spike), ("grad_norm", config.grad_norm_spike)):
        if not verdict.spikes[name] or policy == "off":
            continue
        value, limit = float(values[name]), float(verdict.limits[name])
        message = (
            f"{name} {value:.5g} is above {limit:.5g}, which is mean + watch.spike_sigma="
            f"{config.spike_sigma:g} deviations of the last {WINDOW} steps; lower "
            f"optim.learning_rate={optim.learning_rate}, or leave these batches out with "
            "watch.skip_batches"
        )
        fields = {"quantity": name, "value": value, "limit": limit}
        found.append(Finding("spike", policy, message, fields))
    row = int(verdict.in_a_row)
    if row >= config.max_consecutive_skips:
        message = (
            f"{row} steps in a row were skipped, watch.max_consecutive_skips="
            f"{config.max_consecutive_skips}; the batches are not the cause: lower "
            f"optim.learning_rate={optim.learning_rate}"
        )
        found.append(Finding("skips", "stop", message, {"in_a_row": row}))
    return found


def router_health(stats: Any, record: Mapping[str, Any]) -> dict[str, float]:
    """Returns the quantities that the limits of collapse apply to, each of the worst layer.

    Args:
        stats: `RouterStats` [layers, ...] on the host; None for a dense model: nothing.
        record: its `records.routing_record`.
    """
    if stats is None:
        return {}
    sizes = [len(row) for row in record["expert_load"]]
    z_l = np.asarray(stats.z, np.float64) / np.maximum(stats.tokens, 1)
    return {
        "max_violation": max(record["max_violation"]),
        "max_dead_experts": max(np.divide(record["dead_experts"], sizes).tolist()),
        "max_drop_fraction": record["drop_fraction"],
        "max_router_logit": math.sqrt(z_l.max()),
    }


def findings_of_router(
    config: WatchConfig, health: Mapping[str, float], streaks: Mapping[str, int]
) -> tuple[list[Finding], dict[str, int]]:
    """Returns a finding for each quantity over its limit for long enough, and the next streaks.

    Args:
        health: of `router_health`, by the name of the limit.
        streaks: steps in a row over each limit, before this one.
    """
    if config.collapse == "off":
        return [], {}
    found, following = [], {}
    for name, value in health.items():
        limit = getattr(config, name)
        if limit is None or not value > limit:
            continue
        steps = following[name] = streaks.get(name, 0) + 1
        if steps % config.collapse_steps:
            continue
        quantity = name.removeprefix("max_")
        message = (
            f"the router collapses: {quantity} {value:.5g} is above watch.{name}={limit:g} for "
            f"{steps} steps; raise moe.balance_loss_weight or moe.router_z_loss_weight, or lower "
            "optim.learning_rate"
        )
        fields = {"quantity": quantity, "value": value, "limit": limit, "steps": steps}
        found.append(Finding("collapse", config.collapse, message, fields))
    return found, following
