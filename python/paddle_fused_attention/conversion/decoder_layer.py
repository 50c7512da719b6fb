"""``paddle.nn.TransformerDecoderLayer`` in three steps, each with its layer norm, dropout and residual: its attention
to itself as one operator, that to the encoder's result composed of operators, and its feed-forward as one."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn

from .._checks import check_tensor
from .._masks import additive_mask
from .adapters import adapter_of_names
from .transformer_layer import AttentionPart, FeedForwardPart, TransformerLayer, is_of_library, source_of


class ConvertedDecoderLayer(TransformerLayer, nn.TransformerDecoderLayer):
    """A ``paddle.nn.TransformerDecoderLayer`` that runs the operators. Arguments and results are those of the base
    class, and of PaddleNLP's and PaddleFormers' own forward: with ``output_attentions`` the result is a tuple, in which
    the weights of both attentions follow the output. With these libraries ``memory`` may be None: then the layer
    attends to itself only."""

    _attentions = {
        "self-attention": AttentionPart("self_attn", "norm1", "dropout1", {"x": "tgt", "attn_mask": "tgt_mask"}),
        "cross-attention": AttentionPart(
            "cross_attn",
            "norm2",
            "dropout2",
            {"x": "tgt", "key": "memory", "value": "memory", "attn_mask": "memory_mask"},
        ),
    }
    _feed_forward_part = FeedForwardPart(
        adapter_of_names("linear1", "linear2", "activation", "dropout", "dropout3"), "norm3"
    )

    def forward(
        self,
        tgt: paddle.Tensor,
        memory: paddle.Tensor | None,
        tgt_mask: paddle.Tensor | None = None,
        memory_mask: paddle.Tensor | None = None,
        cache: Any = None,
        output_attentions: bool = False,
    ) -> Any:
        check_tensor("tgt", tgt, required=True)
        check_tensor("memory", memory, required=not is_of_library(nn.TransformerDecoderLayer))
        if cache is not None and (not isinstance(cache, (tuple, list)) or len(cache) != 2):
            raise TypeError(
                f"cache: expected None or a pair of a Cache and a StaticCache, as gen_cache makes it, got "
                f"{type(cache).__name__}"
            )
        cache_of_itself, cache_of_memory = (None, None) if cache is None else cache
        tgt_mask = additive_mask("tgt_mask", tgt_mask, tgt)
        source = source_of(None, output_attentions)
        out, weights, new_cache = self._attend(
            self._attentions["self-attention"], tgt, tgt_mask, source, cache_of_itself
        )
        more_weights = same_cache = None
        if memory is not None:
            memory_mask = additive_mask("memory_mask", memory_mask, tgt)
            source = source_of(memory, output_attentions)
            out, more_weights, same_cache = self._attend(
                self._attentions["cross-attention"], out, memory_mask, source, cache_of_memory
            )
        results = [self._feed_forward(out)]
        if output_attentions:
            results += [weights, more_weights]
        if cache is not None:
            results.append((new_cache, same_cache))
        return results[0] if len(results) == 1 else tuple(results)
