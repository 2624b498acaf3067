"""One side of `benchmarks/peers.py`: a process that holds a model and trains when it is told to.

Parent and worker speak lines of JSON. The worker takes its settings as its only argument and says
what it made (`facts`); then it answers each `{"steps": n}` with the wall and CPU seconds of those
steps and the loss of each. It ends with its stdin. Imported by both environments: NumPy only.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

BATCHES = 4  # taken in turn, so that the loss of random tokens can fall
SEED = 0


def serve(make: Callable[[dict[str, Any]], tuple[Callable[[np.ndarray], float], dict]]) -> None:
    """Runs a worker.

    Args:
        make: from the settings, (a function that trains one step on tokens [B, T] and returns the
            cross-entropy, what the parent should know). The model is warm when `make` returns.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(content: dict) -> None:
        print(json.dumps(content), file=answers, flush=True)

    settings = json.loads(sys.argv[1])
    tokens_nbt = token_batches(settings["config"])
    step, facts = make(settings)
    say(facts)
    done = 0
    for line in sys.stdin:
        steps = json.loads(line)["steps"]
        wall, cpu = time.perf_counter(), time.process_time()
        losses = [step(tokens_nbt[(done + i) % BATCHES]) for i in range(steps)]
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        say({"wall": wall, "cpu": cpu, "losses": losses})
        done += steps


def token_batches(config: dict[str, Any]) -> np.ndarray:
    """Returns int64 [BATCHES, B, T]: ids drawn uniformly, the same in every process."""
    shape = (BATCHES, config["train"]["batch_size"], config["data"]["sequence_length"])
    return np.random.default_rng(SEED).integers(0, config["model"]["vocab_size"], shape)
