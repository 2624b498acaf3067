"""Shared experts for every token behind a sigmoid gate (Qwen2-MoE, arXiv:2407.10671).

    moejax train configs/routers/shared_experts.py --workdir runs/shared_experts

One shared expert beside the two routed ones (DeepSeekMoE, arXiv:2401.06066).
"""

from base import small_config


def get_config():
    return small_config(
        router="softmax",
        normalize_weights=False,
        shared_experts=1,
        shared_gate="sigmoid",
    )
