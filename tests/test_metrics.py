"""The record: its fields, its line of JSON, and what of a file is one."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest

from moejax.metrics import FIELDS, encode_record, read_metrics


def train_record(step, **fields):
    return {"step": step, "split": "train", "loss": 1.5, **fields}


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


# Records.


def test_nonfinite_values_are_null_and_named():
    line = encode_record(
        train_record(
            3, loss=math.nan, grad_norm=np.float32(math.inf), max_violation=[0.0, -math.inf]
        )
    )
    assert strict(line) == {
        "step": 3,
        "split": "train",
        "loss": None,
        "grad_norm": None,
        "max_violation": [0.0, None],
        "nonfinite": {"loss": "nan", "grad_norm": "inf", "max_violation/1": "-inf"},
    }


def test_unknown_value_is_null_without_a_name():
    assert strict(encode_record(train_record(1, mfu=None))) == train_record(1, mfu=None)


def test_float32_values_read_back_bit_for_bit():
    values = np.frombuffer(np.random.default_rng(0).bytes(4000), np.float32)
    for value in values[np.isfinite(values)]:
        read = np.float32(strict(encode_record(train_record(1, loss=value)))["loss"])
        assert struct.pack("f", read) == struct.pack("f", value)


def test_equal_values_print_equal_whatever_their_container():
    value = np.float32(0.1)
    lines = {encode_record(train_record(1, loss=v)) for v in (value, float(value), np.array(value))}
    assert len(lines) == 1
    assert encode_record(train_record(1, loss=np.nextafter(value, np.float32(1)))) not in lines


def test_record_with_domains_and_arrays():
    record = {
        "step": np.int64(5),
        "split": "eval",
        "loss": 1.0,
        "expert_load": np.array([[0.5, 0.5]]),
        "domains": {"english": {"loss": 1.0, "bits_per_byte": 1.4, "tokens": 10}},
    }
    read = strict(encode_record(record))
    assert read["expert_load"] == [[0.5, 0.5]]
    assert read["domains"] == record["domains"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (train_record(1, losss=1.0), r"unknown fields \['losss'\].*docs/metrics.md"),
        (train_record(-1), "step=-1"),
        (train_record(1.5), "step=1.5"),
        ({"step": 1, "split": "test"}, "split='test'; it must be 'train' or 'eval'"),
        (train_record(1, bits_per_byte=1.0), r"\['bits_per_byte'\], which the other split holds"),
    ],
)
def test_wrong_records_are_refused(record, message):
    with pytest.raises(ValueError, match=message):
        encode_record(record)


def test_every_field_is_documented_with_its_unit():
    text = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    rows = {}
    for line in text.partition("\n## ")[0].splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[cells[0].strip("`")] = cells
    assert set(rows) == set(FIELDS)
    for name, field in FIELDS.items():
        assert rows[name][1] == field.unit, name
        assert rows[name][2] == field.shape, name
        assert rows[name][3] == ", ".join(field.splits), name


# The file.


def test_unreadable_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"jsonl line 2 is not a record.*delete that line"):
        read_metrics(tmp_path)


def test_no_file_means_no_records(tmp_path):
    assert read_metrics(tmp_path) == []


def test_a_line_that_is_nested_without_end_is_no_record(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + "[" * 100_000 + "\n")
    with pytest.raises(ValueError, match="line 2 is not a record"):
        read_metrics(tmp_path)
