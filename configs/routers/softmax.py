"""Softmax top-k whose weights are the probabilities as they are (OLMoE, arXiv:2409.02060).

    moejax train configs/routers/softmax.py --workdir runs/softmax

Balance loss 0.01 and z-loss 0.001 as there, the balance loss averaged over layers.
"""

from base import small_config


def get_config():
    return small_config(
        router="softmax",
        normalize_weights=False,
        balance_convention="olmoe",
        balance_loss_weight=0.01,
        router_z_loss_weight=0.001,
    )
