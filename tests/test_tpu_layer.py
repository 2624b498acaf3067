"""The parts of benchmarks/tpu_layer.py that need no TPU compiler: what a program's text sends."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

ROOT = Path(__file__).parents[1]


@pytest.fixture
def hlo(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import hlo

    yield hlo
    sys.modules.pop("hlo", None)


@pytest.fixture
def tpu_layer(hlo):
    import tpu_layer

    yield tpu_layer
    sys.modules.pop("tpu_layer", None)


# Four devices. %loop runs five times, nobody knows how often %rounds does.
PROGRAM = """\
HloModule jit_layer, is_scheduled=true, entry_computation_layout={(bf16[8,16]{1,0})->bf16[8,16]}

%add (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[] parameter(0)
  %b.1 = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a.1, %b.1)
}

%all-reduce-scatter (input: bf16[8,16]) -> bf16[2,16] {
  %input = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.9 = bf16[8,16]{1,0} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice.1 = bf16[2,16]{1,0} slice(%all-reduce.9), slice={[0:2], [0:16]}
}

%body (carry: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %carry = (s32[], bf16[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x.2 = bf16[8,16]{1,0} get-tuple-element(%carry), index=1
  %swap = bf16[8,16]{1,0} all-to-all(%x.2), replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %next = (s32[], bf16[8,16]{1,0}) tuple(%i, %swap)
}

%condition (carry.1: (s32[], bf16[8,16])) -> pred[] {
  %carry.1 = (s32[], bf16[8,16]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (x: bf16[8,16], n: s32[4]) -> bf16[8,16] {
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %n = s32[4]{0} parameter(1)
  %out = bf16[12,16]{1,0} broadcast(%n), dimensions={}
  %sent = bf16[12,16]{1,0} ragged-all-to-all(%x, %out, %n, %n, %n, /*index=5*/%n), \
replica_groups={{0,1,2,3}}, metadata={op_name="jit(layer)/exchange/ragged_all_to_all"}
  %zero = (s32[], bf16[8,16]{1,0}) tuple(%n, %x)
  %loop = (s32[], bf16[8,16]{1,0}) while(%zero), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %rounds = (s32[], bf16[8,16]{1,0}) while(%zero), condition=%condition, body=%body
  %start = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%x), replica_groups=[2,2]<=[4]
  %done = bf16[32,16]{1,0} all-gather-done(%start)
  %kept = bf16[2,16]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
  %stats = s32[4]{0} all-reduce(%n), replica_groups={{0,1,2,3}}, to_apply=%add, \
metadata={op_name="jit(layer)/shard_map/psum_invariant"}
  %whole = s32[4]{0} all-reduce(%n), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %moved = bf16[8,16]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,2}}
}
"""
X = 8 * 16 * 2  # bytes of x


def test_collectives_of_a_program_by_hand(hlo):
    found = hlo.collectives(PROGRAM)
    assert [(c.kind, c.group, c.times, c.sent) for c in found] == [
        ("ragged-all-to-all", 4, 1, X * 3 / 4),  # the smaller buffer, balanced
        ("all-to-all", 4, 5, 5 * X * 3 / 4),  # and none of %rounds
        ("all-gather", 2, 1, X),
        ("reduce-scatter", 4, 1, X * 3 / 4),
        ("all-reduce", 4, 1, 2 * 16 * 3 / 4),
        ("all-reduce", 4, 1, 2 * 16 * 3 / 4),
        ("collective-permute", 2, 1, X),
    ]
    assert [c.is_sum for c in found] == [False] * 4 + [True, False, False]


def test_sent_bytes_leave_sums_out(tpu_layer):
    sent, calls = tpu_layer.sent_bytes(PROGRAM)
    assert calls == 10
    assert sent == X * (0.75 + 5 * 0.75 + 1 + 0.75 + 1) + 24


@pytest.mark.parametrize(
    ("text", "expected"),
    [("bf16[8,16]{1,0:T(8,128)(2,1)}", 256), ("(s32[], pred[3], f32[2]{0})", 15), ("s4[6]", 3)],
)
def test_nbytes(hlo, text, expected):
    assert hlo.nbytes(text) == expected


def test_collectives_of_a_program_that_xla_compiled(hlo, mesh_of):
    """4 devices, x is [6, 16] float32 on each: 384 bytes."""

    def exchange(x):
        whole = jax.lax.all_gather(x, "expert", tiled=True)
        back = jax.lax.psum_scatter(whole * 2, "expert", tiled=True)
        swapped = jax.lax.all_to_all(whole, "expert", 0, 0, tiled=True)
        return back, swapped, jax.lax.psum(jnp.sum(x), "expert")

    specs = (P("expert"), P("expert"), P())
    run = jax.shard_map(exchange, mesh=mesh_of(1, 1, 4, 1), in_specs=P("expert"), out_specs=specs)
    text = jax.jit(run).lower(jnp.ones((24, 16))).compile().as_text()
    found = hlo.collectives(text)
    assert sorted((c.kind, c.group, c.sent) for c in found if not c.is_sum) == [
        ("all-gather", 4, 3 * 384),
        ("all-to-all", 4, 3 * 384),
        ("reduce-scatter", 4, 3 * 384),
    ]
    assert [c.kind for c in found if c.is_sum] == ["all-reduce"]


# As a TPU's compiler writes them: a batched product, one over rows with a batch of 3, and a kernel.
PRODUCTS = """\
HloModule jit_products

%fused (a: bf16[3,5,7], b: bf16[3,7,11]) -> bf16[3,5,11] {
  %a = bf16[3,5,7]{2,1,0} parameter(0)
  %b = bf16[3,7,11]{2,1,0} parameter(1)
  ROOT %batched = bf16[3,5,11]{2,1,0} convolution(%a, %b), window={size=3 stride=2 lhs_dilate=3}, \
dim_labels=0bf_0io->0bf
}

ENTRY %main (a.1: bf16[3,5,7], b.1: bf16[3,7,11], c: f32[5,7], d: f32[7,11]) -> bf16[3,5,11] {
  %a.1 = bf16[3,5,7]{2,1,0} parameter(0)
  %b.1 = bf16[3,7,11]{2,1,0} parameter(1)
  %c = f32[5,7]{1,0} parameter(2)
  %d = f32[7,11]{1,0} parameter(3)
  %plain = f32[5,11]{1,0} convolution(%c, %d), dim_labels=bf_io->bf
  %dot = f32[5,11]{1,0} dot(%c, %d), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %kernel = f32[5,11]{1,0} custom-call(%c, %d), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"body":"","cost_estimate":{"flops":"1000","x":"0"}}}
  ROOT %fusion = bf16[3,5,11]{2,1,0} fusion(%a.1, %b.1), kind=kOutput, calls=%fused
}
"""


def test_flops_of_products_by_hand(hlo):
    one = 2 * 5 * 7 * 11
    assert hlo.matmul_flops(PRODUCTS) == 3 * one + one + one + 1000


def test_products_of_a_window_by_hand(hlo):
    # 4 numbers, padded by 1, a window of 3: the ends take 2 products and the rest 3.
    plain = {"size": 3, "stride": 1, "pad": 1, "lhs_dilate": 1, "rhs_dilate": 1}
    assert hlo._window_products(4, 4, **plain) == 2 + 3 + 3 + 2


def test_flops_of_a_program_that_xla_compiled(hlo):
    def scanned(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)[0]

    text = jax.jit(scanned).lower(jnp.ones((48, 32)), jnp.ones((32, 32))).compile().as_text()
    assert hlo.matmul_flops(text) == 5 * 2 * 48 * 32 * 32


def test_a_broken_text_is_refused(hlo):
    with pytest.raises(ValueError, match="never closed"):
        hlo.computations("%f () -> f32[] {\n  %x = f32[] add(%a, (%b\n}\n")


def test_no_libtpu_says_how_to_get_it(tpu_layer, monkeypatch):
    monkeypatch.setattr(tpu_layer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'moejax\[plan-tpu\]'"):
        tpu_layer.start_compiler()


def test_rows_reach_the_table_and_the_json(tpu_layer, tmp_path, capsys):
    rows = [
        tpu_layer.TpuRow("v6e:2x4", "gather", True, "KiB/token", 3.0, 2.0, 5),
        tpu_layer.TpuRow("v5e:2x4", "ragged", False, "fails: UNIMPLEMENTED"),
    ]
    tpu_layer.report(rows, tmp_path / "rows.json")
    printed = capsys.readouterr().out
    assert "1.500" in printed
    assert "fails: UNIMPLEMENTED" in printed
    written = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["ratio"] for row in written] == [1.5, None]


def test_shapes_are_the_layers_that_the_formulas_are_asked_about(tpu_layer):
    config = tpu_layer.SHAPES["mixtral"].config(8, capacity_factor=None, transport="ragged")
    assert (config.moe.num_experts, config.moe.top_k) == (8, 2)
    assert (config.model.d_model, config.moe.expert_hidden) == (4096, 14336)
    assert config.train.batch_size * config.data.sequence_length == 8 * tpu_layer.TOKENS
