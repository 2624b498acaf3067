"""Softmax top-2 whose weights are divided by their sum.

    moejax train configs/routers/softmax_renormalized.py --workdir runs/softmax_renormalized

g = p_e / sum of the selected p, the same as a softmax over the selected logits (Mixtral,
arXiv:2401.04088).
"""

from base import small_config


def get_config():
    return small_config(
        router="softmax",
        normalize_weights=True,
    )
