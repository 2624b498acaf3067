"""Expert threshold: an expert takes what exceeds its running quantile (arXiv:2603.11535).

    moejax train configs/routers/threshold.py --workdir runs/threshold

Causal, and no balance loss.
"""

from base import small_config


def get_config():
    return small_config(
        router="threshold",
        quantile_decay=0.9,
        balance_loss_weight=0.0,
        router_z_loss_weight=0.0,
    )
