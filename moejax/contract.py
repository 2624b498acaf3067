"""The contract: every router, dispatch and transport computes what the dense oracle does.

One small MoE layer for each case: its output, its counts and every gradient of a loss made of all
auxiliary terms, against `reference.apply_moe`, over meshes that split every axis. Then properties
that no layout may change: padding, the order of experts, replay, recomputation, causality, the
weights' rule and the direction of the router state.
"""

import dataclasses
import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import moe, reference
from moejax.config import EXPERT_AXES, MeshConfig
from moejax.errors import ConfigError
from moejax.loss import auxiliary_loss
from moejax.mesh import AnyMesh, make_mesh, single_device_mesh
from moejax.moe_config import FORCED, SCORED, WITHOUT_LOGITS, MoEConfig
from moejax.parameters import AXES_OF, moe_parameters
from moejax.router_state import initial_router_state, update_router_state
from moejax.router_stats import LAYOUT_FIELDS, RouterStats
from moejax.routing import RouterInputs, route

TOLERANCE = 2e-5  # of the largest entry of each array, float32
SEQUENCES, TOKENS, WIDTH, EXPERTS, VOCAB = 16, 6, 8, 8, 5
# Programs run once, on few numbers: without LLVM's optimizations they compile in two thirds of it.
FAST_COMPILE: dict[str, str | bool] = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": True,
}
_ONE_AT_A_TIME = threading.Lock()  # two programs with collectives on the same devices would wait
DISPATCH = tuple(itertools.product(("dropless", "capacity"), ("all_to_all", "ragged", "gather")))
LOSSES = {
    "sequence_balance_loss_weight": 0.1,
    "importance_loss_weight": 0.1,
    "mutual_information_loss_weight": 0.1,
    "device_balance_loss_weight": 0.1,
    "device_groups": 2,
}
CASES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax, not normalized": {"normalize_weights": False},
    "softmax, top-1 (Switch)": {"top_k": 1, "normalize_weights": False},
    "softmax, all losses": LOSSES,
    "softmax, logit cap": {"logit_cap": 2.0, "weight_scale": 2.5},
    "softmax, jitter and expert dropout": {"jitter": 0.1, "expert_dropout": 0.2},
    "softmax, group-limited": {"expert_groups": 4, "groups_per_token": 2},
    "softmax, free experts": {"zero_experts": 1, "copy_experts": 1, "constant_experts": 2},
    "softmax, gated shared expert": {"shared_experts": 1, "shared_gate": "sigmoid"},
    "softmax, groups of 2 sequences": {"group_sequences": 2},
    "softmax, GELU experts": {"activation": "gelu"},
    "softmax, GeGLU experts": {"activation": "geglu"},
    "softmax, ReLU experts": {"activation": "relu"},
    "softmax, squared-ReLU experts": {"activation": "squared_relu"},
    "softmax, priority rank": {"priority": "rank"},
    "softmax, priority weight": {"priority": "weight"},
    "softmax, priority best_weight": {"priority": "best_weight"},
    "softmax, priority random": {"priority": "random"},
    "softmax, capacity by expert": {"capacity_by_expert": (0.5, 1.5) * 4},
    "sigmoid": {"router": "sigmoid"},
    "sqrt_softplus": {"router": "sqrt_softplus"},
    "cosine": {"router": "cosine"},
    "noisy": {"router": "noisy", "importance_loss_weight": 0.1, "load_loss_weight": 0.1},
    "gshard": {"router": "gshard"},
    "sigmoid_bias": {"router": "sigmoid_bias"},
    "sigmoid_bias, group-limited": {
        "router": "sigmoid_bias",
        "expert_groups": 4,
        "groups_per_token": 2,
    },
    "quantile": {"router": "quantile"},
    "expert_choice": {"router": "expert_choice", "group_sequences": 2},
    "sinkhorn": {"router": "sinkhorn", "top_k": 1},
    "soft": {"router": "soft"},
    "mixture_of_depths": {"router": "mixture_of_depths"},
    "hash": {"router": "hash"},
    "random": {"router": "random"},
    "balanced": {"router": "balanced"},
    "dense": {"router": "dense", "gate_dropout": 0.2},
    "elementwise": {"router": "elementwise"},
    "elementwise_input": {"router": "elementwise_input", "gate_rank": 4},
    "relu": {"router": "relu"},
    "threshold": {"router": "threshold"},
}


def case_config(name: str, dispatch: str, transport: str) -> MoEConfig | None:
    """Returns the config of a cell of the matrix, None where the two do not go together."""
    changes = CASES[name]
    capacity = 1.0 if dispatch == "capacity" else None
    if capacity is None and ("priority" in changes or "capacity_by_expert" in changes):
        return None
    fields = {"num_experts": EXPERTS, "top_k": 2, "expert_hidden": WIDTH, "buffer_factor": 1.0}
    fields |= {"capacity_factor": capacity, "transport": transport} | changes
    try:
        return MoEConfig(**fields)
    except ConfigError:
        return None


def meshes(num_devices: int) -> list[MeshConfig]:
    """Returns meshes with the expert axis 1, 2, 4 and 8 and others in between."""
    shapes = (
        MeshConfig(data=1),
        MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
        MeshConfig(data=2, expert=4),
        MeshConfig(data=1, expert=8),
        MeshConfig(data=1, fsdp=2),
        MeshConfig(data=1, expert=2),
    )
    found = [mesh for mesh in shapes if mesh.num_devices <= num_devices]
    if num_devices >= 8:  # the small ones are for machines with fewer devices
        found = found[:4]
    return found


@dataclasses.dataclass(frozen=True)
class Layer:
    """What a layer runs on: weights, tokens, inputs of the router and its state, as NumPy."""

    config: MoEConfig
    weights: Mapping[str, np.ndarray]
    x_btd: np.ndarray
    weigh_btd: np.ndarray  # the loss is the sum of the output times this
    inputs: RouterInputs
    state: Mapping[str, np.ndarray]


def make_layer(config: MoEConfig, *, training: bool = True) -> Layer:
    """Returns a layer with random weights, ragged padding, and a router state that matters."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    weights = {name: normal(*p.shape) for name, p in moe_parameters(config, WIDTH).items()}
    kept_b = np.array([6, 6, 3, 6, 0, 6, 6, 5, 6, 6, 6, 1, 2, 6, 6, 4])
    keys = jax.random.key_data(jax.random.split(jax.random.key(1), SEQUENCES))
    inputs = RouterInputs(
        mask_bt=jnp.asarray(np.arange(TOKENS) < kept_b[:, None]),
        token_bt=jnp.asarray(random.integers(0, VOCAB, (SEQUENCES, TOKENS), np.int32)),
        key_b=keys if training else None,
    )
    state = {n: np.asarray(v[0]) for n, v in initial_router_state(config, 1, VOCAB).items()}
    if "bias" in state:
        bias_e = 0.3 * normal(config.choices)
        state["bias"] = bias_e - bias_e.mean()
    x_btd, weigh_btd = normal(2, SEQUENCES, TOKENS, WIDTH)
    return Layer(config, weights, x_btd, weigh_btd, inputs, state)


def run_layer(layer: Layer, mesh: AnyMesh | None, *, remat: bool = False) -> dict[str, np.ndarray]:
    """Returns output, stats and every gradient by name; by the dense oracle where `mesh` is None.

    Gradients are of a random projection of the output plus every auxiliary loss of the config.
    """
    apply = reference.apply_moe if mesh is None else moe.apply_moe

    def objective(weights, x_btd):
        run = functools.partial(apply, config=layer.config, mesh=mesh)
        if remat:
            run = jax.checkpoint(run)
        state = {name: jnp.asarray(value) for name, value in layer.state.items()}
        y_btd, stats, choice_bts = run(weights, x_btd, layer.inputs, state)
        stacked = jax.tree.map(lambda leaf: leaf[None], stats)
        l1_l = jnp.ones(1, jnp.float32)
        auxiliary = auxiliary_loss(stacked, l1_l, layer.config)
        value = jnp.sum(y_btd * layer.weigh_btd)
        return value + 10 * auxiliary, (y_btd, stats, choice_bts, auxiliary)

    gradient = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    options = FAST_COMPILE if jax.default_backend() == "cpu" else None
    compiled = gradient.lower(dict(layer.weights), layer.x_btd).compile(options)
    with _ONE_AT_A_TIME:
        (_, aux), (by_weight, by_x) = compiled(dict(layer.weights), layer.x_btd)
        jax.block_until_ready(by_x)
    y_btd, stats, choice_bts, auxiliary = jax.device_get(aux)
    found = {"y": y_btd, "choices": choice_bts, "auxiliary loss": auxiliary, **stats._asdict()}
    found |= {f"gradient of {name}": value for name, value in jax.device_get(by_weight).items()}
    return found | {"gradient of x": jax.device_get(by_x)}


def difference(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> tuple:
    """Returns the largest difference and where: relative to each array's largest entry, infinite
    for whole numbers that differ.
    """
    worst, name = 0.0, ""
    for key, value in theirs.items():
        if key in LAYOUT_FIELDS:
            continue
        if np.issubdtype(value.dtype, np.integer):
            found = 0.0 if np.array_equal(ours[key], value) else math.inf
        else:
            scale = max(float(np.abs(value).max(initial=0.0)), 1e-6)
            found = float(np.abs(ours[key] - value).max(initial=0.0)) / scale
            found = found if math.isfinite(found) else math.inf
        if found > worst or not name:
            worst, name = found, key
    return worst, name


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of the matrix: the case, the column, the worst difference, and where it was."""

    case: str
    column: str
    worst: float
    where: str

    @property
    def passed(self) -> bool:
        return self.worst <= TOLERANCE


def check_layouts(name: str, num_devices: int) -> Iterator[Cell]:
    """Yields a cell for each dispatch and transport of a case: the worst over all meshes."""
    oracles: dict[str, dict] = {}
    for dispatch, transport in DISPATCH:
        config = case_config(name, dispatch, transport)
        if config is None:
            continue
        layer = make_layer(config)
        if dispatch not in oracles:
            oracles[dispatch] = run_layer(layer, None)
        worst, where, rounds = 0.0, "", 0
        for sizes in meshes(num_devices):
            if sizes.expert_degree == 1 and transport != DISPATCH[0][1] and config.router != "soft":
                continue  # nothing is sent, so all transports are one program
            ours = run_layer(layer, make_mesh(sizes, jax.devices()[: sizes.num_devices]))
            found, key = difference(ours, oracles[dispatch])
            rounds = max(rounds, int(ours["overflow_rounds"]))
            if found >= worst:
                worst, where = found, f"{key} on {_mesh_name(sizes)}, {rounds} further rounds"
        yield Cell(name, f"{dispatch} {transport}", worst, where)


def _mesh_name(sizes: MeshConfig) -> str:
    split = [f"{axis} {n}" for axis, n in dataclasses.asdict(sizes).items() if n and n > 1]
    return " ".join(split) or "one device"


# Properties, on one device; each returns the worst difference, infinite where a rule is broken


def _run(layer: Layer) -> dict[str, np.ndarray]:
    return run_layer(layer, single_device_mesh())


def appended_padding(layer: Layer, plain: Mapping[str, np.ndarray]) -> float:
    """Three masked tokens and two groups of them, all NaN: nothing real changes."""
    more = 2 * layer.config.group_sequences
    widths = ((0, more), (0, 3))
    token_bt = layer.inputs.token_bt
    assert token_bt is not None
    inputs = RouterInputs(jnp.pad(layer.inputs.mask_bt, widths), jnp.pad(token_bt, widths))
    x_btd = np.pad(layer.x_btd, (*widths, (0, 0)), constant_values=np.nan)
    weigh_btd = np.pad(layer.weigh_btd, (*widths, (0, 0)))
    more_layer = dataclasses.replace(layer, x_btd=x_btd, weigh_btd=weigh_btd, inputs=inputs)
    padded = run_layer(more_layer, single_device_mesh())
    for key in ("y", "choices", "gradient of x"):
        padded[key] = padded[key][:SEQUENCES, :TOKENS]
    padded["padding"] = plain["padding"]
    # choices of padding are the sentinel on both sides; sums over more zeros round alike
    return difference(padded, plain)[0]


def permuted_experts(layer: Layer, plain: Mapping[str, np.ndarray]) -> float:
    """Another order of the experts: the same output, counts in that order."""
    config = layer.config
    order = np.array([3, 0, 7, 1, 6, 2, 5, 4, *range(EXPERTS, config.choices)])
    weights = {
        name: value[order[:EXPERTS]] if AXES_OF.get(name, (None,))[:1] == (EXPERT_AXES,) else value
        for name, value in layer.weights.items()
    }
    for name in ("router", "router_noise", "router_bias"):
        if name in weights:
            columns = order
            if config.router == "soft":
                slots = np.arange(EXPERTS * config.soft_slots).reshape(EXPERTS, -1)
                columns = slots[order].reshape(-1)
            weights[name] = weights[name][..., columns]
    inverse = np.argsort(order).astype(np.int32)
    state = {
        n: inverse[v] if n == "table" else v[..., order] if v.ndim else v
        for n, v in layer.state.items()
    }
    other = _run(dataclasses.replace(layer, weights=weights, state=state))
    names = ("y", "gradient of x", "auxiliary loss", "dropped_e", "count_e")
    wanted = {n: plain[n][order] if n.endswith("_e") else plain[n] for n in names}
    return difference(other, wanted)[0]


def replayed(layer: Layer, plain: Mapping[str, np.ndarray]) -> float:
    """The recorded choices on all devices: the same output and gradients, weights recomputed."""
    inputs = layer.inputs._replace(choice_bts=jnp.asarray(plain["choices"]))
    transport = "all_to_all" if layer.config.router == "soft" else "ragged"
    config = dataclasses.replace(layer.config, transport=transport)
    mesh = make_mesh(meshes(len(jax.devices()))[-1], None)
    again = run_layer(dataclasses.replace(layer, inputs=inputs, config=config), mesh)
    return difference(again, plain)[0]


def recomputed(layer: Layer, plain: Mapping[str, np.ndarray]) -> float:
    """Under `jax.checkpoint` counts are not counted twice, and gradients are equal."""
    return difference(run_layer(layer, single_device_mesh(), remat=True), plain)[0]


def causal(layer: Layer, plain: Mapping[str, np.ndarray]) -> float:
    """Other tokens from the fourth on leave the first three alone, or change them where the router
    is documented not to be causal.
    """
    inputs = RouterInputs(jnp.ones_like(layer.inputs.mask_bt), layer.inputs.token_bt)
    x_btd = layer.x_btd.copy()
    x_btd[:, 3:] = -3 * x_btd[:, 3:]
    before = _run(dataclasses.replace(layer, inputs=inputs))["y"][:, :3]
    after = _run(dataclasses.replace(layer, x_btd=x_btd, inputs=inputs))["y"][:, :3]
    change = float(np.abs(after - before).max() / np.abs(before).max())
    # Sinkhorn is a plain top-k in evaluation, which is what this runs.
    leaks = layer.config.noncausal_reason is not None and layer.config.router != "sinkhorn"
    return (0.0 if change > 1e-3 else math.inf) if leaks else change


def weights_rule(layer: Layer, plain: Mapping[str, np.ndarray]) -> float:
    """Normalized weights sum to `weight_scale` for every real token; a bias never enters them."""
    config = layer.config
    run = jax.jit(functools.partial(route, config=config))
    routing = run(layer.x_btd, dict(layer.weights), dict(layer.state), layer.inputs)
    total_bt = np.asarray(routing.weight_bts.sum(-1))[np.asarray(layer.inputs.mask_bt)]
    worst = 0.0
    normalized = config.normalize_weights and config.top_k > 1
    if config.router in (*SCORED, "gshard", "hash", *FORCED) and normalized:
        worst = float(np.abs(total_bt / config.weight_scale - 1).max())
    if "bias" in layer.state:
        inputs = layer.inputs._replace(choice_bts=routing.expert_bts)
        unbiased = run(layer.x_btd, dict(layer.weights), {"bias": 0 * layer.state["bias"]}, inputs)
        apart = np.abs(np.asarray(unbiased.weight_bts - routing.weight_bts)).max()
        worst = max(worst, float(apart))
    return worst


def state_direction(layer: Layer, plain: Mapping[str, np.ndarray]) -> float:
    """A step of the router state makes an expert with too much load harder to choose, and one with
    too little easier: by a lower bias, or a higher threshold.
    """
    stats = RouterStats(*(jnp.asarray(plain[name])[None] for name in RouterStats._fields))
    state = {name: jnp.asarray(value)[None] for name, value in layer.state.items()}
    update = jax.jit(functools.partial(update_router_state, config=layer.config))
    name = "bias" if "bias" in state else "threshold"
    step_e = np.asarray(update(state, stats)[name] - state[name])[0]
    step_e = step_e if name == "bias" else -step_e
    count_e, target = plain["count_e"], plain["tokens"] * layer.config.top_k / EXPERTS
    busiest, idlest = np.argmax(count_e), np.argmin(count_e)
    right = step_e[busiest] < 0 or count_e[busiest] <= target
    right &= step_e[idlest] > 0 or count_e[idlest] >= target
    return 0.0 if right and count_e[busiest] > target else math.inf


PROPERTIES: dict[str, Callable[[Layer, Mapping[str, np.ndarray]], float]] = {
    "padding": appended_padding,
    "expert order": permuted_experts,
    "replay": replayed,
    "remat": recomputed,
    "causality": causal,
    "weights": weights_rule,
    "state": state_direction,
}


def check_properties(name: str) -> Iterator[Cell]:
    """Yields a cell for each property that the case has, in its first dispatch."""
    found = (case_config(name, dispatch, "gather") for dispatch in ("dropless", "capacity"))
    soft = case_config(name, "dropless", "all_to_all")
    config = next((config for config in (*found, soft) if config is not None), None)
    assert config is not None
    layer = make_layer(config, training=False)
    plain = _run(layer)
    for column, check in PROPERTIES.items():
        if column == "expert order" and not _order_is_free(config):
            continue
        if column == "state" and not set(layer.state) & {"bias", "threshold"}:
            continue
        yield Cell(name, column, check(layer, plain), column)


def _order_is_free(config: MoEConfig) -> bool:
    """Whether the numbers of experts mean nothing: not in groups, nor where they are drawn."""
    ordered = config.expert_groups or config.device_groups or config.capacity_by_expert
    return not ordered and config.router not in (*FORCED, *WITHOUT_LOGITS[:1])


# The matrix


def columns() -> list[str]:
    """Returns the names of the matrix's columns."""
    return [f"{dispatch} {transport}" for dispatch, transport in DISPATCH] + list(PROPERTIES)


def check_case(name: str, num_devices: int) -> list[Cell]:
    """Returns every cell of a case."""
    return [*check_layouts(name, num_devices), *check_properties(name)]


def check_matrix(num_devices: int, names: Iterable[str] = CASES) -> Iterator[list[Cell]]:
    """Yields the cells of each case in order. Two cases are compiled at a time."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield from pool.map(lambda name: check_case(name, num_devices), names)


def as_markdown(rows: list[list[Cell]], num_devices: int) -> str:
    """Returns the page docs/contract.md."""
    names = columns()
    lines = [
        "# The contract",
        "",
        f"Written by `make contract` on {num_devices} virtual CPU devices. A number is the largest",
        "difference from the dense oracle (`moejax/reference.py`) over output, counts, auxiliary",
        "losses and every gradient, relative to the largest entry of each array, in float32, the",
        f"worst over the meshes {_mesh_list(num_devices)}.",
        f"Up to {TOLERANCE:g} passes; whole numbers are equal. `-`: the two do not go together.",
        "Dropless receive buffers hold the balanced load only, so that further rounds are covered.",
        "The columns from `padding` on are properties of one device; `moejax/contract.py` says",
        "what each checks. A case is a config of a small layer: `contract.CASES`.",
        "",
        "| case | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for cells in rows:
        found = {cell.column: cell for cell in cells}
        shown = [_shown(found.get(name)) for name in names]
        lines.append(f"| {cells[0].case} | " + " | ".join(shown) + " |")
    count = sum(len(cells) for cells in rows)
    passed = sum(cell.passed for cells in rows for cell in cells)
    return "\n".join([*lines, "", f"{passed} of {count} cells pass.", ""])


def _mesh_list(num_devices: int) -> str:
    return ", ".join(f"({_mesh_name(sizes)})" for sizes in meshes(num_devices))


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    return f"{cell.worst:.0e}" if cell.passed else f"**FAIL {cell.worst:.0e}**"
