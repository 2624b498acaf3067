"""Sizes that follow from the config alone: parameters, FLOPs a token, a chip's peak.

Nothing here imports JAX. The formulas are the ones that the field reports by (PaLM,
arXiv:2204.02311, appendix B; MaxText's `calculate_tflops_training_per_device`); `flops_per_token`
spells out what they leave open.
"""

import math
from fractions import Fraction

from moejax.config import Config, ModelConfig
from moejax.parameters import kind_of, moe_parameters
from moejax.topology import PEAK_BF16

KINDS = ("embeddings", "attention", "dense", "router", "experts", "shared", "norms")


def parameter_counts(config: Config) -> dict[str, int]:
    """Returns how many parameters the model has, by kind (`KINDS`).

    Router state that no gradient moves (a selection bias, a hash table) is not a parameter.
    """
    return _count(config, active=False)


def total_parameters(config: Config) -> int:
    """Returns the number of parameters: what must be stored."""
    return sum(parameter_counts(config).values())


def active_counts(config: Config) -> dict[str, int]:
    """Returns the parameters that one token uses on average, by kind; see `active_experts`."""
    return _count(config, active=True)


def active_parameters(config: Config) -> int:
    """Returns the parameters that one token uses: the experts that it selects, all else whole.

    Embedding and unembedding count, as in the published "12.9B active" of Mixtral 8x7B.
    """
    return sum(active_counts(config).values())


def active_experts(config: Config) -> Fraction:
    """Returns the expert networks that a token runs through on average, in one MoE layer.

    Of layers that differ it is the mean.

    top_k, or all for dense gating; less where a token can choose experts without a network (MoE++,
    at the balance that its loss asks for) or skip the layer. Soft MoE: slots per token.
    """
    stacks = config.moe_stacks()
    if not stacks:
        return Fraction(0)
    total = sum(stack.num_layers * _active_experts(own) for stack, own in stacks)
    return Fraction(total) / config.num_moe_layers


def _active_experts(config: Config) -> Fraction:
    moe = config.moe
    if moe.router == "soft":
        tokens = moe.group_sequences * config.data.sequence_length
        return Fraction(moe.num_experts * moe.soft_slots, tokens)
    share = Fraction(1)
    if moe.free_experts:
        networks = Fraction(str(moe.zero_computation_weight)) * moe.num_experts
        share = networks / (networks + moe.free_experts)
    if moe.router == "mixture_of_depths":
        share = Fraction(str(moe.depth_fraction))
    return moe.mean_selected * share


def flops_per_token(config: Config) -> int:
    """Returns the FLOPs of forward and backward for one token, the numerator of MFU.

        6 * N + 6 * L * H * K * T

    with N the weights that a token is multiplied by: attention projections, router, selected and
    shared experts, dense FFNs and the unembedding [D, V], tied or not. A weight costs 2 FLOPs
    forward and 4 backward. The second term is `attention_products`. Not counted: the embedding
    lookup, norms, biases, softmax, recomputation, and the padding of capacity (k experts, not
    capacity_factor * k).

    Source: PaLM (arXiv:2204.02311), appendix B, with the causal half as MaxText counts it.
    """
    model = config.model
    counts = active_counts(config)
    weights = sum(counts[kind] for kind in ("dense", "router", "experts", "shared"))
    weights += model.num_layers * _attention_matrices(model) + model.d_model * model.vocab_size
    return 6 * weights + 6 * attention_products(config)


def attention_products(config: Config) -> int:
    """Returns the multiplications of one token with keys and values, forward, in all layers.

    L * H * K * T: T keys and T values of K dims a head, halved because it is causal. K is the mean
    of both widths where they differ. A window of W < T tokens leaves W - W * W / 2T keys on
    average in place of T / 2. Documents packed into one sequence attend less than this; the
    convention does not say so and neither does the number.
    """
    model, length = config.model, config.data.sequence_length
    window = min(model.attention_window or length, length)
    full = model.num_full_layers
    keys = full * Fraction(length, 2)
    keys += (model.num_layers - full) * (window - Fraction(window * window, 2 * length))
    return round(model.num_heads * (model.qk_width + model.v_width) * keys)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Returns the peak FLOP/s of one JAX device, or None where it is not known.

    Args:
        device_kind: `jax.devices()[0].device_kind`. It is matched whole: a near miss ("NVIDIA H100
            PCIe" for "NVIDIA H100 80GB HBM3") has another peak, and a wrong MFU is worse than none.
        dtype: of the compute, `config.model.dtype`. Only "bfloat16" has a peak: what float32
            products run at depends on `jax_default_matmul_precision`, and chips publish no figure
            for it.
    """
    if dtype != "bfloat16":
        return None
    return PEAK_BF16.get(device_kind)


def model_flops_utilization(
    config: Config, tokens_per_second: float, device_kind: str, num_devices: int
) -> float | None:
    """Returns MFU, useful FLOP/s over the peak of all devices, or None where no peak is known."""
    peak = peak_flops(device_kind, config.model.dtype)
    if peak is None:
        return None
    return tokens_per_second * flops_per_token(config) / (num_devices * peak)


def _attention_matrices(model: ModelConfig) -> int:
    """Returns the weights of one layer's projections."""
    d, h, qk, v = model.d_model, model.num_heads, model.qk_width, model.v_width
    if model.attention == "grouped":
        return 2 * d * h * qk + 2 * d * model.num_kv_heads * qk
    q, c = model.q_lora_rank, model.kv_lora_rank
    down = d * (q + c + model.qk_rope_head_dim)
    return down + q * h * qk + c * h * (model.qk_nope_head_dim + v) + h * v * d


def _attention_vectors(model: ModelConfig) -> int:
    """Returns one layer's biases and sinks."""
    heads = model.num_heads + 2 * model.num_kv_heads
    biases = heads * model.head_dim + model.d_model if model.attention_bias else 0
    return biases + (model.num_heads if model.attention_sinks else 0)


def _attention_norms(model: ModelConfig) -> int:
    """Returns the scales of the norms inside of one layer's attention."""
    if model.attention == "latent":
        return model.q_lora_rank + model.kv_lora_rank
    return 2 * model.head_dim if model.qk_norm else 0


def _count(config: Config, *, active: bool) -> dict[str, int]:
    """Returns parameters by kind: all, or those that a token uses."""
    model, d = config.model, config.model.d_model
    attention = _attention_matrices(model) + _attention_vectors(model)
    counts = dict.fromkeys(KINDS, Fraction(0)) | {
        "embeddings": model.vocab_size * d * (1 if model.tie_embeddings else 2),
        "attention": model.num_layers * attention,
        "dense": config.num_dense_layers * 3 * d * model.dense_hidden,
        "norms": model.num_layers * (2 * d + _attention_norms(model)) + d,
    }
    for stack, own in config.moe_stacks():
        used = _active_experts(own) / own.moe.num_experts if active else Fraction(1)
        for name, parameter in moe_parameters(own.moe, d).items():
            kind = kind_of(name)
            share = used if kind == "experts" else 1
            counts[kind] += stack.num_layers * math.prod(parameter.shape) * share
    return {kind: round(count) for kind, count in counts.items()}
