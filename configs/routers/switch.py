"""Switch: top-1, weighed by its probability (Fedus et al. 2021, arXiv:2101.03961).

    moejax train configs/routers/switch.py --workdir runs/switch

Capacity factor 1.25 in training and 2.0 in evaluation, balance loss 0.01, no z-loss.
"""

from base import small_config


def get_config():
    return small_config(
        router="softmax",
        top_k=1,
        normalize_weights=False,
        capacity_factor=1.25,
        eval_capacity_factor=2.0,
        balance_convention="switch",
        balance_loss_weight=0.01,
        router_z_loss_weight=0.0,
    )
