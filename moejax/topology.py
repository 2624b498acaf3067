"""Chips and the pods that are made of them: what a plan compiles for, without any of them here.

Nothing here imports JAX at its top: `start_compiler` has to come before. Numbers are of one JAX
device, which on TPU v2, v3 and 7x is half a chip. Sources: Google's TPU pages and NVIDIA's data
sheets (FLOP/s without sparsity, memory, links); what a program can use of a TPU's memory is what
libtpu 0.0.42 says when it refuses one. Bandwidth of links and of the network between
slices: "How To Scale Your Model" (jax-ml.github.io/scaling-book), chapters on TPUs and GPUs.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from moejax.errors import ConfigError, require

GIB = 2**30
GPU_FRACTION = "XLA_CLIENT_MEM_FRACTION"  # of a GPU's memory that JAX takes


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do.

    Attributes:
        kinds: what `device.device_kind` says.
        flops: dense bf16 FLOP/s.
        memory: bytes; of a TPU those that a program can use, see `Topology.memory`.
        bandwidth: bytes/s of that memory.
        link: bytes/s one way over one link of a TPU's torus, or out of a GPU within its host.
        network: bytes/s of a GPU to other hosts, of a TPU to other slices; None where unknown.
        dims: of a TPU's torus; 0 for a GPU.
        wraps: the size from which a dimension of the torus is a ring.
        clock: cycles/s of a TPU, which its compiler counts in: `flops` over those of a cycle.
    """

    kinds: tuple[str, ...]
    flops: float
    memory: int
    bandwidth: float
    link: float
    network: float | None = None
    dims: int = 0
    wraps: int = 0
    clock: float | None = None

    @property
    def is_tpu(self) -> bool:
        return self.dims > 0


def _tpu(kinds, flops, gib: float, bandwidth, link, network, dims, wraps, flops_per_cycle) -> Chip:
    memory = int(gib * GIB)
    clock = flops / flops_per_cycle
    return Chip(kinds, flops, memory, bandwidth, link, network, dims, wraps, clock)


# A core multiplies 128 x 128 numbers a cycle on each of 4 units, from v6e on 256 x 256 on 2 or 4.
CHIPS = {
    "v4": _tpu(("TPU v4",), 2.75e14, 30.75, 1.2e12, 4.5e10, None, 3, 4, 2**18),
    "v5e": _tpu(("TPU v5 lite", "TPU v5e"), 1.97e14, 15.75, 8.1e11, 4.5e10, 3.125e9, 2, 16, 2**17),
    "v5p": _tpu(("TPU v5", "TPU v5p"), 4.59e14, 95.74, 2.765e12, 9e10, 6.25e9, 3, 4, 2**18),
    "v6e": _tpu(("TPU v6 lite", "TPU v6e"), 9.18e14, 31.25, 1.6e12, 9e10, 1.25e10, 2, 16, 2**19),
    "tpu7x": _tpu(("TPU7x",), 2.307e15 / 2, 94.75, 7.38e12 / 2, 9e10 / 2, 1.25e10 / 2, 3, 4, 2**19),
    "a100": Chip(("NVIDIA A100-SXM4-80GB",), 3.12e14, 85_100_068_864, 2.039e12, 3e11, 2.5e10),
    "h100": Chip(("NVIDIA H100 80GB HBM3",), 9.89e14, 84_942_979_072, 3.352e12, 4.5e11, 5e10),
    "h200": Chip(("NVIDIA H200",), 9.89e14, 151_397_597_184, 4.8e12, 4.5e11, 5e10),
    "b200": Chip(("NVIDIA B200",), 2.25e15, 191_514_411_008, 7.672e12, 9e11, 5e10),
}

# Dense bf16 FLOP/s of one device, keyed by what `device.device_kind` says.
PEAK_BF16 = {kind: chip.flops for chip in CHIPS.values() for kind in chip.kinds} | {
    "TPU v2": 4.6e13 / 2,
    "TPU v3": 1.23e14 / 2,
    "NVIDIA A100-SXM4-40GB": 3.12e14,
    "NVIDIA A100-PCIE-40GB": 3.12e14,
    "NVIDIA A100 80GB PCIe": 3.12e14,
    "NVIDIA H100 PCIe": 7.56e14,
    "NVIDIA H800": 9.89e14,
    "NVIDIA GH200 120GB": 9.89e14,
    "NVIDIA GH200 480GB": 9.89e14,
    "NVIDIA GB200": 2.5e15,
}


@dataclasses.dataclass(frozen=True)
class _Gpu:
    """What XLA's compiler asks of a GPU; from XLA's own descriptions (`target_config/specs`)."""

    capability: int  # major
    cores: int  # multiprocessors, each with ...
    units: int  # ... that many float32 units and ...
    shared: int  # ... that many bytes of shared memory, of which a block gets ...
    block: int  # ... that many
    cache: int  # bytes
    clock: float  # GHz


_H100 = _Gpu(9, 132, 128, 233_472, 232_448, 52_428_800, 1.98)
_GPUS = {
    "a100": _Gpu(8, 108, 64, 167_936, 166_912, 41_943_040, 1.41),
    "h100": _H100,
    "h200": _H100,
    "b200": _Gpu(10, 148, 128, 233_472, 232_448, 132_644_864, 1.965),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A pod: chips in a torus (`v5p:4x4x8`), several (`v5p:4x4x8:2`), or GPUs (`h100:16x8`).

    `shape` is of one slice, and `slices` their number; of GPUs hosts and GPUs of a host.
    `fraction` is the part of `chip.memory` that JAX takes when it starts.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    fraction: float = 1.0
    slices: int = 1

    @property
    def memory(self) -> int:
        """Bytes of a device that a program can use."""
        return int(self.chip.memory * self.fraction)

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape) * self.slices

    def wraps(self, dim: int) -> bool:
        """Whether dimension `dim` of a TPU's torus is a ring, not a line."""
        return self.shape[dim] >= self.chip.wraps and self.shape[dim] % self.chip.wraps == 0


def parse_topology(text: str) -> Topology:
    """Reads `CHIP:SIZES[:SLICES]`; what JAX takes of a GPU's memory is in the environment.

    Raises:
        ConfigError: no such chip, sizes that its pods do not have, or no such part of the memory.
    """
    name, _, sizes = text.partition(":")
    sizes, several, slices = sizes.partition(":")
    require(
        name in CHIPS,
        f"--topology {text}: {name!r} is not a chip that can be planned for; use one of "
        f"{', '.join(CHIPS)}, as in v5p:4x4x8 or h100:16x8",
    )
    chip = CHIPS[name]
    dims = chip.dims or 2
    what = f"{dims} sizes of its torus" if chip.is_tpu else "hosts and GPUs of a host"
    example = {2: "4x8", 3: "4x4x8"}[dims]
    require(
        re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})*", sizes) is not None
        and len(sizes.split("x")) == dims,
        f"--topology {text}: {name} needs {what}, for example {name}:{example}",
    )
    require(
        not several or re.fullmatch(r"[1-9]\d{0,3}", slices) is not None,
        f"--topology {text}: {slices!r} is not a number of slices; give one as in "
        f"{name}:{example}:2",
    )
    require(
        not several or (chip.is_tpu and chip.network is not None),
        f"--topology {text}: "
        + (
            f"the speed of the network between slices of {name} is not known; plan one slice, or "
            "v5e, v5p, v6e or tpu7x"
            if chip.is_tpu
            else f"slices are of TPUs; more hosts of GPUs are {name}:HOSTSxGPUS"
        ),
    )
    shape = tuple(int(size) for size in sizes.split("x"))
    fraction = 1.0 if chip.is_tpu else _gpu_fraction()
    return Topology(text, chip, shape, fraction, int(slices or 1))


def _gpu_fraction() -> float:
    """Returns what JAX takes of a GPU's memory: 0.75, or what the environment says instead.

    Source: docs.jax.dev, "GPU memory allocation".
    """
    names = (GPU_FRACTION, "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is the older name
    name = next((name for name in names if os.environ.get(name)), None)
    if name is None:
        return 0.75
    text = os.environ[name]
    try:
        fraction = float(text)
    except ValueError:
        fraction = math.nan
    require(
        0 < fraction <= 1,
        f"{name}={text} is the part of a GPU's memory that JAX takes, above 0 and at most 1; use "
        "0.9, or unset it for 0.75",
    )
    return fraction


# Compilers

_EXTRAS = {"libtpu": "plan-tpu", "jax_cuda12_plugin": "plan-gpu"}


def start_compiler(topology: Topology) -> None:
    """Makes this process compile for `topology`, whatever the machine; before JAX is imported.

    Raises:
        ConfigError: the compiler is not installed.
    """
    module = "libtpu" if topology.chip.is_tpu else "jax_cuda12_plugin"
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"--topology {topology.name} needs {module}, the compiler of its chips, which is not "
            f"installed; pip install 'moejax[{_EXTRAS[module]}]'"
        )
    os.environ |= {
        "JAX_PLATFORMS": "cpu",  # no device is used, and a chip that is here is left alone
        "TPU_SKIP_MDS_QUERY": "1",  # ask no cloud which TPU this is
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5p-8",  # any: the topology says which
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a lock guards chips, and none is used
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
    }
    if not topology.chip.is_tpu:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # it misses the driver that is not here
        # Kernels are chosen by trying them, for which a GPU would be needed.
        untried = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {untried}".strip()


def topology_devices(topology: Topology) -> list[Any]:
    """Returns the devices of a pod, to compile for; nothing can run on them.

    Raises:
        ConfigError: the compiler knows no such pod.
    """
    import jax
    from jax.experimental import topologies

    platform, options = "tpu", {}
    name = ":".join(topology.name.split(":")[:2])
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # both cores are one device, as JAX runs it
    if not topology.chip.is_tpu:
        hosts, gpus = topology.shape
        platform = "cuda"
        options = {"target_config": _target_config(topology), "topology": f"{hosts}x1x{gpus}"}
    try:
        return topologies.get_topology_desc(name, platform, **options).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        raise ConfigError(
            f"--topology {topology.name}: the compiler knows no such pod "
            f"({str(error).splitlines()[0][:200]}); sizes are those of a slice that can be rented, "
            "for example v5p:4x4x8, v5e:4x8"
        ) from error


def _target_config(topology: Topology) -> str:
    """Returns a GPU as XLA's `GpuTargetConfigProto`, in text."""
    chip, gpu = topology.chip, _GPUS[topology.name.partition(":")[0]]
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {gpu.capability} minor: 0 }}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.units}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {chip.memory}
  memory_bandwidth: {round(chip.bandwidth)}
  l2_cache_size: {gpu.cache}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.block}
  shared_memory_per_core: {gpu.shared}
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{chip.kinds[0]}"
"""
