"""gpt-oss-120b: 116.8 B parameters, 5.1 B active (OpenAI 2025, arXiv:2508.10925).

As published: 36 layers, all MoE, 128 experts, top-4 with a softmax over the chosen, attention with
biases and sinks, a window of 128 tokens in every other layer, the first one included. A step is 2
sequences of 8,192 tokens on each of 64 devices, experts over 16 of them. Other than published: no
biases in experts and router, SwiGLU without clamp, and plain RoPE where the release stretches it
(YaRN). Learning rate and losses are not published.
"""

from moejax.config import default_config


def get_config():
    config = default_config()
    config.model.num_layers = 36
    config.model.d_model = 2880
    config.model.num_heads = 64
    config.model.num_kv_heads = 8
    config.model.head_dim = 64
    config.model.attention_bias = True
    config.model.attention_sinks = True
    config.model.attention_window = 128
    config.model.full_attention_every = 2
    config.model.vocab_size = 201_088
    config.model.qk_norm = False
    config.model.rope_theta = 150_000.0
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.moe.num_experts = 128
    config.moe.top_k = 4
    config.moe.expert_hidden = 2880
    config.moe.capacity_factor = None
    config.data.sequence_length = 8192
    config.train.batch_size = 128
    config.mesh.data = 1
    config.mesh.fsdp = 4
    config.mesh.expert = 16
    config.optim.learning_rate = 3e-4
    return config
