"""The loss curves as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Mapping

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402
from paddle_fused_attention.whole_files import write_whole  # noqa: E402


def draw(path: Path, curves: Mapping[str, np.ndarray]) -> None:
    """Draw one curve of losses for each name, on a logarithmic scale, to a PNG file."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for (name, losses), style in zip(curves.items(), ("-", "--")):
        axes.plot(np.arange(1, len(losses) + 1), losses, style, label=name, linewidth=1.2)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))
    plt.close(figure)
