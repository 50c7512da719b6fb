"""The task, and the training of one model before and after ``convert``."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle_fused_attention import convert
from paddlenlp.transformers import BertConfig, BertForSequenceClassification

PADDING, FIRST_WORD, WORDS = 0, 4, 60  # words are FIRST_WORD to FIRST_WORD + WORDS - 1
SHARE = 0.8  # of a sequence's words are from the half of the vocabulary that its class names
TEST_BATCHES = 4


@dataclass(frozen=True)
class Settings:
    """The settings of a comparison; the same settings give the same losses."""

    steps: int = 40
    layers: int = 2
    hidden_size: int = 256
    num_heads: int = 4
    seq_len: int = 128
    batch_size: int = 16
    dropout: float = 0.0
    seed: int = 0


@dataclass
class Run:
    """A finished training.

    Attributes:
        losses: Of each step.
        seconds: The median of what a step took, without the first two.
        accuracy: On batches that were not trained on.
        report: What ``convert`` did; empty if it was not called.
    """

    losses: list[float]
    seconds: float
    accuracy: float
    report: str


def batch(settings: Settings, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequences [batch_size, seq_len] of words with padding at the end, and classes [batch_size], both int64; each
    number has its own."""
    rng = np.random.default_rng([settings.seed, number])
    shape = (settings.batch_size, settings.seq_len)
    classes = rng.integers(0, 2, settings.batch_size)
    is_first_half = rng.random(shape) < np.where(classes, SHARE, 1.0 - SHARE)[:, None]
    words = FIRST_WORD + rng.integers(0, WORDS // 2, shape) + np.where(is_first_half, 0, WORDS // 2)
    lengths = rng.integers(settings.seq_len // 2 + 1, settings.seq_len + 1, settings.batch_size)
    return np.where(np.arange(settings.seq_len) < lengths[:, None], words, PADDING), classes


def make_model(settings: Settings) -> paddle.nn.Layer:
    paddle.seed(settings.seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=FIRST_WORD + WORDS,
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.num_heads,
            intermediate_size=4 * settings.hidden_size,
            max_position_embeddings=settings.seq_len,
            hidden_dropout_prob=settings.dropout,
            attention_probs_dropout_prob=settings.dropout,
            pad_token_id=PADDING,
            num_labels=2,
        )
    )


def logits(model: paddle.nn.Layer, sequences: np.ndarray) -> paddle.Tensor:
    """[batch_size, 2]."""
    return model(paddle.to_tensor(sequences), attention_mask=paddle.to_tensor((sequences != PADDING).astype("int64")))


def train(model: paddle.nn.Layer, settings: Settings, report: str = "") -> Run:
    optimizer = paddle.optimizer.AdamW(
        5e-4, parameters=model.parameters(), grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0)
    )
    losses, seconds = [], []
    model.train()
    for step in range(settings.steps):
        sequences, classes = batch(settings, step)
        start = time.perf_counter()
        loss = F.cross_entropy(logits(model, sequences), paddle.to_tensor(classes))
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
        seconds.append(time.perf_counter() - start)
    model.eval()
    right = 0
    with paddle.no_grad():
        for number in range(settings.steps, settings.steps + TEST_BATCHES):
            sequences, classes = batch(settings, number)
            right += int((logits(model, sequences).numpy().argmax(axis=-1) == classes).sum())
    return Run(losses, statistics.median(seconds[2:]), right / (TEST_BATCHES * settings.batch_size), report)


def compare(settings: Settings) -> tuple[Run, Run]:
    """The same training of a model as it is and after ``convert``."""
    model = make_model(settings)
    converted, report = convert(copy.deepcopy(model), return_report=True)
    return train(model, settings), train(converted, settings, str(report))
