"""MoE against dense at equal active FLOPs: the two quickstarts, each with its best learning rate.

    python benchmarks/compare.py [--workdir runs/compare] [--json compare.json] [key=value ...]

Both arms see the same tokens in the same order, with the same learning rates to choose from (seed
0); the best one is then run with the other seeds. Runs are ordinary workdirs; finished ones are not
repeated, so the comparison can be stopped and started again. Writes docs/quickstart.md and
docs/quickstart.png.
"""

import dataclasses
import datetime
import itertools
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from common import Row, arguments, report

from moejax.config import Config
from moejax.flops import active_parameters, flops_per_token, total_parameters
from moejax.metrics import read_metrics
from moejax.overrides import load_config
from moejax.workdir import read_config

ROOT = Path(__file__).resolve().parents[1]
ARMS = {"moe": "configs/quickstart.py", "dense": "configs/quickstart_dense.py"}
LEARNING_RATES = (3e-3, 6e-3)  # to start with; while the best is at an edge, its neighbour is tried
EXTENSIONS = 2
SEEDS = (0, 1, 2)
Records = list[dict]


@dataclasses.dataclass
class Arm:
    """What one arm did: loss by learning rate at seed 0, the best rate, and its records by seed."""

    losses: dict[float, float]
    best: float
    runs: dict[int, Records]


def train(folder: Path, arm: str, rate: float, seed: int, overrides: list[str]) -> Records:
    """Trains one arm, if it has not been trained, and returns its records."""
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
    return read_metrics(workdir)


def final_loss(records: Records) -> float:
    """Returns the validation loss at the last step, nats a token."""
    return [r["loss"] for r in records if r["split"] == "eval"][-1]


def best_rate(sweep: dict[float, dict[str, Records]], arm: str) -> float:
    """Returns the learning rate with the lowest loss of this arm."""
    return min(sweep, key=lambda rate: final_loss(sweep[rate][arm]))


def neighbour(sweep: dict[float, dict[str, Records]], arm: str) -> float:
    """Returns the rate to try next to the arm's best: beyond it if it is an edge, else itself."""
    best = best_rate(sweep, arm)
    return best * {max(sweep): 2.0, min(sweep): 0.5}.get(best, 1.0)


def run_arms(folder: Path, overrides: list[str]) -> dict[str, Arm]:
    """Runs the arms side by side: a core each, and a drift of the machine hits both."""
    with ThreadPoolExecutor(len(ARMS)) as pool:

        def side_by_side(rates: dict[str, float], seed: int) -> dict[str, Records]:
            found = pool.map(lambda arm: train(folder, arm, rates[arm], seed, overrides), ARMS)
            return dict(zip(ARMS, found, strict=True))

        sweep = {r: side_by_side(dict.fromkeys(ARMS, r), SEEDS[0]) for r in LEARNING_RATES}
        for _ in range(EXTENSIONS):
            for rate in sorted({neighbour(sweep, arm) for arm in ARMS} - set(sweep)):
                sweep[rate] = side_by_side(dict.fromkeys(ARMS, rate), SEEDS[0])
        results = {}
        for arm in ARMS:
            losses = {rate: final_loss(sweep[rate][arm]) for rate in sorted(sweep)}
            best = best_rate(sweep, arm)
            results[arm] = Arm(losses, best, {SEEDS[0]: sweep[best][arm]})
        best_rates = {arm: result.best for arm, result in results.items()}
        for seed in SEEDS[1:]:
            for arm, records in side_by_side(best_rates, seed).items():
                results[arm].runs[seed] = records
    return results


def seconds_of(records: Records) -> dict[int, float]:
    """Returns training seconds by step: the sum of `step_seconds`, interpolated between lines."""
    total, last, seconds = 0.0, 0, {}
    for record in records:
        if record["split"] == "train":
            total += (record["step_seconds"] or 0.0) * (record["step"] - last)
            last = record["step"]
        seconds[record["step"]] = total
    return seconds


def plot(results: dict[str, Arm], path: Path) -> None:
    """Draws validation loss against tokens and against seconds, a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for arm, colour in (("moe", "tab:blue"), ("dense", "tab:orange")):
        for seed, records in results[arm].runs.items():
            evals = [r for r in records if r["split"] == "eval"]
            seconds = seconds_of(records)
            label = {"moe": "MoE", "dense": "dense"}[arm] if seed == SEEDS[0] else None
            loss = [r["loss"] for r in evals]
            tokens = [r["tokens_seen"] / 1e6 for r in evals]
            axes[0].plot(tokens, loss, color=colour, label=label, alpha=0.8)
            axes[1].plot([seconds[r["step"]] for r in evals], loss, color=colour, alpha=0.8)
    axes[0].set(xlabel="tokens seen, millions", ylabel="validation loss, nats per token")
    axes[1].set(xlabel="seconds in training steps, both arms at once on 2 CPU cores")
    for axis in axes:
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def cost_to_reach(costs: dict[int, float], records: Records, loss: float) -> float | None:
    """Returns the cost at which validation loss first was `loss`, interpolated, or None.

    Args:
        costs: by step, for example tokens or seconds.
    """
    evals = [(costs[r["step"]], r["loss"]) for r in records if r["split"] == "eval"]
    for (c0, l0), (c1, l1) in itertools.pairwise(evals):
        if l1 <= loss < l0:
            return c0 + (c1 - c0) * (l0 - loss) / (l0 - l1)
    return None


def tokens_of(records: Records) -> dict[int, float]:
    """Returns tokens seen, by step."""
    return {r["step"]: r["tokens_seen"] for r in records}


def relative_cost(results: dict[str, Arm], costs_of: Callable[[Records], dict]) -> float | None:
    """Returns the MoE's cost over the dense model's at the dense model's final loss, or None.

    A mean over seeds; None when the MoE of one seed never gets there.
    """
    ratios = []
    for seed in SEEDS:
        moe, dense = results["moe"].runs[seed], results["dense"].runs[seed]
        reached = cost_to_reach(costs_of(moe), moe, final_loss(dense))
        if reached is None:
            return None
        ratios.append(reached / costs_of(dense)[dense[-1]["step"]])
    return mean(ratios)


def size_rows(configs: dict[str, Config]) -> list[str]:
    """Returns the table rows on parameters and FLOPs."""
    counts = {
        "parameters, total": total_parameters,
        "parameters, active": active_parameters,
        "FLOPs per token": flops_per_token,
    }
    return [
        f"| {name} | {count(configs['moe']):,} | {count(configs['dense']):,} |"
        for name, count in counts.items()
    ]


def loss_rows(results: dict[str, Arm]) -> list[str]:
    """Returns the table rows on losses and seconds."""
    moe, dense = results["moe"], results["dense"]
    rows = [
        f"| loss, learning rate {rate:g}, seed 0 | {moe.losses[rate]:.4f} | {loss:.4f} |"
        for rate, loss in dense.losses.items()
    ]
    rows.append(f"| learning rate chosen | {moe.best:g} | {dense.best:g} |")
    for seed in SEEDS:
        cells = (f"{final_loss(arm.runs[seed]):.4f}" for arm in (moe, dense))
        rows.append(f"| loss, seed {seed} | {' | '.join(cells)} |")
    means = (mean(map(final_loss, arm.runs.values())) for arm in (moe, dense))
    rows.append(f"| loss, mean of seeds | {' | '.join(f'**{m:.4f}**' for m in means)} |")
    seconds = (
        mean(list(seconds_of(r).values())[-1] for r in arm.runs.values()) for arm in (moe, dense)
    )
    return [*rows, f"| seconds in steps, mean | {' | '.join(f'{s:.0f}' for s in seconds)} |"]


def verdict(results: dict[str, Arm]) -> list[str]:
    """Returns the sentences that say who won, by how much, and at what cost."""
    losses = {arm: [final_loss(r) for r in results[arm].runs.values()] for arm in ARMS}
    spread = max(max(v) - min(v) for v in losses.values())
    pairs = [d - m for d, m in zip(losses["dense"], losses["moe"], strict=True)]
    larger = "larger" if mean(pairs) > spread else "not larger"
    lines = [
        f"The MoE's loss is lower by **{mean(pairs):.4f}** nats on average, {larger} than the "
        f"largest spread over seeds of either arm ({spread:.4f}); seed by seed it is lower by "
        f"{', '.join(f'{pair:.4f}' for pair in pairs)}."
    ]
    costs = {"tokens": tokens_of, "seconds": seconds_of}
    ratios = {name: relative_cost(results, costs_of) for name, costs_of in costs.items()}
    told = [f"{ratio:.2f} of its {name}" for name, ratio in ratios.items() if ratio]
    if told:
        lines.append(
            f"It reaches the dense model's final loss with {' and '.join(told)}; the two trained "
            "at once on 2 shared CPU cores."
        )
    return lines


def write_page(
    path: Path, results: dict[str, Arm], configs: dict[str, Config], overrides: list[str]
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
    plot(results, options.docs / "quickstart.png")
    write_page(options.docs / "quickstart.md", results, configs, options.overrides)
    rows = []
    for arm in ("dense", "moe"):
        loss = mean(final_loss(r) for r in results[arm].runs.values())
        base = None if arm == "dense" else rows[0].value
        baseline = None if arm == "dense" else "dense"
        ratio = None if base is None else loss / base
        rows.append(Row(arm, loss, "nats per token", baseline, ratio))
    report("validation loss at equal active FLOPs, mean of seeds", rows, options.json)


if __name__ == "__main__":
    main()
