"""The HTML report in a real browser, where there is one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from mdnbench.reports import html
from mdnbench.reports.runs import Run, load_run

MakeRun = Callable[..., Run]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
BROWSER = os.environ.get("MDNBENCH_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
PUBLISHED = Path(__file__).parents[2] / "reports/published"

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
const chosen = (section) => all(`#${section} select`).map((select) => select.value);
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
        pick("speed", "shape", "K 32, V 32, B 1, H 2");
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
def test_plots_open_on_the_panel_of_the_first_run_with_most_points(make_run: MakeRun, tmp_path: Path) -> None:
    first = make_run("first", head_dims=((64, 64),), dtype="bfloat16")
    few = make_run("few", head_dims=((32, 32), (64, 128)), seq_lens=(128,), dtype="bfloat16")
    layer = [
        replace(record, point=replace(record.point, workload=record.point.workload.with_(gates="layer")))
        for record in first.records[:9]
    ]
    counted = [replace(r, flops=10**9, bytes=10**7) for r in (*few.records, *layer, *first.records)]
    many = make_run("many", head_dims=((32, 32),), seq_lens=(128, 256, 512, 1024, 2048), dtype="bfloat16")
    found = in_browser(
        html.page([replace(first, records=counted), many]),
        """
        const answer = ["speed", "roofline", "memory"].map((section) => chosen(section).slice(0, 3));
        pick("speed", "shape", "K 32, V 32, B 1, H 2");
        return [...answer, chosen("speed").slice(0, 3)];
        """,
        tmp_path,
    )
    assert found[:3] == [["K 64, V 64, B 1, H 2", "forward_backward", "cpu, bfloat16, gates mild"]] * 3
    assert found[3] == ["K 32, V 32, B 1, H 2", "forward_backward", "cpu, bfloat16, gates mild"]


@needs_browser
def test_labels_of_near_ceilings_stand_apart_in_a_browser(make_run: MakeRun, tmp_path: Path) -> None:
    def with_peaks(name: str, flops_per_s: float, copied: float = 2e10) -> Run:
        run = make_run(name, providers=("mdn-torch",), chunk_sizes=(64,), head_dims=((64, 64),), modes=("forward",))
        counted = [replace(r, flops=10**7 * r.point.workload.seq_len, bytes=10**6) for r in run.records]
        peaks = {"copy_bytes_per_s": copied, "matmul_flops_per_s": {"float32": flops_per_s}}
        return replace(run, records=counted, environment=run.environment | {"peaks": peaks})

    runs = [with_peaks("a", 1e12), with_peaks("b", 1.05e12), with_peaks("c", 1e11, 1e10), with_peaks("d", 1.05e12)]
    found = in_browser(
        html.page(runs),
        """
        const box = (node) => { const {x, y, width, height} = node.getBBox(); return [x, y, x + width, y + height]; };
        return {labels: all("#roofline .ceiling-label").map((node) => [node.textContent, ...box(node)]),
          lines: all("#roofline .ceiling").map((node) => box(node)[1])};
        """,
        tmp_path,
    )
    labels = sorted(found["labels"], key=lambda label: label[2])
    assert [label[0] for label in labels] == [
        "b, d: 1.05 TFLOP/s float32, 20.0 GB/s copied",
        "a: 1.00 TFLOP/s float32, 20.0 GB/s copied",
        "c: 0.100 TFLOP/s float32, 10.0 GB/s copied",
    ]
    assert all(upper[4] <= lower[2] for upper, lower in pairwise(labels))
    assert all(left >= 0 and top >= 0 for _, left, top, _, _ in labels)
    assert not any(top < line < bottom for _, _, top, _, bottom in labels for line in found["lines"])


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
        html.page([load_run(PUBLISHED / "h200-pytorch")]),
        "return [lines('speed'), lines('memory'), shown(), all('#accuracy tbody tr').length];",
        tmp_path,
    )
    assert found == [6, 6, "96 of 96 rows", 6]


@needs_browser
def test_published_runs_of_several_folders_in_a_narrow_browser(tmp_path: Path) -> None:
    folders = [PUBLISHED / "h200", *sorted(path for path in (PUBLISHED / "h100").iterdir() if path.is_dir())]
    found = in_browser(
        html.page([load_run(folder) for folder in folders]),
        """
        const box = document.querySelector("#rows .scroll");
        header("latency_ms").click();
        return {panels: chosen("speed"), keys: all("#rows th").map((th) => th.dataset.key),
          beyond: box.scrollWidth - box.clientWidth, dates: all("#summary .date").map((it) => it.textContent),
          measured: all("#environment td").slice(0, 4).map((td) => td.textContent)};
        """,
        tmp_path,
        "--window-size=1280,900",
    )
    assert found["panels"][0] == "K 256, V 512, B 4, H 6"  # the shape of the first run with most points
    assert found["panels"][3] == "cuda, bfloat16, gates mild"
    assert "gates" in found["keys"]
    assert found["keys"][-2:] == ["status", "flags"]
    assert found["beyond"] <= 0
    assert found["dates"][0] == "2026-11-27 01:00"
    assert found["measured"] == found["dates"]
