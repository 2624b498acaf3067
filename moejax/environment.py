"""What a training runs on and what decides its last bits, for a checkpoint to remember."""

import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from moejax.config import Config, MeshConfig

# Instruction sets by which XLA:CPU generates other code, which adds in another order.
INSTRUCTION_SETS = (
    *("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16"),
    *("asimd", "bf16", "sve", "sve2"),
)
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # of the environment no others are stored


def environment(config: Config, mesh: MeshConfig) -> dict[str, Any]:
    """Returns, by name, what equal bits need to be equal, besides the state, the data and the code.

    Args:
        mesh: with its sizes known.
    """
    devices = jax.devices()
    found = {
        "device kind": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "train.accumulation": config.train.accumulation,
        "model.remat": config.model.remat,
        "model.loss_chunk": config.model.loss_chunk,
    }
    found |= {f"mesh.{axis}": size for axis, size in vars(mesh).items()}
    found |= {name: os.environ.get(name, "") for name in VARIABLES}
    if devices[0].platform == "cpu":
        found["cpu"] = cpu_features(Path("/proc/cpuinfo"))
    return found


def cpu_features(file: Path) -> str:
    """Returns the machine and those of INSTRUCTION_SETS that it has; only the first off Linux."""
    names: set[str] = set()
    try:
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                names.update(value.split())
                break
    except OSError:
        pass
    return " ".join([platform.machine(), *(name for name in INSTRUCTION_SETS if name in names)])


def environment_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns what differs, `name: before -> now`; what only one of them has is left out."""
    return [
        f"{name}: {before[name]!r} -> {value!r}"
        for name, value in now.items()
        if name in before and before[name] != value
    ]
