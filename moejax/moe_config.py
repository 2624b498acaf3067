"""The config of an MoE layer: router, experts, capacity, transport and auxiliary losses. No JAX.

`docs/routers.md` explains every router with its formula and source.
"""

import dataclasses
import itertools
import math
from typing import Any, Literal, NamedTuple

from moejax.errors import (
    ConfigError,
    require,
    require_above_zero,
    require_finite,
    require_fraction,
    require_positive,
    require_read,
)

Router = Literal[
    "softmax",
    "sigmoid",
    "sqrt_softplus",
    "cosine",
    "noisy",
    "gshard",
    "sigmoid_bias",
    "quantile",
    "expert_choice",
    "sinkhorn",
    "soft",
    "mixture_of_depths",
    "hash",
    "random",
    "balanced",
    "dense",
    "elementwise",
    "elementwise_input",
    "relu",
    "threshold",
]
Activation = Literal["swiglu", "geglu", "gelu", "relu", "squared_relu"]
Priority = Literal["token", "rank", "weight", "best_weight", "random"]
Convention = Literal["megatron", "switch", "huggingface", "maxtext", "olmoe"]

SCORED = ("softmax", "sigmoid", "sqrt_softplus", "cosine", "sigmoid_bias", "quantile")
ALL_EXPERTS = ("dense", "elementwise", "elementwise_input")  # every token to every expert
ANY_NUMBER = (*ALL_EXPERTS, "expert_choice", "relu", "threshold")  # of experts a token
WITHOUT_LOGITS = ("hash", "random", "balanced", "elementwise", "elementwise_input")
NOT_CAUSAL = {
    "expert_choice": "an expert picks among all tokens of a group, so later tokens affect "
    "earlier ones",
    "sinkhorn": "the assignment of a token is balanced against those of later tokens",
    "soft": "every slot mixes all tokens of a group, later ones too",
    "mixture_of_depths": "which tokens are computed is picked among all tokens of a sequence",
}
NO_CAPACITY = {
    "expert_choice": "every expert takes the same number of tokens already",
    "soft": "every expert has the same number of slots already",
    **dict.fromkeys(ALL_EXPERTS, "every expert takes every token"),
}
FORCED = ("random", "balanced")  # nothing is learned about routing: for benchmarks
WITH_LOGITS = tuple(r for r in Router.__args__ if r not in WITHOUT_LOGITS)
BALANCED = tuple(r for r in WITH_LOGITS if r != "relu")  # whose L1 loss stands for the others
WITH_CAPACITY = tuple(r for r in Router.__args__ if r not in NO_CAPACITY)

# A key that is listed here is read by these routers only.
READ_BY: dict[str, tuple[str, ...]] = {
    "top_k": tuple(r for r in Router.__args__ if r not in (*ALL_EXPERTS, "soft")),
    "normalize_weights": (*SCORED, "mixture_of_depths"),
    "expert_groups": SCORED,
    "groups_per_token": SCORED,
    "logit_cap": tuple(r for r in Router.__args__ if r not in WITHOUT_LOGITS),
    "jitter": tuple(r for r in Router.__args__ if r not in (*WITHOUT_LOGITS, "soft")),
    "expert_dropout": tuple(r for r in Router.__args__ if r not in (*WITHOUT_LOGITS, "soft")),
    "gate_dropout": ("dense",),
    "bias_update_rate": ("sigmoid_bias",),
    "cosine_width": ("cosine",),
    "depth_fraction": ("mixture_of_depths",),
    "soft_slots": ("soft",),
    "gate_rank": ("elementwise_input",),
    "l1_coefficient": ("relu",),
    "l1_update_factor": ("relu",),
    "quantile_decay": ("quantile", "threshold"),
    "load_loss_weight": ("noisy",),
    "balance_loss_weight": BALANCED,
    "sequence_balance_loss_weight": BALANCED,
    "router_z_loss_weight": BALANCED,
    "importance_loss_weight": BALANCED,
    "mutual_information_loss_weight": BALANCED,
    "device_balance_loss_weight": BALANCED,
    "microbatch_balance_loss_weight": WITH_LOGITS,
    "balance_convention": WITH_LOGITS,
    "eval_capacity_factor": WITH_CAPACITY,
    "priority": WITH_CAPACITY,
    "group_sequences": tuple(r for r in Router.__args__ if r not in ALL_EXPERTS),
}


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Which layers are MoE, how tokens are routed, and what a full expert does.

    Layers `first_dense, first_dense + 1, ...` are taken in runs of `every`; the last of each run is
    MoE. `every=None` makes the whole model dense. `capacity_factor=None` is dropless.
    """

    router: Router = "softmax"  # how tokens choose experts, see docs/routers.md
    num_experts: int = 8  # of every MoE layer; with num_experts_by_layer, the largest
    top_k: int = 2  # experts that a token is routed to
    expert_hidden: int = 256  # hidden width of an expert; with expert_hidden_by_layer, the largest
    num_experts_by_layer: tuple[int, ...] | None = None  # a number for each MoE layer, in order
    expert_hidden_by_layer: tuple[int, ...] | None = None  # a width for each MoE layer, in order
    activation: Activation = "swiglu"  # of the expert networks
    every: int | None = 1  # every n-th layer after first_dense is MoE; None: a dense model
    first_dense: int = 0  # dense layers before all others

    # Experts that no token is sent to another device for.

    shared_experts: int = 0  # that see every token: one network of shared_experts * expert_hidden
    shared_gate: Literal["none", "sigmoid"] = "none"  # on the shared experts' output
    zero_experts: int = 0  # MoE++: experts that give 0
    copy_experts: int = 0  # MoE++: experts that give x
    constant_experts: int = 0  # MoE++: experts that give a1 * x + a2 * v
    zero_computation_weight: float = 0.75  # MoE++: tau, weight of those in the balance loss

    # How logits become choices and weights.

    normalize_weights: bool = True  # divide a token's combine weights by their sum
    weight_scale: float = 1.0  # factor on all combine weights; routed_scaling_factor of DeepSeek-V3
    expert_groups: int | None = None  # group-limited top-k: equal groups of experts
    groups_per_token: int | None = None  # group-limited top-k: groups that a token may use
    logit_cap: float | None = None  # logits become cap * tanh(logits / cap)
    jitter: float = 0.0  # training: the router's input is multiplied by U[1 - jitter, 1 + jitter]
    expert_dropout: float = 0.0  # training: chance that a sequence cannot choose an expert
    gate_dropout: float = 0.0  # router=dense, training: chance that a token's gate is left out
    bias_update_rate: float = 0.001  # router=sigmoid_bias: change of a bias per step (DeepSeek-V3)
    quantile_decay: float = 0.9  # router=quantile or threshold: decay of the running quantile
    l1_coefficient: float = 1e-8  # router=relu: first coefficient of the L1 loss
    l1_update_factor: float = 1.2  # router=relu: factor by which a step changes that coefficient
    cosine_width: int = 32  # router=cosine: width of the space of angles
    depth_fraction: float = 0.5  # router=mixture_of_depths: part of the tokens that is computed
    soft_slots: int = 1  # router=soft: slots that an expert has in a group
    gate_rank: int = 16  # router=elementwise_input: rank of the gate
    allow_noncausal: bool = False  # accept routing in which later tokens affect earlier ones

    # What happens when an expert is full, and how tokens get there.

    # slots of an expert, over its load at perfect balance; what gets no slot is dropped; None:
    # dropless
    capacity_factor: float | None = 1.25
    eval_capacity_factor: float = 2.0  # for a second evaluation loss; the first is dropless
    capacity_by_expert: tuple[float, ...] | None = None  # a further factor of each expert
    group_sequences: int = 1  # capacity is enforced per group of this many whole sequences
    # who gets a slot first; all but "token" let later tokens affect earlier ones
    priority: Priority = "token"
    # how tokens get to experts on other devices, see docs/design.md
    transport: Literal["auto", "all_to_all", "ragged", "gather", "reference"] = "auto"
    buffer_factor: float = 1.5  # dropless: rows received at once, over the balanced load

    # Weights of the auxiliary losses; 0 is off.

    balance_loss_weight: float = 0.01  # load-balancing loss over the whole step
    sequence_balance_loss_weight: float = 0.0  # load-balancing loss over each sequence
    # load-balancing loss over each microbatch, so that accumulation changes it
    microbatch_balance_loss_weight: float = 0.0
    # whose formula of the load-balancing loss, see docs/routers.md
    balance_convention: Convention = "megatron"
    router_z_loss_weight: float = 0.001  # mean of logsumexp(logits)^2
    importance_loss_weight: float = 0.0  # variation over experts of summed combine weights
    load_loss_weight: float = 0.0  # router=noisy: variation over experts of the smooth load
    mutual_information_loss_weight: float = 0.0  # mean entropy less the entropy of the mean
    device_balance_loss_weight: float = 0.0  # load-balancing loss over device_groups
    device_groups: int | None = None  # equal groups of experts, for device_balance_loss_weight

    def __post_init__(self):
        self._check_numbers()
        if self.every is None:
            return
        self._check_selection()
        self._check_reads()
        self._check_capacity()
        self._check_groups()
        self._check_layers()

    # What follows from the fields

    def of_layer(self, layer: int) -> "MoEConfig":
        """Returns the config of one MoE layer; layers count from the first MoE layer, 0."""
        experts, hidden = self.num_experts_by_layer, self.expert_hidden_by_layer
        if experts is None and hidden is None:
            return self
        return dataclasses.replace(
            self,
            num_experts=self.num_experts if experts is None else experts[layer],
            expert_hidden=self.expert_hidden if hidden is None else hidden[layer],
            num_experts_by_layer=None,
            expert_hidden_by_layer=None,
        )

    def stacks(self, num_layers: int) -> "tuple[Stack, ...]":
        """Returns the `num_layers` MoE layers in stacks of consecutive layers that are alike."""
        if self.num_experts_by_layer is None and self.expert_hidden_by_layer is None:
            return (Stack(0, num_layers, self),)
        stacks, start = [], 0
        for config, layers in itertools.groupby(self.of_layer(i) for i in range(num_layers)):
            stop = start + len(list(layers))
            stacks.append(Stack(start, stop, config))
            start = stop
        return tuple(stacks)

    @property
    def free_experts(self) -> int:
        """Experts without a network of their own, which every device computes (MoE++)."""
        return self.zero_experts + self.copy_experts + self.constant_experts

    @property
    def choices(self) -> int:
        """What a token chooses from: the experts, then zero, copy and constant experts."""
        return self.num_experts + self.free_experts

    @property
    def slots_per_token(self) -> int:
        """S: the width of a routing; a router that takes any number has a column an expert.

        1 for `soft`, which has no choices: statistics count the expert of the largest mass.
        """
        if self.router == "soft":
            return 1
        return self.choices if self.router in ANY_NUMBER else self.top_k

    @property
    def mean_selected(self) -> int:
        """Experts that a token is expected to use: all of them, one (soft), or `top_k`."""
        if self.router == "soft":
            return 1
        return self.num_experts if self.router in ALL_EXPERTS else self.top_k

    @property
    def takes_capacity(self) -> bool:
        """Whether a capacity factor has a meaning for the router."""
        return self.router not in NO_CAPACITY

    def transport_over(self, degree: int) -> str:
        """Returns what `transport="auto"` stands for over an expert axis of `degree`.

        Of the ways that every platform has the one that sends less: dropless, an all-to-all sends
        `buffer_factor * top_k` rows a token where a gather sends `degree`.
        """
        if self.transport != "auto":
            return self.transport
        equal_buffers = self.capacity_factor is not None or self.router == "soft"
        fewer_rows = self.buffer_factor * self.mean_selected < degree
        return "all_to_all" if equal_buffers or fewer_rows else "gather"

    @property
    def noncausal_reason(self) -> str | None:
        """Why a token's output depends on later tokens, or None if it does not."""
        if self.router in NOT_CAUSAL:
            return f"moe.router={self.router!r}: {NOT_CAUSAL[self.router]}"
        if self.takes_capacity and self.priority != "token":  # evaluation has a capacity always
            return (
                f"moe.priority={self.priority!r}: a later token can take the slot of an earlier one"
            )
        return None

    # Checks

    def _check_numbers(self) -> None:
        require_positive(
            "moe",
            self,
            "num_experts",
            "top_k",
            "expert_hidden",
            "group_sequences",
            "every",
            "expert_groups",
            "groups_per_token",
            "cosine_width",
            "soft_slots",
            "gate_rank",
            "device_groups",
        )
        weights = [f.name for f in dataclasses.fields(self) if f.name.endswith("_loss_weight")]
        counts = ("shared_experts", "zero_experts", "copy_experts", "constant_experts")
        require_finite("moe", self, *weights, *counts, "bias_update_rate", "first_dense")
        require_above_zero(
            "moe", self, "weight_scale", "logit_cap", "l1_coefficient", "zero_computation_weight"
        )
        require_fraction("moe", self, "jitter", "expert_dropout", "gate_dropout", "quantile_decay")
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            require(
                value is None or (math.isfinite(value) and value > 0),
                f"moe.{name}={value} must be a finite number above 0"
                + (", or None for dropless" if name == "capacity_factor" else ""),
            )
        require(
            0 < self.depth_fraction <= 1,
            f"moe.depth_fraction={self.depth_fraction} is outside (0, 1]; it is the part of the "
            "tokens that is computed, 0.125 in the paper",
        )
        require(
            math.isfinite(self.buffer_factor) and self.buffer_factor >= 1,
            f"moe.buffer_factor={self.buffer_factor} is below 1; balanced routing has to fit, so "
            "use 1.0 or more",
        )
        require(
            math.isfinite(self.l1_update_factor) and self.l1_update_factor > 1,
            f"moe.l1_update_factor={self.l1_update_factor} must be a finite number above 1; ReMoE "
            "uses 1.2",
        )

    def _check_selection(self) -> None:
        free = f" and {self.free_experts} without a network" if self.free_experts else ""
        require(
            self.top_k <= self.choices or self.router not in READ_BY["top_k"],
            f"moe.top_k={self.top_k} is larger than moe.num_experts={self.num_experts}{free}; a "
            f"token can select each expert once, use top_k <= {self.choices}",
        )
        require(
            not (
                self.top_k == 1
                and self.normalize_weights
                and self.router in READ_BY["normalize_weights"]
                and self.router != "mixture_of_depths"
            ),
            "moe.top_k=1 with moe.normalize_weights=True makes every combine weight 1, so the "
            "router gets no gradient from the task; use moe.normalize_weights=False",
        )
        require(
            self.router != "noisy" or self.top_k > 1,
            "moe.top_k=1 with moe.router='noisy' makes every combine weight 1, a softmax over one "
            "expert; use moe.top_k=2 or more",
        )
        require(
            self.router != "gshard" or self.top_k == 2,
            f"moe.router='gshard' draws the second of two experts, but moe.top_k={self.top_k}; use "
            "moe.top_k=2",
        )
        require(
            self.free_experts == 0 or self.router in SCORED,
            f"moe.zero_experts, copy_experts and constant_experts ({self.free_experts} in all) "
            f"need a router that chooses by score, and moe.router={self.router!r} does not; use "
            f"one of {', '.join(SCORED)}",
        )
        tau = self.zero_computation_weight
        require_read(
            self.free_experts > 0 or tau == _default("zero_computation_weight"),
            "moe.zero_computation_weight",
            f"moe.zero_computation_weight={tau} weighs zero, copy and constant experts, but there "
            f"are none; leave it at {_default('zero_computation_weight')}, or set "
            "moe.zero_experts=1",
        )
        require(
            self.shared_experts > 0 or self.shared_gate == "none",
            f"moe.shared_gate={self.shared_gate!r} gates shared experts, but "
            "moe.shared_experts=0; set moe.shared_experts=1",
        )

    def _check_reads(self) -> None:
        """Refuses a key that was set and that the router would ignore."""
        for name, routers in READ_BY.items():
            value = getattr(self, name)
            off = name.endswith("_loss_weight") and value == 0  # as asked for
            require_read(
                self.router in routers or value == _default(name) or off,
                f"moe.{name}",
                f"moe.{name}={value} is not read by moe.router={self.router!r}; leave it at "
                f"{_default(name)}, or use one of {', '.join(routers)}",
            )

    def _check_capacity(self) -> None:
        factor, transport = self.capacity_factor, self.transport
        require(
            factor is None or self.takes_capacity,
            f"moe.capacity_factor={factor} with moe.router={self.router!r}, which needs none: "
            f"{NO_CAPACITY.get(self.router)}; use moe.capacity_factor=None",
        )
        require(
            not (self.router == "soft" and transport in ("ragged", "gather")),
            f"moe.transport={transport!r} moves assigned tokens, but moe.router='soft' makes "
            "equal slots; use moe.transport=all_to_all (or auto)",
        )
        by_expert = self.capacity_by_expert
        if by_expert is None:
            return
        require(
            factor is not None,
            "moe.capacity_by_expert is given, but moe.capacity_factor=None is dropless; give a "
            "moe.capacity_factor, for example 1.25",
        )
        require(
            len(by_expert) == self.num_experts and all(0 < f < math.inf for f in by_expert),
            f"moe.capacity_by_expert={by_expert} needs one finite number above 0 for each of "
            f"moe.num_experts={self.num_experts}; 1.0 leaves the capacity as it is",
        )

    def _check_groups(self) -> None:
        groups, kept = self.expert_groups, self.groups_per_token
        require(
            (groups is None) == (kept is None),
            f"moe.expert_groups={groups} and moe.groups_per_token={kept} go together; give both, "
            "for example 4 and 2",
        )
        for name in ("expert_groups", "device_groups"):
            value = getattr(self, name)
            require(
                value is None or self.num_experts % value == 0,
                f"moe.{name}={value} does not divide moe.num_experts={self.num_experts}; groups "
                f"have equal size, use a divisor of {self.num_experts}",
            )
        require(
            (self.device_groups is not None) == (self.device_balance_loss_weight > 0),
            f"moe.device_groups={self.device_groups} and moe.device_balance_loss_weight="
            f"{self.device_balance_loss_weight} go together; give both, for example 4 and 0.05",
        )
        if groups is None or kept is None:
            return
        require(
            self.free_experts == 0,
            f"moe.expert_groups={groups} groups only experts that have a network; leave out "
            f"the {self.free_experts} zero, copy and constant experts",
        )
        reach = self.num_experts // groups * kept
        require(
            kept <= groups and self.top_k <= reach,
            f"moe.top_k={self.top_k} exceeds the group limit: moe.groups_per_token={kept} of "
            f"moe.expert_groups={groups} groups of {self.num_experts // groups} hold {reach} "
            f"experts; use moe.top_k <= {reach} or more moe.groups_per_token, up to {groups}",
        )

    def _check_layers(self) -> None:
        """Checks every layer as a config of its own, and that what is shared can be shared."""
        for name in ("num_experts", "expert_hidden"):
            value, by_layer = getattr(self, name), getattr(self, f"{name}_by_layer")
            if by_layer is None:
                continue
            require(
                len(by_layer) > 0,
                f"moe.{name}_by_layer is empty; give a number for each MoE layer, or None",
            )
            require(
                value == max(by_layer),
                f"moe.{name}={value} with moe.{name}_by_layer={by_layer}: it must be the "
                f"largest, which sets the width of statistics; use moe.{name}={max(by_layer)}",
            )
        experts, hidden = self.num_experts_by_layer, self.expert_hidden_by_layer
        require(
            experts is None or hidden is None or len(experts) == len(hidden),
            f"moe.num_experts_by_layer={experts} and moe.expert_hidden_by_layer={hidden} differ in "
            "length; give both a number for each MoE layer",
        )
        require(
            self.balance_convention != "huggingface" or len(set(experts or ())) < 2,
            f"moe.balance_convention='huggingface' pools the experts of all layers, but "
            f"moe.num_experts_by_layer={experts} differ; use one of megatron, switch, maxtext, "
            "olmoe",
        )
        for layer in range(len(experts or hidden or ())):
            try:
                self.of_layer(layer)
            except ConfigError as error:
                raise ConfigError(f"MoE layer {layer} of moe.*_by_layer: {error}") from None


def _default(name: str) -> Any:
    return MoEConfig.__dataclass_fields__[name].default


class Stack(NamedTuple):
    """Consecutive MoE layers whose experts are alike in number and width.

    Attributes:
        start, stop: numbers of the first one and of the one after the last, among the MoE layers.
        config: of each of them.
    """

    start: int
    stop: int
    config: MoEConfig

    @property
    def num_layers(self) -> int:
        return self.stop - self.start


__all__ = ["ConfigError", "MoEConfig", "Stack"]
