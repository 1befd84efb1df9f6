// The table of rows: sorted by a click on a header, filtered by words and selects; a click on a row opens its details.
const FILTERED = ["run", "operator", "provider", "mode", "regime", "status"];

function buildTable(section) {
  const state = { key: null, down: false, words: [], all: false, chosen: {} };
  const table = el("table", {}), body = el("tbody", {}), count = el("span", { class: "soft", role: "status" });
  const search = el("input", {
    type: "search", placeholder: "filter: words, such as mdn 512", "aria-label": "filter rows by words",
    oninput: () => { state.words = search.value.toLowerCase().split(/\s+/).filter(Boolean); fillBody(); },
  });
  const controls = el("div", { class: "controls" }, search);
  for (const key of FILTERED) {
    const values = unique(DATA.rows.map((row) => row[key]));
    if (values.length < 2) continue;
    controls.append(choice(key, ["", ...values], ["all", ...values], "", (value) => {
      state.chosen[key] = value;
      fillBody();
    }));
  }
  controls.append(toggle("all columns", false, (on) => { state.all = on; fillAll(); }));
  controls.append(el("button", { type: "button", onclick: downloadCsv }, "CSV"), count);
  section.append(el("p", { class: "soft" },
    "A click on a header sorts, a click on a row opens its samples, GPU readings, notes and the command that measures " +
    "it again."), controls, el("div", { class: "scroll" }, table));

  const empty = (value) => value === null || value === undefined;
  function columns() {
    const usable = DATA.columns.filter(({ key }) => DATA.rows.some((row) => !empty(row[key])));
    if (state.all) return usable;
    const constant = (key) => key !== "provider" && unique(DATA.rows.map((row) => row[key])).length < 2;
    return usable.filter(({ key, shown, numeric }) => shown && !((!numeric || isShape(key)) && constant(key)));
  }
  const isShape = (key) => ["batch", "heads", "value_heads", "head_dim_k", "head_dim_v", "chunk_size"].includes(key);
  const textOf = (row) => DATA.columns.map(({ key }) => `${key === "seq_len" ? row[key] : ""} ${plain(key, row[key])}`)
    .join(" ").toLowerCase();
  const texts = new Map(DATA.rows.map((row) => [row, textOf(row)]));

  function rowsNow() {
    const rows = DATA.rows.filter((row) =>
      state.words.every((word) => texts.get(row).includes(word)) &&
      FILTERED.every((key) => !state.chosen[key] || row[key] === state.chosen[key]));
    if (state.key === null) return rows;
    const sign = state.down ? -1 : 1;
    return rows.sort((a, b) => {
      const [x, y] = [a[state.key], b[state.key]];
      if (empty(x) || empty(y)) return empty(x) - empty(y); // what is absent stays at the end
      return sign * (typeof x === "number" ? x - y : String(x).localeCompare(String(y)));
    });
  }

  function fillAll() {
    const head = el("tr", {});
    for (const { key, title, numeric } of columns()) {
      const sorted = state.key === key ? (state.down ? "descending" : "ascending") : "none";
      const button = el("button", { type: "button", onclick: () => sortBy(key) },
        title.replace("/", "\u200b/")); // may break there
      head.append(el("th", { scope: "col", class: numeric ? "number" : null, "aria-sort": sorted, "data-key": key }, button));
    }
    table.replaceChildren(el("thead", {}, head), body);
    fillBody();
  }
  function sortBy(key) {
    state.down = state.key === key ? !state.down : false;
    state.key = key;
    for (const th of table.querySelectorAll("th"))
      th.setAttribute("aria-sort", th.dataset.key === key ? (state.down ? "descending" : "ascending") : "none");
    fillBody();
  }
  function fillBody() {
    const rows = rowsNow(), shown = columns();
    body.replaceChildren(...rows.map((row) => rowNode(row, shown)));
    count.textContent = `${rows.length} of ${DATA.rows.length} rows`;
  }
  function rowNode(row, shown) {
    const node = el("tr", { class: "row", tabindex: 0, "aria-expanded": "false" });
    for (const { key, numeric } of shown) {
      const mark = key === "latency_ms" && row.slowed_by ? " !" : "";
      const tone = key === "flags" ? "warn" : key === "status" && !["ok", "unsupported"].includes(row.status) ? "bad" : "";
      node.append(el("td", { class: `${numeric ? "number" : ""} ${tone}`.trim() || null, "data-key": key },
        plain(key, row[key]) + mark));
    }
    const flip = () => {
      const open = node.classList.toggle("open");
      node.setAttribute("aria-expanded", String(open));
      if (open) node.after(el("tr", { class: "detail" }, el("td", { colspan: shown.length }, ...details(row))));
      else node.nextSibling.remove();
    };
    node.addEventListener("click", flip);
    node.addEventListener("keydown", (event) => {
      if (event.target === node && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); flip(); }
    });
    return node;
  }
  function downloadCsv() {
    const quote = (value) => (empty(value) ? "" : `"${String(value).replaceAll('"', '""')}"`);
    const lines = [DATA.columns.map(({ key }) => key), ...rowsNow().map((row) => DATA.columns.map(({ key }) => row[key]))];
    const text = lines.map((line) => line.map(quote).join(",")).join("\n");
    const link = el("a", { href: URL.createObjectURL(new Blob([text], { type: "text/csv" })), download: "rows.csv" });
    link.click();
    URL.revokeObjectURL(link.href);
  }
  fillAll();
}

function details(row) {
  const parts = [];
  const paragraph = (title, ...children) => parts.push(el("p", {}, el("b", {}, `${title} `), ...children));
  paragraph("Measure it again:", el("code", {}, row.command), " ", copyButton(row.command));
  if (row.reason) paragraph(row.status, row.reason);
  if (row.samples)
    paragraph("Sampling:", `${row.samples} samples${row.stop_reason ? `, stopped by: ${row.stop_reason}` : ""}` +
      `${row.input_sets ? `, ${row.input_sets} set${row.input_sets > 1 ? "s" : ""} of inputs` : ""}, ` +
      `${row.cache} cache, seed ${row.seed}, ${row.time}`);
  for (const text of row.advice) parts.push(el("p", { class: "warn" }, text));
  if (row.notes) paragraph("Note:", row.notes);
  if (row.errors) {
    const text = Object.entries(row.errors).map(([name, error]) =>
      `${name} ${error === null ? "NaN" : small(error)} (${small(row.tolerances[name])} allowed)`);
    paragraph("Relative errors:", `${text.join(", ")}; checked at ${row.checked_seq_len} tokens`);
  }
  if (row.samples_shown.length > 1) parts.push(strip(row));
  if (row.gpu_blocks.length)
    paragraph("GPU while sampling:", row.gpu_blocks.map((it, i) => [
      `block ${i + 1}:`, it.sm_clock_mhz && `${it.sm_clock_mhz} MHz`, it.power_w && `${it.power_w} W`,
      it.temperature_c && `${it.temperature_c} °C`, it.slowed_by.join(" and "),
    ].filter(Boolean).join(" ")).join("; "));
  return parts;
}

// Samples in the order taken, the median as a line.
function strip(row) {
  const width = 640, height = 70, samples = row.samples_shown;
  const low = Math.min(...samples), high = Math.max(...samples), span = high - low || 1;
  const y = (value) => 8 + (1 - (value - low) / span) * (height - 16);
  const x = (i) => 100 + (i / Math.max(1, samples.length - 1)) * (width - 120);
  const root = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": "samples in order" });
  root.append(draw("line", { class: "grid", x1: 94, x2: width - 10, y1: y(row.latency_ms ?? low), y2: y(row.latency_ms ?? low) }));
  samples.forEach((value, i) => root.append(draw("circle", { cx: x(i), cy: y(value), r: 2.2, fill: colour(row.provider) })));
  root.append(draw("text", { class: "tick", x: 88, y: 14, "text-anchor": "end" }, `${digits(high, 4)}`));
  root.append(draw("text", { class: "tick", x: 88, y: height - 6, "text-anchor": "end" }, `${digits(low, 4)} ms`));
  return root;
}

function copyButton(text) {
  const button = el("button", { type: "button" }, "copy");
  button.addEventListener("click", async (event) => {
    event.stopPropagation();
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "copied";
    } catch {
      const selection = getSelection(), range = document.createRange();
      range.selectNodeContents(button.previousElementSibling);
      selection.removeAllRanges();
      selection.addRange(range);
      button.textContent = "selected: copy it by keyboard";
    }
  });
  return button;
}
