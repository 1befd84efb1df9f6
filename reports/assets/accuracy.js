// The heat map of relative errors: provider and gate profile against tensor.
const TENSORS = ["o", "dq", "dk", "dv", "dlog_alpha", "dlog_mu", "dbeta", "deta"];
const LEVEL_TITLES = ["below 1 %", "below 10 %", "below half", "up to all", "beyond"];

function buildAccuracy(section) {
  const rows = DATA.accuracy.filter((row) => Object.keys(row.errors).length);
  if (!rows.length) {
    section.append(el("p", { class: "soft" }, "No row of these runs was checked."));
    return;
  }
  const names = unique(rows.flatMap((row) => Object.keys(row.errors)));
  const tensors = [...TENSORS.filter((name) => names.includes(name)), ...names.filter((name) => !TENSORS.includes(name)).sort()];
  section.append(el("p", { class: "soft" },
    "Largest relative error ||x - truth|| / ||truth|| against float64, by what part of the allowed error it is: ",
    ...LEVEL_TITLES.flatMap((title, i) => [el("span", { class: `level l${i}` }, title), " "]),
    unique(rows.map((row) => row.gates)).length < 2
      ? "These runs hold one gate profile; mdnbench check --profiles all --out FOLDER checks all." : ""));
  const several = (key) => unique(rows.map((row) => row[key])).length > 1;
  const keys = ["run", "provider", "gates", "dtype", "device"].filter((key) => key === "provider" || key === "gates" || several(key));
  const body = el("tbody", {});
  const state = { gates: "" };
  const gates = unique(rows.map((row) => row.gates));
  if (gates.length > 1)
    section.append(el("div", { class: "controls" },
      choice("gates", ["", ...gates], ["all", ...gates], "", (value) => { state.gates = value; fillRows(); })));
  function fillRows() {
    body.replaceChildren(...rows.filter((row) => !state.gates || row.gates === state.gates).map((row) =>
      el("tr", {}, ...keys.map((key) => el("td", {}, row[key])), ...tensors.map((name) => {
        if (!(name in row.errors)) return el("td", { class: "number soft" }, "-");
        const error = row.errors[name];
        return el("td", { class: `number l${row.levels[name]}`, title: `${LEVEL_TITLES[row.levels[name]]} of what is allowed` },
          error === null ? "NaN" : small(error));
      }))));
  }
  fillRows();
  const head = [...keys.map((key) => el("th", {}, key)), ...tensors.map((name) => el("th", { class: "number" }, name))];
  section.append(el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...head)), body)));
  const wrong = DATA.accuracy.filter((row) => !["ok", "unsupported"].includes(row.status));
  const reasons = unique(wrong.map((row) => `${row.provider}, gates ${row.gates}: ${row.status}: ${row.reason ?? "no reason given"}`));
  if (reasons.length) section.append(el("ul", {}, ...reasons.map((text) => el("li", {}, text))));
}
