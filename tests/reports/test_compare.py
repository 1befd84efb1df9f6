"""Comparisons as people and machines read them."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from mdnbench.baselines.workload import Workload
from mdnbench.bench.regress import Change, Comparison, Sides, Untimed
from mdnbench.bench.results import Point
from mdnbench.reports import compare


def change(provider: str, verdict: str, ratio: float | None = 1.0, **values) -> Change:
    point = Point(provider, Workload(64, 16, 32, heads=2, chunk_size=32), "forward_backward", "eager")
    times = {"latency_ms": Sides(2.0, 2.0 * ratio), "ratio": ratio, "ratio_low": ratio - 0.01} if ratio else {}
    times |= {"ratio_high": ratio + 0.01, "p_value": 0.004, "limit": 0.03} if ratio else {"latency_ms": Sides(2.0)}
    return Change(point, "mdn", verdict, **times | values)


FOUND = Comparison(
    "main, commit 0123456",
    "working tree",
    0.03,
    [
        change("gdn-torch", "same", 1.002, peak_memory_bytes=Sides(1000, 1000), relative_error=Sides(2e-7, 3e-7)),
        change("mdn-torch", "slower", 1.1, relative_error=Sides(2e-7, 1e-5)),
        change("kda-torch", "gone", None, reason="head: crashed: killed | by SIGSEGV"),
        change("mamba2-torch", "same", 1.0, peak_memory_bytes=Sides(1000, 1000), saved_memory_bytes=Sides(100, 150)),
    ],
    [Untimed(change("gdn-fla", "same").point, "unsupported", "runs on cuda only, not on cpu")],
    ["12 pairs of blocks, 150 s in all."],
)


def test_markdown_shows_what_changed_and_folds_the_rest() -> None:
    text = compare.markdown(FOUND)
    head, _, folded = text.partition("<details>")
    assert head.startswith(
        "**Worse: 1 slower (mdn-torch), 1 gone (kda-torch), 2 same, 1 with more memory (mamba2-torch)**"
    )
    row = next(line for line in head.splitlines() if "| mdn-torch |" in line)
    assert "| +10.0% [+9.0%, +11.0%] |" in row
    assert "2.0e-7 to 1.0e-5" in row
    assert "| +50.0% |" in next(line for line in head.splitlines() if "| mamba2-torch |" in line)
    assert "gdn-torch" not in head
    assert "| gdn-torch |" in folded
    assert "- 1 gone: kda-torch: head: crashed: killed | by SIGSEGV" in folded
    assert "- 1 unsupported, no time on either side: gdn-fla: runs on cuda only, not on cpu" in folded
    assert "12 pairs of blocks" in folded
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count(" | ") for line in tables[:5]}) == 1


def test_the_terminal_ends_with_the_verdict() -> None:
    console = Console(file=io.StringIO(), width=400, _environ={})
    compare.show(console, FOUND)
    lines = console.file.getvalue().splitlines()
    assert lines[0].rstrip() == "Base: main, commit 0123456"
    assert lines[-1].startswith("Worse: 1 slower (mdn-torch)")
    assert [line.split()[0] for line in lines[4:8]] == ["same", "slower", "gone", "same"]  # more memory comes first


def test_json_has_every_number_and_nothing_that_json_lacks() -> None:
    content = json.loads(json.dumps(compare.to_json(FOUND), allow_nan=False))
    assert content["exit_code"] == 1
    slow = content["changes"][1]
    assert (slow["provider"], slow["verdict"], slow["base_latency_ms"]) == ("mdn-torch", "slower", 2.0)
    assert slow["head_latency_ms"] == pytest.approx(2.2)
    assert content["changes"][2]["ratio"] is None
    assert content["changes"][3]["more_memory"] is True
    assert content["untimed"][0]["status"] == "unsupported"


@pytest.mark.parametrize(
    ("verdicts", "code", "words"),
    [
        (["same", "new"], 0, "Not slower: 1 new"),
        (["faster"], 0, "Not slower: 1 faster"),
        (["same", "undecided"], 3, "Undecided: 1 undecided"),
        (["undecided", "slower"], 1, "Worse: 1 slower"),
        (["gone"], 1, "Worse: 1 gone"),
    ],
)
def test_the_verdict_line_goes_with_the_exit_code(verdicts: list[str], code: int, words: str) -> None:
    found = Comparison("a", "b", 0.03, [change("mdn-torch", verdict) for verdict in verdicts])
    assert found.exit_code == code
    assert compare.verdict_line(found).startswith(words)
    assert compare.markdown(found).startswith(f"**{words}")
