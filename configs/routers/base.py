"""The small model that every router in this folder changes: softmax top-2 of 8 experts.

    moejax train configs/routers/base.py --workdir runs/base

2 layers of width 64 on the embedded text, for two CPU cores. docs/routers.md lists the routers.
"""

from moejax.config import default_config


def small_config(**moe):
    """Returns the small model's config with keys of its `moe` section changed."""
    config = default_config()
    config.model.num_layers = 2
    config.model.d_model = 64
    config.model.num_heads = 2
    config.model.dense_hidden = 128
    config.moe.num_experts = 8
    config.moe.top_k = 2
    config.moe.expert_hidden = 64
    config.moe.capacity_factor = None
    config.moe.update(moe)
    config.data.sequence_length = 128
    config.optim.warmup_steps = 20
    config.train.batch_size = 8
    config.train.steps = 300
    config.eval.every = 100
    config.eval.batches = 8
    config.checkpoint.every = 100
    config.mesh.data = 1
    config.mesh.expert = None  # as many devices as there are: 1, 2, 4 or 8
    return config


def get_config():
    return small_config()
