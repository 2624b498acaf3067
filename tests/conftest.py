"""Every test runs on 8 virtual CPU devices, in JAX's strict modes.

What is set in the environment is inherited by the processes that tests start; what is set in
`jax.config` is not, so that a command line in a test runs as a user's does.
"""
# ruff: noqa: E402  the environment comes before JAX

import functools
import os
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache" / "jax"
# Tests compile much and compute little: a third less compiling, without LLVM's optimizations.
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {COMPILE_FAST}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import numpy as np
import optax
import pytest
from absl import flags

from moejax.config import MeshConfig
from moejax.mesh import make_mesh
from moejax.sharding import path_name
from moejax.state import split_model

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain reads absl flags


def _exempt(function):
    """Runs what is not ours without strict promotion; Optax and JAX mix dtypes inside these."""

    @functools.wraps(function)
    def exempt(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return exempt


def _exempt_result(factory):
    @functools.wraps(factory)
    def make(*args, **kwargs):
        made = factory(*args, **kwargs)
        if callable(made):  # a schedule
            return _exempt(made)
        return made._replace(update=_exempt(made.update))

    return make


for name in (
    *("adamw", "scale_by_adam", "scale_by_lion"),
    *("cosine_decay_schedule", "linear_schedule", "join_schedules"),
):
    setattr(optax, name, _exempt_result(getattr(optax, name)))
jax.nn.dot_product_attention = _exempt(jax.nn.dot_product_attention)


@functools.cache
def _mesh_of(data: int, fsdp: int, expert: int, tensor: int, **others) -> jax.sharding.Mesh:
    config = MeshConfig(data=data, fsdp=fsdp, expert=expert, tensor=tensor, **others)
    return make_mesh(config, jax.devices()[: config.num_devices])


@pytest.fixture(scope="session")
def mesh_of():
    """Returns `(data, fsdp, expert, tensor, **others) -> mesh` on the first devices."""
    return _mesh_of


@pytest.fixture(scope="session")
def mesh(mesh_of):
    """A mesh of one device."""
    return mesh_of(1, 1, 1, 1)


@functools.cache
def _params_of(config, mesh):
    shapes = jax.eval_shape(lambda: split_model(config, mesh, jax.random.key(0))[1])
    random = np.random.default_rng(0)

    def draw(path, leaf):
        if path_name(path).endswith("scale"):
            return np.ones(leaf.shape, leaf.dtype)
        deviation = config.model.d_model**-0.5
        return random.normal(scale=deviation, size=leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="session")
def params_of():
    """Returns `(config, mesh) -> parameters` drawn by NumPy: `init` takes long to compile."""
    return _params_of
