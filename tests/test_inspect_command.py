"""`moejax inspect` on a model that was trained: the atlas, a text, two checkpoints."""

import dataclasses
import functools
import json
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax.atlas import load_atlas
from moejax.cli import main
from moejax.errors import ConfigError
from moejax.inspect_command import agreement_of_workdirs
from moejax.mesh import make_mesh
from moejax.metrics import read_metrics
from moejax.overrides import apply_overrides
from moejax.workdir import find_manifest, read_config

TRAINED = [
    *("model.num_layers=2", "model.d_model=32", "model.num_heads=2", "model.num_kv_heads=1"),
    *("model.head_dim=16", "moe.num_experts=4", "moe.expert_hidden=32", "data.sequence_length=64"),
    *("train.batch_size=8", "train.steps=150", "checkpoint.every=50", "checkpoint.keep=3"),
    *("eval.batches=8", "eval.every=150", "logging.every=50", "optim.learning_rate=0.01"),
    *("mesh.data=1", "mesh.expert=1"),
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run on one device, which `inspect` uses too."""
    workdir = tmp_path_factory.mktemp("inspect") / "run"
    words = ["configs/quickstart.py", "--workdir", str(workdir), *TRAINED]
    with pytest.MonkeyPatch.context() as patch:
        for module in ("loop", "evaluate"):
            make = functools.partial(make_mesh, devices=jax.devices()[:1])
            patch.setattr(
                f"moejax.{module}.make_mesh", lambda sizes, _=None, make=make: make(sizes)
            )
        assert main(["train", *words]) == 0
        yield workdir


@pytest.fixture(scope="module")
def written(workdir):
    file = workdir / "atlas.json"
    assert main(["inspect", "--workdir", str(workdir), "--json", str(file)]) == 0
    return load_atlas(workdir / "atlas" / "150.npz"), json.loads(file.read_text())


@pytest.mark.slow
def test_removing_an_expert_costs_its_own_tokens_most(written):
    atlas, _ = written
    load_le = atlas.load_dle.sum(0)
    used_le = load_le > 0.02 * load_le.sum(1, keepdims=True)
    assert used_le.sum() >= 6
    own_le, other_le = atlas.removed_own_le, atlas.removed_other_le
    assert (own_le[used_le] > other_le[used_le]).mean() >= 0.75
    # the first layer carries most of so small a model
    assert (own_le[0] > 0.05).all()
    assert (own_le[0] > 5 * np.abs(other_le[0])).all()
    assert (atlas.norm_le[used_le] > 0).all()
    # the last layer reaches no other token's loss
    np.testing.assert_allclose(atlas.removed_other_le[1], 0, atol=1e-6)


def test_an_atlas_names_its_checkpoint(workdir, written):
    manifest = find_manifest(workdir, None, 150)
    assert manifest is not None
    assert (written[0].run, written[0].checkpoint) == (manifest.run, manifest.digest)


def test_parts_of_the_loss_add_up(written):
    """What is lost over all tokens is the mean over those that take an expert and the others."""
    atlas, _ = written
    low = np.minimum(atlas.removed_own_le, atlas.removed_other_le) - 1e-6
    high = np.maximum(atlas.removed_own_le, atlas.removed_other_le) + 1e-6
    assert ((low <= atlas.removed_le) & (atlas.removed_le <= high)).all()


def test_counts_agree_with_each_other_and_with_evaluation(workdir, written):
    atlas, _ = written
    load_le = atlas.load_dle.sum(0)
    assert (load_le.sum(1) == 2 * atlas.tokens).all()
    np.testing.assert_array_equal(atlas.load_ple.sum(0), load_le)
    np.testing.assert_array_equal(np.diagonal(atlas.coactivation_lee, axis1=1, axis2=2), load_le)
    off_le = atlas.coactivation_lee.sum(2) - load_le
    np.testing.assert_array_equal(off_le, load_le)  # top 2: one other expert each time
    record = [r for r in read_metrics(workdir) if r["split"] == "eval"][-1]
    share_le = load_le / load_le.sum(1, keepdims=True)
    np.testing.assert_allclose(share_le, record["expert_load"], atol=1e-6)


def test_saturation_is_of_the_earlier_checkpoints(written):
    atlas, _ = written
    assert atlas.saturation_steps.tolist() == [50, 100]
    assert ((atlas.saturation_sl > 0.2) & (atlas.saturation_sl < 1)).all()


def test_the_json_says_what_the_atlas_does(written):
    atlas, record = written
    assert record["tokens"] == atlas.tokens
    assert len(record["experts"]) == 8
    last = record["experts"][-1]
    assert (last["layer"], last["expert"]) == (1, 3)
    assert last["removed_own"] == pytest.approx(float(atlas.removed_own_le[1, 3]))
    assert last["assignments"] == atlas.load_dle[:, 1, 3].sum()
    assert list(record["saturation"]) == ["50", "100"]


def test_a_text_is_shown_token_by_token(workdir, tmp_path, capsys):
    files = ["--json", str(tmp_path / "t.json"), "--png", str(tmp_path / "t.png")]
    text = "Señor $x_1$ [b] " * 3 + "漢"  # 54 tokens; nothing of it is markup
    assert main(["inspect", "--workdir", str(workdir), "--text", text, *files]) == 0
    record = json.loads((tmp_path / "t.json").read_text())
    assert "".join(record["tokens"]) == text
    assert record["loss"][0] is None
    assert min(record["loss"][1:]) > 0
    assert [layer["layer"] for layer in record["layers"]] == [0, 1]
    for layer in record["layers"]:
        assert {len(row) for row in layer["experts"]} == {2}
        assert np.sum(layer["weights"], axis=1) == pytest.approx(1, rel=1e-5)
        assert all(a >= b for a, b in layer["weights"])
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    assert "step 150" in capsys.readouterr().out


def test_two_steps_of_one_run_are_compared(workdir, tmp_path, capsys):
    file = tmp_path / "agreement.json"
    line = ["inspect", "--workdir", str(workdir), "--against", str(workdir), "--json", str(file)]
    assert main([*line, "--step", "50", "--against_step", "150"]) == 0
    record = json.loads(file.read_text())
    assert record["steps"] == [50, 150]
    atlas = load_atlas(workdir / "atlas" / "150.npz")
    assert record["same"] == pytest.approx(atlas.saturation_sl[0].tolist(), rel=1e-5)
    assert main([*line, "--step", "150"]) == 0
    assert json.loads(file.read_text())["same"] == [1, 1]
    assert "by chance" in capsys.readouterr().out


def test_other_layers_and_other_tokens_are_not_compared(workdir, monkeypatch):
    config = read_config(workdir)
    other = apply_overrides(config, ["model.num_layers=3"])
    compare = functools.partial(agreement_of_workdirs, config, workdir, None)
    with pytest.raises(ConfigError, match=r"has 2 MoE layers and .* 3; routing is compared layer"):
        compare(other, Path("b"), None)
    names = types.SimpleNamespace
    monkeypatch.setattr(
        "moejax.inspect_command.load_tokenizer", lambda name: names(fingerprint=name)
    )
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="b.json"))
    with pytest.raises(ConfigError, match="do not see the same tokens; compare runs of one"):
        compare(other, Path("b"), None)


def test_inspecting_an_empty_workdir_says_what_is_missing(workdir, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((workdir / "config.json").read_bytes())
    assert main(["inspect", "--workdir", str(tmp_path)]) == 2
    assert "holds no checkpoint; train first" in capsys.readouterr().err
