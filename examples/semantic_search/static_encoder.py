"""The fused encoder as a static program, for batches and texts of any size.

On Paddle 3 the program is of the new kind (PIR), on Paddle 2.6 of the old one.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator

import numpy as np
import paddle

from .encoder import SentenceEncoder, State, fused_attention_block, load_state
from .model_files import EncoderConfig


@contextmanager
def _static_mode() -> Iterator[None]:
    """Static mode inside, the mode of before outside."""
    was_dynamic = paddle.in_dynamic_mode()
    paddle.enable_static()
    try:
        yield
    finally:
        if was_dynamic:
            paddle.disable_static()


class StaticEncoder:
    """A program that embeds token ids [B, S], B and S unknown when it is built, and an executor that runs it.

    Args:
        config: the sizes.
        state: the weights, as `fused_state` gives them.
    """

    def __init__(self, config: EncoderConfig, state: State) -> None:
        self._program = paddle.static.Program()
        self._scope = paddle.static.Scope()
        startup = paddle.static.Program()
        with _static_mode(), paddle.static.scope_guard(self._scope):
            with paddle.static.program_guard(self._program, startup), paddle.utils.unique_name.guard():
                token_ids = paddle.static.data("token_ids", [None, None], "int64")
                keep = paddle.static.data("keep", [None, None], "bool")
                encoder = SentenceEncoder(config, fused_attention_block)
                encoder.eval()
                self._embeddings = encoder(token_ids, keep)
            self._executor = paddle.static.Executor()
            self._executor.run(startup)
            load_state(encoder, state)
            self.kind = "PIR" if paddle.framework.in_dynamic_or_pir_mode() else "legacy"

    def __call__(self, token_ids: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """Run the program: token ids [B, S] int64 and keep [B, S] bool to embeddings [B, hidden_size] float32."""
        with _static_mode(), paddle.static.scope_guard(self._scope):
            (embeddings,) = self._executor.run(
                self._program, feed={"token_ids": token_ids, "keep": keep}, fetch_list=[self._embeddings]
            )
        return embeddings
