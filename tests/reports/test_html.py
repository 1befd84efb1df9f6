"""The HTML report: one file without the network, the data in it, and the page in a real browser where there is one."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mdnbench.bench.cli import main
from mdnbench.bench.results import GpuReading
from mdnbench.reports import html
from mdnbench.reports.runs import Run, load_run

MakeRun = Callable[..., Run]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
BROWSER = os.environ.get("MDNBENCH_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
PEAKS = {"copy_bytes_per_s": 4.3e12, "matmul_flops_per_s": {"float32": 5e13, "bfloat16": 7.9e14}}
PUBLISHED = Path(__file__).parents[2] / "reports/published/h200-pytorch"


class Page(HTMLParser):
    """What a document holds: ids, the text of scripts by type, and every attribute that could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.scripts: dict[str, str] = {}
        self.loads: list[tuple[str, str]] = []
        self.open: list[str] = []
        self._script: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes) -> None:
        found = dict(attributes)
        if "id" in found:
            self.ids.append(found["id"])
        self.loads += [(tag, found[name]) for name in ("src", "href", "data", "action") if found.get(name)]
        if tag == "script":
            self._script = found.get("type", "javascript")
            self.scripts[self._script] = ""
        if tag not in ("meta", "link", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"
        if tag == "script":
            self._script = None

    def handle_data(self, data) -> None:
        if self._script is not None:
            self.scripts[self._script] += data


@pytest.fixture
def runs(make_run: MakeRun) -> list[Run]:
    """Two runs with counts, peaks in the first, a throttled row, a failed one and one with hostile text."""
    first, second = make_run("before", dtype="bfloat16"), make_run("after", seq_lens=(256, 512, 1024), dtype="bfloat16")
    records = [replace(r, flops=10**9 * r.point.workload.seq_len, bytes=10**7, precision=0.005) for r in first.records]
    held = (GpuReading("before"), GpuReading("during", 1200, power_w=700.0, slowed_by=("power cap",)))
    records[0] = replace(records[0], gpu=(held,), block_samples=(31,), input_sets=2, stop_reason="time limit")
    wrong = "</script><script>alert(1)</script> <b>o</b> is wrong"
    records[1] = replace(records[1], status="incorrect", reason=wrong, samples_ms=(), latency_ms=None)
    first = replace(first, records=records, environment=first.environment | {"peaks": PEAKS})
    return [first, second]


def data_of(text: str) -> dict:
    return json.loads(Page(text).scripts["application/json"])


def test_the_page_is_whole_and_loads_nothing(runs: list[Run]) -> None:
    text = html.page(runs)
    page = Page(text)
    assert page.open == []
    assert {"summary", "speed", "roofline", "memory", "accuracy", "rows", "environment", "data"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert all(value.startswith("#") and value[1:] in page.ids for _, value in page.loads)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|WebSocket|import\(", text)
    assert set(re.findall(r"https?://[^\s\"'`]+", text)) == {"http://www.w3.org/2000/svg"}  # a name space, not a link
    assert "<!--" not in text  # no placeholder is left


def test_text_of_providers_cannot_end_the_data(runs: list[Run]) -> None:
    text = html.page(runs)
    assert text.count("<script") == 2
    (row,) = [row for row in data_of(text)["rows"] if row["status"] == "incorrect"]
    assert row["reason"] == "</script><script>alert(1)</script> <b>o</b> is wrong"


def test_the_data_hold_every_row_with_flags_and_environment(runs: list[Run]) -> None:
    data = data_of(html.page(runs))
    assert len(data["rows"]) == sum(len(run.records) for run in runs)
    first = data["rows"][0]
    assert first["flags"] == "throttled: power cap, imprecise"
    held = {"sm_clock_mhz": 1200, "power_w": 700.0, "temperature_c": None, "slowed_by": ["power cap"]}
    assert first["gpu_blocks"] == [held]
    assert first["percent_of_roofline"] > 0
    assert first["tolerances"]["o"] == 0.01
    assert first["latency_ms"] == pytest.approx(sorted(runs[0].records[0].samples_ms)[15])
    assert [run["name"] for run in data["runs"]] == ["before", "after"]
    assert data["runs"][0]["throttled"] == 1
    assert (data["runs"][0]["peaks"], data["runs"][1]["peaks"]) == (PEAKS, None)
    assert data["runs"][0]["environment"]["device_name"] == "Some CPU 9000"
    assert not any(name.startswith("peaks") for name in data["runs"][0]["environment"])
    assert {it["mode"]: it["problems"] for it in data["fastest"] if it["run"] == "after"} == {
        "forward": 6,
        "forward_backward": 6,
    }
    assert data["failures"][0]["status"] in ("incorrect", "unsupported")
    assert any("Throttled: 1 of" in note for note in data["notes"])


def test_numbers_that_json_lacks_are_absent(make_run: MakeRun) -> None:
    run = make_run(providers=("mdn-torch",))
    records = [replace(run.records[0], relative_error={"o": float("nan")}), *run.records[1:]]
    data = data_of(html.page([replace(run, records=records)]))
    assert data["rows"][0]["errors"] == {"o": None}
    assert data["accuracy"][0]["errors"]["o"] is None
    assert data["accuracy"][0]["levels"]["o"] == 4


def test_the_command_of_a_row_measures_this_very_row(make_run: MakeRun, capsys) -> None:
    run = make_run(providers=("gdn-torch", "attention-math"), chunk_sizes=(32,), seq_lens=(96,), head_dims=((16, 32),))
    for row, record in zip(html.to_data([run])["rows"], run.records):
        command = row["command"].replace("attention-math", "attention-sdpa-math")  # the name of one that exists
        program, *arguments = shlex.split(command)
        assert program == "mdnbench"
        assert main([*arguments, "--dry-run"]) == 0
        (line, _) = capsys.readouterr().out.splitlines()
        assert line.replace("attention-sdpa-math", "attention-math") == record.point.key


def test_commands_of_gpu_regimes_and_checks() -> None:
    record = load_run(PUBLISHED).records[0]
    point = replace(record.point, regime="graph-warm", workload=record.point.workload.with_(gates="log_mu=0/-2"))
    timed = replace(record, point=point, seed=3)
    checked = replace(timed, samples_ms=(), latency_ms=None)
    first, second = html.to_data([Run("x", [timed, checked])])["rows"]
    assert first["command"] == (
        "mdnbench sweep --provider mdn-torch --seq-len 512 --head-dim 64 --v-head-dim 64 --chunk-size 64 --batch 1 "
        "--heads 16 --mode forward --regime graph-warm --seed 3 --dtype bfloat16 --device cuda --gates log_mu=0/-2"
    )
    assert second["command"] == "mdnbench check --provider mdn-torch --dtype bfloat16 --device cuda --gates log_mu=0/-2"


def test_a_real_run_makes_a_small_file(tmp_path: Path) -> None:
    assert main(["report", str(PUBLISHED), "--html", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert len(text) < 1_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    data = data_of(text)
    assert len(data["rows"]) == 96
    assert all(row["tflops"] > 0 for row in data["rows"])  # counted now: the rows are older than the counts
    assert all(len(row["samples_shown"]) <= html.MOST_SAMPLES_SHOWN for row in data["rows"])


needs_browser = pytest.mark.skipif(
    BROWSER is None, reason=f"needs a browser: {', '.join(BROWSERS[:3])} on PATH, or its path in MDNBENCH_BROWSER"
)
CATCH = """<script>
window.faults = [];
window.addEventListener("error", (event) => faults.push(String(event.message)));
window.addEventListener("unhandledrejection", (event) => faults.push(String(event.reason)));
for (const name of ["error", "warn"]) console[name] = (...words) => faults.push(words.join(" "));
</script>"""
HELPERS = """
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const column = (key) => {
  const at = all("#rows thead th").findIndex((th) => th.dataset.key === key);
  return all("#rows tbody tr.row").map((tr) => tr.children[at].textContent);
};
const header = (key) => document.querySelector(`#rows th[data-key=${key}] button`);
const pick = (section, label, value) => {
  const select = document.querySelector(`#${section} select[aria-label="${label}"]`);
  select.value = value;
  select.dispatchEvent(new Event("change"));
};
const lines = (section) => all(`#${section} .series`).length;
const shown = () => document.querySelector("#rows [role=status]").textContent;
"""


def in_browser(page: str, script: str, folder: Path, *flags: str) -> dict:
    """What `script`, the body of a function, returns in the page opened from a file; with faults and resources."""
    text = page.replace("<head>", f"<head>{CATCH}", 1)
    text = text.replace(
        "</body>",
        f"<script>{HELPERS}\nlet found; try {{ found = (() => {{ {script} }})(); }} catch (fault) {{ faults.push"
        "(String(fault)); }\n"
        "const out = document.createElement('pre'); out.id = 'found';\n"
        "out.textContent = JSON.stringify({found, faults, ready: document.documentElement.dataset.ready,"
        "resources: performance.getEntriesByType('resource').map((it) => it.name)}); document.body.append(out);"
        "</script></body>",
        1,
    )
    file = folder / "page.html"
    file.write_text(text, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--window-size=1300,1600", *flags, "--dump-dom", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'<pre id="found">(.*)</pre>', dom, re.DOTALL)
    assert found, dom[-2000:]
    answer = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert answer["faults"] == []
    assert answer["ready"] == "true"
    assert answer["resources"] == []
    return answer["found"]


@needs_browser
def test_sorting_filtering_and_details_in_a_browser(runs: list[Run], tmp_path: Path) -> None:
    found = in_browser(
        html.page(runs),
        """
        const answer = {rows: shown()};
        header("latency_ms").click();
        answer.up = column("latency_ms");
        answer.sorted = document.querySelector("#rows th[data-key=latency_ms]").ariaSort;
        header("latency_ms").click();
        answer.down = column("latency_ms");
        header("provider").click();
        answer.providers = column("provider");
        pick("rows", "run", "after");
        pick("rows", "mode", "forward");
        answer.filtered = shown();
        const search = document.querySelector("#rows input");
        search.value = "mdn-torch 1024";
        search.dispatchEvent(new Event("input"));
        answer.searched = [shown(), ...new Set(column("provider")), ...new Set(column("seq_len"))];
        const row = document.querySelector("#rows tbody tr.row");
        row.click();
        answer.command = document.querySelector("tr.detail code").textContent;
        answer.details = document.querySelector("tr.detail").textContent;
        answer.dots = all("tr.detail circle").length;
        row.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter"}));
        answer.closed = document.querySelector("tr.detail") === null;
        const before = all("#rows th").length;
        all("#rows button").find((button) => button.textContent === "all columns").click();
        answer.more = all("#rows th").length > before;
        return answer;
        """,
        tmp_path,
    )
    total = sum(len(run.records) for run in runs)
    assert found["rows"] == f"{total} of {total} rows"
    up = [float(text.removesuffix(" !")) for text in found["up"] if text != "-"]
    assert up == sorted(up)
    assert len(up) > 100
    assert found["up"][-1] == "-"
    assert found["down"][-1] == "-"  # what is absent stays at the end
    assert found["down"][0].removesuffix(" !") == found["up"][len(up) - 1].removesuffix(" !")
    assert found["sorted"] == "ascending"
    assert found["providers"] == sorted(found["providers"])
    after_forward = sum(record.point.mode == "forward" for record in runs[1].records)
    assert found["filtered"] == f"{after_forward} of {total} rows"
    assert found["searched"] == [f"4 of {total} rows", "mdn-torch", "1k"]
    assert found["command"].startswith("mdnbench sweep --provider mdn-torch --seq-len 1024 ")
    assert found["dots"] == 31
    assert "Relative errors: o 2.0e-7 (1.0e-2 allowed), dq 4.0e-7 (2.0e-2 allowed)" in found["details"]
    assert found["closed"]
    assert found["more"]


@needs_browser
def test_plots_respond_in_a_browser(runs: list[Run], tmp_path: Path) -> None:
    found = in_browser(
        html.page(runs),
        """
        const answer = {lines: lines("speed"), points: all("#speed .point").length};
        const chip = document.querySelector(".chip[data-provider=mdn-torch]");
        chip.click();
        answer.without = [lines("speed"), lines("memory"), chip.getAttribute("aria-pressed")];
        all("#providers button").find((button) => button.textContent === "none").click();
        answer.none = [lines("speed"), document.querySelector("#speed figure").textContent];
        all("#providers button").find((button) => button.textContent === "all").click();
        const ticks = () => all("#speed svg .tick").map((text) => text.textContent).join(" ");
        const logarithmic = ticks();
        document.querySelector("#speed [data-axis=y]").click();
        answer.linear = [ticks() !== logarithmic, ticks().startsWith("0 ")];
        pick("speed", "metric", "latency_ms");
        answer.title = document.querySelector("#speed svg").getAttribute("aria-label");
        const svg = document.querySelector("#speed svg"), point = document.querySelector("#speed .point");
        const box = point.getBoundingClientRect();
        svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.x + 3, clientY: box.y + 3}));
        const tooltip = document.getElementById("tooltip");
        answer.tooltip = [tooltip.hidden, tooltip.textContent];
        answer.faint = all("#speed .faint").length > 0;
        svg.dispatchEvent(new PointerEvent("pointerleave"));
        answer.left = [tooltip.hidden, all("#speed .faint").length];
        point.dispatchEvent(new FocusEvent("focus"));
        answer.focused = tooltip.hidden;
        pick("speed", "mode", "forward");
        answer.caption = document.querySelector("#speed figcaption").textContent;
        answer.held = all("#speed .point").filter((node) => node.getAttribute("fill") === "var(--panel)").length;
        pick("roofline", "shape", "K 32, V 32, B 1, H 2");
        answer.roof = [all("#roofline .ceiling").length, all("#roofline .point").length > 4];
        return answer;
        """,
        tmp_path,
    )
    providers = 6  # of 8: two do not run on a CPU
    assert found["lines"] == 2 * providers
    assert found["points"] == 2 * providers * 3
    assert found["without"] == [2 * providers - 2, 2 * providers - 2, "false"]
    assert found["none"] == [0, "nothing to show here"]
    assert found["linear"] == [True, True]
    assert found["title"] == "Latency against sequence length"
    assert found["tooltip"][0] is False
    assert re.search(r"run (before|after)T \d+.* ms \[[\d.]+, [\d.]+\], 31 samples", found["tooltip"][1])
    assert found["faint"]
    assert found["left"] == [True, 0]
    assert found["focused"] is False
    assert found["caption"].startswith("K 32, V 32, B 1, H 2, forward, eager calls, cpu, bfloat16, gates mild.")
    assert "solid before, dashed after" in found["caption"]
    assert "Open markers" in found["caption"]
    assert found["held"] == 1
    assert found["roof"] == [1, True]


@needs_browser
@pytest.mark.parametrize(("flag", "theme", "other"), [(0, "dark", "light"), (1, "light", "dark")])
def test_the_theme_is_the_systems_until_it_is_chosen(
    runs: list[Run], tmp_path: Path, flag: int, theme: str, other: str
) -> None:
    found = in_browser(
        html.page(runs),
        """
        const state = () => [document.documentElement.dataset.theme, getComputedStyle(document.body).backgroundColor,
          getComputedStyle(document.querySelector("#speed .series")).stroke];
        const before = state();
        document.getElementById("theme").click();
        return [before, state()];
        """,
        tmp_path,
        f"--blink-settings=preferredColorScheme={flag}",
    )
    (first, ground, stroke), (second, other_ground, other_stroke) = found
    assert (first, second) == (theme, other)
    light, dark = (ground, other_ground) if theme == "light" else (other_ground, ground)
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(20, 23, 27)")
    assert stroke != other_stroke


@needs_browser
def test_checks_alone_make_a_heat_map_and_no_plots(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(providers=("mdn-torch", "gdn-torch"), seq_lens=(257,), head_dims=((64, 64),), chunk_sizes=(64,))
    records = [
        replace(
            record,
            point=replace(record.point, workload=record.point.workload.with_(gates=gates)),
            samples_ms=(),
            latency_ms=None,
            relative_error={"o": 1e-7, "dq": 5e-4 if gates == "mild" else 3e-3},
        )
        for record in run.records
        for gates in ("mild", "layer")
    ]
    found = in_browser(
        html.page([replace(run, records=records)]),
        """
        const answer = {levels: all("#accuracy tbody tr").map((tr) => tr.className + all("td", tr).map((td) =>
          td.textContent + " " + td.className).join("|"))};
        answer.hidden = ["providers", "speed", "roofline", "memory"].map((id) => document.getElementById(id).hidden);
        answer.links = all("nav a").map((link) => link.textContent);
        pick("accuracy", "gates", "layer");
        answer.layer = all("#accuracy tbody tr").length;
        return answer;
        """,
        tmp_path,
    )
    assert found["levels"][0] == "mdn-torch |mild |1.0e-7 number l0|5.0e-4 number l2"
    assert found["levels"][1] == "mdn-torch |layer |1.0e-7 number l0|3.0e-3 number l4"
    assert found["hidden"] == [True] * 4
    assert found["links"] == ["Summary", "Accuracy", "All rows", "Environment"]
    assert found["layer"] == 2


@needs_browser
def test_a_published_run_in_a_browser(tmp_path: Path) -> None:
    found = in_browser(
        html.page([load_run(PUBLISHED)]),
        "return [lines('speed'), lines('memory'), shown(), all('#accuracy tbody tr').length];",
        tmp_path,
    )
    assert found == [6, 6, "96 of 96 rows", 6]
