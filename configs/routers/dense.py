"""Dense gating of all experts (Jacobs et al. 1991, doi:10.1162/neco.1991.3.1.79).

    moejax train configs/routers/dense.py --workdir runs/dense

Gate dropout leaves out a tenth of the (token, expert) gates in training.
"""

from base import small_config


def get_config():
    return small_config(
        router="dense",
        gate_dropout=0.1,
        expert_hidden=16,
    )
