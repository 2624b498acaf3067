"""Router replay through two trainings: recorded on one device, replayed on two."""

import dataclasses

import numpy as np
import pytest
from hostile import file_limit

from moejax.config import Config, ConfigError, MeshConfig
from moejax.loop import train
from moejax.mesh import make_mesh
from moejax.metrics import read_metrics
from moejax.observer import Observer
from moejax.overrides import apply_overrides
from moejax.replay import load_choices, save_choices

TINY = [
    "model.num_layers=2",
    "model.d_model=16",
    "model.num_heads=1",
    "model.num_kv_heads=1",
    "model.head_dim=16",
    "moe.router=sigmoid_bias",
    "moe.expert_hidden=16",
    "moe.num_experts=4",
    "moe.capacity_factor=None",
    "data.sequence_length=32",
    "train.batch_size=4",
    "train.steps=3",
    "optim.warmup_steps=0",
    "eval.every=3",
    "eval.batches=1",
    "logging.every=1",
]


@pytest.fixture
def config() -> Config:
    return apply_overrides(Config(), TINY)


def test_a_step_is_read_back_for_any_accumulation(config, tmp_path, mesh):
    """Rows keep their order when the replaying run splits the batch into microbatches."""
    random = np.random.default_rng(0)
    choice_albts = random.integers(0, 4, (1, 2, 4, 32, 2), np.int32)
    save_choices(tmp_path, 7, choice_albts)
    replaying = dataclasses.replace(
        config, train=dataclasses.replace(config.train, replay=str(tmp_path), accumulation=2)
    )
    found = np.asarray(load_choices(replaying, mesh, 7))
    assert found.shape == (2, 2, 2, 32, 2)
    np.testing.assert_array_equal(np.concatenate(list(found), axis=1), choice_albts[0])


def test_choices_that_are_missing_or_of_another_shape_are_refused(config, tmp_path, mesh):
    save_choices(tmp_path, 1, np.zeros((1, 2, 4, 32, 3), np.int32))
    replaying = dataclasses.replace(
        config, train=dataclasses.replace(config.train, replay=str(tmp_path))
    )
    with pytest.raises(ConfigError, match=r"no readable choices of step 2 .*logging\.choices=True"):
        load_choices(replaying, mesh, 2)
    with pytest.raises(ConfigError, match=r"\(2, 4, 32, 3\) at step 1 .*needs.*\(2, 4, 32, 2\)"):
        load_choices(replaying, mesh, 1)


@pytest.mark.slow
def test_a_replayed_training_has_the_same_losses_and_keeps_its_router_state(config, tmp_path):
    """Without the update of the bias, choices alone make the losses those of the first run."""
    logging = dataclasses.replace(config.logging, choices=True)
    one = dataclasses.replace(config, logging=logging, mesh=MeshConfig(data=1))
    _train_on(one, 1, tmp_path / "recorded")
    replay = dataclasses.replace(config.train, replay=str(tmp_path / "recorded"))
    two = dataclasses.replace(config, train=replay, mesh=MeshConfig(data=1, expert=2))
    _train_on(two, 2, tmp_path / "replayed")
    recorded, replayed = (
        [r for r in read_metrics(tmp_path / name) if r["split"] == "train"]
        for name in ("recorded", "replayed")
    )
    assert len(recorded) == len(replayed) == 3
    for a, b in zip(recorded, replayed, strict=True):
        assert a["expert_load"] == b["expert_load"]
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
    assert max(recorded[-1]["router_bias_norm"]) > 0
    assert max(replayed[-1]["router_bias_norm"]) == 0


def _train_on(config: Config, devices: int, workdir) -> None:
    """Trains on the first devices of this process."""
    import jax

    with pytest.MonkeyPatch.context() as patch:
        found = jax.devices()[:devices]
        patch.setattr("moejax.loop.make_mesh", lambda sizes: make_mesh(sizes, found))
        assert train(config, workdir) == 0


def test_choices_that_are_damaged_hostile_or_elsewhere_are_refused(config, tmp_path, mesh):
    replaying = dataclasses.replace(
        config, train=dataclasses.replace(config.train, replay=str(tmp_path))
    )
    save_choices(tmp_path, 1, np.zeros((1, 2, 4, 32, 2), np.int32))
    file = tmp_path / "choices" / "step_00000001.npz"
    sound = file.read_bytes()
    assert load_choices(replaying, mesh, 1).shape == (1, 2, 4, 32, 2)

    def negative():
        np.savez_compressed(file, choice_lbts=np.full((2, 4, 32, 2), -1, np.int16))

    def pickled():
        np.savez_compressed(file, choice_lbts=np.array([print], object))

    def bomb():
        np.savez_compressed(file, choice_lbts=np.zeros(1 << 24, np.int16))
        assert file.stat().st_size < 1 << 18

    def cut():
        file.write_bytes(sound[:-30])

    def one_array():
        np.save(file.with_suffix(".npy"), [1])
        file.with_suffix(".npy").replace(file)

    def link():
        file.unlink()
        (tmp_path / "other.npz").write_bytes(sound)
        file.symlink_to(tmp_path / "other.npz")

    for harm in (negative, pickled, bomb, cut, one_array, link):
        harm()
        with pytest.raises(ConfigError, match=r"no readable choices of step 1 .*logging\.choices"):
            load_choices(replaying, mesh, 1)


def test_choices_that_cannot_be_written_leave_nothing_and_stop_nothing(tmp_path, capsys):
    """A full disk: the run is worth more than what it tells of itself."""
    choice_albts = np.random.default_rng(0).integers(0, 8, (1, 2, 4, 32, 2), np.int32)
    with file_limit(100), pytest.raises(OSError, match="File too large"):
        save_choices(tmp_path, 1, choice_albts)
    observer = object.__new__(Observer)
    observer._workdir, observer._main_process = tmp_path, True
    with file_limit(100):
        observer._save_choices(1, choice_albts)
    said = capsys.readouterr().err
    assert "step 1: its choices cannot be written ([Errno 27] File too large" in said
    assert list((tmp_path / "choices").iterdir()) == []
