"""Mixtral 8x7B: 46.7 B parameters, 12.9 B active (Jiang et al. 2024, arXiv 2401.04088).

As published: 32 layers, all MoE, dropless, no q and k norms. A step is 4 sequences of 4,096 tokens
on each of 64 devices, experts over 8 of them; set `train.batch_size` and the mesh for another pod.
"""

from moejax.config import default_config


def get_config():
    config = default_config()
    config.model.num_layers = 32
    config.model.d_model = 4096
    config.model.num_heads = 32
    config.model.num_kv_heads = 8
    config.model.head_dim = 128
    config.model.vocab_size = 32_000
    config.model.qk_norm = False
    config.model.rope_theta = 1e6
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.moe.num_experts = 8
    config.moe.top_k = 2
    config.moe.expert_hidden = 14_336
    config.moe.capacity_factor = None
    config.moe.balance_loss_weight = 0.02
    config.moe.router_z_loss_weight = 0.0
    config.data.sequence_length = 4096
    config.train.batch_size = 256
    config.mesh.data = 1
    config.mesh.fsdp = 8
    config.mesh.expert = 8
    config.optim.learning_rate = 3e-4
    return config
