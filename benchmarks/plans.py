"""Plans published models on pods that are not here, into docs/planning.md.

    python benchmarks/plans.py [--only NAME ...] [--write docs/planning.md]

Two tables: the plans next to a peer's figures, and, of these and of more meshes, what `--search`
says on paper next to what was compiled. One process a plan, each 1 to 10 minutes and 2 to 8 GB on
two cores; needs moejax[plan-tpu], and moejax[plan-gpu] for the GPUs. Results are kept in runs/plans
and taken from there if the code, the config and the compiler are the same; `--only` compiles
nothing but what it names.
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from moejax.config import AXES, MeshConfig
from moejax.overrides import load_config
from moejax.search import on_paper
from moejax.topology import parse_topology

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "runs/plans"
BEGIN, END = "<!-- plans:begin -->", "<!-- plans:end -->"
GIB = 2**30
COLUMNS = (
    *("plan", "pod and changes", "memory, GiB", "sent, GiB", "G cycles", "step, s"),
    *("compiled, s", "a peer: memory / sent / G cycles"),
)
PAPER_COLUMNS = (
    *("model", "pod", "mesh", "remat, transport"),
    *("memory, GiB", "ratio", "sent, GiB", "ratio"),
)


class Case(NamedTuple):
    """A plan: a config of configs/models with changes on a pod, and what a peer needs for it."""

    config: str
    topology: str
    words: tuple[str, ...] = ()
    peer: str = ""  # peak GiB, wire GiB, G cycles


RAGGED, SLOTS = "moe.transport=ragged", "moe.capacity_factor=1.25"
TIGHT = "moe.buffer_factor=1.0625"  # memory and products of a sixteenth of empty rows, not of half
DEEPSEEK = ("train.accumulation=1", RAGGED, TIGHT)
CASES = {
    "mixtral, dropless": Case(
        "mixtral_8x7b", "v5p:4x4x4", (RAGGED, TIGHT), "MaxText 31.6 / 94.5 / 12.2"
    ),
    "mixtral, capacity 1.25": Case(
        "mixtral_8x7b", "v5p:4x4x4", (SLOTS,), "MaxText 24.3 / 300 / 11.7"
    ),
    "mixtral, dropless, exchange kept": Case(
        "mixtral_8x7b", "v5p:4x4x4", (RAGGED, TIGHT, "model.remat=exchange")
    ),
    "mixtral, capacity 1.25, exchange kept": Case(
        "mixtral_8x7b", "v5p:4x4x4", (SLOTS, "model.remat=exchange")
    ),
    "mixtral on 128": Case(
        "mixtral_8x7b", "v5p:4x4x8", (RAGGED, TIGHT, "train.batch_size=512", "mesh.fsdp=16")
    ),
    "deepseek on 256": Case(
        "deepseek_v3",
        "v5p:4x8x8",
        (*DEEPSEEK, "train.batch_size=256", "mesh.fsdp=8"),
        "MaxText does not fit: 121.8 GiB of temporaries",
    ),
    "deepseek on 512": Case(
        "deepseek_v3", "v5p:8x8x8", (*DEEPSEEK, "train.batch_size=512", "mesh.fsdp=16")
    ),
    "olmoe on 16": Case(
        "olmoe_1b_7b", "v5e:4x4", ("train.batch_size=64", "mesh.fsdp=2", "mesh.expert=8")
    ),
    "mixtral on 128 H100": Case(
        "mixtral_8x7b", "h100:16x8", (SLOTS, "train.batch_size=256", "mesh.fsdp=16")
    ),
}


def _gpus(config: str, hosts: int, *words: str) -> Case:
    return Case(config, f"h100:{hosts}x8", (SLOTS, "train.accumulation=1", *words))


def _switch(pod: str, *words: str) -> Case:
    return Case("switch_base_64", pod, ("train.batch_size=128", *words))


MESHES = {  # of the paper model: more of them, of what compiles in half a minute
    "mixtral on 64 H100": _gpus("mixtral_8x7b", 8, "train.batch_size=128"),
    "mixtral on 64 H100, exchange kept": _gpus(
        "mixtral_8x7b", 8, "train.batch_size=64", "model.remat=exchange"
    ),
    "mixtral on 64 H100, expert_fsdp": _gpus(
        *("mixtral_8x7b", 8, "train.batch_size=128"),
        *("mesh.fsdp=8", "mesh.expert=1", "mesh.expert_fsdp=8"),
    ),
    "mixtral on 64 H100, fsdp": _gpus(
        "mixtral_8x7b", 8, "train.batch_size=64", "mesh.fsdp=64", "mesh.expert=1"
    ),
    "mixtral on 128 H100, tensor": _gpus(
        "mixtral_8x7b", 16, "train.batch_size=128", "mesh.fsdp=8", "mesh.tensor=2"
    ),
    "8x22b on 128 H100": _gpus("mixtral_8x22b", 16, "train.batch_size=128", "mesh.fsdp=16"),
    "olmoe on 16 H100": _gpus("olmoe_1b_7b", 2, "train.batch_size=64", "mesh.fsdp=2"),
    "olmoe on 16 H100, expert": _gpus(
        "olmoe_1b_7b", 2, "train.batch_size=64", "mesh.fsdp=1", "mesh.expert=16"
    ),
    "olmoe on 16 H100, data": _gpus(
        "olmoe_1b_7b", 2, "train.batch_size=32", "mesh.data=2", "mesh.fsdp=1"
    ),
    "qwen3 on 64 H100": _gpus("qwen3_30b_a3b", 8, "train.batch_size=128"),
    "qwen3 on 64 H100, expert_fsdp": _gpus(
        *("qwen3_30b_a3b", 8, "train.batch_size=128"),
        *("mesh.fsdp=1", "mesh.expert_fsdp=8", "mesh.expert=8"),
    ),
    "switch, expert 16": _switch("v5e:4x4", "mesh.expert=16"),
    "switch, fsdp 4 x expert 4": _switch("v5e:4x4", "mesh.fsdp=4", "mesh.expert=4"),
    "switch, data 4 x expert 4": _switch("v6e:4x4", "mesh.data=4", "mesh.expert=4"),
}

ALL = CASES | MESHES
# What no compiled step depends on
NOT_COMPILED = ("cli", "search", "loop", "checkpoint", "evaluate", "generate", "metrics", "plots")


def config_file(case: Case) -> Path:
    return ROOT / f"configs/models/{case.config}.py"


def kept_at(name: str, case: Case) -> Path:
    """Returns where the result lies: another place for other code, config or compiler."""
    parts = [repr(case), *(importlib.metadata.version(p) for p in ("jax", "flax", "optax"))]
    files = [p for p in ROOT.glob("moejax/*.py") if p.stem not in NOT_COMPILED]
    files += [config_file(case)]
    parts += [path.read_text(encoding="utf-8") for path in sorted(files)]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
    return KEPT / f"{name.replace(', ', '_').replace(' ', '_')}_{digest}.json"


def run(name: str, case: Case) -> dict:
    """Returns what `moejax plan --json` writes for the case; exit code 1 is one that fits not."""
    path = kept_at(name, case)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        options = ["--topology", case.topology, "--json", str(path)]
        config = str(config_file(case))
        command = [sys.executable, "-m", "moejax", "plan", config, *options, *case.words]
        done = subprocess.run(command, cwd=ROOT, check=False)
        if not path.exists():
            raise SystemExit(f"{name}: exit code {done.returncode}, see above")
    return json.loads(path.read_text(encoding="utf-8"))


def row(name: str, case: Case, plan: dict) -> str:
    """Returns a line of the table; `-` where the plan says nothing."""
    words = f"`{case.topology}`, `{' '.join(case.words)}`"
    memory = f"{plan['peak_bytes'] / GIB:.1f} of {plan['memory_limit'] / GIB:.1f}"
    if "balanced" not in plan:
        return f"| {name} | {words} | {memory}, does not fit | - | - | - | - | {case.peer} |"
    work = plan["balanced"]
    cycles = "-" if work["cycles"] is None else f"{work['cycles'] / 1e9:.1f}"
    seconds = f"{plan['step_seconds_low']:.2f} to {plan['step_seconds_high']:.2f}"
    return (
        f"| {name} | {words} | {memory} | {work['wire_bytes'] / GIB:.1f} | {cycles} | {seconds} | "
        f"{plan['compile_seconds']:.0f} | {case.peer} |"
    )


def paper_row(name: str, case: Case, plan: dict) -> str:
    """Returns a line of the second table: what the paper model says over what was compiled."""
    config = load_config(str(config_file(case)), list(case.words))
    topology = parse_topology(case.topology)
    sizes = {axis: plan["mesh"][axis] for axis in AXES}
    layout = on_paper(dataclasses.replace(config, mesh=MeshConfig(**sizes)), topology)
    cells = [case.config, case.topology, " ".join(f"{a} {n}" for a, n in sizes.items() if n > 1)]
    cells += [f"{config.model.remat}, {config.moe.transport_over(config.mesh.expert_degree)}"]
    pairs = [(layout.bytes, plan["peak_bytes"])]
    pairs += [(layout.sent, plan["balanced"]["wire_bytes"])] if "balanced" in plan else []
    for said, compiled in pairs:
        cells += [f"{said / GIB:.2f} / {compiled / GIB:.2f}", f"{said / compiled:.2f}"]
    return f"| {' | '.join(cells)} |"


def write(page: Path, rows: list[str], paper_rows: list[str]) -> None:
    """Puts the tables between the page's markers."""
    head, rest = page.read_text(encoding="utf-8").split(BEGIN)
    _, tail = rest.split(END)
    versions = ", ".join(f"{p} {_version(p)}" for p in ("jax", "libtpu", "jax-cuda12-plugin"))
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
        *rows,
        "",
        "What the paper model of `--search` says over what was compiled:",
        "",
        f"| {' | '.join(PAPER_COLUMNS)} |",
        "|---" * len(PAPER_COLUMNS) + "|",
        *paper_rows,
        "",
        f"Written by `make plans` with {versions}.",
    ]
    page.write_text(f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{tail}", encoding="utf-8")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=ALL, help="make these, keep what is kept")
    parser.add_argument("--write", type=Path, help="put the table into this page")
    options = parser.parse_args()
    rows, paper_rows = [], []
    for name, case in ALL.items():
        if options.only is None or name in options.only or kept_at(name, case).exists():
            plan = run(name, case)
            rows += [row(name, case, plan)] if name in CASES else []
            paper_rows.append(paper_row(name, case, plan))
            print(rows[-1] if name in CASES else "", paper_rows[-1], sep="\n", flush=True)
    if options.write:
        write(options.write, rows, paper_rows)


if __name__ == "__main__":
    main()
