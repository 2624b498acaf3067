"""What each transport moves over the expert axes and holds on a device, by formula.

Z devices on the expert axes, T tokens of a microbatch on a device, b bytes a number in the compute
dtype, S = k selected experts a token. Forward; the backward pass moves the same rows again.
Collectives over fsdp and tensor are not counted.
"""

import math
from fractions import Fraction

from moejax.config import Config, MeshConfig
from moejax.dispatch import expert_capacity

TRANSPORTS = ("all_to_all", "ragged", "gather")
FORMULAS = {
    "slots": "(2 * D * b + 4) * E * C / group tokens * (1 - 1/Z)",
    "soft": "2 * D * b * E * slots / group tokens * (1 - 1/Z)",
    "padded": "(2 * D * b + 8) * Z * ceil(buffer_factor * T * k / Z) / T * (1 - 1/Z)",
    "ragged": "2 * D * b * k * (1 - 1/Z) + 4 * S * (Z - 1)",
    "gather": "(2 * D * b + 8 * S) * (Z - 1)",
    "reference": "every device computes every expert",
}


def formula(config: Config, sizes: MeshConfig, how: str) -> str:
    """Returns which entry of FORMULAS holds for the transport `how`.

    Parts of sequences have no equal slots: what was kept goes as dropless assignments do.
    """
    if how != "all_to_all":
        return how
    if config.moe.router == "soft":
        return "soft"
    return "padded" if config.moe.capacity_factor is None or sizes.context != 1 else "slots"


def group_tokens(config: Config) -> int:
    """Returns the positions of one capacity group."""
    return config.moe.group_sequences * config.data.sequence_length


def slots(config: Config, capacity_factor: float) -> int:
    """Returns the slots of an expert in a group without padding; all MoE layers are alike.

    With `capacity_by_expert` those of the largest, which is what every expert's buffer holds.
    """
    moe = config.moe
    largest = Fraction(str(max(moe.capacity_by_expert or (1.0,))))
    factor = Fraction(str(capacity_factor)) * largest
    return expert_capacity(group_tokens(config), moe.num_experts, moe.mean_selected, factor)


def local_tokens(config: Config, sizes: MeshConfig) -> int:
    """Returns the positions of a microbatch on one device."""
    microbatch = config.microbatch_size
    assert sizes.context is not None
    return microbatch // sizes.token_shards * config.data.sequence_length // sizes.context


def part_rows(config: Config, sizes: MeshConfig) -> int:
    """Returns the rows that a device sends to each other one in the padded dropless exchange.

    All MoE layers are alike.
    """
    tokens = local_tokens(config, sizes)
    balanced = int(config.moe.buffer_factor * tokens * config.moe.mean_selected)
    return min(math.ceil(balanced / sizes.expert_degree), tokens * config.moe.slots_per_token)


def exchange_bytes(config: Config, sizes: MeshConfig, how: str) -> float:
    """Returns the bytes that a token sends over the expert axes in one MoE layer, forward.

    Of layers that differ it is the mean, so that times the number of MoE layers it is their sum.
    See FORMULAS; `ragged` is the mean of a balanced routing, the others are exact. Empty slots are
    sent too. 4 bytes a row are its combine weight, which `ragged` gathers; 4 more of the padded
    exchange say which expert a row is for, and `gather` sends both for every selection. The counts
    that `ragged` sends are left out.
    """
    stacks = config.moe_stacks()
    total = sum(stack.num_layers * _layer_bytes(own, sizes, how) for stack, own in stacks)
    return total / max(config.num_moe_layers, 1)


def _layer_bytes(config: Config, sizes: MeshConfig, how: str) -> float:
    moe, degree = config.moe, sizes.expert_degree
    both_ways = 2 * config.model.d_model * itemsize(config)
    away = 1 - 1 / degree
    kind = formula(config, sizes, how)
    if kind == "gather":
        return float((both_ways + 8 * moe.slots_per_token) * (degree - 1))
    if kind == "ragged":
        return both_ways * moe.mean_selected * away + 4 * moe.slots_per_token * (degree - 1)
    if kind == "padded":
        rows = degree * part_rows(config, sizes) / local_tokens(config, sizes)
        return (both_ways + 8) * rows * away
    if kind == "soft":
        return both_ways * moe.num_experts * moe.soft_slots / group_tokens(config) * away
    if kind == "slots":
        assert moe.capacity_factor is not None
        rows = moe.num_experts * slots(config, moe.capacity_factor) / group_tokens(config)
        return (both_ways + 4) * rows * away
    return 0.0


def buffer_rows(config: Config, sizes: MeshConfig, how: str) -> int:
    """Returns the rows [D] that one device holds between dispatch and combine, in one MoE layer.

    Of layers that differ it is the largest, as one layer is computed at a time.

    all_to_all: the buffers before and after the exchange, of equal size. ragged: the sent
    assignments and the receive buffer. gather: the tokens of the expert group, and their rows by
    expert. reference: 0, no buffer. Where one device holds all experts nothing is sent, and there
    is a row for each assignment that was kept, whatever the transport.
    """
    return max((_layer_rows(own, sizes, how) for _, own in config.moe_stacks()), default=0)


def _layer_rows(config: Config, sizes: MeshConfig, how: str) -> int:
    moe, tokens, degree = config.moe, local_tokens(config, sizes), sizes.expert_degree
    sent = tokens * moe.slots_per_token
    received = min(int(moe.buffer_factor * tokens * moe.mean_selected), degree * sent)
    kind = formula(config, sizes, how)
    if kind == "reference":
        return 0
    if kind == "soft":
        return tokens // group_tokens(config) * moe.num_experts * moe.soft_slots
    if degree == 1:
        return received
    if kind == "slots":
        assert moe.capacity_factor is not None
        groups = tokens // group_tokens(config)
        return groups * moe.num_experts * slots(config, moe.capacity_factor)
    if kind == "padded":
        return 2 * degree * part_rows(config, sizes)
    return sent + received if kind == "ragged" else tokens * degree + received


def worst_rounds(config: Config, sizes: MeshConfig) -> int:
    """Returns the rounds over the receive buffer that no routing exceeds; see `rounds.py`.

    1 where nothing can overflow: equal buffers, and a dense model. Of layers that differ it is the
    most.
    """
    return max((_layer_rounds(own, sizes) for _, own in config.moe_stacks()), default=1)


def _layer_rounds(config: Config, sizes: MeshConfig) -> int:
    moe, tokens, degree = config.moe, local_tokens(config, sizes), sizes.expert_degree
    how = formula(config, sizes, moe.transport_over(degree))
    if how in ("soft", "reference") or (how == "slots" and degree > 1):
        return 1
    sent = tokens * moe.slots_per_token
    balanced = int(moe.buffer_factor * tokens * moe.mean_selected)
    if degree == 1:
        return -(-sent // min(balanced, sent))
    if how == "gather":
        most = degree * tokens * min(moe.slots_per_token, moe.num_experts // degree)
        return -(-most // min(balanced, degree * sent))
    if how == "padded":
        return -(-sent // part_rows(config, sizes))
    return -(-degree * sent // min(balanced, degree * sent))


def itemsize(config: Config) -> int:
    """Returns the bytes of a number in the compute dtype."""
    return {"float32": 4, "bfloat16": 2}[config.model.dtype]
