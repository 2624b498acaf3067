"""The optimizer: AdamW, warmup, a schedule, clipping by global norm, decay on matrices only."""

from typing import Any

import jax
import optax

from moejax import parameters
from moejax.config import OptimConfig
from moejax.sharding import path_name


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Returns step -> rate: linear warmup, then the schedule to `final_fraction` at `steps`."""
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    rest = max(1, steps - config.warmup_steps)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, end, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction),
    }[config.schedule]()
    if config.warmup_steps == 0:
        return after
    # the first step already moves: its rate is peak / warmup_steps, not 0
    first = peak / config.warmup_steps
    warmup = optax.linear_schedule(first, peak, max(1, config.warmup_steps - 1))
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def decays(params: Any) -> Any:
    """Returns a tree of bools: True for matrices of networks, False for norms and routers."""

    def is_matrix(path, _):
        name = path_name(path)
        owner, _, last = name.rpartition("/")
        if owner.endswith("moe"):
            return parameters.decays(last)
        return last not in parameters.VECTORS

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Returns AdamW (Loshchilov and Hutter 2019), after clipping by global norm."""
    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decays,
    )
    return optax.chain(clip, adamw)
