"""Noisy top-4 with importance and load losses (Shazeer et al. 2017, arXiv:1701.06538).

    moejax train configs/routers/noisy.py --workdir runs/noisy

Both losses weigh 0.1 as there; the noise is trained and starts at deviation ln 2.
"""

from base import small_config


def get_config():
    return small_config(
        router="noisy",
        top_k=4,
        expert_hidden=32,
        balance_loss_weight=0.0,
        router_z_loss_weight=0.0,
        importance_loss_weight=0.1,
        load_loss_weight=0.1,
    )
