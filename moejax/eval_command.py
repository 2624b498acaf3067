"""`moejax eval` beyond the validation split: other data, tasks, and checkpoints as they come.

What reads data or computes is imported inside: what is wrong with a line is said before.
"""

import argparse
import dataclasses
import importlib.util
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moejax.config import Config, ConfigError
from moejax.errors import require
from moejax.eval_series import (
    EVAL_SERIES,
    Series,
    Watching,
    find_checkpoints,
    recipe_id,
    tell,
    wait_for_config,
    watch,
)
from moejax.manifest import fingerprint
from moejax.metrics import plain_record

SPREAD = ("loss", "perplexity", "bits_per_byte")  # whose mean and worst over data sets are shown

Report = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class EvalRequest:
    """What a line asks for.

    Attributes:
        workdir: of the run.
        step: of the checkpoint; None for the last.
        data: words of `--data`; none is the validation split, where there are no tasks either.
        field: the text in .jsonl and .parquet.
        tasks: names for lm-eval.
        tasks_path: folder of their YAML; None: those that lm-eval ships.
        limit: examples of a task.
        watching: how to wait for checkpoints; None: the one of `step` only.
    """

    workdir: Path
    step: int | None = None
    data: tuple[str, ...] = ()
    field: str = "text"
    tasks: tuple[str, ...] = ()
    tasks_path: Path | None = None
    limit: int | None = None
    watching: Watching | None = None

    def __post_init__(self):
        if self.watching is not None:
            require(
                self.step is None,
                f"--watch goes through all checkpoints and --step names {self.step}; leave one out",
            )
        for name in ("tasks_path", "limit"):
            value = getattr(self, name)
            require(
                bool(self.tasks) or value is None,
                f"--{name} {value} is not read without --tasks; add that, or leave it out",
            )
        require(
            self.tasks_path is None or self.tasks_path.is_dir(),
            f"--tasks_path {self.tasks_path} is not a folder; give one that has the tasks' YAML",
        )
        if self.tasks:
            require(
                _is_installed("lm_eval"),
                "--tasks needs the package lm_eval, which is not installed; pip install "
                "'moejax[lm-eval]'",
            )

    @property
    def plain(self) -> bool:
        """Whether it is the validation split of one checkpoint alone."""
        return not (self.data or self.tasks or self.watching)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # it was imported, and has no spec
        return False


def read_request(options: argparse.Namespace) -> EvalRequest:
    """Returns what the options of a line ask for.

    Raises:
        ConfigError: options that do not go together.
    """
    watching = None
    given = {name: getattr(options, name) for name in ("poll_seconds", "patience")}
    if options.watch:
        watching = Watching(**{name: x for name, x in given.items() if x is not None})
    for name, value in given.items():
        require(
            options.watch or value is None,
            f"--{name} {value} is not read without --watch; add that, or leave it out",
        )
    require(
        not (options.watch and options.json),
        f"--json {options.json} is for one checkpoint; --watch writes {EVAL_SERIES} in the workdir",
    )
    require(
        bool(options.data) or options.field == "text",
        f"--field {options.field} is not read without --data; leave it out",
    )
    names = [name.strip() for name in (options.tasks or "").split(",") if name.strip()]
    require(
        bool(names) or options.tasks is None,
        f"--tasks {options.tasks!r} names no task; give names, as in a,b",
    )
    return EvalRequest(
        Path(options.workdir),
        options.step,
        tuple(options.data),
        options.field,
        tuple(names),
        options.tasks_path,
        options.limit,
        watching,
    )


def wait_for_run(request: EvalRequest) -> None:
    """Waits, when watching, until the run has a config."""
    if request.watching is not None:
        wait_for_config(request.workdir, request.watching)


def evaluate_request(config: Config, request: EvalRequest) -> Report | None:
    """Evaluates what was asked for, shows it, and returns the report; None where it watches.

    A report has `time`, `step`, `checkpoint` and `recipe` (ids), `data` (a record by name of the
    data set), `spread` where there are several, and `tasks`.

    Raises:
        ConfigError: anything of it cannot be.
    """
    evaluation = _Evaluation(config, request)
    if request.watching is None:
        return evaluation.run_once()
    with Series(request.workdir, evaluation.recipe) as series:
        count = watch(request.workdir, series, evaluation.run, request.watching)
    tell(f"the training is done, and so are its evaluations: {count} new in {EVAL_SERIES}")
    return None


class _Evaluation:
    """What is made once and used for every checkpoint: data, mesh, compiled steps, tasks."""

    def __init__(self, config: Config, request: EvalRequest):
        import jax

        from moejax.eval_data import VALIDATION, load_eval_data
        from moejax.evaluate import Evaluator, eval_steps, mesh_for_use

        self._config, self._request = config, request
        require(
            jax.process_count() == 1,
            f"--data, --tasks and --watch run in one process, not in {jax.process_count()}; leave "
            "the launcher out, and split the model with mesh.* over this machine's devices",
        )
        words = [*request.data] or ([] if request.tasks else [VALIDATION])
        data = load_eval_data(words, config.data, request.field)
        self._manager = self._load_tasks()
        self.recipe = recipe_id(_recipe(config, request, data))
        self._mesh = mesh_for_use(config)
        self._steps: dict[str, Callable] = {}
        if data:
            most = max(len(found.corpus.domains) for found in data)
            self._steps = eval_steps(config, self._mesh, most)
        self._evaluators = [Evaluator(config, self._mesh, found, self._steps) for found in data]
        self._compile_seconds: float | None = None

    def _load_tasks(self) -> Any:
        request = self._request
        if not request.tasks:
            return None
        if request.tasks_path is not None:  # read when `datasets` is imported
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
            os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
        from moejax.lm_eval_adapter import load_tasks

        return load_tasks(request.tasks, request.tasks_path)

    def run_once(self) -> Report:
        """Evaluates the checkpoint that was asked for, or the last sound one."""
        from moejax.evaluate import load_for_use

        request = self._request
        restored = load_for_use(self._config, request.workdir, request.step, self._mesh)
        checkpoint = find_checkpoints(request.workdir).get(restored.step, "")
        return self._report(restored, checkpoint)

    def run(self, step: int, checkpoint: str) -> Report | None:
        """Evaluates a checkpoint of a run that goes on; None, said, where it is no more."""
        from moejax.evaluate import load_for_use

        workdir = self._request.workdir
        try:
            restored = load_for_use(self._config, workdir, step, self._mesh)
        except ConfigError as error:
            if find_checkpoints(workdir).get(step) != checkpoint:
                tell(
                    f"step {step} was deleted or replaced before it could be evaluated; "
                    "checkpoint.keep says how many stay"
                )
            else:
                tell(f"step {step} is passed over: {error}")
            return None
        if find_checkpoints(workdir).get(step) != checkpoint:
            tell(f"step {step} was replaced while it was read")
            return None
        return self._report(restored, checkpoint)

    def _report(self, restored: Any, checkpoint: str) -> Report:
        from moejax.evaluate import evaluate_restored
        from moejax.progress import show_evaluation, show_spread, show_tasks

        report: Report = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": restored.step,
            "checkpoint": checkpoint,
            "recipe": self.recipe,
        }
        if self._evaluators and self._compile_seconds is None:
            first = self._evaluators[0]
            self._compile_seconds = first.compile(restored.params, restored.router_state)
        records = {}
        for evaluator in self._evaluators:
            record = evaluate_restored(evaluator, restored)
            record["compile_seconds"] = self._compile_seconds
            records[evaluator.name] = plain_record(record)
            show_evaluation(record, name=evaluator.name)
        if records:
            report["data"] = records
        if len(records) > 1:
            report["spread"] = spread(records)
            show_spread(report["spread"])
        if self._manager is not None:
            report["tasks"] = self._run_tasks(restored)
            show_tasks(restored.step, report["tasks"])
        return report

    def _run_tasks(self, restored: Any) -> dict[str, Any]:
        from moejax.lm_eval_adapter import run_tasks

        request = self._request
        return run_tasks(self._config, restored, request.tasks, self._manager, request.limit)


def _recipe(config: Config, request: EvalRequest, data: Sequence[Any]) -> Any:
    """Returns what decides the numbers besides the checkpoint; not the mesh."""
    files = sorted(request.tasks_path.rglob("*")) if request.tasks_path is not None else []
    contents = [
        (str(file), fingerprint(file.read_bytes().hex())) for file in files if file.is_file()
    ]
    return {
        "data": [(found.name, found.corpus.fingerprint) for found in data],
        "batches": config.eval.batches if data else None,
        "capacity": config.moe.eval_capacity_factor if data else None,
        "dtype": config.model.dtype,
        "tasks": [*request.tasks, request.limit, contents] if request.tasks else None,
    }


def spread(records: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns how a quantity differs over data sets: mean, standard deviation, worst and where.

    Each data set counts alike. A data set whose value is not finite is the worst, and there is no
    mean then.
    """
    found = {}
    for name in SPREAD:
        values = {data: record[name] for data, record in records.items()}
        broken = [data for data, value in values.items() if value is None]
        worst = broken[0] if broken else max(values, key=lambda data: values[data])
        numbers = [] if broken else list(values.values())
        found[name] = {
            "mean": statistics.fmean(numbers) if numbers else None,
            "deviation": statistics.stdev(numbers) if len(numbers) > 1 else None,
            "worst": values[worst],
            "worst_data": worst,
        }
    return found
