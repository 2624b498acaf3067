"""The optimizers: clipping by global norm, a direction, decay of matrices, warmup and a schedule.

Parameters are stacked over layers and experts. Whatever looks at more than one number of a
parameter at once (Muon, Adafactor) looks at one layer's and one expert's.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moejax import parameters
from moejax.config import OptimConfig
from moejax.sharding import COLUMN_STATE, ROW_STATE, matrix_dims, path_name, stacked_dims


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Returns step -> rate: linear warmup, then the schedule to `final_fraction` at `steps`."""
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    rest = max(1, steps - config.warmup_steps)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, end, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction),
    }[config.schedule]()
    if config.warmup_steps == 0:
        return after
    # the first step already moves: its rate is peak / warmup_steps, not 0
    first = peak / config.warmup_steps
    warmup = optax.linear_schedule(first, peak, max(1, config.warmup_steps - 1))
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def decays(params: Any) -> Any:
    """Returns a tree of bools: True for matrices of networks, False for norms and routers."""

    def is_matrix(path, _):
        name = path_name(path)
        owner, _, last = name.rpartition("/")
        if owner.endswith("moe"):
            return parameters.decays(last)
        return last not in parameters.VECTORS

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Returns clipping by global norm, the direction of `config.name`, decay and the rate.

    All is computed in float32; moments are kept in `config.state_dtype`.
    """
    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    optimizer = optax.chain(
        clip,
        optax.chain(  # nested as `optax.adamw` is: its state has the paths of older checkpoints
            _DIRECTIONS[config.name](config),
            optax.add_decayed_weights(config.weight_decay, decays),
            optax.scale_by_learning_rate(learning_rate(config, steps)),
        ),
    )
    return _in_float32(optimizer, config.state_dtype)


def _in_float32(
    optimizer: optax.GradientTransformation, state_dtype: str
) -> optax.GradientTransformation:
    """Computes in float32 whatever the parameters' dtype is, and keeps moments in `state_dtype`."""

    def in_float32(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def moments(state: Any, dtype: jax.typing.DTypeLike) -> Any:
        def cast(path, leaf):
            is_moment = not {"mu", "nu"}.isdisjoint(path_name(path).split("/"))
            return leaf.astype(dtype) if is_moment else leaf

        return jax.tree_util.tree_map_with_path(cast, state)

    def init(params):
        return moments(optimizer.init(in_float32(params)), state_dtype)

    def update(updates, state, params=None):
        state = moments(state, jnp.float32)
        found, state = optimizer.update(in_float32(updates), state, in_float32(params))
        return optax.tree.cast_like(found, updates), moments(state, state_dtype)

    return optax.GradientTransformation(init, update)


# The directions


def _adam(config: OptimConfig) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019), without the decay."""
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)


def _lion(config: OptimConfig) -> optax.GradientTransformation:
    """Lion (Chen et al. 2023, arXiv:2302.06675); its rate is 3 to 10 times smaller than AdamW's."""
    return optax.scale_by_lion(b1=config.b1, b2=config.b2)


def _muon(config: OptimConfig) -> optax.GradientTransformation:
    """Muon for the matrices between layers, AdamW for embeddings and all that is no matrix."""

    def is_hidden(name: str) -> bool:
        return matrix_dims(name) is not None and not name.endswith("embedding")

    return _by_name(is_hidden, _scale_by_muon(config.momentum, config.eps), _adam(config))


def _adafactor(_: OptimConfig) -> optax.GradientTransformation:
    """Adafactor (Shazeer and Stern 2018, arXiv:1804.04235) without momentum, algorithms 4 to 6.

    The rate is relative to the RMS of a parameter: a step's RMS is at most `learning_rate` times
    that of the layer's or expert's own parameter.
    """

    def is_matrix(name: str) -> bool:
        return matrix_dims(name) is not None

    return optax.chain(
        _by_name(is_matrix, _scale_by_factors(), _scale_by_rms()), _scale_to_parameters()
    )


_DIRECTIONS: dict[str, Callable[[OptimConfig], optax.GradientTransformation]] = {
    "adamw": _adam,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
}


def _by_name(
    holds: Callable[[str], bool],
    yes: optax.GradientTransformation,
    no: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Returns `yes` for the parameters whose name `holds`, `no` for the others."""

    def labels(params):
        def label(path, _):
            return "matrices" if holds(path_name(path)) else "others"

        return jax.tree_util.tree_map_with_path(label, params)

    return optax.partition({"matrices": yes, "others": no}, labels)


def _dims(name: str, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the dims of a matrix's rows and of its columns."""
    found = matrix_dims(name)
    assert found is not None
    rows, columns = found
    return tuple(range(ndim - rows - columns, ndim - columns)), tuple(range(ndim - columns, ndim))


# Muon


class MuonState(NamedTuple):
    """Steps so far, and the momentum of each matrix."""

    count: jax.Array
    mu: Any


def _scale_by_muon(momentum: float, eps: float) -> optax.GradientTransformation:
    """Orthogonalized Nesterov momentum (Jordan 2024), with the RMS of an AdamW step.

    Scaled by 0.2 * sqrt(max(rows, columns)) (Liu et al. 2025, arXiv:2502.16982), so that AdamW's
    rate and decay serve. For one matrix it is `optax.contrib.scale_by_muon`; that reshapes all
    stacked dims into one, and here they stay as they are split over devices.
    """

    def init(params):
        return MuonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))

    def update(updates, state, params=None):
        del params
        step = (state.count + 1).astype(jnp.float32)
        mu = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state.mu, updates)

        def direction(path, m, g):
            ahead = momentum * m / (1 - momentum ** (step + 1))
            ahead += (1 - momentum) * g / (1 - momentum**step)
            rows, columns = _dims(path_name(path), g.ndim)
            r, c = (math.prod(g.shape[dim] for dim in dims) for dims in (rows, columns))
            found = orthogonalize(ahead.reshape(*g.shape[: rows[0]], r, c), eps)
            return 0.2 * max(r, c) ** 0.5 * found.reshape(g.shape)

        found = jax.tree_util.tree_map_with_path(direction, mu, updates)
        return found, MuonState(state.count + 1, mu)

    return optax.GradientTransformation(init, update)


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(x: jax.Array, eps: float) -> jax.Array:
    """Returns U V^T, near enough, of each matrix [..., R, C] = U S V^T, by 5 Newton-Schulz steps.

    Singular values come out between 0.7 and 1.2 (Jordan 2024, github.com/KellerJordan/Muon); those
    below a thousandth of the matrix's norm smaller. Leading dims stay as they are split.
    """
    if x.shape[-2] > x.shape[-1]:  # the products are of the smaller side
        return orthogonalize(x.swapaxes(-1, -2), eps).swapaxes(-1, -2)
    a, b, c = NEWTON_SCHULZ
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)) + eps)
    for _ in range(5):
        square = x @ x.swapaxes(-1, -2)
        x = a * x + (b * square + c * (square @ square)) @ x
    return x


# Adafactor


class FactoredState(NamedTuple):
    """Steps so far, and running means of squared gradients over columns and over rows."""

    count: jax.Array
    of_rows: Any
    of_columns: Any


class RmsState(NamedTuple):
    """Steps so far, and running means of squared gradients."""

    count: jax.Array
    nu: Any


assert FactoredState._fields[1:] == (ROW_STATE, COLUMN_STATE)  # names by which they are placed
_TINY = 1e-30


def _keep(count: jax.Array) -> jax.Array:
    """Returns what a running mean keeps of itself in step `count`: 0 in the first."""
    return 1 - (count + 1).astype(jnp.float32) ** -0.8


def _scale_by_factors() -> optax.GradientTransformation:
    """Divides by the root of the second moment, which is a product of a row's and a column's."""

    def without(params, which: int):
        def mean(path, leaf):
            return leaf.mean(_dims(path_name(path), leaf.ndim)[which])

        return jax.tree_util.tree_map_with_path(mean, params)

    def init(params):
        zeros = optax.tree.zeros_like(params)
        return FactoredState(jnp.zeros((), jnp.int32), without(zeros, 1), without(zeros, 0))

    def update(updates, state, params=None):
        del params
        keep = _keep(state.count)
        square = jax.tree.map(lambda g: jnp.square(g) + _TINY, updates)
        of_rows, of_columns = (
            jax.tree.map(
                lambda old, new: keep * old + (1 - keep) * new, old, without(square, which)
            )
            for old, which in ((state.of_rows, 1), (state.of_columns, 0))
        )

        def direction(path, g, row, column):
            rows, columns = _dims(path_name(path), g.ndim)
            row = row / row.mean(rows, keepdims=True)
            row, column = jnp.expand_dims(row, columns), jnp.expand_dims(column, rows)
            return g * jax.lax.rsqrt(row) * jax.lax.rsqrt(column)

        found = jax.tree_util.tree_map_with_path(direction, updates, of_rows, of_columns)
        return found, FactoredState(state.count + 1, of_rows, of_columns)

    return optax.GradientTransformation(init, update)


def _scale_by_rms() -> optax.GradientTransformation:
    """Divides by the root of the second moment of each number."""

    def init(params):
        return RmsState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))

    def update(updates, state, params=None):
        del params
        keep = _keep(state.count)
        nu = jax.tree.map(
            lambda v, g: keep * v + (1 - keep) * (jnp.square(g) + _TINY), state.nu, updates
        )
        found = jax.tree.map(lambda g, v: g * jax.lax.rsqrt(v), updates, nu)
        return found, RmsState(state.count + 1, nu)

    return optax.GradientTransformation(init, update)


def _scale_to_parameters() -> optax.GradientTransformation:
    """Clips the RMS of a step to 1 and multiplies by that of the parameter, at least 0.001.

    The RMS is of one layer's and one expert's part of a stack.
    """

    def init(params):
        del params
        return optax.EmptyState()

    def update(updates, state, params=None):
        def scale(path, u, p):
            dims = tuple(range(stacked_dims(path_name(path)), u.ndim))
            rms_u, rms_p = (jnp.sqrt(jnp.square(x).mean(dims, keepdims=True)) for x in (u, p))
            return u / jnp.maximum(1, rms_u) * jnp.maximum(1e-3, rms_p)

        return jax.tree_util.tree_map_with_path(scale, updates, params), state

    return optax.GradientTransformation(init, update)
