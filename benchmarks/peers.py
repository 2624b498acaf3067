"""Speed of a 62 M parameter Mixtral next to Hugging Face transformers on this CPU.

    make bench-peers
    python benchmarks/peers.py [--json peers.json] [--rows plain recompute devices_8 sharded_8]

`plain` and `recompute` (`model.remat=full` against gradient checkpointing) have moejax's tokens per
CPU second over transformers'; `devices_8` has 8 virtual devices, expert axis 8, over one device of
the same batch, and `sharded_8` the axis that splits everything else too (`mesh.expert_fsdp`). These
two gather tokens, the cheapest exchange in one memory. The two sides of a row are processes that
hold their models and take turns; CPU seconds are of the whole process. Both train with AdamW,
clipping and the balance loss in float32 on the same random tokens, from the same weights, so their
first losses have to agree: the run ends with an error where they do not. The model is
configs/bench/mixtral_62m.py.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import Row, arguments, report

from moejax.config import Config
from moejax.overrides import load_config

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "bench" / "mixtral_62m.py"
WORKERS = Path(__file__).with_suffix("")  # benchmarks/peers/
PEERS = ROOT / ".venv-peers" / "bin" / "python"
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),  # moejax is the checkout that this file is in
    "HF_HUB_OFFLINE": "1",  # no look for kernels on the network
    # Torch's threads sleep at a barrier. By default they spin, and where another process has a core
    # that doubles torch's CPU seconds (10 instead of 5 a step): the ratio would flatter moejax.
    "OMP_WAIT_POLICY": "PASSIVE",
}
# Nats between the losses of the two sides: of the same weights, and after each of the next steps,
# in which AdamW's first updates make much of little (0.012 was seen). Later, roundings decide.
FIRST_TOLERANCE, TOLERANCE, AGREEING = 1e-3, 0.05, 5


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two sides, (name, worker, overrides) each, and the ratio of their speeds that we want."""

    side: tuple[str, str, list[str]]
    baseline: tuple[str, str, list[str]]
    bar: float


REMAT = ["model.remat=full"]
ONE_MEMORY = ["moe.transport=gather", "moe.buffer_factor=2.0"]
COMPARISONS = {
    "plain": Comparison(
        ("moejax", "moejax_side.py", []), ("transformers", "transformers_side.py", []), 1.0
    ),
    "recompute": Comparison(
        ("moejax", "moejax_side.py", REMAT), ("transformers", "transformers_side.py", REMAT), 1.0
    ),
    "devices_8": Comparison(
        ("8 devices", "moejax_side.py", ["mesh.expert=8", *ONE_MEMORY]),
        ("1 device", "moejax_side.py", []),
        0.85,
    ),
    "sharded_8": Comparison(
        ("8 devices", "moejax_side.py", ["mesh.expert_fsdp=8", *ONE_MEMORY]),
        ("1 device", "moejax_side.py", []),
        0.85,
    ),
}


class Worker:
    """A worker process; see `peers/worker.py`. A context manager: the process ends with it."""

    def __init__(self, python: Path, script: str, settings: dict[str, Any]):
        self.script = script
        environment = {**os.environ, **ENVIRONMENT}
        self._process = subprocess.Popen(
            [str(python), str(WORKERS / script), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        try:
            self.facts = self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.script} ended with {self._process.wait()}; see its error")
        return json.loads(line)

    def train(self, steps: int) -> dict[str, Any]:
        """Returns `wall` and `cpu` seconds of `steps` more steps, and `losses`, one a step."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"steps": steps}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the process and waits for it."""
        self._process.communicate()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def start(python: Path, file: Path, script: str, overrides: list[str], weights: str) -> Worker:
    """Starts a side; `weights` is where moejax writes the first ones and a peer reads them."""
    config = dataclasses.asdict(load_config(str(file), overrides))
    settings = {"file": str(file), "overrides": overrides, "config": config, "weights": weights}
    return Worker(python, script, settings)


def check_losses(first: list[float], second: list[float], vocab_size: int) -> None:
    """Checks that two trainings of the same model start at chance, learn, and agree at first.

    Raises:
        RuntimeError: they do not.
    """
    difference = np.abs(np.subtract(first, second))[:AGREEING]
    limit = np.where(np.arange(len(difference)) == 0, FIRST_TOLERANCE, TOLERANCE)
    if not (difference < limit).all():  # NaN is not below
        raise RuntimeError(
            f"losses differ by {difference} nats, limits {limit}: the sides train different models"
        )
    if not abs(first[0] - math.log(vocab_size)) < 1:
        raise RuntimeError(f"the first loss is {first[0]:.3f}, not near log({vocab_size})")
    if not first[-1] < first[0]:
        raise RuntimeError(f"the loss did not fall: {first}")


def compare(
    name: str, comparison: Comparison, config: Config, file: Path, pythons: dict[str, Path], options
) -> list[Row]:
    """Measures one comparison: the sides take turns of `options.steps` steps."""
    tokens = config.train.batch_size * config.data.sequence_length * options.steps
    sides = (comparison.side, comparison.baseline)
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "weights.npz") if "transformers" in sides[1][0] else ""

        def start_side(side):
            return start(pythons[side[1]], file, side[1], side[2], weights)

        with start_side(sides[0]) as ours, start_side(sides[1]) as theirs:
            facts = [ours.facts, theirs.facts]
            print(f"{name}: {json.dumps(facts)}", file=sys.stderr)
            if facts[0]["parameters"] != facts[1]["parameters"]:
                raise RuntimeError(f"the sides differ in parameters: {facts}")
            turns = [(ours.train(1), theirs.train(1))]  # warm up
            turns += [
                (ours.train(options.steps), theirs.train(options.steps))
                for _ in range(options.repeats)
            ]
    losses = [[loss for turn in turns for loss in turn[side]["losses"]] for side in (0, 1)]
    check_losses(losses[0], losses[1], config.model.vocab_size)
    print(f"{name}: loss {losses[0][0]:.4f} to {losses[0][-1]:.4f}", file=sys.stderr)
    rows = []
    for clock, unit in (("cpu", "tokens/CPU s"), ("wall", "tokens/s")):
        speeds = [tokens / median(turn[side][clock] for turn in turns[1:]) for side in (0, 1)]
        names = [f"{name}, {side[0]}" for side in sides]
        bar = f" (bar {comparison.bar})" if clock == "cpu" else ""
        rows.append(Row(names[1], speeds[1], unit))
        rows.append(Row(names[0] + bar, speeds[0], unit, names[1], speeds[0] / speeds[1]))
    return rows


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn (default 2)")
    parser.add_argument("--rows", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    parser.add_argument("--peer_python", type=Path, default=PEERS, help="with transformers")
    options = parser.parse_args()
    if not options.peer_python.exists():
        parser.error(f"{options.peer_python} is not there; `make bench-peers` makes it")
    config = load_config(str(CONFIG), [])
    pythons = {
        "moejax_side.py": Path(sys.executable),
        "transformers_side.py": options.peer_python,
    }
    rows = []
    for name in options.rows:
        rows += compare(name, COMPARISONS[name], config, CONFIG, pythons, options)
    report("train step of configs/bench/mixtral_62m.py", rows, options.json)


if __name__ == "__main__":
    main()
