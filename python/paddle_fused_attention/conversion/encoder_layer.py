"""``paddle.nn.TransformerEncoderLayer`` as two operators: its attention and its feed-forward, each with its layer norm,
dropout and residual.

All sublayers stay where they are; only the parameters of the query, key and value projections are packed. In a call
each half runs its operator if all of its parts are as Paddle's layer makes them. Otherwise (hooks, replaced parts,
quantization, attention weights that are asked for) it calls its parts one by one.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn

from .._block import Block, scores_of
from .._checks import check_tensor
from .._descriptions import MODES
from .._feed_forward import FeedForward, feed_forward
from .._loading import OwnEntries
from .._ordinary_ops import additive_mask, attention_with_cache
from .._parts import is_plain, is_plain_dropout, origin_of_forward, parameters_of, reason_against_class
from ..functional import self_attention
from ..state_dicts import with_old_names
from ..weights import KINDS, QKV_PARAMETERS
from .adapters import adapter_of_names, wants_gradient
from .feed_forward import describe, reason_against_feed_forward
from .packed import PackedAttention, active_rate, pack, packed_class, separate
from .registry import PADDLE_ADAPTER, reason_against

PackedMultiHeadAttention = packed_class(nn.MultiHeadAttention, PADDLE_ADAPTER)
# Libraries' own forwards of Paddle's encoder layer, which ConvertedEncoderLayer.forward stands for.
_KNOWN_FORWARDS = ("paddlenlp.transformers.model_outputs", "paddleformers.transformers.model_outputs")
_FEED_FORWARD = adapter_of_names("linear1", "linear2", "activation", "dropout", "dropout2")


class ConvertedEncoderLayer(OwnEntries, nn.TransformerEncoderLayer):
    """A ``paddle.nn.TransformerEncoderLayer`` that runs the operators. Arguments and results are those of the base
    class, and of PaddleNLP's and PaddleFormers' own forward: with ``output_attentions`` or ``self_attn.need_weights``
    attention is made of ordinary ops, and the result is a tuple that ends with the attention's weights
    ``[batch, num_heads, seq_len, keys]``.

    With ``cu_seqlens`` and ``max_seqlen``, as in :func:`fused_multi_head_attention`, ``src`` and the result are packed
    sequences ``[tokens, embed_dim]``. Both halves must then run their operators, since the layer's parts know no
    borders between sequences: else there is a NotImplementedError, as there is with a mask, a cache or
    ``output_attentions``."""

    _serves_feed_forward = True  # as it was found at the conversion

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fuse(self, reason_against_attention(self, {}) is None, reason_against_second_half(self) is None)

    def forward(
        self,
        src: paddle.Tensor,
        src_mask: paddle.Tensor | None = None,
        cache: Any = None,
        output_attentions: bool = False,
        cu_seqlens: paddle.Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Any:
        check_tensor("src", src, required=True)
        if cu_seqlens is not None or max_seqlen is not None:
            return self._run_packed(src, src_mask, cache, output_attentions, cu_seqlens, max_seqlen)
        src_mask = additive_mask("src_mask", src_mask, src)
        if output_attentions or not self._is_untouched(src_mask):
            attended, more = self._attend_by_parts(src, src_mask, cache, output_attentions)
        elif cache is None:
            attended, more = self_attention(self._block(src, src_mask)), ()
        else:
            attended, *more = self._attend_with_cache(src, src_mask, cache)
        out = self._feed_forward(attended)
        return (out, *more) if more else out

    @paddle.jit.not_to_static
    def _run_packed(
        self, src: Any, mask: Any, cache: Any, output_attentions: bool, cu_seqlens: Any, max_seqlen: Any
    ) -> paddle.Tensor:
        for name, value in (("src_mask", mask), ("cache", cache), ("output_attentions", output_attentions or None)):
            if value is not None:
                raise NotImplementedError(f"{name}: expected none beside cu_seqlens, got {type(value).__name__}")
        description = self._describe_feed_forward(src)
        if description is None or not self._is_untouched(None):
            half = "attention" if description is not None else "feed-forward"
            raise NotImplementedError(
                f"cu_seqlens: expected a layer both halves of which run their operators, got one whose {half} was not "
                "converted, or has a part that was changed since"
            )
        attended = self_attention(self._block(src, None, cu_seqlens, max_seqlen))
        return feed_forward(description._replace(x=attended))

    def _feed_forward(self, src: paddle.Tensor) -> paddle.Tensor:
        description = self._describe_feed_forward(src)
        if description is not None:
            return feed_forward(description)
        hidden = self.norm2(src) if self.normalize_before else src
        hidden = self.linear2(self.dropout(self.activation(self.linear1(hidden))))
        out = src + self.dropout2(hidden)
        return out if self.normalize_before else self.norm2(out)

    @paddle.jit.not_to_static
    def _describe_feed_forward(self, src: Any) -> FeedForward | None:
        """None if the operator may not compute what the parts would."""
        norm = self._sub_layers.get("norm2")
        if not self._serves_feed_forward or not is_plain(norm, nn.LayerNorm) or len(norm._normalized_shape) != 1:
            return None
        before = bool(self.normalize_before)
        scale, bias = parameters_of(norm, KINDS)
        norms = (scale, bias, None, None) if before else (None, None, scale, bias)
        return describe(self, _FEED_FORWARD, src, norms, norm._epsilon, before)

    @paddle.jit.not_to_static
    def _is_untouched(self, mask: Any) -> bool:
        """Whether the operator may compute what the parts would."""
        parts = self._sub_layers
        attention = parts.get("self_attn")
        return (
            is_plain(attention, PackedMultiHeadAttention)
            and attention._is_untouched()
            and not attention.need_weights
            and is_plain(parts.get("norm1"), nn.LayerNorm)
            and len(parts["norm1"]._normalized_shape) == 1
            and is_plain_dropout(parts.get("dropout1"))
            and not wants_gradient(mask)
        )

    def _attend_by_parts(self, src: Any, mask: Any, cache: Any, output_attentions: bool) -> tuple:
        """The result of the layer's first half, and a tuple of the new cache, if there is one, and the attention's
        weights, if they are wanted."""
        attention = self.self_attn
        hidden = self.norm1(src) if self.normalize_before else src
        needed_weights = getattr(attention, "need_weights", False)
        if output_attentions:
            attention.need_weights = True
        try:
            found = (
                attention(hidden, hidden, hidden, mask, cache)
                if cache is not None
                else attention(hidden, hidden, hidden, mask)
            )
        finally:
            if output_attentions:
                attention.need_weights = needed_weights
        hidden, *more = found if isinstance(found, (tuple, list)) else (found,)
        hidden = src + self.dropout1(hidden)
        return (hidden if self.normalize_before else self.norm1(hidden)), tuple(reversed(more))

    @paddle.jit.not_to_static
    def _block(self, src: Any, mask: Any, cu_seqlens: Any = None, max_seqlen: int | None = None) -> Block:
        parts = self._sub_layers
        attention, norm, dropout = parts["self_attn"], parts["norm1"], parts["dropout1"]
        before = bool(self.normalize_before)
        qkv_weight, qkv_bias = parameters_of(attention, QKV_PARAMETERS)
        linear_weight, linear_bias = parameters_of(attention._sub_layers["out_proj"], KINDS)
        scale, bias = parameters_of(norm, KINDS)
        norms = (scale, bias, None, None) if before else (None, None, scale, bias)
        # fmt: off
        return Block._make((
            src, qkv_weight, linear_weight, *norms, qkv_bias, linear_bias, mask,
            norm._epsilon, norm._epsilon, active_rate(dropout), PADDLE_ADAPTER.attn_dropout_rate(attention),
            before, attention.training or dropout.training, not before, True, False, MODES[0], None,
            cu_seqlens, scores_of(None, None, max_seqlen, cu_seqlens),
        )).checked()
        # fmt: on

    @paddle.jit.not_to_static
    def _attend_with_cache(self, src: Any, mask: Any, cache: Any) -> tuple:
        if not isinstance(cache, nn.MultiHeadAttention.Cache):
            raise NotImplementedError(
                f"cache: expected None or a paddle.nn.MultiHeadAttention.Cache, got {type(cache).__name__}"
            )
        for name in ("k", "v"):
            check_tensor(f"cache.{name}", getattr(cache, name), required=True)
        out, k, v = attention_with_cache(self._block(src, mask), cache.k, cache.v)
        return out, nn.MultiHeadAttention.Cache(k, v)

    def _own_entries(self, state: dict, prefix: str) -> dict:
        return with_old_names(state, prefix)


def reason_against_encoder_layer(layer: Any) -> str | None:
    """Why neither half of an encoder layer can be converted, whatever its parts; None if these decide."""
    if type(layer) is not nn.TransformerEncoderLayer:
        return f"a subclass of paddle.nn.TransformerEncoderLayer, {type(layer).__name__}"
    reason = reason_against_class(nn.TransformerEncoderLayer, *_KNOWN_FORWARDS)
    if reason is not None:
        return reason
    if "forward" in vars(layer):
        return "its forward was replaced"
    # The libraries' forward sets need_weights in every call, as its argument says, and leaves it so.
    if (
        getattr(getattr(layer, "self_attn", None), "need_weights", False)
        and origin_of_forward(nn.TransformerEncoderLayer) is None
    ):
        return "its self_attn has need_weights=True"
    return None


def _reason_against_part(layer: Any, name: str, kind: Any) -> str | None:
    part = getattr(layer, name, None)
    if type(part) is not kind:
        return f"its {name} is a {type(part).__name__}, not a paddle.nn.{kind.__name__}"
    return None if is_plain(part, kind) else f"its {name} has hooks or a forward of its own"


def reason_against_attention(layer: Any, uses: dict) -> str | None:
    """Why the attention of an encoder layer can't run the operator, with norm1 and dropout1; None if it can."""
    for kind in (nn.MultiHeadAttention, nn.LayerNorm, nn.Dropout, nn.Linear):
        reason = reason_against_class(kind)
        if reason is not None:
            return reason
    for name, kind in (("self_attn", nn.MultiHeadAttention), ("norm1", nn.LayerNorm), ("dropout1", nn.Dropout)):
        reason = _reason_against_part(layer, name, kind)
        if reason is not None:
            return reason
    attention, norm, dropout = layer.self_attn, layer.norm1, layer.dropout1
    for name in ("kdim", "vdim"):
        if getattr(attention, name) != attention.embed_dim:
            return f"its self_attn has {name}={getattr(attention, name)}, other than embed_dim {attention.embed_dim}"
    if list(norm._normalized_shape) != [attention.embed_dim]:
        return f"its norm1 is over {list(norm._normalized_shape)}, other than embed_dim {attention.embed_dim}"
    if not is_plain_dropout(dropout):
        return f"its dropout1 has mode={dropout.mode!r} and axis={dropout.axis}"
    return reason_against(attention, PADDLE_ADAPTER, uses, "self_attn.")


def reason_against_second_half(layer: Any) -> str | None:
    """Why the feed-forward of an encoder layer can't run the operator, with norm2 and dropout2; None if it can."""
    reason = reason_against_class(nn.LayerNorm) or _reason_against_part(layer, "norm2", nn.LayerNorm)
    if reason is not None:
        return reason
    reason = reason_against_feed_forward(layer, _FEED_FORWARD)
    if reason is not None:
        return reason
    shape, embed_dim = list(layer.norm2._normalized_shape), layer.linear1.weight.shape[0]
    return None if shape == [embed_dim] else f"its norm2 is over {shape}, other than embed_dim {embed_dim}"


def fuse(layer: nn.TransformerEncoderLayer, with_attention: bool, with_feed_forward: bool) -> None:
    """Converts an encoder layer in place, only the halves that are served."""
    if with_attention:
        pack(layer.self_attn, PADDLE_ADAPTER)
    attention: Any = getattr(layer, "self_attn", None)
    if getattr(attention, "need_weights", False):
        attention.need_weights = False
    if not with_feed_forward:
        layer.__dict__["_serves_feed_forward"] = False
    layer.__class__ = ConvertedEncoderLayer


def unfuse(layer: ConvertedEncoderLayer) -> None:
    """The inverse of :func:`fuse`."""
    attention = getattr(layer, "self_attn", None)
    if isinstance(attention, PackedAttention):
        separate(attention)
    layer.__dict__.pop("_serves_feed_forward", None)
    layer.__class__ = nn.TransformerEncoderLayer
