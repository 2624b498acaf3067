"""Speed and memory of the MoE layer, forward and backward, against what it could be.

    python benchmarks/moe_layer.py [--only dropless] [--json moe_layer.json]

2,048 tokens of width 512 in float32. "dense" is one SwiGLU of equal active FLOPs, of width k * F.
The sides of a row take turns in a process of their own, on one CPU device; `devices_8` has 8
virtual ones. A ratio is given by wall time (`value`) and by CPU time; a bar is what we want, and
nothing fails when it is missed. `memory` is what XLA plans, which no other process disturbs.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Seconds, alternate, arguments
from rich.console import Console
from rich.table import Table

TOKENS, D_MODEL = 2048, 512


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """A ratio and its bar: at least that, or with `at_most` at most that."""

    name: str
    value: float
    bar: float
    at_most: bool
    cpu_ratio: float | None
    wall_ratio: float | None
    meaning: str

    @property
    def reached(self) -> bool:
        return self.value <= self.bar if self.at_most else self.value >= self.bar


@dataclasses.dataclass
class Side:
    """A compiled function with its arguments."""

    compiled: Any
    operands: tuple

    def __call__(self) -> None:
        import jax

        jax.block_until_ready(self.compiled(*self.operands))


def _side(function: Callable, params: Any, forward: bool = False) -> Side:
    """Compiles `function(params, x)`, or the gradient of its product with a random array."""
    import jax

    x_td = jax.random.normal(jax.random.key(1), (TOKENS, D_MODEL))
    dy_td = jax.random.normal(jax.random.key(2), (TOKENS, D_MODEL))

    def loss(params, x_td, dy_td):
        return jax.numpy.vdot(function(params, x_td), dy_td)

    if forward:
        return Side(jax.jit(function).lower(params, x_td).compile(), (params, x_td))
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    return Side(gradient.lower(params, x_td, dy_td).compile(), (params, x_td, dy_td))


def dense(hidden: int, **options) -> Side:
    import jax

    from moejax.experts import feed_forward

    keys = jax.random.split(jax.random.key(0), 3)
    gate, up = (jax.random.normal(key, (D_MODEL, hidden)) / D_MODEL**0.5 for key in keys[:2])
    down = jax.random.normal(keys[2], (hidden, D_MODEL)) / hidden**0.5
    weights = {"gate": gate, "up": up, "down": down}
    return _side(lambda params, x_td: feed_forward(x_td, params, "swiglu"), weights, **options)


def moe(
    experts: int,
    hidden: int,
    top_k: int,
    capacity: float | None,
    *,
    devices: int = 1,
    sequences: int = 1,
    **options,
) -> Side:
    """The layer as a user calls it, router included."""
    import jax
    from flax import nnx

    from moejax.config import MeshConfig, MoEConfig
    from moejax.mesh import make_mesh
    from moejax.moe import MoE

    config = MoEConfig(
        num_experts=experts, expert_hidden=hidden, top_k=top_k, capacity_factor=capacity
    )
    mesh = make_mesh(MeshConfig(data=1, expert=devices), jax.devices()[:devices])
    graph, params = nnx.split(MoE(config, D_MODEL, mesh=mesh, rngs=nnx.Rngs(0)))

    def layer(params, x_td):
        y_btd, _ = nnx.merge(graph, params)(x_td.reshape(sequences, -1, D_MODEL))
        return y_btd.reshape(x_td.shape)

    return _side(layer, params, **options)


def _turns(over: Side, under: Side, repeats: int) -> tuple[Seconds, Seconds]:
    seconds = alternate({"over": over, "under": under}, repeats)
    return seconds["over"], seconds["under"]


def _against_dense(side: Side, active: int, repeats: int) -> tuple[float, float, float]:
    """Returns throughput against dense: by wall time, by CPU time, by wall time."""
    base, ours = _turns(dense(active), side, repeats)
    return base.wall / ours.wall, base.cpu / ours.cpu, base.wall / ours.wall


def dropless(repeats: int):
    return _against_dense(moe(8, 1024, 2, None), 2048, repeats)


def capacity(repeats: int):
    return _against_dense(moe(8, 1024, 2, 1.25), 2048, repeats)


def fine_grained(repeats: int):
    return _against_dense(moe(64, 128, 16, None), 2048, repeats)


def experts_128_forward(repeats: int):
    few, many = (moe(experts, 1024, 2, None, forward=True) for experts in (8, 128))
    base, ours = _turns(few, many, repeats)
    return ours.wall / base.wall, ours.cpu / base.cpu, ours.wall / base.wall


def experts_128_roofline(repeats: int):
    """The roofline is the longer of two times: FLOPs at the speed of a 2048-cube matmul; weights
    read forward and backward and gradients written, at the speed of writing a scaled copy of a
    weight to fresh memory, as gradients are.
    """
    import jax

    experts, hidden, top_k = 128, 1024, 2
    w_edf = jax.numpy.ones((experts, D_MODEL, hidden))
    scale = jax.jit(lambda w_edf: 2 * w_edf).lower(w_edf).compile()
    cube = jax.numpy.ones((2048, 2048))
    multiply = jax.jit(lambda a: a @ a).lower(cube).compile()
    sides = {
        "layer": moe(experts, hidden, top_k, None),
        "copy": Side(scale, (w_edf,)),
        "matmul": Side(multiply, (cube,)),
    }
    seconds = alternate(sides, repeats)
    flops = 3 * 3 * 2 * TOKENS * top_k * D_MODEL * hidden
    copies = 3 * 3 / 2  # three weights, each read twice and written once; a copy does one of each

    def roofline(clock: str) -> float:
        compute = flops / (2 * 2048**3) * getattr(seconds["matmul"], clock)
        memory = copies * getattr(seconds["copy"], clock)
        return max(compute, memory) / getattr(seconds["layer"], clock)

    return roofline("wall"), roofline("cpu"), roofline("wall")


def memory(repeats: int):
    """XLA's temporary memory, over the activations of exactly T * k assignments: the row that goes
    in, gate, up and hidden, and the row that comes out.
    """
    del repeats
    hidden, top_k = 1024, 2
    side = moe(8, hidden, top_k, None)
    ideal = TOKENS * top_k * (2 * D_MODEL + 3 * hidden) * 4
    return side.compiled.memory_analysis().temp_size_in_bytes / ideal, None, None


def devices_8(repeats: int):
    one, eight = (moe(8, 1024, 2, 1.25, devices=n, sequences=8) for n in (1, 8))
    base, ours = _turns(one, eight, repeats)
    return base.wall / ours.wall, base.cpu / ours.cpu, base.wall / ours.wall


# name: (measurement, bar, the bar is an upper one, what is measured)
ROWS: dict[str, tuple[Callable, float, bool, str]] = {
    "dropless": (dropless, 0.75, False, "E=8 F=1024 k=2, throughput to dense"),
    "capacity": (capacity, 0.72, False, "the same, capacity 1.25 (its limit: 0.8)"),
    "fine_grained": (fine_grained, 0.55, False, "dropless E=64 F=128 k=16, to dense"),
    "experts_128_forward": (experts_128_forward, 1.6, True, "forward time, E=128 to E=8"),
    "experts_128_roofline": (experts_128_roofline, 0.6, False, "E=128, fraction of roofline"),
    "memory": (memory, 2.0, True, "dropless, memory to ideal activations"),
    "devices_8": (devices_8, 0.8, False, "capacity, throughput of 8 devices to 1"),
}


def measure(name: str, repeats: int) -> LayerRow:
    """Runs one row in this process, which must not have started JAX."""
    from moejax.mesh import start_jax

    start_jax(8 if name == "devices_8" else 1)
    run, bar, at_most, meaning = ROWS[name]
    value, cpu_ratio, wall_ratio = run(repeats)
    return LayerRow(name, value, bar, at_most, cpu_ratio, wall_ratio, meaning)


def measure_apart(name: str, repeats: int) -> LayerRow:
    """Runs one row in a process of its own: the number of devices is fixed when JAX starts."""
    command = [sys.executable, __file__, "--child", name, "--repeats", str(repeats)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return LayerRow(**json.loads(done.stdout.splitlines()[-1]))


def report(rows: list[LayerRow], json_path: Path | None) -> None:
    """Prints the rows and writes them to `json_path`, if given."""
    table = Table(title="MoE layer, forward and backward, against what it could be")
    for column in ("name", "value", "bar", "by CPU time", "by wall time", ""):
        table.add_column(column, justify="left" if column in ("name", "") else "right")
    for row in rows:
        ratios = ("" if r is None else f"{r:.3f}" for r in (row.cpu_ratio, row.wall_ratio))
        bar = f"{'<=' if row.at_most else '>='} {row.bar}"
        mark = "" if row.reached else " (missed)"
        table.add_row(row.name, f"{row.value:.3f}", bar, *ratios, row.meaning + mark)
    Console(highlight=False, width=130).print(table)
    if json_path is not None:
        content = {"title": table.title, "rows": [dataclasses.asdict(row) for row in rows]}
        json_path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", choices=ROWS, help="one row")
    parser.add_argument("--child", choices=ROWS, help="one row as JSON, in this process")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(dataclasses.asdict(measure(options.child, options.repeats))))
        return
    names = [options.only] if options.only else list(ROWS)
    report([measure_apart(name, options.repeats) for name in names], options.json)


if __name__ == "__main__":
    main()
