"""Conversion between separate query, key and value projections, as ``paddle.nn.Linear`` holds them, and the packed
form."""

from __future__ import annotations

from typing import Any, Sequence, TypeVar

import numpy as np
import paddle

Array = TypeVar("Array", np.ndarray, paddle.Tensor)
KINDS = ("weight", "bias")  # the parameters of a projection
QKV_PARAMETERS = ("qkv_weight", "qkv_bias")  # and the packed ones


def pack_projections(parameters: Sequence[Any], num_heads: int, interleaved: bool = False) -> Any:
    """Packs the weights ``[embed_dim, columns]`` or the biases ``[columns]`` of projections, unchecked.

    Args:
        parameters: One for each of query, key and value, or a single one with the columns of all three in turn. They
            are NumPy arrays, Tensors or variables of a graph.
        num_heads: The number of heads that the columns hold.
        interleaved: Whether the columns of a single parameter are ordered ``[num_heads, 3, head_dim]`` and not
            ``[3, num_heads, head_dim]``.

    Returns:
        ``[3, num_heads, head_dim, embed_dim]`` or ``[3, num_heads, head_dim]``.
    """
    rows = [_transposed(parameter) for parameter in parameters]
    columns, rest = rows[0].shape[0], list(rows[0].shape[1:])
    if len(rows) == 3:
        heads = [part.reshape([num_heads, columns // num_heads, *rest]) for part in rows]
        # np.stack keeps the order in memory of its transposed parts.
        return np.ascontiguousarray(np.stack(heads)) if isinstance(heads[0], np.ndarray) else paddle.stack(heads)
    head_dim = columns // (3 * num_heads)
    if interleaved:
        return _with_first_axes_swapped(rows[0].reshape([num_heads, 3, head_dim, *rest]))
    return rows[0].reshape([3, num_heads, head_dim, *rest])


def separate_projections(packed: Any, count: int, interleaved: bool = False) -> list:
    """The inverse of :func:`pack_projections` for three parameters or one, as copies that are dense in memory."""
    parts: Sequence[int | None] = range(3) if count == 3 else (None,)
    parameters = [_transposed(projection_rows(packed, part, interleaved)) for part in parts]
    return [np.array(p, order="C") if isinstance(p, np.ndarray) else p.clone() for p in parameters]


def projection_rows(packed: Any, part: int | None = None, interleaved: bool = False) -> Any:
    """The transposed weight ``[columns, embed_dim]`` or the bias ``[columns]`` of one projection.

    `part` is 0, 1 or 2 for the query, the key or the value, or None for a single projection of all three.
    """
    _, num_heads, head_dim, *rest = packed.shape
    if part is not None:
        return packed[part].reshape([num_heads * head_dim, *rest])
    if interleaved:
        packed = _with_first_axes_swapped(packed)
    return packed.reshape([3 * num_heads * head_dim, *rest])


def projection_shape(packed_shape: Sequence[int], count: int) -> list[int]:
    """The shape of each of `count` parameters, three or one, that a packed parameter holds."""
    _, num_heads, head_dim, *rest = packed_shape
    return [*rest, 3 * num_heads * head_dim // count]


def _transposed(parameter: Any) -> Any:
    return parameter.transpose([1, 0]) if len(parameter.shape) == 2 else parameter


def _with_first_axes_swapped(packed: Any) -> Any:
    return packed.transpose([1, 0, *range(2, len(packed.shape))])


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


def _checked_heads(embed_dim: int, num_heads: int) -> int:
    if isinstance(num_heads, bool) or not isinstance(num_heads, (int, np.integer)):
        raise TypeError(f"num_heads: expected an int, got {num_heads!r}")
    if num_heads < 1 or embed_dim % num_heads:
        raise ValueError(f"num_heads: expected a divisor of embed_dim {embed_dim}, got {num_heads}")
    return int(num_heads)


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
    return pack_projections((wq, wk, wv), _checked_heads(embed_dim, num_heads))


def unpack_qkv_weight(qkv_weight: Array) -> tuple[Array, Array, Array]:
    """The inverse of :func:`pack_qkv_weight`: ``[3, num_heads, head_dim, embed_dim]`` to three
    ``[embed_dim, embed_dim]``, contiguous copies."""
    _check_packed("qkv_weight", qkv_weight, 4, "[3, num_heads, head_dim, num_heads * head_dim]")
    wq, wk, wv = separate_projections(qkv_weight, 3)
    return wq, wk, wv


def pack_qkv_bias(bq: Array, bk: Array, bv: Array, num_heads: int) -> Array:
    """Packs three projection biases ``[embed_dim]``, all Tensors or all NumPy arrays, to ``[3, num_heads, head_dim]``.

    Raises:
        TypeError, ValueError: Kinds, dtypes or shapes do not fit.
    """
    embed_dim = _check_three(("bq", "bk", "bv"), (bq, bk, bv), 1, "[embed_dim]")
    return pack_projections((bq, bk, bv), _checked_heads(embed_dim, num_heads))


def unpack_qkv_bias(qkv_bias: Array) -> tuple[Array, Array, Array]:
    """The inverse of :func:`pack_qkv_bias`: ``[3, num_heads, head_dim]`` to three ``[embed_dim]``, copies."""
    _check_packed("qkv_bias", qkv_bias, 3, "[3, num_heads, head_dim]")
    bq, bk, bv = separate_projections(qkv_bias, 3)
    return bq, bk, bv
