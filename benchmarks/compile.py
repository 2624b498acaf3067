"""Compile time of the train step against depth: layers are scanned, so it should hardly grow.

    python benchmarks/compile.py [--json compile.json] [--layers 2 4 8 16]

Lowering and compiling are timed together, without a compilation cache, with the depths taking
turns; 8 virtual CPU devices, expert axis 8. The baseline is the first depth.
"""

import time
from pathlib import Path

from common import arguments, compile_rows, report

ROOT = Path(__file__).resolve().parents[1]


def compile_seconds(layers: int) -> tuple[float, int]:
    """Returns (CPU seconds to lower and compile the quickstart's step, characters of its HLO)."""
    import jax

    from moejax.data import Batch
    from moejax.mesh import make_mesh
    from moejax.overrides import load_config
    from moejax.sharding import batch_sharding
    from moejax.step import make_train_step

    overrides = [f"model.num_layers={layers}", "mesh.data=1", "mesh.expert=8"]
    config = load_config(str(ROOT / "configs/quickstart.py"), overrides)
    mesh = make_mesh(config.mesh)
    step, state = make_train_step(config, mesh)
    shape = (1, config.train.batch_size, config.data.sequence_length)

    def array(dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))

    batch = Batch(array("int32"), array("int32"), array("int32"), array("bool"), array("int32"))
    jax.clear_caches()
    start = time.process_time()
    compiled = step.lower(state, batch).compile()  # pyright: ignore[reportFunctionMemberAccess]
    return time.process_time() - start, len(compiled.as_text())


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.set_defaults(repeats=3)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8, 16])
    options = parser.parse_args()
    import jax

    from moejax.mesh import start_jax

    start_jax(8)
    jax.config.update("jax_enable_compilation_cache", False)
    rows = compile_rows(compile_seconds, options.layers, "layers", options.repeats)
    report("compile time of the train step", rows, options.json)


if __name__ == "__main__":
    main()
