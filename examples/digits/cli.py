"""The command line. It checks the arguments before the slow imports and turns failures into one line and an exit
status."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Sequence

from ..startup import explain_missing, import_paddle

DEFAULT_OUTPUT = Path("build/digits")
# Rounding differs between the two models, and hundreds of steps make more of it.
TOLERANCE = 1e-2


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments; bad ones end the program with status 2 and a line that says why."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits",
        description=(
            "Train a vision transformer on handwritten digits, on the fused attention operator and on Paddle's layers."
        ),
    )
    parser.add_argument("--attention", choices=("fused", "plain", "both"), default="both", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--dropout", type=float, default=0.0, metavar="P", help="with it the two curves differ (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in the output directory")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIRECTORY", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    if arguments.epochs < 1:
        parser.error(f"--epochs: expected at least 1, got {arguments.epochs}")
    if not 0 <= arguments.dropout < 1:
        parser.error(f"--dropout: expected a number in [0, 1), got {arguments.dropout}")
    if not 0 <= arguments.seed < 2**31:
        parser.error(f"--seed: expected 0 to {2**31 - 1}, got {arguments.seed}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status: 0 done, 1 failed, 2 bad arguments, 130 interrupted."""
    arguments = parse_arguments(argv)
    try:
        import_paddle()
        from . import training
    except ModuleNotFoundError as error:
        return explain_missing(error)
    try:
        return run(arguments)
    except ModuleNotFoundError as error:
        return explain_missing(error)
    except (training.CheckpointError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return 130


def run(arguments: argparse.Namespace) -> int:
    """Train, print the comparison, draw the curves; 1 if they should agree and do not."""
    import numpy as np

    from . import data, plot, training
    from .model import KINDS

    settings = training.Settings(epochs=arguments.epochs, dropout=arguments.dropout, seed=arguments.seed)
    images, test_images = data.load()
    runs = {}
    for kind in KINDS if arguments.attention == "both" else (arguments.attention,):
        checkpoint = arguments.output / f"{kind}.checkpoint"
        runs[kind] = training.train(kind, settings, images, checkpoint, resume=arguments.resume)
    width = max(len(KINDS[kind]) for kind in runs)
    print(f"\n{'attention':{width}}  {'ms/step':>7}  {'last loss':>9}  test accuracy")
    for kind, result in runs.items():
        speed = f"{1000 * result.seconds / result.steps:7.1f}" if result.steps else f"{'':7}"
        share = training.accuracy(result.model, test_images)
        print(f"{KINDS[kind]:{width}}  {speed}  {result.losses[-1]:9.5f}  {share:.1%}")
    picture = arguments.output / "loss.png"
    plot.draw(picture, {KINDS[kind]: result.losses for kind, result in runs.items()})
    print(f"Loss curves: {picture}")
    if len(runs) == 2:
        difference = float(np.abs(runs["fused"].losses - runs["plain"].losses).max())
        print(f"Largest difference of the losses: {difference:.1e}")
        if arguments.dropout == 0 and not difference < TOLERANCE:
            print(f"The curves should agree: expected a difference of less than {TOLERANCE}", file=sys.stderr)
            return 1
    return 0
