"""What is read in a program, sent and computed: by hand in small texts, and in XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax import hlo, hlo_costs, hlo_traffic

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


def test_collectives_of_a_program_by_hand():
    found = hlo_traffic.collectives(hlo.parse(PROGRAM))
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [("bf16[8,16]{1,0:T(8,128)(2,1)}", 256), ("(s32[], pred[3], f32[2]{0})", 15), ("s4[6]", 3)],
)
def test_nbytes(text, expected):
    assert hlo.nbytes(text) == expected


def test_collectives_of_a_program_that_xla_compiled(mesh_of):
    """4 devices, x is [6, 16] float32 on each: 384 bytes."""

    def exchange(x):
        whole = jax.lax.all_gather(x, "expert", tiled=True)
        back = jax.lax.psum_scatter(whole * 2, "expert", tiled=True)
        swapped = jax.lax.all_to_all(whole, "expert", 0, 0, tiled=True)
        return back, swapped, jax.lax.psum(jnp.sum(x), "expert")

    specs = (P("expert"), P("expert"), P())
    run = jax.shard_map(exchange, mesh=mesh_of(1, 1, 4, 1), in_specs=P("expert"), out_specs=specs)
    text = jax.jit(run).lower(jnp.ones((24, 16))).compile().as_text()
    found = hlo_traffic.collectives(hlo.parse(text))
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


def test_flops_of_products_by_hand():
    one = 2 * 5 * 7 * 11
    assert hlo_costs.matmul_flops(hlo.parse(PRODUCTS)) == 3 * one + one + one + 1000


# As for a GPU: a batch of 3 products by cuBLAS, whose result comes with its working memory.
CUBLAS = """\
HloModule jit_products

ENTRY %main (a: bf16[3,5,7], b: bf16[3,7,11]) -> bf16[3,5,11] {
  %a = bf16[3,5,7]{2,1,0} parameter(0)
  %b = bf16[3,7,11]{2,1,0} parameter(1)
  %call = (bf16[3,5,11]{2,1,0}, s8[4096]{0}) custom-call(%a, %b), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"beta":0,\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],\
"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  ROOT %out = bf16[3,5,11]{2,1,0} get-tuple-element(%call), index=0
}
"""


def test_flops_of_a_gpus_products_by_hand():
    assert hlo_costs.matmul_flops(hlo.parse(CUBLAS)) == 3 * 2 * 5 * 7 * 11


# Attention of 2 sequences, 4 query heads on 2 key heads, 5 queries of 6 keys, widths 7 and 3.
ATTENTION = """\
HloModule jit_attention

ENTRY %main (i: s8[1,1,1], q: bf16[2,4,5,7], k: bf16[2,2,6,7], v: bf16[2,2,6,3]) -> bf16[2,4,5,3] {
  %i = s8[1,1,1]{2,1,0} parameter(0)
  %q = bf16[2,4,5,7]{3,2,1,0} parameter(1)
  %k = bf16[2,2,6,7]{3,2,1,0} parameter(2)
  %v = bf16[2,2,6,3]{3,2,1,0} parameter(3)
  %splash_mha_dq_segmented_no_residuals.2 = bf16[2,4,5,7]{3,2,1,0} custom-call(%i, %q, %k, %v), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
  "block": 512
}}, metadata={op_name="jit(step)/attention/pallas_call"}
  %splash_mha_dkv_segmented_no_residuals.1 = bf16[2,2,6,7]{3,2,1,0} custom-call(%i, %q, %k, %v), \
custom_call_target="tpu_custom_call"
  ROOT %splash_mha_fwd_segmented_residuals.1 = bf16[2,4,5,3]{3,2,1,0} custom-call(%i, %q, %k, %v), \
custom_call_target="tpu_custom_call"
}
"""


def test_flops_of_the_attention_kernels_by_hand():
    """Of half of the pairs of queries and keys: 2 products forward, 3 for queries, 4 for keys."""
    pairs = 2 * 4 * 5 * 6 // 2
    widths = (7 + 3) + (7 + 7 + 3) + (7 + 7 + 3 + 3)
    program = hlo.parse(ATTENTION)
    assert hlo_costs.matmul_flops(program) == 2 * pairs * widths
    scopes = [cost.scope for cost in hlo_costs.costs(program)]
    assert scopes == ["jit(step)/attention/pallas_call", "", ""]


def test_products_of_a_window_by_hand():
    # 4 numbers, padded by 1, a window of 3: the ends take 2 products and the rest 3.
    plain = {"size": 3, "stride": 1, "pad": 1, "lhs_dilate": 1, "rhs_dilate": 1}
    assert hlo_costs._window_products(4, 4, **plain) == 2 + 3 + 3 + 2


def test_flops_of_a_program_that_xla_compiled():
    def scanned(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)[0]

    text = jax.jit(scanned).lower(jnp.ones((48, 32)), jnp.ones((32, 32))).compile().as_text()
    assert hlo_costs.matmul_flops(hlo.parse(text)) == 5 * 2 * 48 * 32 * 32


def test_a_broken_text_is_refused():
    with pytest.raises(ValueError, match="never closed"):
        hlo.parse("%f () -> f32[] {\n  %x = f32[] add(%a, (%b\n}\n")


def _groups(text: str) -> list[list[int]]:
    line = f"%x = f32[4] all-reduce(%a), channel_id=1, replica_groups={text}, to_apply=%add"
    return hlo_traffic._groups(line.partition("), ")[2], 8).tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=4] {'a','b'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['a'=8] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ],
)
def test_replica_groups_in_every_spelling(text, expected):
    assert _groups(text) == expected


def test_pairs_of_a_permutation():
    line = "channel_id=1, source_target_pairs={{0,4},{4,0}}"
    assert hlo_traffic._groups(line, 8).tolist() == [[0, 4], [4, 0]]


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ([[0, 1], [2, 3], [4, 5], [6, 7]], ("tensor",)),
        ([[0, 2], [1, 3], [4, 6], [5, 7]], ("expert",)),
        ([[0, 4], [1, 5], [2, 6], [3, 7]], ("fsdp",)),
        ([[0, 2, 4, 6], [1, 3, 5, 7]], ("fsdp", "expert")),
        ([[0, 6], [6, 0]], ("fsdp", "expert")),
        ([[0], [1]], ()),
    ],
)
def test_mesh_axes_of_groups(groups, axes):
    mesh = {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}
    c = hlo_traffic.Collective("all-reduce", (4,), np.array(groups), 1, "")
    assert c.axes(mesh) == axes


def test_a_loop_of_unknown_length_counts_as_often_as_asked():
    once, twice = (hlo_traffic.collectives(hlo.parse(PROGRAM), trips) for trips in (1, 2))
    swaps = [[c.times for c in found if c.kind == "all-to-all"] for found in (once, twice)]
    assert swaps == [[5, 1], [5, 2]]


# A loop as a TPU's compiler leaves it, without a noted length. In each of 3 rounds %read takes one
# [4,8] of the three in %w and adds to it; %write replaces one of %out; %kept stays on the chip.
LOOP = """\
HloModule jit_loop, num_partitions=1

%pick (all: f32[3,4,8], i: s32[]) -> f32[1,4,8] {
  %all = f32[3,4,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,4,8]{2,1,0} dynamic-slice(%all, %i, %zero, %zero), dynamic_slice_sizes={1,4,8}
  ROOT %twice = f32[1,4,8]{2,1,0} add(%one, %one)
}

%put (all.1: f32[3,4,8], new: f32[1,4,8], i.1: s32[]) -> f32[3,4,8] {
  %all.1 = f32[3,4,8]{2,1,0} parameter(0)
  %new = f32[1,4,8]{2,1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %changed = f32[3,4,8]{2,1,0} dynamic-update-slice(%all.1, %new, %i.1, %zero.1, %zero.1)
}

%body (carry: (s32[], f32[3,4,8], f32[3,4,8])) -> (s32[], f32[3,4,8], f32[3,4,8]) {
  %carry = (s32[], f32[3,4,8]{2,1,0}, f32[3,4,8]{2,1,0}) parameter(0)
  %n = s32[] get-tuple-element(%carry), index=0
  %w = f32[3,4,8]{2,1,0} get-tuple-element(%carry), index=1
  %out = f32[3,4,8]{2,1,0} get-tuple-element(%carry), index=2
  %read = f32[1,4,8]{2,1,0} fusion(%w, %n), kind=kLoop, calls=%pick, \
metadata={op_name="jit(f)/while/body/read"}, backend_config={"estimated_cycles":"100"}
  %kept = f32[1,4,8]{2,1,0:T(4,128)S(1)} copy(%read), \
backend_config={"estimated_cycles":"9223372036854775807"}
  %write = f32[3,4,8]{2,1,0} fusion(%out, %kept, %n), kind=kLoop, calls=%put
  ROOT %next = (s32[], f32[3,4,8]{2,1,0}, f32[3,4,8]{2,1,0}) tuple(%n, %w, %write)
}

%condition (carry.1: (s32[], f32[3,4,8], f32[3,4,8])) -> pred[] {
  %limit = s32[] constant(3)
  %carry.1 = (s32[], f32[3,4,8]{2,1,0}, f32[3,4,8]{2,1,0}) parameter(0)
  %at = s32[] get-tuple-element(%carry.1), index=0
  ROOT %less = pred[] compare(%at, %limit), direction=LT
}

ENTRY %main (x: (s32[], f32[3,4,8], f32[3,4,8])) -> (s32[], f32[3,4,8], f32[3,4,8]) {
  %x = (s32[], f32[3,4,8]{2,1,0}, f32[3,4,8]{2,1,0}) parameter(0)
  ROOT %loop = (s32[], f32[3,4,8]{2,1,0}, f32[3,4,8]{2,1,0}) while(%x), condition=%condition, \
body=%body, metadata={op_name="jit(f)/transpose(jvp())/while"}
}
"""


def test_costs_of_a_loop_by_hand():
    """128 bytes a slice: read and written by %read, read by %kept, written by %write."""
    found = list(hlo_costs.costs(hlo.parse(LOOP)))
    assert sum(c.cycles for c in found) == 3 * 100  # and not what XLA does not know
    numbers, index = 3 * 4 * 128, 2 * 3 * 4  # the index is an operand too
    condition = 0  # of a loop does not count
    assert sum(c.memory_bytes for c in found) == numbers + index + condition
    assert {c.scope for c in found if c.cycles} == {"jit(f)/while/body/read"}
    unnamed = {c.scope for c in found if not c.cycles}
    assert unnamed == {"jit(f)/transpose(jvp())/while/"}  # of the loop that it stands in


def test_carries_of_loops_by_their_length():
    program = hlo.parse(LOOP)
    (carried,) = hlo.loop_carries(program, 3)
    assert [hlo.array_shape(t) for t in carried] == [
        ("s32", ()),
        ("f32", (3, 4, 8)),
        ("f32", (3, 4, 8)),
    ]
    assert hlo.loop_carries(program, 4) == []


# What a TPU starts early: %fetch brings %x to the chip, %part a third of it, %back writes it to
# memory again; %near slices what is on the chip. Starts name their operands in their types, too.
ASYNC = """\
HloModule jit_async, num_partitions=4

%wrapped (p: f32[3,8]) -> f32[8,3] {
  %p = f32[3,8]{1,0} parameter(0)
  ROOT %turned = f32[8,3]{1,0} transpose(%p), dimensions={1,0}, metadata={op_name="turned"}
}

ENTRY %main (x: f32[3,8]) -> f32[12,8] {
  %x = f32[3,8]{1,0:T(4,128)} parameter(0)
  %fetch = (f32[3,8]{1,0:T(4,128)S(1)}, f32[3,8]{1,0:T(4,128)}, u32[]{:S(2)}) copy-start(%x), \
metadata={op_name="fetch"}
  %there = f32[3,8]{1,0:T(4,128)S(1)} copy-done(%fetch)
  %part = ((f32[3,8]{1,0:T(4,128)}), f32[1,8]{1,0:T(4,128)S(1)}, s32[]{:S(2)}) slice-start(%x), \
slice={[0:1], [0:8]}, metadata={op_name="part"}
  %third = f32[1,8]{1,0:T(4,128)S(1)} slice-done(%part)
  %near = ((f32[3,8]{1,0:T(4,128)S(1)}), f32[1,8]{1,0:T(4,128)}, s32[]{:S(2)}) \
slice-start(%there), slice={[0:1], [0:8]}, metadata={op_name="near"}
  %back = (f32[3,8]{1,0}, f32[3,8]{1,0:T(4,128)S(1)}, u32[]{:S(2)}) copy-start(%there), \
metadata={op_name="back"}
  %sum = f32[3,8]{1,0} all-reduce-start(%x), replica_groups={{0,1,2,3}}, to_apply=%add, \
metadata={op_name="sum"}
  %turn = ((f32[3,8]{1,0}), f32[8,3]{1,0}, s32[]) async-start(%x), calls=%wrapped
  %on = ((f32[3,8]{1,0}), f32[8,3]{1,0}, s32[]) async-update(%turn)
  %turned.1 = f32[8,3]{1,0} async-done(%on)
  %all = (f32[3,8]{1,0:T(4,128)}, f32[12,8]{1,0}) all-gather-start(%x), channel_id=1, \
replica_groups={{0,1,2,3}}, dimensions={0}, metadata={op_name="all"}
  ROOT %whole = f32[12,8]{1,0} all-gather-done(%all)
}
"""


def test_memory_of_what_is_started_early_by_hand():
    """x is 96 bytes, a third of it 32; each counts once, and only where it is in memory."""
    moved = {c.scope: c.memory_bytes for c in hlo_costs.costs(hlo.parse(ASYNC))}
    assert moved == {
        "fetch": 96,  # read
        "part": 32,  # read
        "near": 32,  # written
        "back": 96,  # written
        "sum": 96 + 96,
        "turned": 96 + 96,
        "all": 96 + 4 * 96,
    }


# A sum over two slices of eight chips, as libtpu 0.0.42.1 writes it: their hosts send.
SLICES = """HloModule jit_f, num_partitions=8

ENTRY %main (x: bf16[64,512]) -> bf16[64,512] {
  %x = bf16[64,512]{1,0:T(8,128)(2,1)} parameter(0)
  %token = token[] after-all(), frontend_attributes={MegascaleRendezvousKeyName="all-reduce.1_0"}
  %send = (bf16[64,512]{1,0}, u32[], token[]) send(%x, %token), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:7}",\
_xla_megascale_transfer_type="ALL_REDUCE"}, metadata={op_name="jit(f)/optimizer/add"}
  %recv = (bf16[64,512]{1,0}, u32[], token[]) recv(%token), channel_id=1, \
is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:7}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %done = (bf16[64,512]{1,0}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %sum = bf16[64,512]{1,0} get-tuple-element(%done), index=0
}
"""


@pytest.mark.parametrize(("target", "slices"), [("{1,2}", 2), ("{1:4}", 4), ("{1,2,3}", 3)])
def test_what_goes_to_other_slices_is_a_collective_over_data(target, slices):
    (found,) = hlo_traffic.collectives(hlo.parse(SLICES.replace("{1,2}x", target + "x")))
    assert (found.kind, found.group, found.scope) == ("all-reduce", slices, "jit(f)/optimizer/add")
    assert found.sent == pytest.approx(2 * 64 * 512 * 2 * (slices - 1) / slices)
    assert found.axes({"data": 2 * slices, "fsdp": 2, "expert": 2}) == ("data",)


# One all-gather in three fusions that overlap with work, and two that XLA made of a fusion's parts.
OVERLAPPED = """\
HloModule jit_overlap, num_partitions=4

%begin (p: f32[8]) -> f32[32] {
  %p = f32[8]{0} parameter(0)
  ROOT %a = f32[32]{0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}

%finish (q: f32[8]) -> f32[32] {
  %q = f32[8]{0} parameter(0)
  ROOT %b = f32[32]{0} all-gather(%q), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}

%named (l: f32[], r: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  %r = f32[] parameter(1)
  ROOT %s = f32[] add(%l, %r), metadata={op_name="moe/exchange_back/reduce_scatter"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %f = f32[32]{0} fusion(%x), kind=kCustom, calls=%begin, metadata={op_name="jit(f)/weights/g"}
  %g = f32[32]{0} fusion(%x), kind=kCustom, calls=%finish
  ROOT %h = f32[8]{0} all-reduce(%x), channel_id=8, replica_groups={{0,1,2,3}}, to_apply=%named
}
"""


def test_an_overlapped_collective_counts_once_and_has_its_fusions_scope():
    found = hlo_traffic.collectives(hlo.parse(OVERLAPPED))
    assert [(c.kind, c.sent, c.scope) for c in found] == [
        ("all-gather", 3 * 32, "jit(f)/weights/g"),
        ("all-reduce", 2 * 32 * 3 / 4, "moe/exchange_back/reduce_scatter"),
    ]
