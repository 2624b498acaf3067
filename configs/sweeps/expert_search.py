"""An architecture search: the structure of the experts at the FLOPs a token of the quickstart.

    moejax sweep configs/sweeps/expert_search.py --workdir sweeps/search --workers 2 --cpu_devices 1
    moejax sweep configs/sweeps/expert_search.py:small --workdir sweeps/search --cpu_devices 1

Number of experts, experts a token, shared experts, activation and which layers are MoE are
searched by TPE with successive halving; the width of an expert is solved for, so that every point
costs the quickstart's FLOPs a token. Trainings are short: what wins here learns fastest at first.
The two best are then trained with three seeds that the search did not see, next to the quickstart's
own structure, and the report says whether they beat it.
"""

from small_model import SMALL, is_small

from moejax.sweep_space import Adaptive, Cases, Equal, Sweep

TOP_K = {
    "1": {"moe.top_k": 1, "moe.normalize_weights": False},  # else the router gets no gradient
    **{str(k): {"moe.top_k": k} for k in (2, 3, 4, 6, 8)},
}
LAYERS = {
    "all": {},
    "all but the first": {"moe.first_dense": 1, "model.dense_hidden": 256},
    "every other": {"moe.every": 2, "model.dense_hidden": 256},
}
SHORT = {
    "train.steps": 120,
    "train.batch_size": 4,
    "optim.warmup_steps": 20,
    "eval.every": 40,
    "eval.batches": 8,
    "checkpoint.every": 60,
    "mesh.expert": 1,
}


def get_sweep(arg):
    small = is_small(arg)
    names = ("1", "2") if small else tuple(TOP_K)
    space = {
        "moe.num_experts": [2, 4, 8] if small else [4, 8, 16, 32, 64],
        "experts a token": Cases({name: TOP_K[name] for name in names}),
        "moe.shared_experts": [0, 1] if small else [0, 1, 2],
        "moe.activation": ["swiglu", "geglu", "gelu", "squared_relu"],
        "layers": Cases({"all": {}} if small else LAYERS),
    }
    trials = 3 if small else 16
    return Sweep(
        base="../quickstart.py",
        space=Adaptive(space, trials, startup=2 if small else 6, pruner="halving"),
        fixed=SMALL if small else SHORT,
        equal=(Equal("flops_per_token", multiple=1, tolerance=0.02),),
        seeds=(0, 1, 2) if small else (0, 1, 2, 3),
        finalists=1 if small else 2,
    )
