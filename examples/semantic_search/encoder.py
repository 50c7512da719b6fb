"""A BERT sentence encoder of Paddle's layers, and the same one converted to fused operators, which compute no padding.

h        = layer_norm(word[token] + position[0, 1, ... of each text] + token_type[0])
h        = encoder(h)                           paddle.nn.TransformerEncoder; a token sees those of its own text
sentence = mean of h over a text's tokens, divided by its 2-norm

Paddle's layers take texts padded to [B, S]; the converted ones take the tokens of all texts one after another, [T].
"""

from __future__ import annotations

from typing import Dict, Mapping, TypeVar

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle_fused_attention import convert

from .model_files import EncoderConfig

Weights = Mapping[str, np.ndarray]
State = Dict[str, np.ndarray]
Encoder = TypeVar("Encoder", bound="SentenceEncoder")


class SentenceEncoder(nn.Layer):
    """Token ids to one vector of length 1 for each text.

    Args:
        config: the sizes.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        layer = nn.TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            config.hidden_dropout_prob,
            activation="gelu",
            attn_dropout=config.attention_probs_dropout_prob,
            act_dropout=0.0,
        )
        self.encoder = nn.TransformerEncoder(layer, config.num_hidden_layers)
        for layer in self.encoder.layers:  # Paddle 2.6's layer takes no epsilon
            layer.norm1 = nn.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps)
            layer.norm2 = nn.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps)

    def forward(self, token_ids: paddle.Tensor, keep: paddle.Tensor) -> paddle.Tensor:
        """Embed a batch of texts.

        Args:
            token_ids: [B, S] int64, padded on the right.
            keep: [B, S] bool, False where a position is padding.

        Returns:
            [B, hidden_size] float32, each row of length 1.
        """
        x = self._embed(token_ids, self.position.weight[: paddle.shape(token_ids)[1]])
        x = self.encoder(x, keep.unsqueeze([1, 2]))
        kept = keep.astype(x.dtype).unsqueeze(-1)
        return F.normalize((x * kept).sum(axis=1) / kept.sum(axis=1), axis=-1)

    def _embed(self, token_ids: paddle.Tensor, position: paddle.Tensor) -> paddle.Tensor:
        return self.dropout(self.norm(self.word(token_ids) + position + self.token_type.weight[0]))


class PackedSentenceEncoder(SentenceEncoder):
    """The same on texts without padding, once its layers are converted.

    Args:
        config: the sizes.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        # The operator wants a bound on the lengths, an attribute of a static program. What a shorter text has less than
        # it costs nothing, and no text can be longer, so that one program serves all.
        self.longest = config.max_position_embeddings

    def forward(self, token_ids: paddle.Tensor, cu_seqlens: paddle.Tensor) -> paddle.Tensor:
        """Embed texts that stand one after another.

        Args:
            token_ids: [T] int64, the tokens of all texts.
            cu_seqlens: [B + 1] int32, where each text begins, and where the last one ends. None is empty.

        Returns:
            [B, hidden_size] float32, each row of length 1.
        """
        token = paddle.arange(0, paddle.shape(token_ids)[0], dtype="int32")
        text = paddle.searchsorted(cu_seqlens[1:], token, right=True)  # [T] int64, which one a token belongs to
        x = self._embed(token_ids, self.position(token - paddle.gather(cu_seqlens, text)))
        for layer in self.encoder.layers:
            x = layer(x, cu_seqlens=cu_seqlens, max_seqlen=self.longest)
        return F.normalize(paddle.geometric.segment_mean(x, text), axis=-1)


def plain_encoder(config: EncoderConfig, state: State) -> SentenceEncoder:
    """An encoder of Paddle's layers in eval mode, with the weights of `state`.

    Raises:
        KeyError: the names in `state` are not those of the encoder's parameters.
        ValueError: an array has another shape than its parameter.
    """
    return _with_state(SentenceEncoder(config), state)


def fused_encoder(config: EncoderConfig, state: State) -> PackedSentenceEncoder:
    """The same after `paddle_fused_attention.convert`: its layers run on fused operators, without padding.

    Raises:
        KeyError, ValueError: see `plain_encoder`.
    """
    return convert(_with_state(PackedSentenceEncoder(config), state))


def _with_state(encoder: Encoder, state: State) -> Encoder:
    """An encoder in eval mode with the weights of `state`."""
    encoder.eval()
    parameters = encoder.state_dict()
    if set(parameters) != set(state):
        missing, unknown = sorted(set(parameters) - set(state)), sorted(set(state) - set(parameters))
        raise KeyError(f"state: missing {missing}, unknown {unknown}")
    for name, array in state.items():
        if list(array.shape) != list(parameters[name].shape):
            raise ValueError(f"state: {name}: expected shape {list(parameters[name].shape)}, got {list(array.shape)}")
    encoder.set_state_dict(state)
    return encoder


def paddle_state(weights: Weights, config: EncoderConfig) -> State:
    """Convert the weights of the file to the state of a `SentenceEncoder` of Paddle's layers."""
    state = {
        f"{name}.weight": weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
    }
    state.update(_layer_norm("norm", weights, "embeddings.LayerNorm"))
    for i in range(config.num_hidden_layers):
        source, layer = f"encoder.layer.{i}.", f"encoder.layers.{i}."
        for ours, theirs in (
            ("self_attn.q_proj", "attention.self.query"),
            ("self_attn.k_proj", "attention.self.key"),
            ("self_attn.v_proj", "attention.self.value"),
            ("self_attn.out_proj", "attention.output.dense"),
            ("linear1", "intermediate.dense"),
            ("linear2", "output.dense"),
        ):
            state.update(_linear(layer + ours, weights, source + theirs))
        state.update(_layer_norm(layer + "norm1", weights, source + "attention.output.LayerNorm"))
        state.update(_layer_norm(layer + "norm2", weights, source + "output.LayerNorm"))
    return state


def _linear(ours: str, weights: Weights, theirs: str) -> State:
    return {
        ours + ".weight": np.ascontiguousarray(weights[theirs + ".weight"].T),
        ours + ".bias": weights[theirs + ".bias"],
    }


def _layer_norm(ours: str, weights: Weights, theirs: str) -> State:
    return {ours + ".weight": weights[theirs + ".weight"], ours + ".bias": weights[theirs + ".bias"]}
