"""The HTML report: one file without the network, and the data in it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mdnbench.bench.cli import main
from mdnbench.reports import html
from mdnbench.reports.runs import Run, load_run

MakeRun = Callable[..., Run]
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
    assert (data["runs"][0]["peaks"], data["runs"][1]["peaks"]) == (runs[0].environment["peaks"], None)
    assert data["runs"][0]["environment"]["device_name"] == "Some CPU 9000"
    assert not any(name.startswith("peaks") for name in data["runs"][0]["environment"])
    assert {it["mode"]: it["problems"] for it in data["fastest"] if it["run"] == "after"} == {
        "forward": 6,
        "forward_backward": 6,
    }
    assert data["failures"][0]["status"] in ("incorrect", "unsupported")
    assert any("Throttled: 1 of" in note for note in data["notes"])


def test_columns_that_tell_rows_apart_are_shown(make_run: MakeRun) -> None:
    def shown(*runs: Run) -> set[str]:
        return {column["key"] for column in html.to_data(runs)["columns"] if column["shown"]}

    run = make_run("a", providers=("mdn-torch", "gdn-torch"))
    layer = [replace(r, point=replace(r.point, workload=r.point.workload.with_(gates="layer"))) for r in run.records]
    by_provider = [b if a.point.provider == "mdn-torch" else a for a, b in zip(run.records, layer)]
    always = shown(run)
    assert not always & {"dtype", "device", "threads", "gates", "value_heads"}
    assert shown(replace(run, records=[*run.records, layer[0]])) == always | {"gates"}
    assert shown(replace(run, records=by_provider)) == always  # no two rows look alike
    assert shown(run, make_run("b", dtype="bfloat16", device="cuda")) == always | {"dtype", "device"}


def test_when_a_run_was_measured(make_run: MakeRun) -> None:
    run = make_run(providers=("mdn-torch",))
    later = [replace(record, time="2026-02-01T09:00:00.000+00:00") for record in run.records]
    environment = run.environment | {"time": "2026-02-01T09:00:30+00:00"}
    run = replace(run, records=[*later, *run.records], environment=environment)
    (found,) = html.to_data([run])["runs"]
    assert found["measured"] == "2026-01-31 12:00"
    assert "time" not in found["environment"]


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
        "--heads 16 --mode forward --regime graph-warm --seed 3 "
        "--time-limit 0.5 --precision 0.01 --dtype bfloat16 --device cuda --gates log_mu=0/-2"
    )
    assert second["command"] == "mdnbench check --provider mdn-torch --dtype bfloat16 --device cuda --gates log_mu=0/-2"


def test_a_command_has_the_limits_of_its_row_and_the_variable_of_its_provider() -> None:
    record = load_run(PUBLISHED).records[0]
    authors = replace(record, point=replace(record.point, provider="mdn-authors"), time_limit_s=0.25, min_time_s=0.1)
    (row,) = html.to_data([Run("x", [replace(authors, precision=0.005)])])["rows"]
    assert row["command"].startswith("MDNBENCH_AUTHORS_PATH=CHECKOUT mdnbench sweep --provider mdn-authors --seq-len")
    assert " --time-limit 0.25 --min-time 0.1 --precision 0.005 " in row["command"]


def test_a_real_run_makes_a_small_file(tmp_path: Path) -> None:
    assert main(["report", str(PUBLISHED), "--html", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert len(text) < 1_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    data = data_of(text)
    assert len(data["rows"]) == 96
    assert all(row["tflops"] > 0 for row in data["rows"])  # counted now: the rows are older than the counts
    assert all(len(row["samples_shown"]) <= html.MOST_SAMPLES_SHOWN for row in data["rows"])
