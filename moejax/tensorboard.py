"""Records as TensorBoard shows them: a number a tag, and images of the experts of each layer."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moejax.metrics import FIELDS, encode_record
from moejax.records import relative_load, table

_log = logging.getLogger("moejax")


def board_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns every number of a record by its name on a board: `train/max_violation/layer_03`."""
    plain = json.loads(encode_record(record))
    return {f"{plain['split']}/{tag}": value for tag, value in _scalars(plain)}


class TensorBoard:
    """Writes records as TensorBoard events; its first failure switches it off.

    Events are written in this thread. tensorboardX's `SummaryWriter` hands them to another thread
    through a bounded queue: when that one dies (disk full), the trainer waits on it for ever.

    Args:
        folder: of the event files, made if missing.
        start_step: last step that is already done; later ones of an earlier process are forgotten.
        image_every: images are written at each evaluation and at each n-th train record.
    """

    def __init__(self, folder: Path, start_step: int, image_every: int):
        self.folder = folder
        self._image_every = image_every
        self._train_records = 0
        self._writer: Any = None
        self._attempt(self._open, start_step)

    def write(self, record: dict[str, Any]) -> None:
        """Writes a record that `metrics.encode_record` has made plain."""
        if self._writer is not None:
            self._attempt(self._write_record, record)

    def write_text(self, name: str, text: str) -> None:
        """Shows a text under the Text tab."""
        if self._writer is not None:
            self._attempt(self._write_text, name, text)

    def close(self) -> None:
        """Closes the event file. Closing twice is harmless."""
        if self._writer is not None:
            self._attempt(self._writer.close)
            self._writer = None

    def _attempt(self, function, *args) -> None:
        try:
            function(*args)
        except Exception as error:  # of any kind: a display must never end a training
            _log.warning("TensorBoard events in %s are off from here on: %r", self.folder, error)
            with contextlib.suppress(Exception):
                self._writer.close()
            self._writer = None

    def _open(self, start_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(self.folder / "events"), f".{os.getpid()}.{start_step}")
        if start_step:  # TensorBoard then forgets what an earlier process wrote from this step on
            protos = _protos()
            restart = protos.SessionLog(status=protos.SessionLog.START)
            self._writer.write_event(protos.Event(step=start_step + 1, session_log=restart))
        self._writer.flush()

    def _write_record(self, record: dict[str, Any]) -> None:
        from tensorboardX import summary

        split = record["split"]
        event = _protos().Event(wall_time=time.time(), step=record["step"])
        for tag, value in _scalars(record):
            event.summary.value.add(tag=f"{split}/{tag}", simple_value=value)
        due = split == "eval" or self._train_records % self._image_every == 0
        self._train_records += split == "train"
        for name, image in _images(record) if due else ():
            event.summary.MergeFrom(summary.image(f"{split}/{name}", image, dataformats="HWC"))
        self._write_event(event)

    def _write_text(self, name: str, text: str) -> None:
        from tensorboardX import summary

        content = summary.text(name, text)
        self._write_event(_protos().Event(wall_time=time.time(), step=0, summary=content))

    def _write_event(self, event: Any) -> None:
        self._writer.write_event(event)
        self._writer.flush()


def _protos() -> Any:
    """The message types of event files; protobuf makes their names when the module is imported."""
    from tensorboardX.proto import event_pb2

    return event_pb2


def _scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields (tag, value) for every number of a record, one a layer where a field has layers."""
    for name, value in record.items():
        shape = FIELDS[name].shape
        if name == "step" or value is None or isinstance(value, str):
            continue
        if shape == "scalar":
            yield name, value
        elif shape == "layers":
            for layer, item in enumerate(value):
                if item is not None:
                    yield f"{name}/layer_{layer:02d}", item
        elif shape == "terms":
            for term, items in value.items():
                for layer, item in enumerate(items):
                    if item is not None:
                        yield f"{name}/{term}/layer_{layer:02d}", item
        elif shape == "domains":
            for domain, fields in value.items():
                for field, item in fields.items():
                    if item is not None:
                        yield f"{name}/{domain}/{field}", item


def _images(record: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, image) for the fields of a record that have a cell a layer and expert."""
    if load := record.get("expert_load"):
        yield "expert_load", load_image(load)
    if bias := record.get("router_bias"):
        bias_le = table(bias)
        largest = np.nanmax(np.abs(bias_le), initial=1e-12)
        yield "router_bias", cell_image(1 + bias_le / largest)


def load_image(load_le: list[list[float | None]]) -> np.ndarray:
    """Returns expert load as an image: white is the balanced load 1/E, full red twice that."""
    return cell_image(relative_load(load_le))


def cell_image(relative_le: np.ndarray, *, pixels: int = 512) -> np.ndarray:
    """Returns values as an image [height, width, 3] of uint8: layers down, experts across.

    White is 1, red more (full at 2), blue less (full at 0), grey not known, or behind a layer's
    experts. A cell is whole pixels, so that the image of a wide model stays sharp.
    """
    layers, experts = relative_le.shape
    stops = [0.0, 0.5, 1.0, 1.5, 2.0]
    channels = (  # from blue over white to red
        [33, 146, 247, 244, 178],
        [102, 197, 247, 165, 24],
        [172, 222, 247, 130, 43],
    )
    image_lec = np.stack([np.interp(relative_le, stops, channel) for channel in channels], axis=-1)
    image_lec = np.where(np.isnan(image_lec), 128, image_lec).round().astype(np.uint8)
    cell_height, cell_width = (max(4, min(32, pixels // size)) for size in (layers, experts))
    return image_lec.repeat(cell_height, axis=0).repeat(cell_width, axis=1)
