// A line plot against sequence length: one panel at a time, values on hover, linear or logarithmic axes.
const WIDTH = 1100, HEIGHT = 430, LEFT = 84, RIGHT = 24, TOP = 20, BOTTOM = 52;

function axisScale(values, from, to, logarithmic, base = 10) {
  let low = Math.min(...values), high = Math.max(...values);
  if (logarithmic) {
    const margin = Math.max(1.08, (high / low) ** 0.05);
    low /= margin; high *= margin;
    const a = Math.log(low), b = Math.log(high);
    const map = (value) => from + ((Math.log(value) - a) / (b - a)) * (to - from);
    return { map, low, high, ticks: base === 2 ? binaryTicks(low, high) : logTicks(low, high) };
  }
  low = Math.min(0, low); high = high > 0 ? high * 1.05 : 1;
  const map = (value) => from + ((value - low) / (high - low)) * (to - from);
  return { map, low, high, ticks: linearTicks(low, high, base === 2 ? 2 ** Math.floor(Math.log2(high / 6)) : null) };
}
function binaryTicks(low, high) {
  for (const step of [1, 2, 3, 5, 10]) {
    const ticks = [];
    for (let power = Math.ceil(Math.log2(low) / step) * step; power <= Math.log2(high); power += step) ticks.push(2 ** power);
    if (ticks.length <= 8) return ticks.length ? ticks : [low, high];
  }
  return [low, high];
}
function logTicks(low, high) {
  for (const steps of [[1, 2, 5], [1, 3], [1]]) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1)
      for (const step of steps) {
        const tick = step * 10 ** power;
        if (tick >= low && tick <= high) ticks.push(tick);
      }
    if (ticks.length <= 8 || steps.length === 1) return ticks.length ? ticks : [low, high];
  }
  return [low, high];
}
function linearTicks(low, high, fixedStep = null) {
  const rough = (high - low) / 6, power = 10 ** Math.floor(Math.log10(rough));
  const step = fixedStep ?? [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high * (1 + 1e-9); i += 1) ticks.push(i * step);
  return ticks;
}

function axes(root, x, y, xTitle, yTitle, xText, yText) {
  const bottom = HEIGHT - BOTTOM;
  for (const tick of y.ticks) {
    root.append(draw("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y.map(tick), y2: y.map(tick) }));
    const at = { class: "tick", x: LEFT - 8, y: y.map(tick) + 4, "text-anchor": "end" };
    root.append(draw("text", at, yText(tick)));
  }
  let last = -Infinity;
  for (const tick of x.ticks) {
    const at = x.map(tick);
    root.append(draw("line", { class: "grid", x1: at, x2: at, y1: TOP, y2: bottom }));
    if (at - last < 42) continue;
    last = at;
    root.append(draw("text", { class: "tick", x: at, y: bottom + 18, "text-anchor": "middle" }, xText(tick)));
  }
  root.append(draw("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: bottom, y2: bottom }));
  root.append(draw("line", { class: "axis", x1: LEFT, x2: LEFT, y1: TOP, y2: bottom }));
  root.append(draw("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 10, "text-anchor": "middle" }, xTitle));
  root.append(draw("text", {
    transform: `translate(18 ${(TOP + bottom) / 2}) rotate(-90)`, "text-anchor": "middle",
  }, yTitle));
}

// The values of a row on hover, the same in all plots.
function tooltipLines(row, key) {
  const low = row.latency_low_ms, high = row.latency_high_ms;
  return [
    runNames.length > 1 ? `run ${row.run}` : null,
    `T ${row.seq_len}${row.chunk_size ? `, chunk size ${row.chunk_size}` : ""}`,
    key && key !== "latency_ms" ? `${DATA.metrics[key].title}: ${withUnit(key, row[key])}` : null,
    `${withUnit("latency_ms", row.latency_ms)}${low ? ` [${digits(low, 4)}, ${digits(high, 4)}]` : ""}, ` +
      `${row.samples} samples`,
    row.max_relative_error === null ? null : `largest relative error ${small(row.max_relative_error)}`,
    row.flags,
  ];
}

// Pointer and keyboard: the nearest point within reach has its values shown and its line in front.
function hover(root, points) {
  function nearest(event) {
    const box = root.getBoundingClientRect();
    const scale = WIDTH / box.width;
    const px = (event.clientX - box.left) * scale, py = (event.clientY - box.top) * scale;
    let best = null, least = 40 ** 2;
    for (const point of points) {
      const distance = (point.x - px) ** 2 + (point.y - py) ** 2;
      if (distance < least) { best = point; least = distance; }
    }
    return best;
  }
  function emphasise(point) {
    for (const node of root.querySelectorAll("[data-series]"))
      node.classList.toggle("faint", point !== null && node.dataset.series !== point.series);
  }
  root.addEventListener("pointermove", (event) => {
    const point = nearest(event);
    emphasise(point);
    point ? showTooltip(event.clientX, event.clientY, point.title, point.lines) : hideTooltip();
  });
  root.addEventListener("pointerleave", () => { emphasise(null); hideTooltip(); });
  for (const point of points) {
    point.node.addEventListener("focus", () => {
      const box = point.node.getBoundingClientRect();
      emphasise(point);
      showTooltip(box.right, box.bottom, point.title, point.lines);
    });
    point.node.addEventListener("blur", () => { emphasise(null); hideTooltip(); });
  }
}

function markerNode(row, x, y, series, text) {
  return draw("path", {
    d: markerPath(row.provider, 5), transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`, "data-series": series,
    fill: row.slowed_by ? "var(--panel)" : colour(row.provider), stroke: colour(row.provider), "stroke-width": 1.6,
    class: "point", tabindex: 0, role: "img", "aria-label": text,
  });
}

function interval(row, key) {
  if (!row.latency_low_ms || !row.latency_high_ms) return null;
  if (key === "latency_ms") return [row.latency_low_ms, row.latency_high_ms];
  if (key !== "tokens_per_s") return null;
  return [row.latency_high_ms, row.latency_low_ms].map((time) => (row.tokens_per_s * row.latency_ms) / time);
}

// One row a length for each line: at the fastest chunk size, or at the one that is chosen.
function pickChunks(rows, chunk) {
  const best = new Map();
  for (const row of rows) {
    if (chunk !== "fastest" && row.chunk_size !== null && String(row.chunk_size) !== chunk) continue;
    const key = `${row.run}\n${row.provider}\n${row.seq_len}`;
    if (!best.has(key) || row.latency_ms < best.get(key).latency_ms) best.set(key, row);
  }
  return [...best.values()];
}

function buildPlot(section, keys) {
  const timed = DATA.rows.filter((row) => row.samples && row.status === "ok");
  const there = keys.filter((key) => timed.some((row) => row[key] !== null && row[key] !== undefined));
  if (!there.length) {
    section.append(el("p", { class: "soft" }, "No row of these runs has such a value."));
    return;
  }
  const state = { metric: there[0], chunk: "fastest", logX: true, logY: true };
  const figure = el("figure", {}), caption = el("figcaption", {});
  const controls = el("div", { class: "controls" });
  const titles = there.map((key) => DATA.metrics[key].title);
  const chunks = unique(timed.map((row) => row.chunk_size).filter(Boolean)).sort((a, b) => a - b).map(String);
  if (there.length > 1)
    controls.append(choice("metric", there, titles, state.metric, (value) => { state.metric = value; redraw(); }));
  if (chunks.length > 1)
    controls.append(choice("chunk size", ["fastest", ...chunks], ["fastest of each length", ...chunks], "fastest",
      (value) => { state.chunk = value; redraw(); }));
  controls.append(toggle("log T", true, (on) => { state.logX = on; redraw(); }));
  const logY = toggle("log values", true, (on) => { state.logY = on; redraw(); });
  logY.dataset.axis = "y";
  controls.append(logY);
  section.append(panelChoices(timed, state, () => redraw()), controls, figure);

  function redraw() {
    const key = state.metric;
    const panel = timed.filter((row) => inPanel(row, state) && !hidden.has(row.provider));
    const rows = pickChunks(panel.filter((row) => row[key] !== null && row[key] !== undefined), state.chunk);
    const root = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group" });
    figure.replaceChildren(root, caption);
    if (!rows.length) {
      root.append(draw("text", { x: WIDTH / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "nothing to show here"));
      caption.textContent = "";
      return;
    }
    const values = rows.map((row) => row[key]);
    const positive = values.every((value) => value > 0);
    const lengths = unique(rows.map((row) => row.seq_len)).sort((a, b) => a - b);
    const x = axisScale(lengths, LEFT + 10, WIDTH - RIGHT - 10, state.logX);
    x.ticks = lengths;
    const y = axisScale(values, HEIGHT - BOTTOM, TOP, state.logY && positive, key.endsWith("_bytes") ? 2 : 10);
    const metric = DATA.metrics[key];
    const unit = key.endsWith("_bytes") ? "" : metric.unit ? ` (${metric.unit})` : "";
    const yText = key.endsWith("_bytes") ? binary : (value) => (value === 0 ? "0" : scaledTick(value));
    axes(root, x, y, "sequence length (tokens)", metric.title + unit, length, yText);
    root.setAttribute("aria-label", `${metric.title} against sequence length`);
    const points = [];
    for (const series of unique(rows.map((row) => `${row.run}\n${row.provider}`))) {
      const line = rows.filter((row) => `${row.run}\n${row.provider}` === series).sort((a, b) => a.seq_len - b.seq_len);
      const place = (row) => [x.map(row.seq_len), y.map(row[key])];
      root.append(draw("path", {
        class: "series", d: `M${line.map((row) => place(row).map((v) => v.toFixed(1)).join(" ")).join("L")}`,
        stroke: colour(line[0].provider), "stroke-dasharray": DASHES[runNames.indexOf(line[0].run) % DASHES.length],
        "data-series": series,
      }));
      for (const row of line) {
        const [px, py] = place(row);
        const bar = interval(row, key);
        if (bar)
          root.append(draw("line", {
            x1: px, x2: px, y1: y.map(bar[0]), y2: y.map(bar[1]), stroke: colour(row.provider), "data-series": series,
          }));
        const lines = tooltipLines(row, key);
        const node = markerNode(row, px, py, series, [row.provider, ...lines.filter(Boolean)].join(", "));
        root.append(node);
        points.push({ x: px, y: py, series, node, title: row.provider, lines });
      }
    }
    hover(root, points);
    caption.textContent = [
      `${panelTitle(state)}.`,
      ["latency_ms", "tokens_per_s"].includes(key) ? "Upright bars: 95 % interval of the median." : "",
      rows.some((row) => row.slowed_by) ? "Open markers: the GPU was held back (power, heat)." : "",
      runNames.length > 1 ? `Lines: ${runNames.map((name, i) => `${["solid", "dashed", "dotted", "dash-dot",
        "long dashes", "wide dots"][i % 6]} ${name}`).join(", ")}.` : "",
    ].filter(Boolean).join(" ");
  }
  redraws.push(redraw);
  redraw();
}
function scaledTick(value) {
  for (const [unit, size] of [["G", 1e9], ["M", 1e6], ["k", 1e3]])
    if (Math.abs(value) >= size) return `${Number((value / size).toPrecision(6))}${unit}`;
  return String(Number(value.toPrecision(6)));
}
