"""Adapters, each of which says how an operator serves one class of attention or feed-forward layers.

:func:`paddle_fused_attention.convert` serves a layer if its class itself, and not only a base of it, has an adapter. An
adapter says where the projections are and what a call means in the operator's terms; see :class:`AttentionAdapter` and
:class:`FeedForwardAdapter`.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn

from .._keys import are_query
from .activations import activation_name


class AttentionAdapter:
    """What :func:`convert` must know of a class of self-attention layers. Derive from it, and call
    :func:`register_adapter`.

    A layer qualifies if it computes ``dropout(attend(q, k, v) @ W + b)`` for inputs x ``[batch, seq_len, embed_dim]``.
    ``paddle.nn.Linear`` projects x to q, k and v, with as many columns as rows for each, and applies W and b. A layer
    is left alone if it has parameters, buffers or sublayers that the adapter does not name, if its forward gives other
    numbers than the operator when :func:`convert` tries both, or if its class is only derived from the registered one.

    Attributes:
        projections: The names of the three projections of query, key and value, or of the one that has the columns of
            all three in turn.
        interleaved: Whether the columns of one projection are ordered [num_heads, 3, head_dim] and not
            [3, num_heads, head_dim].
        output: The name of the projection after attention.
        attn_dropout: The name of the ``paddle.nn.Dropout`` of the attention's weights; None: there is none, or
            :meth:`attn_dropout_rate` tells.
        dropout: The name of the ``paddle.nn.Dropout`` after the output projection, or None.
        ignored: Names of sublayers that compute nothing that counts, such as a ``paddle.nn.Softmax``.
    """

    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    interleaved: bool = False
    output: str = "out_proj"
    attn_dropout: str | None = None
    dropout: str | None = None
    ignored: tuple[str, ...] = ()

    def reason_against(self, attention: nn.Layer) -> str | None:
        """Why the operator does not serve this layer of the class; None if it does."""
        return None

    def layout(self, attention: nn.Layer) -> tuple[tuple[str, ...], bool]:
        """The names of the projections and whether they are interleaved, if that differs from layer to layer."""
        return self.projections, self.interleaved

    def num_heads(self, attention: nn.Layer) -> int:
        """The number of heads."""
        return attention.num_heads

    def scale(self, attention: nn.Layer) -> float | None:
        """What the products of queries and keys are multiplied by; None: head_dim ** -0.5."""
        return None

    def attn_dropout_rate(self, attention: nn.Layer) -> float:
        """The rate at which the attention's weights are dropped in the mode that the layer is in."""
        if self.attn_dropout is None:
            return 0.0
        layer = getattr(attention, self.attn_dropout)
        return layer.p if layer.training else 0.0

    def inputs(self, attention: nn.Layer, *args: Any, **kwargs: Any) -> tuple[Any, Any, bool] | None:
        """What a call of the layer with these arguments means.

        Returns:
            x and the mask or None, as :func:`fused_multi_head_attention` takes them, and whether attention is causal.
            None if the operator does not serve such a call: then the class's own forward runs.
        """
        raise NotImplementedError(f"{type(self).__name__}.inputs: expected a method of the adapter's own, found none")

    def result(self, attention: nn.Layer, out: Any) -> Any:
        """What the layer returns, from the result ``[batch, seq_len, embed_dim]``."""
        return out

    def example(self, x: Any) -> tuple[Any, ...]:
        """Arguments of a call with x alone, for trying the layer."""
        return (x,)

    def dropouts(self) -> list[str]:
        return [name for name in (self.attn_dropout, self.dropout) if name is not None]


class PaddleAdapter(AttentionAdapter):
    """``paddle.nn.MultiHeadAttention``, whose calls PackedMultiHeadAttention understands."""

    def attn_dropout_rate(self, attention: nn.Layer) -> float:
        return (attention.dropout or 0.0) if attention.training else 0.0


PADDLE_ADAPTER = PaddleAdapter()


class VisionTransformerAdapter(AttentionAdapter):
    """The attention of vision transformers as timm and PaddleClas write it: ``qkv``, ``attn_drop``, ``proj``,
    ``proj_drop``, ``scale``."""

    projections: tuple[str, ...] = ("qkv",)
    output: str = "proj"
    attn_dropout: str | None = "attn_drop"
    dropout: str | None = "proj_drop"

    def scale(self, attention: Any) -> float | None:
        return attention.scale

    def inputs(self, attention: Any, x: Any) -> tuple[Any, Any, bool] | None:
        return x, None, False


class PaddleNLPGPTAdapter(AttentionAdapter):
    """The causal attention of PaddleNLP's GPT."""

    def reason_against(self, attention: Any) -> str | None:
        config = attention.config
        for name in ("sequence_parallel", "use_flash_attention"):
            if getattr(config, name, False):
                return f"its config has {name}=True"
        return None

    def layout(self, attention: Any) -> tuple[tuple[str, ...], bool]:
        return (("qkv_proj",), True) if attention.config.fuse_attention_qkv else (self.projections, False)

    def num_heads(self, attention: Any) -> int:
        return attention.num_attention_heads

    def scale(self, attention: Any) -> float | None:
        coefficient = attention.config.scale_qk_coeff
        return None if coefficient == 1.0 else (coefficient / attention.head_dim) ** 0.5

    def attn_dropout_rate(self, attention: Any) -> float:
        return (attention.config.attention_probs_dropout_prob or 0.0) if attention.training else 0.0

    def inputs(
        self,
        attention: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any = None,
        use_cache: bool = False,
        past_key_value: Any = None,
        output_attentions: bool = False,
    ) -> tuple[Any, Any, bool] | None:
        with_cache = use_cache or past_key_value is not None
        if not are_query(query, key, value) or with_cache or output_attentions:
            return None
        # PaddleNLP adds masks as numbers, whatever their dtype. They hide later keys themselves.
        mask = attention_mask
        if mask is not None and not paddle.is_floating_point(mask):
            mask = paddle.cast(mask, query.dtype)
        return query, mask, mask is None

    def example(self, x: Any) -> tuple[Any, ...]:
        return (x, None, None)


class FeedForwardAdapter:
    """What :func:`convert` must know of a class of feed-forward layers. Derive from it, and call
    :func:`register_adapter`.

    A layer qualifies if it computes ``dropout(dropout(activation(x @ W1 + b1)) @ W2 + b2)`` for inputs x
    ``[..., embed_dim]``, with two ``paddle.nn.Linear`` for W1 ``[embed_dim, hidden]`` and W2 ``[hidden, embed_dim]``. A
    layer is left alone if it has parameters, buffers or sublayers that the adapter does not name, if its forward gives
    other numbers than the operator when :func:`convert` tries both, with each of its dropouts on by itself and without,
    or if its class is only derived from the registered one.

    Attributes:
        linear1, linear2: The names of the two projections.
        activation: The name of the activation, a function of ``paddle.nn.functional`` or a layer: relu, gelu, exact or
            by tanh, silu or swish. None: :meth:`activation_name` tells.
        dropout1, dropout2: The names of the ``paddle.nn.Dropout`` after the activation and after the second projection,
            each None if there is none. Both may be the same layer.
        gated: Whether the first projection ``[embed_dim, 2 * hidden]`` has the columns of two, and the result of the
            second of these is multiplied by the activation of the first.
        ignored: Names of sublayers that compute nothing that counts.
    """

    linear1: str = "linear1"
    linear2: str = "linear2"
    activation: str | None = "activation"
    dropout1: str | None = None
    dropout2: str | None = None
    gated: bool = False
    ignored: tuple[str, ...] = ()

    def reason_against(self, layer: nn.Layer) -> str | None:
        """Why the operator does not serve this layer of the class; None if it does."""
        return None

    def activation_name(self, layer: nn.Layer) -> str | None:
        """The activation that the layer has now: "relu", "gelu" (exact), "gelu_tanh" or "silu"; None for any other."""
        return activation_name(self.activation_of(layer))

    def inputs(self, layer: nn.Layer, *args: Any, **kwargs: Any) -> Any:
        """x of a call of the layer with these arguments; None if the operator does not serve such a call: then the
        class's own forward runs. By default, the operator serves calls with one positional argument."""
        return args[0] if len(args) == 1 and not kwargs else None

    def example(self, x: Any) -> tuple[Any, ...]:
        """Arguments of a call with x alone, for trying the layer."""
        return (x,)

    def activation_of(self, layer: nn.Layer) -> Any:
        name = self.activation
        if name is None:
            return None
        # Paddle takes several microseconds to find a sublayer as an attribute.
        activation = layer._sub_layers.get(name)
        return getattr(layer, name, None) if activation is None else activation

    def dropouts(self) -> list[str]:
        return list(dict.fromkeys(name for name in (self.dropout1, self.dropout2) if name is not None))


class VisionTransformerMlpAdapter(FeedForwardAdapter):
    """The feed-forward of vision transformers as timm and PaddleClas write it: ``fc1``, ``act``, ``fc2`` and ``drop``
    after each projection."""

    linear1: str = "fc1"
    linear2: str = "fc2"
    activation: str | None = "act"
    dropout1: str | None = "drop"
    dropout2: str | None = "drop"


class PaddleNLPFusedLlamaAdapter(FeedForwardAdapter):
    """The feed-forward of PaddleNLP's Llama, where one projection has the columns of both."""

    linear1 = "gate_up_fused_proj"
    linear2 = "down_proj"
    activation: str | None = None
    gated = True

    def reason_against(self, layer: Any) -> str | None:
        return None if layer.fuse_attention_ffn else "its gate_proj and up_proj are separate"

    def activation_name(self, layer: Any) -> str | None:
        return "silu" if layer.fuse_attention_ffn else None


class PaddleNLPReluAdapter(FeedForwardAdapter):
    """The feed-forward of PaddleNLP's T5 and MT5, whose activation is written into the forward."""

    linear1 = "wi"
    linear2 = "wo"
    activation: str | None = None
    dropout1: str | None = "dropout"

    def activation_name(self, layer: Any) -> str | None:
        return "relu"


def adapter_of_names(
    linear1: str, linear2: str, activation: str, dropout1: str | None = None, dropout2: str | None = None
) -> FeedForwardAdapter:
    """An adapter that knows nothing but names."""
    adapter = FeedForwardAdapter()
    adapter.linear1, adapter.linear2, adapter.activation = linear1, linear2, activation
    adapter.dropout1, adapter.dropout2 = dropout1, dropout2
    return adapter
