"""The capacity factor: dropless against slots for 1, 1.25, 1.5 and 2 times the balanced load.

    moejax sweep configs/sweeps/capacity.py --workdir sweeps/capacity
    moejax sweep configs/sweeps/capacity.py:small --workdir sweeps/capacity --cpu_devices 1

Loss is on the validation split, dropless for all.
"""

from small_model import SMALL, is_small

from moejax.sweep_space import Grid, Objective, Sweep


def get_sweep(arg):
    small = is_small(arg)
    factors = [1.0, None] if small else [1.0, 1.25, 1.5, 2.0, None]
    return Sweep(
        base="../quickstart.py",
        space=Grid({"moe.capacity_factor": factors}),
        fixed=SMALL if small else {},
        seeds=(0, 1) if small else (0, 1, 2),
        objectives=(Objective("loss"), Objective("tokens_per_second", "max")),
    )
