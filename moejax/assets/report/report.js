// The report: what each section shows of the data, and the one choice that all pictures share.
"use strict";

const root = document.documentElement;
const state = { layer: 0, expert: 0, partner: 1, time: 0, measure: "load", before: 0,
  view: 0, choice: 0, token: 0, numbers: false };
let data;

const part = (name) => document.querySelector(`[data-part="${name}"]`);
const clamp = (value, most) => Math.min(Math.max(0, value), Math.max(0, most));
const experts = (layer = state.layer) => data.experts[layer] ?? 0;
const range = (n) => Array.from({ length: n }, (_, i) => i);

function choose(change) {
  Object.assign(state, change);
  state.layer = clamp(state.layer, data.experts.length - 1);
  state.expert = clamp(state.expert, experts() - 1);
  state.partner = clamp(state.partner, experts() - 1);
  redraw();
}

function missing(text) { return el("p", { class: "missing" }, text); }
const noAtlas = () => missing(data.experts.length ? `No atlas: ${data.missing}` : "This model is dense: it has no experts.");

// Marks what would not be seen, and what would turn a line around.
function visible(text, spaces = true) {
  const named = { "\n": "↵", "\t": "⇥", "\r": "␍", ...(spaces ? { " ": "␣" } : {}) };
  const shown = text.replace(/[\s\u0000-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g, (c) =>
    named[c] ?? (c === " " ? c : `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`));
  return shown || "∅";
}

function duration(exact) {
  if (exact < 59.95) return `${exact.toFixed(1)} s`;
  const seconds = exact < 3600 ? Math.round(exact) : 60 * Math.round(exact / 60); // no "60 s" of a minute
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  return `${Math.floor(seconds / 3600).toLocaleString("en")} h ${(seconds % 3600) / 60} min`;
}

// Header

function header() {
  document.title = `${data.name} · moejax report`;
  document.getElementById("name").textContent = data.name;
  const atlas = data.atlas ? ` · experts at step ${whole(data.atlas.step)}` : "";
  document.getElementById("made").textContent = `Written ${data.made}${atlas}`;
  document.getElementById("footer").textContent =
    `moejax ${data.version}. One file: nothing is fetched, nothing is sent. Layers are the MoE layers in order, the first being 0.`;
  document.getElementById("facts").append(...data.facts.map(([label, value, detail]) =>
    el("div", {}, el("dt", {}, label), el("dd", { class: "value" }, value), el("dd", { class: "detail" }, detail))));
  const config = document.getElementById("config");
  const number = data.config.length;
  config.querySelector("summary").textContent = `Config: ${number} ${number === 1 ? "key differs" : "keys differ"} from the defaults`;
  config.append(scrolling("Config", table("", ["Key", "Value", "Default"], data.config)));
  const all = data.parameters.reduce((sum, [, count]) => sum + count, 0);
  document.getElementById("parameters").append(scrolling("Parameters", table("", ["Kind", "Parameters", "Share"],
    data.parameters.map(([kind, count]) => [kind, count, percent(count / all)]))));
}

// The choice, and the theme

function stepper(name, label, size, text = String) {
  const select = el("select", { id: `choose-${name}`, onchange: () => choose({ [name]: Number(select.value) }) });
  const step = (by, word, sign) => el("button", { type: "button", "aria-label": `${word} ${name}`,
    onclick: () => choose({ [name]: clamp(state[name] + by, size() - 1) }) }, sign);
  drawn(() => {
    if (select.options.length !== size()) select.replaceChildren(...range(size()).map((i) => el("option", { value: i }, text(i))));
    select.value = state[name];
  });
  return el("span", { class: "stepper" }, el("label", { for: select.id }, label), step(-1, "Previous", "‹"), select, step(1, "Next", "›"));
}

function controls() {
  const box = document.getElementById("selection");
  if (data.experts.length) box.append(
    stepper("layer", "Layer", () => data.experts.length), stepper("expert", "Expert", experts));
  const themes = ["auto", "light", "dark"];
  const stored = (() => { try { return localStorage.getItem("moejax-theme"); } catch { return null; } })();
  let theme = themes.includes(stored) ? stored : "auto";
  const button = el("button", { type: "button", id: "theme", onclick: () => show(themes[(themes.indexOf(theme) + 1) % 3]) });
  const show = (name) => {
    theme = name;
    root.dataset.theme = name;
    button.textContent = `Theme: ${name}`;
    try { localStorage.setItem("moejax-theme", name); } catch { /* a file may have no storage */ }
    colours = {};
    redraw();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { colours = {}; redraw(); });
  show(theme);
  box.append(button);
}

function followNavigation() {
  const links = [...document.querySelectorAll("nav a")];
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((e) => e.isIntersecting)) {
      for (const link of links) link.setAttribute("aria-current", String(link.hash === `#${entry.target.id}`));
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  document.querySelectorAll("main > section").forEach((section) => watch.observe(section));
}

// Loss

function smooth(values) {
  const half = Math.max(2, Math.floor(values.length / 60));
  return values.map((_, i) => {
    const near = values.slice(Math.max(0, i - half), i + half + 1).filter(known);
    return near.length ? near.reduce((a, b) => a + b) / near.length : NaN;
  });
}

function losses() {
  if (!data.records && !data.evals.step.shape[0]) {
    part("losses").append(missing("No records yet: metrics.jsonl is empty or is not there."));
    return;
  }
  const train = { x: data.train.step.list(), y: data.train.loss.list() };
  const evals = data.evals.step.list();
  const many = train.x.length > 40;
  part("losses").append(curves({
    title: "Loss", note: "nats per token", xLabel: "step", format: fixed(3), tick: short, height: 320,
    series: () => [
      ...(many ? [{ ...train, name: "training", class: "c0 faint", unlisted: true }] : []),
      { x: train.x, y: many ? smooth(train.y) : train.y, name: many ? "training, smoothed" : "training", class: "c0" },
      { x: evals, y: data.evals.loss.list(), name: "validation", class: "c1" },
      { x: evals, y: data.evals.loss_at_capacity.list(), name: "validation at capacity", class: "c1 dash" },
    ],
  }));
  const others = [["grad_norm", "Gradient norm", "before clipping", short], ["learning_rate", "Learning rate", "", short],
    ["tokens_per_second", "Tokens per second", "over all devices", short]];
  part("curves").append(...others.map(([name, title, note, format]) => curves({ title, note, format, height: 170, xLabel: "step", floor: 0,
    series: () => [{ x: train.x, y: data.train[name].list(), name: title, class: "c0", unlisted: true, bare: true }] })));
  if (data.domains.length > 1) part("domains").append(figure("Loss by domain", "at the last evaluation",
    scrolling("Loss by domain", table("", ["Domain", "Nats per token", "Bits per byte", "Tokens"],
      data.domains.map(([name, loss, bits, tokens]) => [name, fixed(4)(loss), fixed(4)(bits), whole(tokens)])))));
}

// Load

const octaves = (log2) => (!known(log2) ? "no such expert" : log2 <= -4 ? "at most 1/16×" : log2 >= 4 ? "at least 16×" : times(2 ** log2));
const octaveScale = () => scaleStrip("1/8×", "8×", diverging, [-1, 1]);

function load() {
  if (!data.load) {
    part("load").append(data.experts.length ? missing("No load yet: no train record has one.") : noAtlas());
    return;
  }
  const steps = data.load.steps.list();
  const at = (time, layer, expert) => data.load.log2.at(time, layer, expert);
  const wide = data.load.log2.shape[2];
  state.time = steps.length - 1;
  const output = el("output", { for: "time" });
  const slider = el("input", { type: "range", id: "choose-time", min: 0, max: steps.length - 1, step: 1,
    oninput: () => choose({ time: Number(slider.value) }) });
  drawn(() => {
    slider.value = state.time;
    output.value = `around step ${whole(steps[state.time])}`;
    slider.setAttribute("aria-valuetext", output.value);
  });
  part("load").append(
    el("div", { class: "row" }, el("span", { class: "grow" }, el("label", { for: "choose-time" }, "Time"), slider, output)),
    heatMap({
      title: "All layers at that time", note: "load over balance", scale: octaveScale,
      rowLabel: "layer", columnLabel: "expert", height: (rows) => Math.min(440, Math.max(120, rows * 30)),
      size: () => [data.experts.length, wide],
      rgb: (r, c) => diverging(at(state.time, r, c) / 3),
      words: (r, c) => `layer ${r}, expert ${c}: ${octaves(at(state.time, r, c))}`,
      chosen: () => [state.layer, state.expert], choose: (layer, expert) => choose({ layer, expert }),
      rows: () => [`Layer ${state.layer} around step ${whole(steps[state.time])}`, ["Expert", "Load over balance"],
        range(experts()).map((e) => [String(e), octaves(at(state.time, state.layer, e))])],
    }),
    heatMap({
      title: "The chosen layer over training", note: "load over balance", scale: octaveScale,
      rowLabel: "expert", columnLabel: "step", height: (rows) => Math.min(360, Math.max(150, rows * 14)),
      size: () => [experts(), steps.length],
      rgb: (r, c) => diverging(at(c, state.layer, r) / 3), columnName: (c) => compact.format(Math.round(steps[c])),
      words: (r, c) => `layer ${state.layer}, expert ${r}, around step ${whole(steps[c])}: ${octaves(at(c, state.layer, r))}`,
      chosen: () => [state.expert, state.time], choose: (expert, time) => choose({ expert, time }),
      rows: () => [`Layer ${state.layer} over training`, ["Expert", "First", "Least", "Most", "Last"], range(experts()).map((e) => {
        const all = steps.map((_, t) => at(t, state.layer, e));
        return [String(e), ...[all[0], Math.min(...all), Math.max(...all), all.at(-1)].map(octaves)];
      })],
    }));
}

// Balance

// The layers of a table [N, L] as curves: their band, their mean, the chosen one.
function overLayers(packed, x) {
  const column = (layer) => range(packed.shape[0]).map((i) => packed.at(i, layer));
  const rows = range(packed.shape[0]).map((i) => range(packed.shape[1]).map((l) => packed.at(i, l)).filter(known));
  const low = rows.map((row) => Math.min(...row)), y = rows.map((row) => Math.max(...row));
  const mean = rows.map((row) => row.reduce((a, b) => a + b, 0) / row.length);
  return () => [
    { x, y, low, name: "largest", mark: "band", class: "c7" },
    { x, y: mean, name: "mean of layers", class: "c7 thin", bare: true },
    { x, y: column(state.layer), name: `layer ${state.layer}`, class: "c0", bare: true },
  ];
}

function health() {
  const x = data.train.step.list();
  const of = (name, title, note, format, ceiling) => curves({ title, note, format, ceiling, height: 190, xLabel: "step", floor: 0,
    series: overLayers(data.layers[name], x) });
  if (!data.layers.max_violation) {
    part("health").append(data.experts.length ? missing("No record of balance yet.") : noAtlas());
    return;
  }
  part("health").append(
    of("max_violation", "MaxVio", "largest load over mean load, minus 1", fixed(2)),
    of("router_entropy", "Router entropy", `nats; undecided is ${fixed(2)(Math.log(Math.max(...data.experts)))}`, fixed(2)),
    of("dead_experts", "Dead experts", "below 1% of the mean load", fixed(1), 1),
    curves({ title: "Dropped assignments", note: "share, over all layers", format: percent, height: 190, xLabel: "step", floor: 0, ceiling: 0.01,
      series: () => [{ x, y: data.train.drop_fraction.list(), name: "dropped", class: "c1", unlisted: true, bare: true }] }));
}

// Time

function time() {
  const all = data.time.rows.reduce((sum, [, seconds]) => sum + seconds, 0);
  if (!all) part("time").append(missing("No ledger: this run has not counted its time."));
  else {
    const rows = data.time.rows.filter(([, seconds]) => seconds > 0).sort((a, b) => b[1] - a[1]);
    const number = data.time.sessions;
    part("time").append(
      figure(duration(all), `in ${number} ${number === 1 ? "session" : "sessions"}`,
        bars(rows.map(([kind, seconds]) => [kind, seconds, `${duration(seconds)} · ${percent(seconds / all)}`]), all),
        asTable(() => ["Where the time went", ["Kind", "Seconds", "Share", "Meaning"],
          data.time.rows.map(([kind, seconds, meaning]) => [kind, fixed(1)(seconds), percent(seconds / all), meaning])])));
  }
  const { rows, number, kinds } = data.events;
  if (!number) part("events").append(el("p", { class: "note" }, "None: nothing happened besides steps."));
  else {
    const counts = Map.groupBy ? Map.groupBy(rows, (row) => row[2]) : new Map(rows.map((row) => [row[2], rows.filter((r) => r[2] === row[2])]));
    const left = number > rows.length ? `The last ${whole(rows.length)} of ${whole(number)} events. ` : "";
    part("events").append(
      el("p", { class: "note" }, left + [...counts].map(([kind, of]) => `${of.length} ${kind.replaceAll("_", " ")}`).join(" · ")),
      scrolling("Events", table("", ["Step", "What", "With", "Time"], rows.toReversed().map(([when, step, kind, text]) =>
        [whole(step), el("span", { title: kinds[kind] ?? "" }, kind.replaceAll("_", " ")), text, when.replace("T", " ").slice(0, 19)]))));
  }
}

// Layers

function agreement({ name, steps, tokens, same, by_chance, renamed }) {
  const x = range(same.length);
  return curves({ title: `Routing here and in ${visible(name, false)}`, xLabel: "layer", format: percent, height: 210, floor: 0, ceiling: 1,
    note: `share of its choices (step ${whole(steps[1])}) that this model (step ${whole(steps[0])}) makes too, of ${whole(tokens)} tokens`,
    series: () => [
      { x, y: renamed, name: "experts renamed one to one, as is best", class: "c2" },
      { x, y: same, name: "the same number", class: "c0" },
      { x, y: by_chance, name: "by chance", class: "c7 thin", bare: true }] });
}

function layers() {
  const atlas = data.atlas;
  if (!atlas) { part("layers").append(noAtlas()); return; }
  const x = range(atlas.layers.length);
  const box = el("div", { class: "small-multiples" });
  part("layers").append(box, ...atlas.notes.map((note) => el("p", { class: "note" }, note)));
  box.append(curves({ title: "Domain and expert", xLabel: "layer", format: fixed(3), height: 210, floor: 0,
    note: `mutual information above chance, nats; knowing the domain for sure is ${fixed(3)(atlas.domain_entropy)}`,
    series: () => [{ x, y: atlas.information.list(), name: "information", class: "c0", unlisted: true }] }));
  if (data.against) box.append(agreement(data.against));
  const steps = atlas.saturation_steps;
  if (!steps.length) {
    box.append(missing("No routing saturation: the run keeps no checkpoint before this one. checkpoint.keep says how many it keeps."));
    return;
  }
  const share = (s, l) => (s === steps.length ? 1 : atlas.saturation.at(s, l));
  const final = { shape: [steps.length + 1, x.length], at: share };
  box.append(curves({ title: "Routing saturation", note: "share of the final choices that were already made", xLabel: "step", format: percent,
    height: 210, ceiling: 1, series: overLayers(final, [...steps, atlas.step]) }));
  state.before = steps.length - 1;
  const select = el("select", { id: "choose-before", onchange: () => choose({ before: Number(select.value) }) },
    steps.map((step, i) => el("option", { value: i, selected: i === state.before }, `step ${whole(step)}`)));
  box.append(el("div", {}, curves({ title: "Agreement of two checkpoints", note: "share of equal choices, by layer", xLabel: "layer",
    format: percent, height: 210, ceiling: 1,
    series: () => [{ x, y: x.map((l) => share(state.before, l)), name: "agreement", class: "c2", unlisted: true }] }),
    el("div", { class: "row" }, el("label", { for: select.id }, `Step ${whole(atlas.step)} and`), select)));
}

// Pairs

function lift(layer, a, b) {
  const [i, j] = a < b ? [a, b] : [b, a], wide = Math.max(...data.atlas.experts);
  return i === j ? NaN : data.atlas.pairs.at(layer, i * wide - (i * (i + 1)) / 2 + j - i - 1);
}
const overChance = (log2) => (!known(log2) ? "no chance to meet" : log2 <= -4 ? "at most 1/16 of chance" : `${log2 >= 4 ? "at least " : ""}${times(2 ** log2)} chance`);

function pairs() {
  if (!data.atlas) { part("pairs").append(noAtlas()); return; }
  const list = el("div");
  const pick = (a, b, words) => el("li", {}, el("button", { type: "button", onclick: () => choose({ expert: a, partner: b }) }, words));
  const map = heatMap({
    title: "The chosen layer", note: "pairs over chance", scale: () => scaleStrip("1/8×", "8×", diverging, [-1, 1]), square: true,
    rowLabel: "expert", columnLabel: "expert", size: () => [experts(), experts()],
    rgb: (r, c) => (r === c ? colour("card") : diverging(lift(state.layer, r, c) / 3)),
    words: (r, c) => (r === c ? `expert ${r}: ${whole(data.atlas.load.at(state.layer, r))} assignments`
      : `experts ${r} and ${c}: ${overChance(lift(state.layer, r, c))}`),
    chosen: () => [state.expert, state.partner], choose: (expert, partner) => choose({ expert, partner }),
    rows: () => [`Layer ${state.layer}: partners of expert ${state.expert}`, ["Expert", "Together, over chance"],
      range(experts()).filter((e) => e !== state.expert).map((e) => [String(e), overChance(lift(state.layer, state.expert, e))])],
  });
  drawn(() => {
    const all = [];
    for (let a = 0; a < experts(); a++) for (let b = a + 1; b < experts(); b++) {
      const value = lift(state.layer, a, b);
      if (known(value)) all.push([value, a, b]);
    }
    if (!all.length) {
      list.replaceChildren(missing("No token of this layer takes two experts."));
      return;
    }
    all.sort((p, q) => q[0] - p[0]);
    const rows = (some) => el("ul", { class: "chips" }, some.map(([value, a, b]) => pick(a, b, `${a} + ${b}: ${overChance(value)}`)));
    list.replaceChildren(el("h4", {}, `Most above chance in layer ${state.layer}`), rows(all.slice(0, 8)),
      el("h4", {}, "Least"), rows(all.slice(-8).reverse()),
      el("h4", {}, `Partners of expert ${state.expert}`), rows(partners(8).map(([value, e]) => [value, state.expert, e])));
  });
  part("pairs").append(el("div", { class: "pair" }, map, list));
}

function partners(number) {
  return range(experts()).filter((e) => e !== state.expert).map((e) => [lift(state.layer, state.expert, e), e])
    .filter(([value]) => known(value)).sort((p, q) => q[0] - p[0]).slice(0, number);
}

// One expert

const relative = (layer, expert) => {
  const sum = range(experts(layer)).reduce((all, e) => all + data.atlas.load.at(layer, e), 0);
  return (data.atlas.load.at(layer, expert) * experts(layer)) / (sum || 1);
};

// Share of a domain's assignments that the expert gets, and of all domains'.
function domainShares(layer, expert) {
  const { load_by_domain: load, domains } = data.atlas;
  const sums = domains.map((_, d) => range(experts(layer)).reduce((all, e) => all + load.at(d, layer, e), 0));
  const own = domains.map((_, d) => load.at(d, layer, expert));
  const all = own.reduce((a, b) => a + b, 0) || 1, every = sums.reduce((a, b) => a + b, 0) || 1;
  return domains.map((name, d) => ({ name, share: own[d] / all, mean: sums[d] / every }));
}

const MEASURES = {
  load: ["Load over balance", (l, e) => Math.log2(relative(l, e)), octaves, true],
  removed: ["Loss when removed, all tokens", (l, e) => data.atlas.removed.at(l, e), signed, true],
  removed_own: ["Loss when removed, own tokens", (l, e) => data.atlas.removed_own.at(l, e), signed, true],
  norm: ["Mean norm of weighted output", (l, e) => data.atlas.norm.at(l, e), short, false],
  domain: ["Strongest domain over its mean share", (l, e) =>
    Math.log2(Math.max(...domainShares(l, e).map((d) => (d.mean ? d.share / d.mean : 0)))), octaves, true],
};
function signed(x) { return known(x) ? `${x < 0 ? "−" : "+"}${short(Math.abs(x))}` : "not measured"; }

function expertsSection() {
  if (!data.atlas) { part("experts").append(noAtlas()); return; }
  const across = () => Math.ceil(Math.sqrt(experts()));
  const select = el("select", { id: "choose-measure", onchange: () => choose({ measure: select.value }) },
    Object.entries(MEASURES).map(([name, [title]]) => el("option", { value: name }, title)));
  let limit = 1, values = [];
  drawn(() => {
    const [, value] = MEASURES[state.measure];
    values = range(experts()).map((e) => value(state.layer, e));
    limit = Math.max(...values.filter(known).map(Math.abs), 1e-12);
  });
  const value = (e) => MEASURES[state.measure][2](values[e]);
  const grid = heatMap({
    title: "Experts of the chosen layer", square: true, rowLabel: "expert", columnLabel: "plus",
    size: () => [Math.ceil(experts() / across()), across()], rowName: (r) => String(r * across()), columnName: (c) => `+${c}`,
    rgb: (r, c) => {
      const e = r * across() + c;
      if (e >= experts()) return colour("page");
      return MEASURES[state.measure][3] ? diverging(values[e] / limit) : rising(values[e] / limit);
    },
    words: (r, c) => (r * across() + c < experts() ? `expert ${r * across() + c}: ${value(r * across() + c)}` : ""),
    chosen: () => [Math.floor(state.expert / across()), state.expert % across()],
    choose: (r, c) => choose({ expert: r * across() + c }),
    rows: () => [`Layer ${state.layer}: ${MEASURES[state.measure][0]}`, ["Expert", MEASURES[state.measure][0]],
      range(experts()).map((e) => [String(e), value(e)])],
  });
  const card = el("div", { class: "card", id: "expert-card", "aria-live": "polite" });
  drawn(() => card.replaceChildren(...expertCard()));
  part("experts").append(el("div", { class: "row" }, el("label", { for: select.id }, "Colour by"), select),
    el("div", { class: "one" }, grid, card));
}

function expertCard() {
  const { atlas } = data, { layer, expert } = state;
  const loads = range(experts()).map((e) => atlas.load.at(layer, e));
  const rank = loads.filter((n) => n > loads[expert]).length + 1;
  const facts = [["Load over balance", times(relative(layer, expert))], ["Assignments", `${whole(loads[expert])}`], ["Rank by load", `${rank} of ${experts()}`],
    ["Norm of output", short(atlas.norm.at(layer, expert))]];
  const removed = [["all tokens", atlas.removed], ["its own tokens", atlas.removed_own], ["other tokens", atlas.removed_other]]
    .map(([name, packed]) => [name, packed.at(layer, expert)]);
  const contribution = removed.some(([, x]) => known(x))
    ? bars(removed.map(([name, x]) => [name, x, `${signed(x)} nats`])) : el("p", { class: "note" }, "Not measured for this expert.");
  const number = layer === atlas.layers[layer] ? "" : ` (layer ${atlas.layers[layer]} of the model)`;
  return [el("h3", {}, `Layer ${layer}${number}, expert ${expert}`),
    el("dl", { class: "figures" }, facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
    el("h4", {}, "Tokens that it takes most over chance"), topTokens(layer, expert),
    ...snippets(layer, expert),
    el("h4", {}, "What the loss rises by when it is removed"), contribution,
    el("h4", {}, "Its tokens by domain; the mark is the mean of all experts"),
    bars(domainShares(layer, expert).map(({ name, share, mean }) => [name, share, `${percent(share)} · ${times(share / mean)}`, mean]), 1),
    el("h4", {}, "By tenth of the document, over its mean"), byPart(layer, expert)];
}

function topTokens(layer, expert) {
  const { top_token: token, top_lift: over, top_count: count, texts } = data.atlas;
  const found = range(token.shape[2]).filter((i) => token.at(layer, expert, i) >= 0);
  if (!found.length) return el("p", { class: "note" }, "None: it was never chosen.");
  return el("ul", { class: "chips" }, found.map((i) => el("li", {}, el("code", {}, visible(texts[token.at(layer, expert, i)])),
    el("span", {}, `${times(over.at(layer, expert, i))} · ${whole(count.at(layer, expert, i))}`))));
}

function snippets(layer, expert) {
  return (data.contexts.get(layer * 65536 + expert) ?? []).map(([, , text, start, end]) => {
    const points = Array.from(text); // spans count characters, and not halves of them
    const piece = (from, to) => visible(points.slice(from, to).join(""), false).replace("∅", "");
    return el("p", { class: "snippet" }, piece(0, start), el("mark", {}, visible(points.slice(start, end).join(""))), piece(end));
  });
}

function byPart(layer, expert) {
  const load = data.atlas.load_by_part, parts = load.shape[0];
  const sums = range(parts).map((p) => range(experts(layer)).reduce((all, e) => all + load.at(p, layer, e), 0));
  const share = range(parts).map((p) => (sums[p] ? load.at(p, layer, expert) / sums[p] : 0));
  const mean = share.reduce((a, b) => a + b, 0) / parts || 1, most = Math.max(...share, 1e-12);
  return el("div", { class: "parts", role: "img", "aria-label": share.map((x, p) => `tenth ${p + 1}: ${times(x / mean)}`).join(", ") },
    share.map((x, p) => {
      const bar = el("div", { title: `tenth ${p + 1}: ${times(x / mean)}` });
      bar.style.height = `${(100 * x) / most}%`;
      return bar;
    }));
}

// Token by token

function tokens() {
  const box = part("tokens");
  if (!data.atlas) { box.append(noAtlas()); return; }
  const { views } = data.atlas;
  if (!views.length) {
    box.append(missing("No text: the atlas holds none that was looked at token by token."));
    return;
  }
  const view = () => views[state.view];
  const expertAt = (i, k = state.choice, l = state.layer) => view().expert.at(l, i, k);
  const select = el("select", { id: "choose-view", onchange: () => open(Number(select.value)) },
    views.map(({ name }, i) => el("option", { value: i }, visible(name, false))));
  const which = el("select", { id: "choose-choice", onchange: () => choose({ choice: Number(which.value) }) });
  const numbers = el("input", { type: "checkbox", id: "choose-numbers", onchange: () => choose({ numbers: numbers.checked }) });
  const slider = el("input", { type: "range", id: "choose-token-layer", min: 0, max: data.experts.length - 1, oninput: () => choose({ layer: Number(slider.value) }) });
  const text = el("div", { class: "text", role: "group", "aria-label": "The text. Left and right go from token to token, up and down from layer to layer." });
  const legend = el("div", { class: "row keys", role: "group", "aria-label": "Experts of this layer" });
  const card = el("div", { class: "card", id: "token-card", "aria-live": "polite" });
  const layersTable = asTable(() => [`Token ${state.token} in every layer`, ["Layer", ...range(view().expert.shape[2]).map((k) => `Choice ${k + 1}`)],
    range(data.experts.length).map((l) => [String(l), ...range(view().expert.shape[2]).map((k) =>
      (expertAt(state.token, k, l) < 0 ? "none" : `expert ${expertAt(state.token, k, l)}, weight ${short(view().weight.at(l, state.token, k))}`))])],
    "This token in every layer");
  let spans = [];

  function open(index) {
    state.view = index;
    state.token = 0;
    state.choice = clamp(state.choice, view().expert.shape[2] - 1);
    const texts = view().tokens;
    state.numbers = texts.reduce((all, t) => all + t.length, 0) / texts.length >= 2.5;
    which.replaceChildren(...range(view().expert.shape[2]).map((k) => el("option", { value: k }, `choice ${k + 1}`)));
    spans = texts.map((token, i) => el("span", { class: "token", role: "button", tabindex: -1, "data-token": i,
      onpointerenter: () => look(i), onfocus: () => look(i), onclick: () => choose({ expert: Math.max(0, expertAt(i)) }) }));
    text.replaceChildren(...spans);
    text.scrollTop = 0;
    redraw();
  }
  const look = (i) => { // only its own part: the pointer passes over many
    if (i === state.token) return;
    state.token = i;
    point();
  };
  function point() {
    spans.forEach((span, i) => {
      span.tabIndex = i === state.token ? 0 : -1;
      span.setAttribute("aria-current", String(i === state.token));
    });
    card.replaceChildren(...tokenCard(view(), expertAt));
    layersTable.draw();
  }

  text.addEventListener("keydown", (event) => {
    const along = { ArrowRight: 1, ArrowLeft: -1 }[event.key], across = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (along) spans[clamp(state.token + along, spans.length - 1)].focus();
    if (across) choose({ layer: state.layer + across });
    if (event.key === "Enter" || event.key === " ") choose({ expert: Math.max(0, expertAt(state.token)) });
    if (along || across || event.key === " ") event.preventDefault();
  });

  function light(expert) {
    text.classList.toggle("dim", expert != null);
    spans.forEach((span, i) => span.classList.toggle("lit", expertAt(i) === expert));
  }

  function key(expert, index, count) {
    const on = () => light(expert), off = () => light(null);
    return el("button", { type: "button", class: `k${index}`, onclick: () => choose({ expert }), onfocus: on, onblur: off, onpointerenter: on, onpointerleave: off },
      `expert ${expert} · ${percent(count / spans.length)}`);
  }

  let shown = "";
  drawn(() => {
    slider.value = state.layer;
    slider.setAttribute("aria-valuetext", `layer ${state.layer}`);
    select.value = state.view; which.value = state.choice; numbers.checked = state.numbers;
    const now = [state.view, state.layer, state.choice, state.numbers].join();
    if (now !== shown && spans.length) {
      shown = now;
      const counts = new Map();
      spans.forEach((_, i) => { if (expertAt(i) >= 0) counts.set(expertAt(i), (counts.get(expertAt(i)) ?? 0) + 1); });
      const top = [...counts].sort((a, b) => b[1] - a[1]).slice(0, 8);
      const place = new Map(top.map(([expert], index) => [expert, index]));
      legend.replaceChildren(...top.map(([expert, count], index) => key(expert, index, count)),
        counts.size > 8 ? el("span", { class: "note" }, `and ${counts.size - 8} more, underlined in grey`) : "");
      spans.forEach((span, i) => {
        const expert = expertAt(i), raw = view().tokens[i];
        span.className = `token ${place.has(expert) ? `k${place.get(expert)}` : ""} ${state.numbers ? "numbered" : ""}`;
        span.setAttribute("aria-label", `${visible(raw)}: ${expert < 0 ? "no expert" : `expert ${expert}`}`);
        span.replaceChildren(visible(raw, false) + (/\n/.test(raw) ? "\n" : ""), state.numbers ? el("sub", { "aria-hidden": "true" }, expert < 0 ? "–" : expert) : "");
      });
    }
    point();
  });
  const field = (input, label) => el("span", {}, el("label", { for: input.id }, label), " ", input);
  box.append(el("div", { class: "row" }, field(select, "Text"), field(which, "Coloured by"), field(numbers, "Expert numbers"),
    el("span", { class: "grow" }, el("label", { for: slider.id }, "Layer"), slider)), legend,
    el("div", { class: "reading" }, text, el("div", {}, card, layersTable)));
  open(0);
}

function tokenCard(view, expertAt) {
  const i = state.token, loss = view.loss.at(i);
  const rows = range(view.expert.shape[2]).map((k) => [expertAt(i, k), view.weight.at(state.layer, i, k)]);
  return [el("h3", {}, el("code", {}, visible(view.tokens[i]))),
    el("p", { class: "note" }, `Token ${i + 1} of ${view.tokens.length}. Loss ${known(loss) ? `${fixed(3)(loss)} nats` : "not defined"}. Layer ${state.layer}:`),
    bars(rows.map(([expert, weight]) => [expert < 0 ? "no expert" : `expert ${expert}`, expert < 0 ? 0 : weight, expert < 0 ? "–" : fixed(3)(weight)]))];
}

async function start() {
  data = await unpacked(JSON.parse(document.getElementById("data").textContent));
  data.contexts = new Map();
  for (const snippet of data.atlas?.snippets ?? []) {
    const place = snippet[0] * 65536 + snippet[1];
    data.contexts.set(place, [...(data.contexts.get(place) ?? []), snippet]);
  }
  for (const section of [header, controls, losses, load, health, time, layers, pairs, expertsSection, tokens, followNavigation]) section();
  root.dataset.ready = "true";
}
start();
