"""The section `watch`: what a training checks of itself, and what it does about it. No JAX."""

import dataclasses
import math
from typing import Literal

from moejax.errors import ConfigError, require, require_above_zero, require_positive
from moejax.skip_list import SkipList

Policy = Literal["off", "warn", "skip", "rollback", "stop"]
# Why a policy makes no sense for a quantity, and what does.
REFUSED = {
    ("nonfinite", ("off", "warn")): "once applied, a NaN stays in every parameter and moment, and "
    "no checkpoint could be saved; use stop, skip or rollback",
    ("collapse", ("skip", "rollback")): "a router collapses over many steps, because of its losses "
    "and learning rate and not of one batch, so skipping steps or going back would not help; use "
    "stop or warn, and raise moe.balance_loss_weight or moe.router_z_loss_weight",
}
# Keys and the policies that read them.
READ_BY_POLICY = {"max_consecutive_skips": "skip", "max_rollbacks": "rollback"}
COLLAPSE_LIMITS = ("max_violation", "max_dead_experts", "max_drop_fraction", "max_router_logit")


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """What to look for in every step, and what to do about it.

    `warn` prints it, `skip` leaves the step without effect, `rollback` goes back to the newest
    checkpoint and leaves out the batches since, `stop` ends the run. Each is an event.
    """

    nonfinite: Policy = "stop"  # a loss or gradient is not finite
    # the loss is above mean + spike_sigma deviations of the last 128 steps, once there were 64
    loss_spike: Policy = "warn"
    grad_norm_spike: Policy = "warn"  # the same of the gradient's global norm
    spike_sigma: float = 6.0  # standard deviations above the mean that make a spike
    max_consecutive_skips: int = 10  # steps skipped in a row; then the run stops
    max_rollbacks: int = 3  # rollbacks to the same checkpoint; then the run stops
    # a layer is over one of the four limits below for collapse_steps steps in a row
    collapse: Policy = "warn"
    collapse_steps: int = 50  # steps in a row over a limit that make a collapse
    # limit of MaxVio, which is at most E / k - 1; None: no limit
    max_violation: float | None = None
    max_dead_experts: float | None = 0.5  # limit, as a fraction of a layer's experts
    max_drop_fraction: float | None = 0.5  # limit, as a fraction of all assignments
    max_router_logit: float | None = 50.0  # limit of the root mean square of logsumexp(logits)
    # batches that no step sees, by index in the order of the data: 120-180,512
    skip_batches: str | None = None
    # compare what several devices hold alike, bit for bit, every so many steps
    replicas_every: int | None = None
    # compute a step twice and compare, every so many steps; needs room for a second state
    recompute_every: int | None = None
    mismatch: Literal["warn", "stop"] = "stop"  # what follows a difference in them

    def __post_init__(self):
        for (name, policies), reason in REFUSED.items():
            policy = getattr(self, name)
            require(policy not in policies, f"watch.{name}={policy}: {reason}")
        require_positive(
            "watch",
            self,
            *("max_consecutive_skips", "max_rollbacks", "collapse_steps"),
            *("replicas_every", "recompute_every"),
        )
        require_above_zero("watch", self, "spike_sigma", "max_violation", "max_router_logit")
        for name in ("max_dead_experts", "max_drop_fraction"):
            value = getattr(self, name)
            require(
                value is None or (math.isfinite(value) and 0 < value < 1),
                f"watch.{name}={value} is outside (0, 1); use a fraction, for example 0.5, or None",
            )
        self._check_reads()
        try:
            SkipList.parse(self.skip_batches)
        except ConfigError as error:
            raise ConfigError(f"watch.skip_batches: {error}") from None

    def _check_reads(self) -> None:
        """Refuses a key that was set and that no policy reads."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}

        def read(name: str, reads: bool, remedy: str) -> None:
            value = getattr(self, name)
            require(
                reads or value == defaults[name],
                f"watch.{name}={value} is not read; leave it at {defaults[name]}, or use {remedy}",
            )

        for name, policy in READ_BY_POLICY.items():
            read(name, policy in self.policies, f"watch.nonfinite={policy}")
        spikes = self.policies[1:]
        read("spike_sigma", spikes != ("off", "off"), "watch.loss_spike=warn")
        for name in ("collapse_steps", *COLLAPSE_LIMITS):
            read(name, self.collapse != "off", "watch.collapse=warn")
        require(
            self.collapse == "off" or any(getattr(self, n) is not None for n in COLLAPSE_LIMITS),
            f"watch.collapse={self.collapse!r} has no limit to check; give one of watch."
            f"{', watch.'.join(COLLAPSE_LIMITS)}, or watch.collapse=off",
        )
        compares = self.replicas_every is not None or self.recompute_every is not None
        read("mismatch", compares, "watch.replicas_every=100")

    @property
    def policies(self) -> tuple[str, ...]:
        """Of what a single step shows: non-finite, loss spike, spike of the gradient's norm."""
        return self.nonfinite, self.loss_spike, self.grad_norm_spike

    @property
    def skips(self) -> bool:
        """Whether a step may be left without effect."""
        return "skip" in self.policies
