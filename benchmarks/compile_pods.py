"""Compile time of the train step against devices: one program for all, so it should hardly grow.

    python benchmarks/compile_pods.py [--json pods.json] [--devices 8 64 512 4096]

Compiled ahead of time for cubes of TPU v5p, which needs none; needs moejax[plan-tpu]. One sequence
a device, expert axis 8, fsdp what is left up to 8, data the rest. Lowering and compiling are timed
together, without a compilation cache. The baseline is the first number of devices.
"""

import time
from pathlib import Path

from common import arguments, compile_rows, report

ROOT = Path(__file__).resolve().parents[1]


def compile_seconds(num_devices: int) -> tuple[float, int]:
    """Returns (CPU seconds to lower and compile the quickstart's step, characters of its HLO)."""
    import jax

    from moejax.mesh import make_mesh
    from moejax.overrides import load_config
    from moejax.plan import abstract_batch
    from moejax.step import make_train_step
    from moejax.topology import parse_topology, topology_devices

    side = round(num_devices ** (1 / 3))
    words = ["mesh.expert=8", f"mesh.fsdp={min(8, num_devices // 8)}", "mesh.data=None"]
    words.append(f"train.batch_size={num_devices}")
    config = load_config(str(ROOT / "configs/quickstart.py"), words)
    mesh = make_mesh(
        config.mesh.resolve(num_devices),
        topology_devices(parse_topology(f"v5p:{side}x{side}x{side}")),
    )
    step, state = make_train_step(config, mesh)
    jax.clear_caches()
    start = time.process_time()
    lowered = step.lower(state, abstract_batch(config, mesh))  # pyright: ignore[reportFunctionMemberAccess]
    compiled = lowered.compile()
    return time.process_time() - start, len(compiled.as_text())


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.set_defaults(repeats=1)
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64, 512, 4096])
    options = parser.parse_args()
    from moejax.topology import parse_topology, start_compiler

    start_compiler(parse_topology("v5p:2x2x2"))
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    rows = compile_rows(compile_seconds, options.devices, "devices", options.repeats)
    report("compile time of the train step for TPU v5p", rows, options.json)


if __name__ == "__main__":
    main()
