"""Logits bent into (-30, 30): 30 * tanh(logit / 30), Gemma 2's cap (arXiv:2408.00118).

    moejax train configs/routers/logit_cap.py --workdir runs/logit_cap

Gemma 2 caps its output logits so; here it keeps a router from saturating.
"""

from base import small_config


def get_config():
    return small_config(
        router="softmax",
        logit_cap=30.0,
    )
