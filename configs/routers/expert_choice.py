"""Expert choice: each expert takes its 2 T / E best tokens (Zhou et al. 2022, arXiv:2202.09368).

    moejax train configs/routers/expert_choice.py --workdir runs/expert_choice

Not causal: the loss of a decoder trained so means nothing for generation. No balance loss.
"""

from base import small_config


def get_config():
    return small_config(
        router="expert_choice",
        allow_noncausal=True,
        balance_loss_weight=0.0,
        router_z_loss_weight=0.0,
    )
