"""MoE against dense at equal active FLOPs: the two quickstarts, each with its best learning rate.

    python benchmarks/compare.py [--workdir runs/compare] [--json compare.json] [key=value ...]

Both arms see the same tokens in the same order, with the same learning rates to choose from (seed
0); the best one is then run with the other seeds. Runs are ordinary workdirs; finished ones are not
repeated, so the comparison can be stopped and started again. Writes docs/quickstart.md and
docs/quickstart.png.
"""

import dataclasses
import datetime
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from common import Row, arguments, report

from moejax.compare import Arm, relative_cost
from moejax.compare_report import SIZES, plot_curves
from moejax.compare_runs import Run, load_run
from moejax.config import Config
from moejax.metrics import read_metrics
from moejax.overrides import load_config
from moejax.workdir import read_config

ROOT = Path(__file__).resolve().parents[1]
ARMS = {"moe": "configs/quickstart.py", "dense": "configs/quickstart_dense.py"}
NAMES = {"moe": "MoE", "dense": "dense"}
LEARNING_RATES = (3e-3, 6e-3)  # to start with; while the best is at an edge, its neighbour is tried
EXTENSIONS = 2
SEEDS = (0, 1, 2)


@dataclasses.dataclass
class Result:
    """What one arm did: loss by learning rate at seed 0, and with the best rate a run a seed."""

    losses: dict[float, float]
    best: float
    arm: Arm


def train(folder: Path, arm: str, rate: float, seed: int, overrides: list[str]) -> Run:
    """Trains one arm, if it has not been trained, and returns its run."""
    workdir = folder / f"{arm}_lr{rate:g}_seed{seed}"
    words = [f"optim.learning_rate={rate}", f"seed={seed}", "mesh.expert=1", "mesh.data=1"]
    words += ["logging.every=10", "eval.every=225", "eval.batches=16", "checkpoint.every=100000"]
    command = [sys.executable, "-m", "moejax", "train", str(ROOT / ARMS[arm])]
    command += ["--workdir", str(workdir), "--cpu_devices", "1", *words, *overrides]
    config = load_config(str(ROOT / ARMS[arm]), [*words, *overrides])
    steps = config.train.steps
    if (workdir / "config.json").exists() and read_config(workdir) != config:
        raise SystemExit(f"{workdir} is of another config; remove it to train it again")
    if not any(r["step"] == steps and r["split"] == "eval" for r in read_metrics(workdir)):
        print(f"training {workdir.name}", flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return load_run(workdir)


def best_rate(sweep: dict[float, dict[str, Run]], arm: str) -> float:
    """Returns the learning rate with the lowest loss of this arm."""
    return min(sweep, key=lambda rate: sweep[rate][arm].loss)


def neighbour(sweep: dict[float, dict[str, Run]], arm: str) -> float:
    """Returns the rate to try next to the arm's best: beyond it if it is an edge, else itself."""
    best = best_rate(sweep, arm)
    return best * {max(sweep): 2.0, min(sweep): 0.5}.get(best, 1.0)


def run_arms(folder: Path, overrides: list[str]) -> dict[str, Result]:
    """Runs the arms side by side: a core each, and a drift of the machine hits both."""
    with ThreadPoolExecutor(len(ARMS)) as pool:

        def side_by_side(rates: dict[str, float], seed: int) -> dict[str, Run]:
            found = pool.map(lambda arm: train(folder, arm, rates[arm], seed, overrides), ARMS)
            return dict(zip(ARMS, found, strict=True))

        sweep = {r: side_by_side(dict.fromkeys(ARMS, r), SEEDS[0]) for r in LEARNING_RATES}
        for _ in range(EXTENSIONS):
            for rate in sorted({neighbour(sweep, arm) for arm in ARMS} - set(sweep)):
                sweep[rate] = side_by_side(dict.fromkeys(ARMS, rate), SEEDS[0])
        results = {}
        for arm in ARMS:
            losses = {rate: sweep[rate][arm].loss for rate in sorted(sweep)}
            best = best_rate(sweep, arm)
            results[arm] = Result(losses, best, Arm(NAMES[arm], (sweep[best][arm],)))
        best_rates = {arm: result.best for arm, result in results.items()}
        for seed in SEEDS[1:]:
            for arm, run in side_by_side(best_rates, seed).items():
                known = results[arm].arm
                results[arm].arm = known._replace(runs=(*known.runs, run))
    return results


def size_rows(configs: dict[str, Config]) -> list[str]:
    """Returns the table rows on parameters and FLOPs."""
    return [
        f"| {name} | {count(configs['moe']):,} | {count(configs['dense']):,} |"
        for name, count in SIZES.items()
    ]


def loss_rows(results: dict[str, Result]) -> list[str]:
    """Returns the table rows on losses and seconds."""
    moe, dense = results["moe"], results["dense"]
    rows = [
        f"| loss, learning rate {rate:g}, seed 0 | {moe.losses[rate]:.4f} | {loss:.4f} |"
        for rate, loss in dense.losses.items()
    ]
    rows.append(f"| learning rate chosen | {moe.best:g} | {dense.best:g} |")
    for seed, losses in zip(SEEDS, zip(moe.arm.losses, dense.arm.losses, strict=True), strict=True):
        rows.append(f"| loss, seed {seed} | {' | '.join(f'{loss:.4f}' for loss in losses)} |")
    means = (result.arm.loss for result in (moe, dense))
    rows.append(f"| loss, mean of seeds | {' | '.join(f'**{m:.4f}**' for m in means)} |")
    seconds = (result.arm.cost("seconds") for result in (moe, dense))
    return [*rows, f"| seconds in steps, mean | {' | '.join(f'{s:.0f}' for s in seconds)} |"]


def verdict(results: dict[str, Result]) -> list[str]:
    """Returns the sentences that say who won, by how much, and at what cost."""
    losses = {arm: results[arm].arm.losses for arm in ARMS}
    spread = max(max(v) - min(v) for v in losses.values())
    pairs = [d - m for d, m in zip(losses["dense"], losses["moe"], strict=True)]
    larger = "larger" if mean(pairs) > spread else "not larger"
    lines = [
        f"The MoE's loss is lower by **{mean(pairs):.4f}** nats on average, {larger} than the "
        f"largest spread over seeds of either arm ({spread:.4f}); seed by seed it is lower by "
        f"{', '.join(f'{pair:.4f}' for pair in pairs)}."
    ]
    moe, dense = results["moe"].arm, results["dense"].arm
    ratios = {axis: relative_cost(moe, dense, axis).value for axis in ("tokens", "seconds")}
    told = [f"{ratio:.2f} of its {name}" for name, ratio in ratios.items() if ratio]
    if told:
        lines.append(
            f"It reaches the dense model's final loss with {' and '.join(told)}; the two trained "
            "at once on 2 shared CPU cores."
        )
    return lines


def write_page(
    path: Path, results: dict[str, Result], configs: dict[str, Config], overrides: list[str]
) -> None:
    """Writes the page with the numbers of this run."""
    train, data = configs["moe"].train, configs["moe"].data
    tokens = train.steps * train.batch_size * data.sequence_length / 1e6
    changed = f", with {' '.join(overrides)}" if overrides else ""
    lines = [
        "# Does the MoE learn more than a dense model of equal cost?",
        "",
        f"Written by `make compare` on {datetime.date.today().isoformat()}{changed}. Two configs, "
        "`configs/quickstart.py` and `configs/quickstart_dense.py`, with equal active FLOPs per "
        f"token, trained on the same {tokens:.1f} M byte tokens in the same order. Both chose "
        "among the same learning rates at seed 0; the best ran with three seeds. Loss is on 16 "
        "batches of the validation split, nats per byte token, dropless.",
        "",
        "| | MoE | dense |",
        "|---|---|---|",
        *size_rows(configs),
        *loss_rows(results),
        "",
        *verdict(results),
        "",
        "![loss against tokens and seconds](quickstart.png)",
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs/compare")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    configs = {arm: load_config(str(ROOT / file), options.overrides) for arm, file in ARMS.items()}
    results = run_arms(options.workdir, options.overrides)
    found = [results[arm].arm for arm in ARMS]
    plot_curves(found, options.docs / "quickstart.png", axes=("tokens", "seconds"))
    write_page(options.docs / "quickstart.md", results, configs, options.overrides)
    rows = []
    for arm in ("dense", "moe"):
        loss = results[arm].arm.loss
        base = None if arm == "dense" else rows[0].value
        baseline = None if arm == "dense" else "dense"
        ratio = None if base is None else loss / base
        rows.append(Row(arm, loss, "nats per token", baseline, ratio))
    report("validation loss at equal active FLOPs, mean of seeds", rows, options.json)


if __name__ == "__main__":
    main()
