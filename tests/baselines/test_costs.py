"""Analytic FLOPs and bytes against counted ones: `FlopCounterMode` on the PyTorch providers, and tensors' sizes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mdnbench.baselines.inputs import make_inputs
from mdnbench.baselines.registry import get_provider, operators
from mdnbench.baselines.workload import Workload
from mdnbench.bench.costs import costs, with_costs
from mdnbench.bench.results import Point, Record

SHAPES = [
    {"head_dim_k": 64, "head_dim_v": 64, "chunk_size": 64},
    {"head_dim_k": 32, "head_dim_v": 96, "chunk_size": 32, "batch": 2},
    {"head_dim_k": 96, "head_dim_v": 32, "chunk_size": 128},
    {"head_dim_k": 32, "head_dim_v": 48, "chunk_size": 32, "value_heads": 6},
]


def counted(provider_name: str, workload: Workload) -> dict[str, int]:
    """FLOPs of the matrix products that PyTorch runs, by mode."""
    provider = get_provider(provider_name)
    inputs, d_output = make_inputs(provider.operator, workload, seed=0)
    call = provider.build(workload, inputs)
    with FlopCounterMode(display=False) as forward:
        output = call()
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(output, list(inputs.values()), d_output)
    return {"forward": forward.get_total_flops(), "backward": backward.get_total_flops()}


def solve(w: Workload) -> int:
    """The product with the inverse, which the PyTorch forms do by a triangular solve that PyTorch does not count."""
    return w.chunks * w.value_heads * 2 * w.chunk_size**2 * w.head_dim_v


def without_gradient(w: Workload) -> int:
    """Gradients that nothing asks for, a sequence: that of the state before the first token, which is constant, and
    both of the last write, which no token reads."""
    return 3 * w.batch * w.value_heads * 2 * w.chunk_size * w.head_dim_k * w.head_dim_v


def repeated(w: Workload, products: int) -> int:
    """Products of queries and keys that the PyTorch forms run for each value head in place of each query head."""
    return w.chunks * (w.value_heads - w.heads) * products * 2 * w.chunk_size**2 * w.head_dim_k


@pytest.mark.parametrize("shape", SHAPES)
def test_gated_delta_rule(shape):
    w = Workload(seq_len=256, heads=2, **shape)
    operator, found = get_provider("gdn-torch").operator, counted("gdn-torch", w)
    assert found["forward"] == operator.flops(w, "forward") - solve(w) + repeated(w, products=2)
    # The backward of a solve is another solve, not counted, and the gradient of the matrix, which is a product with as
    # many columns as the right side: K more here, because the PyTorch form solves for V and diag(a) K at once.
    matrix_gradient = w.chunks * w.value_heads * 2 * w.chunk_size**2 * (w.head_dim_k + w.head_dim_v)
    expected = operator.flops(w, "backward") - 2 * solve(w) + matrix_gradient + 2 * repeated(w, products=2)
    assert found["backward"] == expected - without_gradient(w)


@pytest.mark.parametrize("shape", SHAPES)
def test_kimi_delta_attention(shape):
    w = Workload(seq_len=256, heads=2, **shape)
    operator, found = get_provider("kda-torch").operator, counted("kda-torch", w)
    # The PyTorch form halves the chunk until tokens are left, so that it computes the part below the diagonal alone.
    squares = w.chunks * w.value_heads * 2 * 2 * w.chunk_size**2 * w.head_dim_k
    below = squares * (1 - 1 / w.chunk_size) / 2
    assert found["forward"] == operator.flops(w, "forward") - solve(w) - squares + below
    matrix_gradient = w.chunks * w.value_heads * 2 * w.chunk_size**2 * (w.head_dim_k + w.head_dim_v)
    expected = operator.flops(w, "backward") - 2 * solve(w) + matrix_gradient - 2 * (squares - below)
    assert found["backward"] == expected - without_gradient(w)


@pytest.mark.parametrize("shape", SHAPES)
def test_mamba2(shape):
    w = Workload(seq_len=256, heads=2, **shape)
    operator, found = get_provider("mamba2-torch").operator, counted("mamba2-torch", w)
    assert found["forward"] == operator.flops(w, "forward") + repeated(w, products=1)
    assert found["backward"] == operator.flops(w, "backward") + 2 * repeated(w, products=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_momentum_delta_rule(shape):
    w = Workload(seq_len=256, heads=2, **({"value_heads": 4} | shape))
    operator, found = get_provider("mdn-torch").operator, counted("mdn-torch", w)
    heads, c, state = w.chunks * w.value_heads, w.chunk_size, w.head_dim_k * w.head_dim_v
    carry = heads * 2 * 2 * 2 * state  # the 2 x 2 product that carries both states over a chunk
    borders = heads * 2 * ((c + 1) ** 2 * c - c**3)  # G has a row and a column for the state that enters
    assert found["forward"] == operator.flops(w, "forward") + carry + borders
    # Backward computes G, Q K^T, K K^T and the states again; the gradient of the carry and its own carry are two more.
    again = heads * 2 * c**3 + w.chunks * w.heads * 2 * 2 * c * c * w.head_dim_k + heads * 2 * 2 * c * state
    assert found["backward"] == operator.flops(w, "backward") + again + 3 * carry + 3 * borders


def test_attention():
    w = Workload(seq_len=256, head_dim_k=32, head_dim_v=48, batch=2, heads=2, chunk_size=None)
    operator, found = get_provider("attention-sdpa-math").operator, counted("attention-sdpa-math", w)
    # This backend computes all pairs of tokens, of which causality needs (T + 1) / 2T.
    for mode in ("forward", "backward"):
        assert found[mode] * (w.seq_len + 1) == operator.flops(w, mode) * 2 * w.seq_len


@pytest.mark.parametrize("operator", operators(), ids=lambda operator: operator.name)
def test_modes_and_missing_chunk_size(operator):
    w = Workload(seq_len=100, head_dim_k=32, head_dim_v=48, heads=2, value_heads=4, chunk_size=64)
    forward, backward, both = (operator.flops(w, mode) for mode in ("forward", "backward", "forward_backward"))
    assert both == forward + backward == 3 * forward
    unchunked = operator.flops(w.with_(chunk_size=None), "forward")
    assert unchunked == (forward if operator.name == "attention" else None)
    padded = operator.flops(w.with_(seq_len=128), "forward")
    assert padded > forward if operator.name == "attention" else padded == forward


@pytest.mark.parametrize(("name", "chunk_size"), [("mdn-authors", 64), ("gdn-flashqla", 64), ("kda-flashkda", 16)])
def test_a_chunk_size_that_is_built_in_counts_in_new_rows_and_in_stored_ones(name, chunk_size):
    provider = get_provider(name)
    point = Point(name, Workload(1000, 128, 128, chunk_size=None, dtype="bfloat16", device="cuda"), "forward", "eager")
    flops = provider.operator.flops(point.workload.with_(chunk_size=chunk_size), "forward")
    assert costs(provider, point)["flops"] == flops > 0
    stored = Record(point, provider.operator.name, "ok", None, 0, "2026-01-01", samples_ms=(1.0,), bytes=17)
    (record,) = with_costs([stored])
    assert (record.point, record.flops, record.bytes) == (point, flops, 17)


def test_shape_h16d128_of_momentum_delta_rule():
    w = Workload(4096, 128, 128, batch=4, heads=16, dtype="bfloat16")
    operator = get_provider("mdn-torch").operator
    assert operator.flops(w, "forward") == pytest.approx(70.9e9, rel=1e-3)  # 68.7e9 beside G
    assert operator.bytes(w, "forward") == 268_435_456 + 4_194_304  # q, k, v, o, and the four gates


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operator", operators(), ids=lambda operator: operator.name)
def test_bytes_are_those_of_inputs_outputs_and_gradients(operator, dtype):
    w = Workload(100, 32, 48, batch=2, heads=2, value_heads=4, dtype=dtype)
    inputs, output = make_inputs(operator, w, seed=0)
    given = sum(x.nbytes for name, x in inputs.items() if name != "A")  # Mamba-2's A: one number a head
    assert operator.bytes(w, "forward") == given + output.nbytes
    assert operator.bytes(w, "backward") == 2 * given + output.nbytes
    assert operator.bytes(w, "forward_backward") == 3 * given + 2 * output.nbytes
