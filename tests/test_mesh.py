"""The order of devices on a TPU's torus; `tests/test_sharding.py` has what is laid on a mesh."""

import itertools
from types import SimpleNamespace

import pytest

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


def test_several_slices_are_refused():
    devices = torus(2, 2, 1) + torus(2, 2, 1, slice_index=1)
    with pytest.raises(ConfigError, match="2 TPU slices"):
        make_mesh(MeshConfig(data=8), devices)
