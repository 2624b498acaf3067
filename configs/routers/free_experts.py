"""MoE++: zero, copy and constant experts beside 8 networks (Jin et al. 2024, arXiv:2410.07348).

    moejax train configs/routers/free_experts.py --workdir runs/free_experts

One each, max(8 / 4 - 2, 1) of them constant, with weight 0.75 in a balance loss of 0.01.
"""

from base import small_config


def get_config():
    return small_config(
        router="softmax",
        normalize_weights=False,
        zero_experts=1,
        copy_experts=1,
        constant_experts=1,
        zero_computation_weight=0.75,
        balance_loss_weight=0.01,
        router_z_loss_weight=0.0,
    )
