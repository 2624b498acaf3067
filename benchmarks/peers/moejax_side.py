"""The moejax side of `benchmarks/peers.py`; see `worker.py`."""

from pathlib import Path
from typing import Any

import numpy as np
from worker import serve


def make(settings: dict[str, Any]):
    """Compiles the train step of a config; writes the first weights where the peer reads them."""
    import jax

    from moejax.data import Batch
    from moejax.flops import total_parameters
    from moejax.mesh import make_mesh, start_jax
    from moejax.optim import make_optimizer
    from moejax.overrides import load_config
    from moejax.sharding import path_name, place_batch
    from moejax.state import initial_state
    from moejax.step import make_train_step

    config = load_config(settings["file"], settings["overrides"])
    start_jax(config.mesh.num_devices)
    mesh = make_mesh(config.mesh)
    state = initial_state(config, mesh, make_optimizer(config.optim, config.train.steps))
    if settings["weights"]:
        leaves = jax.tree_util.tree_leaves_with_path(state.params)
        weights = {path_name(path): np.asarray(leaf) for path, leaf in leaves}
        np.savez(Path(settings["weights"]), **weights)

    def place(tokens_bt: np.ndarray) -> Batch:
        """The next token is the target, but for the last token, which has none."""
        tokens_bt = tokens_bt.astype(np.int32)
        ones_bt = np.ones_like(tokens_bt)
        counts_bt = ones_bt.astype(bool)
        counts_bt[:, -1] = False
        batch = Batch(tokens_bt, np.roll(tokens_bt, -1, 1), ones_bt, counts_bt, 0 * ones_bt)

        def rows(start: int, stop: int) -> Batch:
            return jax.tree.map(lambda leaf: leaf[start:stop], batch)

        return place_batch(mesh, rows, config.train.batch_size, config.train.accumulation)

    jitted, _ = make_train_step(config, mesh)
    shape = (config.train.batch_size, config.data.sequence_length)
    compiled = jitted.lower(state, place(np.zeros(shape))).compile()  # pyright: ignore[reportFunctionMemberAccess]

    def step(tokens_bt: np.ndarray) -> float:
        nonlocal state
        state, metrics = compiled(state, place(tokens_bt))
        loss = float(metrics.losses.loss)
        jax.block_until_ready(state)
        return loss

    facts = {
        "name": f"moejax, jax {jax.__version__}",
        "parameters": total_parameters(config),
        "devices": len(jax.devices()),
    }
    return step, facts


if __name__ == "__main__":
    serve(make)
