"""Checkpoints and the command, each with a valid call and the kinds of its arguments."""

import contextlib
import io
import tempfile
from pathlib import Path

import numpy as np
import paddle
from bad_values import Choice, Exactly, Given, Integer, Variant
from call_kinds import E, F, H, Target, flag
from paddle_fused_attention import checkpoint, checkpoint_files
from paddle_fused_attention.__main__ import main


def state_of_attention():
    """Arrays of an attention in a layer as paddle.nn.TransformerEncoderLayer has them."""
    state = paddle.nn.TransformerEncoderLayer(E, H, F).state_dict()
    return {f"encoder.layers.0.{name}": tensor.numpy() for name, tensor in state.items()}


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def command(kind):
    """The command line on a checkpoint in a folder of its own; `{}` in an argument stands for that folder."""

    def run(**options):
        with folder() as path:
            arrays = state_of_attention()
            if kind == "revert":
                arrays = checkpoint.pack(arrays, H)[0]
            checkpoint_files.write(path / "in.safetensors", checkpoint_files.Checkpoint(arrays))
            (path / "taken.safetensors").write_bytes(b"")
            (path / "empty.safetensors").write_bytes(b"")
            (path / "text.safetensors").write_text("text" * 100)
            (path / "text.bin").write_text("text" * 100)
            (path / "text.pdparams").write_text("text" * 100)
            (path / "list.index.json").write_text("[]")
            (path / "folder.safetensors").mkdir()
            arguments = [kind]
            for name, value in options.items():
                if name in ("input", "output"):
                    arguments.append(value.replace("{}", str(path)))
                elif value is True:
                    arguments.append(_option(name))
                elif value not in (None, False):
                    arguments += [_option(name), value]
            _run_main(arguments, path)
            return sorted(checkpoint_files.read(Path(options["output"].replace("{}", str(path)))).arrays.items())

    return run


def info(**options):
    """What `info` says of the attention, without the lines on what is installed here."""
    given = {name: value for name, value in options.items() if value is not None}
    lines = _run_main(
        ["info", *(word for name, value in given.items() for word in (_option(name), value))]
    ).splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith("attention on ")) :]


def _option(name):
    return "--" + name.replace("_", "-")


def _run_main(arguments, path=None):
    """What the command prints; raises ValueError of an error's last line, in which `{}` stands for the path."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        try:
            status = main(arguments)
        except SystemExit as end:
            status = end.code
    if status:
        lines = err.getvalue().strip().splitlines()
        raise ValueError(lines[-1].replace(str(path), "{}") if lines else f"no message, status {status}")
    return out.getvalue()


def text(default, bad=(), good=()):
    found = [Variant(repr(value)[:60], lambda _, v=value: v) for value in bad]
    return Given(lambda: default, [*found, *(Variant(repr(v), lambda _, v=v: v, lambda valid: valid) for v in good)])


_folder = tempfile.TemporaryDirectory()


def _stored():
    path = Path(_folder.name) / "state.pdparams"
    paddle.save({"a": paddle.zeros([2])}, str(path))
    return path


FILES = {
    "input": text(
        "{}/in.safetensors",
        [
            *("", "{}", "{}/missing.safetensors", "{}/empty.safetensors", "{}/text.safetensors", "{}/text.bin"),
            *("{}/text.pdparams", "{}/list.index.json", "{}/folder.safetensors", "{}/a\0b.safetensors", "{}/in.txt"),
            *("{}/" + "x" * 300 + ".safetensors", "{}/in.safetensors/in.safetensors", "/dev/null", "-", "{}/a\nb.bin"),
        ],
    ),
    "output": text(
        "{}/out.safetensors",
        [
            *("", "{}", "{}/taken.safetensors", "{}/out.txt", "{}/missing/out.safetensors", "{}/folder.safetensors"),
            *("{}/a\0b.safetensors", "{}/" + "x" * 300 + ".safetensors", "{}/in.safetensors/out.safetensors", "-"),
        ],
    ),
}
OPTIONS = {
    "layout": text(None, ["", "in", "OUT-IN", "out-in "], ["in-out"]),
    "names": text(None, ["", "text", "[", "*\n*", "encoder"], ["*", "encoder.layers.*"]),
}
NO_COUNTS = ("", "0", "-1", "1.5", "nan", "text", "9" * 400, "9" * 5000, "4 5", "0x4")
NUMBERS_OF_HEADS = (*NO_COUNTS, "5", "=", "=4", "a=b", "text=4")
FILE_NAMES = {"input": ("{}", "IN", "-", "/dev/null"), "output": ("{}", "OUT", "-")}
# What an error says of a file, behind its name.
FILE_ENDS = ("expected a name that ends", "no such file", "File name too long")
NO_ATTENTION = [Variant("dict", lambda _: {"a": 1}), Variant("empty dict", lambda _: {})]
NUL = [Variant("NUL", lambda _: "a\0.pdparams")]
CALLABLE = ("function", "class", "layer")
CHECKPOINTS = {
    "command convert": Target(
        command("convert"),
        {**FILES, "num_heads": text("4", NUMBERS_OF_HEADS, ["*=4", "encoder.*=4"]), **OPTIONS},
        called={**FILE_NAMES, "num_heads": ("--num-heads",), "layout": ("--layout",), "names": ("--names",)},
    ),
    "command revert": Target(
        command("revert"),
        {**FILES, **OPTIONS},
        called={**FILE_NAMES, "layout": ("--layout",), "names": ("--names",)},
    ),
    "command info": Target(
        info,
        {
            "head_dim": text("64", NO_COUNTS, ["064"]),
            "dtype": text("float32", ["", "int8", "float", "FLOAT32", "float32 ", "a\nb"]),
            "device": text("cpu", ["", "CPU", "cpu:1", "gpu:-1", "gpu:4096", "xpu", "gpu:" + "9" * 400, "a\0b"]),
        },
        called={"head_dim": ("--head-dim",), "dtype": ("--dtype",), "device": ("--device",)},
    ),
    "checkpoint.pack": Target(
        lambda **arguments: sorted(checkpoint.pack(**arguments)[0].items()),
        {
            "arrays": Exactly(state_of_attention, takes=("dict", "empty dict"), variants=NO_ATTENTION),
            "num_heads": Integer(H, bad=(5, 64)),
            "names": Choice("*", takes=("numpy str", "upper case")),
            "normalize_before": Exactly(lambda: None, [Variant("True", lambda _: True)], optional=True),
            "progress": Exactly(lambda: _no_progress, takes=CALLABLE),
            "layout": Choice("in-out", optional=True),
            "file_layout": Choice("in-out", optional=True),
            "metadata": Exactly(dict, optional=True, takes=("empty dict", "dict")),
            "config": Exactly(dict, optional=True, takes=("empty dict", "dict")),
            "whole_layers": Exactly(lambda: False, takes=("True", "numpy bool")),
        },
        called={
            "arrays": ("no attention",),
            "num_heads": ("--num-heads",),
            "normalize_before": ("--normalize-before", "--normalize-after"),
            "names": ("--names",),
            "layout": ("--layout",),
        },
    ),
    "checkpoint.unpack": Target(
        lambda **arguments: sorted(checkpoint.unpack(**arguments)[0].items()),
        {
            "arrays": Exactly(
                lambda: checkpoint.pack(state_of_attention(), H)[0], takes=("dict", "empty dict"), variants=NO_ATTENTION
            ),
            "names": Choice("*", takes=("numpy str", "upper case")),
            "progress": Exactly(lambda: _no_progress, takes=CALLABLE),
            "layout": Choice("in-out", optional=True),
            "metadata": Exactly(dict, optional=True, takes=("empty dict", "dict")),
        },
        called={"arrays": ("no packed attention",), "names": ("--names",), "layout": ("--layout",)},
    ),
    "checkpoint_files.read": Target(
        lambda path: checkpoint_files.read(path).arrays, {"path": Exactly(_stored, NUL)}, called={"path": FILE_ENDS}
    ),
    "checkpoint_files.load_state": Target(
        lambda path, return_numpy: checkpoint_files.load_state(path, return_numpy),
        {"path": Exactly(_stored, NUL), "return_numpy": flag(True)},
        called={"path": FILE_ENDS},
    ),
    "checkpoint_files.write": Target(
        checkpoint_files.write,
        {
            "path": Exactly(lambda: Path(_folder.name) / "target.pdparams", NUL),
            "checkpoint": Exactly(lambda: checkpoint_files.Checkpoint({"a": np.zeros(2)})),
        },
        called={"path": FILE_ENDS},
    ),
}


def _no_progress(done, total):
    """Shows nothing."""
