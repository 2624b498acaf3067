"""GShard: top-2 with a random second expert (Lepikhin et al. 2020, arXiv:2006.16668).

    moejax train configs/routers/gshard.py --workdir runs/gshard

Capacity 2 T / E is factor 1 of the two choices. The paper serves all first choices before any
second, moe.priority=rank, which is not causal: this config serves token by token.
"""

from base import small_config


def get_config():
    return small_config(
        router="gshard",
        capacity_factor=1.0,
        balance_convention="switch",
        balance_loss_weight=0.01,
        router_z_loss_weight=0.0,
    )
