"""The dense model that `quickstart.py` is measured against: equal active FLOPs a token, equal data.

    moejax train configs/quickstart_dense.py --workdir runs/quickstart_dense

Each MoE layer (2 experts of width 128 a token, and a router) becomes one dense layer of width 264:
256 for the experts, and 8 more for the router's FLOPs, rounded up.
"""

from quickstart import get_config as get_moe_config


def get_config():
    config = get_moe_config()
    config.moe.every = None
    config.model.dense_hidden = 264
    config.mesh.data = None
    config.mesh.expert = 1
    return config
