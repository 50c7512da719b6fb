"""Attention at long sequences, and on many heads, against float64 on the device, computed in chunks of queries, with PyTorch's flash
way as the peer."""

import pfa_core
import pytest
import torch
import torch.nn.functional as F
from device import Memory, torch_dtype
from torch.nn.attention import SDPBackend, sdpa_kernel

CHUNK = 1024


def reference(q, k, v, d_out, causal):
    """Result and gradients of q, k, v, [S, D] in float64."""
    length, dim = q.shape
    out = torch.empty_like(q)
    d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for begin in range(0, length, CHUNK):
        rows = slice(begin, min(begin + CHUNK, length))
        scores = (q[rows] * dim**-0.5) @ k.T
        if causal:
            i = torch.arange(rows.start, rows.stop, device="cuda")
            scores.masked_fill_(torch.arange(length, device="cuda")[None, :] > i[:, None], float("-inf"))
        p = scores.softmax(-1)
        out[rows] = p @ v
        d_v += p.T @ d_out[rows]
        d_p = d_out[rows] @ v.T
        d_scores = p * (d_p - (p * d_p).sum(-1, keepdim=True))
        d_q[rows] = d_scores @ k * dim**-0.5
        d_k += d_scores.T @ q[rows] * dim**-0.5
    return out, d_q, d_k, d_v


def peer(q, k, v, d_out, causal):
    tensors = [t[None, None].detach().requires_grad_() for t in (q, k, v)]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(*tensors, is_causal=causal)
    gradients = torch.autograd.grad(out, tensors, d_out[None, None])
    return [t[0, 0] for t in (out, *gradients)]


def errors(actual, expected):
    error = (actual.double() - expected).abs()
    return float(error.max()), float(error.square().mean().sqrt())


@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float32", "float64"))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize(
    "seq_len,head_dim,heads",
    ((4096, 128, 2), (16384, 64, 2), (16384, 128, 2), (16001, 80, 2), (1024, 64, 40), (2048, 128, 40)),
)
def test_long(seq_len, head_dim, heads, causal, dtype):
    memory = Memory()
    torch.manual_seed(seq_len + head_dim)
    qkv = torch.randn(seq_len, 3, heads, head_dim, device="cuda").to(torch_dtype(dtype))
    d_out = torch.randn(seq_len, heads, head_dim, device="cuda").to(torch_dtype(dtype))
    out, d_qkv = memory.empty(d_out.shape, d_out.dtype), memory.empty(qkv.shape, qkv.dtype)
    log_sum_exp = memory.empty((heads, seq_len), torch.float64 if dtype == "float64" else torch.float32)
    config = dict(batch=1, seq_len=seq_len, embed_dim=heads * head_dim, num_heads=heads, head_dim=head_dim)
    block = pfa_core.CudaBlock(dict(config, dtype=dtype, causal=causal))
    tensors = dict(qkv=qkv, attn_out=out, log_sum_exp=log_sum_exp, d_attn_out=d_out, d_qkv=d_qkv, x=d_out, out=out)
    arrays = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    size = max(block.stage_workspace_bytes(dict(arrays, d_x=arrays["x"]), backward) for backward in (False, True))
    arrays["stage_workspace"] = memory.bytes(size).data_ptr()
    stream = torch.cuda.current_stream().cuda_stream
    block.run_stage("attention_forward", arrays, stream)
    block.run_stage("attention_backward", arrays, stream)
    torch.cuda.synchronize()
    memory.check()

    for head in range(heads):
        inputs = [qkv[:, i, head] for i in range(3)] + [d_out[:, head]]
        expected = reference(*(t.double() for t in inputs), causal)
        actual = [out[:, head]] + [d_qkv[:, i, head] for i in range(3)]
        peers = peer(*inputs, causal) if dtype in ("float16", "bfloat16") else [None] * 4
        for name, a, e, p in zip(("out", "d_q", "d_k", "d_v"), actual, expected, peers):
            scale = float(e.abs().max())
            if p is None:
                assert errors(a, e)[0] <= {"float32": 2e-5, "float64": 1e-9}[dtype] * scale, name
            else:
                factor = 2.0 if name == "out" else 3.0
                for own, other in zip(errors(a, e), errors(p, e)):
                    assert own <= factor * other, f"{name}: error {own:.3g}, flash {other:.3g}, scale {scale:.3g}"
