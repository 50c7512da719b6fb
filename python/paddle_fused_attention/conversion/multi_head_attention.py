"""``paddle.nn.MultiHeadAttention`` with packed projections, for its own keys and values or others, with its caches and
its attention weights."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn

from .._block import UNPACKED, Block
from .._caches import attention_with_cache
from .._composed_attention import Composed, Source, projected_keys
from .._descriptions import MODES
from .._keys import given_keys
from .._masks import additive_mask
from .._parts import is_plain, parameters_of, reason_against_class
from ..functional import self_attention
from ..weights import KINDS, QKV_PARAMETERS
from .adapters import PADDLE_ADAPTER
from .packed import PackedAttention, register_class
from .registry import reason_against


class PackedMultiHeadAttention(PackedAttention, nn.MultiHeadAttention):
    """Arguments and results are those of the base class."""

    _adapter = PADDLE_ADAPTER
    _original = nn.MultiHeadAttention

    def forward(self, query: Any, key: Any = None, value: Any = None, attn_mask: Any = None, cache: Any = None) -> Any:
        composed = self._attend(query, key, value, attn_mask, cache)
        if composed is None:
            return self._original.forward(self, query, key, value, attn_mask, cache)
        return composed.results()

    def compute_kv(self, key: Any, value: Any) -> tuple:
        if not self._is_untouched():
            return self._original.compute_kv(self, key, value)
        return projected_keys(self._block(key, None), Source(key, value))

    @paddle.jit.not_to_static
    def _attend(self, query: Any, key: Any, value: Any, attn_mask: Any, cache: Any) -> Composed | None:
        """None if the operators may not compute what the parts would."""
        if not self._is_untouched():
            self._check_not_half_quantized()
            return None
        key_value = None if isinstance(cache, self.StaticCache) else given_keys(query, key, value)
        block = self._block(query, additive_mask("attn_mask", attn_mask, query))
        if key_value is None and cache is None and not self.need_weights:
            return Composed(self_attention(block))
        key, value = key_value or (None, None)
        return attention_with_cache(block, Source(key, value, needs_weights=self.need_weights), cache)

    def _block(self, query: Any, mask: Any) -> Block:
        qkv_weight, qkv_bias = parameters_of(self, QKV_PARAMETERS)
        linear_weight, linear_bias = parameters_of(self._sub_layers["out_proj"], KINDS)
        # fmt: off
        return Block._make((
            query, qkv_weight, linear_weight, None, None, None, None, qkv_bias, linear_bias, mask,
            0.0, 0.0, 0.0, PADDLE_ADAPTER.attn_dropout_rate(self),
            False, self.training, False, False, False, MODES[0], None, *UNPACKED,
        )).checked()
        # fmt: on


def reason_against_bare(attention: Any, uses: dict) -> str | None:
    """Why an attention that is no part of a transformer layer can't be converted; None if it can."""
    reason = reason_against_class(nn.MultiHeadAttention) or reason_against_class(nn.Linear)
    if reason is not None:
        return reason
    if not is_plain(attention, nn.MultiHeadAttention):
        return "it has hooks or a forward of its own"
    reason = reason_against_widths(attention)
    if reason is not None:
        return f"it has {reason}"
    known = (*PADDLE_ADAPTER.projections, PADDLE_ADAPTER.output)
    for name in (*attention._sub_layers, *attention._parameters, *attention._buffers):
        if name not in known:
            return f"it has {name} beside its projections"
    return reason_against(attention, PADDLE_ADAPTER, uses)


def reason_against_widths(attention: Any) -> str | None:
    """What of a MultiHeadAttention keeps its projections from being packed; None if nothing does."""
    for name in ("kdim", "vdim"):
        if getattr(attention, name) != attention.embed_dim:
            return f"{name}={getattr(attention, name)}, other than embed_dim {attention.embed_dim}"
    return None


register_class(nn.MultiHeadAttention, PackedMultiHeadAttention)
