"""What is shown: plain lines without a terminal, a bar on one, tables that no text can break."""

import io
import math
import re

import pytest
from rich.console import Console

from moejax.ledger import KINDS, Totals
from moejax.progress import (
    TrainProgress,
    printable,
    show_evaluation,
    show_spread,
    show_summary,
    show_tasks,
    status_line,
    worst_layer,
)

EVAL = {
    "step": 1000,
    "split": "eval",
    "loss": 1.2345,
    "perplexity": 3.4367,
    "bits_per_byte": 1.781,
    "tokens": 123_456,
    "domains": {
        "english": {"loss": 1.25, "perplexity": 3.49, "bits_per_byte": 1.75, "tokens": 50_000},
        "[red]x[/red]": {"loss": None, "perplexity": None, "bits_per_byte": None, "tokens": 0},
    },
    "capacity_factor": 2.0,
    "loss_at_capacity": 1.3,
    "drop_fraction_at_capacity": 0.001,
    "max_violation": [0.25, 0.75],
    "dead_experts": [0, 3],
    "expert_load": [[0.125] * 8] * 2,
}


def _train(step, **fields):
    record = {"step": step, "split": "train", "loss": 2.5, "tokens_per_second": 12345.6}
    counters = {"routed_seen": 1000, "dropped_seen": 31}
    worst = {"drop_fraction": 0.0123, "max_violation": [0.2, 0.53]}
    return {**record, **counters, **worst, **fields}


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def _pipe():
    # FORCE_COLOR in a user's environment makes rich call a pipe a terminal; so does force_terminal.
    return Console(file=io.StringIO(), force_terminal=True, width=100)


def _clock(*times):
    return iter(times).__next__


def test_without_a_terminal_each_record_is_one_plain_line():
    console = _pipe()
    with TrainProgress(100, 0, 4096, console=console, clock=_clock(50.0, 60.0)) as progress:
        progress.update(_train(10, step_seconds=0.5))
        progress.update(_train(20, loss=1.5))
    lines = console.file.getvalue().splitlines()
    status = "12,346 tokens/s  drop 1.23%  MaxVio 0.53 (layer 1)"
    assert lines == [
        "training to step 100; 4,096 tokens a step; compiling",
        f"step 10/100  loss 2.5000  {status}  45 s left",  # 90 steps of half a second
        f"step 20/100  loss 1.5000  {status}  1:20 min left",  # 10 s for 10 steps, 80 to go
    ]


def test_a_line_is_out_before_the_next_record():
    class Stream(io.StringIO):
        flushed = 0

        def flush(self):
            Stream.flushed += 1

    progress = TrainProgress(10, 0, 1, console=Console(file=Stream()))
    progress.update(_train(1))
    assert Stream.flushed == 1


def test_resume_and_evaluation_lines():
    console = _pipe()
    with TrainProgress(20, 8, 64, console=console) as progress:
        progress.update(EVAL)
        progress.message("saved \x1b[2J")
    lines = console.file.getvalue().splitlines()
    assert lines[0].startswith("training to step 20, resuming after step 8")
    assert lines[1] == "step 1,000: validation loss 1.2345 nats per token, 1.7810 bits per byte"
    assert lines[2] == "saved \\x1b[2J"


def test_on_a_terminal_there_is_a_bar_and_messages_stay():
    console = Console(file=_Terminal(), force_terminal=True, width=80, _environ={"TERM": "xterm"})
    with TrainProgress(1000, 0, 4096, console=console) as progress:
        progress.update(_train(250, step_seconds=1.0))
        progress.message("[bold]kept[/bold]")
    shown = console.file.getvalue()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "\x1b[" in shown
    assert "step 250/1,000" in plain
    assert "25%" in plain
    assert "12:30 min left" in plain
    assert "drop 1.23%  MaxVio 0.53 (layer 1)" in plain
    assert "[bold]kept[/bold]" in plain
    assert max(len(line) for line in re.split(r"[\r\n]+", plain)) <= 80


def test_dumb_terminal_gets_plain_lines():
    console = Console(file=_Terminal(), force_terminal=True, _environ={"TERM": "dumb"})
    with TrainProgress(10, 0, 1, console=console) as progress:
        progress.update(_train(1))
    assert "\x1b" not in console.file.getvalue()


def test_dense_model_has_no_routing_in_its_line():
    assert status_line(_train(1, max_violation=[])) == "loss 2.5000  12,346 tokens/s"


@pytest.mark.parametrize(("loss", "shown"), [(None, "n/a"), (math.nan, "nan"), (math.inf, "inf")])
def test_loss_that_is_not_a_number_is_shown_as_such(loss, shown):
    assert status_line(_train(1, loss=loss)).startswith(f"loss {shown} ")


def test_worst_layer_takes_the_first_of_equals_and_skips_unknown():
    assert worst_layer({"max_violation": [0.1, 0.5, None, 0.5]}) == (1, 0.5)
    assert worst_layer({"max_violation": [None]}) is None
    assert worst_layer({}) is None


def test_printable_spells_out_what_steers_a_terminal():
    assert printable("a\x1b[31m\r\x07\tb\nc") == "a\\x1b[31m\\r\\x07    b\nc"
    assert printable("niño \u202e\u200b\ud800\xa0日本") == "niño \\u202e\\u200b\\ud800 日本"


def _summary(console, **fields):
    show_summary(
        EVAL,
        **{"tokens_per_second": 12345.6, "files": [], "sample": "", "console": console, **fields},
    )
    return console.file.getvalue()


def test_summary_has_every_number(tmp_path):
    shown = _summary(_pipe(), record_train=_train(1000), files=[tmp_path, tmp_path / "a.png"])
    rows = [re.split(r"\s*[│|]\s*", line.strip()) for line in shown.splitlines()]
    cells = {row[1]: row[2:-1] for row in rows if len(row) > 2}
    assert cells["english"] == ["50,000", "1.2500", "3.49", "1.7500"]
    assert cells["[red]x[/red]"] == ["0", "n/a", "n/a", "n/a"]
    assert cells["overall"] == ["123,456", "1.2345", "3.44", "1.7810"]
    assert cells["training speed"] == ["12,346 tokens per second"]
    assert cells["drop fraction in training"] == ["3.10%"]  # of the whole training
    assert cells["loss at capacity factor 2"] == ["1.3000"]
    assert cells["drop fraction at capacity factor 2"] == ["0.10%"]
    assert cells["most uneven layer (MaxVio)"] == ["0.75 (layer 1)"]
    assert cells["dead experts"] == ["3 of 16 (layer 1: 3)"]
    assert shown.endswith(f"files:\n  {tmp_path}/\n  {tmp_path}/a.png\n")
    assert "\x1b" not in shown


def test_the_summary_says_where_the_time_went():
    seconds = dict.fromkeys(KINDS, 0.0) | {"productive": 90.0, "restart": 9.5, "compile": 0.5}
    shown = _summary(_pipe(), spent=Totals(seconds, 2))
    rows = [re.split(r"\s*[│|]\s*", line.strip()) for line in shown.splitlines()]
    cells = {row[1]: row[2] for row in rows if len(row) > 2}
    assert cells["goodput, of 1:40 min"] == "90.00%"
    assert (cells["restart"], cells["starts"]) == ("9.50%", "2")
    assert "compile" not in cells, "less than a hundredth"


def test_a_host_that_holds_up_the_others_is_in_the_line():
    hosts = {"host_seconds_least": 0.01, "host_seconds_most": 0.31, "slowest_process": 3}
    line = status_line(_train(1, step_seconds=1.0, **hosts))
    assert "process 3 slow (0.31 s on its host, least 0.01)" in line
    assert "slow" not in status_line(_train(1, step_seconds=4.0, **hosts))
    assert "slow" not in status_line(_train(1, step_seconds=None, **hosts))


def test_sample_is_shown_as_written():
    shown = _summary(_pipe(), sample="[bold]no[/bold] \x1b]0;title\x07 [/]")
    assert "[bold]no[/bold] \\x1b]0;title\\x07 [/]" in shown


def test_sample_on_a_terminal_cannot_steer_it():
    console = Console(file=_Terminal(), force_terminal=True, width=80, _environ={"TERM": "xterm"})
    assert "\x1b]0;" not in _summary(console, sample="\x1b]0;title\x07")


def test_output_that_only_takes_ascii():
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=80)
    record = {**EVAL, "domains": {"español": {"loss": 1.0}}}
    show_summary(record, tokens_per_second=1.0, files=[], sample="niño", console=console)
    console.file.flush()
    assert b"ni\\xf1o" in raw.getvalue()
    assert b"espa\\xf1ol" in raw.getvalue()


def test_evaluation_of_a_dense_model_is_one_table():
    console = _pipe()
    show_evaluation({"step": 5, "split": "eval", "loss": 1.0, "tokens": 3}, console)
    shown = console.file.getvalue()
    assert "validation at step 5" in shown
    assert "overall" in shown
    assert "MaxVio" not in shown
    assert "dead" not in shown


def test_the_perplexity_of_a_diverged_model_leaves_the_table_its_width():
    console = _pipe()
    fields = {"loss": 700.0, "perplexity": 1.0142320547350045e304, "tokens": 3}
    show_evaluation({"step": 5, "split": "eval", **fields}, console)
    shown = console.file.getvalue()
    assert "1.014e+304" in shown
    assert "700.0000" in shown


def test_evaluation_has_the_numbers_at_capacity():
    console = _pipe()
    show_evaluation(EVAL, console)
    assert "drop fraction at capacity factor 2" in console.file.getvalue()


def test_what_an_evaluation_of_other_data_took():
    cost = {"seconds": 2.5, "compile_seconds": 10.0, "peak_memory_bytes": 3 << 30}
    console = _pipe()
    show_evaluation(EVAL | cost | {"tokens_per_second": 4000.0}, console, "[b]law[/b]")
    shown = console.file.getvalue()
    assert "[b]law[/b] at step 1,000" in shown
    for name, value in [("seconds", "2.50"), ("tokens per second", "4,000"), ("MiB", "3,072")]:
        assert re.search(rf"{name} .*{value}", shown)


def test_the_spread_over_data_sets_and_tasks_are_tables():
    console = _pipe()
    row = {"mean": 2.0, "deviation": None, "worst": 3.0, "worst_data": "[red]x"}
    show_spread({"loss": row}, console)
    shown = console.file.getvalue()
    assert re.search(r"loss .*2\.0000 .*n/a .*3\.0000 \(\[red\]x\)", shown)
    cost = {"seconds": 1.0, "peak_memory_bytes": 1 << 20, "cut_contexts": 2}
    task = {"acc": 0.5, "acc_stderr": 0.25, "exact_match,strict": None, "samples": 1000}
    show_tasks(40, {"mine": task, "cost": cost}, console)
    shown = console.file.getvalue()
    assert re.search(r"mine .*acc .*0\.5000 .*0\.2500 .*1,000", shown)
    assert re.search(r"mine .*exact_match,strict .*n/a .*n/a .*1,000", shown)
    assert shown.endswith("memory 1 MiB\n2 contexts were too long: their ends were used\n")
