"""The fused functions of ``paddle.incubate.nn.functional``, as Paddle defines them today, on this package's
operators."""

from __future__ import annotations

from numbers import Integral
from typing import Any, Literal

import paddle

from .. import feed_forward, functional
from .._block import UNPACKED, Block
from .._checks import check_switches, check_tensor, dtype_name, shown
from .._composed_attention import Source, composed_attention
from .._groups import group_of_ring
from .._linear import linear
from .._op import check_tensors
from .._types import Activation, Mode
from ..functional import self_attention
from ..parallel import parallel_attention
from ..weights import pack_projections

__all__ = [
    "fused_bias_dropout_residual_layer_norm",
    "fused_feedforward",
    "fused_linear",
    "fused_linear_activation",
    "fused_matmul_bias",
    "fused_multi_head_attention",
]


# Those that paddle.matmul has, on one device or another.
_DTYPES_OF_PRODUCTS = ("float32", "float64", "float16", "bfloat16", "int32", "int64", "complex64", "complex128")


def pack_transposed(x: Any, qkv_weight: Any, qkv_bias: Any, num_heads: int, nranks: int) -> tuple[Any, ...]:
    """Packs a weight ``[embed_dim, 3 * embed_dim]`` and a bias ``[3 * embed_dim]`` with columns in the order 3,
    num_heads, head_dim, or one of nranks parts of these, with a part of the heads."""
    embed_dim = x.shape[2]
    if embed_dim < 0 and len(qkv_weight.shape) == 2:  # unknown in a static graph, where the weight's is known
        embed_dim = qkv_weight.shape[0]
    shape = list(qkv_weight.shape)
    if len(shape) == 2 and shape[0] != embed_dim and shape[1] * nranks == 3 * shape[0] > 0:
        # The weight fits itself, so that x is likelier wrong.
        raise ValueError(
            f"x: expected shape [batch, seq_len, {shape[0]}] for qkv_weight of shape {shape} with transpose_qkv_wb, "
            f"got {list(x.shape)}"
        )
    if isinstance(num_heads, bool) or not isinstance(num_heads, Integral):
        raise TypeError(f"num_heads: expected an int with transpose_qkv_wb, got {shown(num_heads)}")
    if num_heads < 1 or embed_dim % (num_heads * nranks):
        on_ranks = f" on {nranks} processes" if nranks > 1 else ""
        raise ValueError(
            f"num_heads: expected a divisor of embed_dim {embed_dim}{on_ranks} with transpose_qkv_wb, got "
            f"{shown(num_heads)}"
        )
    width = embed_dim // nranks
    expected = {"qkv_weight": [embed_dim, 3 * width], "qkv_bias": [3 * width]}
    for name, tensor in (("qkv_weight", qkv_weight), ("qkv_bias", qkv_bias)):
        if tensor is not None and list(tensor.shape) != expected[name]:
            raise ValueError(
                f"{name}: expected shape {expected[name]} for x with embed_dim {embed_dim} and transpose_qkv_wb, "
                f"got {list(tensor.shape)}"
            )
    return tuple(None if t is None else pack_projections([t], int(num_heads)) for t in (qkv_weight, qkv_bias))


def seed_of_program() -> int | None:
    """The seed that Paddle's function takes for its dropout; None: Paddle's generator."""
    return paddle.static.default_main_program().random_seed or None


@paddle.jit.not_to_static
def fused_multi_head_attention(
    x: paddle.Tensor,
    qkv_weight: paddle.Tensor,
    linear_weight: paddle.Tensor,
    pre_layer_norm: bool = False,
    pre_ln_scale: paddle.Tensor | None = None,
    pre_ln_bias: paddle.Tensor | None = None,
    ln_scale: paddle.Tensor | None = None,
    ln_bias: paddle.Tensor | None = None,
    pre_ln_epsilon: float = 1e-05,
    qkv_bias: paddle.Tensor | None = None,
    linear_bias: paddle.Tensor | None = None,
    cache_kv: paddle.Tensor | None = None,
    attn_mask: paddle.Tensor | None = None,
    dropout_rate: float = 0.5,
    attn_dropout_rate: float = 0.5,
    ln_epsilon: float = 1e-05,
    training: bool = True,
    mode: Mode = "upscale_in_train",
    ring_id: int = -1,
    add_residual: bool = True,
    num_heads: int = -1,
    transpose_qkv_wb: bool = False,
    name: str | None = None,
) -> Any:
    """:func:`paddle_fused_attention.fused_multi_head_attention` with the signature and meaning of
    ``paddle.incubate.nn.functional``: the result is layer-normalised exactly where ``pre_layer_norm`` is False.

    Args:
        x: ``[batch, seq_len, embed_dim]``, float32, float64, float16 or bfloat16.
        qkv_weight: ``[3, num_heads, head_dim, embed_dim]``; with ``transpose_qkv_wb`` ``[embed_dim, 3 * embed_dim]``.
        linear_weight: ``[embed_dim, embed_dim]``.
        pre_layer_norm: Whether x is layer-normalised (True) or the result (False).
        pre_ln_scale, pre_ln_bias, ln_scale, ln_bias: ``[embed_dim]`` or None.
        pre_ln_epsilon, ln_epsilon: Added to the variance.
        qkv_bias: ``[3, num_heads, head_dim]``, with ``transpose_qkv_wb`` ``[3 * embed_dim]``, or None.
        linear_bias: ``[embed_dim]`` or None.
        cache_kv: ``[2, batch, num_heads, cached_len, head_dim]``, dtype of x: keys and values that come before those of
            x.
        attn_mask: Broadcasts to ``[batch, num_heads, seq_len, cached_len + seq_len]``; float masks are added, True or a
            nonzero integer keeps a key.
        dropout_rate, attn_dropout_rate: The probability of dropping an element of the output projection and of the
            attention.
        training: Without it nothing is dropped.
        mode: "upscale_in_train" or "downscale_in_infer".
        ring_id: The id of a group of ``paddle.distributed.new_group`` for tensor parallelism, in dygraph: each of its n
            processes has 1 / n of the heads, that is, ``qkv_weight`` [3, num_heads / n, head_dim, embed_dim] or
            [embed_dim, 3 * embed_dim / n], ``qkv_bias`` likewise, and ``linear_weight`` [embed_dim / n, embed_dim]; all
            else is whole. -1: none.
        add_residual: Whether x is added.
        num_heads: Read with ``transpose_qkv_wb`` only.
        transpose_qkv_wb: See qkv_weight.
        name: Unused.

    Dropout is seeded by ``paddle.static.default_main_program().random_seed`` where that is not 0, as in Paddle, else by
    Paddle's generator.

    Returns:
        ``[batch, seq_len, embed_dim]``; with ``cache_kv`` a tuple of that and the new cache, in which x's keys and
        values come last, ``[2, batch, num_heads, cached_len + seq_len, head_dim]``.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, or does not fit.
        NotImplementedError: Tensor parallelism with ``cache_kv`` or in a static graph.
    """
    group = group_of_ring(ring_id)
    if not type(transpose_qkv_wb) is type(pre_layer_norm) is bool:
        check_switches(transpose_qkv_wb=transpose_qkv_wb, pre_layer_norm=pre_layer_norm)
    for argument, tensor in (("x", x), ("qkv_weight", qkv_weight), ("linear_weight", linear_weight)):
        check_tensor(argument, tensor, required=True)
    for argument, optional in (("qkv_bias", qkv_bias), ("cache_kv", cache_kv)):
        check_tensor(argument, optional)
    if transpose_qkv_wb or cache_kv is not None:
        # These tensors go through Paddle's own operators.
        check_tensors(
            ("x", "qkv_weight", "linear_weight", "qkv_bias", "cache_kv"),
            (x, qkv_weight, linear_weight, qkv_bias, cache_kv),
        )
    if len(x.shape) != 3:
        raise ValueError(f"x: expected shape [batch, seq_len, embed_dim], got {list(x.shape)}")
    if transpose_qkv_wb:
        qkv_weight, qkv_bias = pack_transposed(x, qkv_weight, qkv_bias, num_heads, 1 if group is None else group.nranks)
    if cache_kv is not None and group is not None:
        raise NotImplementedError(f"cache_kv: expected None with tensor parallelism, ring_id {ring_id}, got a Tensor")
    # fmt: off
    block = Block._make((
        x, qkv_weight, linear_weight, pre_ln_scale, pre_ln_bias, ln_scale, ln_bias, qkv_bias, linear_bias, attn_mask,
        pre_ln_epsilon, ln_epsilon, dropout_rate, attn_dropout_rate,
        pre_layer_norm, training, not pre_layer_norm, add_residual, False, mode, seed_of_program(), *UNPACKED,
    )).checked()
    # fmt: on
    if group is not None:
        return parallel_attention(block, group)
    if cache_kv is None:
        return self_attention(block)
    out, _, cache = composed_attention(block, Source(cache=cache_kv))
    return out, cache


@paddle.jit.not_to_static
def fused_feedforward(
    x: paddle.Tensor,
    linear1_weight: paddle.Tensor,
    linear2_weight: paddle.Tensor,
    linear1_bias: paddle.Tensor | None = None,
    linear2_bias: paddle.Tensor | None = None,
    ln1_scale: paddle.Tensor | None = None,
    ln1_bias: paddle.Tensor | None = None,
    ln2_scale: paddle.Tensor | None = None,
    ln2_bias: paddle.Tensor | None = None,
    dropout1_rate: float = 0.5,
    dropout2_rate: float = 0.5,
    activation: Activation = "relu",
    ln1_epsilon: float = 1e-5,
    ln2_epsilon: float = 1e-5,
    pre_layer_norm: bool = False,
    training: bool = True,
    mode: Mode = "upscale_in_train",
    ring_id: int = -1,
    add_residual: bool = True,
    name: str | None = None,
) -> paddle.Tensor:
    """:func:`paddle_fused_attention.fused_feedforward` with the signature of ``paddle.incubate.nn.functional``: the
    result is layer-normalised exactly where ``pre_layer_norm`` is False. Dropout is seeded as that of
    :func:`fused_multi_head_attention`."""
    return feed_forward.fused_feedforward(
        x,
        linear1_weight,
        linear2_weight,
        linear1_bias,
        linear2_bias,
        ln1_scale,
        ln1_bias,
        ln2_scale,
        ln2_bias,
        dropout1_rate,
        dropout2_rate,
        activation,
        ln1_epsilon,
        ln2_epsilon,
        pre_layer_norm,
        training,
        mode,
        ring_id,
        add_residual,
        seed=seed_of_program(),
    )


@paddle.jit.not_to_static
def fused_bias_dropout_residual_layer_norm(
    x: paddle.Tensor,
    residual: paddle.Tensor,
    bias: paddle.Tensor | None = None,
    ln_scale: paddle.Tensor | None = None,
    ln_bias: paddle.Tensor | None = None,
    dropout_rate: float = 0.5,
    ln_epsilon: float = 1e-5,
    training: bool = True,
    mode: Mode = "upscale_in_train",
    name: str | None = None,
) -> paddle.Tensor:
    """:func:`paddle_fused_attention.fused_bias_dropout_residual_layer_norm` with the signature of
    ``paddle.incubate.nn.functional``. Dropout is seeded as that of :func:`fused_multi_head_attention`."""
    return functional.fused_bias_dropout_residual_layer_norm(
        x, residual, bias, ln_scale, ln_bias, dropout_rate, ln_epsilon, training, mode, seed=seed_of_program()
    )


def _linear_activation(
    x: Any, y: Any, bias: Any, transpose_x: Any, transpose_y: Any, activation: Any, names: tuple, switch_names: tuple
) -> Any:
    """As Paddle's functions compute it, which with ``transpose_x`` take x ``[K, ...]`` of any rank, read as
    ``[K, M]``, for M a product of sizes."""
    if type(transpose_x) is not bool:
        check_switches(**{switch_names[0]: transpose_x})
    if not transpose_x or len(x.shape) < 3:
        return linear(x, y, bias, transpose_x, transpose_y, activation, names, switch_names)
    check_tensors(names[:1], (x,))
    out = linear(x.flatten(1), y, bias, transpose_x, transpose_y, activation, names, switch_names)
    unknown = sum(size < 0 for size in x.shape[1:]) > 1
    sizes = [paddle.shape(x)[i] for i in range(1, len(x.shape))] if unknown else list(x.shape[1:])
    return out.reshape([*sizes, out.shape[-1]])


def _check_product(x: Any, y: Any, transpose_x: bool, transpose_y: bool) -> None:
    """Refuses what paddle.matmul refuses in words of its own, or takes by casting it."""
    for name, tensor in (("x", x), ("y", y)):
        if dtype_name(tensor) not in _DTYPES_OF_PRODUCTS:
            raise TypeError(f"{name}: expected one of {', '.join(_DTYPES_OF_PRODUCTS)}, got {dtype_name(tensor)}")
        if not len(tensor.shape):
            raise ValueError(f"{name}: expected at least one dimension, got shape []")
    if y.dtype != x.dtype:
        raise TypeError(f"y: expected {dtype_name(x)} like x, got {dtype_name(y)}")
    left, right = list(x.shape), list(y.shape)
    inner = left[-2 if transpose_x and len(left) > 1 else -1], right[-1 if transpose_y or len(right) == 1 else -2]
    batches = zip(reversed(left[:-2]), reversed(right[:-2]))
    if not (inner[0] == inner[1] or -1 in inner) or not all(
        a == b or not {-1, 1}.isdisjoint((a, b)) for a, b in batches
    ):
        raise ValueError(
            f"y: expected a shape whose product with x of shape {left} there is, with transpose_x {transpose_x} and "
            f"transpose_y {transpose_y}, got {right}"
        )


@paddle.jit.not_to_static
def fused_matmul_bias(
    x: paddle.Tensor,
    y: paddle.Tensor,
    bias: paddle.Tensor | None = None,
    transpose_x: bool = False,
    transpose_y: bool = False,
    name: str | None = None,
) -> paddle.Tensor:
    """:func:`paddle_fused_attention.fused_matmul_bias`, and ``paddle.matmul`` where there is no bias and y, or a
    transposed x, is no matrix, as in Paddle.

    With a bias and ``transpose_x`` x is ``[K, ...]``, and the result ``[..., N]``.
    """
    names, switch_names = ("x", "y", "bias"), ("transpose_x", "transpose_y")
    check_tensor("x", x, required=True)
    check_tensor("y", y, required=True)
    if bias is None and (len(y.shape) != 2 or len(x.shape) < 2 or (transpose_x and len(x.shape) > 2)):
        check_switches(transpose_x=transpose_x, transpose_y=transpose_y)
        check_tensors(("x", "y"), (x, y))
        _check_product(x, y, bool(transpose_x), bool(transpose_y))
        return paddle.matmul(x, y, bool(transpose_x), bool(transpose_y))
    return _linear_activation(x, y, bias, transpose_x, transpose_y, None, names, switch_names)


@paddle.jit.not_to_static
def fused_linear(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    bias: paddle.Tensor | None = None,
    transpose_weight: bool = False,
    name: str | None = None,
) -> paddle.Tensor:
    """:func:`paddle_fused_attention.fused_linear`."""
    return functional.fused_linear(x, weight, bias, transpose_weight)


@paddle.jit.not_to_static
def fused_linear_activation(
    x: paddle.Tensor,
    y: paddle.Tensor,
    bias: paddle.Tensor | None,
    trans_x: bool = False,
    trans_y: bool = False,
    activation: Activation | Literal["none"] | None = None,
) -> paddle.Tensor:
    """:func:`paddle_fused_attention.fused_linear_activation`, which takes "none" too, Paddle's name for no activation,
    and with ``trans_x`` x ``[K, ...]``, for a result ``[..., N]``."""
    activation = None if isinstance(activation, str) and activation == "none" else activation
    check_tensor("x", x, required=True)
    return _linear_activation(x, y, bias, trans_x, trans_y, activation, ("x", "y", "bias"), ("trans_x", "trans_y"))
