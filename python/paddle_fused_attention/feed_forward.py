"""The fused feed-forward block as a function."""

from __future__ import annotations

import paddle

from ._checks import check_switches
from ._feed_forward import FeedForward, feed_forward
from ._groups import group_of_ring
from ._types import Activation, Mode
from .parallel import parallel_feed_forward


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
    *,
    final_layer_norm: bool | None = None,
    gated: bool = False,
    seed: int | None = None,
) -> paddle.Tensor:
    """The feed-forward half of a transformer layer as one operator, differentiable, in dygraph and in static graphs::

        h   = layer_norm(x; ln1_*) if pre_layer_norm else x
        u   = dropout(activation(h @ linear1_weight + linear1_bias), dropout1_rate)
        y   = u @ linear2_weight + linear2_bias
        z   = (x if add_residual else 0) + dropout(y, dropout2_rate)
        out = layer_norm(z; ln2_*) if final_layer_norm else z

    The parameters up to ``name`` are those of ``paddle.incubate.nn.functional.fused_feedforward``.

    Args:
        x: ``[..., d_model]``, float32, float64, float16 or bfloat16.
        linear1_weight: ``[d_model, dim_feedforward]``, dtype of x; with ``gated`` ``[d_model, 2 * dim_feedforward]``.
            With a float32 x it may be float16 or bfloat16: then the products are in that dtype, all else in float32.
        linear2_weight: ``[dim_feedforward, d_model]``, dtype of linear1_weight.
        linear1_bias: ``[dim_feedforward]``, with ``gated`` ``[2 * dim_feedforward]``, dtype of linear1_weight, or None.
        linear2_bias: ``[d_model]``, dtype of linear1_weight, or None.
        ln1_scale, ln1_bias: ``[d_model]``, dtype of x, or float32 for a 16-bit x. None: 1 and 0. Unused without
            ``pre_layer_norm``.
        ln2_scale, ln2_bias: The same for the final layer norm. Unused without ``final_layer_norm``.
        dropout1_rate, dropout2_rate: The probability of dropping a hidden number and an element of the second
            projection, in [0, 1], exact to 2^-16.
        activation: "relu", "gelu" (exact), "gelu_tanh" (approximate) or "silu".
        ln1_epsilon, ln2_epsilon: Added to the variance.
        pre_layer_norm: Whether x is layer-normalised before the first projection.
        training: If False, nothing is dropped and nothing is kept for the gradient, which then computes all from x
            anew.
        mode: "upscale_in_train": what is kept is divided by ``1 - rate`` in training. "downscale_in_infer": everything
            is multiplied by ``1 - rate`` outside training.
        ring_id: The id of a group of ``paddle.distributed.new_group`` for tensor parallelism, in dygraph: each of its n
            processes has 1 / n of the hidden numbers, that is, ``linear1_weight`` [d_model, dim_feedforward / n],
            ``linear1_bias`` likewise (with ``gated`` its columns of both halves), and ``linear2_weight``
            [dim_feedforward / n, d_model]; all else is whole. -1: none.
        add_residual: Whether x is added.
        name: Unused; there for the sake of Paddle's convention.
        final_layer_norm: Whether the sum is layer-normalised. None: where ``pre_layer_norm`` is False.
        gated: Whether the first projection's columns are two halves (a, b), of which ``activation(a) * b`` takes the
            activation's place.
        seed: Fixes the dropout masks; None draws from Paddle's generator, which ``paddle.seed`` sets. Where ordinary
            ops compute the block, for ONNX, dropout is Paddle's own.

    Returns:
        Shape and dtype of x.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape, a number, activation or ring_id does not fit.
        NotImplementedError: Tensor parallelism in a static graph, or auto-parallel tensors on Paddle 2.
    """
    group = None if type(ring_id) is int and ring_id == -1 else group_of_ring(ring_id)
    if type(pre_layer_norm) is not bool:
        check_switches(pre_layer_norm=pre_layer_norm)
    if final_layer_norm is None:
        final_layer_norm = not pre_layer_norm
    # fmt: off
    description = FeedForward._make((
        x, linear1_weight, linear2_weight, ln1_scale, ln1_bias, ln2_scale, ln2_bias, linear1_bias, linear2_bias,
        ln1_epsilon, ln2_epsilon, dropout1_rate, dropout2_rate,
        pre_layer_norm, training, final_layer_norm, add_residual, gated, activation, mode, seed,
    )).checked()
    # fmt: on
    return feed_forward(description) if group is None else parallel_feed_forward(description, group)
