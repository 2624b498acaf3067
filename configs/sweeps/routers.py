"""The router zoo: every causal router that learns, on the quickstart, dropless.

    moejax sweep configs/sweeps/routers.py --workdir sweeps/routers
    moejax sweep configs/sweeps/routers.py:small --workdir sweeps/routers --cpu_devices 1

What the routers are is in docs/routers.md. `hash` and `random` learn nothing about routing: what
they lose to is what routing gives. `relu` and `threshold` take any number of experts a token.
"""

from small_model import SMALL, is_small

from moejax.sweep_space import Cases, Grid, Sweep

PLAIN = ("softmax", "sigmoid", "sqrt_softplus", "cosine", "quantile", "gshard", "noisy")
CASES = {
    **{router: {"moe.router": router} for router in PLAIN},
    "sigmoid_bias": {"moe.router": "sigmoid_bias", "moe.balance_loss_weight": 0.0},
    "relu": {"moe.router": "relu"},
    "threshold": {"moe.router": "threshold"},
    "hash": {"moe.router": "hash"},
    "random": {"moe.router": "random"},
}


def get_sweep(arg):
    small = is_small(arg)
    names = ("softmax", "sigmoid_bias", "hash") if small else tuple(CASES)
    return Sweep(
        base="../quickstart.py",
        space=Grid({"router": Cases({name: CASES[name] for name in names})}),
        fixed=SMALL if small else {},
        seeds=(0,) if small else (0, 1, 2),
    )
