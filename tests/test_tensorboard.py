"""TensorBoard events, read back from the bytes of the event files."""

import io
import logging
import math
import os
import struct

import numpy as np
from PIL import Image
from test_metric_writer import write_steps
from test_metrics import train_record

from moejax.metric_writer import MetricWriter
from moejax.metrics import read_metrics
from moejax.tensorboard import board_scalars, cell_image, load_image


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


def test_every_number_has_a_name():
    record = {"step": 3, "split": "eval", "loss": 2.0, "max_violation": [0.5, 1.0]}
    record["domains"] = {"en": {"loss": 1.0}}
    assert board_scalars(record) == {
        "eval/loss": 2.0,
        "eval/max_violation/layer_00": 0.5,
        "eval/max_violation/layer_01": 1.0,
        "eval/domains/en/loss": 1.0,
    }


def test_tensorboard_has_scalars_layers_domains_and_text(tmp_path):
    with MetricWriter(tmp_path, 0) as writer:
        writer.write_text("config", "model.num_layers: 4")
        writer.write(train_record(1, mfu=None, max_violation=[0.5, math.nan, 0.25]))
        writer.write(train_record(3, router_losses={"z": [4.0, math.inf], "balance": [1.25, 1.5]}))
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
            writer.write(train_record(step, expert_load=load))
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
        writer.write(train_record(1, router_bias=[[0.5, -0.25, 0.0, math.nan]]))
        writer.write(train_record(2, router_bias=[[0.0, 0.0]]))
    images = {key: value.image for key, value in _values(tmp_path).items()}
    picture = np.asarray(
        Image.open(io.BytesIO(images["train/router_bias", 1].encoded_image_string))
    )
    np.testing.assert_array_equal(picture, cell_image(np.array([[2.0, 0.5, 1.0, math.nan]])))


def test_tensorboard_forgets_the_steps_that_a_resume_repeats(tmp_path):
    write_steps(tmp_path, [1, 2, 3])
    write_steps(tmp_path, [3, 4], start_step=2)
    starts = [event.step for event in _events(tmp_path) if event.HasField("session_log")]
    assert starts == [3]  # TensorBoard drops steps from 3 on that were written before this event


def test_tensorboard_failure_is_logged_once_and_training_goes_on(tmp_path, caplog):
    writer = MetricWriter(tmp_path, 0)

    def full(event):
        raise OSError("No space left on device")

    writer._board._writer.write_event = full
    for step in (1, 2, 3):
        writer.write(train_record(step))
    writer.close()
    assert caplog.text.count("No space left") == 1
    assert len(read_metrics(tmp_path)) == 3


def test_tensorboard_that_cannot_open_does_not_stop_training(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        write_steps(tmp_path, [1])
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
