"""``paddle.nn.TransformerEncoderLayer`` as two operators: its attention and its feed-forward, each with its layer norm,
dropout and residual."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn

from .._checks import check_tensor
from .._composed_attention import Source
from .._loading import OwnEntries
from .._masks import additive_mask
from ..state_dicts import with_old_names
from .adapters import adapter_of_names
from .transformer_layer import AttentionPart, FeedForwardPart, TransformerLayer


class ConvertedEncoderLayer(TransformerLayer, OwnEntries, nn.TransformerEncoderLayer):
    """A ``paddle.nn.TransformerEncoderLayer`` that runs the operators. Arguments and results are those of the base
    class, and of PaddleNLP's and PaddleFormers' own forward: with ``output_attentions`` or ``self_attn.need_weights``
    the result is a tuple that ends with the attention's weights ``[batch, num_heads, seq_len, keys]``."""

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
    ) -> Any:
        check_tensor("src", src, required=True)
        src_mask = additive_mask("src_mask", src_mask, src)
        source = Source(needs_weights=output_attentions or getattr(self.self_attn, "need_weights", False))
        attended = self._attend(self._attentions["attention"], src, src_mask, source, cache)
        return attended._replace(
            out=self._feed_forward(attended.out), weights=attended.cache, cache=attended.weights
        ).results()

    def _own_entries(self, state: dict, prefix: str) -> dict:
        return with_old_names(state, prefix)
