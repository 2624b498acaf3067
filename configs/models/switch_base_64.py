"""A decoder of the size of Switch-Base with 64 experts, 3.8 B parameters (arXiv:2101.03961).

Switch-Base is an encoder and a decoder of 12 layers each; here are decoders only, so this is one
stack of all 24, every second one MoE. As published: widths, 64 ReLU experts, top-1 weighed by its
probability, capacity factor 1.25 in training and 2.0 in evaluation, balance loss 0.01, jitter 0.01,
tied embeddings, 2**20 tokens a step. Here they lie on 64 devices with an expert each, 32 sequences
of 512 tokens a device. Other than published: no cross-attention (12 x 4 x 768 x 768 parameters),
RoPE in place of relative biases, dense layers with a gate and 2/3 of the width (as many
parameters), no dropout, AdamW in place of Adafactor.
"""

from moejax.config import default_config


def get_config():
    config = default_config()
    config.model.num_layers = 24
    config.model.d_model = 768
    config.model.num_heads = 12
    config.model.num_kv_heads = 12
    config.model.head_dim = 64
    config.model.dense_hidden = 2048
    config.model.vocab_size = 32_128
    config.model.tie_embeddings = True
    config.model.qk_norm = False
    config.model.dtype = "bfloat16"
    config.moe.every = 2
    config.moe.num_experts = 64
    config.moe.top_k = 1
    config.moe.normalize_weights = False
    config.moe.expert_hidden = 3072
    config.moe.activation = "relu"
    config.moe.jitter = 0.01
    config.moe.capacity_factor = 1.25
    config.moe.eval_capacity_factor = 2.0
    config.moe.balance_convention = "switch"
    config.moe.balance_loss_weight = 0.01
    config.moe.router_z_loss_weight = 0.0
    config.data.sequence_length = 512
    config.train.batch_size = 2048
    config.mesh.data = 1
    config.mesh.expert = 64
    config.optim.learning_rate = 1e-3
    return config
