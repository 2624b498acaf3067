"""The order of devices on a TPU's torus; `tests/test_sharding.py` has what is laid on a mesh."""

import itertools
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from jax.experimental import mesh_utils

from moejax.config import ConfigError, MeshConfig
from moejax.mesh import _in_order, make_mesh


def torus(*sizes: int, slice_index: int = 0) -> list:
    """Returns stand-ins for the devices of a v5p slice, one a chip."""
    places = itertools.product(*(range(size) for size in reversed(sizes)))
    return [
        SimpleNamespace(
            platform="tpu",
            device_kind="TPU v5p",
            id=number,
            coords=place[::-1],
            core_on_chip=0,
            slice_index=slice_index,
        )
        for number, place in enumerate(places)
    ]


def spans(order, axis: int) -> list[int]:
    """Returns how many places of each dimension of the torus a group along `axis` takes."""
    moved = order.swapaxes(0, axis)
    places = [device.coords for device in moved.reshape(moved.shape[0], -1)[:, 0]]
    return [len(set(dim)) for dim in zip(*places, strict=True)]


def test_an_axis_gets_a_whole_dimension_of_the_torus():
    order = _in_order(torus(4, 4, 4), (1, 16, 4, 1))
    assert sorted(spans(order, 1)) == [1, 4, 4]
    assert sorted(spans(order, 2)) == [1, 1, 4]


@pytest.mark.parametrize("shape", [(1, 8, 8, 1), (2, 1, 32, 1), (2, 4, 4, 2)])
def test_dimensions_are_split_where_no_whole_one_fits(shape):
    """No dimension of 4 x 4 x 4 is 8 long: by whole ones alone JAX finds no order."""
    order = _in_order(torus(4, 4, 4), shape)
    assert order.shape == shape
    assert sorted(device.id for device in order.flat) == list(range(64))
    for axis, size in enumerate(shape):  # neighbours: a block of the torus, not a scatter
        a, b, c = spans(order, axis)
        assert a * b * c == size


def test_sizes_that_cannot_be_laid_on_the_torus_keep_the_order():
    """5 x 7 of 35 chips in a row: nothing splits 35 into whole dimensions of 35 and 1."""
    order = _in_order(torus(35, 1, 1), (1, 5, 7, 1))
    assert sorted(device.id for device in order.flat) == list(range(35))


def _slices(*sizes: int, slices: int) -> list:
    """Returns the devices of several slices, dealt out in turn as no program should rely on."""
    every = [torus(*sizes, slice_index=index) for index in range(slices)]
    return [device for devices in zip(*every, strict=True) for device in devices]


def _order(sizes: MeshConfig, devices: list) -> np.ndarray:
    """Returns the devices of `make_mesh` before they are a mesh, which takes real ones only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moejax.mesh.Mesh", lambda order, *_, **__: order)
        return cast(np.ndarray, make_mesh(sizes, devices))


@pytest.mark.parametrize(
    ("sizes", "slices"),
    [
        (MeshConfig(data=2, expert=8), 2),
        (MeshConfig(data=4, fsdp=2, expert=2, tensor=1), 2),
        (MeshConfig(data=2, fsdp=2, expert_fsdp=2, tensor=2), 2),
        (MeshConfig(data=12, expert=2), 3),
    ],
)
def test_each_slice_has_whole_groups_of_every_axis_but_data(sizes, slices):
    order = _order(sizes, _slices(2, 2, 2, slices=slices))
    index = np.vectorize(lambda device: device.slice_index)(order)
    for axis in range(1, order.ndim):
        assert (index == index.take([0], axis)).all(), axis
    along = index.reshape(order.shape[0], -1)[:, 0].tolist()
    assert along == sorted(along)  # the groups of data within a slice are neighbours too
    assert len(set(along)) == slices
    assert len({(device.slice_index, device.coords) for device in order.flat}) == 8 * slices


def test_slices_lie_as_in_the_mesh_that_jax_makes():
    devices = _slices(4, 4, 4, slices=2)
    ours = _order(MeshConfig(data=4, fsdp=8, expert=4), devices)
    inner = (2, 8, 1, 4, 1, 1)
    theirs = mesh_utils.create_hybrid_device_mesh(
        inner, (2, 1, 1, 1, 1, 1), devices, allow_split_physical_axes=True
    )
    assert (ours == theirs).all()


def test_only_data_spans_slices():
    message = (
        r"mesh.data=1 is not a multiple of the 2 TPU slices: .* and expert 16 has to fit "
        r"into the 8 devices of one; use mesh.data=2 or a multiple"
    )
    with pytest.raises(ConfigError, match=message):
        make_mesh(MeshConfig(data=1, expert=16), _slices(2, 2, 2, slices=2))
    uneven = torus(2, 2, 1) + torus(2, 1, 1, slice_index=1)
    with pytest.raises(ConfigError, match=r"the 2 TPU slices have 4, 2 devices; a mesh needs"):
        make_mesh(MeshConfig(data=2, expert=3), uneven)


def test_gpus_of_a_host_are_neighbours_whatever_the_order_of_processes():
    """Processes dealt out to two hosts in turn; an axis may span hosts, the last ones do last."""
    gpus = [
        SimpleNamespace(
            platform="gpu", device_kind="NVIDIA H100", id=i, process_index=i, slice_index=i % 2
        )
        for i in range(16)
    ]
    order = _order(MeshConfig(data=1, fsdp=4, expert=4), gpus)
    hosts = np.vectorize(lambda device: device.slice_index)(order)[0, :, 0, :, 0, 0]
    assert hosts.tolist() == [[0] * 4] * 2 + [[1] * 4] * 2
    plain = [SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", id=i) for i in range(4)]
    assert [device.id for device in _order(MeshConfig(data=2, expert=2), plain).flat] == [*range(4)]
