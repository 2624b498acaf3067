"""Who owns a workdir, and what may change when its training is resumed."""

import dataclasses
import os
import re
import shutil
import stat
from pathlib import Path

import pytest

from moejax.config import Config, ConfigError
from moejax.errors import NoSpaceError, StorageError
from moejax.eval_series import EVAL_SERIES
from moejax.events import EVENTS
from moejax.ledger import LEDGER
from moejax.lock import LOCK
from moejax.overrides import apply_overrides, config_to_dict, keys
from moejax.replay import FOLDER as CHOICES
from moejax.workdir import (
    CHECKPOINTS,
    COMMITTED,
    CONFIG,
    EXPERT_LOAD_PLOT,
    FILES,
    FOLDERS,
    LOSS_PLOT,
    MANIFEST,
    MAY_CHANGE,
    MAY_CHANGE_AFTER_TRAINING,
    META_FILE,
    METRICS,
    RUN,
    TENSORBOARD,
    check_workdir,
    checkpoint_roots,
    checkpoint_steps,
    matches,
    open_workdir,
    read_config,
    read_run,
    require_config_of,
)

KEPT = Path(__file__).parent / "data" / "format_1"


def add_checkpoint(workdir, step: int) -> None:
    folder = workdir / "checkpoints" / str(step)
    folder.mkdir(parents=True)
    (folder / COMMITTED).write_text("")
    (folder / MANIFEST).write_text("")


def test_the_config_is_stored_and_read_back(tmp_path):
    config = apply_overrides(Config(), ["moe.capacity_factor=None", "seed=5"])
    workdir = open_workdir(tmp_path / "runs" / "a", config)
    assert read_config(workdir) == config
    assert [entry.name for entry in workdir.iterdir()] == [CONFIG]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((workdir / CONFIG).stat().st_mode) == 0o666 & ~umask


def test_without_checkpoints_another_config_takes_the_workdir(tmp_path):
    open_workdir(tmp_path, Config())
    open_workdir(tmp_path, Config(seed=1))
    assert read_config(tmp_path).seed == 1


def test_resuming_with_another_config_is_refused_with_all_differing_keys(tmp_path):
    open_workdir(tmp_path, Config())
    add_checkpoint(tmp_path, 9)
    add_checkpoint(tmp_path, 40)
    other = apply_overrides(Config(), ["optim.learning_rate=0.1", "moe.router=sigmoid_bias"])
    with pytest.raises(ConfigError) as caught:
        open_workdir(tmp_path, other)
    message = str(caught.value)
    assert "has checkpoints up to step 40 of another config" in message
    assert "(moe.router 'softmax' -> 'sigmoid_bias', optim.learning_rate 0.003 -> 0.1)" in message
    assert "another --workdir" in message
    assert "\n" not in message
    assert read_config(tmp_path) == Config()


def test_what_may_change_may_change_and_is_stored(tmp_path):
    open_workdir(tmp_path, Config())
    add_checkpoint(tmp_path, 9)
    words = ["train.steps=7", "train.accumulation=2", "logging.every=3", "checkpoint.every=4"]
    words += ["checkpoint.local=fast", "checkpoint.local_every=2", "checkpoint.wait_seconds=9"]
    words += ["checkpoint.keep=5", "eval.every=None", "eval.batches=1", "mesh.data=1"]
    words += ["mesh.fsdp=2", "mesh.expert=4", "mesh.tensor=2"]
    words += ["mesh.context=2", "mesh.expert_fsdp=2"]
    words += ["model.remat=full", "model.loss_chunk=256", "data.timeout_seconds=60"]
    words += ["watch.nonfinite=skip", "watch.loss_spike=rollback", "watch.grad_norm_spike=stop"]
    words += ["watch.spike_sigma=5", "watch.max_consecutive_skips=3", "watch.max_rollbacks=1"]
    words += ["watch.collapse=stop", "watch.collapse_steps=9", "watch.max_violation=2"]
    words += ["watch.max_dead_experts=0.4", "watch.max_drop_fraction=0.4"]
    words += ["watch.max_router_logit=30", "watch.skip_batches=4-7", "watch.mismatch=warn"]
    words += ["watch.replicas_every=5", "watch.recompute_every=7"]
    words += ["watchdog.step_seconds=5", "watchdog.slow_seconds=9"]
    config = apply_overrides(Config(), words)
    open_workdir(tmp_path, config)
    assert read_config(tmp_path) == config
    assert {word.partition("=")[0] for word in words} == {
        name for name in keys() if matches(name, MAY_CHANGE) and name != "data.on_corrupt"
    }  # which the embedded text does not read


def test_the_config_that_a_checkpoint_has_checksums_for_is_the_true_one():
    """Bits of config.json: those that may differ for a purpose, and those that make another run."""
    stored = config_to_dict(Config())
    changed = apply_overrides(Config(), ["train.steps=9", "model.dtype=bfloat16"])
    require_config_of(40, stored, Config())
    moved = ["data.source=prepared", "data.path=elsewhere", "data.tokenizer=x/tokenizer.json"]
    at_first = apply_overrides(Config(), ["data.source=prepared", "data.path=here"])
    require_config_of(40, config_to_dict(at_first), apply_overrides(Config(), moved))
    require_config_of(40, stored, changed, (*MAY_CHANGE, *MAY_CHANGE_AFTER_TRAINING))
    said = r"step 40 was written with another config \(model\.dtype 'float32' -> 'bfloat16'\); wh"
    with pytest.raises(ConfigError, match=said):
        require_config_of(40, stored, changed)
    for hostile in (None, [], {"model": 3}, {"model": {"d_model": "x"}}, {"no_such": {}}):
        with pytest.raises(ConfigError, match="step 40 has no usable config in its meta: "):
            require_config_of(40, hostile, Config())


def test_a_folder_of_checkpoints_without_a_config_is_nobodys_to_resume(tmp_path):
    add_checkpoint(tmp_path, 9)
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        open_workdir(tmp_path, Config())


@pytest.fixture
def kept(tmp_path) -> Path:
    """A run of 2 steps whose config.json is gone."""
    workdir = Path(shutil.copytree(KEPT, tmp_path / "kept"))
    (workdir / CONFIG).unlink()
    return workdir


def test_a_config_that_is_gone_is_that_of_the_checkpoint(kept, capsys):
    config = read_config(KEPT)
    assert read_config(kept) == read_config(kept) == config
    said = capsys.readouterr().err
    assert (
        said.count("config.json is missing; the config is that of the checkpoint of step 2;") == 1
    )
    with pytest.raises(
        ConfigError, match=r"step 2 was written with another config \(seed 0 -> 9\)"
    ):
        open_workdir(kept, dataclasses.replace(config, seed=9))
    assert not (kept / CONFIG).exists(), "only a run that goes on writes it"
    open_workdir(kept, apply_overrides(config, ["train.steps=9"]))
    assert read_config(kept).train.steps == 9
    assert not capsys.readouterr().err


def test_a_config_that_is_gone_is_found_on_the_local_disk(kept, tmp_path):
    """Its manifest is of this run, and no checkpoint is in the workdir yet."""
    local = {"checkpoint.local": str(tmp_path / "fast"), "checkpoint.local_every": 1}
    config = apply_overrides(read_config(KEPT), [f"{key}={value}" for key, value in local.items()])
    durable, fast = checkpoint_roots(kept, config.checkpoint.local, read_run(kept))
    shutil.move(durable, fast)
    assert open_workdir(kept, config) == kept
    (kept / CONFIG).unlink()
    with pytest.raises(
        ConfigError, match=r"step 2 was written with another config \(seed 0 -> 9\)"
    ):
        open_workdir(kept, dataclasses.replace(config, seed=9))


@pytest.mark.parametrize("damage", ["a digit", "of another run", "no config"])
def test_a_config_that_a_checkpoint_does_not_vouch_for_is_not_taken(kept, damage):
    file = kept / CHECKPOINTS / "2" / META_FILE
    if damage == "a digit":
        file.write_text(file.read_text().replace('"num_experts": 4', '"num_experts": 5'))
    elif damage == "no config":
        file.write_text("[]")
    else:
        (kept / RUN).write_text((kept / RUN).read_text().replace(str(read_run(kept)), "0" * 16))
    with pytest.raises(ConfigError, match=r"config\.json does not exist; give a workdir"):
        read_config(kept)


def test_a_config_that_is_damaged_has_a_way_out(kept):
    for content, said in ((b"{", "not JSON: "), (b"\xff\xfe", "cannot be read: ")):
        (kept / CONFIG).write_bytes(content)
        way = r"; move the file away: the checkpoint of step 2 has the config too$"
        with pytest.raises(ConfigError, match=said + ".*" + way):
            read_config(kept)


def test_only_folders_named_by_a_number_are_checkpoints(tmp_path):
    for step in (10, 9):
        add_checkpoint(tmp_path, step)
    (tmp_path / "checkpoints" / "11.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "checkpoints" / "12").write_text("")
    (tmp_path / "checkpoints" / "13").mkdir()  # a save that was killed has no marker
    add_checkpoint(tmp_path, 14)
    (tmp_path / "checkpoints" / "14" / MANIFEST).unlink()  # killed a moment later
    add_checkpoint(tmp_path, 15)
    (tmp_path / "checkpoints" / "15").rename(tmp_path / "checkpoints" / "015")
    (tmp_path / "checkpoints" / "16").symlink_to("9")
    assert checkpoint_steps(tmp_path) == [9, 10]
    assert checkpoint_steps(tmp_path / "elsewhere") == []


def test_a_copy_of_a_workdir_has_a_local_folder_of_its_own(tmp_path):
    """It has the same run: on the same disk it would go on from the other's checkpoints."""
    run = "0123456789abcdef"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("a")
    roots = {
        name: checkpoint_roots(tmp_path / name, str(tmp_path / "fast"), run)
        for name in ("a", "b", "link")
    }
    assert roots["a"] == roots["link"]
    assert roots["a"][1] != roots["b"][1]
    for _, local in roots.values():
        assert local.parent == tmp_path / "fast"
        assert local.name.startswith(run)


def test_a_workdir_must_be_a_folder_that_can_be_written(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match=r"file is a file; give a folder, for example --workdir"):
        open_workdir(file, Config())
    with pytest.raises(
        ConfigError, match="cannot be written: Not a directory; give another --work"
    ):
        open_workdir(file / "below", Config())

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(NoSpaceError, match="cannot be written: No space left on device"):
        open_workdir(tmp_path / "full", Config())
    assert list((tmp_path / "full").iterdir()) == []


def test_reading_a_folder_that_is_not_a_workdir_says_so(tmp_path):
    with pytest.raises(
        ConfigError, match=r"does not exist; give a workdir that `moejax train` wro"
    ):
        read_config(tmp_path)
    (tmp_path / CONFIG).write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read: "):
        read_config(tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: not JSON: "):
        read_config(tmp_path)


def test_a_crash_while_writing_keeps_the_old_config(tmp_path, monkeypatch):
    open_workdir(tmp_path, Config())

    def crash(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(StorageError, match="Input/output error"):
        open_workdir(tmp_path, dataclasses.replace(Config(), seed=1))
    assert read_config(tmp_path) == Config()


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_a_name_of_the_run_that_is_a_link_is_refused_before_anything_is_written(tmp_path, name):
    """Else `train` would append to, rename or delete what lies elsewhere."""
    workdir, outside = tmp_path / "run", tmp_path / "outside"
    workdir.mkdir()
    outside.write_text("precious") if name in FILES else outside.mkdir()
    (workdir / name).symlink_to(outside)
    for use in (check_workdir, open_workdir):
        with pytest.raises(ConfigError, match=rf"{re.escape(name)} is a link: .* move it away"):
            use(workdir, Config())
    with pytest.raises(ConfigError, match="is a link"):
        read_config(workdir)
    assert outside.is_dir() or outside.read_text() == "precious"


def test_a_pipe_is_not_waited_for_and_a_workdir_may_itself_be_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "config.json")
    with pytest.raises(ConfigError, match=r"config\.json is not a file"):
        read_config(tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    (tmp_path / "link").symlink_to("run")
    open_workdir(tmp_path / "link", Config(seed=3))
    assert read_config(tmp_path / "run").seed == 3


def test_every_name_that_a_module_gives_a_file_of_the_run_is_known():
    known = {*FILES, *FOLDERS}
    assert {EVENTS, LEDGER, LOCK, CONFIG, RUN, METRICS, LOSS_PLOT, EXPERT_LOAD_PLOT} <= known
    assert {CHECKPOINTS, TENSORBOARD, CHOICES, EVAL_SERIES, "wandb"} <= known


def test_the_config_is_not_written_through_a_link_of_the_temporary_name(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / f".config.json.{os.getpid()}").symlink_to("precious")
    with pytest.raises(ConfigError, match="cannot be written: Too many levels of symbolic links"):
        open_workdir(tmp_path, Config())
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_config_without_end_is_not_read(tmp_path):
    open_workdir(tmp_path, Config())
    os.truncate(tmp_path / "config.json", 1 << 42)
    with pytest.raises(ConfigError, match=r"cannot be read: .*larger than 16 MiB"):
        read_config(tmp_path)
