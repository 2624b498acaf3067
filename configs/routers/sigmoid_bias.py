"""Selection bias moved by the sign of the load (DeepSeek-V3, arXiv:2412.19437).

    moejax train configs/routers/sigmoid_bias.py --workdir runs/sigmoid_bias

Sigmoid scores, weights divided by their sum and scaled by 2.5, one shared expert, bias rate 0.001,
a sequence balance loss of 0.0001 and no other.
"""

from base import small_config


def get_config():
    return small_config(
        router="sigmoid_bias",
        bias_update_rate=0.001,
        weight_scale=2.5,
        shared_experts=1,
        balance_loss_weight=0.0,
        sequence_balance_loss_weight=0.0001,
        router_z_loss_weight=0.0,
    )
