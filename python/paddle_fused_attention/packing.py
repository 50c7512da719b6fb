"""Sequences of several lengths without their padding: one after another, as attention takes them with `cu_seqlens`."""

from __future__ import annotations

from typing import Any, NamedTuple

import paddle

from ._attention_arguments import gather
from ._checks import check_count, check_tensor, dtype_name
from ._op import check_tensors
from ._ordinary_parts import compute_dtype


class Packed(NamedTuple):
    """What :func:`unpad` returns."""

    tokens: Any  # [tokens, ...]: what is kept, sequence after sequence
    indices: Any  # [tokens] int64: where each token was among all batch * seq_len
    cu_seqlens: Any  # [batch + 1] int32: where each sequence begins, and where the last one ends
    max_seqlen: int  # the length of the longest


@paddle.jit.not_to_static
def unpad(x: paddle.Tensor, keep: paddle.Tensor) -> Packed:
    """Leaves out padding. Differentiable in x; in dygraph, since the number of tokens depends on values.

    Args:
        x: ``[batch, seq_len, ...]``, of a float dtype.
        keep: ``[batch, seq_len]``, bool or integers: False or 0 where a position is padding, which may be anywhere.

    Returns:
        The tokens that are kept, with what :func:`pad` and attention need: see :class:`Packed`.

    Raises:
        TypeError: x or keep is no dygraph Tensor, or of another dtype.
        ValueError: keep has another shape.
    """
    for name, tensor in (("x", x), ("keep", keep)):
        check_tensor(name, tensor, required=True)
    if not paddle.in_dynamic_mode():
        raise NotImplementedError("unpad: expected dygraph, since the number of tokens depends on values, got a graph")
    check_tensors(("x", "keep"), (x, keep))
    if not paddle.is_floating_point(x):
        raise TypeError(f"x: expected a float dtype, got {dtype_name(x)}")
    if paddle.is_floating_point(keep) or "complex" in dtype_name(keep):
        raise TypeError(f"keep: expected bool or integers, got {dtype_name(keep)}")
    if len(x.shape) < 2 or list(keep.shape) != list(x.shape[:2]):
        raise ValueError(
            f"keep: expected shape [batch, seq_len] for x of shape {list(x.shape)}, got {list(keep.shape)}"
        )
    counted = paddle.cast(keep, "bool").cast("int32")
    lengths = counted.sum(axis=1, dtype="int32")
    starts = paddle.concat([paddle.zeros([1], "int32"), paddle.cumsum(lengths, dtype="int32")])
    indices = paddle.nonzero(counted.flatten()).flatten()
    longest = int(lengths.max()) if lengths.size else 0
    return Packed(gather(x.flatten(0, 1), indices), indices, starts, longest)


@paddle.jit.not_to_static
def pad(tokens: paddle.Tensor, indices: paddle.Tensor, batch: int, seq_len: int) -> paddle.Tensor:
    """Puts tokens back to where :func:`unpad` found them, with zeros elsewhere. Differentiable in tokens.

    Args:
        tokens: ``[tokens, ...]``, of a float dtype.
        indices: ``[tokens]``, as unpad returns them.
        batch, seq_len: Of the result.

    Returns:
        ``[batch, seq_len, ...]``, dtype of tokens.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: The shapes do not fit.
    """
    for name, tensor in (("tokens", tokens), ("indices", indices)):
        check_tensor(name, tensor, required=True)
    check_tensors(("tokens", "indices"), (tokens, indices))
    batch, seq_len = check_count("batch", batch), check_count("seq_len", seq_len)
    if batch * seq_len >= 2**31:
        raise ValueError(f"seq_len: expected batch * seq_len less than 2^31, got {batch} * {seq_len}")
    if not paddle.is_floating_point(tokens):
        raise TypeError(f"tokens: expected a float dtype, got {dtype_name(tokens)}")
    if dtype_name(indices) not in ("int32", "int64"):
        raise TypeError(f"indices: expected int32 or int64, got {dtype_name(indices)}")
    if len(tokens.shape) == 0 or list(indices.shape) != [tokens.shape[0]]:
        raise ValueError(
            f"indices: expected shape [tokens] for tokens of shape {list(tokens.shape)}, got {list(indices.shape)}"
        )
    if (
        paddle.in_dynamic_mode()
        and indices.size
        and not 0 <= int(indices.min()) <= int(indices.max()) < batch * seq_len
    ):
        raise ValueError(f"indices: expected numbers from 0 to batch * seq_len - 1 = {batch * seq_len - 1}, got others")
    dtype = compute_dtype(tokens)  # on the CPU Paddle scatters no 16-bit numbers
    zeros = paddle.zeros([batch * seq_len, *tokens.shape[1:]], dtype)
    whole = paddle.cast(paddle.scatter(zeros, indices, paddle.cast(tokens, dtype)), tokens.dtype)
    return whole.reshape([batch, seq_len, *tokens.shape[1:]])
