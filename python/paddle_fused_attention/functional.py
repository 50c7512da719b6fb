"""The fused attention block, attention by itself, a block's tail and linear layers as functions."""

from __future__ import annotations

import paddle
from paddle.framework import in_dynamic_mode

from . import _op
from ._block import Block, scores_of
from ._checks import check_tensor
from ._composed_attention import Source, composed_attention
from ._linear import linear
from ._meshes import is_auto_parallel
from ._ordinary_parts import is_exported_to_onnx
from ._residual_norm import ResidualNorm, residual_norm
from ._split_heads import attention_over_mesh
from ._types import Activation, Mode
from .attention_functional import (
    flash_attention,
    flash_attn_qkvpacked,
    flashmask_attention,
    scaled_dot_product_attention,
)
from .varlen_functional import flash_attn_unpadded, flash_attn_varlen_qkvpacked, memory_efficient_attention

__all__ = [
    "flash_attention",
    "flash_attn_qkvpacked",
    "flash_attn_unpadded",
    "flash_attn_varlen_qkvpacked",
    "flashmask_attention",
    "fused_bias_dropout_residual_layer_norm",
    "fused_linear",
    "fused_linear_activation",
    "fused_matmul_bias",
    "fused_multi_head_attention",
    "memory_efficient_attention",
    "scaled_dot_product_attention",
]


@paddle.jit.not_to_static
def self_attention(block: Block) -> paddle.Tensor:
    """Computes a checked block by the operator wherever that serves."""
    if in_dynamic_mode():
        if is_auto_parallel(block.x, block.qkv_weight):
            return attention_over_mesh(block)
    elif is_exported_to_onnx():
        return composed_attention(block, Source()).out
    return _op.fused_attention(block)


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
    pre_ln_epsilon: float = 1e-5,
    qkv_bias: paddle.Tensor | None = None,
    linear_bias: paddle.Tensor | None = None,
    attn_mask: paddle.Tensor | None = None,
    dropout_rate: float = 0.5,
    attn_dropout_rate: float = 0.5,
    ln_epsilon: float = 1e-5,
    name: str | None = None,
    *,
    training: bool = True,
    mode: Mode = "upscale_in_train",
    final_layer_norm: bool = True,
    add_residual: bool = True,
    causal: bool = False,
    seed: int | None = None,
    scale: float | None = None,
    window_size: int | tuple[int, int] | None = None,
    cu_seqlens: paddle.Tensor | None = None,
    max_seqlen: int | None = None,
) -> paddle.Tensor:
    """Self-attention with everything around it as one operator, differentiable, in dygraph and in static graphs.

    With W the ``qkv_weight`` read as ``[3 * num_heads * head_dim, embed_dim]``::

        h   = layer_norm(x; pre_ln_*) if pre_layer_norm else x
        qkv = h @ W^T + qkv_bias
        p   = softmax(q @ k^T * scale + attn_mask)
        y   = dropout(p, attn_dropout_rate) @ v @ linear_weight + linear_bias
        z   = (x if add_residual else 0) + dropout(y, dropout_rate)
        out = layer_norm(z; ln_*) if final_layer_norm else z

    The parameters up to ``name`` are those of Paddle's pull request #36498, which always has the final layer norm.

    Args:
        x: ``[batch, seq_len, embed_dim]``, or with ``cu_seqlens`` ``[tokens, embed_dim]``; float32, float64, float16 or
            bfloat16.
        qkv_weight: ``[3, num_heads, head_dim, embed_dim]`` with ``num_heads * head_dim = embed_dim``, dtype of x. With
            a float32 x it may be float16 or bfloat16: then the products and attention are in that dtype, all else in
            float32. Or, with fewer heads of keys and values (grouped-query attention),
            ``[num_heads + 2 * num_kv_heads, head_dim, embed_dim]``: the heads of queries, of keys and of values one
            after another. Head h of the queries reads head ``h // (num_heads // num_kv_heads)`` of the others.
        linear_weight: ``[embed_dim, embed_dim]``, dtype of qkv_weight.
        pre_layer_norm: Whether x is layer-normalised before the QKV projection.
        pre_ln_scale, pre_ln_bias: ``[embed_dim]``, dtype of x, or float32 for a 16-bit x. None: 1 and 0. Unused without
            ``pre_layer_norm``.
        ln_scale, ln_bias: The same for the final layer norm. Unused without ``final_layer_norm``.
        pre_ln_epsilon, ln_epsilon: Added to the variance.
        qkv_bias: The shape of qkv_weight but for embed_dim, dtype of qkv_weight, or None.
        linear_bias: ``[embed_dim]``, dtype of qkv_weight, or None.
        attn_mask: Any shape that broadcasts to ``[batch, num_heads, seq_len, seq_len]``, read in place. A float mask,
            of any float dtype, is added to the scores; True or a nonzero integer keeps a key and False or 0 hides it,
            as -inf does. A query that may see no key gives zeros. A float mask whose ``stop_gradient`` is False gets a
            gradient of its own shape. None with ``cu_seqlens``.
        dropout_rate, attn_dropout_rate: The probability of dropping an element, in [0, 1], exact to 2^-16.
        name: Unused; there for the sake of Paddle's convention.
        training: If False, nothing is dropped and nothing is kept for the gradient, which then computes all from x
            anew.
        mode: "upscale_in_train": what is kept is divided by ``1 - rate`` in training. "downscale_in_infer": everything
            is multiplied by ``1 - rate`` outside training.
        final_layer_norm: Whether the sum is layer-normalised.
        add_residual: Whether x is added.
        causal: Whether query i sees the keys up to i only; together with a mask, both apply.
        seed: Fixes the dropout masks; None draws from Paddle's generator, which ``paddle.seed`` sets.
        scale: The factor of the scores; None: ``head_dim ** -0.5``.
        window_size: Query i sees the keys from ``i - window_size[0]`` to ``i + window_size[1]`` only, where -1 has no
            end. An int stands for both. Together with ``causal`` both apply.
        cu_seqlens: For sequences that are packed one after another without padding: int32 ``[batch + 1]``, where each
            begins in x, and where the last one ends. A token sees only those of its own sequence. On the CPU the values
            are checked; on a GPU they must ascend from 0 to the number of tokens.
        max_seqlen: With ``cu_seqlens`` the length of the longest sequence, or more. None: it is read off, for which a
            GPU is waited for; while a graph is built it must be given.

    Returns:
        The shape and dtype of x.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape or a number does not fit.
    """
    # fmt: off
    block = Block._make((
        x, qkv_weight, linear_weight, pre_ln_scale, pre_ln_bias, ln_scale, ln_bias, qkv_bias, linear_bias, attn_mask,
        pre_ln_epsilon, ln_epsilon, dropout_rate, attn_dropout_rate,
        pre_layer_norm, training, final_layer_norm, add_residual, causal, mode, seed,
        cu_seqlens, scores_of(scale, window_size, max_seqlen, cu_seqlens),
    ))
    # fmt: on
    return self_attention(block.checked())


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
    *,
    final_layer_norm: bool = True,
    seed: int | None = None,
) -> paddle.Tensor:
    """``layer_norm(residual + dropout(x + bias))`` as one operator, differentiable, in dygraph and in static graphs.

    The parameters up to ``name`` are those of ``paddle.incubate.nn.functional``.

    Args:
        x: ``[..., embed_dim]``, float32, float64, float16 or bfloat16.
        residual: Shape and dtype of x.
        bias: ``[embed_dim]``, dtype of x, or of 16 bits beside a float32 x, or None.
        ln_scale, ln_bias: ``[embed_dim]``, dtype of x, or float32 for a 16-bit x. None: 1 and 0. Unused without
            ``final_layer_norm``.
        dropout_rate: The probability of dropping an element of x + bias, in [0, 1], exact to 2^-16.
        ln_epsilon: Added to the variance.
        training, mode, seed: As in :func:`fused_multi_head_attention`.
        name: Unused; there for the sake of Paddle's convention.
        final_layer_norm: Whether the sum is layer-normalised.

    Returns:
        Shape and dtype of x.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape or a number does not fit.
        NotImplementedError: There are auto-parallel tensors on Paddle 2.
    """
    if residual is None:
        check_tensor("residual", residual, required=True)
    # fmt: off
    description = ResidualNorm._make((
        x, residual, bias, ln_scale, ln_bias, ln_epsilon, dropout_rate, training, final_layer_norm, mode, seed,
    ))
    # fmt: on
    return residual_norm(description.checked())


@paddle.jit.not_to_static
def fused_linear(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    bias: paddle.Tensor | None = None,
    transpose_weight: bool = False,
    name: str | None = None,
) -> paddle.Tensor:
    """``x @ weight + bias`` as one operator, differentiable, in dygraph and in static graphs.

    Args:
        x: ``[..., in_features]``, float32, float64, float16 or bfloat16.
        weight: ``[in_features, out_features]``, with ``transpose_weight`` ``[out_features, in_features]``, dtype of x.
        bias: ``[out_features]``, dtype of x, or None.
        transpose_weight: See weight.
        name: Unused; there for the sake of Paddle's convention.

    Returns:
        ``[..., out_features]``, dtype of x.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape does not fit.
        NotImplementedError: There are auto-parallel tensors on Paddle 2.
    """
    return linear(x, weight, bias, False, transpose_weight)


@paddle.jit.not_to_static
def fused_linear_activation(
    x: paddle.Tensor,
    y: paddle.Tensor,
    bias: paddle.Tensor | None = None,
    trans_x: bool = False,
    trans_y: bool = False,
    activation: Activation | None = None,
) -> paddle.Tensor:
    """``activation(x @ y + bias)`` as one operator, differentiable, in dygraph and in static graphs.

    Args:
        x: ``[..., K]``, float32, float64, float16 or bfloat16; with ``trans_x`` ``[K, M]``, which is transposed.
        y: ``[K, N]``, dtype of x; with ``trans_y`` ``[N, K]``, which is transposed.
        bias: ``[N]``, dtype of x, or None.
        trans_x, trans_y: See x and y.
        activation: "relu", "gelu" (exact), "gelu_tanh" (approximate), "silu" or None.

    Returns:
        ``[..., N]``, with ``trans_x`` ``[M, N]``, dtype of x.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape or activation does not fit.
        NotImplementedError: There are auto-parallel tensors on Paddle 2.
    """
    return linear(x, y, bias, trans_x, trans_y, activation, ("x", "y", "bias"), ("trans_x", "trans_y"))


@paddle.jit.not_to_static
def fused_matmul_bias(
    x: paddle.Tensor,
    y: paddle.Tensor,
    bias: paddle.Tensor | None = None,
    transpose_x: bool = False,
    transpose_y: bool = False,
    name: str | None = None,
) -> paddle.Tensor:
    """:func:`fused_linear_activation` without an activation, with the parameters that Paddle's function of this name
    has."""
    return linear(x, y, bias, transpose_x, transpose_y, None, ("x", "y", "bias"), ("transpose_x", "transpose_y"))
