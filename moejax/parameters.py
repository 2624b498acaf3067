"""The parameters of an MoE layer: shape, mesh axes, kind and start, in one place. No JAX.

The module that makes them, their sharding, FLOPs, weight decay and gradient groups all read it.
"""

from typing import Literal, NamedTuple

from moejax.config import EXPERT_AXES, FSDP_AXES
from moejax.moe_config import WITHOUT_LOGITS, MoEConfig

Kind = Literal["router", "experts", "shared"]


# The mesh axes of the parameters that are split; all others are whole on every device.
AXES_OF: dict[str, tuple[str | tuple[str, ...] | None, ...]] = {
    "gate": (EXPERT_AXES, "fsdp", "tensor"),  # [E, D, F]
    "up": (EXPERT_AXES, "fsdp", "tensor"),  # [E, D, F]
    "down": (EXPERT_AXES, "tensor", "fsdp"),  # [E, F, D]
    "output_scale": (EXPERT_AXES, None),  # [E, D]
    "scale_out": (EXPERT_AXES, None, None),  # [E, R, D]
    "shared_gate": (FSDP_AXES, "tensor"),  # [D, F]
    "shared_up": (FSDP_AXES, "tensor"),  # [D, F]
    "shared_down": ("tensor", FSDP_AXES),  # [F, D]
}


# Parameters outside of MoE layers that are no matrices: weight decay leaves them alone.
VECTORS = ("scale", "query_bias", "key_bias", "value_bias", "output_bias", "sinks")


def kind_of(name: str) -> Kind:
    """Returns what a parameter of an MoE layer is part of."""
    if name in AXES_OF:
        return "shared" if name.startswith("shared_") else "experts"
    return "router"


def decays(name: str) -> bool:
    """Returns whether weight decay acts on a parameter: on matrices of networks only."""
    return name in AXES_OF and name != "output_scale"


class Parameter(NamedTuple):
    """One parameter of an MoE layer.

    Attributes:
        shape: of one layer.
        mean, deviation: of the normal distribution that it starts from.
        output: whether it is the last matrix before the residual, which starts smaller by the
            model's output scale.
    """

    shape: tuple[int, ...]
    mean: float = 0.0
    deviation: float = 0.0
    output: bool = False


def gated(config: MoEConfig) -> bool:
    """Returns whether an expert has a gate matrix beside up and down."""
    return config.activation in ("swiglu", "geglu")


def moe_parameters(config: MoEConfig, d_model: int) -> dict[str, Parameter]:
    """Returns the parameters of one MoE layer by name, in a fixed order."""
    return _router(config, d_model) | _experts(config, d_model) | _shared(config, d_model)


def _router(config: MoEConfig, d: int) -> dict[str, Parameter]:
    choices, small = config.choices, 0.1 * d**-0.5  # a tenth of 1/sqrt(fan-in) (Switch)
    found: dict[str, Parameter] = {}
    if config.router in WITHOUT_LOGITS:
        return found
    if config.router == "cosine":
        width = config.cosine_width
        found["router_projection"] = Parameter((d, width), deviation=d**-0.5)
        found["router"] = Parameter((width, choices), deviation=width**-0.5)
        found["router_temperature"] = Parameter((), mean=2.0)
    elif config.router == "soft":
        slots = config.num_experts * config.soft_slots
        found["router"] = Parameter((d, slots), deviation=d**-0.5)
        found["router_scale"] = Parameter((), mean=1.0)
    else:
        found["router"] = Parameter((d, choices), deviation=small)
    if config.router == "noisy":
        found["router_noise"] = Parameter((d, choices))
    if config.router == "dense":
        found["router_bias"] = Parameter((choices,))
    if config.router == "mixture_of_depths":
        found["router_depth"] = Parameter((d,), deviation=small)
    if config.constant_experts:
        n = config.constant_experts
        found["constant"] = Parameter((n, d), deviation=d**-0.5)
        found["constant_gate"] = Parameter((n, d, 2), deviation=small)
    return found


def _experts(config: MoEConfig, d: int) -> dict[str, Parameter]:
    e, f = config.num_experts, config.expert_hidden
    wide = Parameter((e, d, f), deviation=d**-0.5)
    found = {"gate": wide} if gated(config) else {}
    found["up"] = wide
    found["down"] = Parameter((e, f, d), deviation=f**-0.5, output=True)
    if config.router == "elementwise":
        found["output_scale"] = Parameter((e, d), mean=1.0)
    if config.router == "elementwise_input":
        r = config.gate_rank
        found["scale_in"] = Parameter((d, r), deviation=d**-0.5)
        found["scale_out"] = Parameter((e, r, d), deviation=r**-0.5)
    return found


def _shared(config: MoEConfig, d: int) -> dict[str, Parameter]:
    if config.shared_experts == 0:
        return {}
    f = config.shared_experts * config.expert_hidden
    wide = Parameter((d, f), deviation=d**-0.5)
    found = {"shared_gate": wide} if gated(config) else {}
    found["shared_up"] = wide
    found["shared_down"] = Parameter((f, d), deviation=f**-0.5, output=True)
    if config.shared_gate != "none":
        found["shared_router"] = Parameter((d,), deviation=d**-0.5)
    return found
