"""The command line. It checks the arguments before the slow imports and turns failures into one line and an exit
status."""

from __future__ import annotations

import argparse
import sys
from typing import Sequence

from ..startup import explain_missing, import_paddle

HEAD_SIZE = 64
# Rounding differs between the two runs.
TOLERANCE = 1e-2


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments; bad ones end the program with status 2 and a line that says why."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.fine_tuning",
        description="Fine-tune a small BERT of PaddleNLP as it is and after convert, and compare the speed.",
    )
    counts = {"steps": 40, "layers": 2, "hidden-size": 256, "seq-len": 128, "batch-size": 16}
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--dropout", type=float, default=0.0, metavar="P", help="with it the two runs differ (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    for name in counts:
        value = getattr(arguments, name.replace("-", "_"))
        least = 3 if name in ("seq-len", "steps") else 1
        if value < least:
            parser.error(f"--{name}: expected at least {least}, got {value}")
    if arguments.hidden_size % HEAD_SIZE:
        parser.error(f"--hidden-size: expected a multiple of {HEAD_SIZE}, got {arguments.hidden_size}")
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
    settings = training.Settings(**{**vars(arguments), "num_heads": arguments.hidden_size // HEAD_SIZE})
    try:
        plain, converted = training.compare(settings)
    except KeyboardInterrupt:
        print("\nInterrupted", file=sys.stderr)
        return 130
    print(converted.report)
    print(f"\n{'':17}  {'ms/step':>7}  {'tokens/s':>8}  {'last loss':>9}  accuracy")
    for name, run in (("as it is", plain), ("after convert", converted)):
        tokens = settings.batch_size * settings.seq_len / run.seconds
        print(f"{name:17}  {1000 * run.seconds:7.1f}  {tokens:8.0f}  {run.losses[-1]:9.5f}  {run.accuracy:.1%}")
    print(f"Speed after convert: {plain.seconds / converted.seconds:.2f} times that before")
    difference = max(abs(a - b) for a, b in zip(plain.losses, converted.losses))
    print(f"Largest difference of the losses: {difference:.1e}")
    if settings.dropout == 0 and not difference < TOLERANCE:
        print(f"The losses should agree: expected a difference of less than {TOLERANCE}", file=sys.stderr)
        return 1
    return 0
