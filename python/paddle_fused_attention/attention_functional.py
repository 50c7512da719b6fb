"""Attention of queries, keys and values as functions: those of ``paddle.nn.functional`` and
``paddle.nn.functional.flash_attention``, and ``memory_efficient_attention`` of ``paddle.incubate.nn``, with their
signatures, on this package's operator.

On the CPU too, in float32 and float64 as well as in 16 bits, with heads in groups (query head h reads head
``h // (num_heads / num_kv_heads)`` of keys and values) and without storing scores. What Paddle's functions have no
argument for, each takes by keyword: `window_size`, `seed`, and a scale.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle.incubate.nn import attn_bias as biases

from . import _op
from ._attention import Attention
from ._attention_arguments import (
    attend,
    check_starts,
    check_unserved,
    from_the_start,
    gather_used,
    scale_of,
    split_packed,
    window_of,
)
from ._checks import check_count, check_switches, check_tensor
from ._descriptions import MODES

__all__ = [
    "flash_attention",
    "flash_attn_qkvpacked",
    "flash_attn_unpadded",
    "flash_attn_varlen_qkvpacked",
    "flashmask_attention",
    "memory_efficient_attention",
    "scaled_dot_product_attention",
]


def _check_tensors(**tensors: Any) -> None:
    for name, tensor in tensors.items():
        check_tensor(name, tensor, required=True)


def _dense(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    ranges: Any,
    scale: Any,
    dropout: Any,
    training: Any,
    causal: Any,
    seed: Any,
    window: tuple,
) -> Attention:
    # fmt: off
    return Attention._make((
        query, key, value, attn_mask, None, None, ranges, scale, dropout, training, causal, MODES[0], seed, *window, 0, 0,
    ))
    # fmt: on


@paddle.jit.not_to_static
def scaled_dot_product_attention(
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    attn_mask: paddle.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    training: bool = True,
    backend: str | None = None,
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
        key, value: ``[batch, keys, num_kv_heads, head_dim]``, or without the batch, dtype of query; num_kv_heads divides
            num_heads.
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
    _check_tensors(query=query, key=key, value=value)
    check_switches(is_causal=is_causal, enable_gqa=enable_gqa)
    if backend is not None and backend != "p2p":
        raise ValueError(f"backend: expected None or 'p2p', got {backend!r}")
    if backend == "p2p" and paddle.in_dynamic_mode() and query.is_dist():
        raise NotImplementedError("backend: expected None for auto-parallel tensors, got 'p2p'")
    window = window_of(window_size)
    inputs = (query, key, value)
    has_batch = len(query.shape) != 3
    if not has_batch:
        _op.check_tensors(("query", "key", "value"), inputs)
        for argument, tensor in (("key", key), ("value", value)):
            if len(tensor.shape) != 3:
                raise ValueError(f"{argument}: expected 3 dimensions, as query has, got shape {list(tensor.shape)}")
        query, key, value = inputs = tuple(tensor.unsqueeze(0) for tensor in inputs)
    if not enable_gqa and len(query.shape) == len(key.shape) == 4 and key.shape[2] not in (query.shape[2], -1):
        raise ValueError(
            f"key: expected {query.shape[2]} heads, as query has, since enable_gqa is False, got {key.shape[2]}"
        )
    ranges = None
    if is_causal:
        *inputs, attn_mask, is_causal, window, ranges = from_the_start(query, key, value, attn_mask, window)
    description = _dense(
        *inputs, attn_mask, ranges, scale_of(scale, query), dropout_p, training, is_causal, seed, window
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
    _check_tensors(query=query, key=key, value=value)
    check_unserved(return_softmax=return_softmax)
    scale, window = scale_of(softmax_scale, query), window_of(window_size)
    description = _dense(query, key, value, None, None, scale, dropout, training, causal, seed, window)
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
    check_tensor("qkv", qkv, required=True)
    check_unserved(return_softmax=return_softmax)
    query, key, value = split_packed(qkv, 5)
    window = window_of(window_size)
    description = _dense(
        query, key, value, None, None, scale_of(scale, query), dropout, training, causal, seed, window
    )
    names = {"dropout_rate": "dropout", "query": "qkv", "key": "qkv", "value": "qkv"}
    return attend(description, names, fixed_seed_offset, rng_name), None


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
    _check_tensors(query=query, key=key, value=value, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_unserved(return_softmax=return_softmax)
    longest = check_count("max_seqlen_q", max_seqlen_q), check_count("max_seqlen_k", max_seqlen_k)
    # fmt: off
    description = Attention._make((
        query, key, value, None, cu_seqlens_q, cu_seqlens_k, None, scale_of(scale, query), dropout, training, causal,
        MODES[0], seed, *window_of(window_size), *longest,
    ))
    # fmt: on
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
    _check_tensors(qkv=qkv, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_unserved(return_softmax=return_softmax)
    check_switches(varlen_padded=varlen_padded)
    longest = check_count("max_seqlen_q", max_seqlen_q), check_count("max_seqlen_k", max_seqlen_k)
    query, key, value = padded = split_packed(qkv, 4)
    tokens = None
    if varlen_padded:
        check_starts("cu_seqlens_q", cu_seqlens_q)
        check_starts("cu_seqlens_k", cu_seqlens_k)
        query, tokens = gather_used("max_seqlen_q", query, cu_seqlens_q, longest[0])
        key, key_tokens = gather_used("max_seqlen_k", key, cu_seqlens_k, longest[1])
        value = paddle.gather(value, key_tokens)
    # fmt: off
    description = Attention._make((
        query, key, value, None, cu_seqlens_q, cu_seqlens_k, None, scale_of(scale, query), dropout, training, causal,
        MODES[0], seed, *window_of(window_size), *longest,
    ))
    # fmt: on
    names = {"dropout_rate": "dropout", "query": "qkv", "key": "qkv", "value": "qkv"}
    out = attend(description, names, fixed_seed_offset, rng_name)
    if tokens is not None:
        out = paddle.scatter(paddle.cast(paddle.zeros_like(padded[0]), out.dtype), tokens, out)
    return out, None


@paddle.jit.not_to_static
def flashmask_attention(
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    startend_row_indices: paddle.Tensor | None = None,
    *,
    dropout: float = 0.0,
    causal: bool = False,
    window_size: int | tuple | None = None,
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
    _check_tensors(query=query, key=key, value=value)
    check_unserved(return_softmax_lse=return_softmax_lse, return_seed_offset=return_seed_offset)
    if block_mask is not None:
        raise NotImplementedError(f"block_mask: expected None, got a {type(block_mask).__name__}")
    if window_size is not None and startend_row_indices is not None:
        raise ValueError(f"window_size: expected None beside startend_row_indices, got {window_size!r}")
    window, scale = window_of(window_size), scale_of(softmax_scale, query)
    description = _dense(
        query, key, value, None, startend_row_indices, scale, dropout, training, causal, seed, window
    )
    return attend(description, {"dropout_rate": "dropout", "scale": "softmax_scale"}, fixed_seed_offset, rng_name)


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
    _check_tensors(query=query, key=key, value=value)
    window = window_of(window_size)
    names = {"dropout_rate": "p", "attn_mask": "attn_bias", "cu_seqlens_q": "attn_bias", "cu_seqlens_k": "attn_bias"}
    if isinstance(attn_bias, biases.BlockDiagonalMask):
        return _of_blocks(query, key, value, attn_bias, p, scale, training, window, seed, names)
    mask, causal, ranges, inputs = attn_bias, False, None, (query, key, value)
    if isinstance(attn_bias, biases.LowerTriangularMask):
        mask = getattr(attn_bias, "_bias", None)
        check_tensor("attn_bias", mask)
        *inputs, mask, causal, window, ranges = from_the_start(query, key, value, mask, window)
    elif isinstance(attn_bias, biases.AttentionBias):
        raise NotImplementedError(
            f"attn_bias: expected a Tensor, a triangular mask or one of block diagonals without padding, got a "
            f"{type(attn_bias).__name__}"
        )
    description = _dense(*inputs, mask, ranges, scale_of(scale, query), p, training, causal, seed, window)
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
    causal = isinstance(bias, biases.BlockDiagonalCausalMask)
    if causal and bias.q_seqinfo.seqstart_py != bias.k_seqinfo.seqstart_py:
        raise NotImplementedError(
            f"attn_bias: expected sequences of as many keys as queries in a {type(bias).__name__}, got queries that begin "
            f"at {bias.q_seqinfo.seqstart_py} and keys that begin at {bias.k_seqinfo.seqstart_py}"
        )
    _op.check_tensors(("query", "key", "value"), (query, key, value))
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if len(tensor.shape) != 4 or tensor.shape[0] not in (1, -1):
            raise ValueError(f"{name}: expected shape [1, tokens, heads, head_dim], got {list(tensor.shape)}")
    # fmt: off
    description = Attention._make((
        *(tensor.squeeze(0) for tensor in (query, key, value)), None, bias.q_seqinfo.seqstart, bias.k_seqinfo.seqstart,
        None, scale_of(scale, query), p, training, causal, MODES[0], seed, *window,
        max(bias.q_seqinfo.max_seqlen, 1), max(bias.k_seqinfo.max_seqlen, 1),
    ))
    # fmt: on
    return attend(description, names).unsqueeze(0)
