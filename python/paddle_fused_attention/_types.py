"""Types that several public signatures share."""

from __future__ import annotations

from typing import Literal, TypeVar

from paddle import nn
from paddle.distributed.communication.group import Group

__all__ = ["Activation", "Group", "Layout", "Mode", "Model"]

Mode = Literal["upscale_in_train", "downscale_in_infer"]
Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]
Layout = Literal["in-out", "out-in"]  # of the weights of linear layers
Model = TypeVar("Model", bound=nn.Layer)
