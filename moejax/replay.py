"""Router replay: the experts that tokens chose in one run, used in another.

`logging.choices=True` writes the choices of every step to `<workdir>/choices`; `train.replay=DIR`
reads those of another run. Weights are computed anew from the router's scores, with gradient, and
the router state stays as it is.
"""

import math
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import Config
from moejax.errors import ConfigError
from moejax.foreign import no_links, open_file
from moejax.sharding import BATCH_AXES, CONTEXT_AXIS

FOLDER = "choices"


def _file(run: Path, step: int) -> Path:
    return run / FOLDER / f"step_{step:08d}.npz"


def save_choices(workdir: Path, step: int, choice_albts: np.ndarray) -> None:
    """Writes the choices of a finished step, in the order of the batch's rows.

    Args:
        choice_albts: int32 [accumulation, MoE layers, B, T, S].

    Raises:
        OSError: of the file system; nothing is left.
    """
    choice_lbts = np.concatenate(list(choice_albts), axis=1)
    file = _file(workdir, step)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}")
    try:
        with open(partial, "wb", opener=no_links) as stream:
            np.savez_compressed(stream, choice_lbts=choice_lbts.astype(np.int16))
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def load_choices(config: Config, mesh: Mesh, step: int) -> jax.Array:
    """Returns the recorded choices [accumulation, MoE layers, B, T, S] of `train.replay`.

    Raises:
        ConfigError: the run has no choices of that step, or they are of another shape, or of
            experts that a layer lacks.
    """
    assert config.train.replay is not None
    run = Path(config.train.replay)
    file = _file(run, step)
    train, moe = config.train, config.moe
    wanted = (
        config.num_moe_layers,
        train.batch_size,
        config.data.sequence_length,
        moe.slots_per_token,
    )
    try:
        choice_lbts = _read_choices(file, (1 << 20) + 32 * math.prod(wanted))
    except Exception as error:  # NumPy and zipfile raise a dozen kinds, by where the damage is
        raise ConfigError(
            f"train.replay={run} has no readable choices of step {step} ({error}); record them "
            "with logging.choices=True in a run of at least as many steps"
        ) from None
    if choice_lbts.shape != wanted:
        raise ConfigError(
            f"train.replay={run} has choices of shape {choice_lbts.shape} at step {step} and this "
            f"config needs [MoE layers, sequences, tokens, choices] = {wanted}; use the same "
            "model.num_layers, train.batch_size, data.sequence_length and moe.top_k"
        )
    _check_experts(config, choice_lbts)
    micro = train.batch_size // train.accumulation
    shape = (train.accumulation, wanted[0], micro, *wanted[2:])
    split = choice_lbts.astype(np.int32).reshape(wanted[0], train.accumulation, micro, *wanted[2:])
    choices = np.ascontiguousarray(split.swapaxes(0, 1))
    sharding = NamedSharding(mesh, P(None, None, BATCH_AXES, CONTEXT_AXIS))
    return jax.make_array_from_callback(shape, sharding, lambda index: choices[index])


def _read_choices(file: Path, most: int) -> np.ndarray:
    """Returns the choices in a file that unpacks to at most so many bytes."""
    with open_file(file) as stream, np.load(stream, allow_pickle=False) as arrays:
        (entry,) = arrays.zip.infolist()
        if entry.file_size > most:
            raise ValueError(f"it unpacks to {entry.file_size} bytes")
        choice_lbts = arrays["choice_lbts"]
    if choice_lbts.dtype != np.int16 or choice_lbts.min(initial=0) < 0:
        raise ValueError(f"{choice_lbts.dtype} from {choice_lbts.min(initial=0)}, not experts")
    return choice_lbts


def _check_experts(config: Config, choice_lbts: np.ndarray) -> None:
    """Refuses choices of experts that a layer lacks; a layer's number of choices means none."""
    for stack, own in config.moe_stacks():
        choices = own.moe.choices
        used = choice_lbts[stack.start : stack.stop, ..., : own.moe.slots_per_token]
        if used.max(initial=0) > choices:
            raise ConfigError(
                f"train.replay={config.train.replay} chose expert {used.max()} in MoE layers "
                f"{stack.start} to {stack.stop - 1}, which have {choices} here; use the same "
                "moe.num_experts and moe.num_experts_by_layer"
            )
