"""What a config may be: each rule with its message, and what follows from a config."""

import dataclasses

import pytest

from moejax.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    EvalConfig,
    LoggingConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    TrainConfig,
    default_config,
)
from moejax.overrides import apply_overrides


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("model.num_layers=0", "model.num_layers=0 is below 1; use a whole number of at least 1"),
        ("moe.every=0", "moe.every=0 is below 1"),
        ("eval.batches=0", "eval.batches=0 is below 1"),
        ("checkpoint.keep=-1", "checkpoint.keep=-1 is below 1"),
        ("logging.every=0", "logging.every=0 is below 1"),
        ("mesh.fsdp=0", "mesh.fsdp=0 is below 1"),
        (
            "model.num_kv_heads=3",
            "model.num_heads=4 is not a multiple of model.num_kv_heads=3; every key/value head s",
        ),
        ("model.head_dim=31", "model.head_dim=31 is odd; RoPE rotates pairs, use an even width"),
        (
            "model.rope_theta=1",
            "model.rope_theta=1.0 must be a finite number above 1; 10000.0 is u",
        ),
        (
            "moe.balance_loss_weight=-0.1",
            "moe.balance_loss_weight=-0.1 is not a finite number of at least 0; give one, for ex",
        ),
        ("moe.first_dense=-1", "moe.first_dense=-1 is not a finite number of at least 0"),
        ("moe.capacity_factor=0", "moe.capacity_factor=0.0 must be a finite number above 0, or No"),
        (
            "moe.top_k=9",
            "moe.top_k=9 is larger than moe.num_experts=8; a token can select each exp",
        ),
        ("moe.top_k=1", "moe.top_k=1 with moe.normalize_weights=True makes every combine weight 1"),
        (
            "moe.capacity_factor=None moe.transport=all_to_all",
            "moe.transport='all_to_all' has a fixed number of slots and moe.capacity_factor=None",
        ),
        (
            "data.sequence_length=1",
            "data.sequence_length=1 is below 2; a sequence needs a token an",
        ),
        ("data.source=prepared", "data.source='prepared' with data.path=None: give data.path exac"),
        ("data.path=x", "data.source='embedded' with data.path='x': give data.path exactly when d"),
        ("optim.b2=1", "optim.b2=1.0 is outside [0, 1); 0.9 and 0.95 are usual"),
        ("optim.clip_norm=0", "optim.clip_norm=0.0 must be a finite number above 0"),
        (
            "train.accumulation=3",
            "train.batch_size=16 is not a multiple of train.accumulation=3; microbatches have eq",
        ),
        ("mesh.expert=None", "mesh.data and mesh.expert are all None; at most one axis can take "),
        ("seed=-1", "seed=-1 is outside [0, 2**32); use a non-negative whole number below"),
        (
            "moe.every=3",
            "model.num_layers=4 minus moe.first_dense=0 is 4, not a positive multiple of moe.eve",
        ),
        ("moe.first_dense=4", "model.num_layers=4 minus moe.first_dense=4 is 0, not a positive mu"),
        (
            "moe.group_sequences=3",
            "a microbatch of 16 sequences (train.batch_size / train.accumulation) is not a multi",
        ),
    ],
)
def test_an_impossible_config_is_refused_with_values_rule_and_remedy(words, message):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(Config(), words.split())
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mesh", "devices", "message"),
    [
        (
            MeshConfig(data=2, expert=8),
            8,
            "mesh data 2 x fsdp 1 x expert 8 x tensor 1 needs 16 devices and 8 are there; make an "
            "axis smaller, or on a CPU give --cpu_devices 16",
        ),
        (
            MeshConfig(data=2),
            8,
            "mesh data 2 x fsdp 1 x expert 1 x tensor 1 takes 2 devices and 8 ",
        ),
        (
            MeshConfig(expert=3),
            8,
            "mesh data None x fsdp 1 x expert 3 x tensor 1 takes 3 devices a",
        ),
    ],
)
def test_a_mesh_must_take_exactly_the_devices(mesh, devices, message):
    with pytest.raises(ConfigError) as caught:
        mesh.resolve(devices)
    assert str(caught.value).startswith(message)


def test_the_free_axis_takes_the_devices_that_are_left():
    mesh = MeshConfig(data=2, expert=None).resolve(8)
    assert (mesh.data, mesh.fsdp, mesh.expert, mesh.tensor) == (2, 1, 4, 1)
    assert (mesh.num_devices, mesh.token_shards) == (8, 8)
    mesh = MeshConfig(tensor=2).resolve(8)
    assert (mesh.data, mesh.num_devices, mesh.token_shards) == (4, 8, 4)


@pytest.mark.parametrize(
    ("words", "mesh", "message"),
    [
        (
            "moe.num_experts=6",
            MeshConfig(data=1, expert=4),
            "moe.num_experts=6 is not divisible by the expert axis (4); use a multiple of 4 or "
            "another mesh.expert, for example 3",
        ),
        (
            "moe.expert_hidden=255",
            MeshConfig(data=1, tensor=2),
            "moe.expert_hidden=255 is not divisible by the tensor axis (2)",
        ),
        ("", MeshConfig(data=1, tensor=4), "model.num_kv_heads=2 is not divisible by the tensor "),
        ("", MeshConfig(data=1, fsdp=3), "model.d_model=128 is not divisible by the fsdp axis (3)"),
        (
            "train.batch_size=20",
            MeshConfig(data=2, expert=4),
            "train.batch_size=20 over train.accumulation=1 gives microbatches of 20 sequences, not "
            "a multiple of 8 = data 2 x fsdp 1 x expert 4 x moe.group_sequences 1; use train.batch",
        ),
    ],
)
def test_a_config_must_fit_its_mesh(words, mesh, message):
    config = apply_overrides(Config(), words.split())
    with pytest.raises(ConfigError) as caught:
        config.check_mesh(mesh)
    assert str(caught.value).startswith(message)


def test_the_batch_size_that_an_error_suggests_works():
    mesh = MeshConfig(data=2, expert=4)
    with pytest.raises(ConfigError) as caught:
        apply_overrides(Config(), ["train.batch_size=20"]).check_mesh(mesh)
    suggested = str(caught.value).partition("use ")[2].split()[0]
    apply_overrides(Config(), [suggested]).check_mesh(mesh)


def test_a_dense_model_asks_nothing_of_the_expert_axis():
    config = apply_overrides(Config(), ["moe.every=None", "moe.num_experts=6"])
    assert (config.num_moe_layers, config.num_dense_layers) == (0, 4)
    config.check_mesh(MeshConfig(data=1, expert=4))


def test_moe_layers_are_the_last_of_each_run():
    config = apply_overrides(Config(), ["model.num_layers=7", "moe.first_dense=1", "moe.every=3"])
    assert (config.num_moe_layers, config.num_dense_layers) == (2, 5)


def test_the_defaults_are_a_locked_config_dict():
    with pytest.raises(AttributeError, match="does not exist"):
        default_config().moe.topk = 1
    nested = default_config().to_dict()
    sections = [ModelConfig, MoEConfig, TrainConfig, CheckpointConfig, EvalConfig, LoggingConfig]
    for section in sections:
        name = section.__name__.removesuffix("Config").lower()
        assert nested[name] == dataclasses.asdict(section())
