"""What `:small` changes in the shipped sweeps: a model that trains for seconds on a CPU core."""

SMALL = {
    "model.num_layers": 2,
    "model.d_model": 32,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.head_dim": 16,
    "model.dense_hidden": 64,
    "moe.num_experts": 4,
    "moe.expert_hidden": 32,
    "data.sequence_length": 64,
    "train.batch_size": 4,
    "train.steps": 40,
    "optim.warmup_steps": 5,
    "logging.every": 10,
    "eval.every": 10,
    "eval.batches": 2,
    "checkpoint.every": 20,
}


def is_small(arg: str | None) -> bool:
    """Returns whether a sweep's argument asks for its small form, and refuses any other."""
    if arg not in (None, "small"):
        raise ValueError(f"argument {arg!r} is not known; use :small, or none for the whole sweep")
    return arg == "small"
