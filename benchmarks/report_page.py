"""How large the report of a wide model is and how fast it opens: a made-up run, a real browser.

    python benchmarks/report_page.py --layers 48 --experts 256 [--picture docs/report_wide.png]

Nothing is trained: records, events and atlas are drawn at random, with a structure to look at
(experts that prefer a domain, more so in later layers; groups of experts chosen together; loads
that balance; a few dead experts). Needs Chromium.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from moejax.atlas import PARTS, TOP, Atlas, Snippet, TokenView
from moejax.config import Config
from moejax.ledger import KINDS
from moejax.metrics import encode_record
from moejax.overrides import build_config, config_to_json
from moejax.records import layer_summary
from moejax.report import write_report
from moejax.workdir import CONFIG, METRICS

WORDS = {
    "english": "the and of shall unto people water king morning house river light bread voice",
    "spanish": "que los para pueblo agua rey mañana casa río luz pan voz tierra cielo",
    "german": "und der nicht Volk Wasser König Morgen Haus Fluss Licht Brot Stimme Erde",
    "python": "def return self import class yield lambda raise with async None True dict",
    "c++": "std :: template const auto void int & * -> nullptr struct vector <>",
    "mathematics": "theorem proof lemma let such that \\in \\forall ring integer prime sum",
}
TEXT = (
    "The river was high in the morning, and the people of the house went down to look at it. "
    "def level(days): return sum(day.rain for day in days if day.rain is not None) "
    "El agua no baja hasta que pasa la luna, dijo el viejo, y se fue a su casa por el pan. "
    "Let n be a prime such that n divides the sum of two squares; then n is not 3 modulo 4. "
)


def synthetic_config(layers: int, experts: int) -> Config:
    """Returns a config of this many MoE layers and experts."""
    values = {"model.num_layers": layers, "model.d_model": 2048, "moe.num_experts": experts}
    values |= {"moe.top_k": 4, "moe.expert_hidden": 768, "moe.router": "sigmoid_bias"}
    values |= {"data.sequence_length": 4096, "train.batch_size": 256, "train.steps": 20_000}
    return build_config(values)


def synthetic_run(workdir: Path, layers: int, experts: int, records: int) -> None:
    """Writes config, records, events and ledger of a run that never was."""
    rng = np.random.default_rng(0)
    config = synthetic_config(layers, experts)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / CONFIG).write_text(config_to_json(config))
    drift_le = rng.normal(0, 1.2, (layers, experts))
    lines, seen, routed, dropped = [], 0, 0, 0
    for i in range(records):
        done = (i + 1) / records
        drift_le += rng.normal(0, 0.05, drift_le.shape)
        load_le = np.exp(drift_le * (0.15 + 0.85 * np.exp(-6 * done)))
        load_le[layers // 3, 5:8] *= max(0.0, 0.5 - done)
        summary = layer_summary(load_le)
        summary["expert_load"] = [[round(x, 6) for x in row] for row in summary["expert_load"]]
        step = int(config.train.steps * done)
        seen, drops = step * 1_048_576, 0.06 * np.exp(-5 * done)
        routed, dropped = 4 * seen * layers, dropped + int(drops * seen / 10)
        common = {"step": step, "tokens_seen": seen, "routed_seen": routed, "dropped_seen": dropped}
        loss = 1.9 + 6.5 / (1 + 60 * done) ** 0.75
        lines.append(
            common
            | {"split": "train", "loss": loss + rng.normal(0, 0.02), "drop_fraction": drops}
            | {"grad_norm": 0.4 + 3 * np.exp(-9 * done) + rng.gamma(2, 0.03)}
            | {"learning_rate": 3e-4 * min(1.0, done * 20) * (1 - 0.9 * done)}
            | {"tokens_per_second": 1.9e6 + rng.normal(0, 2e4)}
            | {"router_entropy": (4.9 - 2.1 * done * rng.uniform(0.9, 1.1, layers)).tolist()}
            | summary
        )
        if (i + 1) % max(1, records // 10) == 0:
            by_domain = {
                name: {
                    "loss": loss + shift,
                    "bits_per_byte": (loss + shift) / 2.9,
                    "tokens": 65_536,
                }
                for name, shift in zip(WORDS, (0.1, 0.2, 0.3, -0.4, -0.3, 0.1), strict=True)
            }
            fields = {"split": "eval", "loss": loss + 0.03, "bits_per_byte": loss / 2.9}
            lines.append(common | fields | {"domains": by_domain})
    text = "".join(encode_record(line) + "\n" for line in lines)
    (workdir / METRICS).write_text(text)
    _write_history(workdir)


def _write_history(workdir: Path) -> None:
    day = "2026-11-{:02d}T06:00:00.000+00:00"
    events = [("checkpoint_saved", 2_000 * i, {"bytes": 61_300_000_000}) for i in range(1, 11)]
    events += [("restart", 9_000, {"code": 69, "failures": 1, "wait_seconds": 2.0})]
    events += [("spike", 11_240, {"quantity": "grad_norm", "value": 7.25, "limit": 3.5})]
    rows = [
        {"time": day.format(2 + step // 2_000), "step": step, "kind": kind, **fields}
        for kind, step, fields in sorted(events, key=lambda event: event[1])
    ]
    (workdir / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seconds = (412_000.0, 9_100.0, 640.0, 2_300.0, 3_900.0, 7_700.0, 410.0, 95.0, 60.0)
    entry = {"time": 1.8e9, "session": "made-up", "step": 20_000, "done": True}
    entry["seconds"] = dict(zip(KINDS, seconds, strict=True))
    (workdir / "ledger.jsonl").write_text(json.dumps(entry) + "\n")


def synthetic_atlas(layers: int, experts: int, *, domains: dict[str, str] = WORDS) -> Atlas:
    """Returns an atlas of experts that prefer a domain each, more so in later layers.

    Args:
        layers, experts: L and E.
        domains: words by name of the domain.
    """
    rng = np.random.default_rng(1)
    words = [word for text in domains.values() for word in text.split()]
    home_le = rng.integers(0, len(domains), (layers, experts))
    depth_l11 = np.linspace(0.2, 1.0, layers)[:, None, None]
    is_home_led = home_le[..., None] == np.arange(len(domains))
    weight_led = 1 + 9 * depth_l11 * is_home_led * rng.gamma(2, 0.5, is_home_led.shape)
    weight_led *= rng.lognormal(0, 0.25, (layers, experts, 1))
    weight_led[layers // 3, 5:8] *= 1e-3
    tokens, k = 1_000_000, 4
    share_led = weight_led / weight_led.sum(axis=(1, 2), keepdims=True)
    load_dle = np.rint(tokens * k * share_led).astype(np.int64).transpose(2, 0, 1)
    count_le = load_dle.sum(axis=0)
    slope_le = rng.normal(0, 0.5, (layers, experts))
    tenth_ple = np.exp(np.linspace(-1, 1, PARTS)[:, None, None] * slope_le)
    removed_le = rng.gamma(1.5, 2e-4, (layers, experts)) * count_le / count_le.mean()
    measured_le = np.arange(experts) < max(8, experts // 2) + np.zeros((layers, 1), bool)
    token_lew, lift_lew = _top_tokens(rng, domains, home_le)
    information_l = 0.02 + 0.5 * np.linspace(0, 1, layers) ** 1.5
    steps_s = np.arange(2_000, 20_000, 2_000)
    grown_s1 = 1 - np.exp(-steps_s / 6_000)[:, None]
    return Atlas(
        step=20_000,
        layers_l=np.arange(layers),
        experts_l=np.full(layers, experts),
        domains=tuple(domains),
        tokens=tokens,
        load_dle=load_dle,
        load_ple=np.rint(count_le * tenth_ple / tenth_ple.sum(axis=0)).astype(np.int64),
        coactivation_lee=_together(rng, count_le, home_le, k),
        information_l=information_l * rng.uniform(0.9, 1.1, layers),
        norm_le=rng.gamma(6, 0.08, (layers, experts)).astype(np.float32),
        removed_le=np.where(measured_le, removed_le, np.nan),
        removed_own_le=np.where(measured_le, 30 * removed_le, np.nan),
        removed_other_le=np.where(measured_le, 0.02 * removed_le, np.nan),
        top_token_lew=token_lew,
        top_lift_lew=lift_lew,
        top_count_lew=rng.integers(5, 4_000, token_lew.shape),
        text_ids_n=np.arange(len(words)),
        top_text=tuple(f" {word}" for word in words),
        snippets=_snippets(rng, words, token_lew),
        saturation_steps=steps_s,
        saturation_sl=(grown_s1 * rng.uniform(0.86, 1.0, layers)).astype(np.float32),
        views=(_text_view(rng, "four languages", layers, experts, k),),
        notes=() if measured_le.all() else ("Removal was measured for half of the experts.",),
    )


def _top_tokens(rng, domains: dict[str, str], home_le: np.ndarray):
    sizes = [len(text.split()) for text in domains.values()]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    shape = (*home_le.shape, TOP)
    order = np.argsort(rng.random((*home_le.shape, min(sizes))), axis=-1)[..., :TOP]
    token_lew = np.full(shape, -1)
    token_lew[..., : order.shape[-1]] = starts[home_le][..., None] + order
    return token_lew, -np.sort(-(1 + rng.gamma(2, 6, shape)), axis=-1)


def _together(rng, count_le: np.ndarray, home_le: np.ndarray, k: int) -> np.ndarray:
    tables = []
    for count_e, home_e in zip(count_le, home_le, strict=True):
        outer_ee = np.outer(count_e, count_e) * rng.lognormal(0, 0.6, (len(count_e),) * 2)
        outer_ee *= np.where(home_e[:, None] == home_e, 4.0, 1.0)
        outer_ee = np.triu(outer_ee, 1)
        outer_ee *= count_e.sum() * (k - 1) / 2 / max(outer_ee.sum(), 1)
        tables.append(np.rint(outer_ee + outer_ee.T + np.diag(count_e)).astype(np.int64))
    return np.stack(tables)


def _snippets(rng, words: list[str], token_lew: np.ndarray) -> tuple[Snippet, ...]:
    found = []
    for layer, expert in np.ndindex(*token_lew.shape[:2]):
        for token in token_lew[layer, expert, :3]:
            around = rng.integers(0, len(words), 12)
            before, after = (" ".join(words[i] for i in half) for half in np.split(around, 2))
            word = words[token]
            start = len(before) + 1
            text = f"{before} {word} {after}"
            found.append(Snippet(layer, expert, text, start, start + len(word)))
    return tuple(found)


def _text_view(rng, name: str, layers: int, experts: int, k: int) -> TokenView:
    words = [word if i == 0 else f" {word}" for i, word in enumerate(TEXT.split())]
    kind = np.array([hash_of(word) for word in words])
    centre_lt = (kind * (np.arange(layers)[:, None] * 7 + 3)) % experts
    expert_ltk = (centre_lt[..., None] + np.arange(k) * 17) % experts
    expert_ltk = np.where(rng.random(expert_ltk.shape) < 0.01, -1, expert_ltk)
    weight_ltk = -np.sort(-rng.dirichlet(np.ones(k) * 1.5, (layers, len(words))), axis=-1)
    loss_t = np.concatenate([[np.nan], rng.gamma(2, 1.2, len(words) - 1)])
    weight_ltk = np.where(expert_ltk < 0, 0.0, weight_ltk)
    return TokenView(name, tuple(words), expert_ltk, weight_ltk, loss_t)


def hash_of(word: str) -> int:
    """Returns a small number that like words share: their length, and what they begin with."""
    return len(word) * 3 + ord(word.strip()[0]) % 5


def measure(page: Path, picture: Path | None) -> dict[str, float]:
    """Returns the seconds until the page is ready and of a choice, in headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = browser.new_page(
            viewport={"width": 1280, "height": 1000}, color_scheme="dark" if picture else "light"
        )
        start = time.perf_counter()
        view.goto(page.as_uri())
        view.wait_for_selector("html[data-ready]")
        opened = time.perf_counter() - start
        chosen = view.evaluate(
            """() => new Promise((done) => {
              const start = performance.now();
              choose({ layer: 20, expert: 100 });
              requestAnimationFrame(() => requestAnimationFrame(
                () => done((performance.now() - start) / 1000)));
            })"""
        )
        if picture:
            view.screenshot(path=picture, full_page=True)
        browser.close()
    return {"opened": opened, "chosen": chosen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--picture", type=Path, help="PNG of the whole page, dark")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workdir, page = Path(folder) / "synthetic", Path(folder) / "report.html"
        synthetic_run(workdir, options.layers, options.experts, options.records)
        atlas = synthetic_atlas(options.layers, options.experts)
        start = time.perf_counter()
        size = write_report(workdir, page, atlas)
        print(f"written in {time.perf_counter() - start:.1f} s, {size / 1e6:.1f} MB")
        for name, seconds in measure(page, options.picture).items():
            print(f"{name} in {seconds:.2f} s")


if __name__ == "__main__":
    main()
