"""Starting JAX and making the one device mesh. No other module does either."""

import ctypes
import itertools
import os
import re
import resource
import sys
from pathlib import Path
from typing import TypeAlias

import jax
import numpy as np
from absl import flags
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from moejax.cluster import join_processes
from moejax.config import AXES, ConfigError, MeshConfig

AnyMesh: TypeAlias = Mesh | AbstractMesh  # an abstract one has no devices: for shapes and shardings
Device: TypeAlias = jax.Device  # pyright: ignore[reportInvalidTypeForm]  jax types it as a variable


def start_jax(cpu_devices: int | None = None, preemptible: bool = False) -> None:
    """Configures JAX for this process; call it once, before anything touches a device.

    Args:
        cpu_devices: number of virtual CPU devices of this process; None leaves JAX's choice.
        preemptible: whether the caller saves on SIGTERM (`preemption.py`).

    Raises:
        ConfigError: `cpu_devices` is asked for on an accelerator, or after the devices were made.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, which nobody has parsed
    if cpu_devices is not None:
        try:
            jax.config.update("jax_num_cpu_devices", cpu_devices)
        except RuntimeError as error:
            raise ConfigError(
                f"--cpu_devices {cpu_devices}: the devices of this process exist already "
                f"({error}); start a new process"
            ) from error
    if cpu_devices is not None or os.environ.get("JAX_PLATFORMS") == "cpu":
        _keep_freed_memory()
    join_processes(preemptible)
    if cpu_devices is not None and jax.default_backend() != "cpu":
        raise ConfigError(
            f"--cpu_devices {cpu_devices} was given, but JAX runs on {jax.default_backend()}; "
            "leave it out, or set JAX_PLATFORMS=cpu"
        )


def _keep_freed_memory() -> None:
    """Has glibc, where there is one, keep freed memory for the next allocation.

    XLA:CPU allocates a program's temporaries anew at every call. By default glibc gives memory of
    that size back each time, and the kernel has to clear every page of it again at every step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    arena_max, mmap_max, trim_threshold = -8, -4, -1  # as malloc.h numbers them
    for parameter, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, 2**31 - 1)):
        mallopt(parameter, value)


def make_mesh(config: MeshConfig, devices: list[Device] | None = None) -> Mesh:
    """Returns the mesh of AXES; axes of size 1 exist too.

    Devices along the last axes are neighbours: on a TPU's torus, or within a host of GPUs. With
    several TPU slices, only `data` spans the network; every other axis lies within a slice.

    Args:
        config: sizes; at most one None, which takes the devices that are left.
        devices: default: every device of every process.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices, or an axis other than
            `data` does not fit into a TPU slice.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.resolve(len(devices))
    shape = tuple(getattr(sizes, axis) for axis in AXES)
    groups = _by_slice(devices)
    if devices[0].platform != "tpu":  # slices are hosts, which any axis may span
        groups = [list(itertools.chain(*groups))]
    sizes.check_slices(len(groups))
    if len({len(group) for group in groups}) > 1:
        raise ConfigError(
            f"the {len(groups)} TPU slices have {', '.join(str(len(g)) for g in groups)} devices; "
            "a mesh needs slices of equal size"
        )
    inner = (shape[0] // len(groups), *shape[1:])
    order = np.concatenate([_in_order(group, inner) for group in groups])
    return Mesh(order, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _by_slice(devices: list[Device]) -> list[list[Device]]:
    """Returns the devices of each TPU slice, or of each host of GPUs, in their order.

    On GPUs, JAX calls those that share a host or a fabric of fast links a slice. So processes that
    a launcher assigned to hosts in turn come together here.
    """
    groups: dict[int, list[Device]] = {}
    if devices[0].platform == "gpu":  # XLA numbers them by their links, JAX lists them by process
        devices = sorted(devices, key=lambda device: device.id)
    for device in devices:
        groups.setdefault(getattr(device, "slice_index", 0), []).append(device)
    return [groups[index] for index in sorted(groups)]


def _in_order(devices: list[Device], shape: tuple[int, ...]) -> np.ndarray:
    """Returns the devices as an array of `shape`, neighbours on a TPU's torus next to each other.

    An axis takes whole dimensions of the torus if they multiply to its size. Otherwise dimensions
    are split (expert=8 on 4 x 4 x 4), and if that fails too, devices stay in their order. So do
    devices without a torus.
    """
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    for split in (False, True):
        try:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split)
        except NotImplementedError:  # says that no assignment of dimensions was found
            continue
    return np.asarray(devices).reshape(shape)


def mesh_config(mesh: Mesh) -> MeshConfig:
    """Returns the sizes of `mesh`, every one known."""
    return MeshConfig(**{axis: mesh.shape[axis] for axis in AXES})


def memory_bytes() -> int:
    """Returns the memory of all devices, from what one of them reports; of the machines on CPUs.

    Where nothing is reported, `sys.maxsize`.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * jax.process_count()
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] * jax.device_count() if "bytes_limit" in stats else sys.maxsize


def single_device_mesh(device: Device | None = None) -> Mesh:
    """Returns a mesh of one device, for tests, oracles and use of `MoE` alone."""
    return make_mesh(MeshConfig(data=1), [device or jax.local_devices()[0]])


def peak_memory_bytes() -> int:
    """Returns the most memory in use at once so far, of the fullest local device.

    On CPUs it is the memory of this process.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    if peaks:
        return max(peaks)
    try:  # the kernel's other count, of getrusage, begins with the process that started this one
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[0]) * 1024
    except (OSError, IndexError):  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
