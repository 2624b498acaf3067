"""The Hugging Face side of `benchmarks/peers.py`; see `worker.py`. Runs in .venv-peers.

MixtralForCausalLM as its users train it on a CPU: eager mode, `grouped_mm` experts, sdpa attention,
torch's fused AdamW (what `transformers.Trainer` takes), non-reentrant checkpointing.
"""

import os
from typing import Any

import numpy as np
import torch
import transformers
from worker import serve


def make(settings: dict[str, Any]):
    """Builds the model of a moejax config, with the weights that the moejax side wrote."""
    torch.set_num_threads(os.cpu_count() or 1)
    config = settings["config"]
    model = transformers.MixtralForCausalLM(mixtral_config(config)).float()
    with np.load(settings["weights"]) as weights:
        model.load_state_dict(state_dict(weights))
    model.train()
    calls = count_calls(model, config["model"]["vocab_size"])
    if config["model"]["remat"] == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = make_optimizer(model, config["optim"])

    def step(tokens_bt: np.ndarray) -> float:
        ids = torch.from_numpy(tokens_bt)
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config["optim"]["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        balance = model.router_aux_loss_coef * output.aux_loss
        return float(output.loss.detach() - balance.detach())

    facts = {
        "name": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
        "calls a forward pass": calls,
    }
    return step, facts


def mixtral_config(config: dict[str, Any]) -> transformers.MixtralConfig:
    """Returns the same model in Mixtral's words.

    transformers takes the mean over layers of a balance loss that is top_k in balance, moejax the
    sum of ones that are 1: the coefficient makes them equal there.
    """
    model, moe = config["model"], config["moe"]
    return transformers.MixtralConfig(
        vocab_size=model["vocab_size"],
        hidden_size=model["d_model"],
        intermediate_size=moe["expert_hidden"],
        num_hidden_layers=model["num_layers"],
        num_attention_heads=model["num_heads"],
        num_key_value_heads=model["num_kv_heads"],
        head_dim=model["head_dim"],
        max_position_embeddings=config["data"]["sequence_length"],
        rms_norm_eps=1e-6,
        use_cache=False,
        tie_word_embeddings=model["tie_embeddings"],
        num_experts_per_tok=moe["top_k"],
        num_local_experts=moe["num_experts"],
        output_router_logits=True,
        router_aux_loss_coef=moe["balance_loss_weight"] * model["num_layers"] / moe["top_k"],
        rope_parameters={"rope_type": "default", "rope_theta": model["rope_theta"]},
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    )


def state_dict(weights: Any) -> dict[str, torch.Tensor]:
    """Returns moejax's weights, stacked by layer, under transformers' names and in its shapes."""
    result = {
        "model.embed_tokens.weight": weights["embedding"],
        "model.norm.weight": weights["final_norm/scale"],
        "lm_head.weight": weights["unembedding"].T,
    }
    stack = "runs/layer_0"
    for i in range(len(weights[f"{stack}/moe/router"])):
        layer = {
            name.removeprefix(f"{stack}/"): weights[name][i]
            for name in weights.files
            if name.startswith(stack)
        }
        of = f"model.layers.{i}"
        result |= {
            f"{of}.input_layernorm.weight": layer["attention_norm/scale"],
            f"{of}.post_attention_layernorm.weight": layer["ffn_norm/scale"],
            f"{of}.mlp.gate.weight": layer["moe/router"].T,
            f"{of}.mlp.experts.down_proj": layer["moe/down"].swapaxes(1, 2),
            f"{of}.mlp.experts.gate_up_proj": np.concatenate(
                [layer["moe/gate"], layer["moe/up"]], axis=2
            ).swapaxes(1, 2),
        }
        for name in ("query", "key", "value"):
            w_dhk = layer[f"attention/{name}"]
            result[f"{of}.self_attn.{name[0]}_proj.weight"] = w_dhk.reshape(len(w_dhk), -1).T
        w_hkd = layer["attention/output"]
        result[f"{of}.self_attn.o_proj.weight"] = w_hkd.reshape(-1, w_hkd.shape[-1]).T
    return {name: torch.from_numpy(np.ascontiguousarray(w)) for name, w in result.items()}


def make_optimizer(model: torch.nn.Module, optim: dict[str, Any]) -> torch.optim.Optimizer:
    """Returns AdamW with a constant rate that decays what moejax decays: no norm, no router."""

    def decays(name: str) -> bool:
        return not name.endswith(("norm.weight", "mlp.gate.weight"))

    def parameters(wanted: bool) -> list:
        return [p for name, p in model.named_parameters() if decays(name) == wanted]

    groups = [
        {"params": parameters(True), "weight_decay": optim["weight_decay"]},
        {"params": parameters(False), "weight_decay": 0.0},
    ]
    assert optim["schedule"] == "constant"
    assert optim["warmup_steps"] == 0
    betas = (optim["b1"], optim["b2"])
    return torch.optim.AdamW(groups, optim["learning_rate"], betas, optim["eps"], fused=True)


def count_calls(model: torch.nn.Module, vocab_size: int) -> dict[str, int]:
    """Returns how often a forward pass calls what it was configured to call.

    Raises:
        RuntimeError: it does not call one of them.
    """
    functional = torch.nn.functional
    counts = {"grouped_mm": 0, "scaled_dot_product_attention": 0}
    originals = {name: getattr(functional, name) for name in counts}

    def counting(name):
        def call(*args, **kwargs):
            counts[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in counts:
        setattr(functional, name, counting(name))
    try:
        with torch.no_grad():
            model(input_ids=torch.arange(64)[None] % vocab_size)
    finally:
        for name, original in originals.items():
            setattr(functional, name, original)
    if not all(counts.values()):
        raise RuntimeError(f"transformers does not take the path that is to be measured: {counts}")
    return counts


if __name__ == "__main__":
    serve(make)
