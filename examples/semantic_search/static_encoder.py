"""The fused encoder as a static program, for batches and texts of any size.

On Paddle 3 the program is of the new kind (PIR), on Paddle 2.6 of the old one.
"""

from __future__ import annotations

import numpy as np
import paddle

from .encoder import SentenceEncoder

INPUTS = (("int64", "token_ids"), ("bool", "keep"))


def input_specs() -> list[paddle.static.InputSpec]:
    """What the encoder takes: token ids and keep, [B, S] each, B and S unknown."""
    return [paddle.static.InputSpec([None, None], dtype, name, stop_gradient=True) for dtype, name in INPUTS]


class StaticEncoder:
    """A program that embeds token ids [B, S], B and S unknown when it is built.

    Args:
        encoder: in eval mode. Its parameters are the program's.
    """

    def __init__(self, encoder: SentenceEncoder) -> None:
        self._forward = paddle.jit.to_static(encoder.forward, input_spec=input_specs(), full_graph=True)
        legacy = isinstance(self._forward.concrete_program.main_program, paddle.base.framework.Program)
        self.kind = "legacy" if legacy else "PIR"

    def __call__(self, token_ids: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """Run the program: token ids [B, S] int64 and keep [B, S] bool to embeddings [B, hidden_size] float32."""
        with paddle.no_grad():
            return self._forward(paddle.to_tensor(token_ids), paddle.to_tensor(keep)).numpy()
