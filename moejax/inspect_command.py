"""`moejax inspect`: checkpoints of workdirs looked into, compared and shown."""

import argparse
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from moejax.atlas import Atlas, TokenView, save_atlas
from moejax.atlas_show import (
    agreement_json,
    atlas_json,
    plot_view,
    show_agreement,
    show_atlas,
    show_view,
    view_json,
)
from moejax.config import Config
from moejax.corpus import load_corpus
from moejax.errors import require
from moejax.evaluate import restore_for_use
from moejax.foreign import write_json
from moejax.inspect import REMOVED, Inspector, layer_numbers
from moejax.mesh import Device
from moejax.tallies import Agreement, agreement
from moejax.tokenizer import load_tokenizer
from moejax.workdir import atlas_file, checkpoint_steps, find_manifest

log = logging.getLogger("moejax")

EARLIER = 8  # checkpoints that the atlas looks back to


def atlas_of_workdir(
    config: Config,
    workdir: Path,
    step: int | None,
    remove: int = REMOVED,
    devices: list[Device] | None = None,
) -> Atlas:
    """Returns the atlas of a checkpoint, and writes it into the workdir.

    It looks back to at most `EARLIER` of the checkpoints before it, the latest ones.

    Args:
        step: None for the last one.
        devices: default: all.

    Raises:
        ConfigError: no such checkpoint, no expert, or the mesh does not fit.
    """
    restored = restore_for_use(config, workdir, step, devices)
    inspector = Inspector(config, restored.mesh)
    steps = [s for s in checkpoint_steps(workdir, config.checkpoint.local) if s < restored.step]

    def earlier():
        for one in steps[-EARLIER:]:
            log.info("inspect: comparing with the checkpoint of step %d", one)
            before = restore_for_use(config, workdir, one, devices)
            yield one, before.params, before.router_state

    atlas = inspector.atlas(
        restored.step, restored.params, restored.router_state, remove=remove, earlier=earlier()
    )
    manifest = find_manifest(workdir, config.checkpoint.local, restored.step)
    if manifest is not None:
        atlas = dataclasses.replace(atlas, run=manifest.run, checkpoint=manifest.digest)
    if jax.process_index() == 0:
        save_atlas(atlas, atlas_file(workdir, restored.step))
    return atlas


def views_of_workdir(
    config: Config,
    workdir: Path,
    step: int | None,
    texts: Sequence[str],
    devices: list[Device] | None = None,
) -> tuple[int, list[TokenView]]:
    """Returns a checkpoint's step and what it does with each text; see `Inspector.view`."""
    restored = restore_for_use(config, workdir, step, devices)
    inspector = Inspector(config, restored.mesh)
    model = restored.params, restored.router_state
    encode = inspector.tokenizer.encode
    return restored.step, [inspector.view(*model, encode(text), text[:60]) for text in texts]


class Compared(NamedTuple):
    """The agreement of two checkpoints, the first and the second."""

    steps: tuple[int, int]
    tokens: int
    layers_l: np.ndarray
    agreement: Agreement


def agreement_of_workdirs(
    config: Config,
    workdir: Path,
    step: int | None,
    other_config: Config,
    other: Path,
    other_step: int | None,
    devices: list[Device] | None = None,
) -> Compared:
    """Compares how two checkpoints route the validation text of the first.

    Raises:
        ConfigError: they differ in tokenizer or in the number of MoE layers.
    """
    fingerprints = [load_tokenizer(c.data.tokenizer).fingerprint for c in (config, other_config)]
    require(
        fingerprints[0] == fingerprints[1],
        f"{workdir} has data.tokenizer={config.data.tokenizer!r} and {other} "
        f"{other_config.data.tokenizer!r}: they do not see the same tokens; compare runs of one "
        "tokenizer",
    )
    require(
        config.num_moe_layers == other_config.num_moe_layers,
        f"{workdir} has {config.num_moe_layers} MoE layers and {other} "
        f"{other_config.num_moe_layers}; routing is compared layer by layer, give runs with as "
        "many",
    )
    experts = max(config.moe.choices, other_config.moe.choices)
    corpus = load_corpus(config.data, "validation")
    steps, found = [], []
    for one, folder, at in ((config, workdir, step), (other_config, other, other_step)):
        # the text of the first, in its batches: the same tokens in the same order
        one = dataclasses.replace(one, data=config.data, eval=config.eval, mesh=config.mesh)
        one = dataclasses.replace(one, train=config.train)
        restored = restore_for_use(one, folder, at, devices)
        inspector = Inspector(one, restored.mesh, corpus)
        choices = inspector.choices(restored.params, restored.router_state)
        found.append(np.where(choices < one.moe.choices, choices, experts))
        steps.append(restored.step)
    a, b = found
    return Compared(
        (steps[0], steps[1]), a.shape[1], layer_numbers(config), agreement(a, b, experts)
    )


def inspect_workdir(config: Config, other: Config | None, options: argparse.Namespace) -> None:
    """Does what a line of `moejax inspect` asks for, and shows it.

    Args:
        other: config of `options.against`.
    """
    workdir, layers_l = Path(options.workdir), layer_numbers(config)
    if options.text is not None:
        step, (view,) = views_of_workdir(config, workdir, options.step, [options.text])
        show_view(step, view, layers_l)
        result = view_json(step, view, layers_l)
        if options.png:
            plot_view(view, layers_l, options.png)
    elif other is not None:
        compared = agreement_of_workdirs(
            config, workdir, options.step, other, Path(options.against), options.against_step
        )
        show_agreement(*compared)
        result = agreement_json(*compared)
    else:
        remove = REMOVED if options.remove is None else options.remove
        atlas = atlas_of_workdir(config, workdir, options.step, remove)
        show_atlas(atlas)
        print(f"wrote {atlas_file(workdir, atlas.step)}")
        result = atlas_json(atlas)
    if options.json:
        write_json(options.json, json.dumps(result, allow_nan=False))
