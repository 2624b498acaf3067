"""The trials of a sweep, in a storage that its workers share: what is next, what came of it.

Optuna keeps them (SQLite in the workdir, or any URL that it takes) and proposes the points of an
adaptive search. A list of points is put there at once. What is here runs under a lock on a file of
the workdir, which all workers see.
"""

import contextlib
import fcntl
import json
import os
import re
import secrets
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moejax.errors import ConfigError, UnavailableError, file_error, require
from moejax.foreign import write_atomically
from moejax.supervisor import newest_checkpoint
from moejax.sweep_points import Point, applies, point_key, points, value_text
from moejax.sweep_runs import (
    Prepared,
    Run,
    new_keys,
    resolve,
    sweep_from_json,
    sweep_to_json,
    untried_point,
)
from moejax.sweep_space import Adaptive, Between, Cases, Sweep, choices, ranges

try:
    import optuna
    from sqlalchemy.exc import SQLAlchemyError
except ImportError:
    raise ConfigError(
        "moejax sweep needs Optuna, which is not installed; pip install 'moejax[sweep]'"
    ) from None

SWEEP = "sweep.json"  # in the workdir of a sweep: the sweep, and the name of its study
BASE = "base.py"  # the base config, as it was when the sweep began
DATABASE = "sweep.db"
TRIALS, LOGS, CLAIMS = "trials", "logs", "claims"
STORAGE_VARIABLE = "MOEJAX_SWEEP_STORAGE"  # a URL with a password is not for a command line
CONNECT_SECONDS = 10
MOST_ATTEMPTS = 5  # of a trial whose worker died each time before a newer checkpoint
MOST_REPEATS = 10  # proposals in a row that cannot be, or were tried; then the next one is random

Stage = Literal["list", "search", "final", "base"]
Retry = Literal["crashed", "all"]  # which failed trials are tried again
State = optuna.trial.TrialState
optuna.logging.set_verbosity(optuna.logging.WARNING)


class Job(NamedTuple):
    """A trial that this process has claimed.

    Attributes:
        trial: Optuna's handle, which takes reports.
        number: of the trial; its workdir is `trials/NUMBER`.
        stage: what it is tried for.
        run: the training.
        claim: descriptor of the file that is locked as long as the job is somebody's.
    """

    trial: optuna.Trial
    number: int
    stage: Stage
    run: Run
    claim: int


class TrialRecord(NamedTuple):
    """What a storage knows of one trial. `values` are of the objectives, () before its end.

    `crashed` says of a failed one that its config is not to blame, as far as one can tell.
    """

    number: int
    state: str  # waiting, running, complete, pruned, failed
    stage: Stage
    point: Point
    seed: int
    settings: dict[str, Any]
    solved: dict[str, int]
    values: tuple[float, ...]
    error: str | None
    crashed: bool = False


def claim(file: Path) -> int | None:
    """Locks a file for as long as this process lives; None: somebody else has it.

    Raises:
        ConfigError: the file system has no locks.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(descriptor, file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except ConfigError:
        os.close(descriptor)
        raise
    return descriptor


def _lock(descriptor: int, file: Path, how: int) -> None:
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        raise
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be locked ({error.strerror}), by which workers know whose a trial is; "
            "give a --workdir on a file system that locks (Lustre does when mounted with flock)"
        ) from None


# The storage


def storage_url(workdir: Path, given: str | None) -> str:
    """Returns the URL of a sweep's storage: as given, from the environment, or SQLite."""
    url = given or os.environ.get(STORAGE_VARIABLE) or f"sqlite:///{workdir.resolve() / DATABASE}"
    return re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url)  # the driver that we ask for


def shown_url(url: str) -> str:
    """Returns a URL without its password."""
    return re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url)


def open_storage(url: str) -> optuna.storages.RDBStorage:
    """Connects to a storage; makes its tables where it is new.

    Raises:
        ConfigError: it cannot be reached, or its driver is not installed.
    """
    seconds = "timeout" if url.startswith("sqlite") else "connect_timeout"
    arguments = {"connect_args": {seconds: 60 if seconds == "timeout" else CONNECT_SECONDS}}
    shown = shown_url(url)
    try:
        return optuna.storages.RDBStorage(url, engine_kwargs=arguments)
    except (ModuleNotFoundError, ImportError) as error:
        raise ConfigError(
            f"--storage={shown} needs a driver that is not installed ({error}); for PostgreSQL: "
            "pip install 'moejax[postgres]'"
        ) from None
    except (SQLAlchemyError, ValueError, TypeError) as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise ConfigError(
            f"--storage={shown} cannot be reached: {reason}; check the URL and that the server "
            "runs, or leave it out for SQLite in the workdir"
        ) from None
    except RuntimeError as error:  # tables of another version of Optuna
        raise ConfigError(f"--storage={shown} cannot be used: {error}; give another one") from None


@contextlib.contextmanager
def telling_of_loss(workdir: Path) -> Iterator[None]:
    """Has a storage that is lost in the middle end with what to do, not with a traceback.

    Raises:
        UnavailableError: in place of Optuna's or SQLAlchemy's error.
    """
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__ or error
        reason = str(getattr(cause, "orig", None) or cause).strip().splitlines()[0]
        raise UnavailableError(
            f"the storage of {workdir} was lost: {reason}; its trainings save and end; see that it "
            "is there again, and go on with --resume"
        ) from error


# The study


class Study:
    """The trials of one sweep; see `create` and `open_study`."""

    def __init__(self, workdir: Path, prepared: Prepared, name: str, url: str):
        self.workdir, self.prepared = workdir, prepared
        self.new_keys: dict[str, Any] = {}  # with their defaults: the sweep began without them
        self._name, self._storage = name, open_storage(url)
        self._labels = _labels(prepared.sweep)
        kinds = optuna.study.StudyDirection
        directions = [
            kinds.MINIMIZE if objective.direction == "min" else kinds.MAXIMIZE
            for objective in prepared.sweep.objectives
        ]
        self.optuna = optuna.create_study(
            storage=self._storage,
            study_name=name,
            directions=directions,
            pruner=_pruner(prepared),
            load_if_exists=True,
        )

    @property
    def sweep(self) -> Sweep:
        return self.prepared.sweep

    def trial_dir(self, number: int) -> Path:
        return self.workdir / TRIALS / f"{number:03d}"

    def log_of(self, number: int) -> Path:
        return self.workdir / LOGS / f"{number:03d}.log"

    def records(self) -> list[TrialRecord]:
        """Returns all trials but proposals that came to nothing, by number.

        Of one that was tried again the last try counts.
        """
        found = self.optuna.get_trials(deepcopy=False)
        by_number = {_number(trial): _record(trial) for trial in found if _counts(trial)}
        return [by_number[number] for number in sorted(by_number)]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        name = self.workdir / CLAIMS / "next"
        with open(name, "a") as file:
            _lock(file.fileno(), name, fcntl.LOCK_EX)
            yield

    def run(self, point: Mapping[str, Any], seed: int) -> Run:
        """Returns the training of a point; {} is the base config."""
        return resolve(self.prepared, point, seed)

    def enqueue(self) -> None:
        """Puts the trials that are known beforehand into the storage, each once."""
        with self._locked():
            if not self.sweep.adaptive:
                self._enqueue("list", list(points(self.sweep)), self.sweep.seeds)

    def _enqueue(self, stage: Stage, found: Sequence[Point], seeds: Sequence[int]) -> int:
        """Returns how many it put there. Every point has its first seed before any its second."""
        known = {(r.stage, point_key(r.point), r.seed) for r in self.records()}
        before = len(known)
        for seed in seeds:
            for point in found:
                if (stage, point_key(point), seed) not in known:
                    parameters = {name: self._label(name, point[name]) for name in point}
                    attributes = {"stage": stage, "point": point, "seed": seed}
                    self.optuna.enqueue_trial(parameters, attributes)
                    known.add((stage, point_key(point), seed))
        return len(known) - before

    def retry(self, which: Retry) -> list[TrialRecord]:
        """Puts failed trials among those that wait, under their numbers; returns them.

        Optuna keeps what has ended as it is: the try is a trial of its own that names the first.
        """
        with self._locked():
            failed = [r for r in self.records() if r.state == "failed"]
            failed = [r for r in failed if which == "all" or r.crashed]
            failed = [r for r in failed if self._is_free(r.number)]
            for r in failed:
                parameters = {name: self._label(name, r.point[name]) for name in r.point}
                attributes = {"stage": r.stage, "point": r.point, "seed": r.seed}
                self.optuna.enqueue_trial(parameters, {**attributes, "retry_of": r.number})
        return failed

    # What is next

    def take(self) -> Job | Literal["wait", "done"]:
        """Claims the next trial: one whose worker died, one that waits, or a new proposal."""
        with self._locked():
            trials = self.optuna.get_trials(deepcopy=False)
            running = [trial for trial in trials if trial.state == State.RUNNING]
            for trial in running:
                if (descriptor := self._claim(_number(trial))) is not None and (
                    job := self._take_over(trial, descriptor)
                ):
                    return job
            if any(trial.state == State.WAITING for trial in trials):
                return self._begin(self.optuna.ask())
            if self.sweep.adaptive and (job := self._propose()):
                return job
            if self._finalists_missing():
                return self._begin(self.optuna.ask())
        return "wait" if running else "done"

    def _claim(self, number: int) -> int | None:
        return claim(self.workdir / CLAIMS / f"{number:03d}")

    def _is_free(self, number: int) -> bool:
        if (descriptor := self._claim(number)) is None:
            return False
        os.close(descriptor)
        return True

    def _take_over(self, frozen: optuna.trial.FrozenTrial, descriptor: int) -> Job | None:
        """Goes on with a trial that was nobody's, unless that was tried too often."""
        trial = optuna.Trial(self.optuna, frozen._trial_id)  # as Optuna's own integrations do
        known = frozen.user_attrs
        if "point" not in known:
            self.fail(trial, "its worker died while it was made", counts=False)
            os.close(descriptor)
            return None
        step = newest_checkpoint(self.trial_dir(_number(frozen)))
        further = step > known.get("checkpoint", 0)
        attempts = 1 if further else known.get("attempts", 1) + 1
        trial.set_user_attr("attempts", attempts)
        trial.set_user_attr("checkpoint", step)
        if attempts > MOST_ATTEMPTS:
            said = f"its worker died {MOST_ATTEMPTS} times without a newer checkpoint"
            self.fail(trial, said, crashed=True)
            os.close(descriptor)
            return None
        return self._job(trial, known["point"], known["seed"], descriptor)

    def _begin(self, trial: optuna.Trial) -> Job:
        """Starts a trial that was enqueued: its parameters are those that it was given."""
        known = trial.user_attrs
        for name in known["point"]:
            self._suggest(trial, name)
        return self._job(trial, known["point"], known["seed"], self._claim(_number(trial)))

    def _job(self, trial, point: Point, seed: int, descriptor: int | None) -> Job:
        assert descriptor is not None, "claims are made under the lock"
        run = self.run(point, seed)
        trial.set_user_attr("settings", run.settings)
        trial.set_user_attr("solved", run.solved)
        trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
        return Job(trial, _number(trial), trial.user_attrs["stage"], run, descriptor)

    def _propose(self) -> Job | None:
        """Asks for a point that can be and was not tried; None: the search has all its trials.

        The sampler does not learn from what cannot be, and would ask for it for ever.
        """
        space, seed = self.sweep.space, self.sweep.seeds[0]
        assert isinstance(space, Adaptive)
        tried = {point_key(r.point) for r in self.records() if r.stage == "search"}
        if len(tried) >= space.trials or self.optuna.user_attrs.get("exhausted"):
            return None
        for _ in range(MOST_REPEATS):
            count = len(self.optuna.get_trials(deepcopy=False))
            self.optuna.sampler = _sampler(space, space.seed + count)
            trial = self.optuna.ask()
            descriptor, point = self._claim(trial.number), self._suggest_point(trial)
            reason = "was tried" if point_key(point) in tried else None
            try:
                self.run(point, seed)
            except ConfigError as error:
                reason = str(error)
            if reason is None:
                for name, value in {"stage": "search", "seed": seed, "point": point}.items():
                    trial.set_user_attr(name, value)
                return self._job(trial, point, seed, descriptor)
            self.fail(trial, reason, counts=False)
            assert descriptor is not None
            os.close(descriptor)
        point = untried_point(self.prepared, tried)
        if point is None:
            self.optuna.set_user_attr("exhausted", True)
            return None
        self._enqueue("search", [point], [seed])
        return self._begin(self.optuna.ask())

    def _finalists_missing(self) -> bool:
        """Enqueues the best points of a search that is over, and the base; whether it did."""
        records, wanted = self.records(), self.sweep.finalists
        if wanted == 0:
            return False
        searched = [r for r in records if r.stage == "search"]
        if any(r.state in ("waiting", "running") for r in searched):
            return False
        sign = 1 if self.sweep.objectives[0].direction == "min" else -1
        done = [(sign * r.values[0], r) for r in searched if r.values]
        if not done:
            return False  # nothing to compare with the base config
        best = [record.point for _, record in sorted(done, key=lambda row: row[0])[:wanted]]
        seeds = self.sweep.seeds[1:]
        return self._enqueue("base", [{}], seeds) + self._enqueue("final", best, seeds) > 0

    # Parameters, as Optuna knows them

    def _label(self, name: str, value: Any) -> Any:
        """Returns a value as Optuna stores it: tuples as text."""
        return value_text(value) if isinstance(value, tuple | list) else value

    def _suggest(self, trial: optuna.Trial, name: str) -> Any:
        domain = self._labels[name]
        if not isinstance(domain, Between):
            return domain[trial.suggest_categorical(name, list(domain))]
        low, high = domain.low, domain.high
        if domain.whole:
            step = int(domain.step or 1)
            return trial.suggest_int(name, int(low), int(high), step=step, log=domain.log)
        return trial.suggest_float(name, low, high, step=domain.step, log=domain.log)

    def _suggest_point(self, trial: optuna.Trial) -> Point:
        """Suggests what conditions let vary; one name can depend on another."""
        point: Point = {}
        names = list(self._labels)
        while ready := [n for n in names if n not in point and applies(self.sweep, n, point)]:
            for name in ready:
                point[name] = self._suggest(trial, name)
        return point

    # What came of it

    def prunes(self, stage: Stage) -> bool:
        """Whether trials of a stage may be stopped early: the finalists are to be compared."""
        space = self.sweep.space
        return isinstance(space, Adaptive) and space.pruner != "none" and stage == "search"

    def reported(self, trial: optuna.Trial) -> set[int]:
        """Returns the steps whose value the pruner knows of, also from a worker that died."""
        return set(self._storage.get_trial(trial._trial_id).intermediate_values)

    def complete(self, trial: optuna.Trial, values: Sequence[float]) -> None:
        self.optuna.tell(trial, list(values))

    def prune(self, trial: optuna.Trial) -> None:
        self.optuna.tell(trial, state=State.PRUNED)

    def fail(
        self, trial: optuna.Trial, error: str, *, counts: bool = True, crashed: bool = False
    ) -> None:
        """Records the error of a trial.

        Args:
            counts: False for a proposal that never ran.
            crashed: whether another try may do better with the same config; see `retry`.
        """
        trial.set_user_attr("error", error if len(error) <= 1000 else f"{error[:1000]} ...")
        if not counts:
            trial.set_user_attr("no_trial", True)
        if crashed:
            trial.set_user_attr("crashed", True)
        self.optuna.tell(trial, state=State.FAIL)

    def close(self) -> None:
        """Lets go of the connections of this process."""
        self._storage.remove_session()
        self._storage.engine.dispose()


def _labels(sweep: Sweep) -> dict[str, Any]:
    """Returns of each name its range, or its values by what Optuna stores for them."""
    found: dict[str, Any] = {}
    for name, values in ranges(sweep.space):
        if isinstance(values, Between) and sweep.adaptive:
            found[name] = values
        elif isinstance(values, Between):  # drawn beforehand: what was drawn is the list
            drawn = [point[name] for point in points(sweep) if name in point]
            found.setdefault(name, {}).update({value: value for value in drawn})
        else:
            listed = choices(values, None if isinstance(values, Cases) else name)
            labels = {value_text(v) if isinstance(v, tuple) else v: v for v in listed}
            found.setdefault(name, {}).update(labels)
    return found


def _record(trial: optuna.trial.FrozenTrial) -> TrialRecord:
    known = trial.user_attrs
    complete = trial.state == State.COMPLETE
    return TrialRecord(
        _number(trial),
        "failed" if trial.state == State.FAIL else trial.state.name.lower(),
        known["stage"],
        known["point"],
        known["seed"],
        known.get("settings", {}),
        known.get("solved", {}),
        tuple(trial.values) if complete else (),
        known.get("error"),
        known.get("crashed", False),
    )


def _number(trial: optuna.Trial | optuna.trial.FrozenTrial) -> int:
    """Returns the number that names a trial's workdir, the first one where it is tried again."""
    return trial.user_attrs.get("retry_of", trial.number)


def _counts(trial: optuna.trial.FrozenTrial) -> bool:
    return "point" in trial.user_attrs and "no_trial" not in trial.user_attrs


def _sampler(space: Adaptive, seed: int) -> optuna.samplers.BaseSampler:
    """A sampler for one proposal: two workers with one seed would draw the same."""
    with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning, action="ignore"):
        return optuna.samplers.TPESampler(n_startup_trials=space.startup, seed=seed)


def _pruner(prepared: Prepared) -> optuna.pruners.BasePruner:
    space = prepared.sweep.space
    kind = space.pruner if isinstance(space, Adaptive) else "none"
    if kind == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=3)
    if kind == "none":
        return optuna.pruners.NopPruner()
    steps, first = prepared.base["train.steps"], prepared.base["eval.every"]
    if kind == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=3)
    return optuna.pruners.HyperbandPruner(first, max(first, steps), reduction_factor=3)


# Beginning and going on


def create(workdir: Path, prepared: Prepared, given: str | None) -> Study:
    """Makes the workdir of a new sweep, with all that its workers read.

    Raises:
        ConfigError: the workdir cannot be written, or the storage not be reached.
    """
    url = storage_url(workdir, given)
    try:
        for folder in (TRIALS, LOGS, CLAIMS):
            (workdir / folder).mkdir(parents=True, exist_ok=True)
        name = f"moejax-{secrets.token_hex(8)}"
        own = storage_url(workdir, f"sqlite:///{workdir.resolve() / DATABASE}")
        storage = None if url == own else shown_url(url)
        study = Study(workdir, prepared, name, url)
        write_atomically(workdir / BASE, base_source(prepared.base))
        data = {"study": name, "storage": storage, **sweep_to_json(prepared)}
        write_atomically(workdir / SWEEP, json.dumps(data, indent=1) + "\n")
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"workdir {workdir} cannot be written: {reason}; give another --workdir"
        raise file_error(message, error) from None
    study.enqueue()
    return study


def open_study(workdir: Path, given: str | None, prepared: Prepared | None = None) -> Study:
    """Opens the sweep of a workdir.

    Args:
        prepared: what the sweep is now; it must be what it was when it began.

    Raises:
        ConfigError: there is none, it is another one, or its storage cannot be reached.
    """
    try:
        data = json.loads((workdir / SWEEP).read_text(encoding="utf-8"))
        stored = sweep_from_json(data)
    except FileNotFoundError:
        raise ConfigError(
            f"{workdir / SWEEP} does not exist; give the workdir of a `moejax sweep`"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{workdir / SWEEP} cannot be read: {error}") from None
    if prepared is not None:
        both = (sweep_to_json(made) for made in (stored, prepared))
        _check_same(workdir, *(json.loads(json.dumps(one)) for one in both))
    if data["storage"] is not None:
        require(
            given is not None or STORAGE_VARIABLE in os.environ,
            f"the trials of {workdir} are in {data['storage']}; give it by --storage or "
            f"{STORAGE_VARIABLE}",
        )
    study = Study(workdir, stored, data["study"], storage_url(workdir, given))
    study.new_keys = new_keys(data)
    study.enqueue()  # all that a process that was killed left out
    return study


def _check_same(workdir: Path, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    keys = [k for k in asked["base"] if stored["base"].get(k) != asked["base"][k]]
    rows = [f"{k} {stored['base'].get(k)!r} -> {asked['base'][k]!r}" for k in keys]
    parts = [k for k in asked["sweep"] if stored["sweep"].get(k) != asked["sweep"][k]]
    rows += [part for part in parts if part != "kind"]
    require(
        not rows,
        f"workdir {workdir} has another sweep ({', '.join(rows)}); give back what it had to "
        "resume it, or another --workdir",
    )


def base_source(base: Mapping[str, Any]) -> str:
    """Returns a config file with these values: editing the one they came from changes no trial."""
    sections: dict[str, Any] = {}
    for name, value in base.items():
        section, _, key = name.rpartition(".")
        (sections.setdefault(section, {}) if section else sections)[key] = value
    lines = []
    for name, value in sections.items():
        if isinstance(value, dict):
            rows = [f"            {key!r}: {inner!r}," for key, inner in value.items()]
            lines += [f"        {name!r}: {{", *rows, "        },"]
        else:
            lines.append(f"        {name!r}: {value!r},")
    title = '"""The base config of this sweep, as it was when the sweep began."""'
    return "\n".join([title, "", "", "def get_config():", "    return {", *lines, "    }", ""])
