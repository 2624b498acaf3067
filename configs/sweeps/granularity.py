"""Fine-grained experts and shared experts (DeepSeekMoE, arXiv:2401.06066), at equal FLOPs a token.

    moejax sweep configs/sweeps/granularity.py --workdir sweeps/granularity
    moejax sweep configs/sweeps/granularity.py:small --workdir sweeps/granularity --cpu_devices 1

Granularity g: g times the experts, g times as many a token, each 1/g as wide. With a shared expert
a token takes one routed expert less. The width is solved for, because routers cost FLOPs too.
"""

from small_model import SMALL, is_small

from moejax.sweep_space import Cases, Equal, Grid, Sweep


def structures(experts: int, top_k: int, grains: list[int]) -> dict:
    """Returns the settings of each granularity, without and with one shared expert."""
    cases = {}
    for g in grains:
        whole = {"moe.num_experts": g * experts, "moe.top_k": g * top_k}
        cases[f"{g} x finer"] = whole
        cases[f"{g} x finer, 1 shared"] = {
            "moe.num_experts": g * experts - 1,
            "moe.top_k": g * top_k - 1,
            "moe.shared_experts": 1,
            "moe.normalize_weights": g * top_k - 1 > 1,
        }
    return cases


def get_sweep(arg):
    small = is_small(arg)
    cases = structures(4, 2, [1]) if small else structures(16, 2, [1, 2, 4])
    return Sweep(
        base="../quickstart.py",
        space=Grid({"structure": Cases(cases)}),
        fixed=SMALL if small else {"mesh.expert": 1},
        equal=(Equal("flops_per_token", multiple=1),),
        seeds=(0, 1) if small else (0, 1, 2),
    )
