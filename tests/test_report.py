"""The report: what is gathered, what is said where something is missing, and the page in a browser.

The browser is the machine's Chromium, without which these tests are skipped.
"""

import base64
import dataclasses
import errno
import hashlib
import json
import re
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from moejax.atlas import load_atlas, save_atlas
from moejax.cli import main
from moejax.config import Config, ConfigError
from moejax.errors import NoSpaceError
from moejax.overrides import apply_overrides, load_config
from moejax.report import (
    Looks,
    means_of_runs,
    pair_lift,
    report_data,
    report_workdir,
    short,
    wants_atlas,
    write_report,
)
from moejax.report_page import packed, packed_json, quantised, render
from moejax.store import Store, start_run
from moejax.tallies import Agreement
from moejax.workdir import CHECKPOINTS, COMMITTED, atlas_file, open_workdir

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium")
EVIL = '</script><img src=x onerror="document.title=1">'
DOMAINS = {f"{EVIL} {name}": f"{EVIL.replace(' ', '')} two" for name in ("a", "b")}


@pytest.fixture(scope="module")
def made_up():
    """The benchmark's module, which makes runs and atlases up."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import report_page

    yield report_page
    sys.path.remove(str(ROOT / "benchmarks"))
    sys.modules.pop("report_page")


def unpacked(entry: dict) -> np.ndarray:
    """What the page does with a packed array."""
    raw = zlib.decompress(base64.b64decode(entry["data"]))
    code = np.frombuffer(raw, f"<{entry['dtype']}").reshape(entry["shape"])
    if "levels" not in entry:
        return code
    step = (entry["high"] - entry["low"]) / (entry["levels"] - 1)
    return np.where(code == 0, np.nan, entry["low"] + (code.astype(float) - 1) * step)


# What is gathered


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([0, 255], "u1"), ([0, 256], "u2"), ([-1, 3], "i2"), ([70_000, 0], "u4"), ([0.5, 2], "f4")],
)
def test_an_array_is_packed_narrowly_and_comes_back(values, dtype):
    entry = packed(np.array(values))
    assert entry["dtype"] == dtype
    np.testing.assert_array_equal(unpacked(entry), values)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (999_499, "999 k"), (999_999, "1 M"), (3_419_520, "3.42 M")],
)
def test_numbers_have_three_digits(number, text):
    assert short(number) == text


def test_what_does_not_fit_32_bits_is_refused():
    with pytest.raises(OverflowError, match="more than 32 bits"):
        packed(np.array([2**40]))


def test_quantising_errs_by_half_a_step_and_keeps_nan():
    values = np.array([-9.0, -4.0, 0.1, 3.99, 9.0, np.nan, -np.inf])
    back = unpacked(quantised(values, -4, 4))
    expected = np.array([-4.0, -4.0, 0.1, 3.99, 4.0, np.nan, -4.0])
    assert np.nanmax(np.abs(back - expected)) <= 4 / 254
    assert list(np.isnan(back)) == [False] * 5 + [True, False]


def test_means_are_of_what_is_finite():
    values = np.array([1.0, 3.0, np.nan, 5.0, np.nan, np.inf])
    np.testing.assert_array_equal(means_of_runs(values, 3), [2.0, 5.0, np.nan])
    np.testing.assert_array_equal(means_of_runs(values[:2], 3), [1.0, 3.0])


def test_pairs_over_chance_by_hand():
    """Counts 2, 2, 4. Chance gives the 4 pairs as 2*2 : 2*4 : 2*4, so 0.8, 1.6 and 1.6."""
    table_lee = np.array([[[2, 0, 2], [0, 2, 2], [2, 2, 4]]])
    np.testing.assert_allclose(2 ** pair_lift(table_lee), [[0.0, 1.25, 1.25]])
    alone_lee = np.array([np.diag([3, 1, 0])])
    assert np.isnan(pair_lift(alone_lee)).all()  # k = 1: nobody meets


def test_the_numbers_of_a_run_reach_the_page(made_up, tmp_path):
    made_up.synthetic_run(tmp_path / "run", 3, 8, 40)
    data = report_data(tmp_path / "run", made_up.synthetic_atlas(3, 8))
    assert data["experts"] == [8, 8, 8]
    assert data["records"] == 40
    load = unpacked(data["load"]["log2"])
    assert load.shape == (40, 3, 8)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    first = np.array(json.loads(lines[0])["expert_load"]) * 8
    np.testing.assert_allclose(load[0], np.clip(np.log2(first), -4, 4), atol=4 / 254)
    assert [row[0] for row in data["domains"]] == list(made_up.WORDS)
    assert data["time"]["rows"][0][:2] == ["productive", 412_000.0]
    assert data["events"]["number"] == 12
    assert ["moe.top_k", "4", "2"] in data["config"]
    atlas = data["atlas"]
    assert unpacked(atlas["load_by_domain"]).shape == (6, 3, 8)
    np.testing.assert_array_equal(unpacked(atlas["load"]), unpacked(atlas["load_by_domain"]).sum(0))


def test_long_runs_are_means_so_that_the_file_stays_small(made_up, tmp_path):
    made_up.synthetic_run(tmp_path / "run", 2, 4, 700)
    data = report_data(tmp_path / "run", None)
    assert data["records"] == 700
    assert data["train"]["loss"]["shape"] == [600]
    assert data["load"]["log2"]["shape"] == [600, 2, 4]


# What is said


@pytest.mark.parametrize(
    ("words", "arguments", "reason"),
    [
        ([], [], "the run has no finished checkpoint yet"),
        ([], ["--no_atlas"], "left out, as --no_atlas asks"),
        (["moe.every=None"], [], "the model is dense"),
    ],
)
def test_a_run_without_records_or_checkpoints_says_so(tmp_path, capsys, words, arguments, reason):
    workdir = open_workdir(tmp_path / "run", apply_overrides(Config(), words))
    assert main(["report", "--workdir", str(workdir), *arguments]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {workdir / 'report.html'}, 0.")
    data = page_data((workdir / "report.html").read_text())
    assert data["atlas"] is None
    assert reason in data["missing"]
    assert data["load"] is None


def test_the_newest_atlas_is_shown(made_up, tmp_path):
    workdir = open_workdir(tmp_path / "run", made_up.synthetic_config(2, 4))
    for step in (9, 100, 30):
        atlas = dataclasses.replace(made_up.synthetic_atlas(2, 4), step=step)
        save_atlas(atlas, atlas_file(workdir, step))
    output = tmp_path / "page.html"
    assert main(["report", "--workdir", str(workdir), "--output", str(output)]) == 0
    assert page_data(output.read_text())["atlas"]["step"] == 100


def test_an_atlas_is_that_of_its_checkpoint_and_not_of_its_step(made_up, tmp_path):
    """After a rollback, and after training anew, the same steps are other models."""
    config = made_up.synthetic_config(2, 4)
    workdir = open_workdir(tmp_path / "run", config)

    def checkpoint(step: int, content: bytes) -> dict:
        """Writes one, and returns what binds an atlas to it."""
        store = Store(workdir / CHECKPOINTS, start_run(workdir))
        if store.folder(step).exists():
            store.delete(step)
        (store.begin(step) / "model").mkdir(parents=True)
        (store.folder(step) / "model" / "data").write_bytes(content)
        (store.folder(step) / COMMITTED).write_text("")
        manifest = store.seal(step, {}, {}, {})
        return {"step": step, "run": manifest.run, "checkpoint": manifest.digest}

    def make_atlas(of: dict) -> None:
        atlas = dataclasses.replace(made_up.synthetic_atlas(2, 4), **of)
        save_atlas(atlas, atlas_file(workdir, of["step"]))

    def shown() -> tuple[int | None, str]:
        report_workdir(workdir, None, with_atlas=True)
        data = page_data((workdir / "report.html").read_text())
        return data["atlas"] and data["atlas"]["step"], data["missing"]

    make_atlas(first := checkpoint(10, b"first"))
    assert not wants_atlas(workdir, config)
    assert shown() == (10, "")
    make_atlas({**first, "step": 30})  # of a step that a rollback took away
    assert shown() == (10, "")
    second = checkpoint(10, b"other")
    assert wants_atlas(workdir, config), "the run went back and came to this step again"
    step, missing = shown()
    assert step is None
    assert "that of step 30 is of a checkpoint that the run has not" in missing
    make_atlas(second)
    checkpoint(20, b"later")
    assert wants_atlas(workdir, config)
    assert shown() == (10, ""), "the last one that there is"
    Store(workdir / CHECKPOINTS, start_run(workdir)).delete(10)
    assert shown() == (10, ""), "its checkpoint was not kept"
    (workdir / "run.json").write_text(json.dumps({"run": 16 * "0"}))
    assert shown()[0] is None, "another run trained here since"
    atlas_file(workdir, 20).write_bytes(b"damaged")
    assert wants_atlas(workdir, config)


def test_what_was_asked_for_stands_next_to_the_atlas(made_up, tmp_path):
    """A text that was given comes before those of the data."""
    workdir = open_workdir(tmp_path / "run", made_up.synthetic_config(3, 16))
    atlas = made_up.synthetic_atlas(3, 16)
    save_atlas(atlas, atlas_file(workdir, 9))
    given = dataclasses.replace(atlas.views[0], name="mine")
    report_workdir(workdir, None, Looks((given,), (EVIL, *ALIKE)), with_atlas=True)
    data = page_data((workdir / "report.html").read_text())
    assert [view["name"] for view in data["atlas"]["views"]] == [
        "mine",
        *(view.name for view in atlas.views),
    ]
    assert data["against"]["name"] == EVIL
    assert data["against"]["renamed"] == pytest.approx([0.9, 0.8, 0.7])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--no_atlas", "--text", "a"], "shown next to single experts, which --no_atlas leaves"),
        (["--no_atlas", "--against", "."], "shown next to single experts, which --no_atlas leaves"),
        (["--text", "caf\udce9"], r"--text: 'caf\udce9' is not UTF-8; convert it"),
        (["--against", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(words, message, tmp_path, capsys):
    workdir = open_workdir(tmp_path / "run", Config())
    assert main(["report", "--workdir", str(workdir), *words]) == 2
    assert message in capsys.readouterr().err


def test_no_workdir_and_no_place_to_write_are_errors(tmp_path, capsys):
    assert main(["report", "--workdir", str(tmp_path)]) == 2
    assert "give a workdir that `moejax train` wrote" in capsys.readouterr().err
    arguments = ["--workdir", str(tmp_path), "--output", str(tmp_path / "no" / "page.html")]
    assert main(["report", *arguments]) == 2
    assert "give a file in an existing folder" in capsys.readouterr().err


def test_a_damaged_atlas_is_an_error_with_its_remedy(tmp_path):
    workdir = open_workdir(tmp_path / "run", Config())
    (workdir / "atlas").mkdir()
    (workdir / "atlas" / "5.npz").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"5\.npz is not an atlas .*`moejax inspect.* --no_atlas"):
        report_workdir(workdir, None, with_atlas=True)


def test_an_atlas_without_room_has_the_exit_code_of_it(made_up, tmp_path, monkeypatch):
    def full(*rest, **arrays):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("moejax.atlas.np.savez_compressed", full)
    with pytest.raises(NoSpaceError, match=r"5\.npz cannot be written: No space .*; give the work"):
        save_atlas(made_up.synthetic_atlas(2, 4), tmp_path / "atlas" / "5.npz")
    assert not list((tmp_path / "atlas").iterdir())


def test_a_page_without_room_has_the_exit_code_of_it(tmp_path, monkeypatch):
    def full(file, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    workdir = open_workdir(tmp_path / "run", Config())
    monkeypatch.setattr("moejax.report.write_atomically", full)
    with pytest.raises(NoSpaceError, match=r"report\.html cannot be written: No space .* --output"):
        report_workdir(workdir, None, with_atlas=False)


def page_data(page: str) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)


def test_texts_cannot_leave_the_data(tmp_path):
    page = render({"name": EVIL, "texts": packed_json([EVIL]), "other": "<!-- SCRIPTS -->"})
    assert EVIL not in page
    assert "<img" not in page
    assert page_data(page)["name"] == EVIL


def test_the_policy_allows_what_is_ours_and_no_connection():
    page = render({})
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)"', page)
    parts = re.findall(r"<style>(.*?)</style>|<script>(.*?)</script>", page, re.S)
    for style, script in parts:
        digest = hashlib.sha256((style or script).encode()).digest()
        assert f"'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert len(parts) == 3
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)


# The page in a browser

ALIKE = (
    *((12, 9), 65_536, np.arange(3)),
    Agreement(*np.array([[0.4, 0.3, 0.2], [0.25] * 3, [0.9, 0.8, 0.7]]), np.zeros((3, 16), int)),
)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH; apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install 'moejax[test]'")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Returns `(file, **context) -> page`; complaints and requests of any page fail the test."""
    heard, contexts = [], []

    def open_file(file: Path, **context):
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}, **context))
        page = contexts[-1].new_page()
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: heard.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        assert heard.pop(0) == file.as_uri()
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert heard == []


@pytest.fixture(scope="module")
def wide(made_up, tmp_path_factory):
    """The page of a made-up run of 48 layers and 256 experts."""
    folder = tmp_path_factory.mktemp("wide")
    made_up.synthetic_run(folder / "synthetic", 48, 256, 24)
    write_report(folder / "synthetic", folder / "page.html", made_up.synthetic_atlas(48, 256))
    return folder / "page.html"


@pytest.fixture(scope="module")
def small(made_up, tmp_path_factory):
    """The page of a small run whose every text would like to be markup."""
    folder = tmp_path_factory.mktemp("small")
    workdir = folder / EVIL.replace("/", "-")
    made_up.synthetic_run(workdir, 3, 16, 12)
    atlas = made_up.synthetic_atlas(3, 16, domains=DOMAINS)
    view = atlas.views[0]
    view = dataclasses.replace(view, name=EVIL, tokens=(EVIL, "\u202e", *view.tokens[2:]))
    atlas = dataclasses.replace(atlas, views=(view, *atlas.views), notes=(EVIL,))
    against = Looks(against=(EVIL, *ALIKE))
    write_report(workdir, folder / "page.html", atlas, looks=against)
    return folder / "page.html"


def chosen(page) -> list[int]:
    return page.evaluate("[state.layer, state.expert]")


def settle(page) -> None:
    """Waits until what was chosen is drawn, which is in the next frame."""
    page.evaluate("() => new Promise((d) => requestAnimationFrame(() => requestAnimationFrame(d)))")


def test_a_wide_run_opens_small_and_whole(wide, open_page):
    assert wide.stat().st_size < 12e6
    page = open_page(wide)
    assert page.locator(".missing").count() == 0
    assert page.locator("canvas").count() >= 5
    title = page.locator("#expert-card h3")
    page.select_option("#choose-layer", "20")
    page.select_option("#choose-expert", "100")
    settle(page)
    assert title.inner_text() == "Layer 20, expert 100"


def test_a_click_and_the_keyboard_choose(small, open_page):
    page = open_page(small)
    map_of_all = page.locator('[aria-label^="All layers"]')
    canvas = map_of_all.locator("canvas")
    canvas.click(position={"x": canvas.bounding_box()["width"] * 0.55, "y": 20})
    layer, expert = chosen(page)
    assert layer == 0
    assert 6 <= expert <= 9
    map_of_all.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert chosen(page) == [1, expert + 1]
    settle(page)
    assert f"layer 1, expert {expert + 1}:" in map_of_all.locator("+ output").inner_text()
    page.get_by_label("Next layer").click()
    assert chosen(page) == [2, expert + 1]
    page.locator("#choose-time").focus()
    page.keyboard.press("Home")
    assert page.evaluate("state.time") == 0
    chart = page.locator('svg[aria-label^="Loss."]')
    chart.focus()
    page.keyboard.press("End")
    assert "step 20,000: training" in page.locator("#loss output").first.inner_text()


def test_everything_is_reached_by_the_tab_key_with_a_focus_to_see(small, open_page):
    page = open_page(small)
    reached = set()
    for _ in range(165):
        page.keyboard.press("Tab")
        place, width = page.evaluate(
            """() => { const e = document.activeElement;
            return [e.id || e.getAttribute("aria-label") || e.textContent,
                    parseFloat(getComputedStyle(e).outlineWidth)]; }"""
        )
        reached.add(place)
        assert width >= 1, place
    assert {"choose-layer", "choose-expert", "theme", "choose-time", "choose-measure"} <= reached
    assert {"choose-view", "choose-choice", "choose-token-layer", "Next layer"} <= reached
    assert sum("Arrow keys" in place for place in reached) >= 10


def test_tokens_tell_their_experts_on_hover_and_on_focus(small, open_page, made_up):
    page = open_page(small)
    card = page.locator("#token-card")
    view = made_up.synthetic_atlas(3, 16, domains=DOMAINS).views[0]
    page.locator('[data-token="5"]').hover()
    assert f"Token 6 of {len(view.tokens)}" in card.inner_text()
    page.locator('[data-token="5"]').focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    settle(page)
    text = card.inner_text()
    assert "Token 7 of" in text
    assert f"expert {view.expert_ltk[1, 6, 0]}" in text
    assert f"{view.weight_ltk[1, 6, 0]:.3f}" in text


def test_texts_of_data_stay_texts(small, open_page):
    page = open_page(small)
    assert page.title().startswith("<-script><img")
    assert page.locator("img").count() == 0
    tokens = page.locator("#expert-card code").all_inner_texts()
    assert any(text.startswith("␣</script><img") for text in tokens)
    assert EVIL in page.locator("#experts .bars .name").all_inner_texts()[-1]
    assert "\\u202e" in page.locator('[data-token="1"]').inner_text()


def test_routing_of_two_runs_is_shown_with_what_chance_gives(small, open_page):
    page = open_page(small)
    chart = page.locator('svg[aria-label^="Routing here and in"]')
    chart.focus()
    page.keyboard.press("Home")
    figure = page.locator("figure").filter(has=chart)
    read = figure.locator("output").inner_text()
    assert read == (
        "layer 0: experts renamed one to one, as is best 90.0% · the same number 40.0% · "
        "by chance 25.0%"
    )
    assert "(step 9) that this model (step 12) makes too, of 65,536 tokens" in figure.inner_text()


def test_each_picture_has_its_table(small, open_page):
    page = open_page(small)
    pictures = page.locator("figure:has(canvas), figure:has(svg)")
    assert pictures.count() >= 14
    for index in range(pictures.count()):
        details = pictures.nth(index).locator("details")
        details.locator("summary").click()
        details.locator("tbody tr").first.wait_for(timeout=5_000)


CONTRASTS = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => c.slice(0, 3).map((x) => x / 255)
    .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.body.querySelectorAll("*")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !e.getClientRects().length || /SCRIPT|OPTION/.test(e.tagName)) continue;
    const style = getComputedStyle(e);
    const ink = light(rgb(e instanceof SVGElement ? style.fill : style.color));
    const page = light(behind(e));
    const ratio = (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05);
    found.push([ratio, e.tagName + " " + e.getAttribute("class") + ": " + e.textContent]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough_in_both_themes(small, open_page, scheme):
    page = open_page(small, color_scheme=scheme)
    page.locator("#config summary").click()
    found = page.evaluate(CONTRASTS)
    assert len(found) > 150
    assert min(found)[0] >= 4.5, min(found)
    ink = page.evaluate("colour('ink')[0]")
    assert (ink > 128) == (scheme == "dark")
    page.locator("#theme").click()  # from auto to light
    assert page.evaluate("colour('ink')[0]") < 128


# Real


@pytest.mark.slow
def test_a_run_really_trained(tmp_path, open_page):
    """A quickstart of two small layers; the page makes the atlas of its last checkpoint."""
    from moejax.loop import train

    words = ["model.num_layers=2", "model.d_model=16", "model.num_heads=2", "model.head_dim=8"]
    words += ["model.num_kv_heads=1", "moe.num_experts=8", "moe.expert_hidden=16"]
    words += ["data.sequence_length=32", "train.batch_size=8", "train.steps=6", "logging.every=1"]
    words += ["eval.every=3", "eval.batches=2", "checkpoint.every=3", "mesh.expert=8"]
    config = load_config(str(ROOT / "configs/quickstart.py"), words)
    workdir = open_workdir(tmp_path / "tiny", config)
    assert train(config, workdir) == 0
    assert main(["report", "--workdir", str(workdir), "--no_atlas"]) == 0
    page = open_page(workdir / "report.html")
    assert "--no_atlas" in page.locator("#experts .missing").inner_text()
    assert main(["report", "--workdir", str(workdir)]) == 0
    atlas = load_atlas(atlas_file(workdir, 6))
    page = open_page(workdir / "report.html")
    assert page.title() == "tiny · moejax report"
    assert page.locator("#facts").inner_text().count("2 x 8") == 1
    assert page.locator("#experts .missing").count() == 0
    assert "checkpoint saved" in page.locator("#time").inner_text()
    words = ["--text", "In the beginning", "--against", str(workdir)]
    assert main(["report", "--workdir", str(workdir), *words]) == 0
    page = open_page(workdir / "report.html")
    assert page.locator("#choose-view option").first.inner_text() == "In the beginning"
    shares = page.evaluate("[data.against.same, data.against.renamed]")
    assert shares == [[1, 1], [1, 1]]
    taken = int(atlas.load_dle[:, 0, 0].sum())
    assert f"{taken:,}" in page.locator("#experts").inner_text()
