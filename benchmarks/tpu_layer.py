"""What an MoE layer costs on TPUs by their own compiler, which needs no TPU.

    make bench-tpu
    python benchmarks/tpu_layer.py [--topology v5p:2x2x4 v6e:2x4] [--only bytes] [--json tpu.json]

`flops`: the matmuls of dropless experts (`lax.ragged_dot`) on one device, next to those of as many
rows in equal slots. `bytes`: what a token's layer sends over an expert axis of 8, by the
collectives of the compiled program, next to `moejax.traffic`; statistics and the router's gradient,
whose size does not depend on the tokens, are left out. Both are those of balanced routing: what
only another one needs is in loops that are not counted. 4,096 tokens a device in bfloat16. 16
programs a topology; the 8 of `bytes` take a minute each on two cores.

XLA estimates seconds too, which are no use here: negative where transfers overlap with work, and
without the memory traffic and the tiles of a kernel.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moejax.config import Config, DataConfig, MeshConfig, ModelConfig, MoEConfig, TrainConfig
from moejax.hlo import parse
from moejax.hlo_costs import matmul_flops
from moejax.hlo_traffic import collectives
from moejax.topology import parse_topology, start_compiler, topology_devices
from moejax.traffic import exchange_bytes

TOKENS, EXPERT_AXIS = 4096, 8
TOPOLOGIES = ("v5p:2x2x4", "v6e:2x4")


@dataclasses.dataclass(frozen=True)
class Shape:
    """D, and the experts: E, F and k."""

    d_model: int
    num_experts: int
    expert_hidden: int
    top_k: int

    def config(self, batch_size: int, **moe) -> Config:
        """Returns one layer of this shape, `batch_size` sequences of TOKENS."""
        fields = dataclasses.asdict(self)
        model = ModelConfig(num_layers=1, d_model=fields.pop("d_model"), dtype="bfloat16")
        data, train = DataConfig(sequence_length=TOKENS), TrainConfig(batch_size=batch_size)
        return Config(model=model, moe=MoEConfig(**fields, **moe), data=data, train=train)


SHAPES = {"fine": Shape(2048, 64, 1024, 8), "mixtral": Shape(4096, 8, 14336, 2)}
DROPLESS: dict[str, Any] = {"capacity_factor": None}
EXCHANGES: dict[str, dict[str, Any]] = {
    "all_to_all, capacity": {"capacity_factor": 1.25, "transport": "all_to_all"},
    "all_to_all, dropless": {**DROPLESS, "transport": "all_to_all"},
    "ragged": {**DROPLESS, "transport": "ragged"},
    "gather": {**DROPLESS, "transport": "gather"},
}


@dataclasses.dataclass(frozen=True)
class TpuRow:
    """A number of a compiled program and what it is held against.

    Without a value there is no program, and `unit` says why. `calls` counts collectives.
    """

    topology: str
    name: str
    backward: bool  # with the forward pass
    unit: str
    value: float | None = None
    expected: float | None = None
    calls: int | None = None

    @property
    def ratio(self) -> float | None:
        return None if self.value is None or not self.expected else self.value / self.expected


def compile_layer(config: Config, mesh, backward: bool) -> Any:
    """Returns the compiled layer: forward, or forward and backward for a given gradient of y."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from moejax.moe import apply_moe
    from moejax.parameters import moe_parameters
    from moejax.routing import RouterInputs
    from moejax.sharding import BATCH_AXES, parameter_spec

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    weights = {
        name: array(p.shape, jnp.float32, parameter_spec(f"moe/{name}", len(p.shape)))
        for name, p in moe_parameters(config.moe, config.model.d_model).items()
    }
    batch = (config.train.batch_size, config.data.sequence_length)
    x_btd = array((*batch, config.model.d_model), config.model.dtype, P(BATCH_AXES))
    mask_bt = array(batch, bool, P(BATCH_AXES))

    def layer(weights, x_btd, mask_bt):
        inputs = RouterInputs(mask_bt)
        return apply_moe(weights, x_btd, inputs, {}, config=config.moe, mesh=mesh)[0]

    def both(weights, x_btd, mask_bt, dy_btd):
        y_btd, transpose = jax.vjp(lambda w, x: layer(w, x, mask_bt), weights, x_btd)
        return y_btd, transpose(dy_btd)

    if backward:
        return jax.jit(both).lower(weights, x_btd, mask_bt, x_btd).compile()
    return jax.jit(layer).lower(weights, x_btd, mask_bt).compile()


def compile_experts(shape: Shape, device, dropless: bool, backward: bool) -> Any:
    """Returns the compiled expert networks, on as many rows an expert as balanced routing gives.

    Dropless experts come with their dispatch and combine, which are no matmuls.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from moejax.experts import capacity_experts, dropless_experts

    def array(dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=SingleDeviceSharding(device))

    d, e, f, k = dataclasses.astuple(shape)
    weights = {name: array((e, d, f)) for name in ("gate", "up")} | {"down": array((e, f, d))}
    x = array((TOKENS, d) if dropless else (e, TOKENS * k // e, d))
    expert_ts, weight_ts = array((TOKENS, k), jnp.int32), array((TOKENS, k), jnp.float32)

    def forward(weights, x, expert_ts, weight_ts):
        if not dropless:
            return capacity_experts(x, None, weights, "swiglu")
        rows = expert_ts.size
        return dropless_experts(x, expert_ts, weight_ts, weights, activation="swiglu", rows=rows)

    def both(weights, x, expert_ts, weight_ts, dy):
        y, transpose = jax.vjp(lambda w, x: forward(w, x, expert_ts, weight_ts), weights, x)
        return y, transpose(dy)

    if backward:
        return jax.jit(both).lower(weights, x, expert_ts, weight_ts, x).compile()
    return jax.jit(forward).lower(weights, x, expert_ts, weight_ts).compile()


def sent_bytes(text: str) -> tuple[float, int]:
    """Returns the bytes that a device sends in a program, sums left out, and in how many calls."""
    exchanges = [c for c in collectives(parse(text)) if not c.is_sum]
    return sum(c.sent for c in exchanges), sum(c.times for c in exchanges)


def measure_flops(topology: str, devices: list, name: str) -> Iterator[TpuRow]:
    """Yields the dropless experts' FLOPs, held against those of equal slots."""
    for backward in (False, True):
        ours, expected = (
            matmul_flops(parse(compiled.as_text()))
            for compiled in (
                compile_experts(SHAPES[name], devices[0], dropless, backward)
                for dropless in (True, False)
            )
        )
        yield TpuRow(topology, f"experts, {name}", backward, "TFLOP", ours / 1e12, expected / 1e12)


def measure_bytes(topology: str, devices: list, name: str) -> Iterator[TpuRow]:
    """Yields what a token sends, held against the formula; backward sends the same again."""
    from moejax.mesh import make_mesh

    sizes = MeshConfig(data=None, expert=EXPERT_AXIS).resolve(len(devices))
    mesh = make_mesh(sizes, devices)
    config = SHAPES["fine"].config(sizes.token_shards, **EXCHANGES[name])
    formula = exchange_bytes(config, sizes, config.moe.transport_over(EXPERT_AXIS)) / 1024
    for backward in (False, True):
        sent, calls = sent_bytes(compile_layer(config, mesh, backward).as_text())
        value, expected = sent / TOKENS / 1024, formula * (1 + backward)
        yield TpuRow(topology, name, backward, "KiB/token", value, expected, calls)


def report(rows: list[TpuRow], json_path: Path | None) -> None:
    """Prints the rows and writes them to `json_path`, if given."""
    title = "MoE layer as compiled for TPUs, held against equal slots and moejax.traffic"
    table = Table(title=title)
    for column in ("topology", "layer", "pass", "value", "expected", "ratio", "unit", "calls"):
        table.add_column(column, justify="right" if column in ("value", "expected") else "left")
    for row in rows:
        steps = "forward+backward" if row.backward else "forward"
        numbers = [row.value, row.expected, row.ratio]
        texts = ["" if n is None else f"{n:,.3f}" for n in numbers]
        calls = "" if row.calls is None else str(row.calls)
        table.add_row(row.topology, row.name, steps, *texts, row.unit, calls)
    Console(highlight=False, width=150).print(table)
    if json_path is not None:
        content = [{**dataclasses.asdict(row), "ratio": row.ratio} for row in rows]
        text = json.dumps({"title": title, "rows": content}, indent=1)
        json_path.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", nargs="+", default=list(TOPOLOGIES), help="TPUs, as v6e:2x4")
    parser.add_argument("--only", choices=("flops", "bytes"), help="one of both")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    pods = [parse_topology(name) for name in options.topology]
    start_compiler(pods[0])
    import jax

    failures = (jax.errors.JaxRuntimeError, NotImplementedError)
    rows: list[TpuRow] = []
    for pod in pods:
        topology, devices = pod.name, topology_devices(pod)
        measured = {}
        if options.only != "bytes":
            measured |= {f"experts, {n}": measure_flops(topology, devices, n) for n in SHAPES}
        if options.only != "flops":
            measured |= {n: measure_bytes(topology, devices, n) for n in EXCHANGES}
        for name, found in measured.items():
            backward = False
            try:
                for row in found:
                    rows.append(row)
                    backward = True  # comes next
                    print(row, file=sys.stderr)
            except failures as error:
                message = "fails: " + str(error).splitlines()[0]
                rows.append(TpuRow(topology, name, backward, message))
    report(rows, options.json)


if __name__ == "__main__":
    main()
