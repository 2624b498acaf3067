"""Switch with input jitter: the router sees x * U[0.99, 1.01] (arXiv:2101.03961).

    moejax train configs/routers/jitter.py --workdir runs/jitter

In training only; the experts see x as it is.
"""

from base import small_config


def get_config():
    return small_config(
        router="softmax",
        top_k=1,
        normalize_weights=False,
        jitter=0.01,
        balance_convention="switch",
        balance_loss_weight=0.01,
        router_z_loss_weight=0.0,
    )
