"""Figures of compiled code: how listings are counted, how many programs fit, and the inspection of what is shipped."""

from __future__ import annotations

import json
import time

import pytest

from mdnbench.bench import inspection
from mdnbench.bench.cli import main
from mdnbench.bench.code_figures import TARGETS, count_ptx, count_sass, programs_per_multiprocessor

pytest.importorskip("triton")

SASS = """
\tcode for sm_90a
\t\tFunction : some_kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x00000a00ff017b82 */
                                                                             /* 0x000e620000000800 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;          /* 0x0000000402048981 */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64] ; /* 0x0 */
        /*0030*/                   LDGDEPBAR ;                               /* 0x0 */
        /*0040*/              @UP1 UIADD3 UR4, UR4, 0x1, URZ ;               /* 0x0 */
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;             /* 0x0 */
        /*0060*/                   LDSM.16.MT88.4 R4, [R4] ;                 /* 0x0 */
        /*0070*/                   STS.64 [R4], R8 ;                         /* 0x0 */
        /*0080*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8] ; /* 0x0 */
        /*0090*/                   HMMA.1688.F32.TF32 R4, R8, R12, R4 ;      /* 0x0 */
        /*00a0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;           /* 0x0 */
        /*00b0*/                   STL.64 [R1+0x8], R10 ;                    /* 0x0 */
        /*00c0*/                   STG.E desc[UR4][R2.64], R4 ;              /* 0x0 */
        /*00d0*/                   FFMA R3, R4, R5, R6 ;                     /* 0x0 */
        /*00e0*/                   EXIT ;                                    /* 0x0 */
        /*00f0*/                   NOP;                                      /* 0x0 */
"""
PTX = """
.visible .entry some_kernel(
	.param .u64 .ptr .global .align 1 some_kernel_param_0
)
.reqntid 128
{
	.reg .b32 	%r<40>;
$L__BB0_2:
	.loc	1 20 3                          // some.py:20:3
	ld.param.b64 	%rd1, [some_kernel_param_0];
	@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	@!%p2 bra 	$L__BB0_2;
	cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r5;
	cp.async.commit_group;
	cp.async.wait_group 	0;
	bar.sync 	0;
	ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r1, %r2, %r3, %r4}, [%r5];
	st.shared.v2.b32 	[%r6], {%r1, %r2};
	mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1}, {%r2}, {%r3}, {%r4};
	wgmma.fence.sync.aligned;
	{ // begin inline
	.reg .pred p;
	setp.ne.b32 p, %r7, 0;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd2, p, 1, 1;
	}
	st.local.b32 	[%rd3], %r1;
	st.global.b32 	[%rd1], %r1;
	ret;
}
"""


def test_sass_is_counted_by_class() -> None:
    counts, code_bytes = count_sass(SASS)
    assert counts == {
        "tensor_core": 2,
        "shared_memory": 2,
        "global_memory": 3,
        "barriers": 3,
        "local_memory": 1,
        "other": 4,  # LDC, UIADD3, FFMA, EXIT; not NOP
    }
    assert code_bytes == 16 * 16


def test_ptx_is_counted_by_class() -> None:
    assert count_ptx(PTX) == {
        "tensor_core": 2,
        "shared_memory": 2,
        "global_memory": 3,
        "barriers": 4,
        "local_memory": 1,
        "other": 4,  # ld.param, bra, setp, ret
    }


@pytest.mark.parametrize(
    ("target", "registers", "shared_bytes", "num_warps", "programs"),
    [
        ("sm_90", 168, 32768, 4, 3),  # by registers
        ("sm_90", 128, 32768, 4, 4),
        ("sm_90", 129, 32768, 4, 3),  # one register too many
        ("sm_90", 255, 1024, 4, 2),
        ("sm_90", 64, 112164, 4, 2),  # by shared memory
        ("sm_90", 64, 115712, 4, 2),
        ("sm_90", 64, 115713, 4, 1),
        ("sm_90", 255, 232448, 8, 1),
        ("sm_90", 32, 232449, 4, 0),  # does not fit
        ("sm_90", 16, 0, 1, 32),  # by programs
        ("sm_90", 32, 0, 16, 4),  # by warps
        ("sm_89", 32, 0, 16, 3),
        ("sm_80", 64, 81920, 4, 2),
    ],
)
def test_programs_per_multiprocessor(
    target: str, registers: int, shared_bytes: int, num_warps: int, programs: int
) -> None:
    assert programs_per_multiprocessor(TARGETS[target], registers, shared_bytes, num_warps) == programs


def test_what_is_shipped(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every case compiles, within three minutes, to figures that hang together, and the same when compiled again."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as it is where the kernels are tested without a GPU
    file = tmp_path / "folder" / "inspect.json"
    start = time.monotonic()
    assert main(["inspect", "--out", str(file)]) == 0
    assert time.monotonic() - start < 180
    printed = capsys.readouterr().out
    found = inspection.read(file)
    assert f"launches compiled for sm_90 by Triton {found['triton']}, ptxas {found['ptxas']}" in printed
    assert found["target"] == "sm_90"
    assert found["unsupported"] == {}
    assert {launch["case"] for launch in found["launches"]} == {*inspection.CASES, *inspection.tuned_cases(90)}
    kernels = {"gates_fwd", "prepare_fwd", "scan_fwd", "scan_bwd", "matrices_bwd", "states_bwd", "gradients_bwd"}
    kernels = {f"{name}_kernel" for name in kernels | {"gates_bwd", "recurrent_fwd"}}
    assert {launch["kernel"] for launch in found["launches"]} == kernels
    without_products = {"gates_fwd_kernel", "gates_bwd_kernel", "recurrent_fwd_kernel"}
    for launch in found["launches"]:
        sass, ptx = launch["sass"], launch["ptx"]
        assert 16 <= launch["registers"] <= 255
        assert launch["programs_per_multiprocessor"] >= 1
        assert launch["code_bytes"] >= 16 * sum(sass.values())
        assert min(sass["global_memory"], ptx["global_memory"], sass["shared_memory"]) > 0
        assert (launch["stack_bytes"] == 0) == (sass["local_memory"] == 0)
        assert (sass["tensor_core"] > 0) == (ptx["tensor_core"] > 0)
        assert (sass["tensor_core"] > 0) == (launch["kernel"] not in without_products)
        assert launch["case"] in printed
        assert launch["kernel"].removesuffix("_kernel") in printed
    # Compiled again, not taken from Triton's cache.
    monkeypatch.setattr(inspection, "CASES", {"d64": inspection.CASES["d64"]})
    monkeypatch.setattr(inspection, "_TUNED", tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert main(["inspect", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again == found | {"launches": [launch for launch in found["launches"] if launch["case"] == "d64"]}


def test_a_case_that_does_not_fit_the_target_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inspection, "CASES", {name: inspection.CASES[name] for name in ("paper-1.3b, backward", "d64")})
    assert main(["inspect", "--target", "sm_89"]) == 0
    printed = capsys.readouterr().out
    assert "paper-1.3b, backward is not supported: chunk_size=64 with K=256 " in printed
    assert "3 launches compiled for sm_89" in printed


def test_a_case_that_does_not_compile_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {**inspection.CASES["d64"], "dtype": "int32"}
    monkeypatch.setattr(inspection, "CASES", {"broken": broken})
    assert main(["inspect"]) == 4
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("mdnbench: compiling failed: broken, prepare_fwd_kernel: ")
    assert printed.err.count("\n") == 1


def test_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--target", "sm_100"]) == 2
    assert capsys.readouterr().err == (
        "mdnbench: --target 'sm_100' is unknown: choose from sm_80, sm_89, sm_90\n"
    )  # fmt: skip
