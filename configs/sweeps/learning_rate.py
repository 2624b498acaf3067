"""The peak learning rate of the quickstart, over three seeds.

moejax sweep configs/sweeps/learning_rate.py --workdir sweeps/learning_rate
moejax sweep configs/sweeps/learning_rate.py:small --workdir sweeps/rate --cpu_devices 1
"""

from small_model import SMALL, is_small

from moejax.sweep_space import Grid, Sweep


def get_sweep(arg):
    small = is_small(arg)
    rates = [3e-3, 3e-2] if small else [1e-3, 2e-3, 3e-3, 6e-3, 1.2e-2]
    return Sweep(
        base="../quickstart.py",
        space=Grid({"optim.learning_rate": rates}),
        fixed=SMALL if small else {},
        seeds=(0, 1) if small else (0, 1, 2),
    )
