"""``paddle.incubate.nn``'s FusedFeedForward and FusedTransformerEncoderLayer on this package's operators."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn
from paddle.incubate.nn import FusedFeedForward as BuiltIn
from paddle.incubate.nn import FusedTransformerEncoderLayer as BuiltInEncoderLayer
from paddle.nn.layer.transformer import _convert_param_attr_to_list

from .._checks import INFINITY, check_count, check_heads, check_number, check_switches, check_text, renamed
from .._feed_forward import check_activation
from .._groups import group_of_ring
from .._initializers import check_attr
from .._loading import LoadsAnyFloat
from .._types import Activation
from .functional import fused_feedforward
from .layer import FusedMultiHeadAttention

__all__ = ["FusedFeedForward", "FusedTransformerEncoderLayer"]


class FusedFeedForward(LoadsAnyFloat, BuiltIn):
    """The built-in layer, with its parameters and attributes; only the computation is this package's.

    Parameters: ``_linear1_weight`` [d_model, dim_feedforward], ``_linear1_bias`` [dim_feedforward],
    ``_linear2_weight`` [dim_feedforward, d_model], ``_linear2_bias`` [d_model]; ``_ln1_scale`` and ``_ln1_bias``
    [d_model] with ``normalize_before``, else ``_ln2_scale`` and ``_ln2_bias``.

    Args:
        d_model: Width of the input and the output.
        dim_feedforward: The number of hidden numbers.
        dropout_rate: The probability of dropping an element of the second projection.
        epsilon: Of the layer norm.
        activation: "relu", "gelu" (exact), "gelu_tanh" or "silu".
        act_dropout_rate: The probability of dropping a hidden number; None: dropout_rate.
        normalize_before: Whether the input is layer-normalised (True) or the output (False).
        linear1_weight_attr, linear1_bias_attr, linear2_weight_attr, linear2_bias_attr, ln1_scale_attr, ln1_bias_attr,
            ln2_scale_attr, ln2_bias_attr: ParamAttr of each parameter; False: the parameter, a bias or of the layer
            norm, is left out.
        nranks, ring_id: For tensor parallelism the number of processes of a group of ``paddle.distributed.new_group``,
            which divides dim_feedforward, and its id: see the function. 1 and -1: none.
        name: Shown by ``repr``.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A size, a rate, epsilon, activation, nranks or ring_id does not fit.
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int,
        dropout_rate: float = 0.1,
        epsilon: float = 1e-05,
        activation: Activation = "relu",
        act_dropout_rate: float | None = None,
        normalize_before: bool = False,
        linear1_weight_attr: Any = None,
        linear1_bias_attr: Any = None,
        linear2_weight_attr: Any = None,
        linear2_bias_attr: Any = None,
        ln1_scale_attr: Any = None,
        ln1_bias_attr: Any = None,
        ln2_scale_attr: Any = None,
        ln2_bias_attr: Any = None,
        nranks: int = 1,
        ring_id: int = -1,
        name: str | None = None,
    ) -> None:
        d_model = check_count("d_model", d_model)
        dim_feedforward = check_count("dim_feedforward", dim_feedforward)
        dropout_rate = check_number("dropout_rate", dropout_rate, 0.0, 1.0)
        if act_dropout_rate is not None:
            act_dropout_rate = check_number("act_dropout_rate", act_dropout_rate, 0.0, 1.0)
        epsilon = check_number("epsilon", epsilon, 0.0, INFINITY)
        check_activation(activation)
        check_switches(normalize_before=normalize_before)
        check_text("name", name)
        group_of_ring(ring_id, check_count("nranks", nranks))
        if dim_feedforward % nranks:
            raise ValueError(f"dim_feedforward: expected a multiple of nranks {nranks}, got {dim_feedforward}")
        hidden = dim_feedforward // nranks
        check_attr("linear1_weight_attr", linear1_weight_attr, [d_model, hidden], is_needed=True)
        check_attr("linear2_weight_attr", linear2_weight_attr, [hidden, d_model], is_needed=True)
        check_attr("linear1_bias_attr", linear1_bias_attr, [hidden])
        for argument, attr in (
            ("linear2_bias_attr", linear2_bias_attr),
            ("ln1_scale_attr", ln1_scale_attr),
            ("ln1_bias_attr", ln1_bias_attr),
            ("ln2_scale_attr", ln2_scale_attr),
            ("ln2_bias_attr", ln2_bias_attr),
        ):
            check_attr(argument, attr, [d_model])
        super().__init__(
            d_model,
            dim_feedforward,
            dropout_rate,
            epsilon,
            activation,
            act_dropout_rate,
            bool(normalize_before),
            linear1_weight_attr,
            linear1_bias_attr,
            linear2_weight_attr,
            linear2_bias_attr,
            ln1_scale_attr,
            ln1_bias_attr,
            ln2_scale_attr,
            ln2_bias_attr,
            nranks,
            ring_id,
            name,
        )

    def forward(self, src: paddle.Tensor, cache: None = None) -> paddle.Tensor:
        """Applies the block to ``src``, in training or evaluation mode.

        Args:
            src: ``[..., d_model]``.
            cache: Unused, as by Paddle.

        Returns:
            Shape and dtype of src.

        Raises:
            TypeError, ValueError, NotImplementedError: See the function.
        """
        return fused_feedforward(
            src,
            self._linear1_weight,
            self._linear2_weight,
            self._linear1_bias,
            self._linear2_bias,
            self._ln1_scale,
            self._ln1_bias,
            self._ln2_scale,
            self._ln2_bias,
            self._act_dropout_rate,
            self._dropout_rate,
            self._act_method,
            self._epsilon,
            self._epsilon,
            self._normalize_before,
            self.training,
            ring_id=self._ring_id,
            name=self.name,
        )


class FusedTransformerEncoderLayer(BuiltInEncoderLayer):
    """The built-in layer, of this package's attention and feed-forward layers: ``fused_attn`` and ``ffn``.

    Args:
        d_model: Width of the input and the output.
        nhead: The number of heads, a divisor of d_model.
        dim_feedforward: The number of hidden numbers of the feed-forward block.
        dropout_rate: The probability of dropping an element before each of the two sums with the residual.
        activation: As of :class:`FusedFeedForward`.
        attn_dropout_rate, act_dropout_rate: The probability of dropping an element of the attention and a hidden
            number; None: dropout_rate.
        normalize_before: Whether each block's input is layer-normalised (True) or its output (False).
        weight_attr, bias_attr: ParamAttr of both blocks, or a list or tuple of two. That of the attention holds for its
            layer norm too, as in Paddle. False for ``bias_attr``: no biases there.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, or does not fit.
    """

    fused_attn: FusedMultiHeadAttention
    ffn: FusedFeedForward

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int,
        dropout_rate: float = 0.1,
        activation: Activation = "relu",
        attn_dropout_rate: float | None = None,
        act_dropout_rate: float | None = None,
        normalize_before: bool = False,
        weight_attr: Any = None,
        bias_attr: Any = None,
    ) -> None:
        # Not the built-in's own, which makes the built-in's parts. paddle.nn.TransformerEncoder copies by _config.
        nn.Layer.__init__(self)
        self._config = {
            "d_model": d_model,
            "nhead": nhead,
            "dim_feedforward": dim_feedforward,
            "dropout_rate": dropout_rate,
            "activation": activation,
            "attn_dropout_rate": attn_dropout_rate,
            "act_dropout_rate": act_dropout_rate,
            "normalize_before": normalize_before,
            "weight_attr": weight_attr,
            "bias_attr": bias_attr,
        }
        self.normalize_before = normalize_before
        d_model, nhead = check_heads(d_model, nhead, ("d_model", "nhead"))
        attn_weight_attr, ffn_weight_attr = _attr_of_each("weight_attr", weight_attr)
        attn_bias_attr, ffn_bias_attr = _attr_of_each("bias_attr", bias_attr)
        try:
            self.fused_attn = FusedMultiHeadAttention(
                d_model,
                nhead,
                dropout_rate,
                dropout_rate if attn_dropout_rate is None else attn_dropout_rate,
                normalize_before=normalize_before,
                qkv_weight_attr=attn_weight_attr,
                qkv_bias_attr=attn_bias_attr,
                linear_weight_attr=attn_weight_attr,
                linear_bias_attr=attn_bias_attr,
                pre_ln_scale_attr=attn_weight_attr,
                pre_ln_bias_attr=attn_bias_attr,
                ln_scale_attr=attn_weight_attr,
                ln_bias_attr=attn_bias_attr,
            )
            self.ffn = FusedFeedForward(
                d_model,
                dim_feedforward,
                dropout_rate,
                activation=activation,
                act_dropout_rate=act_dropout_rate,
                normalize_before=normalize_before,
                linear1_weight_attr=ffn_weight_attr,
                linear1_bias_attr=ffn_bias_attr,
                linear2_weight_attr=ffn_weight_attr,
                linear2_bias_attr=ffn_bias_attr,
            )
        except (TypeError, ValueError) as error:
            raise renamed(error, _NAMES_OF_ATTRS) from None

    def forward(
        self, src: paddle.Tensor, src_mask: paddle.Tensor | None = None, cache: paddle.Tensor | None = None
    ) -> Any:
        """Applies the layer.

        Args:
            src: ``[batch, seq_len, d_model]``.
            src_mask, cache: ``attn_mask`` and ``cache`` of :meth:`FusedMultiHeadAttention.forward`.

        Returns:
            ``[batch, seq_len, d_model]``, with a cache a tuple of that and the new cache.

        Raises:
            TypeError, ValueError: See the layers.
        """
        if cache is None:
            return self.ffn(self.fused_attn(src, attn_mask=src_mask))
        attended, cache = self.fused_attn(src, attn_mask=src_mask, cache=cache)
        return self.ffn(attended), cache


# The encoder layer's, by those of its parts.
_NAMES_OF_ATTRS = {
    f"{part}_{kind}_attr": f"{'bias' if kind == 'bias' else 'weight'}_attr"
    for part in ("qkv", "linear", "linear1", "linear2", "pre_ln", "ln")
    for kind in ("weight", "scale", "bias")
}


def _attr_of_each(name: str, attr: Any) -> list:
    """The attribute of the attention and that of the feed-forward block."""
    if isinstance(attr, (list, tuple)) and len(attr) != 2:
        raise ValueError(
            f"{name}: expected one attribute, or two for attention and the feed-forward block, got {len(attr)}"
        )
    for one in attr if isinstance(attr, (list, tuple)) else (attr,):
        check_attr(name, one)
    return _convert_param_attr_to_list(attr, 2)
