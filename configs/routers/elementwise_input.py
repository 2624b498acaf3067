"""All experts, each scaled by a gate of width D that depends on the token.

    moejax train configs/routers/elementwise_input.py --workdir runs/elementwise_input

sigmoid((x A) B_e) with rank 16.
"""

from base import small_config


def get_config():
    return small_config(
        router="elementwise_input",
        gate_rank=16,
        expert_hidden=16,
    )
