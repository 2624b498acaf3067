"""Speed of the quickstart's train step: MoE to dense, 1 device to 8, and to matmul peak.

    python benchmarks/step.py [--json step.json] [--readme README.md]

All sides take turns in one process with 8 virtual CPU devices; a side on one device uses the first
of them. The dense model is configs/quickstart_dense.py: a dense layer of equal active FLOPs in
place of each MoE layer.
"""

import datetime
import platform
from pathlib import Path

from common import Row, alternate, arguments, matmul_peak, report

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"


def make_side(file: str, overrides: list[str]):
    """Returns (a function that runs a step and waits for it, tokens a step, FLOPs a token)."""
    import jax

    from moejax.corpus import load_corpus
    from moejax.data import TrainBatches
    from moejax.flops import flops_per_token
    from moejax.mesh import make_mesh
    from moejax.optim import make_optimizer
    from moejax.overrides import load_config
    from moejax.sharding import place_batch
    from moejax.state import initial_state
    from moejax.step import make_train_step

    config = load_config(str(ROOT / "configs" / file), overrides)
    mesh = make_mesh(config.mesh, jax.devices()[: config.mesh.num_devices])
    data = TrainBatches(
        load_corpus(config.data, "train"), config.data.sequence_length, config.train.batch_size, 0
    )
    batch = place_batch(
        mesh, lambda start, stop: data.rows(0, start, stop), config.train.batch_size, 1
    )
    step, _ = make_train_step(config, mesh)
    state = initial_state(config, mesh, make_optimizer(config.optim, config.train.steps))

    def run():
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    tokens = config.train.batch_size * config.data.sequence_length
    return run, tokens, flops_per_token(config)


ONE = ["mesh.data=1", "mesh.expert=1"]
SIDES = {
    "dense, 1 device": ("quickstart_dense.py", ONE),
    "MoE, 1 device": ("quickstart.py", ONE),
    "MoE capacity 1.25, 1 device": ("quickstart.py", [*ONE, "moe.capacity_factor=1.25"]),
    "dense, 8 devices, data 8": ("quickstart_dense.py", ["mesh.data=8", "mesh.expert=1"]),
    "MoE, 8 devices, expert 8": ("quickstart.py", ["mesh.data=1", "mesh.expert=8"]),
}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--readme", type=Path, help="replace the table between the markers")
    options = parser.parse_args()
    from moejax.mesh import start_jax

    start_jax(8)
    sides = {name: make_side(*side) for name, side in SIDES.items()}
    seconds = alternate({name: side[0] for name, side in sides.items()}, options.repeats)
    peak = matmul_peak()
    rows = [Row("matmul 2048 x 2048 x 2048, float32", peak / 1e9, "GFLOP/s")]
    speed = {name: sides[name][1] / seconds[name].wall for name in SIDES}
    baselines = {
        "MoE, 1 device": "dense, 1 device",
        "MoE capacity 1.25, 1 device": "dense, 1 device",
        "dense, 8 devices, data 8": "dense, 1 device",
        "MoE, 8 devices, expert 8": "MoE, 1 device",
    }
    for name in SIDES:
        baseline = baselines.get(name)
        ratio = speed[name] / speed[baseline] if baseline else None
        rows.append(Row(name, speed[name], "tokens/s", baseline, ratio))
    for name in ("dense, 1 device", "MoE, 1 device"):
        useful = speed[name] * sides[name][2]
        row = Row(f"useful FLOPs, {name}", useful / 1e9, "GFLOP/s", rows[0].name, useful / peak)
        rows.append(row)
    report("quickstart train step", rows, options.json)
    if options.readme:
        write_table(options.readme, rows)


def write_table(readme: Path, rows: list[Row]) -> None:
    """Puts the rows between the README's markers, with the date and the machine."""
    text = readme.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    lines = ["| quickstart train step | value | ratio | relative to |", "|---|---|---|---|"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        value = f"{row.value:,.0f} {row.unit}"
        lines.append(f"| {row.name} | {value} | {ratio} | {row.baseline or ''} |")
    date = datetime.date.today().isoformat()
    note = (
        f"Measured {date} by `python benchmarks/step.py --readme README.md` on a shared "
        f"{platform.machine()} machine with 2 cores, no accelerator; both sides of a ratio took "
        "turns in one run."
    )
    readme.write_text(f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n\n{note}\n{END}{tail}", "utf-8")


if __name__ == "__main__":
    main()
