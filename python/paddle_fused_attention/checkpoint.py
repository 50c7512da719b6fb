"""Packs the attention of a checkpoint, a dict of arrays by name, or its whole layers, for the fused layers, and unpacks
it again, bit for bit.

A block is packed if its `Naming` and all that names, shapes and metadata tell say that the operator computes it. What
the checkpoint can't tell (heads, at times the norm's place and the layout of weights) is asked for. The metadata of the
arrays keep what packing loses, the old layout and names. Without them a block gets its family's usual ones, which the
word that its packed names begin with tells. With Paddle's naming only query, key and value of an attention are packed,
under the names of a model after ``paddle_fused_attention.convert``.

Whole layers get the names of ``paddle.incubate.nn.FusedTransformerEncoderLayer`` in every family; without metadata they
go back to those of ``paddle.nn.TransformerEncoderLayer``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Callable

import numpy as np

from ._checks import shown
from ._choices import CheckpointError, check_layout, check_patterns, heads_of, layout_of, orders_of, shown_layout
from ._namings import (
    LAYOUTS,
    NAMINGS,
    NORM_NAMES,
    WHOLE_LAYER,
    NamedBlock,
    Signs,
    blocks_in,
    layout_by_shapes,
    names_of_norm,
    packed_block,
    packed_blocks_in,
    reason_against,
    reason_against_packed,
)
from ._types import Layout
from .report import Report
from .weights import pack_projections, separate_projections

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
    layout: Layout | None = None,
    file_layout: Layout | None = None,
    metadata: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    whole_layers: bool = False,
) -> tuple[dict[Any, Any], CheckpointReport]:
    """Packs every attention block of a known naming.

    Args:
        arrays: NumPy arrays by name, bfloat16 as uint16; other values, and those of other keys, are passed on.
        num_heads: One number for all blocks that are packed, which must be of one width, or numbers by a shell's
            patterns for the names of blocks, of which the first that fits holds.
        names: A pattern for the names of the blocks to pack, such as ``encoder.layers.*``.
        normalize_before: Where the layer norms stand, for blocks that are packed with them and whose names don't tell.
            They must be of one stack of layers.
        progress: Called with the number of blocks that are done and their total.
        layout: How linear layers store their weights, ``"in-out"`` or ``"out-in"``; None: as the shapes in a layer
            tell, else ``file_layout``.
        file_layout: The layout that the arrays' file tells, if it does.
        metadata: Of the arrays' file.
        config: The content of the model's config.json, such as its ``model_type``.
        whole_layers: Whether the layers' feed-forward halves are packed too, under the names of
            ``paddle.incubate.nn.FusedTransformerEncoderLayer``.

    Returns:
        A new dict, in which the parts of a block stand where its first part stood, and what was done.

    Raises:
        TypeError: An argument is of the wrong type.
        CheckpointError: Nothing to pack was found, an argument is missing, does not fit a block or is not asked for,
            the signs of the layout contradict each other, or a packed name is taken.
    """
    _check_arguments(arrays, names, progress, metadata=metadata, config=config)
    if not isinstance(whole_layers, (bool, np.bool_)):
        raise CheckpointError(f"whole_layers: expected a bool, got {shown(whole_layers)}")
    check_layout("layout", layout)
    check_layout("file_layout", file_layout)
    records = _block_records(metadata)
    report = CheckpointReport()
    found = blocks_in(arrays, bool(whole_layers))
    signs = Signs(arrays, config or {})
    chosen: list[NamedBlock] = []
    for block in found:
        reason = reason_against(arrays, block, signs)
        if not fnmatchcase(block.name, names):
            reason = f"it is not among the names {shown(names)}"
        if reason is None:
            chosen.append(block)
        else:
            report.left_alone[block.name] = reason
    separate = {block.packed_name for block in found}
    for name in packed_blocks_in(arrays):
        if name not in separate and packed_block(arrays, name, _title(records.get(name))) is not None:
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
    made: set = set()
    for done, (block, stored) in enumerate(zip(chosen, layouts)):
        progress(done, len(chosen))
        old, new = _pack_block(arrays, block, heads[block.name], orders.get(block.name), stored)
        taken = sorted(name for name in new if name in arrays)
        if taken:
            raise CheckpointError(
                f"{taken[0]}: expected no packed parameter in a checkpoint that is to be packed, found one"
            )
        _add_names(made, new, block.name)
        replacements[old[0]] = new
        removed.update(old)
        report.converted[block.name] = _describe(block, new, orders.get(block.name), stored, signs)
        norms = [names_of_norm(arrays, norm) for norm in block.norms] or [NORM_NAMES[0]]
        named = dict(zip(("norm", "feed_forward_norm"), norms))
        records[block.packed_name] = {"naming": block.naming.title, "layout": stored, **named}
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
    layout: Layout | None = None,
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
        TypeError: An argument is of the wrong type.
        CheckpointError: Nothing to unpack was found, a block is not complete, a separate name is taken, the metadata
            are broken, or `layout` does not fit them or the shapes in a layer.
    """
    _check_arguments(arrays, names, progress, metadata=metadata)
    check_layout("layout", layout)
    records = _block_records(metadata)
    report = CheckpointReport()
    replacements: dict[str, dict] = {}
    removed: set = set()
    made: set = set()
    blocks = packed_blocks_in(arrays)
    for done, name in enumerate(blocks):
        progress(done, len(blocks))
        record = records.get(name)
        block = packed_block(arrays, name, _title(record))
        if block is None:
            report.left_alone[name] = "its names are not those of a packed attention"
        elif not fnmatchcase(name, names):
            report.left_alone[name] = f"it is not among the names {shown(names)}"
        else:
            reason = reason_against_packed(arrays, block)
            if reason is not None:
                raise CheckpointError(f"{name}: {reason}")
            stored, norms = _layout_and_norms_before(arrays, block, layout, record)
            old, new = _unpack_block(arrays, block, stored, norms)
            taken = sorted(name for name in new if name in arrays)
            if taken:
                raise CheckpointError(f"{taken[0]}: expected no separate parameter beside {name}.qkv_weight, found one")
            _add_names(made, new, name)
            replacements[old[0]] = new
            removed.update(old)
            report.converted[name] = f"{block.naming.title}, weights {shown_layout(stored)}"
    progress(len(blocks), len(blocks))
    if not report.converted:
        raise CheckpointError(_nothing_found("packed attention", names, report))
    result = _with_replacements(arrays, replacements, removed)
    report.metadata = _metadata(metadata, records, result, None)
    return result, report


def _check_arguments(arrays: Any, names: Any, progress: Any, **mappings: Any) -> None:
    if not isinstance(arrays, dict):
        raise TypeError(f"arrays: expected a dict, got {type(arrays).__name__}")
    if not isinstance(names, str):
        raise TypeError(f"names: expected a str, got {shown(names)}")
    if not callable(progress):
        raise TypeError(f"progress: expected a function, got {shown(progress)}")
    for name, value in mappings.items():
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(f"{name}: expected a dict or None, got {type(value).__name__}")


def _nothing_found(what: str, names: str, report: Report) -> str:
    left = report.lines_of_left_alone()
    more = f"; and {len(left) - 3} more" if len(left) > 3 else ""
    found = ": " + "; ".join(left[:3]) + more if left else ""
    return f"no {what} was found" + (f" among the names {shown(names)}" if names != "*" else "") + found


def _add_names(made: set, new: dict[str, Any], block: str) -> None:
    """Adds the names of what a block gives, which no other block may give."""
    if not made.isdisjoint(new):
        raise CheckpointError(f"{block}: expected one attention in its layer, found another beside it")
    made.update(new)


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
                or tuple(record.get("feed_forward_norm", NORM_NAMES[0])) not in NORM_NAMES
            ):
                raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise CheckpointError(
            f"metadata {METADATA_BLOCKS}: expected JSON as convert writes it, found something else"
        ) from None
    return records


def _title(record: dict | None) -> str | None:
    return None if record is None else record["naming"]


def _metadata(
    old: Mapping[str, str] | None, records: dict[str, dict], arrays: dict, layout: Layout | None
) -> dict[str, str]:
    new = {key: value for key, value in (old or {}).items() if key != METADATA_BLOCKS}
    packed = set(packed_blocks_in(arrays))
    records = {name: record for name, record in records.items() if name in packed}
    if records:
        new[METADATA_BLOCKS] = json.dumps(records, separators=(",", ":"))
    if layout is not None:
        new[METADATA_LAYOUT] = layout
    return new


def _layout_and_norms_before(
    arrays: dict, block: NamedBlock, layout: Layout | None, record: dict | None
) -> tuple[Layout, list[tuple[str, str]]]:
    """The layout that a packed block had, and the names of the attention's norm and the feed-forward's."""
    told = layout_by_shapes(arrays, block, arrays[f"{block.packed_name}.qkv_weight"].shape[-1])
    if record is not None:
        if record["naming"] != block.naming.title:
            raise CheckpointError(
                f"{block.name}: expected {record['naming']}'s, by the file's metadata, found {block.naming.title}'s"
            )
        if layout not in (None, record["layout"]):
            raise CheckpointError(
                f"--layout {layout}: {block.name} was stored {shown_layout(record['layout'])}, by the file's metadata"
            )
        for name, shown in told.items():
            if shown != record["layout"]:
                raise CheckpointError(
                    f"{block.name}: it was stored {shown_layout(record['layout'])}, by the file's metadata, but by its "
                    f"shape {name} is stored {shown_layout(shown)}"
                )
        norms = [record.get(norm, NORM_NAMES[0]) for norm in ("norm", "feed_forward_norm")]
        return record["layout"], [(scale, shift) for scale, shift in norms]
    found = layout or block.naming.layout
    for name, shown in told.items():
        if shown != found:
            seen = f"by its shape {name} is stored {shown_layout(shown)}"
            if layout is not None:
                raise CheckpointError(f"--layout {layout}: {seen}")
            raise CheckpointError(
                f"{block.name}: {block.naming.title}'s weights are stored {shown_layout(found)}, but {seen}: --layout "
                "is needed"
            )
    return found, [NORM_NAMES[0], NORM_NAMES[0]]


def _pack_block(
    arrays: dict[Any, Any], block: NamedBlock, num_heads: int, normalize_before: bool | None, layout: Layout
) -> tuple[list[str], dict[str, Any]]:
    """The names to remove and the arrays to add; `normalize_before` is None if the layer norm stays."""
    *weights, out = (arrays[name] for name in block.names("weight"))
    *biases, out_bias = (arrays.get(name) for name in block.names("bias"))
    if layout == "out-in":
        weights, out = [weight.T for weight in weights], out.T
    own = f"{block.packed_name}."
    new = {
        f"{own}qkv_weight": pack_projections(weights, num_heads),
        f"{own}qkv_bias": None if biases[0] is None else pack_projections(biases, num_heads),
    }
    ours = {*block.names("weight")[:-1], *block.names("bias")[:-1]}
    if not block.only_qkv:
        new.update({f"{own}linear_weight": out, f"{own}linear_bias": out_bias})
        ours |= {block.names("weight")[-1], block.names("bias")[-1]}
    if block.whole:
        linear = f"{block.packed_feed_forward}._linear"
        for i, (weight, bias) in enumerate(zip(*map(block.feed_forward_names, ("weight", "bias"))), 1):
            new[f"{linear}{i}_weight"] = arrays[weight].T if layout == "out-in" else arrays[weight]
            new[f"{linear}{i}_bias"] = arrays.get(bias)
            ours |= {weight, bias}
    for norm, packed in zip(block.norms, block.packed_norms(normalize_before)):
        parts = names_of_norm(arrays, norm)
        assert parts is not None  # a block without is left alone
        for part, name in zip(("scale", "bias"), parts):
            new[f"{packed}_{part}"] = arrays[f"{norm}.{name}"]
            ours.add(f"{norm}.{name}")
    old = [name for name in arrays if name in ours]
    return old, {name: np.ascontiguousarray(array) for name, array in new.items() if array is not None}


def _describe(
    block: NamedBlock, new: dict[str, Any], normalize_before: bool | None, layout: Layout, signs: Signs
) -> str:
    """What a block was, and what its packed names are for."""
    naming, above = block.naming, block.prefix.split(".")
    where = f"{naming.title}, weights {shown_layout(layout)}"
    decoder = not {"decoder", *_CAUSAL_MODELS}.isdisjoint(above)
    if block.only_qkv:
        part = "an attention with an adapter, as PaddleNLP's GPT's" if decoder else "an encoder layer"
        stay = ", once its other linear weights, [out, in] here too, are transposed" if layout == "out-in" else ""
        return f"{where}, for a model after paddle_fused_attention.convert(model) ({part}){stay}"
    where += f", norm {'before' if normalize_before else 'after'}"
    _, heads, _, embed_dim = new[f"{block.packed_name}.qkv_weight"].shape
    biases = [f"{block.packed_name}.{part}" for part in ("qkv_bias", "linear_bias")]
    if block.whole:
        biases += [f"{block.packed_feed_forward}._linear{i}_bias" for i in (1, 2)]
        use = _use_of_whole_layer(block, new, normalize_before, signs, naming.causal or (decoder and naming.only_qkv))
    else:
        order = ", normalize_before=True, final_layer_norm=False" if normalize_before else ""
        use = f"FusedMultiHeadAttention({embed_dim}, {heads}{order}{', causal=True' if naming.causal else ''})"
        if naming.decoder:
            use += ", with causal=True in a decoder"
    own = block.prefix if block.whole else f"{block.packed_name}."
    absent = [name[len(own) :] for name in biases if name not in new]
    if absent:
        use += f", whose {' and '.join(absent)} is None"
    return f"{where}, for {use}"


def _use_of_whole_layer(
    block: NamedBlock, new: dict[str, Any], normalize_before: bool | None, signs: Signs, causal: bool
) -> str:
    """The layer, in the place of the layer of the model. Its constructor takes no epsilon, and its attention no
    switch for causality."""
    _, heads, _, embed_dim = new[f"{block.packed_name}.qkv_weight"].shape
    hidden = new[f"{block.packed_feed_forward}._linear1_weight"].shape[1]
    activation, epsilon = signs.activation(block.naming), signs.epsilon(block.naming)
    arguments = f"{embed_dim}, {heads}, {hidden}"
    arguments += "" if activation is None else f", activation={activation!r}"
    arguments += ", normalize_before=True" if normalize_before else ""
    told = ["the model's activation"] if activation is None else []
    told.append("the model's epsilon" if epsilon is None else f"epsilon {epsilon:g}")
    if causal:
        told.append("a causal mask")
    elif block.naming.decoder and not block.naming.only_qkv:
        told.append("in a decoder a causal mask")
    return f"{WHOLE_LAYER}({arguments}), with {', '.join(told)}"


def _unpack_block(
    arrays: dict[Any, Any],
    block: NamedBlock,
    layout: Layout,
    norms: list[tuple[str, str]],
) -> tuple[list[str], dict[str, Any]]:
    """The names to remove and the arrays to add."""
    own, linear = f"{block.packed_name}.", f"{block.packed_feed_forward}._linear"
    parts = {name: arrays[name] for name in block.packed_names if name in arrays}
    count = len(block.naming.qkv)
    weights = separate_projections(parts[f"{own}qkv_weight"], count)
    biases = separate_projections(parts[f"{own}qkv_bias"], count) if f"{own}qkv_bias" in parts else []
    matrices = dict(zip(block.names("weight"), weights))
    new = dict(zip(block.names("bias"), biases))
    if f"{own}linear_weight" in parts:
        matrices[block.names("weight")[-1]] = parts[f"{own}linear_weight"]
    if f"{own}linear_bias" in parts:
        new[block.names("bias")[-1]] = parts[f"{own}linear_bias"]
    if block.whole:
        for i, (weight, bias) in enumerate(zip(*map(block.feed_forward_names, ("weight", "bias"))), 1):
            matrices[weight] = parts[f"{linear}{i}_weight"]
            if f"{linear}{i}_bias" in parts:
                new[bias] = parts[f"{linear}{i}_bias"]
    new.update({name: matrix.T if layout == "out-in" else matrix for name, matrix in matrices.items()})
    old_norms = [block.prefix + norm for norm in (block.naming.norm, block.naming.feed_forward_norm)]
    for before in (True, False):
        for packed, norm, names in zip(block.packed_norms(before), old_norms, norms):
            for part, name in zip(("scale", "bias"), names):
                if f"{packed}_{part}" in parts:
                    new[f"{norm}.{name}"] = parts[f"{packed}_{part}"]
    old = [name for name in arrays if name in parts]
    return old, {name: np.ascontiguousarray(array) for name, array in new.items()}
