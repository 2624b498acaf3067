"""The parts of benchmarks/tpu_layer.py that need no TPU compiler."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tpu_layer(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tpu_layer

    yield tpu_layer
    sys.modules.pop("tpu_layer", None)


# 256 bytes go by an all-to-all, 16 by a sum of statistics and 16 by one that XLA made.
PROGRAM = """\
HloModule jit_layer, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (x: bf16[8,16], n: f32[4]) -> bf16[8,16] {
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %n = f32[4]{0} parameter(1)
  %stats = f32[4]{0} all-reduce(%n), replica_groups={{0,1,2,3}}, to_apply=%add, \
metadata={op_name="jit(layer)/shard_map/psum_invariant"}
  %whole = f32[4]{0} all-reduce(%n), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %moved = bf16[8,16]{1,0} all-to-all(%x), replica_groups={{0,1,2,3}}, dimensions={0}
}
"""


def test_sent_bytes_leave_sums_out(tpu_layer):
    assert tpu_layer.sent_bytes(PROGRAM) == (256 * 3 / 4 + 2 * 16 * 3 / 4, 2)


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
