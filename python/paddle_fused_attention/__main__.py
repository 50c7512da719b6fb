"""``python -m paddle_fused_attention``: ``convert`` packs a checkpoint for the fused layer, ``revert`` unpacks it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Sequence

import paddle

from . import checkpoint, checkpoint_files
from .checkpoint import CheckpointError

_NAMINGS = """known namings:
  Paddle, PaddleNLP BERT    self_attn.{q,k,v,out}_proj, norm1     -> self_attn.qkv_weight, ...
  Hugging Face BERT         attention.self.query, ...             -> attention.qkv_weight, ...
  Hugging Face ViT          attention.attention.query, ...        -> attention.qkv_weight, ...
  GPT-2                     attn.c_attn, attn.c_proj, ln_1        -> attn.qkv_weight, ...

packed: qkv_weight [3, H, D, E], qkv_bias [3, H, D], linear_weight [E, E], linear_bias [E], and ln_scale and ln_bias [E], or
pre_ln_scale and pre_ln_bias where the layer norm stands before the attention. With Paddle's naming these are the names of a
model after paddle_fused_attention.convert(model)."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m paddle_fused_attention",
        description="Packs the attention of checkpoints for the fused layer, and unpacks it.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in (
        ("convert", "pack query, key, value and output projection and the layer norm of every attention block"),
        ("revert", "the inverse: the names and the bits that were there before"),
    ):
        command = commands.add_parser(
            name, help=text, description=text, epilog=_NAMINGS, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("input", metavar="IN", type=Path, help="a .pdparams or .safetensors file")
        command.add_argument("output", metavar="OUT", type=Path, help="likewise, and not necessarily of the same kind")
        if name == "convert":
            command.add_argument("--num-heads", metavar="H", type=int, required=True, help="the number of attention heads")
            command.add_argument(
                "--normalize-before",
                action="store_true",
                help="norm1 stands before the attention (Paddle's naming can't tell; by default it stands after the residual)",
            )
        command.add_argument(
            "--names", metavar="PATTERN", default="*", help="which blocks, as in 'encoder.layers.*' (default: all)"
        )
        command.add_argument("--force", action="store_true", help="replace OUT if it exists")
    return parser


class _ProgressBar:
    """On a terminal only."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._shown = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        if not self._shown:
            return
        filled = 30 * done // total if total else 30
        sys.stderr.write(f"\r{self._title} [{'#' * filled}{'.' * (30 - filled)}] {done}/{total}")
        if done == total:
            sys.stderr.write("\n")
        sys.stderr.flush()


def _run(arguments: argparse.Namespace) -> None:
    source, target = arguments.input, arguments.output
    checkpoint_files.check_target(target)
    if target.exists() and not arguments.force:
        raise CheckpointError(f"{target}: exists already; --force replaces it")
    read = checkpoint_files.read(source)
    options: dict[str, Any] = {"names": arguments.names, "progress": _ProgressBar(arguments.command)}
    if arguments.command == "convert":
        arrays, report = checkpoint.pack(
            read.arrays, arguments.num_heads, normalize_before=arguments.normalize_before, **options
        )
    else:
        arrays, report = checkpoint.unpack(read.arrays, **options)
    checkpoint_files.write(target, checkpoint_files.Checkpoint(arrays, read.metadata))
    done = "packed" if arguments.command == "convert" else "unpacked"
    print(report)
    unchanged = sum(1 for name in arrays if name in read.arrays)
    print(f"{target}: {len(report.converted)} blocks {done}, {len(report.left_alone)} left alone, {unchanged} values unchanged")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status."""
    parsed = _parser().parse_args(arguments)
    paddle.set_device("cpu")
    try:
        _run(parsed)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
