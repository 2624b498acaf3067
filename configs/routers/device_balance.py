"""Device-level balance loss over 4 groups of experts (DeepSeekMoE, arXiv:2401.06066).

    moejax train configs/routers/device_balance.py --workdir runs/device_balance

Its weight is 0.05 beside an expert-level loss of 0.001. Groups are the config's, not the mesh's.
"""

from base import small_config


def get_config():
    return small_config(
        router="softmax",
        normalize_weights=False,
        device_groups=4,
        device_balance_loss_weight=0.05,
        balance_loss_weight=0.001,
        router_z_loss_weight=0.0,
    )
