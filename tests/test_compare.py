"""`moejax compare`: runs that are written by hand, and the recorded runs of docs/quickstart.md."""

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from PIL import Image
from tensorboardX.proto import event_pb2, plugin_hparams_pb2

from moejax import compare as c
from moejax.cli import main
from moejax.config import Config, ConfigError
from moejax.flops import flops_per_token
from moejax.overrides import apply_overrides, load_config
from moejax.store import Store, start_run
from moejax.workdir import CHECKPOINTS, COMMITTED, open_workdir

ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "tests" / "data" / "quickstart"
CONFIGS = {"moe": "configs/quickstart.py", "dense": "configs/quickstart_dense.py"}
# Lines of docs/quickstart.md as of 2026-11-22, whose runs were recorded.
QUICKSTART = [
    "| parameters, total | 3,419,520 | 671,104 |",
    "| parameters, active | 667,008 | 671,104 |",
    "| FLOPs per token | 4,577,280 | 4,601,856 |",
    "| loss, learning rate 0.003, seed 0 | 1.5060 | 1.5663 |",
    "| loss, learning rate 0.006, seed 0 | 1.5366 | 1.5732 |",
    "| learning rate chosen | 0.003 | 0.003 |",
    "| loss, seed 0 | 1.5060 | 1.5663 |",
    "| loss, seed 1 | 1.5275 | 1.5570 |",
    "| loss, seed 2 | 1.4944 | 1.5412 |",
    "| loss, mean of seeds | **1.5093** | **1.5548** |",
    "| seconds in steps, mean | 565 | 436 |",
    "The MoE's loss is lower by **0.0455** nats on average, larger than the largest spread over "
    "seeds of either arm (0.0332); seed by seed it is lower by 0.0603, 0.0294, 0.0468.",
    "It reaches the dense model's final loss with 0.86 of its tokens and 1.17 of its seconds;",
]


def recorded_runs(folder, files=CONFIGS, words=("train.steps=900", "moe.capacity_factor=2.0")):
    """Writes the workdirs of docs/quickstart.md: their configs, and what was recorded of them."""
    for file in sorted(RECORDED.glob("*.jsonl")):
        arm, rate, seed = re.fullmatch(r"(\w+)_lr([\d.]+)_seed(\d)", file.stem).groups()
        own = [f"optim.learning_rate={rate}", f"seed={seed}", "mesh.expert=1", "mesh.data=1"]
        own += ["logging.every=10", "eval.every=225", "eval.batches=16", "checkpoint.every=100000"]
        config = load_config(str(ROOT / files[arm]), [*own, *words])
        workdir = open_workdir(folder / file.stem, config)
        (workdir / "metrics.jsonl").write_text(file.read_text())


def write_run(path, losses, *words, tokens=100, seconds=1.0, steps=None):
    """A run that is evaluated every 10 of its steps, each of so many tokens and seconds."""
    words = [f"train.steps={steps or 10 * len(losses)}", *words]
    workdir = open_workdir(path, apply_overrides(Config(), words))
    records = []
    for index, loss in enumerate(losses, start=1):
        step = {"step": 10 * index, "tokens_seen": 10 * tokens * index}
        speed = {"step_seconds": seconds, "tokens_per_second": tokens / seconds}
        records.append({**step, "split": "train", "loss": loss, **speed})
        bits = None if loss is None else 2 * loss
        records.append({**step, "split": "eval", "loss": loss, "bits_per_byte": bits})
    write_lines(workdir, records)
    return workdir


def write_lines(workdir, records):
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))


def with_text(workdir, text):
    """Gives a workdir a checkpoint whose manifest names its validation text."""
    store = Store(workdir / CHECKPOINTS, start_run(workdir))
    folder = store.begin(10)
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "data").write_bytes(b"numbers")
    (folder / COMMITTED).write_text("")
    store.seal(10, {}, {}, {"validation": text})
    return workdir


def runs_of(*workdirs):
    return [c.load_run(workdir) for workdir in workdirs]


# The quickstart


def test_the_quickstart_is_reproduced_from_its_workdirs(tmp_path, capsys):
    recorded_runs(tmp_path)
    dense, moe = (sorted(map(str, tmp_path.glob(f"{arm}_lr0.003*"))) for arm in ("dense", "moe"))
    page = tmp_path / "page.md"
    assert main(["compare", *dense, *moe, "--markdown", str(page)]) == 0
    shown, written = capsys.readouterr().out, page.read_text().replace("\\", "")
    for number in ("3,419,520", "667,008", "671,104", "4,577,280", "4,601,856"):
        assert number in shown
    assert "| dense_lr0.003 | 3 | 1.5548 | 0.0127 | 900 | 1.843M | 435.9 | 8.48T |" in written
    assert "| moe_lr0.003 | 3 | 1.5093 | 0.0168 | 900 | 1.843M | 565 | 8.435T |" in written
    row = next(line for line in written.splitlines() if "± " in line)
    assert row == (
        "| moe_lr0.003 | 1.843M | -0.0455 ± 0.0348 | 0.023 (n=3, 3) | 0.036 (n=3) | 0.86 | 1.17 "
        "| 0.86 |"
    )
    for loss, difference in (("1.5060", "-0.0603"), ("1.5275", "-0.0294"), ("1.4944", "-0.0468")):
        assert re.search(rf"seed\d \| moe_lr0.003 \| \d \| {loss} \| {difference} ", written)
    assert "| moe.every | None | 1 |" in written
    assert "optim.learning_rate" not in written  # equal in both
    found = c.compare([tmp_path])
    assert [arm.name for arm in found.arms] == [
        *("moe_lr0.003", "moe_lr0.006", "dense_lr0.003", "dense_lr0.006"),
    ]
    assert [f"{arm.losses[0]:.4f}" for arm in found.arms] == [
        "1.5060",
        "1.5366",
        "1.5663",
        "1.5732",
    ]


def test_it_needs_no_jax_and_no_second(tmp_path):
    write_run(tmp_path / "a", [3.0, 2.0])
    write_run(tmp_path / "b", [3.0, 2.5], "optim.learning_rate=0.1")
    code = (
        "import sys; from moejax.cli import main; main(['compare', *sys.argv[1:]]);"
        "assert not {'jax', 'matplotlib', 'scipy.stats', 'scipy.optimize'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a"), str(tmp_path / "b")]
    assert "+0.5000" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


# Arithmetic, by hand


def test_seconds_are_those_of_steps(tmp_path):
    """Nothing for the step that compiles; then each line's pace, or the one before."""
    lines = [(1, None), (10, 2.0), (20, 4.0), (30, None), (40, 1.0)]
    records = [{"step": s, "split": "train", "step_seconds": seconds} for s, seconds in lines]
    # 9 steps of 2 s, 10 of 4, 10 of which only the 4 before is known, 10 of 1
    seconds_n = c.seconds_at(records, np.array([1, 10, 15, 20, 30, 40, 45]))
    np.testing.assert_allclose(seconds_n, [0, 18, 38, 58, 98, 108, 113])


def test_cost_and_loss_between_evaluations(tmp_path):
    (run,) = runs_of(write_run(tmp_path / "a", [4.0, 3.0, 2.0], tokens=50, seconds=2.0))
    assert c.cost_to_reach(run, "tokens", 2.5) == pytest.approx(1250)
    assert c.cost_to_reach(run, "seconds", 2.5) == pytest.approx(50)
    assert c.cost_to_reach(run, "tokens", 5.0) == 500  # at the first evaluation
    assert c.cost_to_reach(run, "tokens", 1.0) is None
    assert c.loss_at(run, "tokens", 750) == pytest.approx(3.5)
    assert c.loss_at(run, "tokens", 1500.9) == 2.0  # a token more: the same end
    assert math.isnan(c.loss_at(run, "tokens", 100))
    assert math.isnan(c.loss_at(run, "tokens", 2000))
    assert run.cost("flops") == 1500 * flops_per_token(run.config)


def test_relative_cost_is_paired_by_seed(tmp_path):
    """Seed 0 gets to 2.5 after 15 of 20 steps, seed 1 to 2.0 after 20 of 20."""
    a, b = (
        c.Arm(name, tuple(runs_of(*(write_run(tmp_path / f"{name}{s}", own, f"seed={s}")
                                   for s, own in enumerate(losses)))))
        for name, losses in (("a", ([3, 2], [3, 2])), ("b", ([3, 2.5], [3, 2])))
    )  # fmt: skip
    assert c.relative_cost(a, b, "tokens") == c.Ratio(pytest.approx((0.75 + 1) / 2), 2, 2)
    assert c.relative_cost(b, a, "tokens") == c.Ratio(None, 1, 2)
    alone = c.Arm("c", tuple(runs_of(write_run(tmp_path / "c", [2.5, 2.25], "seed=7"))))
    # against the means of b, 2.25 at 2000 tokens
    assert c.relative_cost(alone, b, "tokens") == c.Ratio(pytest.approx(1.0), 1, 1)


def test_significance_is_that_of_scipy_stats():
    a, b = [1.51, 1.53, 1.49], [1.57, 1.56, 1.54, 1.58]
    oracle = scipy.stats.ttest_ind(a, b, equal_var=False)
    interval, p = c.welch(a, b)
    assert p == pytest.approx(oracle.pvalue)
    low, high = oracle.confidence_interval(0.95)
    assert interval == pytest.approx((high - low) / 2)
    pairs = [x - y for x, y in zip(a, b, strict=False)]
    assert c.paired(pairs) == pytest.approx(scipy.stats.ttest_rel(a, b[:3]).pvalue)
    assert c.welch([1.0], b) == (None, None)
    assert c.welch([1.0, 1.0], [2.0, 2.0]) == (None, None)  # nothing varies: no test
    assert c.welch([1.0, math.nan], b) == (None, None)
    assert c.paired([0.1]) is None


def test_runs_of_other_lengths_are_compared_where_both_have_been(tmp_path):
    write_run(tmp_path / "short", [3.0, 2.5])
    write_run(tmp_path / "long", [3.2, 2.4, 1.9, 1.5])
    found = c.compare([tmp_path / "short", tmp_path / "long"])
    assert found.versus[0].budget == 2000
    assert found.versus[0].difference == pytest.approx(-0.1)
    assert any("read before their end" in note for note in found.notes)
    assert found.keys == {"train.steps": (20, 40)}


def test_by_seconds(tmp_path):
    write_run(tmp_path / "slow", [3.0, 2.0], seconds=3.0)
    write_run(tmp_path / "fast", [3.0, 2.5], "optim.learning_rate=0.1", seconds=1.5)
    row = c.compare([tmp_path / "slow", tmp_path / "fast"], "seconds").versus[0]
    assert row.budget == 30
    assert row.difference == pytest.approx(-0.5)  # 2.5, where the slow one still has 3.0


# What runs look like while they live


def test_of_steps_that_were_done_again_the_last_line_counts(tmp_path):
    workdir = write_run(tmp_path / "a", [4.0, 3.0, 2.0])
    file = workdir / "metrics.jsonl"
    again = {"step": 20, "split": "train", "tokens_seen": 2000, "step_seconds": 5.0}
    evaluated = {"step": 20, "split": "eval", "tokens_seen": 2000, "loss": 2.9}
    with open(file, "a") as stream:
        stream.write(f"{json.dumps(again)}\n{json.dumps(evaluated)}\n" + '{"step": 30, "spl')
    (run,) = runs_of(workdir)
    assert run.step_n.tolist() == [10, 20]
    assert run.loss_n.tolist() == [4.0, 2.9]
    assert run.cost("seconds") == 10 + 50
    assert not run.complete


def test_a_run_in_training_is_told_as_such(tmp_path, capsys):
    write_run(tmp_path / "a", [3.0, 2.0])
    write_run(tmp_path / "b", [3.0, 2.2], steps=100)
    assert main(["compare", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "20 of 100" in shown
    assert "note: not complete: " in shown


def test_a_loss_that_is_not_finite_is_last_and_says_so(tmp_path, capsys):
    write_run(tmp_path / "a", [3.0, None])
    write_run(tmp_path / "b", [3.0, 2.0], "optim.learning_rate=0.1")
    assert main(["compare", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\n b .*\n a .*not finite", shown)
    assert "note: the last loss is not finite: " in shown


def test_forced_routing_and_other_evaluations_are_noted(tmp_path):
    write_run(tmp_path / "a", [3.0, 2.0])
    forced = write_run(tmp_path / "b", [3.0], "eval.batches=3")
    evaluated = {"step": 10, "split": "eval", "tokens_seen": 1, "loss": 1.0}
    write_lines(forced, [{**evaluated, "forced_routing": "balanced"}])
    notes = c.compare([tmp_path]).notes
    assert any("routing was forced" in note for note in notes)
    assert any("different numbers of tokens" in note for note in notes)


# Arms


def test_runs_that_differ_in_their_seed_are_one_arm(tmp_path):
    for seed in (2, 0, 1):
        words = (f"seed={seed}", f"logging.every={seed + 1}", "checkpoint.keep=5")
        write_run(tmp_path / "trials" / f"{7 - seed:03d}", [3.0, 2.0 + seed], *words)
    write_run(tmp_path / "trials" / "003", [3.0, 1.0], "moe.top_k=1", "moe.normalize_weights=False")
    found = c.compare([tmp_path])
    assert [[run.config.seed for run in arm.runs] for arm in found.arms] == [[0], [0, 1, 2]]
    names = [arm.name for arm in found.arms]
    assert names == [
        "moe.top_k=1 moe.normalize_weights=False",
        "moe.top_k=2 moe.normalize_weights=True",
    ]
    assert set(found.keys) == {"moe.top_k", "moe.normalize_weights"}
    assert list(found.versus[0].by_seed) == [0]


def test_equal_runs_are_told_apart_by_where_they_were_found(tmp_path):
    for folder, best in (("before", 2.0), ("after", 1.9)):
        for seed in (0, 1):
            write_run(tmp_path / folder / f"s{seed}", [3.0, best + seed], f"seed={seed}")
    found = c.compare([tmp_path / "before", tmp_path / "after"])
    assert [len(arm.runs) for arm in found.arms] == [2, 2]
    assert [arm.name.rpartition("/")[2] for arm in found.arms] != ["", ""]
    assert "before" in found.arms[0].name
    assert "after" in found.arms[1].name
    assert list(found.versus[0].by_seed.values()) == pytest.approx([-0.1, -0.1])
    one = tmp_path / "before" / "s0"
    assert len(c.load_runs([one, one, tmp_path / "before"])[0]) == 2  # each once
    copies = c.arms(runs_of(one, tmp_path / "after" / "s0"))
    assert len(copies) == 2


def test_the_first_path_is_what_others_are_held_against(tmp_path):
    write_run(tmp_path / "base", [3.0, 2.5])
    for rate, loss in ((0.1, 2.2), (0.2, 2.1), (0.3, 2.9)):
        words = f"optim.learning_rate={rate}"
        write_run(tmp_path / "sweep" / "trials" / f"{rate}", [3.0, loss], words)
    found = c.compare([tmp_path / "base", tmp_path / "sweep"])
    assert [arm.loss for arm in found.arms] == [2.5, 2.1, 2.2, 2.9]
    found = c.compare([tmp_path / "sweep", tmp_path / "base"])
    assert [arm.loss for arm in found.arms] == [2.1, 2.2, 2.9, 2.5]


# What cannot be compared


def test_what_is_no_run_is_refused(tmp_path, capsys):
    run = str(write_run(tmp_path / "a", [3.0, 2.0]))
    (tmp_path / "empty").mkdir()
    for words, error in (
        ([], "no run to compare; give workdirs or sweeps"),
        ([run], f"only one run to compare, {run}; give another workdir, or a sweep"),
        ([run, str(tmp_path / "none")], "none does not exist; give a workdir"),
        ([run, str(tmp_path / "empty")], "empty has no run in it; give a workdir"),
        ([run, "--by", "hours"], "--by: invalid choice: 'hours'"),
        ([run, run, "--reach", "-1"], "--reach: '-1' is not a number above 0"),
    ):
        assert main(["compare", *words]) == 2
        assert error in capsys.readouterr().err


def test_a_run_without_metrics_is_refused_where_it_is_named(tmp_path):
    a = write_run(tmp_path / "a", [3.0, 2.0])
    b = write_run(tmp_path / "b", [3.0, 2.2], "optim.learning_rate=0.1")
    new = open_workdir(tmp_path / "new", Config())
    with pytest.raises(ConfigError, match=r"new has no metrics yet; train it .*, or leave it out"):
        c.compare([a, new])
    train = {"step": 7, "split": "train", "tokens_seen": 1, "loss": 1.0}
    write_lines(new, [train])
    message = "not evaluated up to step 7, with eval.every=100 and train.steps=1000; wait for it"
    with pytest.raises(ConfigError, match=message):
        c.compare([a, new])
    (tmp_path / "two").mkdir()
    for workdir in (a, new):
        (tmp_path / "two" / workdir.name).symlink_to(workdir)
    with pytest.raises(
        ConfigError, match=r"only one run to compare, .*two/a \(left out: .*new was"
    ):
        c.compare([tmp_path / "two"])
    found = c.compare([tmp_path])  # in a folder it may be a trial that failed
    assert len(found.runs) == 2
    assert any(note.startswith(f"left out: {new} was not evaluated") for note in found.notes)
    with pytest.raises(ConfigError, match="has no loss_at_capacity; give another --metric"):
        c.compare([a, b], metric="loss_at_capacity")
    for workdir in (a, b):
        (workdir / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"no run under .* can be compared: left out: .*no met"):
        c.compare([tmp_path])


def test_a_damaged_line_is_refused(tmp_path):
    workdir = write_run(tmp_path / "a", [3.0, 2.0])
    lines = (workdir / "metrics.jsonl").read_text()
    (workdir / "metrics.jsonl").write_text("{broken\n" + lines)
    with pytest.raises(ConfigError, match=r"line 1 is not a record .*; delete that line"):
        c.load_run(workdir)


def test_another_vocabulary_is_refused(tmp_path):
    write_run(tmp_path / "a", [3.0, 2.0])
    write_run(tmp_path / "b", [3.0, 2.0], "data.tokenizer=x.json", "model.vocab_size=999")
    message = r"another vocabulary \(data.tokenizer 'bytes' and 'x.json', model.vocab_size 264 and"
    with pytest.raises(ConfigError, match=f"{message} 999.*compare --metric bits_per_byte"):
        c.compare([tmp_path])
    found = c.compare([tmp_path], metric="bits_per_byte")
    assert found.arms[0].loss == 4.0
    with_text(tmp_path / "a", "1")
    found = c.compare([tmp_path], metric="bits_per_byte")
    assert any("that the text is the same is on you" in note for note in found.notes)


def test_another_text_is_refused(tmp_path):
    """By the fingerprint where checkpoints tell, whatever the paths say; else by the paths."""
    prepared = ("data.source=prepared", "data.path=there")
    a = with_text(write_run(tmp_path / "a", [3.0, 2.0]), "1" * 64)
    b = with_text(write_run(tmp_path / "b", [3.0, 2.5], "optim.learning_rate=0.1"), "2" * 64)
    with pytest.raises(
        ConfigError, match=r"another text \(fingerprints 111111111111 and 22.*same Python where"
    ):
        c.compare([a, b])
    same = with_text(write_run(tmp_path / "same", [3.0, 2.0], *prepared), "1" * 64)
    assert not [n for n in c.compare([a, same]).notes if "text" in n]
    new = write_run(tmp_path / "new", [3.0, 2.0], *prepared)
    with pytest.raises(
        ConfigError, match=r"another text \(data.source 'embedded' and 'prepared', data.path None"
    ):
        c.compare([a, new])
    assert any("which text was evaluated" in note for note in c.compare([same, new]).notes)


# What is written


@pytest.fixture
def written(tmp_path):
    """The folder that `--output` wrote for two arms, one of two seeds."""
    runs = tmp_path / "runs"
    for seed in (0, 1):
        write_run(runs / f"a|[red]_seed{seed}", [3.0, 2.0 + seed / 8], f"seed={seed}")
    write_run(runs / "b", [3.0, 2.5], "moe.num_experts_by_layer=(4, 8, 4, 8)", "moe.top_k=3")
    words = ["--reach", "2.75", "--output", str(tmp_path / "out"), "--csv", str(tmp_path / "x.csv")]
    assert main(["compare", str(runs), *words]) == 0
    return tmp_path / "out"


def test_csv_has_a_row_a_run_with_all_digits(written, tmp_path):
    text = (written / "runs.csv").read_text()
    assert (tmp_path / "x.csv").read_text() == text
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["seed"] for row in rows] == ["0", "1", "0"]
    assert [float(row["loss"]) for row in rows] == [2.0, 2.125, 2.5]
    assert rows[0]["arm"] == "a|[red]"
    assert rows[2]["moe.num_experts_by_layer"] == "(4, 8, 4, 8)"
    assert float(rows[0]["tokens"]) == 2000


def test_markdown_is_escaped_and_has_the_pictures(written):
    text = (written / "compare.md").read_text()
    assert r"a\|\[red\]" in text
    assert "| b | 1k to" not in text
    row = next(line for line in text.splitlines() if line.startswith("| b | 1.5k"))
    assert row.startswith("| b | 1.5k | 15 |")  # 2.75, half way from 3.0 to 2.5
    assert "![compare](compare.png)" in text
    with Image.open(written / "compare.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    blue = np.abs(pixels - [0x1F, 0x77, 0xB4]).max(axis=-1) < 60
    orange = np.abs(pixels - [0xFF, 0x7F, 0x0E]).max(axis=-1) < 60
    assert blue.sum() > 200
    assert orange.sum() > 200


def _events(folder):
    (file,) = folder.glob("events*")
    content, at, events = file.read_bytes(), 0, []
    while at < len(content):
        size = int.from_bytes(content[at : at + 8], "little")
        events.append(event_pb2.Event.FromString(content[at + 12 : at + 12 + size]))
        at += 16 + size
    return events


def test_tensorboard_has_curves_and_hparams(written):
    folders = sorted((written / "tensorboard").iterdir())
    assert [folder.name for folder in folders] == ["00_a_red_seed0", "00_a_red_seed1", "01_b_seed0"]
    values = [v for event in _events(folders[2]) for v in event.summary.value]
    numbers = {v.tag: v.simple_value for v in values}
    assert numbers["last/loss"] == 2.5
    assert numbers["last/tokens"] == 2000
    steps = [
        (event.step, value.simple_value)
        for event in _events(folders[2])
        for value in event.summary.value
        if value.tag == "loss_by/seconds"
    ]
    assert steps == [(10, 3.0), (20, 2.5)]
    start = next(v for v in values if v.tag == "_hparams_/session_start_info")
    data = plugin_hparams_pb2.HParamsPluginData.FromString(start.metadata.plugin_data.content)
    hparams = data.session_start_info.hparams
    assert hparams["moe.top_k"].number_value == 3
    assert hparams["moe.num_experts_by_layer"].string_value == "(4, 8, 4, 8)"
    assert set(hparams) == {"seed", "moe.top_k", "moe.num_experts_by_layer"}


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, capsys):
    write_run(tmp_path / "a", [3.0, 2.0])
    write_run(tmp_path / "b", [3.0, 2.0], "seed=1")
    (tmp_path / "file").touch()
    assert main(["compare", str(tmp_path), "--output", str(tmp_path / "file" / "out")]) == 2
    assert "give another file or folder" in capsys.readouterr().err


def test_many_arms_are_rows_and_only_the_best_have_a_colour(tmp_path, capsys):
    for index in range(12):
        words = f"optim.learning_rate={0.001 * (index + 1)}"
        write_run(tmp_path / "trials" / f"{index:03d}", [3.0, 2.0 + index / 10], words)
    assert main(["compare", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"arm +optim.learning_rate *\n optim.learning_rate=0.001 +0.001", shown)
    with Image.open(tmp_path / "out" / "compare.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    grey = np.abs(pixels - [0xBB, 0xBB, 0xBB]).max(axis=-1) < 12
    assert grey.sum() > 100
