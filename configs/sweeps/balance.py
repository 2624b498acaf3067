"""How strongly to balance: the weight of the balance loss, or the step of DeepSeek's bias.

    moejax sweep configs/sweeps/balance.py --workdir sweeps/balance
    moejax sweep configs/sweeps/balance.py:small --workdir sweeps/balance --cpu_devices 1

A chain of two lists: softmax with a loss, and sigmoid with a selection bias and without the loss.
"""

from small_model import SMALL, is_small

from moejax.sweep_space import Chain, Grid, Product, Sweep, Zip


def get_sweep(arg):
    small = is_small(arg)
    weights = [0.0, 0.01] if small else [0.0, 1e-4, 1e-3, 1e-2, 1e-1]
    rates = [1e-3] if small else [1e-4, 1e-3, 1e-2]
    bias = Zip({"moe.router": ["sigmoid_bias"], "moe.balance_loss_weight": [0.0]})
    return Sweep(
        base="../quickstart.py",
        space=Chain(
            [
                Grid({"moe.router": ["softmax"], "moe.balance_loss_weight": weights}),
                Product([bias, Grid({"moe.bias_update_rate": rates})]),
            ]
        ),
        fixed=SMALL if small else {},
        seeds=(0,) if small else (0, 1, 2),
    )
