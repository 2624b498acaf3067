"""Soft MoE: slots are mixtures of all tokens (Puigcerver et al. 2023, arXiv:2308.00951).

    moejax train configs/routers/soft.py --workdir runs/soft

As many slots as a sequence has tokens: 8 experts of 16. Not causal. No balance loss.
"""

from base import small_config


def get_config():
    return small_config(
        router="soft",
        soft_slots=16,
        allow_noncausal=True,
        balance_loss_weight=0.0,
        router_z_loss_weight=0.0,
    )
