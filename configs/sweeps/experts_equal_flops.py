"""The number of experts, at equal FLOPs a token: what more parameters give for the same compute.

    moejax sweep configs/sweeps/experts_equal_flops.py --workdir sweeps/experts
    moejax sweep configs/sweeps/experts_equal_flops.py:small --workdir sweeps/n --cpu_devices 1

A wider router costs FLOPs: the width of an expert is solved for, so that all points cost the
same.
"""

from small_model import SMALL, is_small

from moejax.sweep_space import Equal, Grid, Sweep


def get_sweep(arg):
    small = is_small(arg)
    return Sweep(
        base="../quickstart.py",
        space=Grid({"moe.num_experts": [2, 8] if small else [2, 4, 8, 16, 32, 64]}),
        fixed=SMALL if small else {},
        equal=(Equal("flops_per_token", multiple=1),),
        seeds=(0, 1) if small else (0, 1, 2),
    )
