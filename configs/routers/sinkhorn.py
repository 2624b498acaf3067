"""Top-1 of a Sinkhorn plan (S-BASE, Clark et al. 2022, arXiv:2202.01169).

    moejax train configs/routers/sinkhorn.py --workdir runs/sinkhorn

Balanced in training, the plain top-1 in evaluation. Not causal in training. No balance loss.
"""

from base import small_config


def get_config():
    return small_config(
        router="sinkhorn",
        top_k=1,
        allow_noncausal=True,
        balance_loss_weight=0.0,
        router_z_loss_weight=0.0,
    )
