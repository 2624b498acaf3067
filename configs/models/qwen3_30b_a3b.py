"""Qwen3-30B-A3B: 30.5 B parameters, 3.3 B active (arXiv:2505.09388 and its model card).

As published: 48 layers, all MoE, 128 experts, top-8 with renormalised weights, no shared expert, q
and k norms, heads wider than d_model, balance over the whole step (weight 0.001). A step is 4
sequences of 4,096 tokens on each of 64 devices, experts over 16 of them. The learning rate is not
published.
"""

from moejax.config import default_config


def get_config():
    config = default_config()
    config.model.num_layers = 48
    config.model.d_model = 2048
    config.model.num_heads = 32
    config.model.num_kv_heads = 4
    config.model.head_dim = 128
    config.model.vocab_size = 151_936
    config.model.rope_theta = 1e6
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.moe.num_experts = 128
    config.moe.top_k = 8
    config.moe.expert_hidden = 768
    config.moe.capacity_factor = None
    config.moe.balance_loss_weight = 0.001
    config.moe.router_z_loss_weight = 0.0
    config.data.sequence_length = 4096
    config.train.batch_size = 256
    config.mesh.data = 1
    config.mesh.fsdp = 4
    config.mesh.expert = 16
    config.optim.learning_rate = 3e-4
    return config
