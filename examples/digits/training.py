"""Training with checkpoints that go on bit for bit.

A step depends only on the parameters, the optimizer's state (with its learning rate) and the step's number, which gives
the batch and the seed of Paddle's generator, from which dropout is drawn. So a checkpoint holds these, and the losses
up to it.
"""

from __future__ import annotations

import dataclasses
import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle_fused_attention import checkpoint_files
from paddle_fused_attention.whole_files import write_whole
from tqdm import tqdm

from .data import Digits, batch_rows
from .model import KINDS, VisionTransformer, make_model

PEAK_RATE = 3e-3
WARMUP_STEPS = 50


class CheckpointError(RuntimeError):
    """A checkpoint can't be read, or is that of another run."""


@dataclass(frozen=True)
class Settings:
    """The settings of a run; the same settings give the same numbers."""

    epochs: int = 20
    batch_size: int = 64
    dropout: float = 0.0
    seed: int = 0


@dataclass
class Run:
    """A finished or interrupted run.

    Attributes:
        model: as it is after the last step.
        losses: [steps] float32, one for each step.
        seconds: that the steps of this process took.
        steps: that this process made.
    """

    model: VisionTransformer
    losses: np.ndarray
    seconds: float
    steps: int


def make_optimizer(model: VisionTransformer, total: int) -> paddle.optimizer.Optimizer:
    """AdamW with clipped gradients; the learning rate rises, then falls along a cosine."""
    cosine = paddle.optimizer.lr.CosineAnnealingDecay(PEAK_RATE, max(1, total - WARMUP_STEPS))
    rate = paddle.optimizer.lr.LinearWarmup(cosine, WARMUP_STEPS, PEAK_RATE / WARMUP_STEPS, PEAK_RATE)
    clip = paddle.nn.ClipGradByGlobalNorm(1.0)
    return paddle.optimizer.AdamW(rate, parameters=model.parameters(), weight_decay=0.05, grad_clip=clip)


def train(
    kind: str,
    settings: Settings,
    data: Digits,
    checkpoint: Path,
    *,
    resume: bool = False,
    checkpoint_steps: int = 50,
    max_steps: int | None = None,
) -> Run:
    """Train a model of one kind.

    Args:
        kind: "fused" or "plain".
        settings: of the run.
        data: to train on.
        checkpoint: the file that is written after every `checkpoint_steps` steps and at the end.
        resume: whether to go on from that file, if it is there.
        max_steps: how many steps this process makes at most; None: all.

    Raises:
        CheckpointError: `checkpoint` can't be resumed from.
    """
    total = settings.epochs * (len(data.labels) // settings.batch_size)
    losses = np.zeros(total, np.float32)
    start = 0
    # The optimizer's state goes by the parameters' names, which must not depend on what else this process has made.
    with paddle.utils.unique_name.guard():
        model = make_model(kind, settings.dropout, settings.seed)
        optimizer = make_optimizer(model, total)
        if resume and checkpoint.exists():
            start, losses[:] = load_checkpoint(checkpoint, kind, settings, model, optimizer, total)
        end = total if max_steps is None else min(total, start + max_steps)
        seconds = 0.0
        with tqdm(total=total, initial=start, desc=KINDS[kind], unit="step") as progress:
            for step in range(start, end):
                began = time.perf_counter()
                losses[step] = train_step(model, optimizer, data, settings, step)
                seconds += time.perf_counter() - began
                progress.set_postfix(loss=f"{losses[step]:.4f}", refresh=False)
                progress.update()
                if (step + 1) % checkpoint_steps == 0 or step + 1 == end:
                    save_checkpoint(checkpoint, kind, settings, model, optimizer, step + 1, losses)
    return Run(model, losses[:end], seconds, end - start)


def train_step(model: VisionTransformer, optimizer: Any, data: Digits, settings: Settings, step: int) -> float:
    """Make one step and return its loss, before the step."""
    rows = batch_rows(len(data.labels), settings.batch_size, settings.seed, step)
    paddle.seed(settings.seed + step + 1)
    scores = model(paddle.to_tensor(data.patches[rows]))
    loss = F.cross_entropy(scores, paddle.to_tensor(data.labels[rows]))
    loss.backward()
    optimizer.step()
    optimizer.clear_grad()
    optimizer._learning_rate.step()
    return loss.item()


def save_checkpoint(
    path: Path, kind: str, settings: Settings, model: VisionTransformer, optimizer: Any, step: int, losses: np.ndarray
) -> None:
    """Write a checkpoint; the one of before stays until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "run": dict(dataclasses.asdict(settings), kind=kind, paddle=paddle.__version__),
        "step": step,
        "losses": losses,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    saved = io.BytesIO()  # paddle.save takes no other open file
    paddle.save(state, saved)
    write_whole(path, lambda file: file.write(saved.getbuffer()))


def load_checkpoint(
    path: Path, kind: str, settings: Settings, model: VisionTransformer, optimizer: Any, total: int
) -> tuple[int, np.ndarray]:
    """Put a checkpoint's state into model and optimizer; return its step and losses.

    Raises:
        CheckpointError: it is no checkpoint, or one of another run.
    """
    try:
        state = checkpoint_files.load_state(path)
    except checkpoint_files.CheckpointError as error:
        raise CheckpointError(f"{error}; it is no checkpoint: delete it, or go without --resume") from error
    run, step, losses, weights, moments = (
        state.get(name) if isinstance(state, dict) else None for name in ("run", "step", "losses", "model", "optimizer")
    )
    dicts = all(isinstance(part, dict) for part in (run, weights, moments))
    if not dicts or not isinstance(losses, np.ndarray) or not isinstance(step, int) or not 0 <= step <= losses.size:
        raise CheckpointError(f"{path} is no checkpoint of this program: delete it, or go without --resume")
    expected = dict(dataclasses.asdict(settings), kind=kind, paddle=paddle.__version__)
    for name, value in expected.items():
        found = run.get(name)
        if type(found) is not type(value) or found != value:
            got = repr(found) if isinstance(found, (int, float, str)) else type(found).__name__
            raise CheckpointError(f"{path}: {name}: expected {value!r}, got a checkpoint of a run with {got[:100]}")
    shapes = {name: list(getattr(value, "shape", ())) for name, value in weights.items()}
    if losses.shape != (total,) or shapes != {name: list(value.shape) for name, value in model.state_dict().items()}:
        raise CheckpointError(f"{path}: its losses or weights have other names or shapes than those of its settings")
    model.set_state_dict(weights)
    optimizer.set_state_dict(moments)
    return step, losses


def accuracy(model: VisionTransformer, data: Digits) -> float:
    """The share of images that the model reads right, without dropout."""
    was_training = model.training
    model.eval()
    with paddle.no_grad():
        scores = model(paddle.to_tensor(data.patches)).numpy()
    if was_training:
        model.train()
    return float((scores.argmax(axis=1) == data.labels).mean())
