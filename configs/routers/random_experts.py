"""Random experts: a baseline that learns nothing about routing.

    moejax train configs/routers/random_experts.py --workdir runs/random_experts

Drawn anew for every token and step; one fixed draw by position in evaluation.
"""

from base import small_config


def get_config():
    return small_config(
        router="random",
    )
