"""verify: the same training whatever the layout, checked on the user's own devices.

A few optimizer steps of the config's model run on one device with the dense oracle
(`reference.py`), and then on the layouts that the config allows. Each must give the same losses,
gradients, gradient norm, router state and counts. Only the steps and the batch are smaller than in
training, all is float32, and some sequences end in padding.

Two logits of a token may be equal to within rounding, and a layout may rank them the other way
round: a tie. Where the choices of a few tokens differ, the layout runs again with the oracle's
choices, and with these everything must be equal.
"""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.box
from einops import rearrange
from rich.console import Console
from rich.table import Table

from moejax import contract
from moejax.config import AXES, Config, ConfigError, MeshConfig
from moejax.corpus import load_corpus
from moejax.data import Batch, TrainBatches, check_vocabulary
from moejax.foreign import write_json
from moejax.mesh import make_mesh, single_device_mesh
from moejax.optim import make_optimizer
from moejax.sharding import path_name, place_batch, tree_shardings
from moejax.state import TrainState, initial_state, model_graph
from moejax.step import GROUPS, StepMetrics, parameter_group, train_step

LOSS_TOLERANCE = 1e-5  # relative, float32
GRADIENT_TOLERANCE = 1e-4  # relative to the largest entry of each gradient, float32
TIES = 1e-4  # the share of tokens, over layers and steps, whose choices may differ
STEPS = 2
ACCUMULATION = 2
SHORT = {"experts": "expert", "attention": "attn", "embeddings": "embed", "dropped": "drops"}
CAPACITY_FACTOR = 1.0  # at most: low enough that assignments are dropped
REMAT = ("none", "full")
BUFFER_FACTOR = 1.0  # so small that dropless routing takes further rounds
DISPATCH = tuple(
    f"{how} by {transport}"
    for how in ("dropless", "capacity")
    for transport in ("gather", "all_to_all", "ragged")
)


class Layout(NamedTuple):
    """One way to run the same training."""

    data: int
    fsdp: int
    expert: int
    context: int
    tensor: int
    accumulation: int
    remat: str
    dispatch: str
    expert_fsdp: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the mesh axes, in the order of AXES."""
        return {axis: getattr(self, axis) for axis in AXES}

    def __str__(self) -> str:
        mesh = " ".join(f"{axis} {size}" for axis, size in self.sizes.items() if size > 1)
        settings = f"accumulation {self.accumulation}, remat {self.remat}, {self.dispatch}"
        return f"{mesh or 'one device'}, {settings}"


class Trace(NamedTuple):
    """What a layout computed, a list entry a step, as NumPy arrays."""

    starts: list[TrainState]
    metrics: list[StepMetrics]
    grads: list[dict[str, np.ndarray]]
    router_state: list[dict[str, np.ndarray]]

    @property
    def choices(self) -> list[np.ndarray]:
        """The experts that tokens chose, int32 [MoE layers, B, T, S]; none for a dense model."""
        chosen = [step.choice_albts for step in self.metrics if step.choice_albts is not None]
        return [np.asarray(rearrange(a, "a l b t s -> l (a b) t s")) for a in chosen]


@dataclasses.dataclass(frozen=True)
class Row:
    """The largest relative differences of a layout from the oracle.

    Attributes:
        loss, total_loss, grad_norm: relative.
        groups: by parameter group, relative to the largest entry of each layer and expert.
        worst: the parameter with the largest difference.
        counts: how many routing counts differ.
        dropped: assignments that the oracle dropped, so that one sees that some were.
        router_state: largest absolute difference.
        ties: tokens of a layer and a step whose choices differ from the oracle's, where the rest is
            that of its choices.
    """

    layout: str
    loss: float
    total_loss: float
    grad_norm: float
    groups: dict[str, float]
    worst: str
    counts: int
    dropped: int
    router_state: float
    seconds: float
    ties: int = 0

    @property
    def failures(self) -> list[str]:
        """Names of the quantities that are not equal."""
        names = [n for n in ("loss", "total_loss") if not getattr(self, n) <= LOSS_TOLERANCE]
        names += [] if self.grad_norm <= GRADIENT_TOLERANCE else ["grad_norm"]
        names += [f"gradient of {g}" for g, d in self.groups.items() if not d <= GRADIENT_TOLERANCE]
        names += ["counts"] if self.counts else []
        return names + ([] if self.router_state <= LOSS_TOLERANCE else ["router state"])


def factorisations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yields every way to write `number` as an ordered product of `parts` factors."""
    if parts == 1:
        yield (number,)
        return
    for first in (d for d in range(1, number + 1) if number % d == 0):
        for rest in factorisations(number // first, parts - 1):
            yield (first, *rest)


def layouts(config: Config, num_devices: int) -> list[Layout]:
    """Returns every layout of `num_devices` devices that the config allows."""
    found = []
    for mesh, accumulation, remat, how in itertools.product(
        factorisations(num_devices, len(AXES)), accumulations(config), REMAT, dispatches(config)
    ):
        sizes = dict(zip(AXES, mesh, strict=True))
        layout = Layout(**sizes, accumulation=accumulation, remat=remat, dispatch=how)
        if sizes["expert_fsdp"] > 1 and not config.num_moe_layers:
            continue  # without experts the same as fsdp
        try:
            laid_out(config, layout, num_devices).check_mesh(MeshConfig(**sizes))
        except ConfigError:
            continue
        found.append(layout)
    return found


def accumulations(config: Config) -> tuple[int, ...]:
    """Returns the numbers of microbatches that train the same: one only, where a loss is defined
    over a microbatch.
    """
    by_definition = config.moe.microbatch_balance_loss_weight > 0
    return (1,) if config.num_moe_layers and by_definition else (1, ACCUMULATION)


def dispatches(config: Config) -> tuple[str, ...]:
    """Returns the entries of DISPATCH that the config's router allows."""
    moe = config.moe
    if not config.num_moe_layers:
        return DISPATCH[:1]
    if moe.router == "soft":
        return ("dropless by all_to_all",)
    return DISPATCH if moe.takes_capacity else DISPATCH[: len(DISPATCH) // 2]


def covering(candidates: list[Layout]) -> list[Layout]:
    """Returns a selection with every pair of settings that occurs together in some candidate.

    An axis counts as a setting with two values, split or not; accumulation, remat and dispatch with
    theirs. Of layouts that cover as much, the one that splits one axis most comes first, and of
    those the one with the most experts' devices.
    """
    candidates = sorted(
        candidates,
        key=lambda layout: (-max(layout.sizes.values()), -layout.expert, -layout.expert_fsdp),
    )

    def pairs(layout: Layout) -> set:
        split = (size > 1 for size in layout.sizes.values())
        others = layout.accumulation, layout.remat, layout.dispatch
        return set(itertools.combinations(enumerate((*split, *others)), 2))

    missing = set().union(*map(pairs, candidates)) if candidates else set()
    chosen = []
    while missing:
        best = max(candidates, key=lambda layout: len(pairs(layout) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def laid_out(config: Config, layout: Layout, num_devices: int) -> Config:
    """Returns the config for one layout; the batch is the smallest that every layout can split."""
    moe = config.moe
    factor = min(moe.capacity_factor or CAPACITY_FACTOR, CAPACITY_FACTOR)
    how, _, transport = layout.dispatch.partition(" by ")
    moe = dataclasses.replace(
        moe,
        capacity_factor=None if how == "dropless" else factor,
        capacity_by_expert=None if how == "dropless" else moe.capacity_by_expert,
        transport=transport,
        buffer_factor=BUFFER_FACTOR,
    )
    batch_size = num_devices * ACCUMULATION * moe.group_sequences
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, remat=layout.remat, dtype="float32", param_dtype="float32"
        ),
        moe=moe,
        train=dataclasses.replace(
            config.train, batch_size=batch_size, accumulation=layout.accumulation
        ),
        mesh=MeshConfig(**layout.sizes),
        logging=dataclasses.replace(config.logging, choices=config.num_moe_layers > 0),
    )


def oracle(config: Config, layout: Layout, num_devices: int) -> Config:
    """Returns the config of the dense oracle for a layout: one device, one microbatch, no remat."""
    plain = layout._replace(**dict.fromkeys(AXES, 1), accumulation=1, remat="none")
    config = laid_out(config, plain, num_devices)
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, transport="reference"))


def padded_rows(data: TrainBatches, step: int) -> Batch:
    """Returns the batch of a step with every third sequence cut short, and the last one empty."""
    batch = data.rows(step)
    size, length = batch.tokens.shape
    kept_b = np.full(size, length)
    kept_b[::3] = np.linspace(1, length - 1, len(kept_b[::3])).astype(int)
    kept_b[-1] = 0 if size > 1 else length
    real_bt = np.arange(length)[None] < kept_b[:, None]
    return batch._replace(
        segments=np.where(real_bt, batch.segments, 0), loss_mask=batch.loss_mask & real_bt
    )


def trace(
    config: Config,
    data: TrainBatches,
    starts: list[TrainState],
    choices: Sequence[np.ndarray] = (),
) -> Trace:
    """Runs STEPS optimizer steps of `config` and returns all that they computed.

    Args:
        starts: the state before each step, so that differences do not pile up; where it is shorter
            than the steps, a step goes on from the one before.
        choices: of each step, to use instead of choosing; see `Trace.choices`.
    """
    mesh = make_mesh(config.mesh, jax.devices()[: config.mesh.num_devices])
    optimizer = make_optimizer(config.optim, config.train.steps)
    step = jax.jit(train_step(config, mesh, optimizer, model_graph(config, mesh)))
    steps, before = [], starts[0]
    for number in range(STEPS):
        before = starts[number] if number < len(starts) else before
        rows = padded_rows(data, number)
        batch = place_batch(
            mesh,
            lambda start, stop, rows=rows: jax.tree.map(lambda leaf: leaf[start:stop], rows),
            config.train.batch_size,
            config.train.accumulation,
        )
        state = jax.device_put(before, tree_shardings(mesh, before))
        chosen = None
        if choices:
            split = {"pattern": "l (a b) t s -> a l b t s", "a": config.train.accumulation}
            chosen = rearrange(choices[number], **split)
        after, metrics, grads = jax.device_get(step(state, batch, chosen))
        named = {path_name(path): g for path, g in jax.tree_util.tree_leaves_with_path(grads)}
        steps.append((before, metrics, named, after.router_state))
        before = after
    return Trace(*map(list, zip(*steps, strict=True)))


def _relative(ours: Any, theirs: Any) -> float:
    difference = float(abs(ours - theirs) / max(abs(theirs), 1e-30))
    return difference if math.isfinite(difference) else math.inf


def compare(layout: str, ours: Trace, oracle: Trace, seconds: float, ties: int = 0) -> Row:
    """Returns the largest differences of a trace from the oracle's, over all steps.

    A tie may still move a first choice: which of the replayed ones weighs most.
    """
    groups: dict[str, float] = {}
    worst, worst_name = -1.0, ""
    for mine, theirs, metrics in zip(ours.grads, oracle.grads, oracle.metrics, strict=True):
        for name, gradient in theirs.items():
            difference = _gradient_difference(name, mine[name], gradient, metrics.grad_norm)
            group = parameter_group(name)
            groups[group] = max(groups.get(group, 0.0), difference)
            if difference > worst:
                worst, worst_name = difference, name
    pairs = list(zip(ours.metrics, oracle.metrics, strict=True))
    return Row(
        layout=layout,
        loss=max(_relative(a.losses.loss, b.losses.loss) for a, b in pairs),
        total_loss=max(_relative(a.losses.total, b.losses.total) for a, b in pairs),
        grad_norm=max(_relative(a.grad_norm, b.grad_norm) for a, b in pairs),
        groups={group: groups[group] for group in GROUPS if group in groups},
        worst=worst_name,
        counts=sum(_different_counts(a.stats, b.stats) for a, b in pairs)
        + max(0, sum(_moved_firsts(a.stats, b.stats) for a, b in pairs) - ties),
        dropped=sum(0 if b.stats is None else int(b.stats.dropped_e.sum()) for _, b in pairs),
        router_state=max(map(_state_difference, ours.router_state, oracle.router_state)),
        seconds=seconds,
        ties=ties,
    )


def _gradient_difference(name: str, ours: np.ndarray, theirs: np.ndarray, norm: Any) -> float:
    """Returns the largest difference relative to the largest entry of the same layer and expert.

    A slice whose gradient is below a millionth of the global norm is held to that instead.
    """
    stacked = name.startswith(("prefix/", "runs")) + (parameter_group(name) == "experts")
    slices = (*theirs.shape[:stacked], -1)
    difference = np.abs(ours - theirs).reshape(slices).max(-1)
    scale = np.maximum(np.abs(theirs).reshape(slices).max(-1), 1e-6 * norm)
    largest = float((difference / scale).max())
    return largest if math.isfinite(largest) else math.inf


def _different_counts(ours: Any, theirs: Any) -> int:
    if theirs is None:
        return 0
    fields = ("count_e", "dropped_e", "tokens", "padding", "sequences")
    return sum(int((getattr(ours, f) != getattr(theirs, f)).sum()) for f in fields)


def _moved_firsts(ours: Any, theirs: Any) -> int:
    """Returns how many first choices, at least, are of another expert."""
    return 0 if theirs is None else int(np.maximum(ours.first_e - theirs.first_e, 0).sum())


def _state_difference(ours: dict, theirs: dict) -> float:
    return max((float(np.abs(ours[k] - theirs[k]).max()) for k in theirs), default=0.0)


def check(config: Config, chosen: list[Layout], num_devices: int) -> Iterator[Row]:
    """Yields a row for each chosen layout, each compared with the oracle of its dispatch."""
    corpus = load_corpus(config.data, "train")
    check_vocabulary(corpus, config.model.vocab_size)
    batch_size = laid_out(config, chosen[0], num_devices).train.batch_size
    data = TrainBatches(corpus, config.data.sequence_length, batch_size, config.seed)
    plain = oracle(config, chosen[0], num_devices)
    optimizer = make_optimizer(config.optim, config.train.steps)
    counts = corpus.token_counts(config.model.vocab_size)
    first = jax.device_get(initial_state(plain, single_device_mesh(), optimizer, counts))
    oracles: dict[bool, Trace] = {}
    for layout in chosen:
        drops = layout.dispatch.startswith("capacity")
        if drops not in oracles:
            oracles[drops] = trace(oracle(config, layout, num_devices), data, [first])
        start = time.monotonic()
        theirs = oracles[drops]
        laid = laid_out(config, layout, num_devices)
        ours, ties = trace(laid, data, theirs.starts), 0
        if 0 < different_choices(ours, theirs) <= TIES * _choosing(theirs):
            ties = different_choices(ours, theirs)
            replayed = trace(laid, data, theirs.starts, theirs.choices)
            ours = replayed._replace(router_state=ours.router_state)  # a replay does not move it
        yield compare(str(layout), ours, theirs, time.monotonic() - start, ties)


def different_choices(ours: Trace, theirs: Trace) -> int:
    """Returns how many tokens, over layers and steps, have other choices or in another order."""
    pairs = zip(ours.choices, theirs.choices, strict=True)
    return sum(int((a != b).any(-1).sum()) for a, b in pairs)


def _choosing(trace: Trace) -> int:
    return sum(math.prod(choice_lbts.shape[:3]) for choice_lbts in trace.choices)


def verify(config: Config, matrix: bool, json_path: Path | None, page: Path | None = None) -> int:
    """Checks the config's layouts on this machine's devices and prints a row for each.

    Args:
        matrix: also check every router, dispatch and transport on a small layer (`contract`).
        json_path: where to write the rows, and the matrix.
        page: where to write the matrix as Markdown.

    Returns:
        0, or 1 when a difference is above its tolerance.

    Raises:
        ConfigError: no layout of these devices fits the config.
    """
    num_devices = len(jax.devices())
    candidates = layouts(config, num_devices)
    if not candidates:
        config.check_mesh(config.mesh.resolve(num_devices))
        raise ConfigError(
            f"no layout of {num_devices} devices fits the config; use another number of devices"
        )
    chosen = covering(candidates)
    console = Console(highlight=False)
    console.print(
        f"{len(chosen)} of {len(candidates)} layouts of {num_devices} devices, {STEPS} steps each, "
        f"against the dense oracle on one device; float32, losses to {LOSS_TOLERANCE:g}, "
        f"gradients to {GRADIENT_TOLERANCE:g}"
    )
    if len(accumulations(config)) == 1:
        console.print(
            "moe.microbatch_balance_loss_weight is on: accumulation changes that loss by "
            "definition, so one microbatch only is checked"
        )
    rows = []
    for row in check(config, chosen, num_devices):
        rows.append(row)
        verdict = "ok  " if not row.failures else "FAIL"
        ties = f", but for {row.ties} tie{'s' * (row.ties > 1)}" if row.ties else ""
        line = f"{verdict} {len(rows):3}/{len(chosen)}  {row.layout}  ({row.seconds:.0f} s){ties}"
        console.print(line, soft_wrap=True)
    console.print(_table(rows))
    failed = [row for row in rows if row.failures]
    for row in failed:
        console.print(f"FAIL {row.layout}: {', '.join(row.failures)}; worst parameter {row.worst}")
    if not failed:
        worst = max(rows, key=lambda row: max(row.groups.values()))
        console.print(
            f"worst gradient: {worst.worst}, {max(worst.groups.values()):.1e} on {worst.layout}"
        )
    console.print(f"{len(rows) - len(failed)} of {len(rows)} layouts train the same")
    cells = _check_matrix(console, num_devices, page) if matrix else []
    passed = not failed and all(cell.passed for cell in cells)
    if json_path is not None:
        content = [dataclasses.asdict(row) | {"failures": row.failures} for row in rows]
        found = {"rows": content, "passed": passed}
        if matrix:
            found["matrix"] = [dataclasses.asdict(cell) for cell in cells]
        write_json(json_path, json.dumps(found))
    return 0 if passed else 1


def _check_matrix(console: Console, num_devices: int, page: Path | None) -> list[contract.Cell]:
    """Checks and prints the contract of every router; writes it to `page`."""
    console.print(
        f"the contract: {len(contract.CASES)} cases of a small layer by dispatch, transport and "
        f"property, on {num_devices} devices, to {contract.TOLERANCE:g}"
    )
    rows = []
    for cells in contract.check_matrix(num_devices):
        rows.append(cells)
        worst = max(cells, key=lambda cell: cell.worst)
        bad = [cell for cell in cells if not cell.passed]
        verdict = "ok  " if not bad else "FAIL"
        console.print(
            f"{verdict} {len(rows):3}/{len(contract.CASES)}  {cells[0].case}: {len(cells)} cells, "
            f"worst {worst.worst:.0e} in {worst.column} ({worst.where})",
            soft_wrap=True,
        )
        for cell in bad:
            line = f"FAIL {cell.case}, {cell.column}: {cell.worst:.1e} in {cell.where}"
            console.print(line, soft_wrap=True)
        if page is not None:
            page.write_text(contract.as_markdown(rows, num_devices))
    return [cell for cells in rows for cell in cells]


def _table(rows: list[Row]) -> Table:
    groups = [g for g in GROUPS if any(g in row.groups for row in rows)]
    title = "largest relative difference from the oracle"
    table = Table(title=title, box=rich.box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("", "loss", "total", *groups, "norm", "counts", "dropped"):
        table.add_column(SHORT.get(name, name), justify="right", no_wrap=True)
    for number, row in enumerate(rows, start=1):
        numbers = [
            row.loss,
            row.total_loss,
            *(row.groups.get(g, 0.0) for g in groups),
            row.grad_norm,
        ]
        counts = "equal" if row.counts == 0 else f"{row.counts} off"
        cells = [str(number), *(f"{n:.0e}" for n in numbers), counts, str(row.dropped)]
        table.add_row(*cells, style="red" if row.failures else None)
    return table
