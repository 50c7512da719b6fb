"""``paddle.nn.MultiHeadAttention`` on the operators, for its own keys and values or others, with its caches and its
attention weights. Its projections are packed where they have the same width."""

from __future__ import annotations

from typing import Any, Callable

import paddle
from paddle import nn

from .._block import UNPACKED, Block
from .._caches import attention_with_cache
from .._composed_attention import Composed, Projections, Source, projected_keys, results_of
from .._descriptions import MODES
from .._keys import given_keys
from .._masks import additive_mask
from .._parts import is_plain, parameters_of, reason_against_class, reason_against_linear
from ..functional import self_attention
from ..weights import KINDS, QKV_PARAMETERS
from .adapters import PADDLE_ADAPTER
from .packed import PackedAttention, pack, register_class, separate
from .registry import reason_against


class _OnOperators(nn.MultiHeadAttention):
    """What packed attentions and those of other widths have in common. Arguments and results are those of the base
    class. A subclass says by `_is_untouched` whether its parts are those that the operators stand for, by `_packed`
    what the packed weight and bias are."""

    _is_untouched: Callable[[], bool]
    _check_not_half_quantized: Callable[[], None]
    _packed: Callable[[], tuple]

    def forward(self, query: Any, key: Any = None, value: Any = None, attn_mask: Any = None, cache: Any = None) -> Any:
        composed = self._attend(query, key, value, attn_mask, cache)
        if composed is None:
            return nn.MultiHeadAttention.forward(self, query, key, value, attn_mask, cache)
        return results_of(*composed)

    def compute_kv(self, key: Any, value: Any) -> tuple[Any, ...]:
        if not self._is_untouched():
            return nn.MultiHeadAttention.compute_kv(self, key, value)
        return projected_keys(self._block(key, None), self._source(key, value))

    @paddle.jit.not_to_static
    def _attend(self, query: Any, key: Any, value: Any, attn_mask: Any, cache: Any) -> Composed | None:
        """None if the operators may not compute what the parts would."""
        if not self._is_untouched():
            self._check_not_half_quantized()
            return None
        key_value = None if isinstance(cache, self.StaticCache) else given_keys(query, key, value)
        block = self._block(query, additive_mask("attn_mask", attn_mask, query))
        source = self._source(*(key_value or (None, None)))
        if key_value is source.projections is cache is None and not self.need_weights:
            return Composed(self_attention(block))
        return attention_with_cache(block, source, cache)

    @paddle.jit.not_to_static
    def _block(self, query: Any, mask: Any) -> Block:
        linear_weight, linear_bias = parameters_of(self._sub_layers["out_proj"], KINDS)
        qkv_weight, qkv_bias = self._packed()
        # fmt: off
        return Block._make((
            query, qkv_weight, linear_weight, None, None, None, None, qkv_bias, linear_bias, mask,
            0.0, 0.0, 0.0, PADDLE_ADAPTER.attn_dropout_rate(self),
            False, self.training, False, False, False, MODES[0], None, *UNPACKED,
        )).checked()
        # fmt: on

    @paddle.jit.not_to_static
    def _source(self, key: Any, value: Any) -> Source:
        return Source(key, value, needs_weights=self.need_weights)


class PackedMultiHeadAttention(_OnOperators, PackedAttention):
    """A ``paddle.nn.MultiHeadAttention`` with packed projections."""

    _adapter = PADDLE_ADAPTER
    _original = nn.MultiHeadAttention

    def _packed(self) -> tuple:
        return tuple(parameters_of(self, QKV_PARAMETERS))


class WideMultiHeadAttention(_OnOperators):
    """A ``paddle.nn.MultiHeadAttention`` whose keys or values are of another width than its queries. Nothing is
    packed."""

    def _is_untouched(self) -> bool:
        return all(is_plain(self._sub_layers.get(name), nn.Linear) for name in _PARTS)

    def _check_not_half_quantized(self) -> None:
        """Nothing is half of anything where nothing is packed."""

    def _packed(self) -> tuple:
        # The source has the projections; every block has a weight.
        return parameters_of(self._sub_layers["q_proj"], KINDS)[0], None

    @paddle.jit.not_to_static
    def _source(self, key: Any, value: Any) -> Source:
        pairs = (parameters_of(self._sub_layers[name], KINDS) for name in PADDLE_ADAPTER.projections)
        weights, biases = zip(*pairs)
        projections = Projections._make((*weights, *biases, self.num_heads))
        return Source(key, value, projections, needs_weights=self.need_weights)


_PARTS = (*PADDLE_ADAPTER.projections, PADDLE_ADAPTER.output)


def is_wide(attention: Any) -> bool:
    """Whether the projections of a MultiHeadAttention can't be packed, since their inputs differ in width."""
    return attention.kdim != attention.embed_dim or attention.vdim != attention.embed_dim


def fuse_attention(attention: Any) -> None:
    """Converts, in place, an attention that nothing tells against."""
    if is_wide(attention):
        attention.__class__ = WideMultiHeadAttention
    else:
        pack(attention, PADDLE_ADAPTER)


def unfuse_attention(attention: Any) -> None:
    """The inverse of :func:`fuse_attention`."""
    if isinstance(attention, WideMultiHeadAttention):
        attention.__class__ = nn.MultiHeadAttention  # type: ignore[assignment]
    else:
        separate(attention)


def reason_against_bare(attention: Any, uses: dict[int, int]) -> str | None:
    """Why an attention that is no part of a transformer layer can't be converted; None if it can."""
    reason = reason_against_class(nn.MultiHeadAttention) or reason_against_class(nn.Linear)
    if reason is not None:
        return reason
    if not is_plain(attention, nn.MultiHeadAttention):
        return "it has hooks or a forward of its own"
    for name in (*attention._sub_layers, *attention._parameters, *attention._buffers):
        if name not in _PARTS:
            return f"it has {name} beside its projections"
    if is_wide(attention):
        return _reason_against_wide(attention)
    return reason_against(attention, PADDLE_ADAPTER, uses)


def _reason_against_wide(attention: Any) -> str | None:
    width = attention.embed_dim
    for name, rows in zip(_PARTS, (width, attention.kdim, attention.vdim, width)):
        layer: Any = getattr(attention, name, None)
        reason = reason_against_linear(name, layer)
        if reason is not None:
            return reason
        if list(layer.weight.shape) != [rows, width]:
            return f"its {name} has a weight of shape {list(layer.weight.shape)}, not [{rows}, {width}]"
    return None


register_class(nn.MultiHeadAttention, PackedMultiHeadAttention)
