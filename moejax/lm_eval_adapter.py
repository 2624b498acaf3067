"""Tasks of EleutherAI's lm-evaluation-harness: its `LM` over our `Scorer`, and how tasks are run.

Imports the harness, an extra: `eval_command` says how to get it where it is missing.
"""

import logging
import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

from moejax.config import Config, ConfigError
from moejax.evaluate import Restored
from moejax.mesh import peak_memory_bytes
from moejax.score import Request, Sampling, Scorer

BOOTSTRAPS = 1000  # draws for the standard error of metrics that are no mean
_MAX_TOKENS = 256  # of a continuation whose task does not say how long; half the context at most
_IGNORED = {"until", "do_sample", "temperature", "top_p", "seed"}
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessModel(TemplateLM):
    """The harness's view of a checkpoint.

    Contexts and continuations are cut into ids as the harness does for causal models; an empty
    context stays empty, see `Scorer`.
    """

    def __init__(self, scorer: Scorer):
        super().__init__()
        self.scorer = scorer

    @property
    def eot_token_id(self) -> int:
        return self.scorer.tokenizer.end_of_document

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return self.scorer.tokenizer.encode(string).tolist()

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Scores (context, continuation) pairs: (log-likelihood in nats, greedy gives it)."""
        pairs: list[Any] = [request.args for request in requests]
        cut = [
            self._encode_pair(context, continuation)
            if context
            else ([], self.tok_encode(continuation))
            for context, continuation in pairs
        ]
        return self._loglikelihood_tokens(
            [(pair, before, after) for pair, (before, after) in zip(pairs, cut, strict=True)]
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_
    ) -> list[tuple[float, bool]]:
        ids = [Request(_ids(context), _ids(rest)) for _, context, rest in requests]
        return [(score.log_likelihood, score.greedy) for score in self.scorer.score(ids)]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Scores whole texts of any length, nats."""
        texts = [self.scorer.tokenizer.encode(request.args[0]) for request in requests]
        return self.scorer.score_text(texts)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each context until one of its stop strings, which is left out."""
        prompts: list[Any] = [request.args[0] for request in requests]
        options = [_options(request.args) for request in requests]
        samplings = [sampling_of(given, self.scorer.max_length) for given in options]
        texts = [""] * len(requests)
        for sampling in dict.fromkeys(samplings):
            chosen = [i for i, other in enumerate(samplings) if other == sampling]
            contexts = [self.scorer.tokenizer.encode(prompts[i]) for i in chosen]
            for i, text in zip(chosen, self.scorer.generate(contexts, sampling), strict=True):
                texts[i] = _until(text, options[i].get("until") or [])
        return texts


def _options(args: tuple[Any, ...]) -> dict[str, Any]:
    return args[1]


def _ids(ids: Iterable[int]) -> np.ndarray:
    return np.asarray(list(ids), np.int32)


def _until(text: str, stops: str | list[str]) -> str:
    stops = [stops] if isinstance(stops, str) else stops
    places = [text.find(stop) for stop in stops if stop]
    return text[: min([place for place in places if place >= 0], default=len(text))]


def sampling_of(options: dict[str, Any], max_length: int) -> Sampling:
    """Returns how a task's `generation_kwargs` ask to generate.

    Raises:
        ConfigError: they ask for something that moejax does not do.
    """
    unknown = sorted(set(options) - _IGNORED - set(_LENGTHS))
    if unknown:
        known = ", ".join(sorted(_IGNORED | set(_LENGTHS)))
        raise ConfigError(
            f"generation_kwargs of the task has {', '.join(unknown)}, which moejax does not read; "
            f"use {known}"
        )
    lengths = [options[name] for name in _LENGTHS if options.get(name) is not None]
    max_tokens = int(lengths[0]) if lengths else min(_MAX_TOKENS, max_length // 2)
    temperature = float(options.get("temperature") or 0.0)
    sampled = options.get("do_sample", temperature > 0)
    if sampled and temperature == 0:
        temperature = 1.0
    if not sampled:
        return Sampling(max_tokens)
    top_p = float(options.get("top_p", 1.0))
    return Sampling(max_tokens, temperature, top_p, int(options.get("seed", 0)))


def load_tasks(names: Sequence[str], folder: Path | None) -> TaskManager:
    """Returns the harness's list of tasks, which has `names`.

    Args:
        folder: of YAML files of tasks; None: the tasks that the harness ships.

    Raises:
        ConfigError: there is no such task.
    """
    manager = TaskManager(include_path=folder and str(folder), include_defaults=folder is None)
    for name in names:
        if name not in manager.all_tasks:
            where = f"in --tasks_path {folder}" if folder else "among those that lm-eval ships"
            known = manager.all_tasks
            listed = f": {', '.join(known)}" if len(known) <= 30 else ""
            raise ConfigError(f"no task {name!r} {where}, which has {len(known)}{listed}")
    return manager


def run_tasks(
    config: Config,
    restored: Restored,
    names: Sequence[str],
    manager: TaskManager,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluates a checkpoint on tasks.

    Args:
        manager: of `load_tasks`.
        limit: examples of each task; None: all.

    Returns:
        For each task and group its metrics by name, standard errors as `NAME_stderr` (None where
        there is none), `samples`; and under "cost" what all took.

    Raises:
        ConfigError: a request does not fit the model, or a task cannot be loaded.
    """
    scorer = Scorer(config, restored)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # it would fork a process that runs JAX
    begun = time.monotonic()
    try:
        found: Any = simple_evaluate(
            model=HarnessModel(scorer),
            tasks=list(names),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
        )
    except (ConfigError, jax.errors.JaxRuntimeError, MemoryError):  # not the task's
        raise
    except Exception as error:  # the harness and `datasets` raise dozens of kinds for a bad task
        logging.getLogger("moejax").debug("a task failed", exc_info=True)
        raise ConfigError(
            f"--tasks {','.join(names)} cannot be run: {type(error).__name__}: {error}; mend the "
            "task's YAML or its data"
        ) from error
    assert found is not None  # on the only process
    results = {name: _metrics(row) for name, row in found["results"].items()}
    for name, counts in found["n-samples"].items():
        results[name]["samples"] = counts["effective"]
    cost = {
        "seconds": time.monotonic() - begun,  # compiling included
        "peak_memory_bytes": peak_memory_bytes(),
        "cut_contexts": scorer.cut_contexts,
    }
    return results | {"cost": cost}


def _metrics(row: Any) -> dict[str, float | None]:
    """Returns the numbers of a task by metric, and by filter where one was used."""
    metrics: dict[str, float | None] = {}
    for key, value in row.items():
        name, comma, used = key.partition(",")
        if comma:
            number = float(value) if isinstance(value, (int, float)) else math.nan
            metrics[name if used == "none" else key] = number if math.isfinite(number) else None
    return metrics
