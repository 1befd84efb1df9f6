// Every point against the ceilings that were measured on its machine.
const LABEL_HEIGHT = 16;

function buildRoofline(section) {
  const rows = DATA.rows.filter((row) => row.tflops && row.arithmetic_intensity);
  if (!rows.length) {
    section.append(el("p", { class: "soft" }, "No row has a count of floating-point operations."));
    return;
  }
  const runs = Object.fromEntries(DATA.runs.map((run) => [run.name, run]));
  if (!DATA.runs.every((run) => run.peaks))
    section.append(el("p", { class: "soft" },
      "There are no ceilings for ", DATA.runs.filter((run) => !run.peaks).map((run) => run.name).join(", "),
      ": run ", el("code", {}, "mdnbench peaks"), " on that machine, then make the report there again."));
  section.append(el("p", { class: "soft" },
    "Rate of the matrix products against floating-point operations for each byte that has to be moved, both by the ",
    "operators' own counts at the row's chunk size. Ceilings: measured copy bandwidth and matrix rate."));
  const state = { chunk: "fastest" };
  const figure = el("figure", {}), caption = el("figcaption", {});
  section.append(panelChoices(rows, state, () => redraw()), figure);

  function redraw() {
    const shown = pickChunks(rows.filter((row) => inPanel(row, state) && !hidden.has(row.provider)), state.chunk);
    const root = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group", "aria-label": "Roofline" });
    figure.replaceChildren(root, caption);
    caption.textContent = "";
    if (!shown.length) {
      root.append(draw("text", { x: WIDTH / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "nothing to show here"));
      return;
    }
    const dtype = shown[0].dtype;
    const ceilings = unique(shown.map((row) => row.run))
      .map((run) => ({ run, top: runs[run].ceilings[dtype], band: runs[run].peaks?.copy_bytes_per_s }))
      .filter(({ top, band }) => top && band);
    const ridges = ceilings.map(({ top, band }) => top / band);
    const x = axisScale([...shown.map((row) => row.arithmetic_intensity), ...ridges], LEFT, WIDTH - RIGHT, true);
    const tops = ceilings.map(({ top }) => top / 1e12);
    const labels = labelsOf(ceilings, dtype);
    const roof = TOP + LABEL_HEIGHT * Math.max(0, labels.length - 1);
    const y = axisScale([...shown.map((row) => row.tflops), ...tops], HEIGHT - BOTTOM, roof, true);
    axes(root, x, y, "arithmetic intensity (FLOP/byte)", "matrix rate (TFLOP/s)", scaledTick, scaledTick);
    for (const { run, top, band } of ceilings) {
      const from = Math.max(x.low, (y.low * 1e12) / band);
      const corners = [from, top / band, x.high].filter((at) => at >= from);
      const d = corners.map((at) => `${x.map(at)} ${y.map(Math.min(top, at * band) / 1e12)}`).join("L");
      root.append(draw("path", {
        class: "ceiling", d: `M${d}`, "stroke-dasharray": DASHES[runNames.indexOf(run) % DASHES.length],
      }));
    }
    const places = labelPlaces(labels.map(({ top }) => y.map(top / 1e12)));
    labels.forEach(({ runs, text }, i) => root.append(draw("text",
      { class: "tick ceiling-label", x: WIDTH - RIGHT - 6, y: places[i], "text-anchor": "end" },
      runNames.length > 1 ? `${runs.join(", ")}: ${text}` : text)));
    const points = shown.map((row) => {
      const px = x.map(row.arithmetic_intensity), py = y.map(row.tflops), series = `${row.run}\n${row.provider}`;
      const roof = row.percent_of_roofline === null ? null : `${digits(row.percent_of_roofline)} % of the roofline`;
      const lines = [`${digits(row.arithmetic_intensity)} FLOP/byte`, roof, ...tooltipLines(row, "tflops")];
      const node = markerNode(row, px, py, series, [row.provider, ...lines.filter(Boolean)].join(", "));
      root.append(node);
      return { x: px, y: py, series, node, title: row.provider, lines };
    });
    hover(root, points);
    caption.textContent = `${panelTitle(state)}; a point a length.`;
  }
  redraws.push(redraw);
  redraw();
}

// What the ceilings are, from the lowest up; runs whose ceilings read the same share a label.
function labelsOf(ceilings, dtype) {
  const labels = new Map();
  for (const { run, top, band } of ceilings) {
    const text = `${digits(top / 1e12)} TFLOP/s ${dtype}, ${bandwidth(band)} copied`;
    const label = labels.get(text) ?? { text, runs: [], top };
    labels.set(text, { text, runs: [...label.runs, run], top: Math.max(label.top, top) });
  }
  return [...labels.values()].sort((a, b) => a.top - b.top);
}

// Where labels stand above lines at `heights`, from the lowest up: one that the next line would cross goes above that.
function labelPlaces(heights) {
  const groups = [];
  for (const height of heights) {
    const last = groups.at(-1);
    if (last && height > last.line - LABEL_HEIGHT * last.count - 4) {
      last.line = height;
      last.count += 1;
    } else groups.push({ line: height, count: 1 });
  }
  return groups.flatMap(({ line, count }) => Array.from({ length: count }, (_, i) => line - 6 - LABEL_HEIGHT * i));
}
