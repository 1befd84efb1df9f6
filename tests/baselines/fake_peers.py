"""The functions that the adapters call, in plain PyTorch, with the arguments and layouts that the packages document.

`peers` in conftest.py installs them under the packages' names, so that what an adapter passes can be checked without
the packages and without a GPU. Token by token, in float32, and strict about what the packages are strict about.
"""

import torch
import torch.nn.functional as F


def _normalised(x):
    return x / (x.float().square().sum(-1, keepdim=True) + 1e-6).sqrt()


def _spread(x, heads):
    assert heads % x.shape[2] == 0
    return x.repeat_interleave(heads // x.shape[2], 2)


def _delta_rule(q, k, v, decay, beta, scale):
    """q, k [B, T, H, K], v [B, T, HV, V], decay [B, T, HV, 1 or K], beta [B, T, HV]."""
    q, k = (_spread(x, v.shape[2]).float() for x in (q, k))
    state, outputs = torch.zeros(*v.shape[:1], v.shape[2], k.shape[-1], v.shape[-1]), []
    for t in range(v.shape[1]):
        state = decay[:, t, :, :, None] * state
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], error)
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1).to(v.dtype)


def fla_gated_delta_rule(q, k, v, g, beta, scale=None, use_qk_l2norm_in_kernel=False, chunk_size=64):
    import fla.ops.common.chunk_o as chunk_o

    assert chunk_size in (16, 32, 64)
    assert g.shape == beta.shape == v.shape[:3]
    if use_qk_l2norm_in_kernel:
        q, k = _normalised(q), _normalised(k)
    o = _delta_rule(q, k, v, g.exp().unsqueeze(-1), beta, scale or k.shape[-1] ** -0.5)

    def refuse(gradient):
        if chunk_o.IS_NVIDIA_HOPPER and chunk_o.TRITON_ABOVE_3_4_0 and not chunk_o.TRITON_ABOVE_3_7_1:
            raise RuntimeError("upgrade Triton")

    if o.requires_grad:
        o.register_hook(refuse)
    return o, None


def flashqla_gated_delta_rule(q, k, v, g, beta, scale=None, use_qk_l2norm_in_kernel=False):
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.shape[-1] == v.shape[-1] == 128
    if use_qk_l2norm_in_kernel:
        q, k = _normalised(q), _normalised(k)
    return _delta_rule(q, k, v, g.exp().unsqueeze(-1), beta, scale or k.shape[-1] ** -0.5), None


def fla_kda(q, k, v, g, beta, scale=None, use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, chunk_size=64):
    assert chunk_size in (32, 64)
    assert not use_gate_in_kernel
    assert g.shape == (*v.shape[:3], k.shape[-1])
    assert beta.shape == v.shape[:3]
    if use_qk_l2norm_in_kernel:
        q, k = _normalised(q), _normalised(k)
    return _delta_rule(q, k, v, g.exp(), beta, scale or k.shape[-1] ** -0.5), None


def flashkda_fwd(
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state=None, final_state=None, cu_seqlens=None
):
    batch, seq_len, heads, head_dim = q.shape
    assert head_dim == 128
    for x in (q, k, v, g, out):
        assert x.shape == q.shape
    assert beta.shape == (batch, seq_len, heads)
    assert A_log.shape == (heads,)
    assert dt_bias.shape == (heads, head_dim)
    assert all(x.dtype == torch.bfloat16 for x in (q, k, v, g, beta, out))
    assert all(x.dtype == torch.float32 for x in (A_log, dt_bias))
    assert all(x.is_contiguous() for x in (q, k, v, g, beta, out, A_log, dt_bias))
    decay = (lower_bound * (A_log.exp()[:, None] * (g + dt_bias)).sigmoid()).exp()
    out.copy_(_delta_rule(_normalised(q), _normalised(k), v, decay, beta.float().sigmoid(), scale))


def momentum_delta_rule(
    q, k, v, log_alpha, log_mu, p=None, beta=None, eta=None, scale=None, initial_state=None, output_final_state=False,
    cu_seqlens=None, use_qk_l2norm_in_kernel=True, use_p_times_alpha=True,
):  # fmt: skip
    """As the authors' `chunk_mode_rule`."""
    p = k if p is None else p
    if use_qk_l2norm_in_kernel:
        q, k, p = _normalised(q), _normalised(k), _normalised(p)
    alpha, mu = log_alpha.exp()[..., None, None], log_mu.exp()[..., None, None]
    p = p * log_alpha.exp().unsqueeze(-1) if use_p_times_alpha else p
    scale = scale or k.shape[-1] ** -0.5
    state = momentum = torch.zeros(*v.shape[:1], *k.shape[2:], v.shape[-1])
    outputs = []
    for t in range(v.shape[1]):
        error = torch.einsum("bhk,bhkv->bhv", p[:, t].float(), state) - v[:, t]
        momentum = mu[:, t] * momentum + torch.einsum("bh,bhk,bhv->bhkv", eta[:, t], k[:, t].float(), error)
        state = alpha[:, t] * state - beta[:, t, :, None, None] * momentum
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t].float(), state))
    return torch.stack(outputs, 1).to(v.dtype), None


def fla_momentum_delta_rule(q, k, v, *args, chunk_size=64, **kwargs):
    assert q.dtype != torch.float32
    assert chunk_size in (16, 32, 64)
    return momentum_delta_rule(q, k, v, *args, **kwargs)


def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False):
    batch, seq_len, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    assert B.shape == C.shape == (batch, seq_len, groups, state_size)
    assert dt.shape == (batch, seq_len, heads)
    assert A.shape == (heads,)
    b, c = _spread(B, heads), _spread(C, heads)
    state, outputs = torch.zeros(batch, heads, head_dim, state_size), []
    for t in range(seq_len):
        write = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t].float(), b[:, t].float())
        state = (dt[:, t] * A).exp()[..., None, None] * state + write
        outputs.append(torch.einsum("bhn,bhpn->bhp", c[:, t].float(), state))
    return torch.stack(outputs, 1).to(x.dtype)


def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # from [B, T, H, D]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale).transpose(1, 2)


def flash_attn_func_with_lse(q, k, v, softmax_scale=None, causal=False):
    return flash_attn_func(q, k, v, softmax_scale, causal), None
