"""Hash routing: a table from token id to expert (Roller et al. 2021, arXiv:2106.04426).

    moejax train configs/routers/hash.py --workdir runs/hash

Balanced by the frequencies of the corpus; nothing is learned about routing.
"""

from base import small_config


def get_config():
    return small_config(
        router="hash",
        top_k=1,
    )
