"""``python -m paddle_fused_attention``: ``convert`` packs a checkpoint for the fused layers, ``revert`` unpacks it,
``info`` tells what runs here."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, Iterable, Iterator, NoReturn, Sequence, TextIO

import paddle

from . import __version__, checkpoint, checkpoint_files
from ._checks import check_count, one_line, shown
from ._environment import environment_report
from ._explain import ELEMENTS, card_number
from ._namings import LAYOUTS
from .checkpoint import CheckpointError

_NAMINGS = """known namings:
  Paddle, PaddleNLP BERT    self_attn.{q,k,v}_proj                -> self_attn.qkv_weight, self_attn.qkv_bias
  Hugging Face BERT         attention.self.query, ...             -> attention.qkv_weight, ...
  Hugging Face ViT          attention.attention.query, ...        -> attention.qkv_weight, ...
  GPT-2, OpenAI GPT         attn.c_attn, attn.c_proj, ln_1        -> attn.qkv_weight, ...

packed: qkv_weight [3, H, D, E] and qkv_bias [3, H, D]. With Paddle's naming that is all, and the names are those of a
model after paddle_fused_attention.convert(model). With the others linear_weight [E, E], linear_bias [E], and ln_scale
and ln_bias [E], or pre_ln_scale and pre_ln_bias where the layer norm stands before the attention, are packed too: the
names are those of a FusedMultiHeadAttention in the attention's place, whose arguments the report gives, but for
epsilon, which is the model's own.

--whole-layers packs the feed-forward half of each layer too, with any of the namings: the names are those of a
paddle.incubate.nn.FusedTransformerEncoderLayer in the layer's place, fused_attn.qkv_weight, ..., ffn._linear1_weight,
... Where nothing tells what the names were before, revert gives those of paddle.nn.TransformerEncoderLayer.

A block is packed only where its names and shapes say that the operator computes it. Patterns are those of a shell, for
the names of blocks, and the first that fits holds: --num-heads 'text.*=8' --num-heads 'vision.*=12'."""

_FILES = "a .pdparams, .safetensors, .bin, .pt or .pth file, or an index.json of a sharded checkpoint"


def _heads_argument(text: str) -> tuple[str | None, int]:
    pattern, equals, number = text.rpartition("=")
    try:
        return (pattern if equals else None), int(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or PATTERN=number, got {shown(text)}") from None


def _path_argument(text: str) -> Path:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected the name of a file, got {shown(text)}")
    return Path(text)


def _head_dim_argument(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {shown(text)}") from None
    with _named_by_the_parser():
        check_count("head_dim", number)
    return number


def _device_argument(text: str) -> str:
    with _named_by_the_parser():
        card_number(text)
    return text


@contextlib.contextmanager
def _named_by_the_parser() -> Iterator[None]:
    """Hands an error that begins with the argument's name to the parser, which names the option."""
    try:
        yield
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).partition(": ")[2]) from None


class _ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))


def _parser() -> argparse.ArgumentParser:
    parser = _ArgumentParser(
        prog="python -m paddle_fused_attention",
        description="Packs the attention of checkpoints for the fused layer, and unpacks it. Tells what runs here.",
    )
    parser.add_argument("--version", action="version", version=f"paddle-fused-attention {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in (
        ("convert", "pack the projections, and where the names ask for it the layer norm, of every attention block"),
        ("revert", "the inverse: the names and the bits that were there before"),
    ):
        command = commands.add_parser(
            name, help=text, description=text, epilog=_NAMINGS, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("input", metavar="IN", type=_path_argument, help=_FILES)
        command.add_argument("output", metavar="OUT", type=_path_argument, help="a .pdparams or .safetensors file")
        if name == "convert":
            command.add_argument(
                "--num-heads",
                metavar="H",
                type=_heads_argument,
                action="append",
                required=True,
                help="the number of attention heads; PATTERN=H, repeated: of the blocks with such names",
            )
            order = command.add_mutually_exclusive_group()
            for side, place in (("before", "before the attention"), ("after", "after the residual")):
                order.add_argument(
                    f"--normalize-{side}",
                    action="store_const",
                    const=side == "before",
                    dest="normalize_before",
                    help=(
                        f"the layer norm stands {place}, for blocks of GPT's names without an ln_f or tokens_embed "
                        "that tells, and whole layers of Paddle's names"
                    ),
                )
            command.add_argument(
                "--whole-layers",
                action="store_true",
                help="pack the feed-forward halves too, for paddle.incubate.nn.FusedTransformerEncoderLayer",
            )
        command.add_argument(
            "--layout",
            choices=LAYOUTS,
            help="how linear layers store their weights (default: as shapes in the layer and the kind of file tell"
            + (")" if name == "convert" else ", or as they did before convert)"),
        )
        command.add_argument(
            "--names", metavar="PATTERN", default="*", help="which blocks, as in 'encoder.layers.*' (default: all)"
        )
        command.add_argument("--force", action="store_true", help="replace OUT if it exists")
    text = "what is installed, what runs here and why, for a bug report"
    command = commands.add_parser("info", help=text, description=f"Prints {text}.")
    command.add_argument(
        "--head-dim",
        metavar="D",
        type=_head_dim_argument,
        default=64,
        help="the numbers of one head of the attention whose kernels are told (default: 64)",
    )
    command.add_argument("--dtype", choices=tuple(ELEMENTS), help="its dtype (default: each)")
    command.add_argument(
        "--device", type=_device_argument, help="cpu, gpu or gpu:N (default: the CPU and each kind of GPU)"
    )
    return parser


class _ProgressBar:
    """A progress bar on stderr, if that is a terminal."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._shown = sys.stderr is not None and sys.stderr.isatty()
        self._open = False

    def __call__(self, done: int, total: int) -> None:
        if not self._shown:
            return
        filled = 30 * done // total if total else 30
        sys.stderr.write(f"\r{self._title} [{'#' * filled}{'.' * (30 - filled)}] {done}/{total}")
        if done == total:
            sys.stderr.write("\n")
        sys.stderr.flush()
        self._open = done < total

    def close(self) -> None:
        """Ends the line of a bar that is not full."""
        if self._open:
            sys.stderr.write("\n")


def _print(text: str, file: TextIO) -> None:
    """Prints one line."""
    text = one_line(text)
    encoding = getattr(file, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=file)


def _print_report(lines: Iterable[str], unprinted: str) -> None:
    """Prints a report; `unprinted` says what it means where that fails."""
    try:
        for line in lines:
            _print(line, sys.stdout)
        print(end="", flush=True)
    except OSError as error:
        # Python writes the rest when it ends, and would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise CheckpointError(f"{unprinted}: {error.strerror}") from None


def _one_or_by_pattern(numbers: list[tuple[str | None, int]]) -> int | dict[str, int]:
    """The number of heads that was given without a pattern, or a dict by pattern."""
    if len(numbers) == 1 and numbers[0][0] is None:
        return numbers[0][1]
    by_pattern: dict[str, int] = {}
    for pattern, number in numbers:
        if pattern is None:
            raise CheckpointError(
                "--num-heads: expected it once, or each time with a pattern, of which '*' fits the rest"
            )
        if by_pattern.setdefault(pattern, number) != number:
            raise CheckpointError(f"--num-heads: expected one number for {pattern!r}, got two that differ")
    return by_pattern


def _config_beside(source: Path) -> dict[str, Any] | None:
    """The content of the config.json beside the checkpoint of a model, if there is one."""
    path = source.parent / "config.json"
    try:
        config = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def _without_needless_layout(target: Path, metadata: dict[str, str]) -> dict[str, str] | None:
    """The metadata without the layout, if the target's format tells the same."""
    told = "in-out" if target.suffix == ".pdparams" else {"pt": "out-in"}.get(metadata.get("format", ""))
    if told is not None and metadata.get(checkpoint.METADATA_LAYOUT) == told:
        metadata = {key: value for key, value in metadata.items() if key != checkpoint.METADATA_LAYOUT}
    return metadata or None


def _run(arguments: argparse.Namespace, progress: _ProgressBar) -> None:
    source, target = arguments.input, arguments.output
    checkpoint_files.check_target(target, replace=arguments.force)
    if arguments.command == "convert":
        num_heads = _one_or_by_pattern(arguments.num_heads)
    read = checkpoint_files.read(source)
    options: dict[str, Any] = {
        "names": arguments.names,
        "progress": progress,
        "layout": arguments.layout,
        "metadata": read.metadata,
    }
    if arguments.command == "convert":
        arrays, report = checkpoint.pack(
            read.arrays,
            num_heads,
            normalize_before=arguments.normalize_before,
            file_layout=read.layout,
            config=_config_beside(source),
            whole_layers=arguments.whole_layers,
            **options,
        )
    else:
        arrays, report = checkpoint.unpack(read.arrays, **options)
    metadata = _without_needless_layout(target, report.metadata)
    checkpoint_files.write(target, checkpoint_files.Checkpoint(arrays, metadata), replace=arguments.force)
    done = "packed" if arguments.command == "convert" else "unpacked"
    unchanged = sum(1 for name in arrays if name in read.arrays)
    counts = f"{len(report.converted)} blocks {done}, {len(report.left_alone)} left alone, {unchanged} values unchanged"
    blocks = [f"{name}: {what}" for name, what in report.converted.items()]
    _print_report(
        [*blocks, *report.lines_of_left_alone(), f"{target}: {counts}"], "the file is written, but its report can't be"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status: 0, 1 after an error, 130 after an interrupt."""
    parsed = _parser().parse_args(arguments)
    paddle.set_device("cpu")
    progress = _ProgressBar(parsed.command)
    try:
        if parsed.command == "info":
            report = list(environment_report(parsed.head_dim, parsed.dtype, parsed.device))
            _print_report(report, "the report can't be printed")
        else:
            _run(parsed, progress)
    except CheckpointError as error:
        progress.close()
        advice = "; --force replaces it" if isinstance(error, checkpoint_files.TargetExists) else ""
        _print(f"error: {error}{advice}", sys.stderr)
        return 1
    except MemoryError:
        progress.close()
        _print("error: not enough memory", sys.stderr)
        return 1
    except KeyboardInterrupt:
        progress.close()
        _print("interrupted", sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Paddle's handler prints a trace of C++
    sys.exit(main())
