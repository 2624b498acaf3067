"""Sizes that follow from the config alone: parameters, FLOPs a token, a chip's peak.

Nothing here imports JAX. The formulas are the ones that the field reports by (PaLM,
arXiv:2204.02311, appendix B; MaxText's `calculate_tflops_training_per_device`); `flops_per_token`
spells out what they leave open.
"""

from moejax.config import Config

KINDS = ("embeddings", "attention", "dense", "router", "experts", "norms")

# Dense bf16 FLOP/s of one JAX device, keyed by what `device.device_kind` says. Values: Google's TPU
# pages and NVIDIA's data sheets (without sparsity). TPU v2, v3 and 7x show each chip as two
# devices, so those hold half a chip.
_PEAK_BF16 = {
    "TPU v2": 4.6e13 / 2,
    "TPU v3": 1.23e14 / 2,
    "TPU v4": 2.75e14,
    "TPU v5 lite": 1.97e14,
    "TPU v5e": 1.97e14,
    "TPU v5": 4.59e14,
    "TPU v5p": 4.59e14,
    "TPU v6 lite": 9.18e14,
    "TPU v6e": 9.18e14,
    "TPU7x": 2.307e15 / 2,
    "NVIDIA A100-SXM4-40GB": 3.12e14,
    "NVIDIA A100-SXM4-80GB": 3.12e14,
    "NVIDIA A100-PCIE-40GB": 3.12e14,
    "NVIDIA A100 80GB PCIe": 3.12e14,
    "NVIDIA H100 80GB HBM3": 9.89e14,
    "NVIDIA H100 PCIe": 7.56e14,
    "NVIDIA H800": 9.89e14,
    "NVIDIA H200": 9.89e14,
    "NVIDIA GH200 120GB": 9.89e14,
    "NVIDIA GH200 480GB": 9.89e14,
    "NVIDIA B200": 2.25e15,
    "NVIDIA GB200": 2.5e15,
}


def parameter_counts(config: Config) -> dict[str, int]:
    """Returns how many parameters the model has, by kind (`KINDS`).

    Router state that no gradient moves (the selection bias of `router="sigmoid_bias"`) is not a
    parameter.
    """
    return _count(config, config.moe.num_experts)


def total_parameters(config: Config) -> int:
    """Returns the number of parameters: what must be stored."""
    return sum(parameter_counts(config).values())


def active_parameters(config: Config) -> int:
    """Returns the parameters that one token uses: `top_k` experts of `num_experts`, all else whole.

    Embedding and unembedding count, as in the published "12.9B active" of Mixtral 8x7B.
    """
    return sum(_count(config, config.moe.top_k).values())


def flops_per_token(config: Config) -> int:
    """Returns the FLOPs of forward and backward for one token, the numerator of MFU.

        6 * N + 6 * L * H * K * T

    with N the weights that a token is multiplied by: attention projections, router, `top_k`
    experts, dense FFNs and the unembedding [D, V], tied or not. A weight costs 2 FLOPs forward and
    4 backward. The second term is scores and values of attention, 12 * L * H * K * T, halved
    because it is causal. Not counted: the embedding lookup, norms, softmax, recomputation, and the
    padding of capacity (k experts, not capacity_factor * k). Documents packed into one sequence
    attend less than this; the convention does not say so and neither does the number.

    Source: PaLM (arXiv:2204.02311), appendix B, with the causal half as MaxText counts it.
    """
    model = config.model
    counts = _count(config, config.moe.top_k)
    # The q and k norms sit in `norms`, so that `attention` is matrices only.
    weights = sum(counts[kind] for kind in ("attention", "dense", "router", "experts"))
    weights += model.d_model * model.vocab_size
    attention = model.num_layers * model.num_heads * model.head_dim * config.data.sequence_length
    return 6 * weights + 6 * attention


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
    return _PEAK_BF16.get(device_kind)


def model_flops_utilization(
    config: Config, tokens_per_second: float, device_kind: str, num_devices: int
) -> float | None:
    """Returns MFU, useful FLOP/s over the peak of all devices, or None where no peak is known."""
    peak = peak_flops(device_kind, config.model.dtype)
    if peak is None:
        return None
    return tokens_per_second * flops_per_token(config) / (num_devices * peak)


def _count(config: Config, experts: int) -> dict[str, int]:
    """Parameters by kind with `experts` experts a MoE layer."""
    model, moe = config.model, config.moe
    d, h, n, k = model.d_model, model.num_heads, model.num_kv_heads, model.head_dim
    num_moe, num_dense = config.num_moe_layers, config.num_dense_layers
    norms_of_layer = 2 * d + (2 * k if model.qk_norm else 0)
    return {
        "embeddings": model.vocab_size * d * (1 if model.tie_embeddings else 2),
        "attention": model.num_layers * (2 * d * h * k + 2 * d * n * k),
        "dense": num_dense * 3 * d * model.dense_hidden,
        "router": num_moe * d * moe.num_experts,
        "experts": num_moe * experts * 3 * d * moe.expert_hidden,
        "norms": model.num_layers * norms_of_layer + d,
    }
