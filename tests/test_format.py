"""Checkpoints that older versions wrote: each format stays readable (docs/checkpoints.md).

`tests/data/format_1` is a run of 2 steps, less its metrics; its config.json says of what.
"""

import hashlib
import io
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from moejax import manifest
from moejax.checkpoint import Checkpoints, table_of
from moejax.fsck import fsck
from moejax.mesh import make_mesh
from moejax.step import make_train_step
from moejax.workdir import checkpoint_steps, read_config

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize(
    ("name", "digest"),
    [("format_1", "4c99f057f252def5e727d285f0782512613e7f07e179b31b6dc6e10fb5e0bebb")],
)
def test_a_checkpoint_of_every_format_is_restored_bit_for_bit(tmp_path, name, digest):
    workdir = Path(shutil.copytree(DATA / name, tmp_path / "run"))
    config = read_config(workdir)
    abstract = make_train_step(config, make_mesh(config.mesh, jax.devices()[:1]))[1]
    with Checkpoints(workdir, config.checkpoint) as checkpoints:
        resumed = checkpoints.resume(abstract)
    assert resumed is not None
    assert resumed.step == int(resumed.state.step) == 2
    assert resumed.meta["counters"]["tokens_seen"] > 0
    leaves = jax.tree.leaves(resumed.state)
    assert len(leaves) == len(table_of(resumed.state)) > 20
    digests = b"".join(hashlib.sha256(np.asarray(leaf).tobytes()).digest() for leaf in leaves)
    assert hashlib.sha256(digests).hexdigest() == digest
    assert checkpoint_steps(workdir) == [2], "nothing was set aside"


def test_the_kept_checkpoints_are_sound_and_of_every_format():
    formats = sorted(DATA.glob("format_*"))
    assert [path.name for path in formats] == [f"format_{n + 1}" for n in range(manifest.FORMAT)]
    for path in formats:
        assert not any(finding.bad for finding in fsck(path, Console(file=io.StringIO())))
