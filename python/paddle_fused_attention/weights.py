"""Conversion between separate query, key and value projections, as ``paddle.nn.Linear`` holds them, and the packed
form."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import paddle

Array = TypeVar("Array", np.ndarray, paddle.Tensor)


def _stack(arrays: list[Array]) -> Array:
    # np.stack would keep the order in memory of its transposed parts.
    return np.ascontiguousarray(np.stack(arrays)) if isinstance(arrays[0], np.ndarray) else paddle.stack(arrays)


def _copy(array: Array) -> Array:
    """Dense in memory and with a memory of its own, as files of tensors want it."""
    return np.array(array, order="C") if isinstance(array, np.ndarray) else array.clone()


def _check_three(names: tuple[str, str, str], arrays: tuple, rank: int, form: str) -> int:
    """Checks three arrays of one kind, dtype and shape, [embed_dim] or [embed_dim, embed_dim]; returns embed_dim."""
    kind = np.ndarray if isinstance(arrays[0], np.ndarray) else paddle.Tensor
    for name, array in zip(names, arrays):
        if not isinstance(array, kind):
            raise TypeError(
                f"{name}: expected a {kind.__name__} like {names[0]}, got {type(array).__name__}"
                if name != names[0]
                else f"{name}: expected a Tensor or a NumPy array, got {type(array).__name__}"
            )
    expected = list(arrays[0].shape)
    if len(expected) != rank or expected[0] != expected[-1]:
        raise ValueError(f"{names[0]}: expected shape {form}, got {expected}")
    for name, array in zip(names, arrays):
        if list(array.shape) != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {list(array.shape)}")
        if array.dtype != arrays[0].dtype:
            raise TypeError(f"{name}: expected {arrays[0].dtype} like {names[0]}, got {array.dtype}")
    return expected[0]


def _head_dim(embed_dim: int, num_heads: int) -> int:
    if isinstance(num_heads, bool) or not isinstance(num_heads, (int, np.integer)):
        raise TypeError(f"num_heads: expected an int, got {num_heads!r}")
    if num_heads < 1 or embed_dim % num_heads:
        raise ValueError(f"num_heads: expected a divisor of embed_dim {embed_dim}, got {num_heads}")
    return embed_dim // int(num_heads)


def _check_packed(name: str, array: Array, rank: int, form: str) -> None:
    if not isinstance(array, (np.ndarray, paddle.Tensor)):
        raise TypeError(f"{name}: expected a Tensor or NumPy array, got {type(array).__name__}")
    shape = list(array.shape)
    if len(shape) == rank == 4 and shape[0] == 3:
        form = str([3, shape[1], shape[2], shape[1] * shape[2]])
    if len(shape) != rank or shape[0] != 3 or (rank == 4 and shape[1] * shape[2] != shape[3]):
        raise ValueError(f"{name}: expected shape {form}, got {shape}")


def pack_qkv_weight(wq: Array, wk: Array, wv: Array, num_heads: int) -> Array:
    """Packs three projection weights for :func:`fused_multi_head_attention`.

    Args:
        wq, wk, wv: Weights of ``paddle.nn.Linear``, ``[embed_dim, embed_dim]`` (in, out), all Tensors or all NumPy
            arrays, of one dtype. A weight in (out, in) layout, as PyTorch holds it, is transposed first.
        num_heads: A divisor of embed_dim.

    Returns:
        ``[3, num_heads, head_dim, embed_dim]`` of the same kind and dtype.

    Raises:
        TypeError, ValueError: Kinds, dtypes or shapes do not fit.
    """
    embed_dim = _check_three(("wq", "wk", "wv"), (wq, wk, wv), 2, "[embed_dim, embed_dim]")
    head_dim = _head_dim(embed_dim, num_heads)
    return _stack([weight.T.reshape([num_heads, head_dim, embed_dim]) for weight in (wq, wk, wv)])


def unpack_qkv_weight(qkv_weight: Array) -> tuple[Array, Array, Array]:
    """The inverse of :func:`pack_qkv_weight`: ``[3, num_heads, head_dim, embed_dim]`` to three ``[embed_dim,
    embed_dim]``, contiguous copies."""
    _check_packed("qkv_weight", qkv_weight, 4, "[3, num_heads, head_dim, num_heads * head_dim]")
    embed_dim = qkv_weight.shape[3]
    wq, wk, wv = (_copy(qkv_weight[i].reshape([embed_dim, embed_dim]).T) for i in range(3))
    return wq, wk, wv


def pack_qkv_bias(bq: Array, bk: Array, bv: Array, num_heads: int) -> Array:
    """Packs three projection biases ``[embed_dim]``, all Tensors or all NumPy arrays, to ``[3, num_heads, head_dim]``.

    Raises:
        TypeError, ValueError: Kinds, dtypes or shapes do not fit.
    """
    embed_dim = _check_three(("bq", "bk", "bv"), (bq, bk, bv), 1, "[embed_dim]")
    head_dim = _head_dim(embed_dim, num_heads)
    return _stack([bias.reshape([num_heads, head_dim]) for bias in (bq, bk, bv)])


def unpack_qkv_bias(qkv_bias: Array) -> tuple[Array, Array, Array]:
    """The inverse of :func:`pack_qkv_bias`: ``[3, num_heads, head_dim]`` to three ``[embed_dim]``, copies."""
    _check_packed("qkv_bias", qkv_bias, 3, "[3, num_heads, head_dim]")
    bq, bk, bv = (_copy(qkv_bias[i].reshape([-1])) for i in range(3))
    return bq, bk, bv
