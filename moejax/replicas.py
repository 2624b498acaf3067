"""Silent corruption: what several devices hold alike is compared, and a step with itself.

A device that computes wrong says nothing of it. Arrays that lie on several devices whole must be
the same there, bit for bit, for every device computed them from the same numbers; and a step that
is run again must give the same bits.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moejax.errors import require
from moejax.sharding import device_spec, path_name, replicated, vary_everywhere
from moejax.step import Step, StepMetrics
from moejax.watch_config import WatchConfig


class Mismatch(NamedTuple):
    """An array that is not the same where it has to be, and the devices that hold it wrong.

    Where no majority says who is right, the devices are all that hold it.
    """

    array: str
    devices: tuple[int, ...]


def digest(x: jax.Array) -> jax.Array:
    """Returns a uint32 of the bits of an array and of where they are.

    Each word is mixed by a bijection of its own and they are summed, so that one flipped bit always
    shows, and any other change but for 1 in 2**32.
    """
    bits = jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16 if x.dtype.itemsize == 2 else None
    words = x.astype(jnp.uint8) if bits is None else jax.lax.bitcast_convert_type(x, bits)
    words = words.reshape(-1).astype(jnp.uint32)
    place = jax.lax.iota(jnp.uint32, words.size)
    mixed = (words ^ (place * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0xC2B2AE35)
    return (mixed ^ (mixed >> 13)).sum(dtype=jnp.uint32)


def make_digests(mesh: Mesh, tree: Any) -> Callable[[Any], jax.Array]:
    """Returns `tree -> uint32 [leaves, devices]`, jitted: each device's digest of what it holds.

    Args:
        tree: arrays, or shapes, with their shardings on `mesh`.
    """
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, tree)

    def local(tree: Any) -> jax.Array:
        digests = [vary_everywhere(digest(leaf)) for leaf in jax.tree.leaves(tree)]
        return jnp.stack(digests)[:, None]

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=device_spec())
    return jax.jit(mapped, out_shardings=replicated(mesh))


def _groups(mesh: Mesh, leaf: Any) -> np.ndarray:
    """Returns int [devices]: the first device that holds the same part of a leaf, by position."""
    held = leaf.sharding.devices_indices_map(leaf.shape)
    first: dict[tuple, int] = {}
    parts = [tuple((s.start, s.stop) for s in held[device]) for device in mesh.devices.flat]
    return np.array([first.setdefault(part, i) for i, part in enumerate(parts)])


def _wrong(digest_n: np.ndarray, group_n: np.ndarray, ids: list[int]) -> tuple[int, ...]:
    """Returns the ids of the devices whose digest is not that of most of their group."""
    wrong = []
    for first in np.unique(group_n):
        members = np.flatnonzero(group_n == first)
        counts = Counter(digest_n[members].tolist()).most_common(2)
        if len(counts) > 1:
            right = counts[0][0] if counts[0][1] > counts[1][1] else None
            wrong += [ids[i] for i in members if digest_n[i] != right]
    return tuple(sorted(wrong))


class Comparisons:
    """Runs the steps of a training, and compares where `watch.*_every` says so.

    Args:
        config: what is due when.
        mesh: of the training.
        abstract: its state, as shapes with shardings.
        step: jitted and donating.
        again: the same step, jitted, not donating, which is run twice on one state; None without
            `recompute_every`.

    Raises:
        ConfigError: on one device nothing is held twice.
    """

    def __init__(
        self, config: WatchConfig, mesh: Mesh, abstract: Any, step: Step, again: Step | None
    ):
        require(
            config.replicas_every is None or mesh.size > 1,
            f"watch.replicas_every={config.replicas_every} and one device, on which nothing is "
            "held twice; leave it at None",
        )
        self._config, self._step, self._again = config, step, again
        self._ids = [device.id for device in mesh.devices.flat]
        if config.replicas_every is None and config.recompute_every is None:
            return
        leaves = jax.tree_util.tree_leaves_with_path(abstract)
        self._names = [path_name(path) for path, _ in leaves]
        self._group_ln = np.stack([_groups(mesh, leaf) for _, leaf in leaves])
        self._digests = make_digests(mesh, abstract)

    def step(
        self, number: int, state: Any, batch: Any, choices: Any = None
    ) -> tuple[Any, StepMetrics, dict[str, list[Mismatch]]]:
        """Runs step `number`; returns its state and metrics, and by comparison what differs."""
        found: dict[str, list[Mismatch]] = {}
        if self._again is not None and _is_due(self._config.recompute_every, number):
            before = np.asarray(self._digests(self._again(state, batch, choices)[0]))
            state, metrics = self._again(state, batch, choices)
            found["recomputed"] = self._differing(before, np.asarray(self._digests(state)))
        else:
            state, metrics = self._step(state, batch, choices)
        if _is_due(self._config.replicas_every, number):
            found["replicas"] = self.replicas(state)
        return state, metrics, {name: arrays for name, arrays in found.items() if arrays}

    def replicas(self, state: Any) -> list[Mismatch]:
        """Returns the arrays of a state whose copies differ."""
        digest_ln = np.asarray(self._digests(state))
        first_ln = np.take_along_axis(digest_ln, self._group_ln, axis=1)
        return [
            Mismatch(self._names[i], _wrong(digest_ln[i], self._group_ln[i], self._ids))
            for i in np.flatnonzero((digest_ln != first_ln).any(1))
        ]

    def _differing(self, a_ln: np.ndarray, b_ln: np.ndarray) -> list[Mismatch]:
        different_ln = a_ln != b_ln
        return [
            Mismatch(self._names[i], tuple(self._ids[n] for n in np.flatnonzero(different_ln[i])))
            for i in np.flatnonzero(different_ln.any(1))
        ]


def _is_due(every: int | None, number: int) -> bool:
    return every is not None and number % every == 0


def describe_mismatches(comparison: str, arrays: list[Mismatch]) -> str:
    """Returns one line: which arrays differ, on which devices, and what to do."""
    devices = sorted({device for mismatch in arrays for device in mismatch.devices})
    what = {
        "replicas": "copies of the same array differ over devices",
        "recomputed": "a step computed twice gives other bits",
    }[comparison]
    some = ", ".join(mismatch.array for mismatch in arrays[:5])
    more = f" and {len(arrays) - 5} more" if len(arrays) > 5 else ""
    return (
        f"{what}: {some}{more}, on devices {', '.join(map(str, devices))}; a device computes or "
        "keeps wrong: take it out and go on from the last checkpoint before"
    )
