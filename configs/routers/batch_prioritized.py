"""Batch-prioritised routing (V-MoE, Riquelme et al. 2021, arXiv:2106.05974).

    moejax train configs/routers/batch_prioritized.py --workdir runs/batch_prioritized

When slots are short, tokens of the largest weight get them first. Not causal. Capacity 1.05 and
weights as they are, as there.
"""

from base import small_config


def get_config():
    return small_config(
        router="softmax",
        normalize_weights=False,
        capacity_factor=1.05,
        priority="best_weight",
        allow_noncausal=True,
        balance_loss_weight=0.0,
        router_z_loss_weight=0.0,
        importance_loss_weight=0.01,
    )
