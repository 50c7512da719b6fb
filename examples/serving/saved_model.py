"""The encoder on disk: saving it as a static program beside its tokenizer, and running it from there by Paddle's
predictor."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Callable, Iterator, Sequence

import numpy as np
import paddle
import paddle_fused_attention  # noqa: F401  a saved model holds the operator by its name; this import registers it
from paddle import inference
from tokenizers import Tokenizer

from ..semantic_search.encoder import fused_encoder, paddle_state
from ..semantic_search.model_files import find_model_directory, load_config, load_weights
from ..semantic_search.static_encoder import INPUTS, input_specs
from .turns import Turns
from .whole_folders import whole_folder

ENCODER = "encoder"
TOKENIZER = "tokenizer.json"
PARAMETERS = f"{ENCODER}.pdiparams"
# Paddle 3 writes programs as JSON, Paddle 2.6 as protocol buffers, which Paddle 3 still runs.
PROGRAMS = (f"{ENCODER}.json", f"{ENCODER}.pdmodel")
# Larger batches are hardly faster, and other requests wait for them. On Paddle 3.3 all of Python does: docs/paddle.md.
BATCH_TOKENS = 512


class SavedModelError(RuntimeError):
    """There is no saved model in a directory, or something else stands where one should go."""


def save(directory: Path) -> None:
    """Save the pretrained encoder for any number of texts of any length; what is in `directory` is replaced once all is
    written.

    Raises:
        ModelFilesError: the model's package is missing or damaged.
        SavedModelError: `directory` has files in it that are no saved model.
    """
    if directory.exists() and (not directory.is_dir() or (any(directory.iterdir()) and not _program(directory))):
        raise SavedModelError(f"{directory} is there already and is no saved model: choose another directory")
    source = find_model_directory()
    config = load_config(source)
    encoder = fused_encoder(config, paddle_state(load_weights(source), config))
    directory.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(directory) as partial:
        paddle.jit.save(encoder, str(partial / ENCODER), input_spec=input_specs())
        shutil.copyfile(source / TOKENIZER, partial / TOKENIZER)


def _program(directory: Path) -> Path | None:
    return next((directory / name for name in PROGRAMS if (directory / name).is_file()), None)


def _num_threads() -> int:
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    return int(chosen) if chosen.isdigit() and int(chosen) > 0 else len(os.sched_getaffinity(0))


def _batches(lengths: np.ndarray) -> Iterator[slice]:
    """Neighbours that have up to BATCH_TOKENS together, or one text."""
    start = tokens = 0
    for i, length in enumerate(lengths):
        if i > start and tokens + length > BATCH_TOKENS:
            yield slice(start, i)
            start, tokens = i, 0
        tokens += length
    yield slice(start, len(lengths))


class SavedEncoder:
    """Texts to embeddings by a saved model, which computes no padding, however different their lengths are. One batch
    at a time runs in the predictor; the batches of calls at the same time take turns.

    Args:
        directory: where `save` wrote.

    Raises:
        SavedModelError: a file is not there, or the program takes other inputs.
    """

    def __init__(self, directory: Path) -> None:
        program = _program(directory)
        if program is None or not all((directory / name).is_file() for name in (PARAMETERS, TOKENIZER)):
            raise SavedModelError(f"{directory} has no saved model: python -m examples.serving save {directory}")
        self._tokenizer = Tokenizer.from_file(str(directory / TOKENIZER))
        self._tokenizer.no_padding()
        config = inference.Config(str(program), str(directory / PARAMETERS))
        config.disable_glog_info()
        if paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count():
            config.enable_use_gpu(256, 0)
        else:
            config.disable_gpu()
            config.set_cpu_math_library_num_threads(_num_threads())  # else one, for the operator too
            # Else a thread that frees tensors spins beside the operator's threads.
            paddle.set_flags({"FLAGS_eager_delete_tensor_gb": -1.0})
        self._predictor = inference.create_predictor(config)
        names = sorted(self._predictor.get_input_names())
        if names != sorted(name for _, name in INPUTS):
            raise SavedModelError(
                f"{directory} has a model with the inputs {', '.join(names)}, as an earlier version of this example "
                f"saved it: python -m examples.serving save {directory}"
            )
        self._turns = Turns()

    def embed(
        self, texts: Sequence[str], before_batch: Callable[[], None] = lambda: None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embed texts, at least one.

        Args:
            texts: [N]; of each one no more tokens are read than the tokenizer's file says, 128.
            before_batch: called before each batch; what it raises ends the call.

        Returns:
            [N, hidden_size] float32, each row of length 1, and [N] int64, how many tokens of each text were read.
        """
        encodings = self._tokenizer.encode_batch(list(texts))
        lengths = np.array([len(encoding.ids) for encoding in encodings], dtype=np.int64)
        embeddings = []
        for batch in _batches(lengths):
            token_ids = np.concatenate([encoding.ids for encoding in encodings[batch]])
            cu_seqlens = np.cumsum([0, *lengths[batch]], dtype=np.int32)
            with self._turns:
                before_batch()
                embeddings.append(self._run(token_ids, cu_seqlens))
        return np.concatenate(embeddings), lengths

    def _run(self, token_ids: np.ndarray, cu_seqlens: np.ndarray) -> np.ndarray:
        arrays = {"token_ids": token_ids, "cu_seqlens": cu_seqlens}
        for name in self._predictor.get_input_names():
            handle = self._predictor.get_input_handle(name)
            handle.reshape(arrays[name].shape)
            handle.copy_from_cpu(arrays[name])
        self._predictor.run()
        return self._predictor.get_output_handle(self._predictor.get_output_names()[0]).copy_to_cpu()
