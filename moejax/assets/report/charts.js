// What every picture of the report is made of: DOM nodes, packed arrays, curves, heat maps, tables.
// Texts become text nodes, never markup.
"use strict";

// DOM

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child != null));
  return node;
}

const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// Numbers as words. What is not known is a dash.

const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const known = (x) => x != null && Number.isFinite(x);
const whole = (x) => (known(x) ? Math.round(x).toLocaleString("en") : "–");
const short = (x) => {
  if (!known(x)) return "–";
  if (x !== 0 && Math.abs(x) < 1e-3) return x.toExponential(1);
  return Math.abs(x) >= 1e4 ? compact.format(x) : String(Number(x.toPrecision(3)));
};
const fixed = (digits) => (x) => (known(x) ? x.toFixed(digits) : "–");
const percent = (x) => (known(x) ? `${(100 * x).toFixed(Math.abs(x) < 0.1 ? 2 : 1)}%` : "–");
const times = (x) => (known(x) ? `${Number(x.toPrecision(x < 10 ? 2 : 3)).toLocaleString("en")}×` : "–");

// Packed arrays: base64 of deflated little-endian numbers, or of JSON.

const ARRAYS = {
  u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i2: Int16Array, i4: Int32Array, f4: Float32Array,
};

async function inflated(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

class Packed {
  constructor(entry, buffer) {
    this.shape = entry.shape;
    this.data = new ARRAYS[entry.dtype](buffer);
    this.low = entry.low;
    this.step = (entry.high - entry.low) / (entry.levels - 1);
    this.coded = entry.levels != null;
  }
  at(...index) { // leading dims may be left out where they are all there is: at(flat) of a vector
    let flat = 0;
    for (let i = 0; i < index.length; i++) flat = flat * this.shape[i] + index[i];
    const value = this.data[flat];
    if (!this.coded) return value;
    return value === 0 ? NaN : this.low + (value - 1) * this.step;
  }
  list() { return Array.from({ length: this.shape[0] }, (_, i) => this.at(i)); }
}

// Returns the same value with every packed array and text unpacked.
async function unpacked(value) {
  if (value === null || typeof value !== "object") return value;
  if (value.dtype) {
    const buffer = await inflated(value.data);
    return value.dtype === "json" ? JSON.parse(new TextDecoder().decode(buffer)) : new Packed(value, buffer);
  }
  if (Array.isArray(value)) return Promise.all(value.map(unpacked));
  const entries = Object.entries(value).map(async ([key, item]) => [key, await unpacked(item)]);
  return Object.fromEntries(await Promise.all(entries));
}

// Colours, read from the style sheet so that a theme is written once.

const probe = document.createElement("span");
probe.hidden = true;
document.body.append(probe);
let colours = {};

function colour(name) {
  if (!colours[name]) {
    probe.style.color = `var(--${name})`;
    colours[name] = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
  }
  return colours[name];
}
const css = (name) => `rgb(${colour(name).join(" ")})`;
const mixed = (a, b, t) => a.map((x, i) => x + (b[i] - x) * t);
// t from -1 (below) over 0 (even) to 1 (above); from 0 (little) to 1 (much)
const diverging = (t) =>
  !known(t) ? colour("none") : mixed(colour("even"), colour(t < 0 ? "below" : "above"), Math.min(1, Math.abs(t)));
const rising = (t) => (!known(t) ? colour("none") : mixed(colour("little"), colour("much"), Math.min(1, Math.max(0, t))));

// Everything that is drawn is drawn again when the page's choice, theme or width changes.

const redraws = new Set();
let pending = false;
function redraw() {
  if (pending) return;
  pending = true;
  requestAnimationFrame(() => {
    pending = false;
    for (const draw of redraws) draw();
  });
}
function drawn(draw) {
  redraws.add(draw);
  draw();
}
addEventListener("resize", redraw);

// Tables: the other way to read a picture. Built when opened, and kept up to date then.

function table(caption, head, rows) {
  const numeric = (value) => typeof value === "number" || value === "–" || /^[−+-]?[\d.,]+(e[+−-]?\d+)?[%×]?$/.test(value);
  const right = head.map((_, i) => i > 0 && rows.every((row) => row[i] === "" || (typeof row[i] !== "object" && numeric(row[i]))));
  const cell = (value, i) => fill(document.createElement(i ? "td" : "th"), { class: right[i] ? "number" : null, scope: i ? null : "row" },
    [value instanceof Node ? value : typeof value === "number" ? whole(value) : String(value ?? "–")]);
  return el("table", {},
    caption ? el("caption", {}, caption) : null,
    el("thead", {}, el("tr", {}, head.map((name, i) => el("th", { scope: "col", class: right[i] ? "number" : null }, name)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map(cell)))));
}

function scrolling(label, content) {
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, content);
}

// `make` returns [caption, head, rows].
function asTable(make, label = "As a table") {
  const box = el("div");
  const details = el("details", {}, el("summary", {}, label), box);
  const draw = () => { if (details.open) box.replaceChildren(scrolling(make()[0], table(...make()))); };
  details.addEventListener("toggle", draw);
  details.draw = draw;
  redraws.add(draw);
  return details;
}

// Reads out what changes only while its picture has the focus: many change at once.
function spoken(plot, readout) {
  readout.setAttribute("aria-live", "off");
  plot.addEventListener("focusin", () => readout.setAttribute("aria-live", "polite"));
  plot.addEventListener("focusout", () => readout.setAttribute("aria-live", "off"));
}

function figure(title, note, ...content) {
  return el("figure", {}, el("figcaption", {}, el("b", {}, title), note ? ` ${note}` : ""), content);
}

// Curves

function niceTicks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) ticks.push(i * step + 0); // + 0: no minus zero
  return ticks;
}

function span(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) if (known(value)) { low = Math.min(low, value); high = Math.max(high, value); }
  return low <= high ? [low, high] : [0, 1];
}

// Lines and dots on common axes; arrow keys and the pointer read values.
//   series(): [{name, x, y, mark: "line" | "dots" | "band", class, low}]; a band spans y and low.
function curves({ title, note, xLabel, format = short, tick, height = 230, series, floor, ceiling }) {
  const readout = el("output", { class: "readout" });
  const legend = el("ul", { class: "legend" });
  const plot = el("div", { class: "plot" });
  spoken(plot, readout);
  let cursor = null; // a value of x

  function readAt(all) {
    const parts = all.filter((s) => s.mark !== "band").map((s) => {
      let best = 0;
      s.x.forEach((x, i) => { if (Math.abs(x - cursor) < Math.abs(s.x[best] - cursor)) best = i; });
      return `${s.name} ${format(s.y[best])}`;
    });
    return `${xLabel} ${whole(cursor)}: ${parts.join(" · ")}`;
  }

  const draw = () => {
    const all = series().filter((s) => s.y.some(known));
    if (!all.length) {
      plot.replaceChildren(el("p", { class: "note" }, "Nothing to draw yet."));
      return;
    }
    const width = plot.clientWidth || 600, left = 54, right = 14, top = 8, bottom = 38;
    const [x0, x1] = span(all.flatMap((s) => s.x));
    let [y0, y1] = span(all.flatMap((s) => (s.low ? [...s.y, ...s.low] : s.y)));
    if (floor != null) y0 = Math.min(y0, floor);
    if (ceiling != null) y1 = Math.max(y1, ceiling);
    const pad = (y1 - y0) * 0.05 || Math.abs(y1) * 0.05 || 0.5;
    [y0, y1] = [floor != null && y0 === floor ? y0 : y0 - pad, y1 + pad];
    const px = (x) => left + ((x - x0) / (x1 - x0 || 1)) * (width - left - right);
    const py = (y) => top + (1 - (y - y0) / (y1 - y0)) * (height - top - bottom);
    const xTicks = niceTicks(x0, x1, Math.max(2, Math.floor(width / 110)));
    const yTicks = niceTicks(y0, y1, Math.max(2, Math.floor(height / 55)));
    const picture = svg("svg", {
      viewBox: `0 0 ${width} ${height}`, height, role: "application", tabindex: 0,
      "aria-roledescription": "chart", "aria-label": `${title}. Arrow keys read values; a table follows.`,
    });
    for (const y of yTicks) {
      picture.append(svg("line", { class: "gridline", x1: left, x2: width - right, y1: py(y), y2: py(y) }),
        svg("text", { x: left - 8, y: py(y) + 4, "text-anchor": "end" }, (tick ?? format)(y)));
    }
    picture.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
    for (const x of xTicks) {
      const anchor = px(x) > width - 30 ? "end" : "middle";
      picture.append(svg("text", { x: px(x), y: height - bottom + 17, "text-anchor": anchor }, compact.format(x)));
    }
    picture.append(svg("text", { x: width - right, y: height - 4, "text-anchor": "end" }, xLabel));
    for (const s of all) picture.append(...marks(s, px, py));
    if (cursor != null) picture.append(svg("line", { class: "cursor", x1: px(cursor), x2: px(cursor), y1: top, y2: height - bottom }));
    const stops = [...new Set(all.flatMap((s) => Array.from(s.x)))].sort((a, b) => a - b);
    const move = (x) => { cursor = x; readout.value = readAt(all); draw(); };
    picture.addEventListener("pointermove", (event) => {
      const box = picture.getBoundingClientRect();
      const x = x0 + ((event.clientX - box.left - left) / (box.width - left - right)) * (x1 - x0);
      move(stops.reduce((a, b) => (Math.abs(b - x) < Math.abs(a - x) ? b : a)));
    });
    picture.addEventListener("keydown", (event) => {
      const at = cursor == null ? -1 : stops.indexOf(cursor);
      const page = Math.max(1, Math.round(stops.length / 10));
      const next = { ArrowRight: at + 1, ArrowLeft: at < 0 ? stops.length - 1 : at - 1, Home: 0, End: stops.length - 1,
        PageUp: at + page, PageDown: at - page }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      move(stops[Math.min(stops.length - 1, Math.max(0, next))]);
    });
    const focused = plot.contains(document.activeElement);
    plot.replaceChildren(picture);
    if (focused) picture.focus({ preventScroll: true });
    legend.replaceChildren(...all.filter((s) => s.mark !== "band" && s.name && !s.unlisted).map((s) =>
      el("li", {}, el("span", { class: `swatch ${s.class}` }), s.name)));
  };

  const rows = () => {
    const all = series().filter((s) => s.y.some(known) && s.name);
    const stops = [...new Set(all.flatMap((s) => Array.from(s.x)))].sort((a, b) => a - b);
    const every = Math.ceil(stops.length / 200) || 1;
    const kept = stops.filter((_, i) => i % every === 0 || i === stops.length - 1);
    const maps = all.map((s) => new Map(Array.from(s.x, (x, i) => [x, s.y[i]])));
    return [every > 1 ? `${title}: every ${every}th of ${stops.length} points` : title,
      [xLabel, ...all.map((s) => s.name)],
      kept.map((x) => [whole(x), ...maps.map((map) => (map.has(x) ? format(map.get(x)) : ""))])];
  };
  const node = figure(title, note, legend, plot, readout, asTable(rows));
  queueMicrotask(() => drawn(draw)); // when it has its width
  return node;
}

function marks(s, px, py) {
  const points = Array.from(s.x, (x, i) => [px(x), s.y[i]]).filter(([, y]) => known(y));
  if (s.mark === "dots") return points.map(([x, y]) => svg("circle", { class: s.class, cx: x, cy: py(y), r: 3.5 }));
  if (s.mark === "band") {
    const under = Array.from(s.x, (x, i) => [px(x), s.low[i]]).filter(([, y]) => known(y)).reverse();
    const outline = [...points, ...under].map(([x, y]) => `${x.toFixed(1)} ${py(y).toFixed(1)}`);
    return [svg("path", { class: `band ${s.class}`, d: `M${outline.join("L")}Z` })];
  }
  let path = "", pen = false; // a gap where a value is not known
  Array.from(s.x).forEach((x, i) => {
    if (known(s.y[i])) path += `${pen ? "L" : "M"}${px(x).toFixed(1)} ${py(s.y[i]).toFixed(1)}`;
    pen = known(s.y[i]);
  });
  const line = svg("path", { class: `curve ${s.class}`, d: path });
  return points.length > 40 || s.bare ? [line] : [line, ...points.map(([x, y]) => svg("circle", { class: s.class, cx: x, cy: py(y), r: 2.5 }))];
}

// Bars: [name, value, text, tick]; a tick marks what to compare with.
function bars(rows, most = Math.max(...rows.map((row) => Math.abs(row[1]) || 0), 1e-12)) {
  return el("div", { class: "bars" }, rows.map(([name, value, text, tick]) => {
    const inside = el("div", { class: value < 0 ? "fill minus" : "fill" });
    inside.style.width = `${Math.min(100, (100 * Math.abs(value || 0)) / most)}%`;
    const mark = tick == null ? null : el("div", { class: "tick" });
    if (mark) mark.style.left = `${Math.min(100, (100 * tick) / most)}%`;
    return [el("span", { class: "name" }, name), el("div", { class: "track", "aria-hidden": "true" }, inside, mark), el("span", { class: "value" }, text)];
  }));
}

// Heat maps

// A cell a value: arrow keys and clicks choose, the pointer reads.
//   size(): [rows, columns]; rgb(r, c); words(r, c); chosen(): [r, c] or null for a whole row or column
function heatMap({ title, note, size, rgb, words, chosen, choose, rowLabel, columnLabel, rowName = String,
  columnName = String, height = (rows) => Math.min(420, Math.max(130, rows * 26)), scale, rows: tableRows, square }) {
  const canvas = el("canvas", { "aria-hidden": "true" });
  const readout = el("output", { class: "readout" });
  const plot = el("div", {
    class: "plot", tabindex: 0, role: "application", "aria-roledescription": "heat map",
    "aria-label": `${title}. Arrow keys choose; a table follows.`,
  }, canvas);
  spoken(plot, readout);
  const left = 46, bottom = 36, top = 6, right = 8;
  const frame = { width: 1, height: 1 };

  function draw() {
    const [rows, columns] = size();
    const available = plot.clientWidth || 600;
    frame.width = square ? Math.min(available - left - right, 460) : available - left - right;
    frame.height = square ? frame.width : height(rows);
    const wide = left + frame.width + right, high = top + frame.height + bottom;
    const dense = window.devicePixelRatio || 1;
    canvas.width = Math.round(wide * dense);
    canvas.height = Math.round(high * dense);
    canvas.style.width = `${wide}px`;
    canvas.style.height = `${high}px`;
    const pen = canvas.getContext("2d");
    pen.scale(dense, dense);
    const image = new ImageData(columns, rows);
    for (let r = 0, i = 0; r < rows; r++) for (let c = 0; c < columns; c++, i += 4) {
      const [red, green, blue] = rgb(r, c);
      image.data[i] = red; image.data[i + 1] = green; image.data[i + 2] = blue; image.data[i + 3] = 255;
    }
    const small = new OffscreenCanvas(columns, rows);
    small.getContext("2d").putImageData(image, 0, 0);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(small, left, top, frame.width, frame.height);
    drawAxes(pen, rows, columns);
    drawChosen(pen, rows, columns);
    readout.value = words(...chosenCell());
  }

  function chosenCell() {
    const [r, c] = chosen();
    return [r ?? 0, c ?? 0];
  }

  function drawAxes(pen, rows, columns) {
    const cellWidth = frame.width / columns, cellHeight = frame.height / rows;
    pen.fillStyle = css("quiet");
    pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    const stride = (cell, room) => [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128].find((n) => n * cell >= room) || 256;
    for (let r = 0; r < rows; r += stride(cellHeight, 15)) pen.fillText(rowName(r), left - 6, top + (r + 0.5) * cellHeight);
    pen.textAlign = "center";
    pen.textBaseline = "top";
    for (let c = 0; c < columns; c += stride(cellWidth, 34)) pen.fillText(columnName(c), left + (c + 0.5) * cellWidth, top + frame.height + 5);
    pen.textAlign = "right";
    pen.fillText(`${columnLabel} →`, left + frame.width, top + frame.height + 20);
    pen.textAlign = "left";
    pen.fillText(`↑ ${rowLabel}`, 2, top + frame.height + 20);
  }

  function drawChosen(pen, rows, columns) {
    const [r, c] = chosen();
    const cellWidth = frame.width / columns, cellHeight = frame.height / rows;
    const box = [c == null ? left : left + c * cellWidth, r == null ? top : top + r * cellHeight,
      c == null ? frame.width : Math.max(3, cellWidth), r == null ? frame.height : Math.max(3, cellHeight)];
    pen.lineWidth = 4; pen.strokeStyle = css("page"); pen.strokeRect(...box);
    pen.lineWidth = 2; pen.strokeStyle = css("ink"); pen.strokeRect(...box);
  }

  function cellAt(event) {
    const [rows, columns] = size();
    const box = canvas.getBoundingClientRect();
    const r = Math.floor(((event.clientY - box.top - top) / frame.height) * rows);
    const c = Math.floor(((event.clientX - box.left - left) / frame.width) * columns);
    return r >= 0 && c >= 0 && r < rows && c < columns ? [r, c] : null;
  }
  canvas.addEventListener("pointermove", (event) => {
    const cell = cellAt(event);
    if (cell) readout.value = words(...cell);
  });
  canvas.addEventListener("pointerleave", () => { readout.value = words(...chosenCell()); });
  canvas.addEventListener("click", (event) => {
    const cell = cellAt(event);
    if (cell) choose(...cell);
  });
  plot.addEventListener("keydown", (event) => {
    const [rows, columns] = size();
    const [r, c] = chosenCell();
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    choose(Math.min(rows - 1, Math.max(0, r + move[0])), Math.min(columns - 1, Math.max(0, c + move[1])));
  });
  const node = figure(title, note, scale ? el("div", {}, scale()) : null, plot, readout, asTable(tableRows));
  queueMicrotask(() => drawn(draw));
  return node;
}

// A strip of colours with its ends in words.
function scaleStrip(low, high, at, range = [0, 1]) {
  const canvas = el("canvas", { width: 150, height: 12, "aria-hidden": "true" });
  drawn(() => {
    const pen = canvas.getContext("2d");
    for (let x = 0; x < 150; x++) {
      pen.fillStyle = `rgb(${at(range[0] + ((range[1] - range[0]) * x) / 149).map(Math.round).join(" ")})`;
      pen.fillRect(x, 0, 1, 12);
    }
  });
  return el("span", { class: "scale" }, low, canvas, high);
}
