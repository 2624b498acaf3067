"""Silent corruption: a flipped bit in one device's copy, and a step that computes otherwise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.errors import ConfigError
from moejax.replicas import Comparisons, Mismatch, describe_mismatches, digest, make_digests
from moejax.sharding import path_name
from moejax.watch_config import WatchConfig

FLIP = np.uint32(1 << 9)


def _flipped(array: jax.Array, device: int, index: int = 3) -> jax.Array:
    """The same array, but for one bit of the copy, or the part, on one device."""
    buffers = []
    for shard in array.addressable_shards:
        data = np.array(shard.data)
        if shard.device.id == device:
            data.reshape(-1).view(np.uint32)[index] ^= FLIP
        buffers.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, buffers)


@pytest.fixture(scope="module")
def mesh(mesh_of):
    """4 data x 2 fsdp: what fsdp splits lies on 4 devices each, all else on 8."""
    return mesh_of(4, 2, 1, 1)


@pytest.fixture(scope="module")
def tree(mesh):
    random = np.random.default_rng(0)

    def place(shape, spec, dtype=jnp.float32):
        array = jnp.asarray(random.normal(size=shape), dtype)
        return jax.device_put(array, NamedSharding(mesh, spec))

    return {
        "matrix": place((4, 6), P("fsdp", None)),
        "router": place((6, 4), P()),
        "norm": place((8,), P(), jnp.bfloat16),
        "step": jax.device_put(jnp.asarray(7, jnp.int32), NamedSharding(mesh, P())),
    }


def _comparisons(mesh, tree, again=None, **config) -> Comparisons:
    return Comparisons(WatchConfig(**config), mesh, tree, lambda s, *_: (s, None), again)  # type: ignore


def test_every_flipped_bit_changes_the_digest():
    """Each of 32 bits of each of 5 words; and words that change places."""
    words = np.arange(5, dtype=np.uint32) * 77
    plain = int(digest(jnp.asarray(words)))
    seen = {plain}
    for index in range(5):
        for bit in range(32):
            flipped = words.copy()
            flipped[index] ^= np.uint32(1 << bit)
            seen.add(int(digest(jnp.asarray(flipped))))
    assert len(seen) == 1 + 5 * 32
    assert int(digest(jnp.asarray(words[::-1].copy()))) != plain
    assert int(digest(jnp.asarray([0.0]))) != int(digest(jnp.asarray([-0.0])))
    assert int(digest(jnp.asarray([True]))) != int(digest(jnp.asarray([False])))


def test_each_device_digests_what_it_holds(mesh, tree):
    found = np.asarray(make_digests(mesh, tree)(tree))
    assert found.shape == (4, 8)
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    for name, digest_n in zip(names, found, strict=True):
        held = {shard.device.id: shard.data for shard in tree[name].addressable_shards}
        expected = [int(digest(jnp.asarray(np.asarray(held[d.id])))) for d in mesh.devices.flat]
        np.testing.assert_array_equal(digest_n, expected)
        assert len(set(digest_n)) == (2 if name == "matrix" else 1)


def test_copies_that_are_the_same_are_no_mismatch(mesh, tree):
    assert _comparisons(mesh, tree, replicas_every=1).replicas(tree) == []


@pytest.mark.parametrize("name", ["router", "matrix"])
def test_the_device_with_a_flipped_bit_is_named(mesh, tree, name):
    broken = tree | {name: _flipped(tree[name], device=5)}
    assert _comparisons(mesh, tree, replicas_every=1).replicas(broken) == [Mismatch(name, (5,))]


def test_without_the_comparison_a_flipped_bit_is_not_noticed(mesh, tree):
    """The harm: JAX calls it replicated, and reads the first device's copy."""
    broken = _flipped(tree["router"], device=5)
    assert broken.is_fully_replicated
    np.testing.assert_array_equal(np.asarray(broken), np.asarray(tree["router"]))
    held = {shard.device.id: np.asarray(shard.data) for shard in broken.addressable_shards}
    assert (held[5] != held[0]).any()
    later = jax.jit(lambda x: x * 2, out_shardings=broken.sharding)(broken)  # and so it goes on
    held = {shard.device.id: np.asarray(shard.data) for shard in later.addressable_shards}
    assert (held[5] != held[0]).any()


def test_two_copies_that_differ_are_both_named(mesh_of):
    """Nobody can say which of two is right."""
    mesh = mesh_of(2, 1, 1, 1)
    tree = {"router": jax.device_put(jnp.ones(8), NamedSharding(mesh, P()))}
    broken = {"router": _flipped(tree["router"], device=0)}
    found = _comparisons(mesh, tree, replicas_every=1).replicas(broken)
    assert found == [Mismatch("router", (0, 1))]
    message = describe_mismatches("replicas", found)
    assert message.startswith("copies of the same array differ over devices: router, on devices 0,")


def test_one_device_holds_nothing_twice(mesh_of):
    mesh = mesh_of(1, 1, 1, 1)
    with pytest.raises(ConfigError, match=r"replicas_every=5 and one device, on which nothing"):
        _comparisons(mesh, {}, replicas_every=5)


def test_comparisons_come_when_they_are_due(mesh, tree):
    broken = tree | {"router": _flipped(tree["router"], device=2)}
    comparisons = _comparisons(mesh, tree, replicas_every=3)
    found = [comparisons.step(number, broken, None)[2] for number in range(1, 7)]
    mismatch = {"replicas": [Mismatch("router", (2,))]}
    assert found == [{}, {}, mismatch, {}, {}, mismatch]


@pytest.mark.parametrize("device", [None, 6])
def test_a_step_that_computes_otherwise_the_second_time(mesh, tree, device):
    calls = []

    def again(state, batch, choices):
        calls.append(batch)
        after = state | {"matrix": state["matrix"] + 1}
        if device is not None and len(calls) == 2:
            after |= {"matrix": _flipped(after["matrix"], device)}
        return after, "metrics"

    comparisons = _comparisons(mesh, tree, again, recompute_every=2)
    state, _, found = comparisons.step(1, tree, "a batch")
    assert (calls, found) == ([], {})
    state, metrics, found = comparisons.step(2, tree, "a batch")
    assert calls == ["a batch", "a batch"]
    assert metrics == "metrics"
    assert state["matrix"].shape == (4, 6)
    assert found == ({} if device is None else {"recomputed": [Mismatch("matrix", (6,))]})


def test_many_arrays_are_named_in_part():
    found = [Mismatch(f"layer_{i}", (i % 2,)) for i in range(7)]
    message = describe_mismatches("recomputed", found)
    assert "a step computed twice gives other bits: layer_0, " in message
    assert "layer_4 and 2 more, on devices 0, 1; a device computes or keeps wrong" in message


def test_both_comparisons_of_a_real_step(mesh_of, params_of):
    """On a sound machine nothing differs, and a recomputed step is the step, bit for bit."""
    from test_watch import CONFIG, _place, _rows

    from moejax.optim import make_optimizer
    from moejax.state import abstract_state
    from moejax.step import make_train_step

    mesh = mesh_of(1, 2, 2, 1)
    abstract = abstract_state(CONFIG, mesh, make_optimizer(CONFIG.optim, CONFIG.train.steps))
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), abstract)
    host = dataclasses.replace(zeros, params=params_of(CONFIG, mesh))

    def start():
        return jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), host, abstract)

    step, again = (make_train_step(CONFIG, mesh, donate=donate)[0] for donate in (True, False))
    config = WatchConfig(replicas_every=1, recompute_every=1)
    comparisons = Comparisons(config, mesh, abstract, step, again)
    batch = _place(mesh, _rows(0))
    twice, _, found = comparisons.step(1, start(), batch)
    assert found == {}
    once, _ = step(start(), batch)
    for a, b in zip(jax.tree.leaves(twice), jax.tree.leaves(once), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
