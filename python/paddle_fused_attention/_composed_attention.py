"""The attention block composed of the smaller operators, where the one that computes it whole does not serve: keys and
values of other tensors than x, caches, attention weights that are asked for, and graphs for ONNX.

Layer norm, projections, attention, its weights, the output projection and what follows it are an operator each, so that
nothing of the scores' size is stored but weights that are asked for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import paddle
from paddle.base import core
from paddle.base.framework import _dygraph_tracer
from paddle.framework import in_dynamic_mode

from . import _amp, _op
from ._amp import without_auto_cast
from ._arranged import is_arranged, plain_shape, rows_of
from ._attention import Attention, attention, attention_with_weights, separate
from ._block import TENSORS, Block
from ._checks import dtype_name
from ._descriptions import MODES
from ._linear import linear
from ._residual_norm import ResidualNorm, residual_norm, tail_of


class Projections(NamedTuple):
    """Projections of query, key and value that are not packed, as ``paddle.nn.Linear`` holds them."""

    q_weight: Any  # [embed_dim, num_heads * head_dim]
    k_weight: Any  # [kdim, num_kv_heads * head_dim]
    v_weight: Any  # [vdim, num_kv_heads * head_dim]
    q_bias: Any = None  # [num_heads * head_dim] or None
    k_bias: Any = None
    v_bias: Any = None
    num_heads: int = 1

    @property
    def weights(self) -> tuple[Any, Any, Any]:
        return self.q_weight, self.k_weight, self.v_weight


_OF_PROJECTIONS = Projections._fields[:-1]  # its tensors


class Source(NamedTuple):
    """What the queries attend to, and what is wanted beside the result."""

    key: Any = None  # [batch, keys, kdim]; None: x
    value: Any = None  # [batch, keys, vdim]; None: x
    projections: Projections | None = None  # None: those packed in the block's qkv_weight
    normalises: bool = True  # whether the first layer norm is applied to key and value as well
    # Keys and values [batch, num_kv_heads, length, head_dim] that are there already, as a pair, which errors call
    # cache.k and cache.v, or as one tensor [2, ...], cache_kv
    cache: Any = None
    is_static: bool = False  # whether they are all that there is: key and value are not read
    needs_weights: bool = False


class Composed(NamedTuple):
    """`cache` is the source's with the keys and values of this call after its own, or None."""

    out: Any  # like x
    weights: Any = None  # [batch, num_heads, queries, keys], after dropout, or None
    cache: Any = None


@paddle.jit.not_to_static
def results_of(*found: Any) -> Any:
    """Those that are not None, as a layer returns them: one alone, or a tuple."""
    results = tuple(result for result in found if result is not None)
    return results[0] if len(results) == 1 else results


def generator_of(x: paddle.Tensor) -> Any:
    """Paddle's generator of a tensor's device, which operators draw from."""
    return (
        core.default_cpu_generator() if x.place.is_cpu_place() else core.default_cuda_generator(x.place.gpu_device_id())
    )


@paddle.jit.not_to_static
def composed_attention(block: Block, source: Source) -> Composed:
    """Computes a checked block with other keys and values, or what else the source says.

    The mask broadcasts to ``[batch, num_heads, queries, keys]``, keys of the cache included. In dygraph dropout drops
    the same elements as the block's operator, so that it does not matter which of the two runs. In a graph others.

    Raises:
        TypeError, ValueError: A tensor does not fit the others.
        NotImplementedError: Packed sequences attend to other keys, or their weights are asked for.
    """
    found = _with_cache_at_once(block, source)
    if found is not None:
        return found
    draws_once = (
        in_dynamic_mode()
        and block.training
        and block.seed is None
        and block.dropout_rate > 0.0
        and block.attn_dropout_rate > 0.0
    )
    state = generator_of(block.x).get_state() if draws_once else None
    block, y, weights, cache = _before_tail(block, source, 0, 0)
    if draws_once:
        generator_of(block.x).set_state(state)
    return Composed(with_tail(block, y), weights, cache)


def _with_cache_at_once(block: Block, source: Source) -> Composed | None:
    """By one call, where that serves; else None."""
    is_own = source.key is source.value is None or source.is_static
    if source.cache is None or source.projections is not None or source.needs_weights or not is_own:
        return None
    found = _op.fused_attention_with_cache(block, source.cache, source.is_static)
    if found is None:
        return None
    out, *cache = found
    if source.is_static:
        return Composed(out, None, source.cache)
    return Composed(out, None, tuple(cache) if isinstance(source.cache, tuple) else cache[0])


@paddle.jit.not_to_static
def composed_before_tail(block: Block, source: Source, first_head: int, total_heads: int) -> Any:
    """The output projection, without its bias, of a checked block with the heads from `first_head` on of
    `total_heads`."""
    return _before_tail(block, source, first_head, total_heads)[1]


def with_tail(block: Block, y: Any) -> Any:
    """What follows the output projection y, which may be of 16 bits beside a float32 x."""
    return residual_norm(tail_of(block, _like(y, block.x)))


def _before_tail(block: Block, source: Source, first_head: int, total_heads: int) -> tuple:
    """The block with its tensors as auto_cast wants them, the output projection, the weights and the cache."""
    mask, amp_dtype = block.attn_mask, _amp.target_dtype(_op.ATTENTION.type, _dygraph_tracer())
    if source.projections is None:
        block = _op.checked_block(block._replace(attn_mask=None), first_head, total_heads)
    else:
        block, source = _checked_unpacked(block, source, amp_dtype)
    _check_source(block, source, amp_dtype is not None)
    with without_auto_cast():
        description, cache = _describe(block, source)
        description = description._replace(attn_mask=mask, first_head=first_head, total_heads=total_heads)
        weights = None
        if source.needs_weights:
            o, weights = attention_with_weights(description)
        else:
            o = attention(description)
        o = _reshaped(o, 2, o.shape[-2] * o.shape[-1])
        return block, linear(o, block.linear_weight, None, False, False), weights, cache


_OF_BLOCK = tuple(name for name in TENSORS if name not in ("qkv_weight", "qkv_bias", "attn_mask"))


def _checked_unpacked(block: Block, source: Source, amp_dtype: Any) -> tuple:
    """The block and its source, whose projections are not packed, with their tensors as auto_cast wants them."""
    names = (*_OF_BLOCK, *_OF_PROJECTIONS)
    projections: Any = source.projections
    inputs: Any = [*(getattr(block, name) for name in _OF_BLOCK), *projections[:-1]]
    _op.check_tensors(names, inputs)
    if amp_dtype is not None:
        norms = [i for i, name in enumerate(names) if "ln_" in name]
        inputs = _amp.cast_inputs(inputs, norms, (0,), (), None, amp_dtype)
    count = len(_OF_BLOCK)
    projections = Projections._make((*inputs[count:], projections.num_heads))
    _check_width("query", inputs[0], projections.q_weight)
    block = block._replace(**dict(zip(_OF_BLOCK, inputs[:count])), attn_mask=None)
    return block, source._replace(projections=projections)


def _check_width(name: str, tensor: Any, weight: Any, any_float: bool = False) -> None:
    """Refuses what is not [batch, tokens, width] for a weight [width, columns], or of a dtype that does not go with
    it."""
    shape, width = list(tensor.shape), (plain_shape(weight, 0) if is_arranged(weight) else weight.shape)[0]
    if len(shape) != 3 or shape[2] not in (width, -1):
        raise ValueError(f"{name}: expected shape [batch, tokens, {width}], got {shape}")
    found, wanted = dtype_name(tensor), dtype_name(weight)
    narrow = wanted in ("float16", "bfloat16")
    if found != wanted and not (narrow and found == "float32") and not (any_float and {found, wanted} <= _CASTABLE):
        raise TypeError(f"{name}: expected {'float32 or ' if narrow else ''}{wanted}, as its weight has, got {found}")


def _check_source(block: Block, source: Source, any_float: bool) -> None:
    x = block.x
    if not in_dynamic_mode() and source.projections is None and -1 in block.qkv_weight.shape:
        raise ValueError(f"qkv_weight: expected known sizes, got shape {list(block.qkv_weight.shape)}")
    for name, tensor in (("key", source.key), ("value", source.value)):
        if tensor is not None and block.cu_seqlens is not None:
            raise NotImplementedError(f"{name}: expected the query itself with cu_seqlens, got another tensor")
    if source.cache is not None:
        _check_cache(block, source, any_float)
    if source.is_static:
        return
    key, value = (x if tensor is None else tensor for tensor in (source.key, source.value))
    if source.projections is not None:
        _, of_key, of_value = source.projections.weights
        _check_width("key", key, of_key, any_float)
        _check_width("value", value, of_value, any_float)
    if key is value is x:
        return
    of_key, of_value = (t.shape[-1] if source.projections is not None else x.shape[-1] for t in (key, value))
    check_like("key", key, [x.shape[0], "keys", of_key], x, "query", any_float)
    check_like("value", value, [x.shape[0], key.shape[1], of_value], key, "key", any_float)


def _check_cache(block: Block, source: Source, any_float: bool) -> None:
    x, cache = block.x, source.cache
    _, num_kv_heads, head_dim = _heads_of(block, source)
    expected = [x.shape[0], num_kv_heads, "length", head_dim]
    is_pair = isinstance(cache, tuple)
    # Beside 16-bit projections of a float32 x it is of 16 bits too.
    any_float = any_float or (cache[0] if is_pair else cache).dtype == block.linear_weight.dtype
    if is_pair:
        check_like("cache.k", cache[0], expected, x, any_float=any_float)
        check_like("cache.v", cache[1], list(cache[0].shape), cache[0], "cache.k")
    else:
        check_like("cache_kv", cache, [2, *expected], x, any_float=any_float)


_CASTABLE = {"float32", "float16", "bfloat16"}


def check_like(
    name: str, tensor: Any, expected: list, other: Any, other_name: str = "x", any_float: bool = False
) -> None:
    """Refuses a tensor of another shape, in which a name stands for any size, or of another dtype than `other`."""
    shape = list(tensor.shape)
    if len(shape) != len(expected) or not all(
        isinstance(wanted, str) or wanted == size or -1 in (wanted, size) for wanted, size in zip(expected, shape)
    ):
        raise ValueError(
            f"{name}: expected shape [{', '.join(map(str, expected))}] for {other_name} of shape {list(other.shape)}, "
            f"got {shape}"
        )
    if tensor.dtype != other.dtype and not (any_float and {dtype_name(tensor), dtype_name(other)} <= _CASTABLE):
        raise TypeError(f"{name}: expected {other_name}'s dtype {dtype_name(other)}, got {dtype_name(tensor)}")


def _describe(block: Block, source: Source) -> tuple:
    """Attention of the projections, but for the mask and the heads' places, and the new cache."""
    num_heads, num_kv_heads, head_dim = _heads_of(block, source)
    h = _normalised(block, block.x)
    if source.is_static:
        cache = source.cache
        (query,), (key, value) = _project(block, source, (h,)), cache
    else:
        query, key, value = _project(block, source, (h, *_keys_normalised(block, source, h)))
        cache = None
        if source.cache is not None:
            query, key, value = separate(query, key, value, num_kv_heads)
            cache = _extended(source.cache, key, value)
            key, value = cache
    if cache is not None:
        key, value = (_like(tensor, query) for tensor in (key, value))
    scale, window, longest = block.scores
    # fmt: off
    description = Attention._make((
        query, key, value, None, block.cu_seqlens, block.cu_seqlens, None,
        head_dim**-0.5 if scale is None else scale, block.attn_dropout_rate,
        block.training, block.causal, cache is not None, block.mode, block.seed, *window, longest, longest,
        0, 0, num_kv_heads,
    ))
    # fmt: on
    return description, cache


def _keys_normalised(block: Block, source: Source, h: Any) -> tuple:
    """Key and value as they are projected, the same object where they are the same; h is x normalised."""
    x = block.x
    key, value = (x if tensor is None else tensor for tensor in (source.key, source.value))
    if not source.normalises:
        return h if key is x else key, h if value is x else value
    k = h if key is x else _normalised(block, key)
    return k, h if value is x else k if value is key else _normalised(block, value)


@paddle.jit.not_to_static
def projected_keys(block: Block, source: Source) -> tuple:
    """The keys and values of the source, which has both, as a cache holds them. Of the block only parameters are
    read."""
    any_float = _amp.target_dtype(_op.ATTENTION.type, _dygraph_tracer()) is not None
    _op.check_tensors(("key", "value"), (source.key, source.value))
    weights = (None, block.linear_weight, block.linear_weight)  # [embed_dim, embed_dim]
    if source.projections is not None:
        weights = source.projections.weights
    _check_width("key", source.key, weights[1], any_float)
    _check_width("value", source.value, weights[2], any_float)
    check_like("value", source.value, [*source.key.shape[:2], source.value.shape[2]], source.key, "key", any_float)
    key, value = _project(block, source, _keys_normalised(block._replace(x=None), source, None), 1)
    _, key, value = separate(None, key, value, _heads_of(block, source)[1])
    by_head = (tensor.transpose([0, 2, 1, 3]) for tensor in (key, value))
    # Not views, which every later call would copy.
    return tuple(tensor.contiguous() if in_dynamic_mode() else tensor for tensor in by_head)


def _heads_of(block: Block, source: Source) -> tuple[int, int, int]:
    """The heads of queries, those of keys, and head_dim."""
    weight, projections = block.qkv_weight, source.projections
    if projections is not None:
        head_dim = projections.q_weight.shape[1] // projections.num_heads
        return projections.num_heads, projections.k_weight.shape[1] // head_dim, head_dim
    shape, rows = weight.shape, block.linear_weight.shape[0]
    if is_arranged(block.linear_weight):
        shape, rows = plain_shape(weight, -1), plain_shape(block.linear_weight, 0)[0]
    if len(shape) == 4:
        return shape[1], shape[1], shape[2]
    num_heads = rows // shape[1]
    return num_heads, (shape[0] - num_heads) // 2, shape[1]


def _project(block: Block, source: Source, tensors: tuple, first: int = 0) -> list:
    """The heads, [..., heads, head_dim], of those of query, key and value from `first` on, of one tensor each. Packed
    projections of one tensor, of several of the three that follow each other, are one product, and the first of them
    has the heads of all: the others are None."""
    num_heads, num_kv_heads, head_dim = _heads_of(block, source)
    counts, projections = (num_heads, num_kv_heads, num_kv_heads), source.projections
    of_arranged = projections is None and is_arranged(block.linear_weight)
    if projections is None:
        row = block.qkv_weight.shape[-3:] if of_arranged else [-1]
        rows = block.qkv_weight.reshape([sum(counts) * head_dim, *row])
        bias = None if block.qkv_bias is None else block.qkv_bias.reshape([-1])
    result: list = [None] * len(tensors)
    begun = 0  # the first of the tensors that wait for their product
    for i, tensor in enumerate(tensors):
        part = first + i
        if projections is None:
            if i + 1 < len(tensors) and tensors[i + 1] is tensor:
                continue
            heads = counts[first + begun : part + 1]
            stop = sum(counts[: part + 1]) * head_dim
            of_heads = slice(stop - sum(heads) * head_dim, stop)
            weight = rows_of(rows, of_heads.start, stop) if of_arranged else rows[of_heads]
            own_bias = None if bias is None else bias[of_heads]
            names = ("qkv_weight", "qkv_bias")
        else:
            heads, weight, own_bias = counts[part : part + 1], projections[part], projections[3 + part]
            names = (_OF_PROJECTIONS[part], _OF_PROJECTIONS[3 + part])
        tensor, called = _like(tensor, weight), ("query", "key", "value")[part]
        out = linear(tensor, weight, own_bias, False, projections is None, None, (called, *names))
        result[begun] = _reshaped(out, 1, sum(heads), head_dim)
        begun = i + 1
    return result


def _extended(cache: Any, key: Any, value: Any) -> Any:
    """The cache with further keys and values, [batch, tokens, num_kv_heads, head_dim], as a pair or one tensor as it
    was."""
    key, value = (tensor.transpose([0, 2, 1, 3]) for tensor in (key, value))
    if isinstance(cache, tuple):
        return tuple(paddle.concat([old, _like(new, old)], axis=2) for old, new in zip(cache, (key, value)))
    return paddle.concat([cache, _like(paddle.stack([key, value]), cache)], axis=3)


def _reshaped(tensor: Any, count: int, *sizes: int) -> Any:
    """The tensor with other last sizes in place of its `count`."""
    # A 0 copies an unknown size, but not that of an empty tensor.
    return tensor.reshape([*(max(size, 0) for size in tensor.shape[:-count]), *sizes])


def _like(tensor: Any, other: Any) -> Any:
    return tensor if tensor.dtype == other.dtype else paddle.cast(tensor, other.dtype)


def _normalised(block: Block, tensor: Any) -> Any:
    if not block.pre_layer_norm:
        return tensor
    # fmt: off
    return residual_norm(ResidualNorm._make((
        tensor, None, None, block.pre_ln_scale, block.pre_ln_bias, block.pre_ln_epsilon, 0.0, False, True, MODES[0],
        None,
    )))
    # fmt: on
