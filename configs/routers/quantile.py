"""Quantile balancing: the bias goes to a quantile, not by a sign (Kimi K3; Su 2026).

    moejax train configs/routers/quantile.py --workdir runs/quantile

https://kexue.fm/archives/11619; no balance loss.
"""

from base import small_config


def get_config():
    return small_config(
        router="quantile",
        quantile_decay=0.9,
        balance_loss_weight=0.0,
        router_z_loss_weight=0.0,
    )
