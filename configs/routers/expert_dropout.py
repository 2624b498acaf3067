"""Expert dropout: a sequence cannot choose an expert, with probability 0.1.

    moejax train configs/routers/expert_dropout.py --workdir runs/expert_dropout

At least top_k experts stay. MoEC drops experts by cluster (Xie et al. 2022, arXiv:2207.09094).
"""

from base import small_config


def get_config():
    return small_config(
        router="softmax",
        expert_dropout=0.1,
    )
