"""Starting JAX and making the one device mesh. No other module does either."""

import ctypes
import os
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
            f"--cpu_devices {cpu_devices} was given and JAX runs on {jax.default_backend()}; "
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

    Args:
        config: sizes; at most one None, which takes the devices that are left.
        devices: default: every device of every process.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices, or these are several TPU
            slices, between which there is no torus.
    """
    devices = jax.devices() if devices is None else devices
    slices = {getattr(device, "slice_index", None) for device in devices}
    if devices[0].platform == "tpu" and len(slices) > 1:
        raise ConfigError(
            f"the devices are {len(slices)} TPU slices, and the mesh lies on one torus; start the "
            "processes of one slice only"
        )
    sizes = config.resolve(len(devices))
    shape = tuple(getattr(sizes, axis) for axis in AXES)
    return Mesh(_in_order(devices, shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _in_order(devices: list[Device], shape: tuple[int, ...]) -> np.ndarray:
    """Returns the devices as an array of `shape`, neighbours on a TPU's torus next to each other.

    An axis gets whole dimensions of the torus where they multiply to its size. Else dimensions are
    split (expert=8 on 4 x 4 x 4), and where that finds no way either, devices stay in their order.
    """
    for split in (False, True):
        try:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split)
        except NotImplementedError:  # says that no assignment of dimensions was found
            continue
    return np.asarray(devices).reshape(shape)


def mesh_config(mesh: Mesh) -> MeshConfig:
    """Returns the sizes of `mesh`, every one known."""
    return MeshConfig(**{axis: mesh.shape[axis] for axis in AXES})


def single_device_mesh(device: Device | None = None) -> Mesh:
    """Returns a mesh of one device, for tests, oracles and use of `MoE` alone."""
    return make_mesh(MeshConfig(data=1), [device or jax.local_devices()[0]])
