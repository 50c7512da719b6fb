"""The description of attention by itself, of queries, keys and values, and its computation: by one operator, or of
ordinary ops where that does not serve.

As with the blocks, a function makes and checks the description, which is handed on whole.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import paddle
from paddle.framework import in_dynamic_mode

from . import _op
from ._descriptions import MODES, checked_fields
from ._meshes import is_auto_parallel
from ._ordinary_attention import attention_of_ordinary_ops
from ._ordinary_parts import is_exported_to_onnx
from ._types import Mode


class Attention(NamedTuple):
    """What attention is computed of and how::

        scores = scale * query @ key^T + attn_mask
        p      = softmax(scores over the keys that a query sees); one that sees none gives zeros
        out    = dropout(p, dropout_rate) @ value

    Query head h reads head ``h // (num_heads / num_kv_heads)`` of the keys and values. Query i stands beside key
    ``i + keys - queries`` of its sequence: with `causal` it sees none after that one, and of those before and after it
    at most `window_left` and `window_right`; -1: all.

    A key of None lies behind the query, as further heads of the same tensor, and a value of None behind the key, so
    that slices of a projection need no copies. With `keys_by_head` key and value are
    ``[batch, num_kv_heads, keys, head_dim]``.

    Only the result of :meth:`checked` is handed on. Code that may be traced makes it by `_make`; see
    :class:`paddle_fused_attention._block.Block`.
    """

    # The operator's inputs, in its order.
    query: Any  # [batch, queries, num_heads, head_dim], packed [queries of all, num_heads, head_dim]
    key: Any = None  # [batch, keys, num_kv_heads, head_dim], packed [keys of all, num_kv_heads, head_dim]
    value: Any = None  # like key
    attn_mask: Any = None  # broadcasts to [batch, num_heads, queries, keys]; not if packed
    cu_seqlens_q: Any = None  # [batch + 1] int32: where the packed sequences begin, and where the last one ends
    cu_seqlens_k: Any = None
    startend_row_indices: Any = None  # [batch, num_kv_heads or 1, keys, 1, 2 or 4] int32; not if packed

    scale: float = 1.0
    dropout_rate: float = 0.0

    training: bool = True
    causal: bool = False
    keys_by_head: bool = False

    mode: Mode = MODES[0]
    seed: int | None = None
    window_left: int = -1
    window_right: int = -1
    max_seqlen_q: int = 0  # of packed sequences; else 0
    max_seqlen_k: int = 0
    first_head: int = 0  # where heads are spread over processes, these among all; by these dropout counts
    total_heads: int = 0
    num_kv_heads: int = 0  # read where key and value are None; 0: as many as of the query

    def checked(self) -> Attention:
        """The description with floats for numbers and bools for switches.

        Raises:
            TypeError, ValueError: A field is of the wrong type, or a number is out of its range. Whatever computes it
                checks shapes and dtypes; windows and lengths are checked where they are made.
        """
        checked = checked_fields(self, 1, _OF_NUMBERS, _OF_SWITCHES)
        if checked.scale == 0.0:
            raise ValueError("scale: expected a number above 0, got 0")
        return checked


_OF_TENSORS = slice(0, Attention._fields.index("scale"))
_OF_NUMBERS = slice(_OF_TENSORS.stop, Attention._fields.index("training"))
_OF_SWITCHES = slice(_OF_NUMBERS.stop, Attention._fields.index("mode"))
_OF_INTEGERS = slice(Attention._fields.index("window_left"), None)
_INTEGERS = Attention._fields[_OF_INTEGERS]

ATTENTION = _op.Operator(
    "custom_attention",
    Attention._fields[_OF_TENSORS],
    ("Query", "Key", "Value", "AttnMask", "CuSeqlensQ", "CuSeqlensK", "StartendRowIndices"),
    numbers=Attention._fields[_OF_NUMBERS],
    integers=("seed", *_INTEGERS),
    mask="attn_mask",
    differentiable=4,
)


# The weights that a call of ATTENTION with SAVE_ALWAYS gave, of what that saved. The attributes are the same.
WEIGHTS = _op.Operator(
    "custom_attention_weights",
    ("query", "key", "attn_mask", "startend_row_indices", "statistics"),
    ("Query", "Key", "AttnMask", "StartendRowIndices", "Statistics"),
    numbers=Attention._fields[_OF_NUMBERS],
    integers=("seed", *_INTEGERS),
    mask="attn_mask",
    differentiable=3,
    listed_as=ATTENTION.type,
)


def _arguments(description: Attention) -> tuple:
    d, fields = description, tuple(description)
    switches = _op.FIXED_SEED if d.seed is not None else 0
    if d.causal:
        switches |= _op.CAUSAL
    if d.keys_by_head:
        switches |= _op.KEYS_BY_HEAD
    if d.mode == MODES[0]:
        switches |= _op.UPSCALE_IN_TRAIN
    integers = (d.seed or 0, *fields[_OF_INTEGERS])
    return fields[_OF_TENSORS], d.training, switches, fields[_OF_NUMBERS], integers


@paddle.jit.not_to_static
def attention_with_weights(description: Attention) -> tuple:
    """The result of a checked description, and the weights of its values after dropout,
    ``[batch, num_heads, queries, keys]``, both of query's dtype. Either has its gradient.

    Raises:
        NotImplementedError: Sequences are packed, or see :func:`attention`.
    """
    if description.cu_seqlens_q is not None:
        raise NotImplementedError("need_weights: expected none beside cu_seqlens")
    if _is_exported():
        return _of_ordinary_ops(description)
    _check_meshes(description)
    d = _separated(description)
    inputs, training, switches, *others = _arguments(d)
    out, statistics = ATTENTION.outputs(inputs, training, switches | _op.SAVE_ALWAYS, *others)
    statistics.stop_gradient = True
    inputs = (d.query, d.key, d.attn_mask, d.startend_row_indices, statistics)
    return out, WEIGHTS.call(inputs, training, switches, *others)


@paddle.jit.not_to_static
def attention(description: Attention) -> Any:
    """Computes a checked description by the operator wherever that serves.

    Raises:
        NotImplementedError: There are auto-parallel tensors on Paddle 2.
    """
    if _is_exported():
        return _of_ordinary_ops(description)[0]
    _check_meshes(description)
    return ATTENTION.call(*_arguments(description))


def _check_meshes(d: Attention) -> None:
    if in_dynamic_mode():
        is_auto_parallel(d.query, d.key, d.value)  # raises on Paddle 2; else the operator serves them too


def _is_exported() -> bool:
    return not in_dynamic_mode() and is_exported_to_onnx()


def _of_ordinary_ops(description: Attention) -> tuple:
    """The result and the weights of a checked description, for graphs that may hold no operator of ours."""
    inputs = ATTENTION.checked_inputs(*_arguments(description))
    out, weights = attention_of_ordinary_ops(_separated(Attention._make((*inputs, *description[_OF_TENSORS.stop :]))))
    return out, paddle.cast(weights, inputs[0].dtype)


def separate(query: Any, key: Any, value: Any, num_kv_heads: int, axis: int = -2) -> tuple:
    """Query, key and value, each by itself, where an absent key lies behind the query and an absent value behind the
    key; the query may be None beside a key. `axis`: that of the heads in a key of its own."""
    if key is None:
        behind = num_kv_heads if value is not None else 2 * num_kv_heads
        query, key = paddle.split(query, [query.shape[-2] - behind, behind], axis=-2)
        axis = -2
    if value is None:
        key, value = paddle.split(key, 2, axis=axis)
    return query, key, value


def _separated(d: Attention) -> Attention:
    axis = 1 if d.keys_by_head else -2
    if d.value is not None:
        num_kv_heads = d.value.shape[axis]
    elif d.key is not None:
        num_kv_heads = d.key.shape[axis] // 2
    else:
        num_kv_heads = d.num_kv_heads or d.query.shape[-2] // 3
    query, key, value = separate(d.query, d.key, d.value, num_kv_heads, axis)
    return d._replace(query=query, key=key, value=value)
