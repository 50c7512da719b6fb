"""Attention of queries, keys and values as functions: those of ``paddle.nn.functional`` and
``paddle.nn.functional.flash_attention`` with their signatures, on this package's operator. The packed ones are in
varlen_functional.py.

On the CPU too, in float32 and float64 as well as in 16 bits, with heads in groups (query head h reads head
``h // (num_heads / num_kv_heads)`` of keys and values) and without storing scores. What Paddle's functions have no
argument for, each takes by keyword: `window_size`, `seed`, and a scale.
"""

from __future__ import annotations

from typing import Literal

import paddle

from . import _op
from ._attention_arguments import (
    attend,
    check_all,
    check_unserved,
    dense,
    from_the_start,
    heads_of_packed,
    scale_of,
)
from ._checks import check_switches, check_window, shown

__all__ = [
    "flash_attention",
    "flash_attn_qkvpacked",
    "flashmask_attention",
    "scaled_dot_product_attention",
]


@paddle.jit.not_to_static
def scaled_dot_product_attention(
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    attn_mask: paddle.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    training: bool = True,
    backend: Literal["p2p"] | None = None,
    scale: float | None = None,
    enable_gqa: bool = True,
    name: str | None = None,
    *,
    window_size: int | tuple[int, int] | None = None,
    seed: int | None = None,
) -> paddle.Tensor:
    """``dropout(softmax(scale * query @ key^T + attn_mask)) @ value``, differentiable, in dygraph and in static graphs.

    The parameters up to ``name`` are those of ``paddle.nn.functional.scaled_dot_product_attention`` of Paddle 3.3.

    Args:
        query: ``[batch, queries, num_heads, head_dim]``, or without the batch; float32, float64, float16 or bfloat16.
            On GPUs head_dim is at most 256.
        key, value: ``[batch, keys, num_kv_heads, head_dim]``, or without the batch, dtype of query; num_kv_heads
            divides num_heads.
        attn_mask: Any shape that broadcasts to ``[batch, num_heads, queries, keys]`` as NumPy's do, read in place. A
            float mask, of any float dtype, is added to the scores and gets a gradient if it wants one; True or a
            nonzero integer keeps a key and False or 0 hides it, as -inf does. A query that may see no key gives zeros.
        dropout_p: The probability of dropping a weight, in [0, 1], exact to 2^-16. What is kept is divided by
            ``1 - dropout_p``.
        is_causal: Whether query i sees the keys up to i only, also where there are more keys than queries, as Paddle
            and PyTorch have it here; :func:`flash_attention` aligns both at the end. A mask applies beside it.
        training: If False, nothing is dropped.
        backend: None; "p2p" is Paddle's for auto-parallel tensors, and means nothing for others.
        scale: Above 0; None: ``head_dim ** -0.5``.
        enable_gqa: If False, num_kv_heads must be num_heads.
        name: Unused; there for the sake of Paddle's convention.
        window_size: How many keys a query sees before and after the one beside it: an int for both, or one for each; -1
            or None: all. Beside query i stands key ``i + keys - queries``. With `is_causal` it takes as many keys as
            queries.
        seed: Fixes the dropout mask; None draws from Paddle's generator, which ``paddle.seed`` sets.

    Returns:
        Shape and dtype of query.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape or a number does not fit.
        NotImplementedError: An argument asks for what this operator does not do.
    """
    check_all(query=query, key=key, value=value)
    check_switches(is_causal=is_causal, enable_gqa=enable_gqa)
    if backend is not None and not (isinstance(backend, str) and backend == "p2p"):
        raise ValueError(f"backend: expected None or 'p2p', got {shown(backend)}")
    if backend is not None and paddle.in_dynamic_mode() and query.is_dist():
        raise NotImplementedError("backend: expected None for auto-parallel tensors, got 'p2p'")
    window = check_window("window_size", window_size)
    has_batch = len(query.shape) != 3
    if not has_batch:
        _op.check_tensors(("query", "key", "value"), (query, key, value))
        for argument, tensor in (("key", key), ("value", value)):
            if len(tensor.shape) != 3:
                raise ValueError(f"{argument}: expected 3 dimensions, as query has, got shape {list(tensor.shape)}")
        query, key, value = (tensor.unsqueeze(0) for tensor in (query, key, value))
    if not enable_gqa and len(query.shape) == len(key.shape) == 4 and key.shape[2] not in (query.shape[2], -1):
        raise ValueError(
            f"key: expected {query.shape[2]} heads, as query has, since enable_gqa is False, got {key.shape[2]}"
        )
    ranges = None
    if is_causal:
        query, key, value, attn_mask, is_causal, window, ranges = from_the_start(query, key, value, attn_mask, window)
    description = dense(
        query, key, value, attn_mask, ranges, scale_of(scale, query), dropout_p, training, is_causal, seed, window
    )
    out = attend(description, {"dropout_rate": "dropout_p", "causal": "is_causal"})
    return out if has_batch else out.squeeze(0)


@paddle.jit.not_to_static
def flash_attention(
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    return_softmax: bool = False,
    *,
    fixed_seed_offset: paddle.Tensor | None = None,
    rng_name: str = "",
    training: bool = True,
    name: str | None = None,
    softmax_scale: float | None = None,
    window_size: int | tuple[int, int] | None = None,
    seed: int | None = None,
) -> tuple[paddle.Tensor, None]:
    """Attention with the parameters of ``paddle.nn.functional.flash_attention.flash_attention``, up to
    ``softmax_scale``.

    Args:
        query, key, value: As in :func:`scaled_dot_product_attention`, with the batch.
        dropout: The probability of dropping a weight, as `dropout_p` there.
        causal: Whether query i sees the keys up to ``i + keys - queries`` only.
        return_softmax: False; the probabilities are never stored.
        fixed_seed_offset, rng_name: None and "" where something is dropped: `seed` fixes the mask instead.
        training, name, seed: As in :func:`scaled_dot_product_attention`.
        softmax_scale: Above 0; None: ``head_dim ** -0.5``.
        window_size: As there; with `causal` none after is seen whatever it says.

    Returns:
        The result, of query's shape and dtype, and None.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape or a number does not fit.
        NotImplementedError: An argument asks for what this operator does not do.
    """
    check_all(query=query, key=key, value=value)
    check_unserved(return_softmax=return_softmax)
    scale, window = scale_of(softmax_scale, query), check_window("window_size", window_size)
    description = dense(query, key, value, None, None, scale, dropout, training, causal, seed, window)
    names = {"dropout_rate": "dropout", "scale": "softmax_scale"}
    return attend(description, names, fixed_seed_offset, rng_name), None


@paddle.jit.not_to_static
def flash_attn_qkvpacked(
    qkv: paddle.Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    return_softmax: bool = False,
    *,
    fixed_seed_offset: paddle.Tensor | None = None,
    rng_name: str = "",
    training: bool = True,
    name: str | None = None,
    scale: float | None = None,
    window_size: int | tuple[int, int] | None = None,
    seed: int | None = None,
) -> tuple[paddle.Tensor, None]:
    """:func:`flash_attention` of one tensor, with the parameters of ``paddle.nn.functional.flash_attn_qkvpacked`` up to
    ``name``.

    Args:
        qkv: ``[batch, tokens, num_heads / num_kv_heads + 2, num_kv_heads, head_dim]``: the query heads, then one row of
            keys and one of values.
        scale: Above 0; None: ``head_dim ** -0.5``.

    Returns:
        The result, ``[batch, tokens, num_heads, head_dim]``, and None. Query head h is ``qkv[:, :, h // num_kv_heads,
        h % num_kv_heads]``.

    Raises:
        TypeError, ValueError, NotImplementedError: As :func:`flash_attention` does.
    """
    check_all(qkv=qkv)
    check_unserved(return_softmax=return_softmax)
    heads, num_kv_heads = heads_of_packed(qkv, 5)
    window = check_window("window_size", window_size)
    scale = scale_of(scale, heads)
    description = dense(heads, None, None, None, None, scale, dropout, training, causal, seed, window, num_kv_heads)
    return attend(description, {"dropout_rate": "dropout", "query": "qkv"}, fixed_seed_offset, rng_name), None


@paddle.jit.not_to_static
def flashmask_attention(
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    startend_row_indices: paddle.Tensor | None = None,
    *,
    dropout: float = 0.0,
    causal: bool = False,
    window_size: int | tuple[int, int] | None = None,
    return_softmax_lse: bool = False,
    return_seed_offset: bool = False,
    fixed_seed_offset: paddle.Tensor | None = None,
    rng_name: str = "",
    training: bool = True,
    name: str | None = None,
    softmax_scale: float | None = None,
    block_mask: paddle.Tensor | None = None,
    seed: int | None = None,
) -> paddle.Tensor:
    """Attention with a mask of ranges: for each key, which queries do not see it. The parameters up to ``block_mask``
    are those of ``paddle.nn.functional.flashmask_attention``.

    Args:
        query, key, value: As in :func:`scaled_dot_product_attention`, with the batch.
        startend_row_indices: int32 ``[batch, num_kv_heads or 1, keys, columns]``, or None. Of a key are hidden, with
            `causal`: for one column the queries from it on, for two those from the first to before the second. Without:
            for two columns the queries from the first on and those before the second, for four those from the first to
            before the second and from the third to before the fourth.
        dropout, causal, fixed_seed_offset, rng_name, training, name, softmax_scale, seed: As in
            :func:`flash_attention`.
        window_size: As there; not together with startend_row_indices.
        return_softmax_lse, return_seed_offset: False; the operator returns its result only.
        block_mask: None; there is no mask of blocks.

    Returns:
        Shape and dtype of query.

    Raises:
        TypeError, ValueError, NotImplementedError: As :func:`flash_attention` does.
    """
    check_all(query=query, key=key, value=value)
    check_unserved(return_softmax_lse=return_softmax_lse, return_seed_offset=return_seed_offset)
    if block_mask is not None:
        raise NotImplementedError(f"block_mask: expected None, got a {type(block_mask).__name__}")
    window, scale = check_window("window_size", window_size), scale_of(softmax_scale, query)
    if window_size is not None and startend_row_indices is not None:
        raise ValueError(f"window_size: expected None beside startend_row_indices, got {shown(window_size)}")
    description = dense(query, key, value, None, startend_row_indices, scale, dropout, training, causal, seed, window)
    return attend(description, {"dropout_rate": "dropout", "scale": "softmax_scale"}, fixed_seed_offset, rng_name)
