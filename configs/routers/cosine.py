"""Cosine of token and expert times a learned temperature (Chi et al. 2022, arXiv:2204.09179).

    moejax train configs/routers/cosine.py --workdir runs/cosine

The temperature starts at 2 and acts up to 100, as in Tutel's cosine_top.
"""

from base import small_config


def get_config():
    return small_config(
        router="cosine",
        cosine_width=32,
    )
