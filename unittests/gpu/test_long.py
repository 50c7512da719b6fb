"""Attention at long sequences, and on many heads, against float64 on the device, computed in chunks of queries, with
PyTorch's flash way as the peer.
"""

import pytest
import torch
import torch.nn.functional as F
from device import run_attention, torch_dtype
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


def check(actual, inputs, causal=False):
    """Compares the result and the gradients of q, k and v of a head with float64, and 16-bit ones with PyTorch's
    errors.
    """
    dtype = str(inputs[0].dtype).split(".")[1]
    expected = reference(*(t.double() for t in inputs), causal)
    peers = peer(*inputs, causal) if dtype in ("float16", "bfloat16") else [None] * 4
    for name, a, e, p in zip(("out", "d_q", "d_k", "d_v"), actual, expected, peers):
        scale = float(e.abs().max())
        if p is None:
            assert errors(a, e)[0] <= {"float32": 2e-5, "float64": 1e-9}[dtype] * scale, name
        else:
            factor = 2.0 if name == "out" else 3.0
            for own, other in zip(errors(a, e), errors(p, e)):
                assert own <= factor * other, f"{name}: error {own:.3g}, flash {other:.3g}, scale {scale:.3g}"


def draw(seq_len, heads, head_dim, dtype):
    torch.manual_seed(seq_len + head_dim)
    qkv = torch.randn(1, seq_len, 3, heads, head_dim, device="cuda").to(torch_dtype(dtype))
    return qkv, torch.randn(1, seq_len, heads, head_dim, device="cuda").to(torch_dtype(dtype))


@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float32", "float64"))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize(
    "seq_len,head_dim,heads",
    ((4096, 128, 2), (16384, 64, 2), (16384, 128, 2), (16001, 80, 2), (1024, 64, 40), (2048, 128, 40)),
)
def test_long(seq_len, head_dim, heads, causal, dtype):
    qkv, d_out = draw(seq_len, heads, head_dim, dtype)
    out, d_qkv, _ = run_attention(qkv, d_out, causal=causal)
    for head in range(heads):
        inputs = [qkv[0, :, i, head] for i in range(3)] + [d_out[0, :, head]]
        check([out[0, :, head]] + [d_qkv[0, :, i, head] for i in range(3)], inputs, causal)


# Keys are seen from begin to end but for a gap, over more keys than one round brings to shared memory.
@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float32"))
@pytest.mark.parametrize("begin,end", ((0, 9001), (700, 8100), (4200, 4300), (100, 3000)))
@pytest.mark.parametrize("head_dim", (64, 128))
def test_long_key_mask(head_dim, begin, end, dtype):
    qkv, d_out = draw(9001, 1, head_dim, dtype)
    seen = torch.zeros(9001, dtype=torch.bool, device="cuda")
    seen[begin:end] = True
    seen[1000:2500] = False
    mask = torch.zeros(9001, device="cuda").masked_fill_(~seen, float("-inf"))
    out, d_qkv, _ = run_attention(qkv, d_out, mask=mask)
    q, k, v = (qkv[0, :, i, 0] for i in range(3))
    d_q, d_k, d_v = (d_qkv[0, :, i, 0] for i in range(3))
    check([out[0, :, 0], d_q, d_k[seen], d_v[seen]], [q, k[seen], v[seen], d_out[0, :, 0]])
    assert not d_k[~seen].any() and not d_v[~seen].any()
