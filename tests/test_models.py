"""configs/models: sizes and FLOPs as published, and a small one of each kind on every layout.

A count is held to the exact one of the released checkpoint less what a config says that it leaves
out, and within 1% to the figures that the authors print, or, where those are coarser than that, to
what follows from the checkpoint.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from moejax import verify
from moejax.flops import (
    active_parameters,
    attention_products,
    flops_per_token,
    parameter_counts,
    total_parameters,
)
from moejax.mesh import single_device_mesh
from moejax.overrides import load_config
from moejax.sharding import path_name
from moejax.state import split_model
from moejax.step import parameter_group

CONFIGS = Path(__file__).parents[1] / "configs" / "models"


class Published(NamedTuple):
    """Figures of a model.

    Attributes:
        devices: what the config's docstring lays it out on.
        exact: parameters of the checkpoint.
        left_out: those that the config does not have.
        total, active: billions, as the authors print them.
        lookup: whether their active count has the embedding, which is only looked up.
        flops: 1e9 of forward and backward per token, and the sequence length; None: not published.
        square: whether those count attention as if it were not causal.
    """

    devices: int
    exact: int
    left_out: int
    total: float
    active: float
    lookup: bool = True
    flops: tuple[float, int] | None = None
    square: bool = False


MODELS = {
    # Size: keras-hub's preset; arXiv:2401.04088. FLOPs: 302.3 TFLOP/s at 3,645 tokens/s a chip,
    # MaxText on v6e-256 (tpu-recipes), which counted the whole square until July 2025.
    "mixtral_8x7b": Published(64, 46_702_792_704, 0, 46.7, 12.9, flops=(82.94, 4096), square=True),
    # Size: safetensors header of mistralai/Mixtral-8x22B-v0.1; mistral.ai/news/mixtral-8x22b.
    # FLOPs: 332.5 TFLOP/s at 1,326 tokens/s a chip, MaxText on v6e-256, as above.
    "mixtral_8x22b": Published(256, 140_620_634_112, 0, 141, 39, flops=(250.8, 4096), square=True),
    # Size: safetensors header of allenai/OLMoE-1B-7B-0924; arXiv:2409.02060, table 1, rounds the
    # active to 1.3: the header's less 16 x 56 experts of 3 x 2048 x 1024 is 1.282. Its q and k
    # norms span 2048 dims where ours span a head of 128.
    "olmoe_1b_7b": Published(64, 6_919_161_856, 16 * 2 * (2048 - 128), 6.9, 1.282),
    # Size: GGUF header of Qwen/Qwen3-30B-A3B; its card cuts the active to 3.3: the header's less
    # 48 x 120 experts of 3 x 2048 x 768 is 3.353. FLOPs: 600 TFLOP/s at 26,084 tokens/s a GPU,
    # Megatron-Bridge on 8 GB200.
    "qwen3_30b_a3b": Published(64, 30_532_122_624, 0, 30.5, 3.353, flops=(23.00, 4096)),
    # Size: safetensors header of Qwen/Qwen3-235B-A22B; its card. FLOPs: 629.8 TFLOP/s at 4,246
    # tokens/s a chip, MaxText on 256 TPU7x (tpu-recipes).
    "qwen3_235b_a22b": Published(256, 235_093_634_560, 0, 235, 22, flops=(148.3, 4096)),
    # Size: README_WEIGHTS.md of deepseek-ai/DeepSeek-V3, "671B", "36.7B" active; the checkpoint
    # without multi-token prediction has 671,026,419,200, of them 58 x 256 selection biases, which
    # are router state here. FLOPs: arXiv:2505.09343, table 2, "250 GFLOPS/Token".
    "deepseek_v3": Published(
        512, 671_026_419_200, 58 * 256, 671, 36.7, lookup=False, flops=(250, 4096)
    ),
    # Size: arXiv:2508.10925, table 1, 116.83 and 5.13, which counts the unembedding alone as
    # active. The exact count follows from the shapes in gpt_oss/torch/model.py; left out are the
    # biases of 36 x 128 experts (2 x 2880 + 2880) and 36 routers. FLOPs: 330 TFLOP/s at 9,580
    # tokens/s a chip, MaxText on TPU7x.
    "gpt_oss_120b": Published(
        64,
        116_829_156_672,
        36 * 128 * (3 * 2880 + 1),
        116.83,
        5.13,
        lookup=False,
        flops=(34.45, 8192),
    ),
    # Size: arXiv:2101.03961, table 7, 3.8 B. The exact count is T5-Base's 222,903,552 plus 63 more
    # experts of 2 x 768 x 3072 and a router in each of 12 layers. Left out are cross-attention
    # and its norm in 12 layers, two tables of relative biases (32 x 12) and the second final norm.
    # Active and FLOPs: none are published for a decoder; T5-Base's 223 M are 196 M without
    # cross-attention.
    "switch_base_64": Published(
        64,
        222_903_552 + 12 * (63 * 2 * 768 * 3072 + 768 * 64),
        12 * (4 * 768 * 768 + 768) + 2 * 32 * 12 + 768,
        3.8,
        0.196,
    ),
}


def load(name: str, *overrides: str):
    return load_config(str(CONFIGS / f"{name}.py"), overrides)


def test_every_model_is_held_to_something():
    assert sorted(MODELS) == sorted(file.stem for file in CONFIGS.glob("*.py"))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_published_size(name):
    config, published = load(name), MODELS[name]
    total, active = total_parameters(config), active_parameters(config)
    assert total == published.exact - published.left_out
    assert published.left_out < 0.01 * published.exact
    assert total == pytest.approx(published.total * 1e9, rel=0.01)
    if not published.lookup:
        active -= config.model.d_model * config.model.vocab_size
    assert active == pytest.approx(published.active * 1e9, rel=0.01)


@pytest.mark.parametrize("name", [name for name, p in MODELS.items() if p.flops])
def test_a_model_costs_the_published_flops(name):
    published = MODELS[name]
    assert published.flops is not None
    gigaflops, length = published.flops
    config = load(name, f"data.sequence_length={length}")
    ours = flops_per_token(config) + 6 * attention_products(config) * published.square
    assert ours == pytest.approx(gigaflops * 1e9, rel=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_parameters_that_are_counted_and_fits_its_mesh(name):
    """Shapes alone: nothing of this size is made."""
    config = load(name)
    config.check_mesh(config.mesh.resolve(MODELS[name].devices))
    mesh = single_device_mesh()
    params = jax.eval_shape(lambda: split_model(config, mesh, jax.random.key(0))[1])
    counts = dict.fromkeys(parameter_counts(config), 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        counts[parameter_group(path_name(path))] += leaf.size
    assert counts == parameter_counts(config)


# The same models made small: widths and numbers, no other key.
SMALL = {
    "deepseek_v3": [
        *("model.num_layers=2", "moe.first_dense=1", "model.dense_hidden=24"),
        *("model.q_lora_rank=8", "model.kv_lora_rank=12", "model.v_head_dim=6"),
        *("model.qk_nope_head_dim=8", "model.qk_rope_head_dim=4", "model.num_heads=4"),
        *("moe.num_experts=16", "moe.top_k=2", "moe.expert_groups=4", "moe.groups_per_token=2"),
    ],
    "gpt_oss_120b": [
        *("model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=8"),
        *("moe.num_experts=8", "moe.top_k=2", "model.attention_window=4"),
    ],
}
EVERYWHERE = [
    *("model.d_model=16", "model.vocab_size=264", "moe.expert_hidden=12"),
    *("data.sequence_length=16", "optim.warmup_steps=1"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss_120b"])
def test_a_small_one_trains_the_same_on_eight_devices(name):
    """Two steps over fsdp, expert and tensor, against one device with the dense oracle."""
    config = load(name, *EVERYWHERE, *SMALL[name])
    layout = verify.Layout(1, 2, 2, 1, 2, 1, "full", "dropless by gather")
    (row,) = verify.check(config, [layout], 8)
    assert row.failures == []
    assert row.groups["attention"] > 0
