"""Random models of Paddle's layers, converted and back, and their checkpoints, packed and back.

    make fuzz-models [FUZZ_MODELS="--cases 5000 --seed 7"]
    make fuzz-models FUZZ_MODELS="--seed 7 --case 1234"     # one case again

A case is a function of the seed and its number alone. Of a converted model the result and every gradient are those of
the model before; its separate state dict, and what `revert` gives, have the same bits. `unpack` gives back names,
layouts and bits of a checkpoint that was packed, in either kind of file.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
import traceback
from typing import NamedTuple, Tuple

import common
import numpy as np
import paddle
from paddle import nn
from paddle_fused_attention import checkpoint, checkpoint_files, convert, revert, separate_state_dict

ACTIVATIONS = ("relu", "gelu", "silu", "tanh")  # the last is none of the operator's
PREFIXES = ("", "model.", "bert.encoder.", "a.b.c.", "layers.", "7.")
SUFFIXES = (".pdparams", ".safetensors")


class Drawn(NamedTuple):
    kind: str  # "encoder", "decoder", "transformer" or "attention"
    num_heads: int
    head_dim: int
    hidden: int
    layers: int
    activation: str
    normalize_before: bool
    bias: object  # bias_attr
    final_norm: bool
    batch: int
    lengths: Tuple[int, int]  # of the sequence, and of the memory
    mask: str  # "none", "bool", "int64", "int32" or "float"
    mask_shape: int  # 2, 3 or 4 dimensions that are no 1
    dtype: str
    training: bool
    prefix: str  # of names in a checkpoint
    out_in: bool  # how the checkpoint stores its weights
    suffix: str
    stored: str  # the dtype of the checkpoint
    seed: int

    @property
    def embed_dim(self):
        return self.num_heads * self.head_dim


def draw(seed, number):
    rng = np.random.default_rng([seed, number])
    choose = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    kind = choose("encoder", "encoder", "decoder", "transformer", "attention")
    biases = {"encoder": 2, "decoder": 3}.get(kind, 1)  # a list has one for each part
    return Drawn(
        kind=kind,
        num_heads=choose(1, 2, 3, 4, 6),
        head_dim=choose(1, 2, 5, 8, 16, 33),
        hidden=choose(1, 7, 16, 40),
        layers=choose(1, 1, 2, 3),
        activation=choose(*ACTIVATIONS),
        normalize_before=bool(choose(0, 1)),
        bias=choose(None, None, False, [bool(b) or None for b in rng.integers(0, 2, biases)] if biases > 1 else False),
        final_norm=bool(choose(0, 1)),
        batch=choose(1, 2, 3),
        lengths=(choose(1, 2, 5, 9), choose(1, 3, 8)),
        mask=choose("none", "bool", "int64", "int32", "float"),
        mask_shape=choose(2, 3, 4),
        dtype=choose("float32", "float64"),
        training=bool(choose(0, 1)),
        prefix=choose(*PREFIXES),
        out_in=bool(choose(0, 1)),
        suffix=choose(*SUFFIXES),
        stored=choose("float32", "float64", "float16", "bfloat16"),
        seed=int(rng.integers(1 << 30)),
    )


def bias_attr(drawn):
    if isinstance(drawn.bias, list):
        return [None if has else False for has in drawn.bias]
    return drawn.bias


def make_model(drawn):
    """Without dropout, whose masks are ours and Paddle's, and with parameters that are all other than at first."""
    paddle.seed(drawn.seed)
    e, h, f = drawn.embed_dim, drawn.num_heads, drawn.hidden
    options = dict(normalize_before=drawn.normalize_before, bias_attr=bias_attr(drawn))
    norm = nn.LayerNorm(e) if drawn.final_norm else None
    if drawn.kind == "attention":
        model = nn.MultiHeadAttention(e, h, bias_attr=bias_attr(drawn))
    elif drawn.kind == "encoder":
        model = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(e, h, f, 0.0, drawn.activation, **options), drawn.layers, norm
        )
    elif drawn.kind == "decoder":
        model = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(e, h, f, 0.0, drawn.activation, **options), drawn.layers, norm
        )
    else:
        model = nn.Transformer(e, h, drawn.layers, drawn.layers, f, 0.0, drawn.activation, **options)
    rng = np.random.default_rng(drawn.seed)
    for p in model.parameters():
        p.set_value(p.numpy() + 0.2 * rng.standard_normal(p.shape).astype(p.numpy().dtype))
    for layer in model.sublayers():
        if isinstance(layer, nn.LayerNorm):
            layer._epsilon = 2.0**-17  # Paddle rounds it to float32
    if drawn.training:
        model.train()
    else:
        model.eval()
    return model


def make_inputs(drawn):
    """The arguments of the model's call; a mask is that of the self-attention of what is computed."""
    rng = np.random.default_rng(drawn.seed + 1)
    target, memory = (
        paddle.to_tensor(rng.standard_normal((drawn.batch, n, drawn.embed_dim)).astype(drawn.dtype))
        for n in drawn.lengths
    )
    n = drawn.lengths[0]
    shape = [drawn.batch, drawn.num_heads, n, n]
    shape = [1] * (4 - drawn.mask_shape) + shape[4 - drawn.mask_shape :]
    keep = rng.random(shape) < 0.7
    keep[..., 0] = True
    mask = None
    if drawn.mask == "float":
        mask = paddle.to_tensor(np.where(keep, rng.standard_normal(shape), -1e4).astype(drawn.dtype))
    elif drawn.mask != "none":
        mask = paddle.to_tensor(keep.astype(drawn.mask))
    if drawn.kind == "attention":
        return [target, target, target, mask]
    if drawn.kind == "encoder":
        return [target, mask]
    if drawn.kind == "decoder":
        return [target, memory, mask]
    return [memory, target, None, mask]


def results(model, inputs):
    """The result and the gradients of the inputs and of all parameters, by name."""
    leaves = [t.detach() if t is not None and "float" in str(t.dtype) and t.ndim == 3 else t for t in inputs]
    of_inputs = {id(t): t for t in leaves if t is not None and t.ndim == 3}
    for leaf in of_inputs.values():
        leaf.stop_gradient = False
    out = model(*leaves)
    model.clear_gradients()
    out.backward(paddle.to_tensor(np.random.default_rng(9).standard_normal(out.shape).astype(out.numpy().dtype)))
    found = {"out": out.numpy()}
    found.update({f"input {i}": leaf.grad.numpy() for i, leaf in enumerate(of_inputs.values())})
    found.update({name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None})
    return found


def separate(found):
    """Gradients of packed parameters by the names of separate ones."""
    result = {}
    for name, gradient in found.items():
        prefix, _, part = name.rpartition(".")
        prefix += "." if prefix else ""
        if part not in ("qkv_weight", "qkv_bias"):
            result[name] = gradient
            continue
        for letter, piece in zip("qkv", gradient):
            columns = piece.reshape(-1, piece.shape[-1]).T if part == "qkv_weight" else piece.reshape(-1)
            result[f"{prefix}{letter}_proj.{part[4:]}"] = columns
    return result


def same_bits(what, actual, expected):
    """Lines on dicts of arrays that are not the same."""
    if sorted(actual) != sorted(expected):
        return [f"{what}: names {sorted(set(actual) ^ set(expected))} are in one only"]
    return [
        f"{what}: {name} differs"
        for name, array in expected.items()
        if actual[name].dtype != array.dtype
        or actual[name].shape != array.shape
        or actual[name].tobytes() != array.tobytes()
    ]


def state_of(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def exact_results(drawn, state):
    """Those of the model in float64, or None where that is what it computes in."""
    if drawn.dtype == "float64":
        return None
    drawn64 = drawn._replace(dtype="float64")
    with default_dtype("float64"):
        model = make_model(drawn64)
        model.set_state_dict({name: paddle.to_tensor(array.astype("float64")) for name, array in state.items()})
        inputs = [
            paddle.to_tensor(t.numpy().astype("float64")) if t is not None and t.dtype == paddle.float32 else t
            for t in make_inputs(drawn)
        ]
        return results(model, inputs)


def differing(actual, expected, exact, dtype):
    """Lines on results that are further apart than rounding explains: gradients by the largest number of all, for those
    of a layer norm of few numbers, or of a query that sees one key, are what is left of sums that cancel. In float32
    three times Paddle's own error is let pass."""
    if sorted(actual) != sorted(expected):
        return [f"gradients of {sorted(set(actual) ^ set(expected))} are in one only"]
    exact = exact or expected
    largest = max(abs(array).max() for array in exact.values())
    lines = []
    for name, array in exact.items():
        error, own = (abs(found[name].astype(np.float64) - array).max() for found in (actual, expected))
        allowed = max(common.TOLERANCE[dtype] * (abs(array).max() if name == "out" else largest), 3 * own)
        if not error <= allowed:
            lines.append(f"{name}: error {error:.3g} at scale {abs(array).max():.3g}, allowed {allowed:.3g}")
    return lines


@contextlib.contextmanager
def default_dtype(dtype):
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        yield
    finally:
        paddle.set_default_dtype(before)


def check_conversion(drawn):
    model, inputs = make_model(drawn), make_inputs(drawn)
    state, expected = state_of(model), results(model, inputs)
    model, report = convert(model, return_report=True)
    if not report.converted:
        return [f"nothing was converted: {report}"]
    lines = differing(separate(results(model, inputs)), expected, exact_results(drawn, state), drawn.dtype)
    apart = {name: value.numpy() for name, value in separate_state_dict(model).items()}
    lines += same_bits("separate_state_dict", apart, state)
    model.set_state_dict({name: paddle.to_tensor(array) for name, array in state.items()})
    apart = {name: value.numpy() for name, value in separate_state_dict(model).items()}
    lines += same_bits("a separate state that was loaded", apart, state)
    model = revert(model)
    lines += same_bits("revert", state_of(model), state)
    return lines + same_bits("after revert", results(model, inputs), expected)


def stored_state(drawn):
    """The state of an encoder as a checkpoint has it."""
    state = {drawn.prefix + name: array for name, array in state_of(make_model(drawn)).items()}
    if drawn.stored == "bfloat16":
        stored = {
            name: (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for name, array in state.items()
        }
    else:
        stored = {name: array.astype(drawn.stored) for name, array in state.items()}
    if drawn.out_in:
        stored = {name: np.ascontiguousarray(a.T) if a.ndim == 2 else a for name, a in stored.items()}
    return stored


def check_checkpoint(drawn):
    """Of an encoder, whose names are Paddle's."""
    drawn = drawn._replace(kind="encoder", bias=None if isinstance(drawn.bias, list) else drawn.bias)
    state = stored_state(drawn)
    layout = "out-in" if drawn.out_in else "in-out"
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "state" + drawn.suffix)
        checkpoint_files.write(path, checkpoint_files.Checkpoint(state))
        read = checkpoint_files.read(path)
        lines = same_bits("what was read", read.arrays, state)
        packed, report = checkpoint.pack(read.arrays, drawn.num_heads, layout=layout, metadata=read.metadata)
        if len(report.converted) != drawn.layers:
            return [*lines, f"packed {sorted(report.converted)} of {drawn.layers}: {report}"]
        checkpoint_files.write(path, checkpoint_files.Checkpoint(packed, report.metadata))
        read = checkpoint_files.read(path)
        back, _ = checkpoint.unpack(read.arrays, metadata=read.metadata)
    return lines + same_bits("unpack", back, state)


def check(seed, number):
    """What is wrong with a case, a line each. An exception is wrong too."""
    drawn = draw(seed, number)
    try:
        with default_dtype(drawn.dtype):
            found = [*check_conversion(drawn), *check_checkpoint(drawn)]
    except Exception:
        found = traceback.format_exc().splitlines()
    return [str(drawn), *found] if found else []


def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], prog="unittests/fuzz/models.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=2000, help="how many")
    parser.add_argument("--case", type=int, help="the number of one case, in place of --cases")
    arguments = parser.parse_args(given)
    numbers = range(arguments.cases) if arguments.case is None else [arguments.case]
    start, failed = time.monotonic(), 0
    for number in numbers:
        wrong = check(arguments.seed, number)
        if wrong:
            failed += 1
            print(
                f'make fuzz-models FUZZ_MODELS="--seed {arguments.seed} --case {number}"',
                *wrong,
                sep="\n  ",
                flush=True,
            )
    print(f"{len(numbers)} models in {time.monotonic() - start:.0f} s: {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
