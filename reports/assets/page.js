// The sections of the page, in order.
function simpleTable(header, rows) {
  const numeric = header.map((_, i) => rows.every((row) => typeof row[i] === "number"));
  const line = (tag, values) => el("tr", {}, ...values.map((value, i) =>
    el(tag, { class: numeric[i] ? "number" : String(value).length > 60 ? "wrap" : null }, String(value ?? "-"))));
  return el("div", { class: "scroll" },
    el("table", {}, el("thead", {}, line("th", header)), el("tbody", {}, ...rows.map((row) => line("td", row)))));
}

function buildSummary(section) {
  const cards = el("div", { class: "cards" });
  for (const run of DATA.runs) {
    const counts = Object.entries(run.counts).map(([status, count]) => `${count} ${status}`).join(", ");
    cards.append(el("div", { class: "card" },
      el("h3", {}, run.name, " ", el("span", { class: "soft date" }, run.measured)),
      el("div", {}, run.description),
      el("div", { class: "soft" }, `Every row: ${run.shared}`),
      el("div", {}, `${counts}; ${run.timed} timed`),
      run.throttled ? el("div", { class: "warn" }, `${run.throttled} rows while the GPU was held back`) : null));
  }
  section.append(cards);
  if (DATA.fastest.length) {
    section.append(el("h3", {}, "Fastest at how many problems"), el("p", { class: "soft" },
      "A problem is one shape, length, dtype and gate profile that two providers or more have a time of; by medians, ",
      "whatever operator they compute."));
    section.append(simpleTable(["run", "mode", "regime", "problems", "fastest at"], DATA.fastest.map((it) => [
      it.run, MODES[it.mode], REGIMES[it.regime] ?? it.regime, it.problems,
      Object.entries(it.wins).map(([name, count]) => `${name} ${count}`).join(", "),
    ])));
  }
  if (DATA.notes.length) {
    const heading = `Notes on the measurements (${DATA.notes.length})`;
    section.append(el("h3", {}, heading), el("ul", {}, ...DATA.notes.map((text) => el("li", {}, text))));
  }
  if (DATA.failures.length)
    section.append(el("h3", {}, "Without a time"), simpleTable(["status", "points", "providers", "reason"],
      DATA.failures.map((it) => [it.status, it.count, it.providers.join(", "), it.reason])));
}

function buildEnvironment(section) {
  const keys = unique(DATA.runs.flatMap((run) => Object.keys(run.environment)));
  if (!keys.length) {
    section.append(el("p", { class: "soft" }, "These runs hold no environment.json."));
    return;
  }
  if (DATA.runs.length > 1) section.append(el("p", { class: "soft" }, "What differs between the runs is bold."));
  const facts = [["measured (UTC)", DATA.runs.map((run) => run.measured)],
    ...keys.map((key) => [key, DATA.runs.map((run) => run.environment[key])])];
  const body = facts.map(([key, values]) => {
    const differs = unique(values.map(String)).length > 1;
    return el("tr", { class: differs ? "differs" : null }, el("th", { scope: "row" }, key),
      ...values.map((value) => el("td", {}, value === null || value === undefined ? "-" : String(value))));
  });
  const head = el("tr", {}, el("th", {}, ""), ...runNames.map((name) => el("th", {}, name)));
  section.append(el("div", { class: "scroll" }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...body))));
  const peaks = DATA.runs.filter((run) => run.peaks);
  if (peaks.length)
    section.append(el("h3", {}, "Measured peaks"), simpleTable(["run", "quantity", "rate"], peaks.flatMap((run) => [
      [run.name, "copy, read and written", bandwidth(run.peaks.copy_bytes_per_s)],
      ...Object.entries(run.peaks.matmul_flops_per_s).map(([dtype, rate]) =>
        [run.name, `matrix product, ${dtype}`, `${digits(rate / 1e12)} TFLOP/s`]),
    ])));
}

applyTheme();
document.getElementById("title").textContent = DATA.title;
const at = (id) => document.getElementById(id);
buildSummary(at("summary"));
if (DATA.rows.some((row) => row.samples)) {
  buildProviderChips(at("providers"));
  buildPlot(at("speed"), DATA.speed);
  buildRoofline(at("roofline"));
  buildPlot(at("memory"), DATA.memory);
} else { // checks alone: nothing to plot
  for (const id of ["providers", "speed", "roofline", "memory"]) {
    at(id).hidden = true;
    document.querySelector(`nav a[href="#${id}"]`)?.remove();
  }
}
buildAccuracy(at("accuracy"));
buildTable(at("rows"));
buildEnvironment(at("environment"));
document.documentElement.dataset.ready = "true";
