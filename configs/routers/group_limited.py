"""Group-limited top-4: a token uses 2 of 4 groups of 4 experts (DeepSeek-V3, arXiv:2412.19437).

    moejax train configs/routers/group_limited.py --workdir runs/group_limited

There 4 of 8 groups of 32 experts, top-8.
"""

from base import small_config


def get_config():
    return small_config(
        router="sigmoid_bias",
        num_experts=16,
        top_k=4,
        expert_hidden=32,
        expert_groups=4,
        groups_per_token=2,
        balance_loss_weight=0.0,
        router_z_loss_weight=0.0,
    )
