"""Attention of packed sequences as functions: those of ``paddle.nn.functional.flash_attention`` with their signatures,
and ``memory_efficient_attention`` of ``paddle.incubate.nn``, whose masks may stand for packed sequences.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle.incubate.nn import attn_bias as biases

from . import _op
from ._attention_arguments import (
    attend,
    check_all,
    check_starts,
    check_unserved,
    dense,
    from_the_start,
    gather_used,
    heads_of_packed,
    packed,
    scale_of,
    scatter_like,
)
from ._checks import check_count, check_switches, check_tensor, check_window, shown

__all__ = [
    "flash_attn_unpadded",
    "flash_attn_varlen_qkvpacked",
    "memory_efficient_attention",
]


@paddle.jit.not_to_static
def flash_attn_unpadded(
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    cu_seqlens_q: paddle.Tensor,
    cu_seqlens_k: paddle.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None,
    dropout: float = 0.0,
    causal: bool = False,
    return_softmax: bool = False,
    fixed_seed_offset: paddle.Tensor | None = None,
    rng_name: str = "",
    training: bool = True,
    name: str | None = None,
    *,
    window_size: int | tuple[int, int] | None = None,
    seed: int | None = None,
) -> tuple[paddle.Tensor, None]:
    """Attention of sequences of different lengths that follow each other without padding: each query sees the keys of
    its own sequence. The parameters up to ``name`` are those of
    ``paddle.nn.functional.flash_attention.flash_attn_unpadded``.

    Args:
        query: ``[queries of all, num_heads, head_dim]``, float32, float64, float16 or bfloat16.
        key, value: ``[keys of all, num_kv_heads, head_dim]``, dtype of query.
        cu_seqlens_q, cu_seqlens_k: ``[batch + 1]`` int32: where each sequence's queries and keys begin, from 0 on, and
            where the last one's end, which is where the tensors end. A sequence may be empty.
        max_seqlen_q, max_seqlen_k: At least the length of the longest.
        scale: Above 0; None: ``head_dim ** -0.5``.
        dropout, return_softmax, fixed_seed_offset, rng_name, training, name, seed: As in :func:`flash_attention`.
        causal, window_size: As there, by places in a sequence.

    Returns:
        The result, of query's shape and dtype, and None.

    Raises:
        TypeError, ValueError, NotImplementedError: As :func:`flash_attention` does. What cu_seqlens hold is checked on
            the CPU; on a GPU nothing outside the tensors is read or written, whatever they hold.
    """
    check_all(query=query, key=key, value=value, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_unserved(return_softmax=return_softmax)
    longest = check_count("max_seqlen_q", max_seqlen_q), check_count("max_seqlen_k", max_seqlen_k)
    window = check_window("window_size", window_size)
    cu_seqlens = (cu_seqlens_q, cu_seqlens_k)
    description = packed(
        query, key, value, cu_seqlens, longest, scale_of(scale, query), dropout, training, causal, seed, window
    )
    return attend(description, {"dropout_rate": "dropout"}, fixed_seed_offset, rng_name), None


@paddle.jit.not_to_static
def flash_attn_varlen_qkvpacked(
    qkv: paddle.Tensor,
    cu_seqlens_q: paddle.Tensor,
    cu_seqlens_k: paddle.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None,
    dropout: float = 0.0,
    causal: bool = False,
    return_softmax: bool = False,
    fixed_seed_offset: paddle.Tensor | None = None,
    rng_name: str = "",
    varlen_padded: bool = True,
    training: bool = True,
    name: str | None = None,
    *,
    window_size: int | tuple[int, int] | None = None,
    seed: int | None = None,
) -> tuple[paddle.Tensor, None]:
    """:func:`flash_attn_unpadded` of one tensor, with the parameters of
    ``paddle.nn.functional.flash_attn_varlen_qkvpacked`` up to ``name``.

    Args:
        qkv: ``[tokens, num_heads / num_kv_heads + 2, num_kv_heads, head_dim]``, as in :func:`flash_attn_qkvpacked`.
        varlen_padded: If True, tokens is ``batch * max_seqlen_q``: sequence b begins at token ``b * max_seqlen_q``, of
            its tokens as many count as cu_seqlens say it is long, and the others are not computed: they give zeros and
            get zero gradients. If False, the sequences follow each other without padding.

    Returns:
        The result, ``[tokens, num_heads, head_dim]``, and None.

    Raises:
        TypeError, ValueError, NotImplementedError: As :func:`flash_attn_unpadded` does.
    """
    check_all(qkv=qkv, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_unserved(return_softmax=return_softmax)
    check_switches(varlen_padded=varlen_padded)
    longest = check_count("max_seqlen_q", max_seqlen_q), check_count("max_seqlen_k", max_seqlen_k)
    window = check_window("window_size", window_size)
    heads, num_kv_heads = heads_of_packed(qkv, 4)
    query, key, padded = heads, None, None
    if varlen_padded:
        check_starts("cu_seqlens_q", cu_seqlens_q)
        check_starts("cu_seqlens_k", cu_seqlens_k)
        padded = heads[:, : -2 * num_kv_heads]
        query, tokens = gather_used("max_seqlen_q", padded, cu_seqlens_q, longest[0])
        key, _ = gather_used("max_seqlen_k", heads[:, -2 * num_kv_heads :], cu_seqlens_k, longest[1])
    cu_seqlens, scale = (cu_seqlens_q, cu_seqlens_k), scale_of(scale, heads)
    description = packed(
        query, key, None, cu_seqlens, longest, scale, dropout, training, causal, seed, window, num_kv_heads
    )
    names = {"dropout_rate": "dropout", "query": "qkv", "key": "qkv"}
    out = attend(description, names, fixed_seed_offset, rng_name)
    if padded is not None:
        out = scatter_like(padded, tokens, out)
    return out, None


@paddle.jit.not_to_static
def memory_efficient_attention(
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    training: bool = True,
    *,
    window_size: int | tuple[int, int] | None = None,
    seed: int | None = None,
) -> paddle.Tensor:
    """Attention with the parameters of ``paddle.incubate.nn.memory_efficient_attention.memory_efficient_attention``.

    Args:
        query, key, value: As in :func:`scaled_dot_product_attention`, with the batch, which is 1 beside a mask of block
            diagonals.
        attn_bias: A mask as `attn_mask` there, or a LowerTriangularMask (causal as there), with a bias of its own or
            without, BlockDiagonalMask or BlockDiagonalCausalMask of ``paddle.incubate.nn.attn_bias``, or None. The last
            takes sequences of as many keys as queries.
        p: The probability of dropping a weight.
        scale, training, window_size, seed: As there.

    Returns:
        Shape and dtype of query.

    Raises:
        TypeError, ValueError, NotImplementedError: As :func:`scaled_dot_product_attention` does.
    """
    check_all(query=query, key=key, value=value)
    window = check_window("window_size", window_size)
    names = {"dropout_rate": "p", "attn_mask": "attn_bias", "cu_seqlens_q": "attn_bias", "cu_seqlens_k": "attn_bias"}
    if isinstance(attn_bias, biases.BlockDiagonalMask):
        return _of_blocks(query, key, value, attn_bias, p, scale, training, window, seed, names)
    mask, causal, ranges = attn_bias, False, None
    if isinstance(attn_bias, biases.LowerTriangularMask):
        mask = getattr(attn_bias, "_bias", None)
        check_tensor("attn_bias", mask)
        query, key, value, mask, causal, window, ranges = from_the_start(query, key, value, mask, window)
    elif isinstance(attn_bias, biases.AttentionBias):
        raise NotImplementedError(
            f"attn_bias: expected a Tensor, a triangular mask or one of block diagonals without padding, got a "
            f"{type(attn_bias).__name__}"
        )
    description = dense(query, key, value, mask, ranges, scale_of(scale, query), p, training, causal, seed, window)
    return attend(description, names)


def _of_blocks(
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    p: Any,
    scale: Any,
    training: Any,
    window: tuple,
    seed: Any,
    names: dict,
) -> Any:
    """Attention of packed sequences ``[1, tokens, heads, head_dim]``."""
    for name in ("q_seqinfo", "k_seqinfo"):
        if not isinstance(getattr(bias, name), biases.SeqLenInfo):
            raise TypeError(f"attn_bias: expected a SeqLenInfo as its {name}, got {shown(getattr(bias, name))}")
    causal = isinstance(bias, biases.BlockDiagonalCausalMask)
    if causal and bias.q_seqinfo.seqstart_py != bias.k_seqinfo.seqstart_py:
        raise NotImplementedError(
            f"attn_bias: expected sequences of as many keys as queries in a {type(bias).__name__}, got queries that "
            f"begin at {bias.q_seqinfo.seqstart_py} and keys that begin at {bias.k_seqinfo.seqstart_py}"
        )
    _op.check_tensors(("query", "key", "value"), (query, key, value))
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if len(tensor.shape) != 4 or tensor.shape[0] not in (1, -1):
            raise ValueError(f"{name}: expected shape [1, tokens, heads, head_dim], got {list(tensor.shape)}")
    query, key, value = (tensor.squeeze(0) for tensor in (query, key, value))
    cu_seqlens = (bias.q_seqinfo.seqstart, bias.k_seqinfo.seqstart)
    longest = (max(bias.q_seqinfo.max_seqlen, 1), max(bias.k_seqinfo.max_seqlen, 1))
    description = packed(
        query, key, value, cu_seqlens, longest, scale_of(scale, query), p, training, causal, seed, window
    )
    return attend(description, names).unsqueeze(0)
