"""OLMoE 1B-7B: 6.9 B parameters, 1.3 B active (Muennighoff et al. 2024, arXiv:2409.02060).

As published: 16 layers, all MoE, 64 small experts, top-8 with weights that are not renormalised,
dropless, balance loss 0.01 and z-loss 0.001, AdamW with 4e-4, 2,000 steps of warmup, 1,024
sequences of 4,096 tokens a step. Here they lie on 64 devices, experts over 8 of them. Other than
published: q and k norms span one head, not all.
"""

from moejax.config import default_config


def get_config():
    config = default_config()
    config.model.num_layers = 16
    config.model.d_model = 2048
    config.model.num_heads = 16
    config.model.num_kv_heads = 16
    config.model.head_dim = 128
    config.model.vocab_size = 50_304
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.moe.num_experts = 64
    config.moe.top_k = 8
    config.moe.expert_hidden = 1024
    config.moe.normalize_weights = False
    config.moe.capacity_factor = None
    config.moe.balance_convention = "olmoe"
    config.moe.balance_loss_weight = 0.01
    config.moe.router_z_loss_weight = 0.001
    config.data.sequence_length = 4096
    config.train.batch_size = 1024
    config.train.accumulation = 4
    config.mesh.data = 1
    config.mesh.fsdp = 8
    config.mesh.expert = 8
    config.optim.learning_rate = 4e-4
    config.optim.warmup_steps = 2000
    return config
