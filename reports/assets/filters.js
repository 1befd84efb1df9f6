// What the plots show: providers by the chips above them; shape, mode and the rest by the selects of each plot.
const hidden = new Set();
const redraws = [];
const redrawAll = () => redraws.forEach((redraw) => redraw());

function shapeOf(row) {
  const heads = row.heads === row.value_heads ? row.heads : `${row.heads}/${row.value_heads}`;
  return `K ${row.head_dim_k}, V ${row.head_dim_v}, B ${row.batch}, H ${heads}`;
}
function settingOf(row) {
  return `${row.device}, ${row.dtype}, gates ${row.gates}`;
}
// Rows that share all of these may stand in one plot.
const DIMENSIONS = [
  { name: "shape", of: shapeOf },
  { name: "mode", of: (row) => row.mode, title: (value) => MODES[value] ?? value,
    order: (a, b) => MODE_ORDER.indexOf(b) - MODE_ORDER.indexOf(a) },
  { name: "regime", of: (row) => row.regime, title: (value) => REGIMES[value] ?? value },
  { name: "setting", of: settingOf },
];

function unique(values) {
  return [...new Set(values)];
}

function choice(label, values, titles, chosen, changed) {
  const select = el("select", { "aria-label": label, onchange: () => changed(select.value) });
  values.forEach((value, i) => select.append(el("option", { value, selected: value === chosen }, titles[i])));
  return el("label", {}, `${label} `, select);
}

function toggle(label, pressed, changed) {
  const button = el("button", { type: "button", "aria-pressed": String(pressed) }, label);
  button.addEventListener("click", () => {
    const now = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(now));
    changed(now);
  });
  return button;
}

// The value of the panel that has most rows of the first run; of several such values the first.
function fullest(rows, of, values) {
  const sizes = {}, most = {};
  for (const row of rows.filter((row) => row.run === rows[0].run)) {
    const panel = DIMENSIONS.map((dimension) => dimension.of(row)).join("\n");
    sizes[panel] = (sizes[panel] ?? 0) + 1;
    most[of(row)] = Math.max(most[of(row)] ?? 0, sizes[panel]);
  }
  return values.reduce((best, value) => (most[value] > (most[best] ?? 0) ? value : best));
}

// The selects that pick one panel out of `rows`; `state` keeps the choices, which stay possible together.
function panelChoices(rows, state, changed) {
  const box = el("div", { class: "controls" });
  function rebuild() {
    box.replaceChildren();
    let left = rows;
    for (const { name, of, title, order } of DIMENSIONS) {
      const values = unique(left.map(of)).sort(order);
      if (!values.includes(state[name])) state[name] = fullest(left, of, values);
      if (unique(rows.map(of)).length > 1) {
        const titles = values.map((value) => (title ? title(value) : value));
        box.append(choice(name, values, titles, state[name], (value) => { state[name] = value; rebuild(); changed(); }));
      }
      left = left.filter((row) => of(row) === state[name]);
    }
  }
  rebuild();
  return box;
}
function inPanel(row, state) {
  return DIMENSIONS.every(({ name, of }) => of(row) === state[name]);
}
function panelTitle(state) {
  return DIMENSIONS.map(({ name, title }) => (title ? title(state[name]) : state[name])).join(", ");
}

function buildProviderChips(section) {
  const timed = new Set(DATA.rows.filter((row) => row.samples).map((row) => row.provider));
  for (const [operator, title] of Object.entries(DATA.operators)) {
    const names = providerNames.filter((name) => DATA.providers[name].operator === operator && timed.has(name));
    if (!names.length) continue;
    const line = el("div", { class: "chips" }, el("span", { class: "group" }, title));
    for (const name of names) {
      const chip = toggle("", true, (shown) => { shown ? hidden.delete(name) : hidden.add(name); redrawAll(); });
      chip.classList.add("chip");
      chip.dataset.provider = name;
      const mark = draw("path", { d: markerPath(name, 5), fill: colour(name), stroke: colour(name) });
      chip.append(draw("svg", { viewBox: "-7 -7 14 14", "aria-hidden": "true" }, mark), name);
      line.append(chip);
    }
    section.append(line);
  }
  const chips = () => [...section.querySelectorAll(".chip")];
  const set = (shown) => {
    chips().forEach((chip) => {
      chip.setAttribute("aria-pressed", String(shown));
      shown ? hidden.delete(chip.dataset.provider) : hidden.add(chip.dataset.provider);
    });
    redrawAll();
  };
  if (timed.size > 1)
    section.append(el("div", { class: "chips" },
      el("button", { type: "button", onclick: () => set(true) }, "all"),
      el("button", { type: "button", onclick: () => set(false) }, "none")));
}
