"""Forced balance, round robin over positions: for benchmarks, never for results.

    moejax train configs/routers/balanced.py --workdir runs/balanced

Token t takes experts t k, ..., t k + k - 1 modulo E.
"""

from base import small_config


def get_config():
    return small_config(
        router="balanced",
    )
