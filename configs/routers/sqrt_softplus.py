"""Top-2 of sqrt(softplus(logit)) scores, as Megatron and MaxText have it for DeepSeek-V4.

    moejax train configs/routers/sqrt_softplus.py --workdir runs/sqrt_softplus

The scores of the chosen experts are divided by their sum.
"""

from base import small_config


def get_config():
    return small_config(
        router="sqrt_softplus",
    )
