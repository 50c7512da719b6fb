"""scikit-learn's handwritten digits as sequences of patches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.datasets import load_digits

PATCH = 2
IMAGE = 8
TOKENS = (IMAGE // PATCH) ** 2
CLASSES = 10
TEST_SHARE = 5  # one image in so many is for the test


@dataclass(frozen=True)
class Digits:
    """Images as patches [N, 16, 4] float32 between -1 and 1, and their labels [N] int64."""

    patches: np.ndarray
    labels: np.ndarray


def load() -> tuple[Digits, Digits]:
    """The images for training and those for the test; every fifth is one of these."""
    digits = load_digits()
    side = IMAGE // PATCH
    tiles = digits.images.reshape(-1, side, PATCH, side, PATCH).transpose(0, 1, 3, 2, 4)
    patches = (tiles.reshape(-1, TOKENS, PATCH * PATCH) / 8 - 1).astype(np.float32)
    labels = digits.target.astype(np.int64)
    is_test = np.arange(len(labels)) % TEST_SHARE == 0
    return Digits(patches[~is_test], labels[~is_test]), Digits(patches[is_test], labels[is_test])


def batch_rows(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The rows of one step's batch: a function of seed and step alone, so that a resumed run goes on where it was.

    Every epoch has an order of its own; what is left over at its end, less than a batch, is not used.
    """
    steps = count // batch_size
    epoch, place = divmod(step, steps)
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return order[place * batch_size : (place + 1) * batch_size]
