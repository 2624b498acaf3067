"""The arms of the claims: what is trained, one config each.

Sizes are those at which an effect shows in minutes: width 48, two layers, 600 steps of 2,048
tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moejax.claims.images import CLASSES, ImageArm
from moejax.claims.tasks import MarkovTask
from moejax.claims.training import Arm
from moejax.config import (
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    TrainConfig,
)

STEPS = 600
LANGUAGES = MarkovTask()
SEPARATORS = MarkovTask(length=40, separators=True)


def moe(**changes: Any) -> MoEConfig:
    """Returns Switch routing over 8 experts with `changes`.

    Capacity 1.5 of the whole batch, balance loss 0.01, no z-loss.
    """
    switch = MoEConfig(
        router="softmax",
        num_experts=8,
        top_k=1,
        expert_hidden=64,
        capacity_factor=1.5,
        group_sequences=64,
        normalize_weights=False,
        balance_loss_weight=0.01,
        router_z_loss_weight=0.0,
    )
    return dataclasses.replace(switch, **changes)


def config(
    moe: MoEConfig,
    *,
    steps: int = STEPS,
    dense_hidden: int = 64,
    task: MarkovTask = LANGUAGES,
    optim: Mapping[str, Any] | None = None,
) -> Config:
    """Returns the model and the training that all arms share, but for what is given."""
    return Config(
        model=ModelConfig(
            num_layers=2,
            d_model=48,
            num_heads=4,
            num_kv_heads=4,
            head_dim=12,
            dense_hidden=dense_hidden,
            vocab_size=task.vocab_size,
        ),
        moe=moe,
        data=DataConfig(sequence_length=task.length),
        optim=OptimConfig(
            **{
                "learning_rate": 5e-3,
                "warmup_steps": 100,
                "weight_decay": 0.0,
                "b2": 0.98,
                "final_fraction": 0.05,
                **(optim or {}),
            }
        ),
        train=TrainConfig(steps=steps, batch_size=64),
    )


TOP2 = {"top_k": 2, "expert_hidden": 32, "normalize_weights": True, "capacity_factor": 2.0}
FREE = {"capacity_factor": None}
CAPACITIES = (0.25, 0.5, 0.75, 1.0, 1.25, 2.0)
SWEEP = {f"capacity {c}": {"capacity_factor": c} for c in CAPACITIES}

PRIORITIES = ("rank", "best_weight", "weight")
BY_PRIORITY = {
    f"capacity {c}, {priority}": {
        "capacity_factor": c,
        "priority": priority,
        "allow_noncausal": True,
    }
    for c in CAPACITIES[:4]
    for priority in PRIORITIES
}

DENSE = Arm("dense", config(moe(every=None)))
DENSE_8X = Arm("dense 8x", config(moe(every=None), dense_hidden=512))
# for top-1 a token's best weight is that of its only assignment
SWITCH = Arm(
    "switch",
    config(moe()),
    evaluations={n: c for n, c in BY_PRIORITY.items() if c["priority"] != "weight"},
)
TOP_2 = Arm(
    "top-2",
    config(moe(**TOP2)),
    evaluations=SWEEP | BY_PRIORITY,
    routing_after=(6, 30, 60, 240, 600),
)
EXPERTS_4 = Arm("4 experts", config(moe(num_experts=4)))
EXPERTS_16 = Arm("16 experts", config(moe(num_experts=16)))
EXPERTS_32 = Arm("32 experts", config(moe(num_experts=32)))
CAPACITY_05 = Arm("capacity 0.5", config(moe(capacity_factor=0.5)))
CAPACITY_1 = Arm("capacity 1.0", config(moe(capacity_factor=1.0)))
DROPLESS = Arm("dropless", config(moe(**FREE)), left_to_right=True)
UNBALANCED = Arm("no balance loss", config(moe(balance_loss_weight=0.0)))
UNBALANCED_FREE = Arm("no balance loss, dropless", config(moe(balance_loss_weight=0.0, **FREE)))
ZERO_ROUTER = Arm(
    "no balance loss, router from 0",
    config(moe(balance_loss_weight=0.0, **FREE)),
    change="zero_router",
)


def _sigmoid(name: str, rate: float, **changes: Any) -> Arm:
    values = {**TOP2, **FREE, "router": "sigmoid_bias", "bias_update_rate": rate}
    return Arm(name, config(moe(**{**values, "balance_loss_weight": 0.0, **changes})))


TOP_2_FREE = Arm("top-2, dropless", config(moe(**TOP2 | FREE)))
BIAS_0 = _sigmoid("sigmoid, no balancing", 0.0)
BIAS_3 = _sigmoid("bias, rate 0.001", 1e-3)
BIAS_2 = _sigmoid("bias, rate 0.01", 1e-2)
SIGMOID_LOSS = _sigmoid("sigmoid, balance loss", 0.0, balance_loss_weight=0.01)
BIAS_FROZEN = Arm(
    "bias, rate 0.01, then 0",
    dataclasses.replace(
        _sigmoid("", 0.0).config,
        optim=dataclasses.replace(
            BIAS_2.config.optim,
            learning_rate=2.5e-4,
            warmup_steps=0,
            schedule="constant",
            final_fraction=0.1,
        ),
        train=TrainConfig(steps=75, batch_size=64),
    ),
    start=BIAS_2,
)
FINE = Arm(
    "32 experts of 8, top 8",
    config(moe(**TOP2 | {"num_experts": 32, "top_k": 8, "expert_hidden": 8})),
)
Z_3 = Arm("z-loss 0.001", config(moe(router_z_loss_weight=1e-3)))
Z_2 = Arm("z-loss 0.01", config(moe(router_z_loss_weight=1e-2)))

SHARED = Arm(
    "1 shared, top 1 of 8",
    config(moe(**TOP2 | {"top_k": 1, "shared_experts": 1, "normalize_weights": False})),
    without="moe/shared",
)


def _separators(name: str, **changes: Any) -> Arm:
    changed = config(moe(**FREE | changes), steps=500, task=SEPARATORS)
    return Arm(name, changed, task=SEPARATORS)


LEARNED_AT = _separators("separators, learned")
DENSE_AT = _separators("separators, dense", every=None)
HASH_AT = _separators("separators, hash", router="hash", normalize_weights=True)
RANDOM_AT = _separators("separators, random", router="random", normalize_weights=True)


HASH = Arm("hash", config(moe(router="hash", normalize_weights=True, **FREE)))


def _expert_choice(name: str, group: int) -> Arm:
    changes = {"router": "expert_choice", "normalize_weights": True, "allow_noncausal": True}
    changes |= {"balance_loss_weight": 0.0, "group_sequences": group, **FREE}
    return Arm(name, config(moe(**changes)), left_to_right=True)


CHOICE_OF_1 = _expert_choice("expert choice in a sequence", 1)
CHOICE_OF_64 = _expert_choice("expert choice in the batch", 64)
RELU = Arm("ReLU", config(moe(router="relu", normalize_weights=True, **FREE)))
FREE_EXPERTS = Arm(
    "8 experts, a zero and a copy expert",
    config(moe(**TOP2 | FREE | {"zero_experts": 1, "copy_experts": 1})),
)


def _images(name: str, **changes: Any) -> ImageArm:
    base = config(moe(num_experts=16, group_sequences=1, **changes), steps=300)
    model = dataclasses.replace(base.model, num_layers=4, vocab_size=CLASSES)
    first_dense = dataclasses.replace(base.moe, first_dense=2)
    return ImageArm(name, dataclasses.replace(base, model=model, moe=first_dense))


PICKED = {"normalize_weights": True, "allow_noncausal": True, "balance_loss_weight": 0.0, **FREE}
SOFT = _images("digits, soft", router="soft", top_k=2, **PICKED)  # top_k is not read
CHOICE = _images("digits, expert choice", router="expert_choice", **PICKED)
TOKEN = _images("digits, token choice", capacity_factor=1.0)

UPCYCLED_OPTIM = {"warmup_steps": 50}
DENSE_300 = Arm("dense, 300 steps", config(moe(every=None), steps=300))
WIDE_TOP2 = {**TOP2, "expert_hidden": 64, **FREE}
UPCYCLED = Arm(
    "upcycled",
    config(moe(**WIDE_TOP2), steps=150, optim=UPCYCLED_OPTIM),
    start=DENSE_300,
    change="upcycle",
)
CONTINUED = Arm(
    "dense, continued",
    config(moe(every=None), steps=150, optim=UPCYCLED_OPTIM),
    start=DENSE_300,
)
SCRATCH = Arm("from scratch", config(moe(**WIDE_TOP2), steps=150, optim=UPCYCLED_OPTIM))
