"""``paddle.incubate.nn``'s FusedLinear and FusedBiasDropoutResidualLayerNorm on this package's operators."""

from __future__ import annotations

from typing import Any

import paddle
from paddle.incubate.nn import FusedBiasDropoutResidualLayerNorm as BuiltInResidualNorm
from paddle.incubate.nn import FusedLinear as BuiltInLinear

from .._checks import INFINITY, check_count, check_number, check_switches, check_text
from .._initializers import check_attr
from .._loading import LoadsAnyFloat
from .functional import fused_bias_dropout_residual_layer_norm, fused_linear

__all__ = ["FusedBiasDropoutResidualLayerNorm", "FusedLinear"]


class FusedLinear(LoadsAnyFloat, BuiltInLinear):
    """The built-in layer, with its parameters and attributes; only the computation is this package's.

    Parameters: ``weight`` [in_features, out_features], with ``transpose_weight`` [out_features, in_features]; ``bias``
    [out_features].

    Args:
        in_features, out_features: Widths of the input and the output.
        weight_attr, bias_attr: ParamAttr; False for ``bias_attr``: no bias.
        transpose_weight: The form of the weight.
        name: Unused.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, or does not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weight_attr: Any = None,
        bias_attr: Any = None,
        transpose_weight: bool = False,
        name: str | None = None,
    ) -> None:
        in_features, out_features = check_count("in_features", in_features), check_count("out_features", out_features)
        check_switches(transpose_weight=transpose_weight)
        shape = [out_features, in_features] if transpose_weight else [in_features, out_features]
        check_attr("weight_attr", weight_attr, shape, is_needed=True)
        check_attr("bias_attr", bias_attr, [out_features])
        check_text("name", name)
        super().__init__(in_features, out_features, weight_attr, bias_attr, transpose_weight, name)

    def forward(self, input: paddle.Tensor) -> paddle.Tensor:
        """Returns ``[..., out_features]`` for ``[..., in_features]``."""
        return fused_linear(input, self.weight, self.bias, self.transpose_weight, self.name)


class FusedBiasDropoutResidualLayerNorm(LoadsAnyFloat, BuiltInResidualNorm):
    """The built-in layer, with its parameters and attributes; only the computation is this package's.

    Parameters: ``linear_bias``, ``ln_scale`` and ``ln_bias`` [embed_dim].

    Args:
        embed_dim: Width of the input and the output.
        dropout_rate: The probability of dropping an element of the input with its bias.
        weight_attr: ParamAttr of ``ln_scale``; False: it is left out.
        bias_attr: ParamAttr of ``linear_bias`` and ``ln_bias``; False: they are left out.
        epsilon: Of the layer norm.
        name: Shown by ``repr``.

    Raises:
        TypeError, ValueError: An argument is of the wrong type, or does not fit.
    """

    def __init__(
        self,
        embed_dim: int,
        dropout_rate: float = 0.5,
        weight_attr: Any = None,
        bias_attr: Any = None,
        epsilon: float = 1e-5,
        name: str | None = None,
    ) -> None:
        embed_dim = check_count("embed_dim", embed_dim)
        dropout_rate = check_number("dropout_rate", dropout_rate, 0.0, 1.0)
        epsilon = check_number("epsilon", epsilon, 0.0, INFINITY)
        check_attr("weight_attr", weight_attr, [embed_dim])
        check_attr("bias_attr", bias_attr, [embed_dim])
        check_text("name", name)
        super().__init__(embed_dim, dropout_rate, weight_attr, bias_attr, epsilon, name)

    def forward(self, x: paddle.Tensor, residual: paddle.Tensor) -> paddle.Tensor:
        """Returns ``layer_norm(residual + dropout(x + linear_bias))``, of the shape and dtype of x and residual,
        ``[..., embed_dim]``."""
        return fused_bias_dropout_residual_layer_norm(
            x,
            residual,
            self.linear_bias,
            self.ln_scale,
            self.ln_bias,
            self.dropout_rate,
            self._epsilon,
            self.training,
            name=self.name,
        )

    def extra_repr(self) -> str:
        """Paddle's own reads an attribute that the layer does not have."""
        shown = f"embed_dim={self.embed_dim}, dropout_rate={self.dropout_rate}, epsilon={self._epsilon}"
        return f"{shown}, dtype={self._dtype}{f', name={self.name}' if self.name else ''}"
