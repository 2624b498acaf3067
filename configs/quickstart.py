"""A small byte-level MoE language model on the embedded text.

moejax train configs/quickstart.py --workdir runs/quickstart --cpu_devices 4
"""

from moejax.config import default_config


def get_config(arg: str | None = None):
    config = default_config()
    config.mesh.data = 1
    config.mesh.expert = None
    return config
