"""Texts to embeddings: tokenize, gather texts of like length into batches, encode each batch."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Callable, Sequence

import numpy as np
import paddle
from tokenizers import Tokenizer
from tqdm import tqdm

from .encoder import SentenceEncoder

BATCH_SIZE = 32

Encode = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Token ids [B, S] int64 and keep [B, S] bool to embeddings [B, hidden_size] float32."""


@dataclass(frozen=True)
class Batch:
    """Texts of like length.

    Attributes:
        rows: [B] int64, the place of each text among all texts.
        token_ids: [B, S] int64, zero where a text is shorter than S.
        keep: [B, S] bool, False there.
    """

    rows: np.ndarray
    token_ids: np.ndarray
    keep: np.ndarray


def make_batches(tokenizer: Tokenizer, texts: Sequence[str], batch_size: int = BATCH_SIZE) -> list[Batch]:
    """Tokenize the texts and batch them in order of length, so that little is padding."""
    encodings = tokenizer.encode_batch(list(texts))
    lengths = np.array([len(encoding.ids) for encoding in encodings], dtype=np.int64)
    order = np.argsort(lengths, kind="stable")
    batches = []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        keep = np.arange(lengths[rows].max()) < lengths[rows, None]
        token_ids = np.zeros(keep.shape, dtype=np.int64)
        for ids, row in zip(token_ids, rows):
            ids[: lengths[row]] = encodings[row].ids
        batches.append(Batch(rows, token_ids, keep))
    return batches


def dygraph_encode(encoder: SentenceEncoder) -> Encode:
    """A function from arrays to arrays that runs an encoder in dygraph, on what its `forward` takes."""

    def encode(*arrays: np.ndarray) -> np.ndarray:
        with paddle.no_grad():
            return encoder(*map(paddle.to_tensor, arrays)).numpy()

    return encode


def without_padding(encode: Encode) -> Encode:
    """What packs a batch for an encoder that takes token ids [T] int64 and cu_seqlens [B + 1] int32: see
    `PackedSentenceEncoder`."""

    def encode_batch(token_ids: np.ndarray, keep: np.ndarray) -> np.ndarray:
        return encode(token_ids[keep], np.cumsum([0, *keep.sum(axis=1)], dtype=np.int32))

    return encode_batch


def embed(encode: Encode, batches: Sequence[Batch], label: str | None = None) -> tuple[np.ndarray, float]:
    """Encode every batch, with a progress bar if there is a label for it.

    Returns:
        The embeddings [N, hidden_size] in the order of the texts, and the seconds that encoding them took.
    """
    count = sum(len(batch.rows) for batch in batches)
    encoded = []
    seconds = 0.0
    with tqdm(total=count, desc=label, unit="text", disable=label is None) as progress:
        for batch in batches:
            start = time.perf_counter()
            encoded.append(encode(batch.token_ids, batch.keep))
            seconds += time.perf_counter() - start
            progress.update(len(batch.rows))
    rows = np.concatenate([batch.rows for batch in batches])
    return np.concatenate(encoded)[np.argsort(rows)], seconds


def nearest(embeddings: np.ndarray, query: np.ndarray, count: int) -> list[tuple[int, float]]:
    """Return the rows of `embeddings` [N, E] most like `query` [E], best first, with their cosine similarity."""
    scores = embeddings @ query
    return [(int(row), float(scores[row])) for row in np.argsort(-scores, kind="stable")[:count]]
