"""What the transformer layers of ``paddle.nn`` have in common: attentions and a feed-forward, each with its layer norm,
dropout and residual, which an operator computes if all of the parts are as Paddle's layer makes them. Otherwise (hooks,
replaced parts, quantization) its parts are called one by one.

All sublayers stay where they are; only the parameters of the query, key and value projections are packed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import paddle
from paddle import nn

from .._block import Block, scores_of
from .._caches import attention_with_cache
from .._checks import renamed
from .._composed_attention import Composed, Source
from .._descriptions import MODES
from .._feed_forward import FeedForward, feed_forward
from .._parts import is_plain, is_plain_dropout, origin_of_forward, parameters_of, reason_against_class
from ..functional import self_attention
from ..weights import KINDS, QKV_PARAMETERS
from .adapters import PADDLE_ADAPTER, FeedForwardAdapter
from .feed_forward import describe, reason_against_feed_forward
from .multi_head_attention import PackedMultiHeadAttention, is_wide
from .packed import PackedAttention, active_rate, pack, separate
from .registry import reason_against

# Libraries' own forwards of Paddle's layers, which ours stand for.
_KNOWN_FORWARDS = ("paddlenlp.transformers.model_outputs", "paddleformers.transformers.model_outputs")


class AttentionPart(NamedTuple):
    """The names of an attention in a layer, and of its layer norm and dropout."""

    attention: str
    norm: str
    dropout: str
    arguments: dict[str, str]  # what the layer calls those of the operators


class FeedForwardPart(NamedTuple):
    """The names of a feed-forward's parts in a layer, its second dropout with its residual among them, and of its layer
    norm."""

    adapter: FeedForwardAdapter
    norm: str


class TransformerLayer(nn.Layer):
    """The base of converted layers beside their own class."""

    _attentions: dict[str, AttentionPart]  # by what reports call them
    _feed_forward_part: FeedForwardPart
    _serves_feed_forward = True  # as it was found at the conversion
    normalize_before: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        reasons = reasons_against_parts(self, type(self), {})
        fuse(self, type(self), [name for name, reason in reasons.items() if reason is None])

    def _attend(self, part: AttentionPart, x: Any, mask: Any, source: Source, cache: Any) -> tuple:
        """x after an attention to the source, and what else is wanted."""
        if not self._is_untouched(part):
            return self._attend_by_parts(part, x, mask, source, cache)
        return self._attend_at_once(part, x, mask, source, cache)

    @paddle.jit.not_to_static
    def _attend_packed(self, part: AttentionPart, x: Any, cu_seqlens: Any, max_seqlen: int | None) -> Any:
        """x, of packed sequences, after an attention to itself.

        Raises:
            NotImplementedError: An operator may not compute a part of the layer. The layers in it know no borders
                between sequences.
        """
        is_untouched = self._is_untouched(part)
        if not is_untouched or self._describe_feed_forward(x) is None:
            raise NotImplementedError(
                "cu_seqlens: expected a layer all parts of which run their operators, got one whose "
                f"{'feed-forward' if is_untouched else 'attention'} was not converted, or has a part that was changed "
                "since"
            )
        try:
            return self_attention(self._block(part, x, None, cu_seqlens, max_seqlen))
        except (TypeError, ValueError, MemoryError) as error:
            raise renamed(error, part.arguments) from None

    @paddle.jit.not_to_static
    def _attend_at_once(self, part: AttentionPart, x: Any, mask: Any, source: Source, cache: Any) -> Composed:
        block = self._block(part, x, mask)
        try:
            if source.key is None and cache is None and not source.needs_weights:
                return Composed(self_attention(block))
            return attention_with_cache(block, source, cache)
        except (TypeError, ValueError, MemoryError) as error:
            raise renamed(error, part.arguments) from None

    def _attend_by_parts(self, part: AttentionPart, x: Any, mask: Any, source: Source, cache: Any) -> tuple:
        attention, norm = getattr(self, part.attention), getattr(self, part.norm)
        hidden = norm(x) if self.normalize_before else x
        keys = hidden if source.key is None else source.key
        needed_weights = getattr(attention, "need_weights", False)
        if source.needs_weights:
            attention.need_weights = True
        try:
            found = (
                attention(hidden, keys, keys, mask, cache) if cache is not None else attention(hidden, keys, keys, mask)
            )
        finally:
            if source.needs_weights:
                attention.need_weights = needed_weights
        hidden, *more = found if isinstance(found, (tuple, list)) else (found,)
        new_cache = more.pop() if cache is not None and more else None
        out = x + getattr(self, part.dropout)(hidden)
        return out if self.normalize_before else norm(out), more[0] if more else None, new_cache

    def _feed_forward(self, x: Any) -> Any:
        description = self._describe_feed_forward(x)
        if description is not None:
            return feed_forward(description)
        adapter, norm_name = self._feed_forward_part
        norm = getattr(self, norm_name)
        hidden = self.linear1(norm(x) if self.normalize_before else x)
        hidden = self.linear2(self.dropout(self.activation(hidden)))
        out = x + getattr(self, str(adapter.dropout2))(hidden)
        return out if self.normalize_before else norm(out)

    @paddle.jit.not_to_static
    def _describe_feed_forward(self, x: Any) -> FeedForward | None:
        """None if the operator may not compute what the parts would."""
        adapter, norm_name = self._feed_forward_part
        norm = self._sub_layers.get(norm_name)
        if not self._serves_feed_forward or not _is_plain_norm(norm):
            return None
        before = bool(self.normalize_before)
        return describe(self, adapter, x, _norms(norm, before), norm._epsilon, before)

    @paddle.jit.not_to_static
    def _is_untouched(self, part: AttentionPart) -> bool:
        """Whether operators may compute what the parts would."""
        parts = self._sub_layers
        attention = parts.get(part.attention)
        return (
            is_plain(attention, PackedMultiHeadAttention)
            and attention._is_untouched()
            and _is_plain_norm(parts.get(part.norm))
            and is_plain_dropout(parts.get(part.dropout))
        )

    @paddle.jit.not_to_static
    def _block(
        self, part: AttentionPart, x: Any, mask: Any, cu_seqlens: Any = None, max_seqlen: int | None = None
    ) -> Block:
        parts = self._sub_layers
        attention, norm, dropout = parts[part.attention], parts[part.norm], parts[part.dropout]
        before = bool(self.normalize_before)
        qkv_weight, qkv_bias = parameters_of(attention, QKV_PARAMETERS)
        linear_weight, linear_bias = parameters_of(attention._sub_layers["out_proj"], KINDS)
        # fmt: off
        return Block._make((
            x, qkv_weight, linear_weight, *_norms(norm, before), qkv_bias, linear_bias, mask,
            norm._epsilon, norm._epsilon, active_rate(dropout), PADDLE_ADAPTER.attn_dropout_rate(attention),
            before, attention.training or dropout.training, not before, True, False, MODES[0], None,
            cu_seqlens, scores_of(None, None, max_seqlen, cu_seqlens),
        )).checked()
        # fmt: on


@paddle.jit.not_to_static
def source_of(memory: Any, needs_weights: bool) -> Source:
    """What an attention attends to: a memory, which is not normalised, or None for its own input."""
    return Source(memory, memory, needs_weights=bool(needs_weights), normalises=memory is None)


def _is_plain_norm(norm: Any) -> bool:
    return is_plain(norm, nn.LayerNorm) and len(norm._normalized_shape) == 1


def _norms(norm: Any, before: bool) -> tuple:
    """Scale and bias of the layer norm before, and of the one after."""
    scale, bias = parameters_of(norm, KINDS)
    return (scale, bias, None, None) if before else (None, None, scale, bias)


def is_of_library(kind: Any) -> bool:
    """Whether a library wrote the forward of one of Paddle's classes."""
    return origin_of_forward(kind) in _KNOWN_FORWARDS


def reason_against_layer(layer: Any, kind: Any, attentions: dict[str, AttentionPart]) -> str | None:
    """Why no part of a layer can be converted, whatever its parts; None if these decide."""
    if type(layer) is not kind:
        return f"a subclass of paddle.nn.{kind.__name__}, {type(layer).__name__}"
    reason = reason_against_class(kind, *_KNOWN_FORWARDS)
    if reason is not None:
        return reason
    if "forward" in vars(layer):
        return "its forward was replaced"
    # The libraries' forwards set need_weights in every call, as their argument says, and leave it so.
    for part in attentions.values():
        if getattr(getattr(layer, part.attention, None), "need_weights", False) and not is_of_library(kind):
            return f"its {part.attention} has need_weights=True"
    return None


def reasons_against_parts(layer: Any, converted: type[TransformerLayer], uses: dict[int, int]) -> dict[str, str | None]:
    """By the names of a layer's parts, why operators do not serve each; None if they do."""
    reasons = {name: _reason_against_attention(layer, part, uses) for name, part in converted._attentions.items()}
    return {**reasons, "feed-forward": _reason_against_feed_forward(layer, converted._feed_forward_part)}


def _reason_against_part(layer: Any, name: str, kind: Any) -> str | None:
    part = getattr(layer, name, None)
    if type(part) is not kind:
        return f"its {name} is a {type(part).__name__}, not a paddle.nn.{kind.__name__}"
    return None if is_plain(part, kind) else f"its {name} has hooks or a forward of its own"


def _reason_against_attention(layer: Any, part: AttentionPart, uses: dict[int, int]) -> str | None:
    kinds = (nn.MultiHeadAttention, nn.LayerNorm, nn.Dropout)
    for kind in (*kinds, nn.Linear):
        reason = reason_against_class(kind)
        if reason is not None:
            return reason
    for name, kind in zip(part[:3], kinds):
        reason = _reason_against_part(layer, name, kind)
        if reason is not None:
            return reason
    attention, norm, dropout = (getattr(layer, name) for name in part[:3])
    if is_wide(attention):
        widths = f"kdim={attention.kdim} and vdim={attention.vdim}"
        return f"its {part.attention} has {widths}, other than embed_dim {attention.embed_dim}"
    if list(norm._normalized_shape) != [attention.embed_dim]:
        return f"its {part.norm} is over {list(norm._normalized_shape)}, other than embed_dim {attention.embed_dim}"
    if not is_plain_dropout(dropout):
        return f"its {part.dropout} has mode={dropout.mode!r} and axis={dropout.axis}"
    return reason_against(attention, PADDLE_ADAPTER, uses, f"{part.attention}.")


def _reason_against_feed_forward(layer: Any, part: FeedForwardPart) -> str | None:
    reason = reason_against_class(nn.LayerNorm) or _reason_against_part(layer, part.norm, nn.LayerNorm)
    if reason is not None:
        return reason
    reason = reason_against_feed_forward(layer, part.adapter)
    if reason is not None:
        return reason
    shape, embed_dim = list(getattr(layer, part.norm)._normalized_shape), layer.linear1.weight.shape[0]
    return None if shape == [embed_dim] else f"its {part.norm} is over {shape}, other than embed_dim {embed_dim}"


def fuse(layer: Any, converted: type[TransformerLayer], served: list[str]) -> None:
    """Converts a layer in place, only the parts that are served."""
    for name, part in converted._attentions.items():
        attention: Any = getattr(layer, part.attention, None)
        if name in served:
            pack(attention, PADDLE_ADAPTER)
        if getattr(attention, "need_weights", False):
            attention.need_weights = False
    if "feed-forward" not in served:
        layer.__dict__["_serves_feed_forward"] = False
    layer.__class__ = converted


def unfuse(layer: TransformerLayer, original: type) -> None:
    """The inverse of :func:`fuse`."""
    for part in layer._attentions.values():
        attention = getattr(layer, part.attention, None)
        if isinstance(attention, PackedAttention):
            separate(attention)
    layer.__dict__.pop("_serves_feed_forward", None)
    layer.__class__ = original
