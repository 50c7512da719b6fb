"""What blocks of ordinary Paddle ops share, and where such ops take the operators' place."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, Sequence

import paddle


def is_exported_to_onnx() -> bool:
    """Whether ``paddle.onnx.export`` builds the graph. Its exporter ends the process at an operator that ONNX does not
    have, so it gets ordinary ops."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("paddle2onnx."):
            return True
        frame = frame.f_back
    return False


def compute_dtype(x: Any) -> str:
    """float32 at least: Paddle multiplies no 16-bit matrices on the CPU."""
    return "float64" if x.dtype == paddle.float64 else "float32"


def cast_all(tensors: Sequence[Any], dtype: str) -> list:
    return [None if tensor is None else paddle.cast(tensor, dtype) for tensor in tensors]


def layer_norm(x: Any, scale: Any, bias: Any, epsilon: float) -> Any:
    """Layer norm. Paddle's own takes no epsilon above 0.001, and its gradient is wrong for a frozen scale on the
    CPU."""
    centred = x - x.mean(axis=-1, keepdim=True)
    out = centred * paddle.rsqrt((centred * centred).mean(axis=-1, keepdim=True) + epsilon)
    out = out if scale is None else out * scale
    return out if bias is None else out + bias
