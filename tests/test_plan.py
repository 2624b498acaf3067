"""`moejax plan`: its arithmetic by hand, and one real compile for a pod that is not here."""

import dataclasses
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from moejax import hlo, hlo_traffic, plan, plan_report
from moejax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from moejax.describe import placements
from moejax.moe_config import MoEConfig
from moejax.topology import parse_topology
from moejax.traffic import worst_rounds

ROOT = Path(__file__).parents[1]
GIB = 2**30


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        (
            "jit(f)/jvp()/while/body/closed_call/moe/shard_map/exchange/all_gather",
            "exchange forward",
        ),
        (
            "jit(f)/transpose(jvp())/while/body/checkpoint/moe/shard_map/weights/g",
            "weights backward",
        ),
        (
            "jit(f)/transpose(jvp())/while/body/checkpoint/rematted_computation/attention/dot",
            "attention recomputed",
        ),
        ("jit(f)/transpose(jvp(loss))/dot_general", "loss backward"),
        ("jit(f)/optimizer/add", "optimizer forward"),
        ("jit(f)/jvp()/gather", "other forward"),
        ("", "other forward"),
    ],
)
def test_place_and_pass_of_a_scope(scope, expected):
    assert " ".join(plan.place_and_pass(scope)) == expected


# Seconds on links


def _torus(*sizes):
    places = np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij"), -1).reshape(
        -1, len(sizes)
    )
    return [SimpleNamespace(id=i, coords=tuple(map(int, place))) for i, place in enumerate(places)]


def _seconds(pod: str, kind: str, groups, size: int, devices=None) -> float:
    topology = parse_topology(pod)
    c = hlo_traffic.Collective(kind, (size,), np.array(groups), 1, "")
    return plan.link_seconds(topology, devices or _torus(*topology.shape), c)


def test_seconds_on_a_torus_by_hand():
    """v5p: 90 GB/s a link and direction. 4x4x4, numbers of devices row by row."""
    ring, sheet = [0, 1, 2, 3], list(range(16))
    # 3 others send 900 MB each over a ring both ways, 180 GB/s.
    assert _seconds("v5p:4x4x4", "all-gather", [ring], 900_000_000) == pytest.approx(2.7 / 180)
    # 15 others, over two rings at once.
    assert _seconds("v5p:4x4x4", "all-gather", [sheet], 90_000_000) == pytest.approx(1.35 / 360)
    # 2 of the 4 of a dimension: a line.
    assert _seconds("v5p:4x4x4", "all-gather", [[0, 1]], 900_000_000) == pytest.approx(0.9 / 90)
    # V * A / (4 * W), with A the longest dimension that is taken.
    assert _seconds("v5p:4x4x4", "all-to-all", [sheet], 180_000_000) == pytest.approx(0.001)
    assert _seconds("v5e:4x8", "all-to-all", [list(range(8))], 180_000_000) == pytest.approx(
        0.18 * 8 / (4 * 45)
    )
    assert _seconds("v5p:4x4x4", "collective-permute", [[0, 1]], 90_000_000) == pytest.approx(0.001)


def test_seconds_between_slices_are_those_of_the_network():
    """v5p: 6.25 GB/s of a chip. Of 2 slices each sends half of a sum, then half of the whole."""
    devices = [SimpleNamespace(id=i, coords=(i % 4, 0, 0), slice_index=i // 4) for i in range(8)]
    between = _seconds("v5p:4x1x1:2", "all-reduce", [[0, 4]], 625_000_000, devices)
    assert between == pytest.approx(0.1)
    within = _seconds("v5p:4x1x1:2", "all-reduce", [[0, 1, 2, 3]], 625_000_000, devices)
    assert within == pytest.approx(1.5 * 0.625 / 180)


def test_two_devices_of_a_chip_use_no_link():
    devices = [SimpleNamespace(id=i, coords=(0, 0, 0)) for i in range(2)]
    assert _seconds("tpu7x:2x2x1", "all-gather", [[0, 1]], 10**9, devices) == 0


def test_seconds_of_gpus_inside_a_host_and_between_hosts():
    devices = [SimpleNamespace(id=i) for i in range(16)]
    inside = _seconds("h100:2x8", "all-to-all", [list(range(8))], 8 * 450_000_000, devices)
    assert inside == pytest.approx(7 / 1000)
    one_each = _seconds("h100:2x8", "all-gather", [[0, 8]], 50_000_000, devices)
    assert one_each == pytest.approx(0.001)
    all_of_both = _seconds("h100:2x8", "all-gather", [list(range(16))], 50_000_000, devices)
    assert all_of_both == pytest.approx(15 * 0.05 / (8 * 50))
    # 50 MB for each of 16: to 7 by NVLink, to 8 over the network.
    swapped = _seconds("h100:2x8", "all-to-all", [list(range(16))], 16 * 50_000_000, devices)
    assert swapped == pytest.approx(8 * 0.05 / 50)
    # 7 of one host and 1 of the other: that one sends all over its own network.
    alone = _seconds("h100:2x8", "all-to-all", [list(range(1, 9))], 8 * 50_000_000, devices)
    assert alone == pytest.approx(7 * 0.05 / 50)


# A plan from numbers

CONFIG = Config(
    model=ModelConfig(num_layers=2, d_model=64, dtype="bfloat16"),
    moe=MoEConfig(num_experts=4, expert_hidden=32, capacity_factor=None),
    data=DataConfig(sequence_length=32),
    train=TrainConfig(batch_size=8),
    mesh=MeshConfig(data=1, fsdp=2, expert=2),
)


def _plan(memory_gib: float = 10, *, cycles: float = 0.0, config: Config = CONFIG, **changes):
    parts = (plan.Part("experts", "forward", int(4.59e14), int(1e9), cycles),)
    traffic = (plan.Traffic("all-gather", "fsdp", "weights", "forward", 3, 1.8e10, 0.1),)
    work = plan.Work(parts, traffic)
    return plan.Plan(
        config=config,
        topology=parse_topology("v5p:2x2x1"),
        sizes=config.mesh,
        memory={"parameters": int(memory_gib * GIB)},
        argument_bytes=2 * GIB,
        peak_bytes=int(memory_gib * GIB),
        compile_seconds=1.0,
        **{"work": work, "overflow": work, "checks": (), "rounds": 4} | changes,
    )


def test_the_largest_limit_bounds_the_step():
    made = _plan(cycles=3.5e9)
    assert made.roofline["compute"] == pytest.approx(1)
    assert made.roofline["links"] == pytest.approx(0.1)
    assert made.bound_by == "compute"
    low, high = made.seconds
    assert low == pytest.approx(1)
    assert high == pytest.approx(2.1, rel=0.01)  # 3.5 G cycles at 1.75 GHz, then the links
    assert made.tokens_per_second(low) == pytest.approx(8 * 32 / 4)


def test_fits_and_the_verdict():
    assert _plan(95).fits
    assert plan_report.verdict(_plan(90)) == "fits: 90.0 GiB of 95.7 GiB a device, 5.74 GiB free"
    assert not _plan(96).fits
    assert plan_report.verdict(_plan(100.74)).startswith(
        "does not fit: 100.7 GiB of 95.7 GiB a device, 5.00 GiB too much. model.remat=full keeps"
    )


def test_a_gpus_program_has_the_part_that_jax_takes():
    pod = dataclasses.replace(parse_topology("h100:1x8"), fraction=0.75)  # 59.3 of 79.1 GiB
    assert dataclasses.replace(_plan(59), topology=pod).fits
    large = dataclasses.replace(_plan(60), topology=pod)
    assert not large.fits
    assert plan_report.verdict(large).startswith("does not fit: 60.0 GiB of 59.3 GiB a device")
    more = "XLA_CLIENT_MEM_FRACTION=0.9 gives JAX 71.2 GiB"
    assert more in plan_report.remedy(large)
    assert more not in plan_report.remedy(dataclasses.replace(_plan(72), topology=pod))
    assert plan_report.plan_record(large)["memory_limit"] == 84_942_979_072 * 3 // 4
    out = io.StringIO()
    plan_report.show_plan(large, Console(file=out, width=160))
    assert "59.3 GiB usable: 75% of its memory, XLA_CLIENT_MEM_FRACTION=0.75" in out.getvalue()


@pytest.mark.parametrize(
    ("remat", "exchange", "weights"),
    [
        ("none", 2, 1),
        ("full", 2.5, 2),  # the way back is not repeated
        ("exchange", 2, 2),
        ("exchange_and_dots_with_no_batch_dims", 2, 2),
    ],
)
def test_checks_count_what_a_remat_policy_sends_again(remat, exchange, weights):
    """Over expert 2, 64 tokens, 2 layers: gather sends 2 * 64 bfloat16 and 8 * 2 bytes a token."""
    model = dataclasses.replace(CONFIG.model, remat=remat)
    moe = dataclasses.replace(CONFIG.moe, transport="gather")
    config = dataclasses.replace(CONFIG, model=model, moe=moe)
    checks = {check.name: check for check in plan._checks(config, config.mesh, ())}
    found = checks["exchange over expert"]
    assert found.formula == f"{exchange} passes of moejax.traffic's gather"
    assert found.expected == exchange * 2 * 64 * (2 * 64 * 2 + 8 * 2)
    gathered = "once" if weights == 1 else "2 a layer"
    assert checks["weights over fsdp"].formula.endswith(gathered)


def test_soft_moe_repeats_the_way_back_too():
    """Its output mixes what comes back by weights that learn."""
    model = dataclasses.replace(CONFIG.model, remat="full")
    soft = MoEConfig(router="soft", capacity_factor=None, allow_noncausal=True)
    assert plan.exchange_passes(dataclasses.replace(CONFIG, model=model)) == 2.5
    assert plan.exchange_passes(dataclasses.replace(CONFIG, model=model, moe=soft)) == 3


def test_a_balance_loss_of_several_microbatches_runs_forward_once_more():
    """Its slope is taken at the sums of the step, which a pass without gradients finds."""
    train = dataclasses.replace(CONFIG.train, accumulation=2)
    config = dataclasses.replace(CONFIG, train=train)
    assert CONFIG.moe.balance_loss_weight > 0
    assert (plan.forwards_ahead(CONFIG), plan.forwards_ahead(config)) == (0, 1)
    assert plan.exchange_passes(config) == plan.exchange_passes(CONFIG) + 1
    gathers = {check.name: check for check in plan._checks(config, config.mesh, ())}
    assert gathers["weights over fsdp"].formula == "all-gather, 2 a layer"
    moe = dataclasses.replace(CONFIG.moe, balance_loss_weight=0.0, router_z_loss_weight=0.0)
    assert plan.forwards_ahead(dataclasses.replace(config, moe=moe)) == 0


def test_the_oracle_exchanges_nothing_to_check():
    moe = dataclasses.replace(CONFIG.moe, transport="reference")
    config = dataclasses.replace(CONFIG, moe=moe)
    checks = tuple(plan._checks(config, config.mesh, ()))
    assert [check.name for check in checks] == ["weights over fsdp", "gradients over fsdp"]
    out = io.StringIO()
    plan_report.show_plan(_plan(checks=checks), Console(file=out, width=160))
    assert "weights over fsdp" in out.getvalue()


def test_the_json_is_written_whatever_becomes_of_the_tables(monkeypatch, tmp_path):
    def broken(made, out):
        raise BrokenPipeError

    monkeypatch.setattr(plan_report, "make_plan", lambda config, topology: _plan())
    monkeypatch.setattr(plan_report, "show_plan", broken)
    with pytest.raises(BrokenPipeError):
        plan_report.plan(CONFIG, parse_topology("v5p:2x2x1"), tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["fits"] is True


def test_remedies_follow_what_memory_is_full_of():
    large = dataclasses.replace(CONFIG.model, d_model=16384, remat="full")
    moe = dataclasses.replace(CONFIG.moe, expert_hidden=65536)
    text = plan_report.remedy(_plan(config=dataclasses.replace(CONFIG, model=large, moe=moe)))
    assert "mesh.fsdp=4 halves them" in text
    assert "mesh.expert=4, for the experts" in text
    assert "remat" not in text
    small = plan_report.remedy(_plan())
    assert "mesh.fsdp" not in small
    assert "model.remat=full" in small
    assert "train.accumulation=2" in small


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory. Used 17.5G of 15.7G hbm", (17.5 * GIB, True)),
        ("RESOURCE_EXHAUSTED: required for HLO temporaries (512.0M) exceeds", (GIB / 2, False)),
        ("UNIMPLEMENTED: ragged all-to-all", None),
    ],
)
def test_what_xla_refuses_for_its_size(message, expected):
    assert plan._refused_bytes(message) == expected


@pytest.mark.parametrize("with_arguments", [True, False])
def test_a_step_without_room_is_a_plan_that_does_not_fit(with_arguments):
    topology = parse_topology("v5e:2x2")
    made = plan._too_large(CONFIG, topology, CONFIG.mesh, 17 * GIB, with_arguments, 1.0)
    assert not made.fits
    assert made.peak_bytes == 17 * GIB + (0 if with_arguments else made.argument_bytes)
    assert sum(made.memory.values()) == made.peak_bytes
    record = plan_report.plan_record(made)
    assert record["fits"] is False
    assert "cycles" not in record
    out = io.StringIO()
    plan_report.show_plan(made, Console(file=out, width=160))
    assert "does not fit" in out.getvalue()


def test_memory_by_kind_adds_up_to_what_was_reserved():
    program = hlo.parse("HloModule empty\n\nENTRY %main () -> f32[] {\n}\n")
    for temporaries in (0, 10_000, GIB):
        memory = plan._memory_by_kind(CONFIG, CONFIG.mesh, program, 2**21, temporaries)
        assert sum(memory.values()) == 2**21 + temporaries
        assert min(memory.values()) >= 0
    gradients = placements(CONFIG, CONFIG.mesh)["gradients"]  # of layers in bfloat16
    assert memory["gradients"] == sum(row.per_device for row in gradients)
    assert 0 < memory["gradients"] < memory["parameters"]
    assert memory["optimizer state"] > 2 * memory["parameters"]


def test_memory_beside_the_arguments():
    """64 of 80 bytes of arguments become results, 200 are temporary."""
    stats = SimpleNamespace(
        argument_size_in_bytes=80,
        alias_size_in_bytes=64,
        output_size_in_bytes=65,
        temp_size_in_bytes=200,
        peak_memory_in_bytes=270,
    )
    assert plan._beside_arguments(stats, parse_topology("h100:1x8")) == 200 + 1
    assert plan._beside_arguments(stats, parse_topology("v5p:2x2x1")) == 270 - 80


def test_layer_carries_are_split_into_weights_and_activations():
    """2 layers on fsdp 2: a copied query [2, 32, 4, 32], x [2, 2, 32, 64], a float32 gradient."""
    loop = (
        "(s32[], bf16[2,32,4,32]{3,2,1,0}, bf16[2,2,32,64]{3,2,1,0}, f32[2,32,4,32]{3,2,1,0}, "
        "bf16[2,32,64]{2,1,0})"
    )
    text = f"""HloModule jit_step

%condition (c: {loop}) -> pred[] {{
  %limit = s32[] constant(2)
  %c = {loop} parameter(0)
  %at = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%at, %limit), direction=LT
}}

ENTRY %main (x: {loop}) -> {loop} {{
  %x = {loop} parameter(0)
  ROOT %loop = {loop} while(%x), condition=%condition, body=%none
}}
"""
    copies, saved = plan._layer_carries(CONFIG, CONFIG.mesh, hlo.parse(text))
    assert copies == 2 * 2 * 32 * 4 * 32
    assert saved == 2 * (2 * 2 * 32 * 64 + 2 * 32 * 64)


@pytest.mark.parametrize(
    ("moe", "mesh", "rounds"),
    [
        # 64 tokens a device, k 2, E 4; buffers of 1.5 * 128 = 192 rows
        ({}, (1, 2, 2), 2),  # gather: 2 * 64 tokens, 2 of 2 experts: 256 rows over 192
        ({"transport": "ragged"}, (1, 2, 2), 2),  # 2 * 128 assignments over 192
        ({"transport": "all_to_all"}, (1, 2, 2), 2),  # 128 assignments over parts of 96
        ({"capacity_factor": 1.0}, (1, 2, 2), 1),  # equal buffers
        ({"transport": "ragged", "buffer_factor": 1.0}, (1, 1, 4), 4),
        ({}, (4, 1, 1), 1),  # at home: all 128 fit
    ],
)
def test_rounds_of_the_worst_routing(moe, mesh, rounds):
    data, fsdp, expert = mesh
    sizes = MeshConfig(data=data, fsdp=fsdp, expert=expert)
    config = dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, **moe))
    assert worst_rounds(config, sizes) == rounds


# The real thing


def _compiler(module: str, extra: str):
    return pytest.mark.skipif(
        importlib.util.find_spec(module) is None,
        reason=f"{module} is not installed; pip install 'moejax[{extra}]'",
    )


def _run(file: Path, topology: str, *mesh: str) -> dict:
    """Plans a whole train step for 8 chips, two layers of 4 experts, in a process of its own."""
    words = "model.num_layers=2 model.d_model=256 model.dtype=bfloat16 model.remat=full"
    words += " moe.num_experts=4 moe.capacity_factor=1.25 moe.expert_hidden=256"
    words += " data.sequence_length=256 train.batch_size=16"
    command = [sys.executable, "-m", "moejax", "plan", "configs/quickstart.py"]
    command += ["--topology", topology, "--json", str(file), *words.split(), *mesh]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "fits: " in result.stdout
    return json.loads(file.read_text())


MESH = ("mesh.data=1", "mesh.fsdp=2", "mesh.expert=4")


def useful_flops() -> float:
    """6 FLOPs a weight and token of a device; full remat, empty slots and attention come on top.

    Of 512 tokens a device: 2 layers of query and output, 256 * 128 each, and of 2 experts a token,
    3 * 256 * 256 each.
    """
    return 6 * 512 * 2 * (2 * 256 * 128 + 2 * 3 * 256 * 256)


def _check_record(record: dict) -> None:
    assert record["fits"] is True
    assert record["argument_bytes"] < record["peak_bytes"] < 2**28
    assert sum(record["memory"].values()) == record["peak_bytes"]
    exchange, weights, gradients = record["checks"]
    assert exchange["sent"] == pytest.approx(exchange["expected"], rel=0.05)
    assert weights["sent"] >= 0.9 * weights["expected"]  # XLA gathers some a third time
    assert gradients["sent"] >= 0.9 * gradients["expected"]  # some go over fsdp and expert at once


@_compiler("libtpu", "plan-tpu")
def test_plan_of_a_tiny_model_for_tpus(tmp_path):
    record = _run(tmp_path / "plan.json", "v5e:2x4", *MESH)
    _check_record(record)
    assert {"all-to-all over expert", "all-gather over fsdp"} <= set(
        record["wire_bytes_by_kind_and_axis"]
    )
    assert 0 < record["step_seconds_low"] <= record["step_seconds_high"]
    assert 0 < record["mfu_bound"] < 1
    assert record["flops"] > useful_flops()
    assert record["cycles"] > 0


@_compiler("libtpu", "plan-tpu")
def test_plan_of_two_slices(tmp_path):
    """What crosses the network is the sum of gradients: a device sends and gets half of its own.

    They are of bfloat16, the dtype of the computation.
    """
    record = _run(
        tmp_path / "plan.json", "v5e:2x2:2", "mesh.data=2", "mesh.fsdp=2", "mesh.expert=2"
    )
    assert (record["slices"], record["chips"]) == (2, 8)
    between = record["wire_bytes_by_kind_and_axis"]["all-reduce over data between slices"]
    held = record["argument_bytes"] / 3  # parameters and two moments, float32
    assert 0.95 * held / 2 < between < 1.1 * held / 2
    exchange, *_ = record["checks"]
    assert exchange["sent"] == pytest.approx(exchange["expected"], rel=0.05)
    across = [axes for axes in record["wire_bytes_by_axis"] if axes.endswith(" between slices")]
    assert across == ["data between slices"]
    assert record["roofline"]["links"] > between / 3.125e9


@_compiler("jax_cuda12_plugin", "plan-gpu")
def test_plan_of_a_tiny_model_for_gpus(tmp_path):
    record = _run(tmp_path / "plan.json", "h100:1x8", *MESH)
    _check_record(record)
    assert record["cycles"] is None
