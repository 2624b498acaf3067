"""Parameter counts and FLOPs against arithmetic by hand and against published models."""

import dataclasses
from fractions import Fraction

import pytest

from moejax.config import Config, DataConfig, ModelConfig, MoEConfig
from moejax.flops import (
    KINDS,
    active_counts,
    active_experts,
    active_parameters,
    attention_products,
    flops_per_token,
    model_flops_utilization,
    parameter_counts,
    peak_flops,
    total_parameters,
)

TINY = Config(
    model=ModelConfig(
        num_layers=3,
        d_model=10,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        dense_hidden=7,
        vocab_size=11,
        tie_embeddings=False,
        qk_norm=True,
    ),
    moe=MoEConfig(num_experts=5, top_k=2, expert_hidden=3, first_dense=1),
    data=DataConfig(sequence_length=8),
)


def _model(layers, d, heads, kv_heads, head_dim, vocab, qk_norm=False) -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        d_model=d,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        qk_norm=qk_norm,
    )


# Shapes: each model's config.json on Hugging Face.
MIXTRAL_8X7B = Config(
    model=_model(32, 4096, 32, 8, 128, 32_000),
    moe=MoEConfig(num_experts=8, top_k=2, expert_hidden=14_336),
)
OLMOE_1B_7B = Config(
    model=_model(16, 2048, 16, 16, 128, 50_304, qk_norm=True),
    moe=MoEConfig(num_experts=64, top_k=8, expert_hidden=1024),
)
QWEN3_30B_A3B = Config(
    model=_model(48, 2048, 32, 4, 128, 151_936, qk_norm=True),
    moe=MoEConfig(num_experts=128, top_k=8, expert_hidden=768),
)
QWEN_MOE_A2_7B = Config(
    model=_model(24, 2048, 16, 16, 128, 151_936),
    moe=MoEConfig(
        num_experts=60,
        top_k=4,
        expert_hidden=1408,
        shared_experts=4,
        shared_gate="sigmoid",
        normalize_weights=False,
    ),
)


def test_counts_by_hand():
    # One dense layer, two MoE layers; D=10, H=4, N=2, K=6.
    assert parameter_counts(TINY) == {
        "embeddings": 11 * 10 + 10 * 11,
        "attention": 3 * (10 * 24 + 10 * 12 + 10 * 12 + 24 * 10),
        "dense": 10 * 7 + 10 * 7 + 7 * 10,
        "router": 2 * 10 * 5,
        "experts": 2 * 5 * (10 * 3 + 10 * 3 + 3 * 10),
        "shared": 0,
        "norms": 3 * (10 + 6 + 6 + 10) + 10,
    }
    assert tuple(parameter_counts(TINY)) == KINDS
    assert total_parameters(TINY) == 220 + 2160 + 210 + 100 + 900 + 106
    # Three of five experts rest, in two layers.
    assert total_parameters(TINY) - active_parameters(TINY) == 2 * 3 * 90


def test_tied_embeddings_and_plain_heads_are_smaller():
    tied = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, tie_embeddings=True))
    plain = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, qk_norm=False))
    assert total_parameters(TINY) - total_parameters(tied) == 110
    assert total_parameters(TINY) - total_parameters(plain) == 3 * 12


def test_dense_model_has_no_router_and_all_parameters_are_active():
    dense = dataclasses.replace(TINY, moe=dataclasses.replace(TINY.moe, every=None, first_dense=0))
    counts = parameter_counts(dense)
    assert counts["router"] == counts["experts"] == counts["shared"] == 0
    assert counts["dense"] == 3 * 210
    assert active_parameters(dense) == total_parameters(dense)


def test_flops_by_hand():
    # Matrices that a token meets: attention 2160, one dense FFN 210, routers 100, two experts in
    # each of two layers 2 * 2 * 90, unembedding 110. Attention: 6 * 3 layers * 4 heads * 6 * 8
    # tokens.
    assert flops_per_token(TINY) == 6 * (2160 + 210 + 100 + 360 + 110) + 6 * 3 * 4 * 6 * 8


def _with_model(**changes) -> Config:
    return dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, **changes))


def test_latent_attention_by_hand():
    """Q=4, C=6, 3 + 2 dims of query and key, 5 of the value; 4 heads, D=10, 3 layers."""
    plain = {"num_kv_heads": 2, "head_dim": 32, "qk_norm": True, "attention": "latent"}
    ranks = {"q_lora_rank": 4, "kv_lora_rank": 6}
    dims = {"qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 7}
    config = _with_model(**plain, **ranks, **dims)
    matrices = 10 * 4 + 4 * 4 * 5 + 10 * (6 + 2) + 6 * 4 * 3 + 6 * 4 * 7 + 4 * 7 * 10
    expected = {"attention": 3 * matrices, "norms": 3 * (10 + 4 + 6 + 10) + 10}
    assert parameter_counts(config) == parameter_counts(TINY) | expected
    # scores of 5 dims, values of 7, 8 tokens; half of them, it is causal
    assert attention_products(config) == 3 * 4 * (5 + 7) * 8 // 2
    weights = 3 * matrices + 210 + 100 + 360 + 110
    assert flops_per_token(config) == 6 * (weights + attention_products(config))


def test_biases_and_sinks_are_parameters_and_cost_nothing():
    config = _with_model(attention_bias=True, attention_sinks=True)
    extra = parameter_counts(config)["attention"] - parameter_counts(TINY)["attention"]
    assert extra == 3 * (4 * 6 + 2 * 6 + 2 * 6 + 10 + 4)
    assert flops_per_token(config) == flops_per_token(TINY)


def test_windows_leave_the_keys_that_they_show():
    """8 tokens, a window of 4: as the area under min(t, 4), 8 + 16 of 32 pairs in a layer."""
    every = _with_model(attention_window=4)
    assert attention_products(TINY) == 3 * 4 * 12 * 4
    assert attention_products(every) == 3 * 4 * 12 * 3
    second = _with_model(attention_window=4, full_attention_every=2)  # one of three layers is full
    assert attention_products(second) == 4 * 12 * (4 + 3 + 3)
    assert attention_products(_with_model(attention_window=99)) == attention_products(TINY)


SHARED = {"shared_experts": 2, "shared_gate": "sigmoid"}
FREE = {"zero_experts": 1, "copy_experts": 1, "constant_experts": 2}
# What differs from TINY, all of it with D=10, E=5, k=2, F=3, T=8 and in two layers; a network of
# one expert is 90 parameters.
LAYERS = {
    # A network of two experts' width, and its gate [D]; all of it for every token.
    "shared experts": (SHARED, {"shared": 2 * 180, "router": 2 * (50 + 10)}, 2),
    # Logits of 9 choices; constant experts with v [D] and a gate [D, 2] each. With weight 3/4 in
    # the loss, balance is 5 * 3/4 parts networks to 4 parts others.
    "free experts": (FREE, {"router": 2 * (10 * 9 + 2 * 10 + 2 * 20)}, Fraction(2 * 15, 15 + 16)),
    "no gate matrix": ({"activation": "gelu"}, {"experts": 2 * 5 * 60}, 2),
    # Angles of width 4, and a temperature.
    "cosine": ({"router": "cosine", "cosine_width": 4}, {"router": 2 * (40 + 20 + 1)}, 2),
    "noisy": ({"router": "noisy"}, {"router": 2 * 100}, 2),
    "hash": ({"router": "hash"}, {"router": 0}, 2),
    "dense": ({"router": "dense"}, {"router": 2 * 55}, 5),
    # Rank 3: [D, R] for all experts, [E, R, D].
    "elementwise input": (
        {"router": "elementwise_input", "gate_rank": 3},
        {"router": 2 * 30, "experts": 2 * (450 + 150)},
        5,
    ),
    "elementwise": ({"router": "elementwise"}, {"router": 0, "experts": 2 * (450 + 50)}, 5),
    "relu": ({"router": "relu"}, {}, 2),
    # A quarter of the tokens; a second router [D].
    "mixture of depths": (
        {"router": "mixture_of_depths", "depth_fraction": 0.25},
        {"router": 2 * 60},
        Fraction(1, 2),
    ),
    # 5 experts with 3 slots for a group of 2 * 8 tokens; [D, 15] and a scale.
    "soft": (
        {"router": "soft", "soft_slots": 3, "group_sequences": 2},
        {"router": 2 * 151},
        Fraction(15, 16),
    ),
}


@pytest.mark.parametrize(("changes", "counts", "experts"), LAYERS.values(), ids=LAYERS)
def test_counts_and_flops_of_every_kind_of_layer_by_hand(changes, counts, experts):
    changes = {"capacity_factor": None, "allow_noncausal": True, **changes}
    config = dataclasses.replace(TINY, moe=dataclasses.replace(TINY.moe, **changes))
    expected = parameter_counts(TINY) | counts
    assert parameter_counts(config) == expected
    assert active_experts(config) == experts
    active = expected | {"experts": round(expected["experts"] * experts / 5)}
    assert active_counts(config) == active
    assert active_parameters(config) == sum(active.values())
    weights = sum(active[k] for k in ("attention", "dense", "router", "experts", "shared")) + 110
    assert flops_per_token(config) == 6 * weights + 6 * 3 * 4 * 6 * 8


def test_flops_do_not_change_with_tying_or_capacity():
    tied = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, tie_embeddings=True))
    roomy = dataclasses.replace(TINY, moe=dataclasses.replace(TINY.moe, capacity_factor=4.0))
    assert flops_per_token(tied) == flops_per_token(roomy) == flops_per_token(TINY)


@pytest.mark.parametrize(
    ("config", "total", "difference"),
    [
        # keras-hub, mixtral presets: "params": 46702792704.
        (MIXTRAL_8X7B, 46_702_792_704, 0),
        # Hugging Face's count of allenai/OLMoE-1B-7B-0924 (safetensors header). Its q and k norms
        # span all heads (2048 wide) where ours span one (128): 16 layers * 2 * (2048 - 128) more.
        (OLMOE_1B_7B, 6_919_161_856, 16 * 2 * (2048 - 128)),
        # `general.parameter_count` of Qwen/Qwen3-30B-A3B in GGUF.
        (QWEN3_30B_A3B, 30_532_122_624, 0),
        # Hugging Face's count of Qwen/Qwen1.5-MoE-A2.7B (safetensors header): four shared experts
        # behind a gate. Its q, k and v have biases, ours none: 24 layers * 3 * 2048 more.
        (QWEN_MOE_A2_7B, 14_315_784_192, 24 * 3 * 2048),
    ],
    ids=["mixtral-8x7b", "olmoe-1b-7b", "qwen3-30b-a3b", "qwen1.5-moe-a2.7b"],
)
def test_published_totals_are_met_exactly(config, total, difference):
    assert total_parameters(config) == total - difference


@pytest.mark.parametrize(
    ("config", "billions", "digits"),
    [
        # Mixtral of Experts (arXiv:2401.04088) and mistral.ai/news/mixtral-of-experts: 46.7B total,
        # 12.9B a token.
        (MIXTRAL_8X7B, 12.9, 1),
        # OLMoE (arXiv:2409.02060), table 1: 1.3B active, 6.9B total.
        (OLMOE_1B_7B, 1.3, 1),
        # qwenlm.github.io/blog/qwen-moe: 14.3B in total, 2.7B activated.
        (QWEN_MOE_A2_7B, 2.7, 1),
    ],
    ids=["mixtral-8x7b", "olmoe-1b-7b", "qwen1.5-moe-a2.7b"],
)
def test_published_active_counts(config, billions, digits):
    assert round(active_parameters(config) / 1e9, digits) == billions


def test_qwen3_active_and_non_embedding_counts():
    # Model card of Qwen/Qwen3-30B-A3B: 30.5B in total, 29.9B non-embedding, 3.3B activated. The
    # card cuts 3.35 to 3.3.
    counts = parameter_counts(QWEN3_30B_A3B)
    assert active_parameters(QWEN3_30B_A3B) == 3_353_032_704
    assert int(active_parameters(QWEN3_30B_A3B) / 1e8) == 33
    assert round((total_parameters(QWEN3_30B_A3B) - counts["embeddings"]) / 1e9, 1) == 29.9


def test_mixtral_flops_are_near_six_times_the_active_parameters():
    config = dataclasses.replace(MIXTRAL_8X7B, data=DataConfig(sequence_length=4096))
    lookup = 32_000 * 4096
    attention = 6 * 32 * 4096 * 4096
    norms = parameter_counts(config)["norms"]
    assert flops_per_token(config) == 6 * (active_parameters(config) - lookup - norms) + attention


@pytest.mark.parametrize(
    ("kind", "chip", "devices"),
    [
        ("TPU v5 lite", 1.97e14, 1),
        ("TPU v5", 4.59e14, 1),
        ("TPU v5p", 4.59e14, 1),
        ("TPU v6 lite", 9.18e14, 1),
        ("TPU7x", 2.307e15, 2),
        ("NVIDIA H100 80GB HBM3", 9.9e14, 1),
        ("NVIDIA GB200", 2.5e15, 1),
    ],
)
def test_peak_is_per_device(kind, chip, devices):
    assert peak_flops(kind, "bfloat16") == pytest.approx(chip / devices, rel=2e-3)


def test_peak_agrees_with_the_table_that_jax_carries():
    from jax._src.pallas.mosaic import tpu_info

    for version, name in [
        ("TPU_V4", "TPU v4"),
        ("TPU_V5E", "TPU v5e"),
        ("TPU_V5P", "TPU v5p"),
        ("TPU_7X", "TPU7x"),
    ]:
        chip = tpu_info.ChipVersion[version]
        # One core is one device on 7x; on v4 and v5p, two cores are.
        cores = 2 if name in ("TPU v4", "TPU v5p") else 1
        theirs = tpu_info._get_tpu_info_impl(chip, cores).bf16_ops_per_second * cores
        assert peak_flops(name, "bfloat16") == pytest.approx(theirs, rel=0.005), name


@pytest.mark.parametrize(
    ("kind", "dtype"), [("cpu", "bfloat16"), ("NVIDIA H100", "bfloat16"), ("TPU v5p", "float32")]
)
def test_unknown_peak_is_none(kind, dtype):
    assert peak_flops(kind, dtype) is None


def test_utilization():
    config = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, dtype="bfloat16"))
    tokens = 1.97e14 / flops_per_token(config)  # what one v5e could do at its peak
    assert model_flops_utilization(config, tokens, "TPU v5 lite", 2) == pytest.approx(0.5)
    assert model_flops_utilization(config, tokens, "cpu", 2) is None
    assert model_flops_utilization(TINY, tokens, "TPU v5 lite", 2) is None  # float32
