"""Slots by the weight of each assignment, not of each token. Not causal.

    moejax train configs/routers/priority_by_weight.py --workdir runs/priority_by_weight

moe.priority=best_weight orders tokens; this orders every (token, expert) by its own weight.
"""

from base import small_config


def get_config():
    return small_config(
        router="softmax",
        capacity_factor=1.0,
        priority="weight",
        allow_noncausal=True,
    )
