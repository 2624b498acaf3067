"""Top-2 of sigmoid scores, each expert's own (Nguyen et al. 2024, arXiv:2405.13997).

    moejax train configs/routers/sigmoid.py --workdir runs/sigmoid

The scores of the chosen experts are divided by their sum.
"""

from base import small_config


def get_config():
    return small_config(
        router="sigmoid",
    )
