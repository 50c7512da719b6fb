"""The fused encoder as a static program, for any number of texts of any length.

On Paddle 3 the program is of the new kind (PIR), on Paddle 2.6 of the old one.
"""

from __future__ import annotations

import numpy as np
import paddle

from .encoder import PackedSentenceEncoder

INPUTS = (("int64", "token_ids"), ("int32", "cu_seqlens"))


def input_specs() -> list[paddle.static.InputSpec]:
    """What the encoder takes: token ids [T] and cu_seqlens [B + 1], T and B unknown."""
    return [paddle.static.InputSpec([None], dtype, name, stop_gradient=True) for dtype, name in INPUTS]


class StaticEncoder:
    """A program that embeds texts packed one after another, T tokens of B texts, T and B unknown when it is built.

    Args:
        encoder: in eval mode. Its parameters are the program's.
    """

    def __init__(self, encoder: PackedSentenceEncoder) -> None:
        self._forward = paddle.jit.to_static(encoder.forward, input_spec=input_specs(), full_graph=True)
        legacy = isinstance(self._forward.concrete_program.main_program, paddle.base.framework.Program)
        self.kind = "legacy" if legacy else "PIR"

    def __call__(self, token_ids: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
        """Run the program: token ids [T] int64 and cu_seqlens [B + 1] int32 to embeddings [B, hidden_size] float32."""
        with paddle.no_grad():
            return self._forward(paddle.to_tensor(token_ids), paddle.to_tensor(cu_seqlens)).numpy()
