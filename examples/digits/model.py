"""A small vision transformer out of Paddle's own layers, and the same with its attention blocks fused."""

from __future__ import annotations

import paddle
import paddle_fused_attention
from paddle import nn

from .data import CLASSES, PATCH, TOKENS

KINDS = {"fused": "FusedMultiHeadAttention", "plain": "Paddle's own layers"}
WIDTH = 64
HEADS = 4
DEPTH = 3


class VisionTransformer(nn.Layer):
    """Patches [B, 16, 4] to scores [B, 10]: a pre-layer-norm encoder, and a linear layer on the mean of its tokens."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, WIDTH)
        self.position = self.create_parameter([TOKENS, WIDTH], default_initializer=nn.initializer.Normal(std=0.02))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout, activation="gelu", normalize_before=True)
        self.encoder = nn.TransformerEncoder(layer, DEPTH, nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, patches: paddle.Tensor) -> paddle.Tensor:
        return self.head(self.encoder(self.embed(patches) + self.position).mean(axis=1))


def make_model(kind: str, dropout: float, seed: int) -> VisionTransformer:
    """The model of one kind, "fused" or "plain"; both have the same weights for the same seed."""
    paddle.seed(seed)
    model = VisionTransformer(dropout)
    return paddle_fused_attention.convert(model) if kind == "fused" else model
