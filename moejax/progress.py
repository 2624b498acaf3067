"""What the user sees while a run goes on, and the tables at its end.

On a terminal that is a live bar. Elsewhere (CI, a pipe, a file) it is one plain line a record,
without control codes and flushed at once. Numbers come from the records of `moejax.metrics`.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from moejax.foreign import printable as printable  # where callers look for it
from moejax.ledger import Totals

Record = Mapping[str, Any]


def worst_layer(record: Record) -> tuple[int, float] | None:
    """Returns (layer, MaxVio) of the most uneven MoE layer, None when there is none."""
    values = record.get("max_violation") or []
    known = [(value, -layer) for layer, value in enumerate(values) if value is not None]
    if not known:
        return None
    value, layer = max(known)
    return -layer, value


def status_line(record: Record) -> str:
    """Returns loss, speed, drops and the most uneven layer of a train record as one line."""
    parts = [
        f"loss {_number(record.get('loss'), '.4f')}",
        f"{_number(record.get('tokens_per_second'), ',.0f')} tokens/s",
    ]
    worst = worst_layer(record)
    if worst is not None:
        layer, value = worst
        parts.append(f"drop {_percent(record.get('drop_fraction'))}")
        parts.append(f"MaxVio {value:.2f} (layer {layer})")
    if straggler := _straggler(record):
        parts.append(straggler)
    if forced := record.get("forced_routing"):
        parts.append(f"FORCED ROUTING ({forced})")  # a benchmark, not a training
    return "  ".join(parts)


def _straggler(record: Record) -> str | None:
    """Names the process whose host holds up the others for a noticeable part of a step."""
    most, least = record.get("host_seconds_most"), record.get("host_seconds_least")
    step = record.get("step_seconds")
    if most is None or least is None or step is None or most - least < 0.1 * step:
        return None
    return f"process {record['slowest_process']} slow ({most:.2f} s on its host, least {least:.2f})"


class TrainProgress:
    """Shows how far a training is: step, time left, loss, speed, drops, the most uneven layer.

        with TrainProgress(1000, 0, tokens_per_step=4096) as progress:
            progress.update(record)

    Args:
        total_steps: the last step.
        start_step: steps that are done already; above 0 when resuming.
        tokens_per_step: positions in a batch, for the first line.
        console: where to; standard output unless told.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        tokens_per_step: int,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._start, self._tokens = total_steps, start_step, tokens_per_step
        self._console = console or Console(highlight=False)
        self._clock = clock
        self._first: tuple[float, int] | None = None  # time and step of the first record
        self._bar = (
            _Bar(self._console, total_steps, start_step) if _is_live(self._console) else None
        )

    def __enter__(self) -> "TrainProgress":
        if self._bar is not None:
            self._bar.start()
        done = f", resuming after step {self._start:,}" if self._start else ""
        self.message(
            f"training to step {self._total:,}{done}; {self._tokens:,} tokens a step; compiling"
        )
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, record: Record) -> None:
        """Shows a record; an eval record is one line that stays."""
        step = record["step"]
        if record["split"] == "eval":
            loss, bits = record.get("loss"), record.get("bits_per_byte")
            self.message(
                f"step {step:,}: validation loss {_number(loss, '.4f')} nats per token, "
                f"{_number(bits, '.4f')} bits per byte"
            )
            return
        left = self._time_left(record)
        if self._bar is not None:
            self._bar.show(step, left, status_line(record))
        else:
            _print_line(self._console, f"step {step}/{self._total}  {status_line(record)}  {left}")

    def message(self, text: str) -> None:
        """Shows a line that stays."""
        if self._bar is not None:
            self._console.print(Text(_encodable(printable(text), self._console)))
        else:
            _print_line(self._console, printable(text))

    def _time_left(self, record: Record) -> str:
        """Time left at the pace since the first record, so that compiling does not count."""
        now, step = self._clock(), record["step"]
        if self._first is None:
            self._first = (now, step)
        first_time, first_step = self._first
        pace = record.get("step_seconds")
        if step > first_step:
            pace = (now - first_time) / (step - first_step)
        if pace is None:
            return "time left unknown"
        return f"{_duration(pace * (self._total - step))} left"


class _Bar(Progress):
    """A bar with a second line below it: what matters does not fit on one line of 80 columns."""

    def __init__(self, console: Console, total_steps: int, start_step: int):
        self._status = Text("")
        super().__init__(
            SpinnerColumn(),
            TextColumn("step {task.completed:,}/{task.total:,}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console,
            expand=True,
        )
        self._task = self.add_task("", total=total_steps, completed=start_step)

    def show(self, step: int, left: str, status: str) -> None:
        self._status = Text(status, no_wrap=True, overflow="ellipsis")
        self.update(self._task, completed=step, description=left, refresh=True)

    def get_renderables(self):
        yield self.make_tasks_table(self.tasks)
        yield self._status


def show_summary(
    record_eval: Record,
    *,
    tokens_per_second: float | None,
    files: Sequence[Path],
    sample: str,
    record_train: Record | None = None,
    spent: Totals | None = None,
    console: Console | None = None,
) -> None:
    """Shows how a training ended: the tables, a generated sample, and the files that it wrote.

    Args:
        record_eval: the last eval record.
        tokens_per_second: of the whole training.
        files: what the run wrote.
        sample: generated text, shown with its control characters spelled out.
        record_train: the last train record; its counters give the drop fraction of training.
        spent: where the time of the run went.
        console: where to; standard output unless told.
    """
    console = console or Console(highlight=False)
    facts = [("training speed", f"{_number(tokens_per_second, ',.0f')} tokens per second")]
    if record_train is not None and worst_layer(record_train) is not None:
        routed, dropped = (record_train.get(f"{n}_seen") for n in ("routed", "dropped"))
        if routed:
            facts.append(("drop fraction in training", _percent((dropped or 0) / routed)))
    if spent is not None and spent.goodput is not None:
        facts += _time_facts(spent)
    _show(console, _evaluation(record_eval, facts, console))
    title = Text("a generated sample")
    _show(
        console,
        Panel(Text(_encodable(printable(sample), console)), title=title, title_align="left"),
    )
    _print_line(console, "files:")
    for path in files:
        _print_line(console, f"  {printable(str(path))}{'/' if path.is_dir() else ''}")


def _time_facts(spent: Totals) -> list[tuple[str, str]]:
    """Goodput, and what else took a noticeable part of the time, the largest first."""
    share = {kind: seconds / spent.elapsed for kind, seconds in spent.seconds.items()}
    rest = sorted((-part, kind) for kind, part in share.items() if kind != "productive")
    facts = [(f"goodput, of {_duration(spent.elapsed)}", _percent(spent.goodput))]
    facts += [(f"  {kind}", _percent(-part)) for part, kind in rest if -part >= 0.01]
    if spent.sessions > 1:
        facts.append(("  starts", str(spent.sessions)))
    return facts


def show_evaluation(
    record: Record, console: Console | None = None, name: str = "validation"
) -> None:
    """Shows an eval record: loss by domain, loss and drops at capacity, balance of the experts.

    Args:
        name: of the data set.
    """
    console = console or Console(highlight=False)
    _show(console, _evaluation(record, _cost_facts(record), console, name))


def _cost_facts(record: Record) -> list[tuple[str, str]]:
    """What an evaluation took, where that was measured."""
    if record.get("seconds") is None:
        return []
    memory = record["peak_memory_bytes"] / 2**20
    return [
        ("seconds", f"{record['seconds']:.2f}"),
        ("compiling before it, seconds", f"{record['compile_seconds']:.2f}"),
        ("tokens per second", _number(record.get("tokens_per_second"), ",.0f")),
        ("peak memory, MiB", f"{memory:,.0f}"),
    ]


def show_spread(spread: Mapping[str, Record], console: Console | None = None) -> None:
    """Shows how quantities differ over data sets: `mean`, `deviation`, `worst`, `worst_data`."""
    console = console or Console(highlight=False)
    table = Table(title="over the data sets", title_justify="left")
    table.add_column("")
    for column in ("mean", "standard deviation", "worst"):
        table.add_column(column, justify="right")
    for name, row in spread.items():
        where = f"{_number(row['worst'], '.4f')} ({printable(row['worst_data'])})"
        cells = [_number(row[column], ".4f") for column in ("mean", "deviation")]
        table.add_row(name, *cells, Text(_encodable(where, console)))
    _show(console, table)


def show_tasks(step: int, tasks: Mapping[str, Record], console: Console | None = None) -> None:
    """Shows the metrics of tasks, with their standard errors, and under "cost" what they took."""
    console = console or Console(highlight=False)
    table = Table(title=f"tasks at step {step:,}", title_justify="left")
    table.add_column("task")
    table.add_column("metric")
    for column in ("value", "standard error", "samples"):
        table.add_column(column, justify="right")
    for task, row in tasks.items():
        metrics = [name for name in row if name != "samples" and "_stderr" not in name]
        for metric in metrics if task != "cost" else ():
            name, comma, used = metric.partition(",")
            error = _number(row.get(f"{name}_stderr{comma}{used}"), ".4f")
            labels = [Text(_encodable(printable(text), console)) for text in (task, metric)]
            samples = _number(row.get("samples"), ",d")
            table.add_row(*labels, _number(row[metric], ".4f"), error, samples)
    _show(console, table)
    cost = tasks["cost"]
    memory = cost["peak_memory_bytes"] / 2**20
    _print_line(
        console, f"{cost['seconds']:.1f} s, compiling included; peak memory {memory:,.0f} MiB"
    )
    if cost["cut_contexts"]:
        _print_line(console, f"{cost['cut_contexts']} contexts were too long: their ends were used")


def _evaluation(
    record: Record, facts: list[tuple[str, str]], console: Console, name: str = "validation"
) -> Group:
    title = Text(_encodable(f"{printable(name)} at step {record['step']:,}", console))
    losses = Table(title=title, title_justify="left")
    losses.add_column("domain")
    for unit in ("tokens", "nats per token", "perplexity", "bits per byte"):
        losses.add_column(unit, justify="right")
    for name, fields in (record.get("domains") or {}).items():
        losses.add_row(Text(_encodable(printable(name), console)), *_loss_cells(fields))
    losses.add_section()
    losses.add_row(Text("overall", style="bold"), *_loss_cells(record))

    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in facts + _balance_facts(record):
        table.add_row(Text(name), Text(value))
    return Group(losses, table) if table.rows else Group(losses)


def _loss_cells(fields: Record) -> list[str]:
    return [
        _number(fields.get("tokens"), ",d"),
        _number(fields.get("loss"), ".4f"),
        _perplexity(fields.get("perplexity")),
        _number(fields.get("bits_per_byte"), ".4f"),
    ]


def _balance_facts(record: Record) -> list[tuple[str, str]]:
    """What an eval record says about experts, nothing for a dense model."""
    facts = []
    factor = record.get("capacity_factor")
    if factor is not None:
        at = f"at capacity factor {factor:g}"
        facts.append((f"loss {at}", _number(record.get("loss_at_capacity"), ".4f")))
        facts.append((f"drop fraction {at}", _percent(record.get("drop_fraction_at_capacity"))))
    worst = worst_layer(record)
    if worst is not None:
        facts.append(("most uneven layer (MaxVio)", f"{worst[1]:.2f} (layer {worst[0]})"))
    dead = record.get("dead_experts")
    if dead:
        where = ", ".join(f"layer {layer}: {count}" for layer, count in enumerate(dead) if count)
        experts = sum(len(row) for row in record.get("expert_load") or [])
        of = f" of {experts}" if experts else ""
        facts.append(("dead experts", f"{sum(dead)}{of}" + (f" ({where})" if where else "")))
    return facts


def _is_live(console: Console) -> bool:
    """Whether control codes are welcome. FORCE_COLOR lets rich call a pipe a terminal; not here."""
    isatty = getattr(console.file, "isatty", lambda: False)
    return bool(isatty()) and console.is_terminal and not console.is_dumb_terminal


def _show(console: Console, content: RenderableType) -> None:
    """Prints tables; as plain text where there is no terminal."""
    if not _is_live(console):
        plain = Console(file=console.file, width=console.width, force_terminal=False, no_color=True)
        plain.print(content, highlight=False)
    else:
        console.print(content, highlight=False)
    console.file.flush()


def _print_line(console: Console, text: str) -> None:
    """Prints a line as it is: no wrapping, markup or colour, and at once."""
    if not console.quiet:
        print(_encodable(text, console), file=console.file, flush=True)


def _encodable(text: str, console: Console) -> str:
    """Spells out what the output's encoding lacks (LANG=C), where printing would raise."""
    encoding = getattr(console.file, "encoding", None) or sys.getdefaultencoding()
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _number(value: float | None, spec: str) -> str:
    return "n/a" if value is None else format(value, spec)


def _perplexity(value: float | None) -> str:
    """A diverged model's has up to 309 digits, and the table no room for them."""
    return _number(value, ",.2f" if value is None or value < 1e9 else ".3e")


def _percent(fraction: float | None) -> str:
    return "n/a" if fraction is None else f"{100 * fraction:.2f}%"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes}:{seconds:02d} min" if minutes else f"{seconds} s"
