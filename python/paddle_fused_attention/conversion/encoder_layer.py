"""``paddle.nn.TransformerEncoderLayer`` as two operators: its attention and its feed-forward, each with its layer norm,
dropout and residual."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn

from .._checks import check_tensor
from .._composed_attention import results_of
from .._loading import OwnEntries
from .._masks import additive_mask
from ..state_dicts import with_old_names
from .adapters import adapter_of_names
from .transformer_layer import AttentionPart, FeedForwardPart, TransformerLayer, source_of


class ConvertedEncoderLayer(TransformerLayer, OwnEntries, nn.TransformerEncoderLayer):
    """A ``paddle.nn.TransformerEncoderLayer`` that runs the operators. Arguments and results are those of the base
    class, and of PaddleNLP's and PaddleFormers' own forward: with ``output_attentions`` or ``self_attn.need_weights``
    the result is a tuple that ends with the attention's weights ``[batch, num_heads, seq_len, keys]``.

    With ``cu_seqlens`` and ``max_seqlen``, as in :func:`fused_multi_head_attention`, ``src`` and the result are packed
    sequences ``[tokens, embed_dim]``. Both halves must then run their operators, since the layer's parts know no
    borders between sequences: else there is a NotImplementedError, as there is with a mask, a cache or attention
    weights."""

    _attentions = {"attention": AttentionPart("self_attn", "norm1", "dropout1", {"x": "src", "attn_mask": "src_mask"})}
    _feed_forward_part = FeedForwardPart(
        adapter_of_names("linear1", "linear2", "activation", "dropout", "dropout2"), "norm2"
    )

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
        part = self._attentions["attention"]
        needs_weights = output_attentions or getattr(self.self_attn, "need_weights", False)
        if cu_seqlens is not None or max_seqlen is not None:
            for name, value in (("src_mask", src_mask), ("cache", cache), ("need_weights", needs_weights or None)):
                if value is not None:
                    raise NotImplementedError(f"{name}: expected none beside cu_seqlens, got {type(value).__name__}")
            return self._feed_forward(self._attend_packed(part, src, cu_seqlens, max_seqlen))
        src_mask = additive_mask("src_mask", src_mask, src)
        out, weights, new_cache = self._attend(part, src, src_mask, source_of(None, needs_weights), cache)
        return results_of(self._feed_forward(out), new_cache, weights)

    def _own_entries(self, state: dict, prefix: str) -> dict:
        return with_old_names(state, prefix)
