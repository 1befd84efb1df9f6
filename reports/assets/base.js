// Elements, number formats, colours and the theme.
const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const MODES = { forward: "forward", backward: "backward", forward_backward: "forward + backward" };
const SHORT_MODES = { forward: "fwd", backward: "bwd", forward_backward: "fwd+bwd" };
const MODE_ORDER = Object.keys(MODES);
const REGIMES = {
  eager: "eager calls", graph: "CUDA graph", "eager-warm": "eager calls, warm L2", "graph-warm": "CUDA graph, warm L2",
};

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

function digits(value, count = 3) {
  if (value === 0) return "0";
  const size = Math.floor(Math.log10(Math.abs(value)));
  return value.toFixed(Math.max(0, Math.min(8, count - 1 - size)));
}
function scaled(value) {
  for (const [unit, size] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]])
    if (Math.abs(value) >= size * 0.9995) return digits(value / size) + unit;
  return digits(value);
}
const bandwidth = (value) => scaled(value).replace(/([TGMk]?)$/, " $1B/s");
function binary(value) {
  for (const [unit, size] of [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]])
    if (value >= size) return `${Number(digits(value / size))} ${unit}`;
  return `${value} B`;
}
function length(value) {
  for (const [unit, size] of [["M", 2 ** 20], ["k", 2 ** 10]])
    if (value >= size && value % size === 0) return `${value / size}${unit}`;
  return String(value);
}
function small(value) {
  if (value === 0) return "0";
  const [mantissa, exponent] = value.toExponential(1).split("e");
  return `${mantissa}e${Number(exponent)}`;
}

// How a value of a metric reads: with its unit in plots, without it in the table, whose header names it.
const PLAIN = {
  latency_ms: (x) => digits(x, 4), tokens_per_s: scaled, max_relative_error: small,
  peak_memory_bytes: (x) => digits(x / 2 ** 20), saved_memory_bytes: (x) => digits(x / 2 ** 20), seq_len: length,
  sm_clock_mhz: (x) => x.toFixed(0), half_width_percent: (x) => digits(x, 2),
};
function plain(key, value) {
  if (value === null || value === undefined) return "-";
  if (key === "mode") return SHORT_MODES[value] ?? value;
  if (typeof value !== "number") return String(value);
  if (PLAIN[key]) return PLAIN[key](value);
  if (Number.isInteger(value)) return String(value);
  return Math.abs(value) < 1e-3 ? small(value) : digits(value);
}
function withUnit(key, value) {
  if (value === null || value === undefined) return "-";
  if (key.endsWith("_bytes")) return binary(value);
  const unit = DATA.metrics[key]?.unit;
  return plain(key, value) + (unit ? (unit === "%" ? " %" : ` ${unit}`) : "");
}

const runNames = DATA.runs.map((run) => run.name);
const providerNames = Object.keys(DATA.providers);
const colour = (provider) => `var(--p${providerNames.indexOf(provider)})`;
const DASHES = ["", "7 4", "2 3", "9 3 2 3", "14 4", "1 5"];

const MARKERS = [
  (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`,
  (r) => polygon([[-1, -1], [1, -1], [1, 1], [-1, 1]], r * 0.9),
  (r) => polygon([[0, -1.2], [1.1, 0.9], [-1.1, 0.9]], r),
  (r) => polygon([[0, -1.3], [1.1, 0], [0, 1.3], [-1.1, 0]], r),
  (r) => polygon([[0, 1.2], [1.1, -0.9], [-1.1, -0.9]], r),
  (r) => polygon(cross(), r * 1.1),
  (r) => polygon(cross().map(([x, y]) => [(x - y) * 0.71, (x + y) * 0.71]), r * 1.1),
  (r) => polygon(star(5, 0.5), r * 1.35),
  (r) => polygon([[-1.2, 0], [0.9, 1.1], [0.9, -1.1]], r),
  (r) => polygon([[1.2, 0], [-0.9, 1.1], [-0.9, -1.1]], r),
  (r) => polygon(star(6, 0.87), r * 1.1),
  (r) => polygon(star(5, 0.81), r * 1.15),
];
function polygon(points, r) {
  return `M${points.map(([x, y]) => `${(x * r).toFixed(2)} ${(y * r).toFixed(2)}`).join("L")}Z`;
}
function cross() {
  const a = 0.38;
  return [[-a, -1], [a, -1], [a, -a], [1, -a], [1, a], [a, a], [a, 1], [-a, 1], [-a, a], [-1, a], [-1, -a], [-a, -a]];
}
function star(tips, inner) {
  return Array.from({ length: 2 * tips }, (_, i) => {
    const r = i % 2 ? inner : 1, angle = (Math.PI * i) / tips;
    return [r * Math.sin(angle), -r * Math.cos(angle)];
  });
}
function markerPath(provider, r) {
  return MARKERS[DATA.providers[provider].marker % MARKERS.length](r);
}

// Theme: the system's, until the button is used.
const dark = window.matchMedia("(prefers-color-scheme: dark)");
let chosenTheme = null;
function applyTheme() {
  const theme = chosenTheme ?? (dark.matches ? "dark" : "light");
  document.documentElement.dataset.theme = theme;
  document.documentElement.style.colorScheme = theme;
  document.getElementById("theme").textContent = theme === "dark" ? "Light theme" : "Dark theme";
  providerNames.forEach((name, i) => {
    document.documentElement.style.setProperty(`--p${i}`, DATA.providers[name][theme]);
  });
}
document.getElementById("theme").addEventListener("click", () => {
  chosenTheme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  applyTheme();
});
dark.addEventListener("change", applyTheme);

const tooltip = document.getElementById("tooltip");
function showTooltip(x, y, title, lines) {
  tooltip.replaceChildren(el("b", {}, title), ...lines.filter(Boolean).map((line) => el("div", {}, line)));
  tooltip.hidden = false;
  const box = tooltip.getBoundingClientRect();
  tooltip.style.left = `${Math.max(4, Math.min(x + 14, window.innerWidth - box.width - 8))}px`;
  tooltip.style.top = `${Math.max(4, Math.min(y + 14, window.innerHeight - box.height - 8))}px`;
}
const hideTooltip = () => { tooltip.hidden = true; };
