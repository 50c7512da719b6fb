"""A BERT sentence encoder, with the attention blocks as fused operators or as ordinary Paddle layers.

    h        = layer_norm(word[token] + position[0..S-1] + token_type[0])
    6 times:   h = attention_block(h, keep)         layer_norm(h + self_attention(h)), keys where keep is False unseen
               h = layer_norm(h + W2 gelu(W1 h))
    sentence = mean of h over the kept positions, divided by its 2-norm

Only the attention block differs between the two encoders: the rest is the same code with the same weights.
"""

from __future__ import annotations

import warnings
from typing import Callable, Dict, Mapping

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle_fused_attention import FusedMultiHeadAttention, pack_qkv_bias, pack_qkv_weight

from .model_files import EncoderConfig

Weights = Mapping[str, np.ndarray]
State = Dict[str, np.ndarray]


class PlainAttentionBlock(nn.Layer):
    """The attention block out of Paddle's own layers: ``norm(x + attention(x))``."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = nn.MultiHeadAttention(
            config.hidden_size, config.num_attention_heads, dropout=config.attention_probs_dropout_prob
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.norm = nn.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps)

    def forward(self, x: paddle.Tensor, attn_mask: paddle.Tensor) -> paddle.Tensor:
        return self.norm(x + self.dropout(self.attention(x, attn_mask=attn_mask)))


def fused_attention_block(config: EncoderConfig) -> FusedMultiHeadAttention:
    """The attention block as one operator."""
    return FusedMultiHeadAttention(
        config.hidden_size,
        config.num_attention_heads,
        dropout_rate=config.hidden_dropout_prob,
        attn_dropout_rate=config.attention_probs_dropout_prob,
        normalize_before=False,
        epsilon=config.layer_norm_eps,
    )


class EncoderLayer(nn.Layer):
    """One encoder layer: the attention block, then the feed-forward block with its residual and layer norm."""

    def __init__(self, config: EncoderConfig, attention_block: nn.Layer) -> None:
        super().__init__()
        self.attention_block = attention_block
        self.expand = nn.Linear(config.hidden_size, config.intermediate_size)
        self.contract = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.norm = nn.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps)

    def forward(self, x: paddle.Tensor, keep: paddle.Tensor) -> paddle.Tensor:
        x = self.attention_block(x, attn_mask=keep)
        return self.norm(x + self.dropout(self.contract(F.gelu(self.expand(x)))))


class SentenceEncoder(nn.Layer):
    """Token ids to one vector of length 1 for each text.

    Args:
        config: the sizes.
        attention_block: makes one attention block, `fused_attention_block` or `PlainAttentionBlock`.
    """

    def __init__(self, config: EncoderConfig, attention_block: Callable[[EncoderConfig], nn.Layer]) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.LayerList(
            [EncoderLayer(config, attention_block(config)) for _ in range(config.num_hidden_layers)]
        )

    def forward(self, token_ids: paddle.Tensor, keep: paddle.Tensor) -> paddle.Tensor:
        """Embed a batch of texts.

        Args:
            token_ids: [B, S] int64, padded on the right.
            keep: [B, S] bool, False where a position is padding.

        Returns:
            [B, hidden_size] float32, each row of length 1.
        """
        position = self.position.weight[: paddle.shape(token_ids)[1]]
        x = self.word(token_ids) + position + self.token_type.weight[0]
        x = self.dropout(self.norm(x))
        attn_mask = keep.unsqueeze([1, 2])
        for layer in self.layers:
            x = layer(x, attn_mask)
        kept = keep.astype(x.dtype).unsqueeze(-1)
        return F.normalize((x * kept).sum(axis=1) / kept.sum(axis=1), axis=-1)


def load_state(encoder: SentenceEncoder, state: State) -> None:
    """Set the encoder's parameters, in dygraph or, in a static program that has been started up, in the present scope.

    Raises:
        KeyError: the names in `state` are not those of the encoder's parameters.
        ValueError: an array has another shape than its parameter.
    """
    parameters = encoder.state_dict()
    # A block that normalises after attention owns the scale and bias for normalising before, but does not read them.
    expected = {name for name in parameters if ".pre_ln_" not in name}
    if expected != set(state):
        raise KeyError(f"state: missing {sorted(expected - set(state))}, unknown {sorted(set(state) - expected)}")
    for name, array in state.items():
        if list(array.shape) != list(parameters[name].shape):
            raise ValueError(f"state: {name}: expected shape {list(parameters[name].shape)}, got {list(array.shape)}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Skip loading for .*\.pre_ln_")
        encoder.set_state_dict(state)


def fused_state(weights: Weights, config: EncoderConfig) -> State:
    """Convert the weights of the file to the state of a `SentenceEncoder` with fused attention blocks."""
    state = _common_state(weights, config)
    heads = config.num_attention_heads
    for i in range(config.num_hidden_layers):
        source, block = f"encoder.layer.{i}.attention.", f"layers.{i}.attention_block."
        projections = [source + "self." + name for name in ("query", "key", "value")]
        state[block + "qkv_weight"] = pack_qkv_weight(*(weights[name + ".weight"].T for name in projections), heads)
        state[block + "qkv_bias"] = pack_qkv_bias(*(weights[name + ".bias"] for name in projections), heads)
        state[block + "linear_weight"] = np.ascontiguousarray(weights[source + "output.dense.weight"].T)
        state[block + "linear_bias"] = weights[source + "output.dense.bias"]
        state[block + "ln_scale"] = weights[source + "output.LayerNorm.weight"]
        state[block + "ln_bias"] = weights[source + "output.LayerNorm.bias"]
    return state


def plain_state(weights: Weights, config: EncoderConfig) -> State:
    """Convert the weights of the file to the state of a `SentenceEncoder` with plain attention blocks."""
    state = _common_state(weights, config)
    for i in range(config.num_hidden_layers):
        source, block = f"encoder.layer.{i}.attention.", f"layers.{i}.attention_block."
        for ours, theirs in (
            ("attention.q_proj", "self.query"),
            ("attention.k_proj", "self.key"),
            ("attention.v_proj", "self.value"),
            ("attention.out_proj", "output.dense"),
        ):
            state.update(_linear(block + ours, weights, source + theirs))
        state.update(_layer_norm(block + "norm", weights, source + "output.LayerNorm"))
    return state


def _common_state(weights: Weights, config: EncoderConfig) -> State:
    """The state of everything but the attention blocks."""
    state = {
        f"{name}.weight": weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
    }
    state.update(_layer_norm("norm", weights, "embeddings.LayerNorm"))
    for i in range(config.num_hidden_layers):
        source, layer = f"encoder.layer.{i}.", f"layers.{i}."
        state.update(_linear(layer + "expand", weights, source + "intermediate.dense"))
        state.update(_linear(layer + "contract", weights, source + "output.dense"))
        state.update(_layer_norm(layer + "norm", weights, source + "output.LayerNorm"))
    return state


def _linear(ours: str, weights: Weights, theirs: str) -> State:
    return {
        ours + ".weight": np.ascontiguousarray(weights[theirs + ".weight"].T),
        ours + ".bias": weights[theirs + ".bias"],
    }


def _layer_norm(ours: str, weights: Weights, theirs: str) -> State:
    return {ours + ".weight": weights[theirs + ".weight"], ours + ".bias": weights[theirs + ".bias"]}
