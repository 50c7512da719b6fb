"""The keys and values that a layer is given beside its query. If they are the query, the block's operator serves, which
takes one input for all three; otherwise the block is composed."""

from __future__ import annotations

from typing import Any

import paddle
from paddle.base import core
from paddle.framework import in_dynamic_mode

from ._checks import check_tensor


def are_query(query: Any, key: Any, value: Any) -> bool:
    """Whether a key and a value are the same object as the query, or None, which stands for it."""
    return (key is None or key is query) and (value is None or value is query)


@paddle.jit.not_to_static
def given_keys(query: Any, key: Any, value: Any) -> tuple | None:
    """The key and the value, each the query where it is None; None if both are the same object as the query, or the
    same value of a graph.

    Raises:
        TypeError: key or value is no Tensor.
        NotImplementedError: They are not the query, and one of the tensors is auto-parallel.
    """
    if are_query(query, key, value):
        return None
    dygraph = in_dynamic_mode()
    given = {
        name: t for name, t in (("query", query), ("key", key), ("value", value)) if t is not None or name == "query"
    }
    for name, tensor in given.items():
        check_tensor(name, tensor, required=True)
        if isinstance(tensor, core.eager.Tensor) != dygraph:
            expected = "a dygraph Tensor" if dygraph else "a variable of the graph that is built"
            raise TypeError(f"{name}: expected {expected}, got {type(tensor).__name__}")
    key_value = tuple(query if tensor is None else tensor for tensor in (key, value))
    if all(_is_same(query, tensor) for tensor in key_value):
        return None
    if not dygraph:
        # Python may have several objects of one value in a graph.
        return tuple(query if _is_same(query, tensor) else tensor for tensor in key_value)
    for name, tensor in given.items():
        if tensor.is_dist():
            raise NotImplementedError(
                f"{name}: expected ordinary tensors where keys are not the query itself, got an auto-parallel one"
            )
        if not tensor.is_dense() or (tensor.size > 0 and not tensor._is_initialized()):
            raise TypeError(f"{name}: expected a dense Tensor with memory, got one that is sparse or has none")
    return key_value


@paddle.jit.not_to_static
def other_keys(query: Any, key: Any, value: Any) -> tuple | None:
    """As :func:`given_keys`. But in dygraph a tensor of the same memory or contents is the query too, where no gradient
    is wanted: two tensors of equal contents have a gradient each."""
    key_value = given_keys(query, key, value)
    if key_value is None or not in_dynamic_mode():
        return key_value
    wants_gradient = paddle.is_grad_enabled() and not all(t.stop_gradient for t in (query, *key_value))
    if not wants_gradient and all(_has_same_contents(query, tensor) for tensor in key_value):
        return None
    return key_value


def _is_same(query: Any, other: Any) -> bool:
    if other is query:
        return True
    if in_dynamic_mode():
        return False
    if hasattr(query, "is_same"):
        return query.is_same(other)
    return query.name == other.name and query.block is other.block


def _has_same_contents(query: paddle.Tensor, other: paddle.Tensor) -> bool:
    if other is query:
        return True
    if other.shape != query.shape or other.dtype != query.dtype or str(other.place) != str(query.place):
        return False
    if query.size == 0 or (other.data_ptr() == query.data_ptr() and other.is_contiguous() and query.is_contiguous()):
        return True
    if not paddle.is_floating_point(query):
        return bool(paddle.equal_all(query, other))
    # In float32 at least, which holds every 16-bit number: Paddle compares 16-bit numbers on some devices only.
    a, b = (t if t.dtype == paddle.float64 else paddle.cast(t, "float32") for t in (query, other))
    return bool(paddle.all((a == b) | (paddle.isnan(a) & paddle.isnan(b))))
