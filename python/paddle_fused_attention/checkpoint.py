"""Packs the attention of a checkpoint, a dict of arrays by name, for the fused layer, and unpacks it again, bit for bit.

A `Naming` says what a family of models calls the parts of an attention block and how it stores them. The packed names begin
with a word of their own in every family, so that they tell what to go back to. With Paddle's naming they are those of a model
after ``paddle_fused_attention.convert``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Callable, Iterator

import numpy as np

from .report import Report
from .weights import pack_qkv_bias, pack_qkv_weight, unpack_qkv_bias, unpack_qkv_weight


class CheckpointError(Exception):
    """What is wrong with a checkpoint or a request, in one line."""


@dataclass(frozen=True)
class Naming:
    """The names of an attention block's parts, without what comes before them in a checkpoint.

    `qkv`: three projections, or one whose columns are those of query, key and value in turn. `out_in`: weights are stored
    [out, in], else [in, out]. `normalize_before`: where the layer norm stands; None: the checkpoint can't tell. `unless`:
    where this is too, the block is another one.
    """

    title: str
    packed: str
    qkv: tuple[str, ...]
    out: str
    norm: str
    out_in: bool
    normalize_before: bool | None
    unless: str | None = None


NAMINGS = (
    Naming(
        "Paddle",
        "self_attn",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.out_proj",
        "norm1",
        out_in=False,
        normalize_before=None,
        unless="cross_attn.q_proj.weight",
    ),
    Naming(
        "Hugging Face BERT",
        "attention",
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention.output.dense",
        "attention.output.LayerNorm",
        out_in=True,
        normalize_before=False,
    ),
    Naming(
        "Hugging Face ViT",
        "attention",
        ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        "attention.output.dense",
        "layernorm_before",
        out_in=True,
        normalize_before=True,
    ),
    Naming("GPT-2", "attn", ("attn.c_attn",), "attn.c_proj", "ln_1", out_in=False, normalize_before=True),
)

# Names that look like attention, to be reported where no naming fits.
_ATTENTION = re.compile(r"^(.*?)\.?(?:q_proj|query|c_attn|in_proj|qkv|qkv_proj|q_lin)(?:\.|_)weight$")
_PACKED_PARTS = ("qkv_weight", "qkv_bias", "linear_weight", "linear_bias", "pre_ln_scale", "pre_ln_bias", "ln_scale", "ln_bias")

Progress = Callable[[int, int], Any]


def _no_progress(done: int, total: int) -> None:
    pass


def pack(
    arrays: dict[str, Any],
    num_heads: int,
    names: str = "*",
    normalize_before: bool = False,
    progress: Progress = _no_progress,
) -> tuple[dict[str, Any], Report]:
    """Packs every attention block of a known naming.

    Args:
        arrays: NumPy arrays by name; other values are passed on.
        num_heads: Of every block that is packed.
        names: A pattern, as of a shell, for the names of the blocks to pack, such as ``encoder.layers.*``.
        normalize_before: Where the layer norm stands, for namings that don't tell.
        progress: Called with the number of blocks that are done and their total.

    Returns:
        A new dict, in which the parts of a block stand where its first part stood, and what was done.

    Raises:
        CheckpointError: Nothing to pack was found, num_heads does not divide a width, or a packed name is taken.
    """
    report = Report()
    blocks = list(_blocks(arrays))
    replaced: dict[str, dict] = {}
    gone: set = set()
    for done, (prefix, naming) in enumerate(blocks):
        progress(done, len(blocks))
        block = prefix + naming.packed
        reason = _reason_against(arrays, prefix, naming)
        if not fnmatchcase(block, names):
            reason = f"it is not among the names {names!r}"
        if reason is not None:
            report.left_alone[block] = reason
            continue
        old, new = _pack_block(arrays, prefix, naming, num_heads, normalize_before)
        taken = sorted(name for name in new if name in arrays)
        if taken:
            raise CheckpointError(f"{taken[0]}: expected no packed parameter in a checkpoint that is to be packed, found one")
        replaced[old[0]] = new
        gone.update(old)
        report.converted[block] = naming.title
    progress(len(blocks), len(blocks))
    known = {f"{prefix}{part}.weight" for prefix, naming in blocks for part in naming.qkv}
    for name in arrays:
        match = _ATTENTION.match(name)
        if match and name not in known:
            report.left_alone.setdefault(match.group(1), "its names are not those of a known self-attention")
    if not report.converted:
        raise CheckpointError(_nothing("attention of a known naming", names, report))
    return _exchange(arrays, replaced, gone), report


def unpack(arrays: dict[str, Any], names: str = "*", progress: Progress = _no_progress) -> tuple[dict[str, Any], Report]:
    """The inverse of :func:`pack`, with the same arguments and results.

    Raises:
        CheckpointError: Nothing to unpack was found, or a block is not complete, or a separate name is taken.
    """
    report = Report()
    replaced: dict[str, dict] = {}
    gone: set = set()
    blocks = [name[: -len(".qkv_weight")] for name in arrays if name.endswith(".qkv_weight")]
    for done, block in enumerate(blocks):
        progress(done, len(blocks))
        naming = _naming_of_packed(arrays, block)
        if naming is None:
            report.left_alone[block] = "its names are not those of a packed attention"
        elif not fnmatchcase(block, names):
            report.left_alone[block] = f"it is not among the names {names!r}"
        else:
            old, new = _unpack_block(arrays, block, naming)
            taken = sorted(name for name in new if name in arrays)
            if taken:
                raise CheckpointError(f"{taken[0]}: expected no separate parameter beside {block}.qkv_weight, found one")
            replaced[old[0]] = new
            gone.update(old)
            report.converted[block] = naming.title
    progress(len(blocks), len(blocks))
    if not report.converted:
        raise CheckpointError(_nothing("packed attention", names, report))
    return _exchange(arrays, replaced, gone), report


def _nothing(what: str, names: str, report: Report) -> str:
    found = "; ".join(str(report).splitlines()[:3])
    return f"no {what} was found" + (f" among the names {names!r}" if names != "*" else "") + (f": {found}" if found else "")


def _exchange(arrays: dict[str, Any], replaced: dict[str, dict], gone: set) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in arrays.items():
        result.update(replaced.get(name, {}))
        if name not in gone:
            result[name] = value
    return result


def _blocks(arrays: dict[str, Any]) -> Iterator[tuple[str, Naming]]:
    for name in arrays:
        for naming in NAMINGS:
            anchor = naming.qkv[0] + ".weight"
            prefix = name[: -len(anchor)]
            if name.endswith(anchor) and (not prefix or prefix.endswith(".")):
                yield prefix, naming


def _parts(naming: Naming, suffix: str) -> list[str]:
    return [f"{part}.{suffix}" for part in (*naming.qkv, naming.out, naming.norm)]


def _reason_against(arrays: dict[str, Any], prefix: str, naming: Naming) -> str | None:
    """Why a block can't be packed; None if it can."""
    if naming.unless is not None and prefix + naming.unless in arrays:
        return f"it has {naming.unless} beside it, as in a decoder"
    needed = [*_parts(naming, "weight"), f"{naming.norm}.bias"]
    biases = [f"{part}.bias" for part in naming.qkv]
    if any(prefix + part in arrays for part in biases):
        needed += biases
    for part in needed:
        if not isinstance(arrays.get(prefix + part), np.ndarray):
            return f"{prefix}{part} is missing" if prefix + part not in arrays else f"{prefix}{part} is not an array of numbers"
    embed_dim = arrays[f"{prefix}{naming.norm}.weight"].size
    columns = embed_dim * 3 // len(naming.qkv)
    expected = {f"{naming.out}.weight": (embed_dim, embed_dim), f"{naming.out}.bias": (embed_dim,)}
    for part in naming.qkv:
        expected[f"{part}.weight"] = (columns, embed_dim) if naming.out_in else (embed_dim, columns)
        expected[f"{part}.bias"] = (columns,)
    expected[f"{naming.norm}.bias"] = expected[f"{naming.norm}.weight"] = (embed_dim,)
    for part, shape in expected.items():
        if prefix + part in arrays and arrays[prefix + part].shape != shape:
            return f"{prefix}{part} has shape {list(arrays[prefix + part].shape)}, not {list(shape)}"
    for suffix in ("weight", "bias"):
        if len({arrays[f"{prefix}{part}.{suffix}"].dtype for part in naming.qkv if f"{prefix}{part}.{suffix}" in arrays}) > 1:
            return f"its query, key and value {suffix} are of different dtypes"
    return None


def _pack_block(
    arrays: dict[str, Any], prefix: str, naming: Naming, num_heads: int, normalize_before: bool
) -> tuple[list[str], dict[str, Any]]:
    """The names that go and the arrays that come."""
    if naming.normalize_before is not None:
        normalize_before = naming.normalize_before
    get = arrays.get
    weights = [get(f"{prefix}{part}.weight") for part in naming.qkv]
    biases = [get(f"{prefix}{part}.bias") for part in naming.qkv]
    out = get(f"{prefix}{naming.out}.weight")
    if naming.out_in:
        weights, out = [weight.T for weight in weights], np.ascontiguousarray(out.T)
    if len(naming.qkv) == 1:
        weights = np.split(weights[0], 3, axis=1)
        biases = [None] if biases[0] is None else np.split(biases[0], 3)
    embed_dim = out.shape[0]
    if num_heads < 1 or embed_dim % num_heads:
        raise CheckpointError(
            f"--num-heads: expected a divisor of {embed_dim}, the width of {prefix}{naming.packed}, got {num_heads}"
        )
    norm = "pre_ln" if normalize_before else "ln"
    new = {
        "qkv_weight": pack_qkv_weight(*weights, num_heads),
        "qkv_bias": None if biases[0] is None else pack_qkv_bias(*biases, num_heads),
        "linear_weight": out,
        "linear_bias": get(f"{prefix}{naming.out}.bias"),
        f"{norm}_scale": get(f"{prefix}{naming.norm}.weight"),
        f"{norm}_bias": get(f"{prefix}{naming.norm}.bias"),
    }
    ours = {prefix + part for suffix in ("weight", "bias") for part in _parts(naming, suffix)}
    old = [name for name in arrays if name in ours]
    packed = {part: np.ascontiguousarray(array) for part, array in new.items() if array is not None}
    return old, {f"{prefix}{naming.packed}.{part}": array for part, array in packed.items()}


def _naming_of_packed(arrays: dict[str, Any], block: str) -> Naming | None:
    for naming in NAMINGS:
        if block.split(".")[-1] == naming.packed:
            for normalize_before in (True, False) if naming.normalize_before is None else (naming.normalize_before,):
                if f"{block}.{'pre_ln' if normalize_before else 'ln'}_scale" in arrays:
                    return naming
    return None


def _unpack_block(arrays: dict[str, Any], block: str, naming: Naming) -> tuple[list[str], dict[str, Any]]:
    parts = {part: arrays[f"{block}.{part}"] for part in _PACKED_PARTS if f"{block}.{part}" in arrays}
    norm = "pre_ln" if "pre_ln_scale" in parts else "ln"
    for part in ("qkv_weight", "linear_weight", f"{norm}_bias"):
        if not isinstance(parts.get(part), np.ndarray):
            raise CheckpointError(f"{block}.{part}: expected an array beside {block}.qkv_weight, found none")
    try:
        weights = list(unpack_qkv_weight(parts["qkv_weight"]))
        biases = list(unpack_qkv_bias(parts["qkv_bias"])) if "qkv_bias" in parts else []
    except ValueError as error:
        raise CheckpointError(f"{block}: {error}") from None
    out = parts["linear_weight"]
    if naming.out_in:
        weights, out = [weight.T for weight in weights], out.T
    if len(naming.qkv) == 1:
        weights = [np.concatenate(weights, axis=1)]
        biases = [np.concatenate(biases)] if biases else []
    new: dict[str, Any] = {}
    for i, part in enumerate(naming.qkv):
        new[f"{part}.weight"] = weights[i]
        if biases:
            new[f"{part}.bias"] = biases[i]
    new[f"{naming.out}.weight"] = out
    if "linear_bias" in parts:
        new[f"{naming.out}.bias"] = parts["linear_bias"]
    new[f"{naming.norm}.weight"] = parts[f"{norm}_scale"]
    new[f"{naming.norm}.bias"] = parts[f"{norm}_bias"]
    prefix = block[: -len(naming.packed)]
    ours = {f"{block}.{part}" for part in parts}
    old = [name for name in arrays if name in ours]
    return old, {prefix + name: np.ascontiguousarray(array) for name, array in new.items()}
