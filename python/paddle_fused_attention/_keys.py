"""Keys and values that a layer is given beside its query: whether they are the query, so that the operator, which takes one input
for all three, computes what was asked for; and the block of ordinary ops where they are not."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import paddle
from paddle.base import core
from paddle.framework import in_dynamic_mode

from ._composed import attention_part, residual_tail, result_dtype, used_inputs, without_auto_cast
from .functional import _check_tensor, check_arguments, check_switches, fused_multi_head_attention


@paddle.jit.not_to_static
def other_keys(query: Any, key: Any, value: Any) -> tuple | None:
    """The key and the value, each the query where it is None; None if both are the query itself.

    In dygraph that is decided by memory and contents, but only where no gradient is wanted, of which tensors of equal contents have one
    each. While a graph is built nothing but the name of a value is known.

    Raises:
        TypeError: key or value is no Tensor.
        NotImplementedError: Other keys or values with tensors of Paddle's auto-parallel engine.
    """
    dygraph = in_dynamic_mode()
    given = {name: t for name, t in (("query", query), ("key", key), ("value", value)) if t is not None or name == "query"}
    for name, tensor in given.items():
        _check_tensor(name, tensor, required=True)
        if isinstance(tensor, core.eager.Tensor) != dygraph:
            expected = "a dygraph Tensor" if dygraph else "a variable of the graph that is built"
            raise TypeError(f"{name}: expected {expected}, got {type(tensor).__name__}")
    keys = tuple(query if tensor is None else tensor for tensor in (key, value))
    if all(_is_same(query, tensor) for tensor in keys):
        return None
    if not dygraph:
        return keys
    for name, tensor in given.items():
        if tensor.is_dist():
            raise NotImplementedError(
                f"{name}: expected ordinary tensors where keys are not the query itself, got an auto-parallel one"
            )
        if not tensor.is_dense() or (tensor.size > 0 and not tensor._is_initialized()):
            raise TypeError(f"{name}: expected a dense Tensor with memory, got one that is sparse or has none")
    wants_gradient = paddle.is_grad_enabled() and not all(t.stop_gradient for t in (query, *keys))
    if not wants_gradient and all(_has_same_contents(query, tensor) for tensor in keys):
        return None
    return keys


def _is_same(query: Any, other: Any) -> bool:
    if other is query:
        return True
    if in_dynamic_mode():
        return False
    # Of one value in a graph Python may have several objects.
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
    # In float32 at least, which holds every 16-bit number: Paddle compares those on some devices only.
    a, b = (t if t.dtype == paddle.float64 else paddle.cast(t, "float32") for t in (query, other))
    return bool(paddle.all((a == b) | (paddle.isnan(a) & paddle.isnan(b))))


@paddle.jit.not_to_static
def attention_to_keys(
    x: paddle.Tensor,
    qkv_weight: paddle.Tensor,
    linear_weight: paddle.Tensor,
    pre_layer_norm: bool = False,
    pre_ln_scale: paddle.Tensor | None = None,
    pre_ln_bias: paddle.Tensor | None = None,
    ln_scale: paddle.Tensor | None = None,
    ln_bias: paddle.Tensor | None = None,
    pre_ln_epsilon: float = 1e-5,
    qkv_bias: paddle.Tensor | None = None,
    linear_bias: paddle.Tensor | None = None,
    attn_mask: paddle.Tensor | None = None,
    dropout_rate: float = 0.5,
    attn_dropout_rate: float = 0.5,
    ln_epsilon: float = 1e-5,
    *,
    keys: tuple,
    training: bool = True,
    mode: str = "upscale_in_train",
    final_layer_norm: bool = True,
    add_residual: bool = True,
    causal: bool = False,
    seed: int | None = None,
) -> paddle.Tensor:
    """:func:`fused_multi_head_attention` where the queries come from x, and the keys and the values from the two tensors in `keys`,
    ``[batch, keys, embed_dim]``, which the first layer norm normalises as it does x. Made of ordinary ops, which store the scores.

    The mask broadcasts to ``[batch, num_heads, seq_len, keys]``. In dygraph dropout drops what the operator would, so that it does not
    matter which of the two runs; in a graph it is Paddle's.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, or does not fit.
    """
    inputs = (x, qkv_weight, linear_weight, pre_ln_scale, pre_ln_bias, ln_scale, ln_bias, qkv_bias, linear_bias, attn_mask)
    numbers = check_arguments(inputs, pre_ln_epsilon, ln_epsilon, dropout_rate, attn_dropout_rate, mode, seed)
    check_switches(
        pre_layer_norm=pre_layer_norm,
        training=training,
        final_layer_norm=final_layer_norm,
        add_residual=add_residual,
        causal=causal,
    )
    inputs = used_inputs(inputs, pre_layer_norm, final_layer_norm)
    draws = in_dynamic_mode() and training and (numbers[2] > 0.0 or numbers[3] > 0.0)
    state = _generator(x).get_state() if draws else None
    y = attention_part(
        inputs,
        keys,
        pre_layer_norm=pre_layer_norm,
        numbers=numbers,
        training=training,
        mode=mode,
        causal=causal,
        draw=functools.partial(kept_scores, like=x, rate=numbers[3], seed=seed) if draws else None,
    )
    dtype = result_dtype(x)
    if 0 in x.shape:
        return paddle.cast(y, dtype)
    keep = None
    if draws:
        _generator(x).set_state(state)  # the operator draws once for both
        keep = _kept_output(x, qkv_weight, numbers, seed)
    with without_auto_cast():
        return residual_tail(
            x,
            y,
            linear_bias,
            ln_scale,
            ln_bias,
            numbers[1],
            dropout_rate=numbers[2],
            training=training,
            mode=mode,
            add_residual=add_residual,
            final_layer_norm=final_layer_norm,
            dtype=dtype,
            keep=keep,
        )


_WIDEST_HEAD = 64


def _generator(x: paddle.Tensor) -> Any:
    """Paddle's generator of a tensor's device, which the operator draws from."""
    return core.default_cpu_generator() if x.place.is_cpu_place() else core.default_cuda_generator(x.place.gpu_device_id())


@paddle.no_grad()
def _operator(*arguments: Any, **more: Any) -> paddle.Tensor:
    with without_auto_cast():
        return fused_multi_head_attention(*arguments, **more, training=True, add_residual=False, final_layer_norm=False)


def kept_scores(
    shape: list[int], like: paddle.Tensor, rate: float, seed: int | None, first_head: int = 0, total_heads: int = 0
) -> paddle.Tensor | None:
    """Which elements of the probabilities the operator's dropout keeps, as bool of shape [batch, num_heads, queries, keys].

    The heads are those from `first_head` on of `total_heads`. The generator moves on as by one call. The operator itself is asked: with
    equal scores and rows of the identity for values, the heads' outputs are what dropout leaves.
    """
    if rate == 0.0 or 0 in shape:
        return None
    batch, num_heads, queries, keys = shape
    heads = total_heads or num_heads
    tokens = max(queries, keys)
    width = min(keys, _WIDEST_HEAD)
    embed_dim = heads * width
    weight = np.zeros((3, heads, width, embed_dim), "float32")
    weight[2] = np.eye(embed_dim, dtype="float32").reshape(heads, width, embed_dim)
    weight, linear_weight = (
        paddle.to_tensor(array, place=like.place) for array in (weight, np.eye(embed_dim, dtype="float32"))
    )
    state = _generator(like).get_state()
    parts = []
    for start in range(0, keys, width):
        x = np.zeros((batch, tokens, heads, width), "float32")
        for column in range(min(width, keys - start)):
            x[:, start + column, :, column] = 1.0
        _generator(like).set_state(state)
        x = paddle.to_tensor(x.reshape(batch, tokens, embed_dim), place=like.place)
        out = _operator(x, weight, linear_weight, dropout_rate=0.0, attn_dropout_rate=rate, seed=seed)
        parts.append((out > 0.0).reshape([batch, tokens, heads, width]))
    kept = paddle.concat(parts, axis=-1).transpose([0, 2, 1, 3])
    return kept[:, first_head : first_head + num_heads, :queries, :keys]


def _kept_output(x: paddle.Tensor, qkv_weight: paddle.Tensor, numbers: tuple, seed: int | None) -> paddle.Tensor:
    """Which elements of the output projection the operator's dropout keeps, as bool. The generator moves on as by one call."""
    zeros = [paddle.zeros(tensor.shape, "float32") for tensor in (x, qkv_weight)]
    embed_dim = x.shape[-1]
    linear_weight, linear_bias = paddle.zeros([embed_dim, embed_dim]), paddle.ones([embed_dim])
    tensors = [t._copy_to(x.place, True) for t in (*zeros, linear_weight, linear_bias)]
    out = _operator(*tensors[:3], linear_bias=tensors[3], dropout_rate=numbers[2], attn_dropout_rate=numbers[3], seed=seed)
    return out > 0.0
