"""`moejax fsck`: what it finds, what it lets be, and its exit codes."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from test_store import OTHERS, add

from moejax.cli import main
from moejax.config import Config
from moejax.events import Events
from moejax.fsck import fsck, show_findings
from moejax.overrides import apply_overrides, config_to_dict, config_to_json
from moejax.store import Store, start_run
from moejax.workdir import (
    COMMITTED,
    MANIFEST,
    checkpoint_roots,
    open_workdir,
    read_config,
)


@pytest.fixture
def workdir(tmp_path):
    """Two checkpoints in the workdir and one on the local disk."""
    words = [f"checkpoint.local={tmp_path / 'fast'}", "checkpoint.local_every=5"]
    workdir = open_workdir(tmp_path / "run", apply_overrides(Config(), words))
    run = start_run(workdir)
    durable, local = checkpoint_roots(workdir, str(tmp_path / "fast"), run)
    for root, step in ((durable, 20), (durable, 40), (local, 45)):
        add(root, step, run=run)
    (workdir / "metrics.jsonl").write_text('{"step": 1}\n{"step"')
    return workdir


def verdicts(workdir) -> dict[str, str]:
    found = fsck(workdir, Console(file=io.StringIO()))
    return {finding.path.rpartition("/")[2]: finding.verdict for finding in found}


def test_a_sound_run(workdir, tmp_path, capsys):
    assert main(["fsck", "--workdir", str(workdir), "--json", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["step"] for row in rows if row["step"]] == [20, 40, 45]
    assert {row["verdict"] for row in rows} == {"sound"}
    assert "BAD" not in capsys.readouterr().out


def test_an_event_that_a_crash_cut_off_is_no_damage(workdir):
    """The one after it is on a line of its own."""
    events, whole = workdir / "events.jsonl", '{"time": "2026", "step": 1}\n'
    events.write_text(f'{{"time": "20\n{whole}')
    assert verdicts(workdir)["events.jsonl"] == "sound"
    events.write_text(f'{{"time": "20}}\n{whole}')
    assert verdicts(workdir)["events.jsonl"] == "line 1 is not JSON"


def test_every_kind_of_damage_has_its_row(workdir, capsys):
    checkpoints = workdir / "checkpoints"
    run = start_run(workdir)
    data = checkpoints / "20" / "model" / "data"
    data.write_bytes(data.read_bytes()[:-1] + b"!")
    (checkpoints / "40" / MANIFEST).unlink()
    add(checkpoints, 60, run=OTHERS)
    (Store(checkpoints, run).begin(80)).mkdir()
    (checkpoints / "80" / COMMITTED).write_text("")
    (checkpoints / "10.corrupt").mkdir()
    (checkpoints / "logs").mkdir()
    (workdir / "metrics.jsonl").write_text('{"step": 1}\n[1]\n')
    (workdir / "events.jsonl").write_text("nonsense\n")
    found = verdicts(workdir)
    assert found["20"] == "model/data has another SHA-256 than when it was written"
    assert found["40"] == "it has no MANIFEST.json"
    assert found["45"] == "sound"
    assert found["60"] == "of another run; left alone"
    assert found["80"] == "unfinished; removed at the next start"
    assert found["10.corrupt"] == "set aside as unsound"
    assert found["metrics.jsonl"] == "line 2 is not a JSON object"
    assert found["events.jsonl"] == "line 1 is not JSON"
    assert "logs" not in found
    assert main(["fsck", "--workdir", str(workdir)]) == 1
    assert capsys.readouterr().out.count("BAD: ") == 4
    assert (checkpoints / "80").is_dir(), "nothing is changed"


def test_a_config_that_is_gone_is_damage_with_a_way_out(tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(Path(__file__).parent / "data" / "format_1", workdir)
    (workdir / "config.json").unlink()
    assert verdicts(workdir) == {
        "config.json": "missing; the checkpoints have the config: resuming the run writes it again",
        "run.json": "sound",
        "2": "sound",
    }
    assert main(["fsck", "--workdir", str(workdir)]) == 1
    assert not (workdir / "config.json").exists(), "nothing is changed"


def test_a_damaged_config_and_a_lost_id(workdir):
    (workdir / "config.json").write_text("{")
    (workdir / "run.json").unlink()
    found = verdicts(workdir)
    assert "not JSON" in found["config.json"]
    assert found["run.json"].startswith("missing or damaged; the manifests say ")
    assert (found["20"], found["40"]) == ("sound", "sound")


def test_checkpoints_that_are_gone_or_have_another_id_are_told(workdir):
    events, runs = Events(workdir), json.loads((workdir / "run.json").read_text())
    shutil.rmtree(workdir.parent / "fast")
    (workdir / "run.json").write_text(json.dumps(runs | {"run": OTHERS}))
    assert "has checkpoints of another run only" in verdicts(workdir)["run.json"]
    (workdir / "run.json").write_text(json.dumps(runs))
    assert verdicts(workdir)["run.json"] == "sound"
    shutil.rmtree(workdir / "checkpoints")
    events.write("checkpoint_saved", 40, folder=str(workdir / "checkpoints" / "40"))
    assert "tells of those of this run" in verdicts(workdir)["run.json"]


def test_a_config_that_is_not_that_of_the_checkpoints_is_damaged(workdir):
    """A digit of it is another model; nothing else has a checksum of it."""
    config = read_config(workdir)
    root = workdir / "checkpoints"
    folder = Store(root, start_run(workdir)).begin(60)
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "metadata").write_text(json.dumps({"config": config_to_dict(config)}))
    (folder / COMMITTED).write_text("")
    Store(root, start_run(workdir)).seal(60, {}, {}, {})
    assert verdicts(workdir)["config.json"] == "sound"
    for word, sound in (("train.steps=901", True), ("model.rope_theta=10001", False)):
        (workdir / "config.json").write_text(config_to_json(apply_overrides(config, [word])))
        assert (verdicts(workdir)["config.json"] == "sound") == sound
    assert "step 60 was written with another config (model.rope" in verdicts(workdir)["config.json"]
    (folder / MANIFEST).unlink()
    assert verdicts(workdir)["config.json"] == "sound", "what is damaged itself says nothing"


def test_a_checkpoint_of_a_newer_format_is_no_damage(workdir):
    file = workdir / "checkpoints" / "40" / MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2}))
    assert "has format 2, of a newer moejax" in verdicts(workdir)["40"]
    assert main(["fsck", "--workdir", str(workdir)]) == 0


def test_a_checkpoint_that_a_training_deletes_meanwhile_is_no_damage(workdir, monkeypatch):
    plain = Store.check

    def deleted(self, step, progress=None):
        if step == 20:
            self.delete(step)
        return plain(self, step, progress)

    monkeypatch.setattr(Store, "check", deleted)
    assert main(["fsck", "--workdir", str(workdir)]) == 0
    assert "20" not in verdicts(workdir)


def test_a_folder_that_is_none_is_refused(tmp_path, capsys):
    assert main(["fsck", "--workdir", str(tmp_path)]) == 2
    assert "is not a workdir" in capsys.readouterr().err


def test_jax_is_not_imported(workdir):
    code = (
        f"import sys; from moejax.cli import main; assert main(['fsck', '--workdir', "
        f"{str(workdir)!r}]) == 0; assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_links_pipes_and_lines_without_end_are_told_at_once(workdir, tmp_path, capsys):
    (workdir / "metrics.jsonl").unlink()
    (workdir / "metrics.jsonl").touch()
    os.truncate(workdir / "metrics.jsonl", 1 << 42)
    assert verdicts(workdir)["metrics.jsonl"] == "line 1 is longer than 64 MiB"
    (workdir / "metrics.jsonl").unlink()
    os.mkfifo(workdir / "metrics.jsonl")
    assert main(["fsck", "--workdir", str(workdir)]) == 2
    assert "metrics.jsonl is not a file: " in capsys.readouterr().err
    (workdir / "metrics.jsonl").unlink()
    (workdir / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    assert main(["fsck", "--workdir", str(workdir)]) == 2
    assert "metrics.jsonl is a link: " in capsys.readouterr().err


def test_names_in_a_checkpoint_cannot_steer_the_terminal(workdir, capsys):
    (workdir / "checkpoints" / "20" / "\x1b[2J[red]").write_text("")
    assert main(["fsck", "--workdir", str(workdir)]) == 1
    assert "\x1b" not in capsys.readouterr().out
    out = io.StringIO()
    show_findings(fsck(workdir, Console(file=io.StringIO())), Console(file=out, width=300))
    assert "BAD: \\x1b[2J[red] is not its own" in out.getvalue()
