"""Mixtral 8x22B: 141 B parameters, 39 B active (mistral.ai/news/mixtral-8x22b, 2024).

As published: 56 layers, all MoE, dropless, no q and k norms. A step is 2 sequences of 4,096 tokens
on each of 256 devices, experts over 8 of them. Learning rate and losses are those of Mixtral 8x7B
here: none are published.
"""

from moejax.config import default_config


def get_config():
    config = default_config()
    config.model.num_layers = 56
    config.model.d_model = 6144
    config.model.num_heads = 48
    config.model.num_kv_heads = 8
    config.model.head_dim = 128
    config.model.vocab_size = 32_000
    config.model.qk_norm = False
    config.model.rope_theta = 1e6
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.moe.num_experts = 8
    config.moe.top_k = 2
    config.moe.expert_hidden = 16_384
    config.moe.capacity_factor = None
    config.moe.balance_loss_weight = 0.02
    config.moe.router_z_loss_weight = 0.0
    config.data.sequence_length = 4096
    config.train.batch_size = 512
    config.mesh.data = 1
    config.mesh.fsdp = 32
    config.mesh.expert = 8
    config.optim.learning_rate = 3e-4
    return config
