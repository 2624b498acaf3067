"""Mixture-of-Depths: an eighth of the tokens in every other layer (arXiv:2404.02258).

    moejax train configs/routers/mixture_of_depths.py --workdir runs/mixture_of_depths

A computed token goes to its top-2 experts; the paper's block is one expert. Not causal.
"""

from base import small_config


def get_config():
    return small_config(
        router="mixture_of_depths",
        depth_fraction=0.125,
        every=2,
        allow_noncausal=True,
    )
