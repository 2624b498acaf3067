"""DeepSeek-V3: 671 B parameters, 37 B active (arXiv:2412.19437).

As published: latent attention, 61 layers of which the first 3 are dense, 256 experts and a shared
one, top-8 from 4 of 8 groups, a selection bias for balance and a sequence loss of 0.0001, dropless,
AdamW with 2.2e-4, 2,000 steps of warmup, 15,360 sequences of 4,096 tokens a step. Here they lie on
512 devices, experts over 32 of them, one sequence a device and microbatch. Other than published: no
multi-token prediction, no change of batch size and bias rate in the course of training, no FP8.
"""

from moejax.config import default_config


def get_config():
    config = default_config()
    config.model.num_layers = 61
    config.model.d_model = 7168
    config.model.attention = "latent"
    config.model.num_heads = 128
    config.model.q_lora_rank = 1536
    config.model.kv_lora_rank = 512
    config.model.qk_nope_head_dim = 128
    config.model.qk_rope_head_dim = 64
    config.model.v_head_dim = 128
    config.model.dense_hidden = 18_432
    config.model.vocab_size = 129_280
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.moe.router = "sigmoid_bias"
    config.moe.first_dense = 3
    config.moe.num_experts = 256
    config.moe.top_k = 8
    config.moe.expert_hidden = 2048
    config.moe.shared_experts = 1
    config.moe.expert_groups = 8
    config.moe.groups_per_token = 4
    config.moe.weight_scale = 2.5
    config.moe.bias_update_rate = 0.001
    config.moe.capacity_factor = None
    config.moe.balance_loss_weight = 0.0
    config.moe.sequence_balance_loss_weight = 0.0001
    config.moe.router_z_loss_weight = 0.0
    config.data.sequence_length = 4096
    config.train.batch_size = 15_360
    config.train.accumulation = 30
    config.mesh.data = 1
    config.mesh.fsdp = 16
    config.mesh.expert = 32
    config.optim.learning_rate = 2.2e-4
    config.optim.warmup_steps = 2000
    return config
