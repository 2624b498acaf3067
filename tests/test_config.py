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
from moejax.moe_config import NO_CAPACITY, NOT_CAUSAL, READ_BY, Router
from moejax.overrides import apply_overrides


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("model.num_layers=0", "model.num_layers=0 is below 1; use a whole number of at least 1"),
        ("model.vocab_size=1e10", "model.vocab_size=10000000000 is above 2**31 - 1, the largest"),
        ("data.sequence_length=1e10", "data.sequence_length=10000000000 is above 2**31 - 1"),
        ("moe.every=0", "moe.every=0 is below 1"),
        ("eval.batches=0", "eval.batches=0 is below 1"),
        ("checkpoint.keep=-1", "checkpoint.keep=-1 is below 1"),
        ("logging.every=0", "logging.every=0 is below 1"),
        ("mesh.fsdp=0", "mesh.fsdp=0 is below 1"),
        ("watchdog.step_seconds=-1", "watchdog.step_seconds=-1.0 must be a finite number above 0"),
        ("watchdog.slow_seconds=0", "watchdog.slow_seconds=0.0 must be a finite number above 0"),
        (
            "model.num_kv_heads=3",
            "model.num_heads=4 is not a multiple of model.num_kv_heads=3; every key/value head s",
        ),
        ("model.head_dim=31", "model.head_dim=31 is odd; RoPE rotates pairs, use an even width"),
        (
            "model.attention=latent model.qk_rope_head_dim=3",
            "model.qk_rope_head_dim=3 is odd; RoPE rotates pairs, use an even width",
        ),
        ("model.attention_window=0", "model.attention_window=0 is below 1"),
        (
            "model.kv_lora_rank=512",
            "model.kv_lora_rank=512 is not read by model.attention='grouped'; leave it at 64, or "
            "use model.attention=latent",
        ),
        (
            "model.attention=latent model.attention_sinks=True",
            "model.attention_sinks=True is not read by model.attention='latent'; leave it at "
            "False, or use model.attention=grouped",
        ),
        (
            "model.full_attention_every=2",
            "model.full_attention_every=2 is not read without a window; leave it at None, or give "
            "model.attention_window, for example 128",
        ),
        (
            "model.attention_window=8 model.full_attention_every=1",
            "model.full_attention_every=1 of model.num_layers=4 gives a window to all layers or to "
            "none; use 2 up to model.num_layers, or leave out",
        ),
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
            "data.sequence_length=1",
            "data.sequence_length=1 is below 2; a sequence needs a token an",
        ),
        ("data.source=prepared", "data.source='prepared' with data.path=None: data.source=pre"),
        ("data.path=x", "data.source='embedded' with data.path='x': data.source=prepared needs"),
        ("optim.b2=1", "optim.b2=1.0 is outside [0, 1); 0.9 and 0.95 are usual"),
        ("optim.clip_norm=0", "optim.clip_norm=0.0 must be a finite number above 0"),
        (
            "train.accumulation=3",
            "train.batch_size=16 is not a multiple of train.accumulation=3; microbatches have eq",
        ),
        (
            "moe.every=None train.replay=runs/a",
            "train.replay=runs/a with moe.every=None and moe.router='softmax': no token chooses an "
            "expert, so nothing can be replayed; leave it out, or use another router",
        ),
        (
            "moe.router=soft moe.capacity_factor=None moe.allow_noncausal=True train.replay=runs/a",
            "train.replay=runs/a with moe.every=1 and moe.router='soft': no token chooses an ex",
        ),
        (
            "moe.every=None logging.choices=True",
            "logging.choices=True with moe.every=None, which has no MoE layer; leave it out",
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
    ("words", "message"),
    [
        ("depth_fraction=0", "moe.depth_fraction=0.0 is outside (0, 1]; it is the part of the tok"),
        ("depth_fraction=1.5", "moe.depth_fraction=1.5 is outside (0, 1]"),
        (
            "buffer_factor=0.9",
            "moe.buffer_factor=0.9 is below 1; balanced routing has to fit, so",
        ),
        ("l1_update_factor=1", "moe.l1_update_factor=1.0 must be a finite number above 1; ReMoE u"),
        ("eval_capacity_factor=0", "moe.eval_capacity_factor=0.0 must be a finite number above 0"),
        # Selection.
        (
            "top_k=11 zero_experts=1 copy_experts=1",
            "moe.top_k=11 is larger than moe.num_experts=8 and 2 without a network; a token can "
            "select each expert once, use top_k <= 10",
        ),
        (
            "router=noisy top_k=1",
            "moe.top_k=1 with moe.router='noisy' makes every combine weight 1, a softmax over one ",
        ),
        (
            "router=gshard top_k=3",
            "moe.router='gshard' draws the second of two experts, but moe.top_k=3; use moe.top_k=2",
        ),
        (
            "zero_computation_weight=0.5",
            "moe.zero_computation_weight=0.5 weighs zero, copy and constant experts, but there are "
            "none; leave it at 0.75, or set moe.zero_experts=1",
        ),
        ("router=gshard top_k=1", "moe.router='gshard' draws the second of two experts, but moe.t"),
        (
            "router=hash zero_experts=1 constant_experts=2",
            "moe.zero_experts, copy_experts and constant_experts (3 in all) need a router that "
            "chooses by score, and moe.router='hash' does not; use one of softmax, sigmoid, sqrt",
        ),
        (
            "router=noisy copy_experts=1",
            "moe.zero_experts, copy_experts and constant_experts (1 in all) need a router",
        ),
        (
            "shared_gate=sigmoid",
            "moe.shared_gate='sigmoid' gates shared experts, but moe.shared_experts=0; set moe.sh",
        ),
        # Capacity.
        (
            "router=expert_choice allow_noncausal=true",
            "moe.capacity_factor=1.25 with moe.router='expert_choice', which needs none: every "
            "expert takes the same number of tokens already; use moe.capacity_factor=None",
        ),
        (
            "router=soft",
            "moe.capacity_factor=1.25 with moe.router='soft', which needs none: every expert has "
            "the same number of slots already; use moe.capacity_factor=None",
        ),
        (
            "router=dense",
            "moe.capacity_factor=1.25 with moe.router='dense', which needs none: every expert "
            "takes every token; use moe.capacity_factor=None",
        ),
        (
            "router=soft capacity_factor=None transport=ragged",
            "moe.transport='ragged' moves assigned tokens, but moe.router='soft' makes equal slots",
        ),
        (
            "router=soft capacity_factor=None transport=gather",
            "moe.transport='gather' moves assigned tokens, but moe.router='soft' makes equal slots",
        ),
        (
            "num_experts=2 capacity_by_expert=1,2 capacity_factor=None",
            "moe.capacity_by_expert is given, but moe.capacity_factor=None is dropless; give a moe",
        ),
        (
            "num_experts=3 capacity_by_expert=1,2",
            "moe.capacity_by_expert=(1.0, 2.0) needs one finite number above 0 for each of "
            "moe.num_experts=3; 1.0 leaves the capacity as it is",
        ),
        (
            "num_experts=2 capacity_by_expert=1,0",
            "moe.capacity_by_expert=(1.0, 0.0) needs one finite number above 0",
        ),
        # Groups of experts.
        (
            "expert_groups=4",
            "moe.expert_groups=4 and moe.groups_per_token=None go together; give both, for example",
        ),
        ("groups_per_token=2", "moe.expert_groups=None and moe.groups_per_token=2 go together"),
        (
            "expert_groups=3 groups_per_token=1",
            "moe.expert_groups=3 does not divide moe.num_experts=8; groups have equal size, use a ",
        ),
        (
            "device_groups=3 device_balance_loss_weight=0.1",
            "moe.device_groups=3 does not divide moe.num_experts=8; groups have equal size",
        ),
        (
            "expert_groups=4 groups_per_token=1 top_k=3",
            "moe.top_k=3 exceeds the group limit: moe.groups_per_token=1 of moe.expert_groups=4 "
            "groups of 2 hold 2 experts; use moe.top_k <= 2 or more moe.groups_per_token, up to 4",
        ),
        ("expert_groups=4 groups_per_token=5", "moe.top_k=2 exceeds the group limit: moe.groups_p"),
        (
            "expert_groups=4 groups_per_token=2 zero_experts=1",
            "moe.expert_groups=4 groups only experts that have a network; leave out the 1 zero, co",
        ),
        (
            "device_groups=4",
            "moe.device_groups=4 and moe.device_balance_loss_weight=0.0 go together; give both, fo",
        ),
        (
            "device_balance_loss_weight=0.1",
            "moe.device_groups=None and moe.device_balance_loss_weight=0.1 go together; give both",
        ),
    ],
)
def test_an_impossible_layer_is_refused_with_values_rule_and_remedy(words, message):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(Config(), [f"moe.{word}" for word in words.split()])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


WHOLE = ("expert_groups", "groups_per_token", "cosine_width", "soft_slots", "gate_rank")
NOT_NEGATIVE = ("shared_experts", "zero_experts", "copy_experts", "constant_experts")
ABOVE_ZERO = ("weight_scale", "logit_cap", "l1_coefficient", "zero_computation_weight")
FRACTIONS = ("jitter", "expert_dropout", "gate_dropout", "quantile_decay")


@pytest.mark.parametrize(
    ("names", "value", "message"),
    [
        (("num_experts", "group_sequences", "device_groups", *WHOLE), 0, " is below 1; use a whol"),
        (NOT_NEGATIVE, -1, " is not a finite number of at least 0"),
        (("bias_update_rate", "sequence_balance_loss_weight"), -0.5, " is not a finite number of"),
        (("importance_loss_weight", "router_z_loss_weight"), float("inf"), " is not a finite numb"),
        (ABOVE_ZERO, 0.0, " must be a finite number above 0"),
        (ABOVE_ZERO, float("nan"), " must be a finite number above 0"),
        (FRACTIONS, 1.0, " is outside [0, 1); use a fraction below 1"),
        (FRACTIONS, -0.1, " is outside [0, 1); use a fraction below 1"),
        (("l1_update_factor",), float("inf"), " must be a finite number above 1"),
        (("buffer_factor",), float("inf"), " is below 1; balanced routing has to fit"),
    ],
)
def test_numbers_of_a_layer_have_their_range(names, value, message):
    for name in names:
        with pytest.raises(ConfigError) as caught:
            MoEConfig(**{name: value})
        assert str(caught.value).startswith(f"moe.{name}={value}{message}")


OTHER_VALUES = {
    "top_k": 3,
    "normalize_weights": False,
    "logit_cap": 30.0,
    "jitter": 0.01,
    "expert_dropout": 0.1,
    "gate_dropout": 0.1,
    "bias_update_rate": 0.01,
    "cosine_width": 8,
    "depth_fraction": 0.25,
    "soft_slots": 2,
    "gate_rank": 4,
    "l1_coefficient": 1e-4,
    "l1_update_factor": 1.5,
    "quantile_decay": 0.5,
    "load_loss_weight": 0.1,
    "balance_loss_weight": 0.02,
    "sequence_balance_loss_weight": 0.1,
    "router_z_loss_weight": 0.01,
    "importance_loss_weight": 0.1,
    "mutual_information_loss_weight": 0.1,
    "microbatch_balance_loss_weight": 0.1,
    "balance_convention": "switch",
    "eval_capacity_factor": 3.0,
    "priority": "rank",
    "group_sequences": 2,
}


def _layer(router: str, **changes) -> MoEConfig:
    """Returns a layer of a router, dropless where it takes no capacity."""
    capacity = None if router in NO_CAPACITY else 1.25
    return MoEConfig(**{"router": router, "capacity_factor": capacity, **changes})


@pytest.mark.parametrize("router", Router.__args__)
def test_a_router_takes_the_keys_that_it_reads_and_refuses_the_others(router):
    """A key that would change nothing is a mistake of the user's, or of who reads the config."""
    _layer(router)
    for name, value in OTHER_VALUES.items():
        if name == "top_k" and router == "gshard":
            continue  # it has an error of its own
        if router in READ_BY[name]:
            assert getattr(_layer(router, **{name: value}), name) == value
            continue
        default = getattr(MoEConfig(), name)
        with pytest.raises(ConfigError) as caught:
            _layer(router, **{name: value})
        assert str(caught.value).startswith(
            f"moe.{name}={value} is not read by moe.router={router!r}; leave it at {default}, or "
            f"use one of {READ_BY[name][0]}"
        )


def test_every_key_that_some_routers_ignore_is_tried_above():
    in_pairs = {"expert_groups", "groups_per_token", "device_balance_loss_weight"}
    assert set(OTHER_VALUES) | in_pairs == set(READ_BY)
    with pytest.raises(
        ConfigError, match=r"^moe.expert_groups=4 is not read by moe.router='noisy'"
    ):
        MoEConfig(router="noisy", expert_groups=4, groups_per_token=2)
    with pytest.raises(ConfigError, match=r"^moe.device_balance_loss_weight=0.1 is not read by"):
        MoEConfig(router="relu", device_groups=4, device_balance_loss_weight=0.1)


@pytest.mark.parametrize("router", ["relu", "hash", "random", "elementwise"])
def test_a_loss_that_a_router_has_not_can_be_turned_off(router):
    """It is off either way: that 0 and the default mean the same is no surprise to anybody."""
    off = {name: 0.0 for name in READ_BY if name.endswith("_loss_weight")}
    assert _layer(router, **off).balance_loss_weight == 0


@pytest.mark.parametrize("router", ["expert_choice", "sinkhorn", "soft", "mixture_of_depths"])
def test_a_decoder_refuses_a_router_that_sees_later_tokens(router):
    """The layer alone is allowed: a model of one's own, an encoder say, may use it."""
    moe = _layer(router)
    message = rf"^moe.router='{router}': .*; a decoder trained this way reads ahead, .* Use anot"
    with pytest.raises(ConfigError, match=message):
        Config(moe=moe)
    assert Config(moe=dataclasses.replace(moe, allow_noncausal=True)).moe.router == router


@pytest.mark.parametrize("priority", ["rank", "weight", "best_weight", "random"])
def test_a_decoder_refuses_an_order_of_service_that_sees_later_tokens(priority):
    message = rf"^moe.priority='{priority}': a later token can take the slot of an earlier one; a d"
    with pytest.raises(ConfigError, match=message):
        Config(moe=MoEConfig(priority=priority))
    Config(moe=MoEConfig(priority=priority, allow_noncausal=True))
    with pytest.raises(ConfigError, match=message):  # evaluation has a capacity too
        Config(moe=MoEConfig(priority=priority, capacity_factor=None))


@pytest.mark.parametrize("router", sorted(set(Router.__args__) - set(NOT_CAUSAL)))
def test_a_decoder_takes_every_causal_router(router):
    assert Config(moe=_layer(router)).moe.noncausal_reason is None


def test_a_dense_model_does_not_check_a_layer_that_it_has_not():
    assert MoEConfig(every=None, top_k=9, router="expert_choice").every is None


def test_a_router_of_one_expert_needs_no_top_k():
    assert _layer("dense", num_experts=1).mean_selected == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # choices, slots_per_token, mean_selected, transport over 8 devices
        ({}, (8, 2, 2, "all_to_all")),
        ({"capacity_factor": None}, (8, 2, 2, "all_to_all")),
        ({"capacity_factor": None, "transport": "all_to_all"}, (8, 2, 2, "all_to_all")),
        ({"transport": "ragged"}, (8, 2, 2, "ragged")),
        ({"zero_experts": 1, "copy_experts": 1, "constant_experts": 2}, (12, 2, 2, "all_to_all")),
        ({"router": "soft", "capacity_factor": None}, (8, 1, 1, "all_to_all")),
        ({"router": "dense", "capacity_factor": None}, (8, 8, 8, "gather")),
        ({"router": "expert_choice", "capacity_factor": None}, (8, 8, 2, "all_to_all")),
        ({"router": "relu", "top_k": 3}, (8, 8, 3, "all_to_all")),
        ({"router": "hash", "top_k": 1}, (8, 1, 1, "all_to_all")),
    ],
)
def test_sizes_of_a_layer_by_hand(changes, expected):
    moe = MoEConfig(**changes)
    found = (moe.choices, moe.slots_per_token, moe.mean_selected, moe.transport_over(8))
    assert found == expected


def test_the_transport_of_dropless_routing_sends_least():
    """1.5 * 2 rows a token by all-to-all, as many as there are devices by gather."""
    dropless = MoEConfig(capacity_factor=None)
    assert [dropless.transport_over(n) for n in (1, 2, 3, 4)] == [*["gather"] * 3, "all_to_all"]
    tight = MoEConfig(capacity_factor=None, buffer_factor=1.0)
    assert [tight.transport_over(n) for n in (2, 3)] == ["gather", "all_to_all"]
    assert MoEConfig(capacity_factor=None, transport="ragged").transport_over(2) == "ragged"
    assert MoEConfig().transport_over(2) == "all_to_all"


@pytest.mark.parametrize(
    ("mesh", "devices", "message"),
    [
        (
            MeshConfig(data=2, expert=8),
            8,
            "mesh data 2 x expert 8 needs 16 devices (available: 8); make an "
            "axis smaller, or on a CPU give --cpu_devices 16",
        ),
        (
            MeshConfig(data=2),
            8,
            "mesh data 2 uses 2 devices (available: 8); sizes must multiply to 8: ",
        ),
        (
            MeshConfig(expert=3),
            8,
            "mesh data None x expert 3 uses 3 devices (",
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
    mesh = MeshConfig(data=1, fsdp=2, expert_fsdp=None, expert=2, tensor=2).resolve(24)
    assert (mesh.expert_fsdp, mesh.token_shards) == (3, 12)
    assert (mesh.expert_degree, mesh.fsdp_degree) == (6, 6)
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
            "moe.num_experts=12",
            MeshConfig(data=1, expert_fsdp=4, expert=2),
            "moe.num_experts=12 is not divisible by the axes expert_fsdp 4 x expert 2 (8); use a "
            "multiple of 8 or another mesh.expert_fsdp or mesh.expert, for example 6 in all",
        ),
        (
            "",
            MeshConfig(data=1, expert_fsdp=3),
            "moe.num_experts=8 is not divisible by the expert_fsdp axis (3); use a multiple of 3 ",
        ),
        (
            "moe.every=None",
            MeshConfig(data=1, fsdp=2, expert_fsdp=3),
            "model.d_model=128 is not divisible by the axes fsdp 2 x expert_fsdp 3 (6)",
        ),
        (
            "moe.expert_hidden=255",
            MeshConfig(data=1, tensor=2),
            "moe.expert_hidden=255 is not divisible by the tensor axis (2)",
        ),
        ("", MeshConfig(data=1, tensor=4), "model.num_kv_heads=2 is not divisible by the tensor "),
        ("", MeshConfig(data=1, fsdp=3), "model.d_model=128 is not divisible by the fsdp axis (3)"),
        (
            "model.attention=latent model.q_lora_rank=6",
            MeshConfig(data=1, fsdp=4),
            "model.q_lora_rank=6 is not divisible by the fsdp axis (4)",
        ),
        (
            "model.attention=latent model.qk_rope_head_dim=6",
            MeshConfig(data=1, tensor=4),
            "model.qk_rope_head_dim=6 is not divisible by the tensor axis (4)",
        ),
        (
            "train.batch_size=20",
            MeshConfig(data=2, expert=4),
            "train.batch_size=20 over train.accumulation=1 gives microbatches of 20 sequences, not "
            "a multiple of 8 = data 2 x expert 4 x moe.group_sequences 1; use train.batch",
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
