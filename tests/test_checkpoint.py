"""Checkpoints: retention, what is restored, and that half a checkpoint is none."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.checkpoint import Checkpoints, require_meta
from moejax.config import EXPERT_AXES, CheckpointConfig, ConfigError, MeshConfig
from moejax.mesh import make_mesh
from moejax.sharding import tree_shardings
from moejax.state import TrainState
from moejax.workdir import checkpoint_steps


def make_state(step: int, mesh) -> TrainState:
    """A state in the shape of a real one: an expert stack, its moment, a bias, key data."""
    gate = jnp.arange(8 * 4 * 6, dtype=jnp.float32).reshape(1, 8, 4, 6) + step
    params = {"runs": {"layer_0": {"moe": {"gate": gate}}}}
    state = TrainState(
        step=jnp.asarray(step, jnp.int32),
        params=params,
        opt_state={"mu": jax.tree.map(lambda p: -p, params)},
        router_state={"bias": jnp.full((1, 8), step, jnp.float32)},
        rng=jnp.asarray([1, step], jnp.uint32),
    )
    return jax.device_put(state, tree_shardings(mesh, state))


def abstract(state: TrainState, mesh) -> TrainState:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        tree_shardings(mesh, state),
    )


@pytest.fixture(scope="module")
def wide():
    return make_mesh(MeshConfig(data=1, fsdp=2, expert=4), jax.devices()[:8])


@pytest.mark.parametrize(
    "sizes", [{"expert": 2}, {"expert_fsdp": 2}, {"expert_fsdp": 2, "expert": 2}]
)
def test_restored_bit_for_bit_on_another_mesh(tmp_path, wide, sizes):
    state = make_state(7, wide)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(state, {"counters": {"tokens_seen": 5}}, 1.5)
    sizes = MeshConfig(data=1, **sizes)
    narrow = make_mesh(sizes, jax.devices()[: sizes.num_devices])
    with Checkpoints(tmp_path, CheckpointConfig(), read_only=True) as checkpoints:
        resumed = checkpoints.resume(abstract(state, narrow))
        step, params, router_state, meta = checkpoints.load_model(abstract(state, narrow), 7)
    assert resumed is not None
    assert resumed.step == step == 7
    assert resumed.meta == meta == {"counters": {"tokens_seen": 5}}
    restored = resumed.state
    for field in dataclasses.fields(TrainState):
        jax.tree.map(
            np.testing.assert_array_equal,
            getattr(restored, field.name),
            getattr(state, field.name),
        )
    gate = params["runs"]["layer_0"]["moe"]["gate"]
    assert gate.sharding == NamedSharding(narrow, P(None, EXPERT_AXES, "fsdp", "tensor"))
    assert gate.addressable_shards[0].data.shape == (1, 8 // sizes.expert_degree, 4, 6)
    np.testing.assert_array_equal(router_state["bias"], np.full((1, 8), 7))


def test_a_save_asks_no_preemption_service(tmp_path, wide, monkeypatch):
    """Its count is of the loop's questions; one more, with another number, would lose a signal."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(make_state(7, wide), {}, None)
    assert checkpoint_steps(tmp_path) == [7]
    assert asked == []


def test_last_and_best_are_kept_over_a_restart(tmp_path, wide):
    """keep=1 and losses 3, 1, 2 | restart | 2.5, 4: the best is step 2, the last is step 5."""
    for first, losses in ((1, (3.0, 1.0, 2.0)), (4, (2.5, 4.0))):
        with Checkpoints(tmp_path, CheckpointConfig(keep=1)) as checkpoints:
            for step, loss in enumerate(losses, start=first):
                checkpoints.save(make_state(step, wide), {}, loss)
                checkpoints.wait()
    assert checkpoint_steps(tmp_path) == [2, 5]


def test_checkpoints_that_were_not_evaluated_are_kept_as_the_last_ones_only(tmp_path, wide):
    with Checkpoints(tmp_path, CheckpointConfig(keep=2)) as checkpoints:
        for step, loss in ((1, None), (2, 1.0), (3, None), (4, None)):
            checkpoints.save(make_state(step, wide), {}, loss)
            checkpoints.wait()
    assert checkpoint_steps(tmp_path) == [2, 3, 4]


def test_a_folder_without_the_commit_marker_is_no_checkpoint(tmp_path, wide):
    """A torn save, a user's own folder, and an empty number; none is found, none is deleted."""
    with Checkpoints(tmp_path, CheckpointConfig(keep=1)) as checkpoints:
        checkpoints.save(make_state(1, wide), {}, None)
    for name in ("2", "2023", "notes"):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
    with Checkpoints(tmp_path, CheckpointConfig(keep=1)) as checkpoints:
        assert checkpoints.steps == [1]
        checkpoints.save(make_state(3, wide), {}, None)
    assert checkpoint_steps(tmp_path) == [3]
    assert (tmp_path / "checkpoints" / "2023" / "mine.txt").read_text() == "mine"


def test_a_step_that_is_there_is_not_saved_again_in_silence(tmp_path, wide):
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(make_state(4, wide), {}, None)
        checkpoints.wait()
        with pytest.raises(RuntimeError, match="step 4 already exists"):
            checkpoints.save(make_state(4, wide), {}, None)


META = {
    "counters": {"tokens_seen": 3},
    "watch": {"streaks": {}, "skip_batches": ""},
    "environment": {},
    "data": "0",
    "validation": "0",
}


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"data": None, "environment": []}, "environment, data"),
        ({"counters": {"loss": 1.5}}, "counters"),
        ({"counters": {"not_a_field": 1}}, "counters"),
        ({"watch": {"streaks": {"x": "1"}, "skip_batches": ""}}, "watch"),
        ({"watch": {"streaks": {}}}, "watch"),
    ],
)
def test_a_meta_that_somebody_else_wrote_is_refused(change, wrong):
    require_meta(META, 40)
    require_meta({"counters": {}, "validation": "0"}, 40, ("counters", "validation"))
    with pytest.raises(ConfigError, match=rf"step 40 has no usable {wrong} in its meta: "):
        require_meta(META | change, 40)
    with pytest.raises(ConfigError, match="no usable counters, watch, environment, data"):
        require_meta([1], 40)
