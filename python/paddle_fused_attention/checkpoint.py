"""Packs the attention of a checkpoint, a dict of arrays by name, for the fused layer, and unpacks it again, bit for
bit.

A block is packed if its `Naming` and all that names, shapes and metadata tell say that the operator computes it. What
the checkpoint can't tell (heads, at times the norm's place and the layout of weights) is asked for. The packed names
begin with a word of their own in every family. The metadata of the arrays keep what packing loses, the old layout and
names; without them a block gets its family's usual ones. With Paddle's naming only query, key and value are packed,
under the names of a model after ``paddle_fused_attention.convert``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Callable

import numpy as np

from ._choices import CheckpointError, check_layout, check_patterns, heads_of, layout_of, orders_of, shown_layout
from ._namings import (
    LAYOUTS,
    NAMINGS,
    NORM_NAMES,
    PACKED_PARTS,
    NamedBlock,
    Signs,
    blocks_in,
    layout_by_shapes,
    names_of_norm,
    naming_of_packed,
    packed_blocks_in,
    reason_against,
)
from .report import Report
from .weights import QKV_PARAMETERS, pack_projections, separate_projections

METADATA = "paddle_fused_attention."  # keys that begin so are ours
METADATA_LAYOUT = METADATA + "layout"  # of the file's linear layers, if its format says otherwise
METADATA_BLOCKS = METADATA + "blocks"  # JSON: what each packed block was

# Names that look like attention, to be reported where no naming fits.
_LIKE_ATTENTION = re.compile(r"^(.*?)\.?(?:q_proj|query|c_attn|in_proj|qkv|qkv_proj|q_lin)(?:\.|_)weight$")

# Models with Paddle's names whose layers are not Paddle's own.
_CAUSAL_MODELS = frozenset(("artist", "gpt", "opt"))

Progress = Callable[[int, int], Any]


@dataclass
class CheckpointReport(Report):
    """``metadata``: what belongs to the new arrays, in a file's metadata or as the argument of :func:`unpack`."""

    metadata: dict[str, str] = field(default_factory=dict)


def _no_progress(done: int, total: int) -> None:
    pass


def pack(
    arrays: dict[Any, Any],
    num_heads: int | Mapping[str, int],
    names: str = "*",
    normalize_before: bool | None = None,
    progress: Progress = _no_progress,
    *,
    layout: str | None = None,
    file_layout: str | None = None,
    metadata: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> tuple[dict[Any, Any], CheckpointReport]:
    """Packs every attention block of a known naming.

    Args:
        arrays: NumPy arrays by name, bfloat16 as uint16; other values, and those of other keys, are passed on.
        num_heads: One number for all blocks that are packed, which must be of one width, or numbers by a shell's
            patterns for the names of blocks, of which the first that fits holds.
        names: A pattern for the names of the blocks to pack, such as ``encoder.layers.*``.
        normalize_before: Where the layer norm stands, for blocks that are packed with it and whose names don't tell.
            They must be of one stack of layers.
        progress: Called with the number of blocks that are done and their total.
        layout: How linear layers store their weights, ``"in-out"`` or ``"out-in"``; None: as the shapes in a layer
            tell, else ``file_layout``.
        file_layout: The layout that the arrays' file tells, if it does.
        metadata: Of the arrays' file.
        config: The content of the model's config.json, such as its ``model_type``.

    Returns:
        A new dict, in which the parts of a block stand where its first part stood, and what was done.

    Raises:
        CheckpointError: Nothing to pack was found, an argument is missing, does not fit a block or is not asked for,
            the signs of the layout contradict each other, or a packed name is taken.
    """
    check_layout("layout", layout)
    check_layout("file_layout", file_layout)
    records = _block_records(metadata)
    report = CheckpointReport()
    found = blocks_in(arrays)
    signs = Signs(arrays, config or {})
    chosen: list[NamedBlock] = []
    for block in found:
        reason = reason_against(arrays, block, signs)
        if not fnmatchcase(block.name, names):
            reason = f"it is not among the names {names!r}"
        if reason is None:
            chosen.append(block)
        else:
            report.left_alone[block.name] = reason
    separate = {block.name for block in found}
    for name in packed_blocks_in(arrays):
        if name not in separate and naming_of_packed(arrays, name) is not None:
            report.left_alone[name] = "packed already"
    known = {f"{block.prefix}{part}.weight" for block in found for part in block.naming.qkv}
    for name in arrays:
        match = _LIKE_ATTENTION.match(name) if isinstance(name, str) else None
        if match and name not in known:
            report.left_alone.setdefault(match.group(1), "its names are not those of a known self-attention")
    if not chosen:
        raise CheckpointError(_nothing_found("attention of a known naming", names, report))
    check_patterns(num_heads, [*report.left_alone, *(block.name for block in chosen)])
    heads = heads_of(num_heads, arrays, chosen)
    orders = orders_of(normalize_before, chosen, signs)
    layouts = [layout_of(arrays, block, layout, file_layout) for block in chosen]
    replacements: dict[str, dict] = {}
    removed: set = set()
    for done, (block, stored) in enumerate(zip(chosen, layouts)):
        progress(done, len(chosen))
        old, new = _pack_block(arrays, block, heads[block.name], orders.get(block.name), stored)
        taken = sorted(name for name in new if name in arrays)
        if taken:
            raise CheckpointError(
                f"{taken[0]}: expected no packed parameter in a checkpoint that is to be packed, found one"
            )
        replacements[old[0]] = new
        removed.update(old)
        report.converted[block.name] = _describe(block, new, orders.get(block.name), stored)
        norm = names_of_norm(arrays, block) or NORM_NAMES[0]
        records[block.name] = {"naming": block.naming.title, "layout": stored, "norm": norm}
    progress(len(chosen), len(chosen))
    result = _with_replacements(arrays, replacements, removed)
    linear = {stored for block, stored in zip(chosen, layouts) if not block.naming.fixed_layout}
    file_layout = layout or file_layout or (linear.pop() if len(linear) == 1 else None)
    report.metadata = _metadata(metadata, records, result, file_layout)
    return result, report


def unpack(
    arrays: dict[Any, Any],
    names: str = "*",
    progress: Progress = _no_progress,
    *,
    layout: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> tuple[dict[Any, Any], CheckpointReport]:
    """The inverse of :func:`pack`, with results of the same kinds, also for state dicts of models and for what earlier
    versions packed.

    Args:
        arrays, names, progress: As of :func:`pack`.
        layout: How the weights were stored before, if the metadata don't tell; None: as the family stores them.
        metadata: Those of the report of :func:`pack`. Without them, as in the state dict of a model, weights come out
            as the family stores them and a layer norm's parameters as weight and bias.

    Raises:
        CheckpointError: Nothing to unpack was found, a block is not complete, a separate name is taken, the metadata
            are broken, or `layout` does not fit them or the shapes in a layer.
    """
    check_layout("layout", layout)
    records = _block_records(metadata)
    report = CheckpointReport()
    replacements: dict[str, dict] = {}
    removed: set = set()
    blocks = packed_blocks_in(arrays)
    for done, name in enumerate(blocks):
        progress(done, len(blocks))
        naming = naming_of_packed(arrays, name)
        if naming is None:
            report.left_alone[name] = "its names are not those of a packed attention"
        elif not fnmatchcase(name, names):
            report.left_alone[name] = f"it is not among the names {names!r}"
        else:
            block = NamedBlock(name[: len(name) - len(naming.packed)], naming)
            parts = _packed_parts(arrays, block)
            stored, norm_names = _layout_and_norm_before(arrays, block, layout, records.pop(name, None))
            old, new = _unpack_block(arrays, block, parts, stored, norm_names)
            taken = sorted(name for name in new if name in arrays)
            if taken:
                raise CheckpointError(f"{taken[0]}: expected no separate parameter beside {name}.qkv_weight, found one")
            replacements[old[0]] = new
            removed.update(old)
            report.converted[name] = f"{naming.title}, weights {shown_layout(stored)}"
    progress(len(blocks), len(blocks))
    if not report.converted:
        raise CheckpointError(_nothing_found("packed attention", names, report))
    result = _with_replacements(arrays, replacements, removed)
    report.metadata = _metadata(metadata, records, result, None)
    return result, report


def _nothing_found(what: str, names: str, report: Report) -> str:
    left = report.lines_of_left_alone()
    more = f"; and {len(left) - 3} more" if len(left) > 3 else ""
    found = ": " + "; ".join(left[:3]) + more if left else ""
    return f"no {what} was found" + (f" among the names {names!r}" if names != "*" else "") + found


def _with_replacements(arrays: dict[Any, Any], replacements: dict[str, dict], removed: set) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for name, value in arrays.items():
        result.update(replacements.get(name, {}))
        if name not in removed:
            result[name] = value
    return result


def _block_records(metadata: Mapping[str, str] | None) -> dict[str, dict]:
    """What packed blocks were before, by name, out of the metadata."""
    text = (metadata or {}).get(METADATA_BLOCKS)
    if text is None:
        return {}
    titles = {naming.title for naming in NAMINGS}
    try:
        records = json.loads(text)
        for record in records.values():
            if (
                record["naming"] not in titles
                or record["layout"] not in LAYOUTS
                or tuple(record["norm"]) not in NORM_NAMES
            ):
                raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise CheckpointError(
            f"metadata {METADATA_BLOCKS}: expected JSON as convert writes it, found something else"
        ) from None
    return records


def _metadata(
    old: Mapping[str, str] | None, records: dict[str, dict], arrays: dict, layout: str | None
) -> dict[str, str]:
    new = {key: value for key, value in (old or {}).items() if key != METADATA_BLOCKS}
    packed = set(packed_blocks_in(arrays))
    records = {name: record for name, record in records.items() if name in packed}
    if records:
        new[METADATA_BLOCKS] = json.dumps(records, separators=(",", ":"))
    if layout is not None:
        new[METADATA_LAYOUT] = layout
    return new


def _layout_and_norm_before(
    arrays: dict, block: NamedBlock, layout: str | None, record: dict | None
) -> tuple[str, tuple[str, str]]:
    """The layout and the norm's names that a packed block had."""
    if record is not None:
        if record["naming"] != block.naming.title:
            raise CheckpointError(
                f"{block.name}: expected {record['naming']}'s, by the file's metadata, found {block.naming.title}'s"
            )
        if layout not in (None, record["layout"]):
            raise CheckpointError(
                f"--layout {layout}: {block.name} was stored {shown_layout(record['layout'])}, by the file's metadata"
            )
        return record["layout"], tuple(record["norm"])
    found = layout or block.naming.layout
    for name, told in layout_by_shapes(arrays, block, arrays[f"{block.name}.qkv_weight"].shape[-1]).items():
        if told != found:
            seen = f"by its shape {name} is stored {shown_layout(told)}"
            if layout is not None:
                raise CheckpointError(f"--layout {layout}: {seen}")
            raise CheckpointError(
                f"{block.name}: {block.naming.title}'s weights are stored {shown_layout(found)}, but {seen}: --layout "
                "is needed"
            )
    return found, NORM_NAMES[0]


def _pack_block(
    arrays: dict[Any, Any], block: NamedBlock, num_heads: int, normalize_before: bool | None, layout: str
) -> tuple[list[str], dict[str, Any]]:
    """The names to remove and the arrays to add; `normalize_before` is None if the layer norm stays."""
    prefix, naming = block.prefix, block.naming
    *weights, out = (arrays[name] for name in block.names("weight"))
    *biases, out_bias = (arrays.get(name) for name in block.names("bias"))
    if layout == "out-in":
        weights, out = [weight.T for weight in weights], out.T
    new = {
        "qkv_weight": pack_projections(weights, num_heads),
        "qkv_bias": None if biases[0] is None else pack_projections(biases, num_heads),
    }
    if naming.only_qkv:
        ours = {*block.names("weight")[:-1], *block.names("bias")[:-1]}
    else:
        norm = "pre_ln" if normalize_before else "ln"
        norm_parts = names_of_norm(arrays, block)
        assert norm_parts is not None  # a block without is left alone
        norm_names = [f"{prefix}{naming.norm}.{part}" for part in norm_parts]
        new.update(linear_weight=out, linear_bias=out_bias)
        new.update({f"{norm}_{part}": arrays[name] for part, name in zip(("scale", "bias"), norm_names)})
        ours = {*block.names("weight"), *block.names("bias"), *norm_names}
    old = [name for name in arrays if name in ours]
    packed = {part: np.ascontiguousarray(array) for part, array in new.items() if array is not None}
    return old, {f"{block.name}.{part}": array for part, array in packed.items()}


def _describe(block: NamedBlock, new: dict[str, Any], normalize_before: bool | None, layout: str) -> str:
    """What a block was, and what its packed names are for."""
    naming, above = block.naming, block.prefix.split(".")
    where = f"{naming.title}, weights {shown_layout(layout)}"
    if naming.only_qkv:
        decoder = not {"decoder", *_CAUSAL_MODELS}.isdisjoint(above)
        part = "an attention with an adapter, as PaddleNLP's GPT's" if decoder else "an encoder layer"
        stay = ", once its other linear weights, [out, in] here too, are transposed" if layout == "out-in" else ""
        return f"{where}, for a model after paddle_fused_attention.convert(model) ({part}){stay}"
    _, heads, _, embed_dim = new[f"{block.name}.qkv_weight"].shape
    arguments = f"{embed_dim}, {heads}" + (
        ", normalize_before=True, final_layer_norm=False" if normalize_before else ""
    )
    absent = [part for part in ("qkv_bias", "linear_bias") if f"{block.name}.{part}" not in new]
    use = f"FusedMultiHeadAttention({arguments}{', causal=True' if naming.causal else ''})"
    if naming.decoder:
        use += ", with causal=True in a decoder"
    if absent:
        use += f", whose {' and '.join(absent)} is None"
    return f"{where}, norm {'before' if normalize_before else 'after'}, for {use}"


def _packed_parts(arrays: dict[Any, Any], block: NamedBlock) -> dict[str, np.ndarray]:
    """The arrays of a packed block, after checks that they fit each other."""
    parts = {part: arrays[f"{block.name}.{part}"] for part in PACKED_PARTS if f"{block.name}.{part}" in arrays}
    if {"pre_ln_scale", "ln_scale"} <= set(parts):
        raise CheckpointError(f"{block.name}: expected either pre_ln_scale or ln_scale, found both")
    needed = ["qkv_weight"]
    if not block.naming.only_qkv or not set(parts) <= set(QKV_PARAMETERS):
        norm = "pre_ln" if "pre_ln_scale" in parts else "ln"
        needed += ["linear_weight", f"{norm}_scale", f"{norm}_bias"]
    for part in (*needed, *parts):
        if not isinstance(parts.get(part), np.ndarray):
            raise CheckpointError(f"{block.name}.{part}: expected an array beside {block.name}.qkv_weight, found none")
    shape = parts["qkv_weight"].shape
    if len(shape) != 4 or shape[0] != 3 or shape[1] * shape[2] != shape[3]:
        raise CheckpointError(f"{block.name}.qkv_weight: expected shape [3, H, D, H * D], got {list(shape)}")
    for part, array in parts.items():
        expected = {"qkv_weight": shape, "qkv_bias": shape[:3], "linear_weight": (shape[3], shape[3])}.get(
            part, (shape[3],)
        )
        if array.shape != expected:
            raise CheckpointError(f"{block.name}.{part}: expected shape {list(expected)}, got {list(array.shape)}")
    return parts


def _unpack_block(
    arrays: dict[Any, Any], block: NamedBlock, parts: dict[str, np.ndarray], layout: str, norm_names: tuple[str, str]
) -> tuple[list[str], dict[str, Any]]:
    """The names to remove and the arrays to add."""
    count = len(block.naming.qkv)
    weights = separate_projections(parts["qkv_weight"], count)
    biases = separate_projections(parts["qkv_bias"], count) if "qkv_bias" in parts else []
    if "linear_weight" in parts:
        weights.append(parts["linear_weight"])
    if layout == "out-in":
        weights = [weight.T for weight in weights]
    new = dict(zip(block.names("weight"), weights))
    new.update(zip(block.names("bias"), biases))
    if "linear_bias" in parts:
        new[block.names("bias")[-1]] = parts["linear_bias"]
    for part, name in zip(("scale", "bias"), norm_names):
        for norm in ("pre_ln", "ln"):
            if f"{norm}_{part}" in parts:
                new[f"{block.prefix}{block.naming.norm}.{name}"] = parts[f"{norm}_{part}"]
    ours = {f"{block.name}.{part}" for part in parts}
    old = [name for name in arrays if name in ours]
    return old, {name: np.ascontiguousarray(array) for name, array in new.items()}
