"""A small byte-level MoE language model on the embedded text: English, Spanish and Python.

    moejax train configs/quickstart.py --workdir runs/quickstart --cpu_devices 4

3.42 M parameters, 0.67 M of them active: 16 experts in each of 4 layers, 2 a token. What it learns
next to `quickstart_dense.py` is in docs/quickstart.md.
"""

from moejax.config import default_config


def get_config():
    config = default_config()
    config.moe.num_experts = 16
    config.moe.top_k = 2
    config.moe.expert_hidden = 128
    config.moe.capacity_factor = None  # dropless
    config.moe.group_sequences = 1
    config.data.sequence_length = 256
    config.train.batch_size = 8
    config.train.steps = 600  # `make train` took 5 min 32 s on 2 CPU cores, 2026-11-22
    config.eval.every = 150
    config.eval.batches = 16
    config.checkpoint.every = 150
    config.mesh.data = 1
    config.mesh.expert = None  # as many devices as there are: 1, 2, 4 or 8
    return config
