"""The names of an attention block's parts in families of models, and the signs that a block of such names computes
something else.

Names alone don't say what a model computes: models with rotary or relative positions use BERT's, too. So a block counts
as known only if its naming knows every name in its layer, and nothing above it speaks of another attention.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Iterator

import numpy as np

from .weights import QKV_PARAMETERS

LAYOUTS = ("in-out", "out-in")  # of the weights of linear layers
PACKED_PARTS = (*QKV_PARAMETERS, "linear_weight", "linear_bias", "pre_ln_scale", "pre_ln_bias", "ln_scale", "ln_bias")
NORM_NAMES = (("weight", "bias"), ("gamma", "beta"))


@dataclass(frozen=True)
class Naming:
    """The names of a layer's parts, without their prefix in a checkpoint.

    Attributes:
        packed: The attention itself; every name under it is part of it.
        qkv: Three projections, or one with the columns of query, key and value in turn.
        feed_forward: The matrices from embed_dim and back to it.
        layer: The other parts of the layer.
        layout: How the family's first models store weights.
        normalize_before: Where the layer norm stands; None: only names above the layer, those in `order`, may tell.
        only_qkv: Only `qkv` is packed; `out` and `norm` stay as they are. Versions before 0.2 packed them too.
        fixed_layout: All models have the layout, whoever wrote the file.
        buffers: Entries under `packed` that are no parameters.
        decoder: A name that stands only beside the attention of a decoder.
        order: By names above the layer: whether the layer norm stands before the attention.
    """

    title: str
    packed: str
    qkv: tuple[str, ...]
    out: str
    norm: str
    feed_forward: tuple[str, str]
    layer: tuple[str, ...]
    layout: str
    normalize_before: bool | None
    only_qkv: bool = False
    fixed_layout: bool = False
    causal: bool = False
    buffers: tuple[str, ...] = ()
    decoder: str | None = None
    order: dict[str, bool] = field(default_factory=dict)


NAMINGS = (
    Naming(
        "Paddle",
        "self_attn",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.out_proj",
        "norm1",
        ("linear1", "linear2"),
        ("norm2",),
        layout="in-out",
        normalize_before=None,
        only_qkv=True,
        decoder="cross_attn.q_proj.weight",
    ),
    Naming(
        "Hugging Face BERT",
        "attention",
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention.output.dense",
        "attention.output.LayerNorm",
        ("intermediate.dense", "output.dense"),
        ("intermediate", "output"),
        layout="out-in",
        normalize_before=False,
        decoder="crossattention.self.query.weight",
    ),
    Naming(
        "Hugging Face ViT",
        "attention",
        ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        "attention.output.dense",
        "layernorm_before",
        ("intermediate.dense", "output.dense"),
        ("intermediate", "output", "layernorm_after"),
        layout="out-in",
        normalize_before=True,
    ),
    Naming(
        "GPT",
        "attn",
        ("attn.c_attn",),
        "attn.c_proj",
        "ln_1",
        ("mlp.c_fc", "mlp.c_proj"),
        ("mlp", "ln_2", "crossattention", "ln_cross_attn"),
        layout="in-out",
        normalize_before=None,
        fixed_layout=True,
        causal=True,
        buffers=("attn.bias", "attn.masked_bias"),
        order={"ln_f.weight": True, "tokens_embed.weight": False},  # GPT-2 and OpenAI's first GPT
    ),
)

_ROTARY = "positions are rotated into query and key"
_RELATIVE = "relative positions are added to the scores"
_SPARSE = "the attention is sparse"
_MIXED = "it mixes convolutions into the attention"

# Why a model's attention is another one, by its name in lower case without "_" and "-". The name begins the
# checkpoint's names or stands in a config.json.
_OTHER_MODELS = {
    "bigbird": _SPARSE,
    "bros": "positions of boxes are added to the scores",
    "canine": "some of its attention is local",
    "convbert": _MIXED,
    "deberta": _RELATIVE,
    "debertav2": _RELATIVE,
    "erniedoc": _RELATIVE,
    "ernielayout": _RELATIVE,
    "esm": _ROTARY,
    "funnel": _RELATIVE,
    "git": "text sees all of an image and of the text what came before",
    "gptbigcode": "query, key and value are mixed head by head",
    "ibert": "it computes in integers",
    "layoutlmv2": _RELATIVE,
    "layoutlmv3": _RELATIVE,
    "layoutxlm": _RELATIVE,
    "led": _SPARSE,
    "lilt": "scores of another stream are added",
    "longformer": _SPARSE,
    "mctct": _RELATIVE,
    "mobilebert": "its norm is no layer norm",
    "mpnet": _RELATIVE,
    "mra": _SPARSE,
    "nezha": _RELATIVE,
    "nystromformer": "the attention is Nystrom's approximation",
    "roformer": _ROTARY,
    "roformerv2": _ROTARY,
    "xlnet": _RELATIVE,
    "yoso": "the attention is an approximation by hashing",
}

# Entries of a config.json with which the same names compute something else, and why.
_OTHER_CONFIGS = (
    ("scale_attn_weights", False, "scores are not divided by the root of the head's width"),
    ("scale_attn_by_inverse_layer_idx", True, "scores are divided by the number of the layer"),
)

# Signs above the layers or anywhere in them: the pattern of a name's part, the reason, and the namings that it is
# about.
_SIGNS = (
    (r"rel_pos\w*|rel_\dd\w*|rel_embeddings|relative\w*|distance_embedding", _RELATIVE, None),
    (r"inv_freq|rotary\w*", _ROTARY, None),
    (r"alibi\w*", "biases by distance are added to the scores", None),
    (r"embed_positions", _ROTARY, ("Hugging Face BERT",)),
    (r"pooler\.weight|qa_classifier", "these are BigBird's names, whose attention is sparse", ("Hugging Face BERT",)),
    (r"char_embeddings", "these are CANINE's names, some of whose attention is local", ("Hugging Face BERT",)),
    (r"bbox_embeddings", "these are BROS's names, which adds positions of boxes to the scores", ("Hugging Face BERT",)),
    (
        r"visual_projection\.visual_projection",
        "in GIT's names, where text sees all of an image",
        ("Hugging Face BERT",),
    ),
    (
        r"encoder\.LayerNorm\.weight",
        "a norm after the last layer is that of a model whose norms stand before",
        ("Hugging Face BERT",),
    ),
)
_SIGN = re.compile("|".join(rf"(?:(?:^|(?<=\.))(?:{pattern})(?=\.|$))" for pattern, _, _ in _SIGNS))


def _normalized(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _first_element(array: Any) -> Any:
    return array.flat[0] if isinstance(array, np.ndarray) and array.size else None


def enclosing(prefix: str) -> Iterator[str]:
    """The prefixes that enclose a layer's, from the nearest: of "a.b.0." they are "a.b.", "a." and ""."""
    while prefix:
        prefix = prefix[: prefix.rfind(".", 0, -1) + 1]
        yield prefix


class Signs:
    """What speaks against the blocks of a checkpoint: its names, its position numbers, its model's config.json."""

    def __init__(self, arrays: Mapping[Any, Any], config: Mapping[str, Any]) -> None:
        self._arrays = arrays
        self._names = frozenset(name for name in arrays if isinstance(name, str))
        self._model = self._against_config(config)
        self._found: dict[str, list[str]] = {}
        for name in self._names:
            match = _SIGN.search(name)
            if match:
                self._found.setdefault(name[: match.start()], []).append(name)

    def against(self, prefix: str, naming: Naming) -> str | None:
        """Why the block of a layer computes something else; None if nothing says so."""
        for model in prefix.split("."):
            if _normalized(model) in _OTHER_MODELS:
                return f"it is of {model}: {_OTHER_MODELS[_normalized(model)]}"
        if self._model is not None:
            return self._model
        for place in (prefix, *enclosing(prefix)):
            for name in sorted(self._found.get(place, ())):
                part = name[len(place) :]
                for pattern, why, namings in _SIGNS:
                    if re.match(rf"(?:{pattern})(?=\.|$)", part) and (namings is None or naming.title in namings):
                        return f"there is {name}: {why}"
            words = f"{place}embeddings.word_embeddings.weight"
            positions = f"{place}embeddings.position_embeddings.weight"
            if words in self._names and positions not in self._names:
                return f"there is {words} but no {positions}: positions enter elsewhere, perhaps in the attention"
            numbers = f"{place}embeddings.position_ids"
            if naming.title == "Hugging Face BERT" and _first_element(self._arrays.get(numbers)) == 2:
                return (
                    f"{numbers} begin at 2, as those of MRA, YOSO and Nystromformer, whose attention is an "
                    "approximation"
                )
        return None

    @staticmethod
    def _against_config(config: Mapping[str, Any]) -> str | None:
        model = config.get("model_type")
        if isinstance(model, str) and _normalized(model) in _OTHER_MODELS:
            return f"its config.json says {model}: {_OTHER_MODELS[_normalized(model)]}"
        for key, value, why in _OTHER_CONFIGS:
            if config.get(key) is value:
                return f"its config.json says {key}: {why}"
        return None

    def normalize_before(self, prefix: str, naming: Naming) -> bool | None:
        """Whether a naming's layer norm stands before the attention; None if nothing tells."""
        if naming.normalize_before is not None:
            return naming.normalize_before
        told = {
            answer
            for place in enclosing(prefix)
            for name, answer in naming.order.items()
            if place + name in self._names
        }
        return told.pop() if len(told) == 1 else None


@dataclass(frozen=True)
class NamedBlock:
    """A layer with the names of an attention block; `prefix` ends in a dot or is empty."""

    prefix: str
    naming: Naming

    @property
    def name(self) -> str:
        return self.prefix + self.naming.packed

    def names(self, suffix: str) -> list[str]:
        return [f"{self.prefix}{part}.{suffix}" for part in (*self.naming.qkv, self.naming.out)]


def blocks_in(arrays: dict[Any, Any]) -> list[NamedBlock]:
    found = []
    for name in arrays:
        for naming in NAMINGS:
            anchor = naming.qkv[0] + ".weight"
            if isinstance(name, str) and (name == anchor or name.endswith("." + anchor)):
                found.append(NamedBlock(name[: len(name) - len(anchor)], naming))
    return found


def packed_blocks_in(arrays: dict[Any, Any]) -> list[str]:
    return [name[: -len(".qkv_weight")] for name in arrays if isinstance(name, str) and name.endswith(".qkv_weight")]


def names_of_norm(arrays: dict[Any, Any], block: NamedBlock) -> tuple[str, str] | None:
    """The names of the norm's scale and shift; None if there is no norm, or one with both kinds of names."""
    norm = f"{block.prefix}{block.naming.norm}."
    there = [pair for pair in NORM_NAMES if norm + pair[0] in arrays or norm + pair[1] in arrays]
    return there[0] if len(there) == 1 else None


def reason_against(arrays: dict[Any, Any], block: NamedBlock, signs: Signs) -> str | None:
    """Why a block can't be packed; None if it can."""
    prefix, naming = block.prefix, block.naming
    if naming.decoder is not None and prefix + naming.decoder in arrays:
        return f"it has {naming.decoder} beside it, as in a decoder"
    sign = signs.against(prefix, naming)
    if sign is not None:
        return sign
    scale, shift = (None if naming.only_qkv else names_of_norm(arrays, block)) or NORM_NAMES[0]
    norm = [f"{prefix}{naming.norm}.{part}" for part in (scale, shift)]
    weights, biases = block.names("weight"), block.names("bias")
    needed = weights if naming.only_qkv else [*weights, *norm]
    if any(name in arrays for name in biases[:-1]):
        needed = [*needed, *biases[:-1]]
    for name in needed:
        if name not in arrays:
            return f"{name} is missing"
    ours = {*weights, *biases, *norm}
    unknown = _unknown_name(arrays, block, ours)
    if unknown is not None:
        return f"there is {unknown}, which is no part of the operator's attention"
    for name in sorted(ours & set(arrays)):
        if not isinstance(arrays[name], np.ndarray):
            return f"{name} is not an array of numbers"
        if arrays[name].dtype.name not in ("float16", "float32", "float64", "uint16"):  # uint16 is bfloat16
            return f"{name} has dtype {arrays[name].dtype}, which is no float of 16, 32 or 64 bits"
    wide = norm[0] if norm[0] in arrays else weights[-1]
    embed_dim = (arrays[wide].shape or (1,))[0]
    if embed_dim == 0:
        return f"{wide} is empty"
    columns = embed_dim * 3 // len(naming.qkv)
    expected: dict[str, tuple[int, ...]] = {name: (embed_dim,) for name in (*norm, biases[-1])}
    expected.update({name: (columns,) for name in biases[:-1]})
    expected.update({name: (embed_dim, columns) for name in weights[:-1]})
    expected[weights[-1]] = (embed_dim, embed_dim)
    for name, shape in expected.items():
        # A single projection may be transposed: its shape tells the layout.
        if name in arrays and arrays[name].shape not in (shape, shape[::-1]):
            return f"{name} has shape {list(arrays[name].shape)}, not {list(shape)}"
    for names, suffix in ((weights[:-1], "weight"), (biases[:-1], "bias")):
        if len({arrays[name].dtype for name in names if name in arrays}) > 1:
            return f"its query, key and value {suffix} are of different dtypes"
    return None


def _unknown_name(arrays: dict[Any, Any], block: NamedBlock, ours: set) -> str | None:
    """A name in the layer, or under the attention's own name, that the naming does not know."""
    prefix, naming = block.prefix, block.naming
    own, norm = f"{block.name}.", f"{prefix}{naming.norm}."
    known = {*ours, *(prefix + buffer for buffer in naming.buffers), *(own + part for part in PACKED_PARTS)}
    layer = {naming.packed, naming.norm, *naming.layer, *(part.split(".")[0] for part in naming.feed_forward)}
    for name in arrays:
        if not isinstance(name, str) or not name.startswith(prefix) or name in known:
            continue
        # Without a prefix the layer is the whole checkpoint, which may hold other things.
        if name.startswith((own, norm)) or (prefix and name[len(prefix) :].split(".")[0] not in layer):
            return name
    return None


def layout_by_shapes(arrays: dict[Any, Any], block: NamedBlock, width: int) -> dict[str, str]:
    """The layouts that the matrices in the block's layer show by their shapes, by name; square ones show none."""
    widening = [block.naming.feed_forward[0], *(block.naming.qkv if len(block.naming.qkv) == 1 else ())]
    told = {}
    for part in (*widening, block.naming.feed_forward[1]):
        name = f"{block.prefix}{part}.weight"
        shape: tuple[int, ...] = getattr(arrays.get(name), "shape", ())
        if len(shape) == 2 and shape[0] != shape[1] and width in shape:
            told[name] = "in-out" if (shape[0] == width) == (part in widening) else "out-in"
    return told


def naming_of_packed(arrays: dict[Any, Any], name: str) -> Naming | None:
    for naming in NAMINGS:
        if name.split(".")[-1] == naming.packed:
            for normalize_before in (True, False) if naming.normalize_before is None else (naming.normalize_before,):
                if f"{name}.{'pre_ln' if normalize_before else 'ln'}_scale" in arrays:
                    return naming
            if naming.only_qkv and f"{name[: len(name) - len(naming.packed)]}{naming.out}.weight" in arrays:
                return naming
    return None
