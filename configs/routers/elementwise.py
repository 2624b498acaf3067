"""All experts, each scaled by a trained vector of width D.

    moejax train configs/routers/elementwise.py --workdir runs/elementwise

Every expert weighs 1 / sqrt(E); the vectors start at 1.
"""

from base import small_config


def get_config():
    return small_config(
        router="elementwise",
        expert_hidden=16,
    )
