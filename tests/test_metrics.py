"""The record, the file that survives crashes, and the TensorBoard events."""

import io
import json
import logging
import math
import os
import struct

import numpy as np
import pytest
from PIL import Image

from moejax.config import ConfigError, MoEConfig
from moejax.metrics import (
    FIELDS,
    MetricWriter,
    cell_image,
    encode_record,
    host_record,
    layer_summary,
    load_image,
    loss_record,
    read_metrics,
    routing_record,
    state_record,
)
from moejax.router_stats import RouterStats


def _train(step, **fields):
    return {"step": step, "split": "train", "loss": 1.5, **fields}


def _strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def _write_steps(workdir, steps, start_step=0):
    with MetricWriter(workdir, start_step) as writer:
        for step in steps:
            writer.write(_train(step))


# Layer summaries: two layers of four experts, counted by hand.


def test_layer_summary_by_hand():
    summary = layer_summary(np.array([[10, 10, 10, 10], [30, 10, 0, 0]]))
    assert summary["expert_load"] == [[0.25, 0.25, 0.25, 0.25], [0.75, 0.25, 0.0, 0.0]]
    assert summary["max_violation"] == [0.0, 2.0]  # 30 over a mean of 10, minus 1
    assert summary["dead_experts"] == [0, 2]


def test_dead_means_below_one_percent_of_the_mean():
    # A mean of 1000: 10 is exactly 1% and alive, 9 is dead.
    assert layer_summary(np.array([[1990, 10]]))["dead_experts"] == [0]
    assert layer_summary(np.array([[1991, 9]]))["dead_experts"] == [1]


def test_layer_without_tokens_is_all_zero():
    summary = layer_summary(np.zeros((1, 4), np.int32))
    assert summary == {"expert_load": [[0.0] * 4], "max_violation": [0.0], "dead_experts": [0]}


def test_layer_summary_does_not_round_large_counts():
    # 2**24 + 1 is not a float32.
    summary = layer_summary(np.array([[2**24 + 1, 2**24]], np.int32))
    assert summary["max_violation"][0] == pytest.approx(0.5 / (2**24 + 0.5), rel=1e-9)


@pytest.mark.parametrize("counts", [[1, 2], [[1, -1]], [[1.0, math.nan]], np.zeros((2, 0))])
def test_layer_summary_refuses_what_is_not_counts(counts):
    with pytest.raises(ValueError, match="give one row for each MoE layer"):
        layer_summary(np.array(counts))


# From the sums of a step to a record.

# Two layers of three experts, 5 real tokens, 2 choices each; one assignment found no slot.
STATS = RouterStats(
    count_e=np.array([[5, 3, 2], [10, 0, 0]], np.int32),
    first_e=np.array([[3, 2, 0], [5, 0, 0]], np.int32),
    dropped_e=np.array([[1, 0, 0], [0, 0, 0]], np.int32),
    tokens=np.array([5, 5], np.int32),
    padding=np.array([3, 3], np.int32),
    probability_e=np.ones((2, 3), np.float32),
    importance_e=np.ones((2, 3), np.float32),
    load_e=np.zeros((2, 3), np.float32),
    z=np.ones(2, np.float32),
    entropy=np.array([5.0, 2.5], np.float32),
    sequence_balance=np.ones(2, np.float32),
    sequences=np.array([1, 1], np.int32),
    level_eb=np.zeros((2, 3, 0), np.int32),
    overflow_rounds=np.array([0, 2], np.int32),
)


def test_routing_record_by_hand():
    assert routing_record(STATS, 8, 5, MoEConfig()) == {
        "routed": 20,
        "dropped": 1,
        "padding": 3,
        "drop_fraction": 1 / 20,
        "expert_load": [pytest.approx([0.5, 0.3, 0.2]), [1.0, 0.0, 0.0]],
        "max_violation": [pytest.approx(0.5), 2.0],
        "router_entropy": [1.0, 0.5],
        "dead_experts": [0, 2],
        "overflow_rounds": [0, 2],
    }


def test_counts_of_a_large_step_do_not_overflow():
    stats = STATS._replace(count_e=np.full((2, 3), 2**30, np.int32))
    assert routing_record(stats, 8, 5, MoEConfig())["routed"] == 6 * 2**30


def test_a_dense_model_and_a_step_of_padding_have_no_routing():
    assert routing_record(None, 8, 5, MoEConfig(every=None)) == {
        "routed": 0,
        "dropped": 0,
        "padding": 3,
        "drop_fraction": 0.0,
        **{n: [] for n in ("expert_load", "max_violation", "router_entropy", "dead_experts")},
        "overflow_rounds": [],
    }
    nothing = RouterStats(*map(np.zeros_like, STATS))
    record = routing_record(nothing, 8, 0, MoEConfig())
    assert (record["padding"], record["drop_fraction"]) == (8, 0.0)
    assert record["router_entropy"] == record["max_violation"] == [0.0, 0.0]


@pytest.mark.parametrize("router", ["random", "balanced"])
def test_a_router_that_is_for_benchmarks_is_named_in_every_record(router):
    assert routing_record(STATS, 8, 5, MoEConfig(router=router))["forced_routing"] == router


def test_loss_record_by_hand():
    terms = {
        "balance": np.array([1.0, 1.5], np.float32),
        "z": np.array([0.25, 0.5], np.float32),
        "importance": np.array([2.0, 0.0], np.float32),
    }
    assert loss_record(terms) == {
        "balance_loss": 2.5,
        "router_z_loss": 0.75,
        "router_losses": {"balance": [1.0, 1.5], "z": [0.25, 0.5], "importance": [2.0, 0.0]},
    }
    nothing = loss_record({})
    assert nothing == {"balance_loss": 0.0, "router_z_loss": 0.0, "router_losses": {}}
    assert type(nothing["balance_loss"]) is float


def test_state_record_by_hand():
    assert state_record({}, MoEConfig()) == {}
    bias = np.array([[3.0, -4.0], [0.0, 0.0]], np.float32)
    assert state_record({"bias": bias}, MoEConfig()) == {
        "router_bias": [[3.0, -4.0], [0.0, 0.0]],
        "router_bias_norm": [5.0, 0.0],
    }
    threshold = np.array([[0.5, 0.25]], np.float32)
    record = state_record({"threshold": threshold}, MoEConfig())
    assert record == {"router_threshold": [[0.5, 0.25]]}
    l1 = np.array([1.0, 3.0], np.float32)
    assert state_record({"l1": l1}, MoEConfig()) == {"l1_coefficient": 2.0}


def test_what_a_step_gives_is_a_record():
    """Names, splits and types: `encode_record` refuses a field that FIELDS does not have."""
    routing = routing_record(STATS, 8, 5, MoEConfig(router="random"))
    terms = {"balance": np.ones(2, np.float32)}
    line = encode_record(_train(1) | routing | loss_record(terms))
    assert _strict(line)["router_losses"] == {"balance": [1.0, 1.0]}
    for state in ({"bias": np.ones((2, 3))}, {"threshold": np.ones((2, 3))}, {"l1": np.ones(2)}):
        record = state_record(state, MoEConfig())
        assert set(_strict(encode_record(_train(1, **record)))) > set(record)
        with pytest.raises(ValueError, match="which the other split holds"):
            encode_record({"step": 1, "split": "eval"} | record)


# Records.


def test_nonfinite_values_are_null_and_named():
    line = encode_record(
        _train(3, loss=math.nan, grad_norm=np.float32(math.inf), max_violation=[0.0, -math.inf])
    )
    assert _strict(line) == {
        "step": 3,
        "split": "train",
        "loss": None,
        "grad_norm": None,
        "max_violation": [0.0, None],
        "nonfinite": {"loss": "nan", "grad_norm": "inf", "max_violation/1": "-inf"},
    }


def test_unknown_value_is_null_without_a_name():
    assert _strict(encode_record(_train(1, mfu=None))) == _train(1, mfu=None)


def test_float32_values_read_back_bit_for_bit():
    values = np.frombuffer(np.random.default_rng(0).bytes(4000), np.float32)
    for value in values[np.isfinite(values)]:
        read = np.float32(_strict(encode_record(_train(1, loss=value)))["loss"])
        assert struct.pack("f", read) == struct.pack("f", value)


def test_equal_values_print_equal_whatever_their_container():
    value = np.float32(0.1)
    lines = {encode_record(_train(1, loss=v)) for v in (value, float(value), np.array(value))}
    assert len(lines) == 1
    assert encode_record(_train(1, loss=np.nextafter(value, np.float32(1)))) not in lines


def test_record_with_domains_and_arrays():
    record = {
        "step": np.int64(5),
        "split": "eval",
        "loss": 1.0,
        "expert_load": np.array([[0.5, 0.5]]),
        "domains": {"english": {"loss": 1.0, "bits_per_byte": 1.4, "tokens": 10}},
    }
    read = _strict(encode_record(record))
    assert read["expert_load"] == [[0.5, 0.5]]
    assert read["domains"] == record["domains"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (_train(1, losss=1.0), r"unknown fields \['losss'\].*docs/metrics.md"),
        (_train(-1), "step=-1"),
        (_train(1.5), "step=1.5"),
        ({"step": 1, "split": "test"}, "split='test'; it must be 'train' or 'eval'"),
        (_train(1, bits_per_byte=1.0), r"\['bits_per_byte'\], which the other split holds"),
    ],
)
def test_wrong_records_are_refused(record, message):
    with pytest.raises(ValueError, match=message):
        encode_record(record)


# The file.


def test_a_record_is_in_the_file_when_write_returns(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    writer.write(_train(1))
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    writer.close()
    writer.close()
    assert [path.exists() for path in writer.files] == [True, True]


def test_resume_drops_later_steps_so_that_each_appears_once(tmp_path):
    _write_steps(tmp_path, range(1, 12))
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:8]
    _write_steps(tmp_path, range(9, 21), start_step=8)
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 21))
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:8] == before


def test_resume_drops_a_torn_line(tmp_path, caplog):
    _write_steps(tmp_path, range(1, 9))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "split": "tr')  # kill -9 in the middle of a line
    assert len(read_metrics(tmp_path)) == 8
    _write_steps(tmp_path, [9], start_step=8)
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 10))
    assert "dropped 1 torn" in caplog.text


def test_a_whole_last_record_without_newline_is_torn_too(tmp_path):
    # Its newline never came, so the next append would glue two records into one line.
    _write_steps(tmp_path, [1])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 2, "split": "train"}')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    _write_steps(tmp_path, [2, 3], start_step=1)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_start_at_zero_begins_a_new_file(tmp_path):
    # The first process died before its first checkpoint.
    _write_steps(tmp_path, [1, 2, 3])
    _write_steps(tmp_path, [1, 2])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_resume_that_changes_nothing_leaves_the_file_alone(tmp_path):
    _write_steps(tmp_path, [1, 2])
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    _write_steps(tmp_path, [3], start_step=2)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == inode


def test_unreadable_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"jsonl line 2 is not a record.*delete that line"):
        read_metrics(tmp_path)


def test_no_file_means_no_records(tmp_path):
    assert read_metrics(tmp_path) == []


def test_disabled_writer_touches_nothing(tmp_path):
    with MetricWriter(tmp_path / "run", 0, enabled=False) as writer:
        writer.write(_train(1))
        writer.write_text("config", "{}")
    assert writer.files == []
    assert not (tmp_path / "run").exists()


def test_unwritable_workdir_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"cannot be written: .*; give another --workdir"):
        MetricWriter(tmp_path / "file", 0)


class _FullDisk:
    """A file that takes half of what it is given, until there is room."""

    closed = False

    def __init__(self, file):
        self.file, self.full = file, True

    def write(self, block):
        return self.file.write(block[: len(block) // 2] if self.full else block)

    def truncate(self, size):
        return self.file.truncate(size)

    def close(self):
        self.file.close()


def test_full_disk_does_not_stop_training_and_loses_nothing(tmp_path, caplog):
    writer = MetricWriter(tmp_path, 0)
    writer.write(_train(1))
    disk = writer._lines._file = _FullDisk(writer._lines._file)
    writer.write(_train(2))
    writer.write(_train(3))
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    assert caplog.text.count("training goes on") == 1
    disk.full = False
    writer.write(_train(4))
    writer.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_records_that_never_found_room_are_counted(tmp_path, caplog):
    writer = MetricWriter(tmp_path, 0)
    writer._lines._file = _FullDisk(writer._lines._file)
    writer.write(_train(1))
    writer.close()
    assert "1 records could not be written" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


# TensorBoard, read back from the bytes of the event files.


def _events(workdir):
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted((workdir / "tensorboard").iterdir(), key=os.path.getmtime):
        data = io.BytesIO(path.read_bytes())
        while header := data.read(12):  # length, its checksum
            event = Event()
            event.ParseFromString(data.read(struct.unpack("<Q", header[:8])[0]))
            data.read(4)  # checksum of the event
            yield event


def _values(workdir):
    return {
        (value.tag, event.step): value
        for event in _events(workdir)
        for value in event.summary.value
    }


def test_tensorboard_has_scalars_layers_domains_and_text(tmp_path):
    with MetricWriter(tmp_path, 0) as writer:
        writer.write_text("config", "model.num_layers: 4")
        writer.write(_train(1, mfu=None, max_violation=[0.5, math.nan, 0.25]))
        writer.write(_train(3, router_losses={"z": [4.0, math.inf], "balance": [1.25, 1.5]}))
        domains = {"code": {"loss": 2.5, "tokens": 7, "bits_per_byte": None}}
        writer.write({"step": 2, "split": "eval", "loss": 3.0, "domains": domains})
    values = _values(tmp_path)
    scalars = {
        key: value.simple_value for key, value in values.items() if value.HasField("simple_value")
    }
    assert scalars == {
        ("train/loss", 1): 1.5,
        ("train/max_violation/layer_00", 1): 0.5,
        ("train/max_violation/layer_02", 1): 0.25,
        ("train/loss", 3): 1.5,
        ("train/router_losses/z/layer_00", 3): 4.0,
        ("train/router_losses/balance/layer_00", 3): 1.25,
        ("train/router_losses/balance/layer_01", 3): 1.5,
        ("eval/loss", 2): 3.0,
        ("eval/domains/code/loss", 2): 2.5,
        ("eval/domains/code/tokens", 2): 7.0,
    }
    assert values["config/text_summary", 0].tensor.string_val == [b"model.num_layers: 4"]


def test_tensorboard_images_at_each_evaluation_and_every_nth_record(tmp_path):
    load = [[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]]
    with MetricWriter(tmp_path, 0, image_every=2) as writer:
        for step in (10, 20, 30):
            writer.write(_train(step, expert_load=load))
        writer.write({"step": 20, "split": "eval", "expert_load": load})
    images = {
        key: value.image for key, value in _values(tmp_path).items() if value.HasField("image")
    }
    assert set(images) == {
        ("train/expert_load", 10),
        ("train/expert_load", 30),
        ("eval/expert_load", 20),
    }
    picture = Image.open(io.BytesIO(images["train/expert_load", 10].encoded_image_string))
    np.testing.assert_array_equal(np.asarray(picture), load_image(load))


def test_tensorboard_shows_the_router_s_bias_as_an_image(tmp_path):
    """White is 0, full red the largest entry; an entry that is not finite is grey, not fatal."""
    with MetricWriter(tmp_path, 0, image_every=1) as writer:
        writer.write(_train(1, router_bias=[[0.5, -0.25, 0.0, math.nan]]))
        writer.write(_train(2, router_bias=[[0.0, 0.0]]))
    images = {key: value.image for key, value in _values(tmp_path).items()}
    picture = np.asarray(
        Image.open(io.BytesIO(images["train/router_bias", 1].encoded_image_string))
    )
    np.testing.assert_array_equal(picture, cell_image(np.array([[2.0, 0.5, 1.0, math.nan]])))


def test_tensorboard_forgets_the_steps_that_a_resume_repeats(tmp_path):
    _write_steps(tmp_path, [1, 2, 3])
    _write_steps(tmp_path, [3, 4], start_step=2)
    starts = [event.step for event in _events(tmp_path) if event.HasField("session_log")]
    assert starts == [3]  # TensorBoard drops steps from 3 on that were written before this event


def test_tensorboard_failure_is_logged_once_and_training_goes_on(tmp_path, caplog):
    writer = MetricWriter(tmp_path, 0)

    def full(event):
        raise OSError("No space left on device")

    writer._board._writer.write_event = full
    for step in (1, 2, 3):
        writer.write(_train(step))
    writer.close()
    assert caplog.text.count("No space left") == 1
    assert len(read_metrics(tmp_path)) == 3


def test_tensorboard_that_cannot_open_does_not_stop_training(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        _write_steps(tmp_path, [1])
    assert "TensorBoard" in caplog.text
    assert len(read_metrics(tmp_path)) == 1


def test_load_image_is_white_at_balance_and_has_whole_cells():
    image = load_image([[0.25] * 4, [1.0, 0.0, 0.0, None]])
    assert image.shape == (2 * 32, 4 * 32, 3)
    assert (image[:32] == 247).all()
    red, blue, unknown = image[40, 0], image[40, 40], image[40, 127]
    assert red[0] > red[2]
    assert blue[2] > blue[0]
    assert (unknown == 128).all()
    assert load_image(np.full((48, 256), 1 / 256)).shape == (48 * 10, 256 * 4, 3)


def test_the_slowest_host_is_named():
    assert host_record({}) == host_record({0: 0.5}) == {}
    found = host_record({0: 0.25, 1: 0.5, 2: 0.125})
    assert list(found.values()) == [0.125, 0.5, 1]
    assert set(found) <= set(FIELDS)


def test_every_field_is_documented_with_its_unit():
    from pathlib import Path

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


def test_a_line_that_is_nested_without_end_is_no_record(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + "[" * 100_000 + "\n")
    with pytest.raises(ValueError, match="line 2 is not a record"):
        read_metrics(tmp_path)
