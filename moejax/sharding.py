"""Where every array lives: one table from parameter name to mesh axes.

Tokens are split over data x fsdp x expert_fsdp x expert, so for everything but the experts the
expert axis is one more data axis, and `expert_fsdp` one more fsdp axis. Experts are split over
`expert_fsdp` and `expert`, every matrix over `fsdp` and `tensor` too.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import AXES, EXPERT_AXES, FSDP_AXES, TOKEN_AXES
from moejax.mesh import AnyMesh
from moejax.parameters import AXES_OF

BATCH_AXES = TOKEN_AXES
CONTEXT_AXIS = "context"
GATHERED = "gathered"  # name by which remat policies keep dense layers' gathered weights

# By the end of the parameter's path. A stacked layer dim in front is never split.
PARAMETER_SPECS = {
    "embedding": P("tensor", FSDP_AXES),  # [V, D]
    "unembedding": P(FSDP_AXES, "tensor"),  # [D, V]
    "attention/query": P(FSDP_AXES, "tensor", None),  # [D, H, K]
    "attention/key": P(FSDP_AXES, "tensor", None),  # [D, N, K]
    "attention/value": P(FSDP_AXES, "tensor", None),  # [D, N, K]
    "attention/output": P("tensor", None, FSDP_AXES),  # [H, K, D]
    "attention/query_bias": P("tensor", None),  # [H, K]
    "attention/key_bias": P("tensor", None),  # [N, K]
    "attention/value_bias": P("tensor", None),  # [N, K]
    "attention/output_bias": P(None),  # [D]
    "attention/sinks": P("tensor"),  # [H]
    "attention/query_down": P(FSDP_AXES, "tensor"),  # [D, Q]
    "attention/query_up": P(FSDP_AXES, "tensor", None),  # [Q, H, K + R]
    "attention/latent_down": P(FSDP_AXES, "tensor"),  # [D, C]
    "attention/key_up": P(FSDP_AXES, "tensor", None),  # [C, H, K]
    "attention/value_up": P(FSDP_AXES, "tensor", None),  # [C, H, V]
    "attention/key_rope": P(FSDP_AXES, "tensor"),  # [D, R]
    "ffn/gate": P(FSDP_AXES, "tensor"),  # [D, F]
    "ffn/up": P(FSDP_AXES, "tensor"),  # [D, F]
    "ffn/down": P("tensor", FSDP_AXES),  # [F, D]
    **{f"moe/{name}": P(*axes) for name, axes in AXES_OF.items()},
    "scale": P(None),  # of a norm: [D] or [K]
}

# Statistics of a matrix that an optimizer keeps without its columns or without its rows.
ROW_STATE, COLUMN_STATE = "of_rows", "of_columns"


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a pytree path as `runs/layer_0/moe/gate`."""
    return "/".join(str(getattr(part, "key", getattr(part, "name", part))) for part in path)


def _axes_in_table(name: str) -> tuple[Any, ...]:
    """Returns the table's axes of the suffix that `name` ends in, by whole parts; () if none."""
    for suffix, spec in PARAMETER_SPECS.items():
        if name == suffix or name.endswith("/" + suffix):
            return tuple(spec)
    return ()


def matrix_dims(name: str) -> tuple[int, int] | None:
    """Returns how many dims the rows and the columns of a matrix have; None if it is not a matrix.

    They are the last dims of the array. The dim that fsdp splits, D, is one side of the matrix and
    all others are the other side: a query [D, H, K] has one dim of rows and two of columns, a stack
    of experts [E, F, D] one of each.
    """
    axes = [axes for axes in _axes_in_table(name) if axes != EXPERT_AXES]
    if not gathered_axes(axes):
        return None
    others = len(axes) - 1
    return (1, others) if gathered_axes(axes[:1]) else (others, 1)


def stacked_dims(name: str) -> int:
    """Returns how many leading dims of a parameter count layers and experts."""
    layers = any(part.startswith("layer_") for part in name.split("/"))
    return layers + (_axes_in_table(name)[:1] == (EXPERT_AXES,))


def gathered_axes(spec: Iterable[str | tuple[str, ...] | None]) -> tuple[str, ...]:
    """Returns the axes over which a parameter of this spec is gathered before use: those of D."""
    entries = ((entry,) if isinstance(entry, str) else entry or () for entry in spec)
    return next((names for names in entries if "fsdp" in names), ())


def parameter_spec(name: str, ndim: int) -> P:
    """Returns the mesh axes of the array called `name`; what the table does not know is replicated.

    Optimizer state carries the names of the parameters that it belongs to, so the same rule places
    both; statistics of rows or columns have the axes of the dims that they keep.
    """
    axes, dims = _axes_in_table(name), matrix_dims(name)
    if dims and ROW_STATE in name.split("/"):
        axes = axes[: -dims[1]]
    elif dims and COLUMN_STATE in name.split("/"):
        axes = axes[: -sum(dims)] + axes[-dims[1] :]
    if not axes or ndim < len(axes):
        return P()
    return P(*(None,) * (ndim - len(axes)), *axes)


def tree_shardings(mesh: AnyMesh, tree: Any) -> Any:
    """Returns a `NamedSharding` for every leaf of `tree` (arrays or shapes), by its name."""

    def place(path, leaf):
        return NamedSharding(mesh, parameter_spec(path_name(path), leaf.ndim))

    return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of batch arrays [accumulation, B, T]."""
    return NamedSharding(mesh, P(None, BATCH_AXES, CONTEXT_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole: any process can read it."""
    return NamedSharding(mesh, P())


def token_spec(
    shape: tuple[int, ...], mesh: AnyMesh, *, heads: bool = False, whole: bool = False
) -> P:
    """Returns how an array [B, T, ...] of tokens is split, without axes of size 1.

    B over the batch axes, T over the context axis, and with `heads` axis 2 over the tensor axis. A
    B of 1, which all sequences share, and a T that does not divide, as in decoding, stay whole.

    Args:
        whole: leaves T whole.
    """
    context = mesh.shape[CONTEXT_AXIS]
    axes = [
        BATCH_AXES if shape[0] > 1 else None,
        None if whole or shape[1] % context else CONTEXT_AXIS,
    ]
    return split_spec(P(*axes, "tensor") if heads else P(*axes), mesh)


def constrain_tokens(x: jax.Array, mesh: AnyMesh, *, heads: bool = False) -> jax.Array:
    """Splits tokens [B, T, ...] as `token_spec` says."""
    spec = token_spec(x.shape, mesh, heads=heads)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def gathered(w: jax.Array, name: str, mesh: AnyMesh, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns a matrix of a dense layer whole over fsdp, in the compute dtype.

    One gather serves all products of a pass; the partitioner by itself makes one for each. The
    gradient is split again where it is summed.

    Args:
        name: the end of the parameter's path, `attention/query`.
    """
    spec = parameter_spec(name, w.ndim)
    if all(mesh.shape[axis] == 1 for axis in gathered_axes(spec)):
        return w.astype(dtype)
    return checkpoint_name(_whole_over_fsdp(w.astype(dtype), spec, mesh), GATHERED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _whole_over_fsdp(w, spec: P, mesh: AnyMesh):
    rest = P(*(None if entry == gathered_axes(spec) else entry for entry in spec))
    return jax.lax.with_sharding_constraint(w, NamedSharding(mesh, rest))


def _whole_forward(w, spec, mesh):
    return _whole_over_fsdp(w, spec, mesh), None


def _whole_backward(spec, mesh, _, grad):
    return (jax.lax.with_sharding_constraint(grad, NamedSharding(mesh, spec)),)


_whole_over_fsdp.defvjp(_whole_forward, _whole_backward)


def place_batch(mesh: Mesh, rows: Any, batch_size: int, accumulation: int) -> Any:
    """Makes a global batch [accumulation, B, T] of which each process loads only its own rows.

    Over the context axis a device keeps its part of them.

    Args:
        rows: `rows(start, stop)` gives the batch rows start..stop as a pytree of numpy arrays
            [stop - start, T].
        batch_size: rows of the whole step, over all microbatches.
        accumulation: number of microbatches; consecutive rows make one.
    """
    sharding = batch_sharding(mesh)
    micro = batch_size // accumulation
    template = rows(0, 1)
    shape = (accumulation, micro, jax.tree.leaves(template)[0].shape[1])
    index_map = sharding.addressable_devices_indices_map(shape)
    loaded: dict[tuple[int, int], Any] = {}
    shards = []
    for index in index_map.values():
        assert index is not None  # `sharding` gives every device a part
        start, stop, _ = index[1].indices(micro)
        if (start, stop) not in loaded:
            parts = [rows(a * micro + start, a * micro + stop) for a in range(accumulation)]
            loaded[start, stop] = jax.tree.map(lambda *p: np.stack(p), *parts)
        shards.append(jax.tree.map(lambda a, part=index[2]: a[:, :, part], loaded[start, stop]))

    def assemble(_, *per_device):
        arrays = [jax.device_put(a, d) for a, d in zip(per_device, index_map, strict=True)]
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

    return jax.tree.map(assemble, template, *shards)


def split_spec(spec: P, mesh: AnyMesh) -> P:
    """Returns `spec` without the mesh axes of size 1.

    An array that is split over an axis of one device would need a sum over that axis, and XLA:CPU
    copies every array that it sums.
    """

    def split(entry):
        names = (entry,) if isinstance(entry, str) else entry or ()
        names = tuple(name for name in names if mesh.shape[name] > 1)
        return names or None

    return P(*(split(entry) for entry in spec))


def varying_axes(array: jax.Array) -> tuple[str, ...]:
    """Inside `shard_map`, returns the axes over which an array varies, in the mesh's order."""
    varying = jax.typeof(array).manual_axis_type.varying
    return tuple(axis for axis in AXES if axis in varying)


def device_spec() -> P:
    """Returns the spec of an array [..., devices] of which every device holds its own column."""
    return P(None, AXES)


def vary_everywhere(array: jax.Array) -> jax.Array:
    """Inside `shard_map`, marks an array as one that may differ between all devices."""
    return _vary(array, frozenset(AXES))


def vary_like(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Inside `shard_map`, marks all arrays as varying over every axis over which one of them does.

    The transpose of that mark is the sum over those axes, so it stands where a gradient has to be
    summed.
    """
    axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))
    return tuple(_vary(a, axes) for a in arrays)


def _vary(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = axes - jax.typeof(array).manual_axis_type.varying
    return jax.lax.pcast(array, tuple(sorted(missing)), to="varying") if missing else array


def vary_tree(tree: Any, *like: jax.Array) -> Any:
    """Marks every array of a tree as varying over the axes that any of them or `like` varies over.

    A loop over rounds adds up gradients in a carry of one type.
    """
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, vary_like(*leaves, *like)[: len(leaves)])
