"""ReMoE: the gate is relu(logit), any number of experts (Wang et al. 2024, arXiv:2412.14711).

    moejax train configs/routers/relu.py --workdir runs/relu

The L1 coefficient starts at 1e-8 and moves by 1.2 towards k of E open gates, both as there.
"""

from base import small_config


def get_config():
    return small_config(
        router="relu",
        l1_coefficient=1e-08,
        l1_update_factor=1.2,
    )
