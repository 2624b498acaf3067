"""`moejax report`: a run as one HTML file, from its records, its events and an atlas of experts.

What is shown is gathered here, from files alone; `report_page` makes the page of it. Curves and
loads of long runs are means over equal runs of records, so that the file stays small.
"""

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import moejax
from moejax.atlas import Atlas, TokenView, load_atlas
from moejax.atlas_show import agreement_json
from moejax.config import Config, ConfigError
from moejax.errors import file_error
from moejax.events import KINDS as EVENT_KINDS
from moejax.events import read_events
from moejax.flops import active_parameters, flops_per_token, parameter_counts, total_parameters
from moejax.foreign import write_atomically
from moejax.ledger import KINDS as TIME_KINDS
from moejax.ledger import totals
from moejax.metrics import iterate_metrics
from moejax.overrides import config_values, keys, value_difference
from moejax.records import relative_load
from moejax.report_page import packed, packed_json, quantised, render
from moejax.tallies import Agreement
from moejax.workdir import (
    ATLAS,
    atlas_file,
    checkpoint_steps,
    find_manifest,
    read_config,
    read_run,
)

REPORT = "report.html"  # in a workdir, unless told otherwise
LEFT_OUT = "left out, as --no_atlas asks"
POINTS = 600  # of a curve
LOAD_CELLS = 1_000_000  # layers x experts x times of the load that is shown over time
LEAST_TIMES = 24  # of the load, also where there are more cells
EVENTS_SHOWN = 500
OCTAVES = 4.0  # loads and pairs are shown from 1/16 to 16 times what balance or chance gives
_TRAIN = ("loss", "grad_norm", "learning_rate", "drop_fraction", "tokens_per_second")
_EVAL = ("loss", "bits_per_byte", "loss_at_capacity")
_BY_LAYER = ("max_violation", "router_entropy", "dead_experts")


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of a run as arrays; N train records, L MoE layers, E choices of the widest.

    Attributes:
        train: float [N] by field, with `step` and `tokens_seen`; NaN where a value is not known.
        evals: the same of the eval records.
        load_nle: float32 [N, L, E], load over balanced load; NaN behind a layer's experts. None
            for a dense model, and without records.
        by_layer_nl: float [N, L] by field, the `layers` of train records.
        last: the last record of each split.
    """

    train: dict[str, np.ndarray]
    evals: dict[str, np.ndarray]
    load_nle: np.ndarray | None
    by_layer_nl: dict[str, np.ndarray]
    last: dict[str, dict[str, Any]]


class Looks(NamedTuple):
    """What a page shows of a model beside its atlas, because somebody asked.

    Attributes:
        views: of texts that were given.
        against: another run's name, the steps of both checkpoints, how many tokens both routed,
            the MoE layers' numbers, and how alike they did; or None.
    """

    views: tuple[TokenView, ...] = ()
    against: tuple[str, tuple[int, int], int, np.ndarray, Agreement] | None = None


ATLAS_ALONE = Looks()


def report_workdir(
    workdir: Path, output: Path | None, looks: Looks = ATLAS_ALONE, *, with_atlas: bool
) -> str:
    """Writes the page of a run and returns a line about it.

    Args:
        workdir: of the run.
        output: the HTML file; None for the one in the workdir.
        looks: what else to show, next to the atlas.
        with_atlas: show the newest atlas of the workdir, if it has one.

    Raises:
        ConfigError: `workdir` is none, a record or the atlas is damaged, or the file cannot be
            written.
    """
    atlas, missing = _atlas(workdir, read_config(workdir)) if with_atlas else (None, LEFT_OUT)
    file = output or workdir / REPORT
    if atlas is not None:
        atlas = dataclasses.replace(atlas, views=(*looks.views, *atlas.views))
    try:
        size = write_report(workdir, file, atlas, missing, looks)
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"{file} cannot be written: {reason}; give another --output"
        raise file_error(message, error) from None
    said = f"; no atlas: {missing}" if missing and with_atlas else ""
    return f"wrote {file}, {size / 1e6:.1f} MB{said}"


def wants_atlas(workdir: Path, config: Config) -> bool:
    """Returns whether the newest checkpoint of a run with experts has no atlas of its own."""
    steps = checkpoint_steps(workdir, config.checkpoint.local)
    if not (config.num_moe_layers and steps):
        return False
    try:
        return not _belongs(load_atlas(atlas_file(workdir, steps[-1])), workdir, config)
    except ConfigError:  # there is none, or it is damaged
        return True


def _belongs(atlas: Atlas, workdir: Path, config: Config) -> bool:
    """Whether an atlas is of a checkpoint that the run has, or had before its newest one.

    A run that went back, or was begun anew in the same workdir, has others at the same steps.
    """
    manifest = find_manifest(workdir, config.checkpoint.local, atlas.step)
    if manifest is not None:
        return atlas.checkpoint == manifest.digest
    steps = checkpoint_steps(workdir, config.checkpoint.local)
    if steps and atlas.step > steps[-1]:
        return False
    return read_run(workdir) in (None, atlas.run)


def _atlas(workdir: Path, config: Config) -> tuple[Atlas | None, str]:
    """Returns the newest atlas of a workdir that is of its run as it is now, or why there is none.

    Raises:
        ConfigError: all that could be shown are damaged.
    """
    stale, damaged = [], []
    for step in reversed(_atlas_steps(workdir)):
        try:
            atlas = load_atlas(atlas_file(workdir, step))
        except ConfigError as error:
            damaged.append(error)
            continue
        if _belongs(atlas, workdir, config):
            return atlas, ""
        stale.append(step)
    if damaged:
        raise ConfigError(f"{damaged[0]}, or leave it out by --no_atlas")
    if stale:
        return None, (
            f"that of step {stale[0]} is of a checkpoint that the run has not, for it went back or "
            f"was begun anew; `moejax inspect --workdir {workdir}` makes one of its newest"
        )
    if not config.num_moe_layers:
        return None, "the model is dense, it has no experts"
    if not checkpoint_steps(workdir, config.checkpoint.local):
        return None, "the run has no finished checkpoint yet; see checkpoint.every"
    return None, f"none was made yet; `moejax inspect --workdir {workdir}` makes it"


def _atlas_steps(workdir: Path) -> list[int]:
    names = [file.stem for file in (workdir / ATLAS).glob("*.npz")]
    return sorted(int(name) for name in names if name.isdecimal())


def write_report(
    workdir: Path,
    output: Path,
    atlas: Atlas | None,
    missing: str = "",
    looks: Looks = ATLAS_ALONE,
) -> int:
    """Writes the page of a run, and returns its size in bytes.

    Args:
        workdir: of the run.
        output: the HTML file.
        atlas: of a checkpoint; None leaves the sections about single experts out.
        missing: why there is no atlas, a sentence that the page says.
        looks: `views` are those of the atlas already.

    Raises:
        ConfigError: `workdir` is none.
        OSError: `output` cannot be written.
    """
    page = render(report_data(workdir, atlas, missing, looks))
    write_atomically(output, page)
    return len(page.encode())


def report_data(
    workdir: Path, atlas: Atlas | None, missing: str = "", looks: Looks = ATLAS_ALONE
) -> dict[str, Any]:
    """Returns all that the page shows, as JSON can hold it; arguments as of `write_report`."""
    config = read_config(workdir)
    records = read_records(workdir)
    time = totals(workdir)
    return {
        "name": workdir.resolve().name,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": moejax.__version__,
        "facts": _facts(config, records, time.goodput),
        "config": _config_rows(config),
        "parameters": list(parameter_counts(config).items()),
        "experts": [
            own.moe.choices for stack, own in config.moe_stacks() for _ in range(stack.num_layers)
        ],
        "records": len(records.train["step"]),
        "train": _curves(records.train),
        "evals": _curves(records.evals),
        "domains": _domain_rows(records.last.get("eval", {})),
        "load": _load(records),
        "layers": _by_layer(records),
        "time": {
            "sessions": time.sessions,
            "rows": [[kind, time.seconds[kind], TIME_KINDS[kind]] for kind in TIME_KINDS],
        },
        "events": _events(workdir),
        "atlas": atlas and atlas_data(atlas),
        "missing": missing,
        "against": looks.against and _against(*looks.against),
    }


# Records


def read_records(workdir: Path) -> Records:
    """Returns the records of a run, read one at a time: a line of a wide model is 300 kB."""
    columns: dict[str, dict[str, list[float]]] = {"train": {}, "eval": {}}
    load, layers, last = [], {name: [] for name in _BY_LAYER}, {}
    for record in iterate_metrics(workdir):
        split = record["split"]
        last[split] = record
        for name in ("step", "tokens_seen", *(_TRAIN if split == "train" else _EVAL)):
            columns[split].setdefault(name, []).append(_number(record.get(name)))
        if split == "train" and record.get("expert_load"):
            load.append(relative_load(record["expert_load"]).astype(np.float32))
            for name in _BY_LAYER:
                layers[name].append([_number(value) for value in record[name]])
    for split, names in (("train", _TRAIN), ("eval", _EVAL)):
        for name in ("step", "tokens_seen", *names):
            columns[split].setdefault(name, [])
    arrays = {
        split: {name: np.array(values, np.float64) for name, values in by_name.items()}
        for split, by_name in columns.items()
    }
    return Records(
        arrays["train"],
        arrays["eval"],
        np.stack(load) if load else None,
        {name: np.array(rows, np.float64) for name, rows in layers.items()} if load else {},
        last,
    )


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def means_of_runs(values: np.ndarray, parts: int) -> np.ndarray:
    """Returns the mean of what is finite in each of `parts` equal runs along the first axis.

    NaN where a run has nothing that is finite. Fewer values than parts stay as they are.
    """
    if len(values) <= parts:
        return np.asarray(values, np.float64)
    means = []
    for run in np.array_split(values, parts):
        known = np.isfinite(run)
        total = np.where(known, run, 0.0).sum(axis=0, dtype=np.float64)
        count = known.sum(axis=0)
        means.append(np.where(count > 0, total / np.maximum(count, 1), np.nan))
    return np.stack(means)


def _curves(columns: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: packed(means_of_runs(values, POINTS)) for name, values in columns.items()}


def _load(records: Records) -> dict[str, Any] | None:
    if records.load_nle is None:
        return None
    cells = records.load_nle[0].size
    times = max(LEAST_TIMES, LOAD_CELLS // cells)
    with np.errstate(divide="ignore"):  # an expert without a token is the low end
        log_sle = np.log2(means_of_runs(records.load_nle, min(times, POINTS)))
    return {
        "steps": packed(means_of_runs(records.train["step"], min(times, POINTS))),
        "log2": quantised(log_sle, -OCTAVES, OCTAVES),
    }


def _by_layer(records: Records) -> dict[str, Any]:
    return {
        name: packed(means_of_runs(values_nl, POINTS))
        for name, values_nl in records.by_layer_nl.items()
    }


# What is said in words


def _facts(config: Config, records: Records, goodput: float | None) -> list[list[str]]:
    """Returns rows of label, value and what to know of it."""
    train, evals = records.last.get("train", {}), records.last.get("eval", {})
    newest = max((train, evals), key=lambda record: record.get("step", -1))
    facts = [["Steps", f"{newest.get('step', 0):,}", f"of {config.train.steps:,}"]]
    if newest:
        size = config.train.batch_size * config.data.sequence_length
        facts += [["Tokens seen", short(newest["tokens_seen"]), f"{size:,} positions a step"]]
    if evals.get("loss") is not None:
        bits = evals.get("bits_per_byte")
        best = np.nanmin(records.evals["loss"])
        note = f"nats per token; best {best:.4f}" + (f"; {bits:.4f} bits per byte" if bits else "")
        facts += [["Validation loss", f"{evals['loss']:.4f}", note]]
    elif train.get("loss") is not None:
        facts += [["Training loss", f"{train['loss']:.4f}", "nats per token; no evaluation yet"]]
    total, active = total_parameters(config), active_parameters(config)
    facts += [
        ["Parameters", short(total), f"{short(active)} active"],
        ["FLOPs a token", short(flops_per_token(config)), "forward and backward"],
        ["Experts", *_expert_words(config)],
    ]
    if newest.get("routed_seen"):
        share = newest["dropped_seen"] / newest["routed_seen"]
        facts += [["Dropped", f"{share:.2%}", "of all assignments so far"]]
    if goodput is not None:
        facts += [["Goodput", f"{goodput:.1%}", "of the time went into steps that were kept"]]
    return [*facts, ["Data", *_data_words(config)]]


def _expert_words(config: Config) -> tuple[str, str]:
    stacks = config.moe_stacks()
    if not stacks:
        return "none", "a dense model"
    sizes = sorted({own.moe.choices for _, own in stacks})
    each = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    shared = f", {config.moe.shared_experts} shared" if config.moe.shared_experts else ""
    taken = f"router {config.moe.router}, top {config.moe.top_k}{shared}"
    return f"{config.num_moe_layers} x {each}", f"layers x experts; {taken}"


def _data_words(config: Config) -> tuple[str, str]:
    data = config.data
    name = data.source if data.path is None else Path(data.path).name
    tokens = "bytes" if data.tokenizer == "bytes" else Path(data.tokenizer).name
    return name, f"tokenizer {tokens}, sequences of {data.sequence_length:,}"


def short(number: float) -> str:
    """Returns a number with three digits: 3.42 M."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if float(f"{number:.3g}") >= size:  # 999,999 is 1 M
            return f"{number / size:.3g} {letter}"
    return f"{number:.3g}"


def _config_rows(config: Config) -> list[list[str]]:
    defaults = {name: key.default for name, key in keys().items()}
    different = value_difference(defaults, config_values(config))
    return [[name, str(ours), str(default)] for name, default, ours in different]


def _domain_rows(record: dict[str, Any]) -> list[list[Any]]:
    return [
        [name, row.get("loss"), row.get("bits_per_byte"), row.get("tokens")]
        for name, row in (record.get("domains") or {}).items()
    ]


def _events(workdir: Path) -> dict[str, Any]:
    events = read_events(workdir)
    rows = [
        [
            str(event.get("time", "")),
            event.get("step") if isinstance(event.get("step"), int) else None,
            str(event.get("kind", "")),
            ", ".join(
                f"{name} {value}"
                for name, value in event.items()
                if name not in ("time", "step", "kind")
            ),
        ]
        for event in events
        if isinstance(event, dict)
    ]
    return {"rows": rows[-EVENTS_SHOWN:], "number": len(rows), "kinds": EVENT_KINDS}


# The atlas


def _against(
    name: str, steps: tuple[int, int], tokens: int, layers_l: np.ndarray, found: Agreement
) -> dict[str, Any]:
    """Returns how alike this run and another route, by layer."""
    shares = agreement_json(steps, tokens, layers_l, found)
    return {"name": name} | {key: value for key, value in shares.items() if key != "names"}


def atlas_data(atlas: Atlas) -> dict[str, Any]:
    """Returns what the page shows of an atlas."""
    counts_le = atlas.load_dle.sum(axis=0)
    domain_d = atlas.load_dle[:, 0].sum(axis=-1)
    share_d = domain_d[domain_d > 0] / max(domain_d.sum(), 1)
    token_lew = np.searchsorted(atlas.text_ids_n, atlas.top_token_lew)
    return {
        "step": atlas.step,
        "tokens": atlas.tokens,
        "layers": atlas.layers_l.tolist(),
        "experts": atlas.experts_l.tolist(),
        "domains": list(atlas.domains),
        "domain_entropy": float(-(share_d * np.log(share_d)).sum()),
        "load": packed(counts_le),
        "load_by_domain": packed(atlas.load_dle),
        "load_by_part": packed(atlas.load_ple),
        "pairs": quantised(pair_lift(atlas.coactivation_lee), -OCTAVES, OCTAVES),
        "information": packed(atlas.information_l),
        "norm": packed(atlas.norm_le),
        "removed": packed(atlas.removed_le),
        "removed_own": packed(atlas.removed_own_le),
        "removed_other": packed(atlas.removed_other_le),
        "top_token": packed(np.where(atlas.top_token_lew < 0, -1, token_lew)),
        "top_lift": _fitted(atlas.top_lift_lew),
        "top_count": packed(atlas.top_count_lew),
        "texts": packed_json(atlas.top_text),
        "snippets": packed_json([tuple(snippet) for snippet in atlas.snippets]),
        "saturation_steps": atlas.saturation_steps.tolist(),
        "saturation": packed(np.asarray(atlas.saturation_sl)),
        "views": [_view(view) for view in atlas.views],
        "notes": list(atlas.notes),
    }


def pair_lift(coactivation_lee: np.ndarray) -> np.ndarray:
    """Returns log2 of how many times over chance two experts are chosen together.

    Chance spreads a layer's pairs in proportion to the product of the two experts' counts.

    Args:
        coactivation_lee: [L, E, E] tokens that took both; the diagonal is an expert's own count.

    Returns:
        float [L, E * (E - 1) / 2], pairs i < j row by row; -inf for a pair that never met, NaN
        where chance expects none.
    """
    upper = np.triu_indices(coactivation_lee.shape[-1], 1)
    lifts = []
    for seen_ee in coactivation_lee.astype(np.float64):
        count_e = seen_ee.diagonal()
        pairs = seen_ee[upper]
        expected = count_e[upper[0]] * count_e[upper[1]]
        expected *= pairs.sum() / max(expected.sum(), 1.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            lifts.append(np.where(expected > 0, np.log2(pairs / expected), np.nan))
    return np.stack(lifts)


def _view(view: TokenView) -> dict[str, Any]:
    return {
        "name": view.name,
        "tokens": packed_json(view.tokens),
        "expert": packed(view.expert_ltk),
        "weight": _fitted(view.weight_ltk),
        "loss": packed(view.loss_t),
    }


def _fitted(array: np.ndarray) -> dict[str, Any]:
    """Returns an array in 65,535 steps over its own range."""
    known = array[np.isfinite(array)]
    low, high = (float(np.min(known)), float(np.max(known))) if len(known) else (0.0, 0.0)
    return quantised(array, low, high, levels=65535)
