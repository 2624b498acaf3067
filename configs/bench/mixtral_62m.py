"""Mixtral's architecture at 61.9 M parameters, 24.1 M active: what `make bench-peers` trains.

    python benchmarks/peers.py [--json peers.json]

As transformers has it: no q and k norms, no z-loss, dropless, untied; float32, a constant rate.
A step is 8 sequences of 256 tokens: one each for 8 devices. The benchmark draws random tokens.
"""

from moejax.config import default_config


def get_config():
    config = default_config()
    config.model.num_layers = 4
    config.model.d_model = 512
    config.model.num_heads = 8
    config.model.num_kv_heads = 4
    config.model.head_dim = 64
    config.model.vocab_size = 8192
    config.model.tie_embeddings = False
    config.model.qk_norm = False
    config.moe.num_experts = 8
    config.moe.top_k = 2
    config.moe.expert_hidden = 1024
    config.moe.capacity_factor = None
    config.moe.balance_loss_weight = 0.01
    config.moe.router_z_loss_weight = 0.0
    config.optim.learning_rate = 3e-4
    config.optim.schedule = "constant"
    config.optim.warmup_steps = 0
    config.data.sequence_length = 256
    config.train.batch_size = 8
    config.mesh.data = 1
    config.mesh.expert = 1
    return config
