"""What the functions of attention make of their arguments, before there is a description."""

from __future__ import annotations

from typing import Any

import paddle

from . import _op
from ._attention import Attention, attention
from ._checks import check_switches, check_tensor, dtype_name, renamed, shown
from ._descriptions import MODES
from ._ordinary_parts import compute_dtype

_ALL = (-1, -1)


def check_all(**tensors: Any) -> None:
    """Refuses what is no tensor, None included."""
    for name, tensor in tensors.items():
        check_tensor(name, tensor, required=True)


def dense(
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
    num_kv_heads: int = 0,
) -> Attention:
    """The description of attention that is not packed, of all heads."""
    # fmt: off
    return Attention._make((
        query, key, value, attn_mask, None, None, ranges, scale, dropout, training, causal, False,
        MODES[0], seed, *window, 0, 0, 0, 0, num_kv_heads,
    ))
    # fmt: on


def packed(
    query: Any,
    key: Any,
    value: Any,
    cu_seqlens: tuple,
    longest: tuple,
    scale: Any,
    dropout: Any,
    training: Any,
    causal: Any,
    seed: Any,
    window: tuple,
    num_kv_heads: int = 0,
) -> Attention:
    """The description of attention of packed sequences, of all heads. `cu_seqlens` and `longest` are those of queries
    and of keys."""
    # fmt: off
    return Attention._make((
        query, key, value, None, *cu_seqlens, None, scale, dropout, training, causal, False,
        MODES[0], seed, *window, *longest, 0, 0, num_kv_heads,
    ))
    # fmt: on


def attend(description: Attention, names: dict[str, str], fixed_seed_offset: Any = None, rng_name: Any = "") -> Any:
    """Checks and computes a description. `names` are what errors call its fields, where that is another name.

    Raises:
        NotImplementedError: A generator of Paddle's is asked for where something is dropped.
    """
    try:
        checked = description.checked()
        if not isinstance(rng_name, str):
            raise TypeError(f"rng_name: expected a str, got {type(rng_name).__name__}")
        if checked.training and checked.dropout_rate > 0.0:
            if rng_name:
                raise NotImplementedError(
                    "rng_name: expected '' where something is dropped, since seed fixes the mask, got "
                    f"{shown(rng_name)}"
                )
            if fixed_seed_offset is not None:
                raise NotImplementedError(
                    "fixed_seed_offset: expected None where something is dropped, since seed fixes the mask, got a "
                    f"{type(fixed_seed_offset).__name__}"
                )
        return attention(checked)
    except (TypeError, ValueError, NotImplementedError, MemoryError) as error:
        raise renamed(error, names) from None


def check_unserved(**switches: Any) -> None:
    """Refuses switches that are on and ask for results that the operator does not have."""
    check_switches(**switches)
    for name, value in switches.items():
        if value:
            raise NotImplementedError(f"{name}: expected False, since the operator returns its result only, got True")


def scale_of(scale: Any, query: Any) -> Any:
    """The scale, or that of the query's head_dim for None."""
    if scale is not None:
        return scale
    head_dim = query.shape[-1] if len(query.shape) else 1
    if head_dim < 0:
        raise ValueError(f"query: expected a known head_dim, or a scale, got shape {list(query.shape)}")
    return head_dim**-0.5 if head_dim else 1.0


def from_the_start(query: Any, key: Any, value: Any, mask: Any, window: tuple) -> tuple:
    """Causal attention in which query i sees the keys up to i, however many keys there are, as fields of a description:
    query, key, value, mask, causal, window, ranges. The operator itself aligns queries and keys at the end."""
    check_tensor("attn_mask", mask)
    unchanged = (query, key, value, mask, True, window, None)
    if not len(query.shape) == len(key.shape) == len(value.shape) == 4:
        return unchanged  # which the operator refuses
    queries, keys = query.shape[1], key.shape[1]
    if queries == keys >= 0:
        return unchanged
    if window != _ALL:
        raise ValueError(
            f"window_size: expected None in causal attention unless there are as many keys as queries, got {window} "
            f"for query of shape {list(query.shape)} and key of shape {list(key.shape)}"
        )
    _op.check_tensors(("query", "key", "value", "attn_mask"), (query, key, value, mask))
    if -1 in (queries, keys):
        return query, key, value, mask, False, _ALL, _ranges_from_the_start(query, key)
    if queries > keys:
        return query, key, value, mask, False, (-1, queries - keys), None
    keys_of_mask = 1 if mask is None or not len(mask.shape) else mask.shape[-1]
    if value.shape[1] != keys or keys_of_mask not in (1, keys):
        return unchanged
    if keys_of_mask != 1:
        mask = mask[..., :queries]
    return query, key[:, :queries], value[:, :queries], mask, True, _ALL, None


def _ranges_from_the_start(query: Any, key: Any) -> Any:
    """That each key is hidden from the queries before it, as startend_row_indices for any sizes."""
    queries, keys = paddle.shape(query)[1], paddle.shape(key)[1]
    first_to_see = paddle.arange(0, keys, dtype="int32")
    none_after = paddle.zeros_like(first_to_see) + paddle.cast(queries, "int32")
    ranges = paddle.stack([none_after, first_to_see], axis=1).unsqueeze([0, 1])
    batch = key.shape[0] if key.shape[0] >= 0 else paddle.shape(key)[0]
    return paddle.expand(ranges, [batch, -1, -1, -1])


def heads_of_packed(qkv: Any, rank: int) -> tuple:
    """``[..., num_heads / num_kv_heads + 2, num_kv_heads, head_dim]`` as ``[..., heads, head_dim]``, with the heads of
    query, key and value in turn; and num_kv_heads."""
    _op.check_tensors(("qkv",), (qkv,))
    shape = list(qkv.shape)
    if len(shape) != rank or not (shape[-3] >= 3 and shape[-2] >= 1) or shape[-1] == 0:
        leading = "batch, tokens" if rank == 5 else "tokens"
        raise ValueError(
            f"qkv: expected shape [{leading}, num_heads / num_kv_heads + 2, num_kv_heads, head_dim], got {shape}"
        )
    return qkv.reshape([*[0] * (rank - 3), shape[-3] * shape[-2], shape[-1]]), shape[-2]


def check_starts(name: str, starts: Any) -> None:
    """Refuses cu_seqlens with which Paddle's own operators would fail; the operator checks their values."""
    _op.check_tensors((name,), (starts,))
    if len(starts.shape) != 1 or starts.shape[0] == 0:
        raise ValueError(f"{name}: expected shape [batch + 1], got {list(starts.shape)}")
    if dtype_name(starts) != "int32":
        raise TypeError(f"{name}: expected int32, got {dtype_name(starts)}")


def gather_used(name: str, tensor: Any, starts: Any, longest: int) -> tuple:
    """What counts of sequences that are padded to `longest` tokens, one after another, and the numbers of these tokens.

    Args:
        name: What errors call `longest`.
        tensor: ``[batch * longest, ...]``.
        starts: ``[batch + 1]``: differences are the lengths.
    """
    total = starts.shape[0] - 1 if starts.shape[0] > 0 else -1
    if total >= 0 and tensor.shape[0] not in (total * longest, -1):
        raise ValueError(
            f"{name}: expected {total} sequences of it to be the {tensor.shape[0]} tokens of qkv, since varlen_padded "
            f"is True, got {longest}"
        )
    lengths = starts[1:] - starts[:-1]
    places = paddle.arange(0, longest, dtype="int32")
    used = paddle.cast(places.unsqueeze(0) < lengths.unsqueeze(1), "int32")
    tokens = paddle.nonzero(used.flatten()).flatten()
    tokens.stop_gradient = True
    return gather(tensor, tokens), tokens


# By float32: on the CPU Paddle neither gathers nor scatters 16-bit numbers.


def gather(tensor: Any, tokens: Any) -> Any:
    """The rows `tokens` of a tensor."""
    return paddle.cast(paddle.gather(paddle.cast(tensor, compute_dtype(tensor)), tokens), tensor.dtype)


def scatter_like(padded: Any, tokens: Any, rows: Any) -> Any:
    """The rows as those at `tokens` of a tensor of the shape of `padded`, which is 0 elsewhere."""
    dtype = compute_dtype(rows)
    zeros = paddle.zeros_like(paddle.cast(padded, dtype))
    return paddle.cast(paddle.scatter(zeros, tokens, paddle.cast(rows, dtype)), rows.dtype)
