"""Providers that crash, hang, fill the memory or compute wrongly cost their own point, and no other one."""

import pytest

from mdnbench.bench.results import Record, read_records
from mdnbench.bench.sweep import Progress, SweepSpec, run_sweep

GOOD = ("toy-good", "toy-chunked", "toy-sleeps", "mdn-torch")
EXPECTED = {  # status and what the reason says
    "toy-segfaults": ("crashed", "killed by SIGSEGV during the first call; see worker.log"),
    "toy-quits": ("crashed", "exit code 7 during the first call"),
    "toy-hangs-at-first": (
        "timeout",
        "took longer than the limit of 8 s for set-up: build, first call and check; it was ended during the first call",
    ),
    "toy-hangs-later": (
        "timeout",
        "took longer than the limit of 2.06 s for one block of samples; it was ended during the timed calls",
    ),
    "toy-allocates": ("out_of_memory", "held more than 1.5 GiB of memory; it was ended during the first call"),
    "toy-allocates-at-once": ("out_of_memory", "can't allocate memory"),
    "toy-nan": ("incorrect", "holds NaN or infinity at 64 tokens"),
    "toy-wrong-gradient": ("incorrect", "dlog_alpha has a relative error of 0.01 at 64 tokens, 0.002 is allowed"),
    "toy-drops-gradient": ("incorrect", "dlog_alpha has a relative error of 1 at 64 tokens, 0.002 is allowed"),
    "toy-raises": ("error", "KeyError: 'no such kernel\\nand a second line'"),
    "toy-tuple": ("error", "toy-tuple returned a tuple where the output tensor is due"),
    "toy-exits": ("error", "SystemExit: enough"),
    "toy-missing": ("unsupported", "the package a_package_that_nobody_has is not installed: pip install it"),
    "toy-forward-only": ("unsupported", "has no forward + backward: it offers forward only"),
}
PROVIDERS = ("toy-good", *EXPECTED, *GOOD[1:])
LIMITS = {"setup_limit_s": 8.0, "run_limit_s": 2.0, "memory_limit_bytes": 3 << 29}


@pytest.fixture(scope="module")
def sweep(toy_path, tmp_path_factory):
    """One sweep over all of them: its folder and its progress."""
    folder = tmp_path_factory.mktemp("misbehaving") / "run"
    events: list[Progress] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(toy_path))
        patch.setenv("PYTHONPATH", str(toy_path))
        patch.setenv("OMP_NUM_THREADS", "1")  # tiny tensors; a second thread waits for other tests
        spec = SweepSpec(
            "misbehaving",
            PROVIDERS,
            seq_lens=(64,),
            head_dims=((16, 16),),
            chunk_sizes=(16,),
            modes=("forward_backward",),
            heads=2,
            precision=1e-9,  # never reached: every point uses its time
            time_limit_s=0.3,
            **LIMITS,
        )
        summary = run_sweep(spec, folder, on_event=events.append)
    return folder, summary, events


@pytest.fixture(scope="module")
def records(sweep) -> dict[str, Record]:
    return {record.point.provider: record for record in read_records(sweep[0])}


@pytest.mark.parametrize("provider", EXPECTED)
def test_each_gets_its_status(records, provider: str) -> None:
    record = records[provider]
    status, reason = EXPECTED[provider]
    assert (record.status, reason in record.reason) == (status, True), record.reason
    assert "\n" not in record.reason
    assert "\x1b" not in record.reason
    assert record.latency_ms is None
    assert record.tokens_per_s is None


@pytest.mark.parametrize("provider", GOOD)
def test_every_other_point_is_ok(records, provider: str) -> None:
    record = records[provider]
    assert (record.status, record.reason) == ("ok", None)
    assert len(record.samples_ms) >= 6
    assert min(record.samples_ms) <= record.latency_ms <= max(record.samples_ms)
    assert max(record.relative_error.values()) < 1e-5
    assert record.checked_seq_len == 64
    assert record.peak_memory_bytes > 0
    assert record.threads == 1


def test_no_point_is_lost_and_the_summary_counts_them(sweep, records) -> None:
    _, summary, _ = sweep
    assert set(records) == set(PROVIDERS)
    expected = {"ok": len(GOOD)}
    for status, _ in EXPECTED.values():
        expected[status] = expected.get(status, 0) + 1
    assert summary.statuses == expected
    assert (summary.measured, summary.kept) == (len(PROVIDERS), 0)


def test_wrong_results_keep_their_errors(records) -> None:
    assert records["toy-nan"].relative_error == {"o": None, "dv": None, "dlog_alpha": None}
    errors = records["toy-wrong-gradient"].relative_error
    assert max(errors["o"], errors["dv"]) < 1e-6
    assert errors["dlog_alpha"] == pytest.approx(0.01, rel=1e-3)


def test_what_providers_print_goes_to_the_log(sweep, capfd) -> None:
    log = (sweep[0] / "worker.log").read_text()
    assert "toy-quits was here" in log
    assert "Segmentation fault" in log  # with the stack at which it happened
    out, err = capfd.readouterr()
    assert "toy-quits" not in out + err


def test_others_go_on_without_a_new_check_after_a_worker_is_lost(sweep) -> None:
    *_, events = sweep
    steps = [(event.step, event.point.provider) for event in events]
    lost = steps.index(("finished", "toy-hangs-later"))
    assert ("sampling", "toy-sleeps") in steps[:lost]
    assert ("sampling", "toy-sleeps") in steps[lost:]
    assert steps.count(("preparing", "toy-sleeps")) == 1


def test_providers_of_a_workload_are_sampled_in_turn(sweep) -> None:
    *_, events = sweep
    turns = [event.point.provider for event in events if event.step == "sampling"]
    assert turns[:5] == ["toy-good", "toy-hangs-later", "toy-chunked", "toy-sleeps", "mdn-torch"]
    assert turns[5:7] == ["toy-good", "toy-hangs-later"]


def test_progress_counts_up_to_the_total(sweep) -> None:
    *_, events = sweep
    done = [event.done for event in events if event.step == "finished"]
    assert done == list(range(1, len(PROVIDERS) + 1))
    assert {event.total for event in events} == {len(PROVIDERS)}
    assert events[0].seconds_left > 0
    assert events[-1].seconds_left == 0
    assert all((event.record is None) == (event.step != "finished") for event in events)
