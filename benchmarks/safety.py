"""What safety costs: training stalled by saves, and manifests against the disk's own reading.

    python benchmarks/safety.py [--folder DIR] [--json safety.json]

Saves come so often that they are at work for a fifth of the time. A step is a wait, as it is for a
host whose accelerators compute, and in a second row a product of matrices on the cores that save.
The disk reads what its cache was told to forget. DIR is a folder on the disk to measure.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import Row, arguments, report

SHARE, SAVES, STEPS = 0.2, 5, 50  # of the time that saves are at work; saves; steps between two
STALL_BAR, READ_BAR = 0.05, 0.6
FILES, MIB = 4, 1 << 20


def stall_rows(folder: Path, mib: int) -> list[Row]:
    """Returns how much longer training takes for its saves, as a share of the time."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from moejax.checkpoint import Checkpoints
    from moejax.config import CheckpointConfig, MeshConfig
    from moejax.mesh import make_mesh
    from moejax.sharding import tree_shardings
    from moejax.state import TrainState

    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    weight = np.random.default_rng(0).normal(size=(mib, MIB // 8)).astype(np.float32)
    state = TrainState(jnp.int32(0), {"w": weight}, {"mu": weight}, {}, jnp.zeros(2, jnp.uint32))
    state = jax.device_put(state, tree_shardings(mesh, state))
    multiply = jax.jit(lambda x: x @ x)
    x = jnp.ones((512, 512), jnp.float32)

    def compute(seconds: float) -> None:
        """As many products as take `seconds` where nothing else runs."""
        for _ in range(round(seconds / product_seconds)):
            multiply(x).block_until_ready()

    start = time.perf_counter()
    for _ in range(50):
        multiply(x).block_until_ready()
    product_seconds = (time.perf_counter() - start) / 50

    with Checkpoints(folder / "stall", CheckpointConfig(keep=1)) as checkpoints:
        step = 0

        def save() -> None:
            nonlocal step
            step += 1
            numbered = TrainState(
                jnp.int32(step), state.params, state.opt_state, state.router_state, state.rng
            )
            assert checkpoints.save(numbered, {}, None)

        def timed(run: Callable[[float], None], seconds: float, saves: bool) -> float:
            begin = time.perf_counter()
            for _ in range(SAVES):
                if saves:
                    save()
                for _ in range(STEPS):
                    run(seconds / STEPS)
            return time.perf_counter() - begin

        works = []
        for _ in range(4):
            begin = time.perf_counter()
            save()
            checkpoints.wait()
            works.append(time.perf_counter() - begin)
        work = statistics.median(works[1:])  # the first one imports
        interval = work / SHARE
        rows = [Row(f"a save of {mib} MiB", work, "s")]
        for name, run in (("waits", time.sleep), ("computes on the same cores", compute)):
            alone, with_saves = timed(run, interval, False), timed(run, interval, True)
            checkpoints.wait()
            share = (with_saves - alone) / with_saves
            label = f"stalled, a step {name}"
            rows.append(Row(label, share, "of the time", f"bar {STALL_BAR}", share / STALL_BAR))
    return rows


def read_rows(folder: Path, mib: int, repeats: int) -> list[Row]:
    """Returns how fast manifests are made and verified, next to reading alone."""
    from moejax.manifest import MANIFEST, check_files, read_manifest, write_manifest

    checkpoint = folder / "1"
    checkpoint.mkdir()
    names = [f"data{index}" for index in range(FILES)]
    for name in names:
        with open(checkpoint / name, "wb") as stream:
            for _ in range(mib // FILES):
                stream.write(os.urandom(MIB))
            os.fsync(stream.fileno())

    def forget() -> None:
        for name in names:
            descriptor = os.open(checkpoint / name, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    def read_one(name: str) -> None:
        block = bytearray(4 * MIB)
        with open(checkpoint / name, "rb", buffering=0) as stream:
            while stream.readinto(block):
                pass

    def read() -> None:
        with ThreadPoolExecutor(FILES) as pool:
            list(pool.map(read_one, names))

    def write() -> None:
        (checkpoint / MANIFEST).unlink(missing_ok=True)
        write_manifest(checkpoint, "0" * 16, 1, {}, {}, {})

    def verify() -> None:
        check_files(checkpoint, read_manifest(checkpoint))

    sides = {"the disk alone": read, "writing a manifest": write, "verifying": verify}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    write()
    for _ in range(repeats):
        for name, run in sides.items():
            forget()
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    speed = {name: mib / statistics.median(values) for name, values in seconds.items()}
    disk = speed["the disk alone"]
    return [
        Row(name, value, "MiB/s", "the disk alone", value / disk) for name, value in speed.items()
    ]


def main() -> None:
    parser = arguments("What safety costs: stalls by saves, and checksums against the disk.")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: temporary)")
    parser.add_argument("--mib", type=int, default=512, help="size of what is read (default 512)")
    parser.add_argument("--state_mib", type=int, default=64, help="of a save (default 64)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        rows = read_rows(Path(name), options.mib, options.repeats)
        rows += stall_rows(Path(name), options.state_mib)
    report("What safety costs", rows, options.json)
    print(f"bars: stalled at most {STALL_BAR} of the time, reading at least {READ_BAR} of the disk")


if __name__ == "__main__":
    main()
