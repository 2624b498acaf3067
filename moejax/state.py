"""The training state: plain pytrees, born sharded."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from moejax.config import Config
from moejax.errors import require
from moejax.flops import total_parameters
from moejax.mesh import AnyMesh, memory_bytes
from moejax.model import Decoder
from moejax.router_state import initial_router_state
from moejax.sharding import tree_shardings
from moejax.watch import WatchState, initial_watch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step reads and writes, and all that a checkpoint holds of a training.

    Attributes:
        step: int32; finished steps.
        params: nested dict of arrays.
        opt_state: of Optax.
        router_state: of `router_state.initial_router_state`; no optimizer touches it.
        rng: uint32 [2]; key data of the run's seed. Routers that draw fold the step into it.
        watch: of `watch.initial_watch`; the recent steps that a step is compared with.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    router_state: dict[str, jax.Array]
    rng: jax.Array
    watch: WatchState = dataclasses.field(default_factory=initial_watch)


def split_model(config: Config, mesh: AnyMesh, key: jax.Array) -> tuple[nnx.GraphDef, Any]:
    """Returns the model's structure and its freshly drawn parameters as a nested dict."""
    graphdef, params = nnx.split(Decoder(config, mesh, rngs=nnx.Rngs(params=key)))
    return graphdef, nnx.to_pure_dict(params)


def model_graph(config: Config, mesh: Mesh) -> nnx.GraphDef:
    """Returns the model's structure, making no array; merged with parameters it is the model."""
    graphs = []

    def trace(key):
        graph, params = split_model(config, mesh, key)
        graphs.append(graph)
        return params

    jax.eval_shape(trace, jax.random.key(0))
    return graphs[0]


def _initial_state(
    config: Config,
    mesh: AnyMesh,
    optimizer: optax.GradientTransformation,
    token_counts: np.ndarray | None = None,
) -> TrainState:
    key = jax.random.key(config.seed)
    params_key, rng = jax.random.split(key)
    _, params = split_model(config, mesh, params_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        router_state=initial_router_state(
            config.moe, config.num_moe_layers, config.model.vocab_size, token_counts
        ),
        rng=jax.random.key_data(rng),
        watch=initial_watch(),
    )


def require_room(config: Config) -> None:
    """Checks that the parameters alone fit into the memory of all devices together.

    A program that does not fit would abort this process, or others on the machine. Passing does
    not promise that a training fits: `moejax plan` tells that.

    Raises:
        ConfigError: they do not.
    """
    count, there = total_parameters(config), memory_bytes()
    needed = count * jnp.dtype(config.model.param_dtype).itemsize
    require(
        needed <= there,
        f"{count:,} parameters take {needed / 2**30:,.0f} GiB, but all devices together have "
        f"{there / 2**30:,.0f}; use a smaller model or more devices (moejax plan says how many)",
    )


def abstract_state(
    config: Config, mesh: AnyMesh, optimizer: optax.GradientTransformation
) -> TrainState:
    """Returns the state's shapes, each with its sharding on `mesh`."""
    shapes = jax.eval_shape(lambda: _initial_state(config, mesh, optimizer))
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        tree_shardings(mesh, shapes),
    )


def initial_state(
    config: Config,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    token_counts: np.ndarray | None = None,
) -> TrainState:
    """Returns the state before the first step: the same values on every mesh.

    Args:
        token_counts: int [V]; how often each token occurs in the text, for router `hash`, whose
            table balances them; None: all equally often.
    """
    shardings = jax.tree.map(lambda s: s.sharding, abstract_state(config, mesh, optimizer))
    make = jax.jit(
        lambda: _initial_state(config, mesh, optimizer, token_counts), out_shardings=shardings
    )
    return make()
