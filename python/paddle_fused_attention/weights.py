"""Conversion between separate query, key and value projections, as ``paddle.nn.Linear`` holds them, and the packed
form."""

from __future__ import annotations

from typing import Any, Sequence, TypeVar

import numpy as np
import paddle

from ._checks import check_count, shown
from ._op import check_tensors

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
    columns = sum(parameter.shape[-1] for parameter in parameters)
    sizes = [num_heads, columns // (3 * num_heads), *parameters[0].shape[:-1]]
    if len(parameters) == 1 and interleaved:
        return _with_first_axes_swapped(pack_rows(parameters, [sizes[0], 3, *sizes[1:]]))
    return pack_rows(parameters, [3, *sizes])


def pack_rows(parameters: Sequence[Any], shape: Sequence[int]) -> Any:
    """The transposed weights ``[width, columns]``, or the biases ``[columns]``, one after another, in another shape."""
    rows = [_transposed(parameter) for parameter in parameters]
    if len(rows) == 1:
        return rows[0].reshape(shape)
    # np.concatenate keeps the order in memory of its transposed parts.
    joined = (
        np.ascontiguousarray(np.concatenate(rows)) if isinstance(rows[0], np.ndarray) else paddle.concat(rows, axis=0)
    )
    return joined.reshape(shape)


def separate_projections(packed: Any, count: int, interleaved: bool = False) -> list[Any]:
    """The inverse of :func:`pack_projections` for three parameters or one, as copies that are dense in memory."""
    if count == 3:
        return list(_unpack(packed, packed.shape[1], packed.shape[1]))
    return [_dense_copy(_transposed(projection_rows(packed, None, interleaved)))]


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


def _check_three(names: tuple[str, str, str], arrays: tuple, rank: int, form: str, num_heads: Any) -> tuple:
    """Checks three arrays of one kind and dtype, weights [embed_dim, columns] or biases [columns], with embed_dim
    columns for queries and as many for keys as for values; returns the heads of queries and of keys."""
    kind = np.ndarray if isinstance(arrays[0], np.ndarray) else paddle.Tensor
    for name, array in zip(names, arrays):
        if not isinstance(array, kind):
            raise TypeError(
                f"{name}: expected a {kind.__name__} like {names[0]}, got {type(array).__name__}"
                if name != names[0]
                else f"{name}: expected a Tensor or a NumPy array, got {type(array).__name__}"
            )
    if kind is paddle.Tensor:
        check_tensors(names, arrays)
    expected = list(arrays[0].shape)
    if len(expected) != rank or expected[0] != expected[-1] or 0 in expected:
        raise ValueError(f"{names[0]}: expected shape {form}, got {expected}")
    embed_dim = expected[0]
    num_heads = _checked_heads(embed_dim, num_heads)
    found = list(arrays[1].shape)
    if found != expected:
        columns = found[-1] if len(found) == rank and found[:-1] == expected[:-1] else 0
        head_dim = embed_dim // num_heads
        if not columns or columns % head_dim or num_heads % (columns // head_dim):
            raise ValueError(
                f"{names[1]}: expected shape {expected}, or fewer columns, of heads of {head_dim} whose number divides "
                f"num_heads {num_heads}, got {found}"
            )
        expected = found
    for name, array in zip(names, arrays):
        if name == names[2] and list(array.shape) != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {list(array.shape)}")
        if array.dtype != arrays[0].dtype:
            raise TypeError(f"{name}: expected {arrays[0].dtype} like {names[0]}, got {array.dtype}")
    return num_heads, expected[-1] * num_heads // embed_dim


def _checked_heads(embed_dim: int, num_heads: Any) -> int:
    if isinstance(num_heads, bool) or not isinstance(num_heads, (int, np.integer)):
        raise TypeError(f"num_heads: expected an int, got {shown(num_heads)}")
    if num_heads < 1 or embed_dim % num_heads:
        raise ValueError(f"num_heads: expected a divisor of embed_dim {embed_dim}, got {shown(num_heads)}")
    return int(num_heads)


def _pack(arrays: tuple, heads: tuple) -> Any:
    num_heads, num_kv_heads = heads
    head_dim, width = arrays[0].shape[-1] // num_heads, list(arrays[0].shape[:-1])
    counts = [3, num_heads] if num_kv_heads == num_heads else [num_heads + 2 * num_kv_heads]
    return pack_rows(arrays, [*counts, head_dim, *width])


def _unpack(packed: Any, num_heads: int, num_kv_heads: int) -> tuple:
    """The inverse of :func:`_pack`, as copies that are dense in memory."""
    head_dim, *width = packed.shape[2 if num_heads == num_kv_heads else 1 :]
    rows = packed.reshape([(num_heads + 2 * num_kv_heads) * head_dim, *width])
    ends = [heads * head_dim for heads in (num_heads, num_heads + num_kv_heads, num_heads + 2 * num_kv_heads)]
    return tuple(_dense_copy(_transposed(rows[begin:end])) for begin, end in zip((0, *ends), ends))


def _dense_copy(array: Any) -> Any:
    return np.array(array, order="C") if isinstance(array, np.ndarray) else array.clone()


def _heads_of(name: str, array: Any, ranks: tuple[int, int], form: str, num_heads: Any) -> tuple:
    """The heads of queries and of keys of a packed weight or bias, of one of two ranks: with as many of both, or
    fewer of keys. num_heads is None or said by the caller."""
    if not isinstance(array, (np.ndarray, paddle.Tensor)):
        raise TypeError(f"{name}: expected a Tensor or NumPy array, got {type(array).__name__}")
    if isinstance(array, paddle.Tensor):
        check_tensors((name,), (array,))
    shape, (equal, grouped) = list(array.shape), ranks
    is_weight = equal == 4
    if len(shape) == equal and shape[0] == 3:
        if not is_weight or shape[1] * shape[2] == shape[3]:
            return shape[1], shape[1]
        form = str([3, shape[1], shape[2], shape[1] * shape[2]])
    elif len(shape) == grouped and shape[1] > 0:
        if is_weight:
            num_heads = shape[2] // shape[1]
        elif num_heads is None:
            raise ValueError(f"num_heads: expected an int for a {name} of shape {shape}, got None")
        num_heads = _checked_heads(shape[2], num_heads) if is_weight else check_count("num_heads", num_heads)
        num_kv_heads, odd = divmod(shape[0] - num_heads, 2)
        if num_kv_heads > 0 and not odd and num_heads % num_kv_heads == 0:
            return num_heads, num_kv_heads
    raise ValueError(f"{name}: expected shape {form}, got {shape}")


def pack_qkv_weight(wq: Array, wk: Array, wv: Array, num_heads: int) -> Array:
    """Packs three projection weights for :func:`fused_multi_head_attention`.

    Args:
        wq: Weight of ``paddle.nn.Linear``, ``[embed_dim, embed_dim]`` (in, out), a Tensor or a NumPy array. A weight in
            (out, in) layout, as PyTorch holds it, is transposed first.
        wk, wv: The same; with fewer heads, num_kv_heads, ``[embed_dim, num_kv_heads * head_dim]``.
        num_heads: Of the queries: a divisor of embed_dim.

    Returns:
        ``[3, num_heads, head_dim, embed_dim]``, with fewer heads of keys and values
        ``[num_heads + 2 * num_kv_heads, head_dim, embed_dim]``, of the same kind and dtype.

    Raises:
        TypeError, ValueError: Kinds, dtypes or shapes do not fit.
    """
    arrays = (wq, wk, wv)
    return _pack(arrays, _check_three(("wq", "wk", "wv"), arrays, 2, "[embed_dim, embed_dim]", num_heads))


def unpack_qkv_weight(qkv_weight: Array) -> tuple[Array, Array, Array]:
    """The inverse of :func:`pack_qkv_weight`, as contiguous copies."""
    form = "[3, num_heads, head_dim, num_heads * head_dim] or [num_heads + 2 * num_kv_heads, head_dim, embed_dim]"
    wq, wk, wv = _unpack(qkv_weight, *_heads_of("qkv_weight", qkv_weight, (4, 3), form, None))
    return wq, wk, wv


def pack_qkv_bias(bq: Array, bk: Array, bv: Array, num_heads: int) -> Array:
    """Packs three projection biases, those of :func:`pack_qkv_weight`'s columns, to ``[3, num_heads, head_dim]`` or
    ``[num_heads + 2 * num_kv_heads, head_dim]``.

    Raises:
        TypeError, ValueError: Kinds, dtypes or shapes do not fit.
    """
    arrays = (bq, bk, bv)
    return _pack(arrays, _check_three(("bq", "bk", "bv"), arrays, 1, "[embed_dim]", num_heads))


def unpack_qkv_bias(qkv_bias: Array, num_heads: int | None = None) -> tuple[Array, Array, Array]:
    """The inverse of :func:`pack_qkv_bias`, as copies. `num_heads` must be given where there are fewer heads of keys
    and values, which a bias does not tell."""
    form = "[3, num_heads, head_dim] or [num_heads + 2 * num_kv_heads, head_dim]"
    bq, bk, bv = _unpack(qkv_bias, *_heads_of("qkv_bias", qkv_bias, (3, 2), form, num_heads))
    return bq, bk, bv
