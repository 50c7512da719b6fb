"""The names of a layer's parts in families of models, and the signs that a layer of such names computes something else.

Names alone don't say what a model computes: models with rotary or relative positions use BERT's, too. So a block counts
as known only if its naming knows every name in its layer, and nothing above it speaks of another attention.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Iterator, get_args

import numpy as np

from ._types import Layout
from .weights import QKV_PARAMETERS

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
PACKED_PARTS = (*QKV_PARAMETERS, "linear_weight", "linear_bias", "pre_ln_scale", "pre_ln_bias", "ln_scale", "ln_bias")
NORM_NAMES = (("weight", "bias"), ("gamma", "beta"))

# A whole layer is packed under the names of paddle.incubate.nn.FusedTransformerEncoderLayer.
WHOLE_LAYER = "FusedTransformerEncoderLayer"
WHOLE_ATTENTION, WHOLE_FEED_FORWARD = "fused_attn", "ffn"
FEED_FORWARD_PARTS = (
    *("_linear1_weight", "_linear1_bias", "_linear2_weight", "_linear2_bias"),
    *("_ln1_scale", "_ln1_bias", "_ln2_scale", "_ln2_bias"),
)


@dataclass(frozen=True)
class Naming:
    """The names of a layer's parts, without their prefix in a checkpoint.

    Attributes:
        packed: The attention itself; every name under it is part of it.
        qkv: Three projections, or one with the columns of query, key and value in turn.
        norm: The layer norm of the attention.
        feed_forward: The matrices from embed_dim and back to it.
        feed_forward_norm: The layer norm of the feed-forward half; it stands where that of the attention does.
        layer: The other parts that a layer may have.
        layout: How the family's first models store weights.
        normalize_before: Where the layer norm stands; None: only names above the layer, those in `order`, may tell.
        only_qkv: Of an attention only `qkv` is packed; `out` and `norm` stay as they are. Versions before 0.2 packed
            them too.
        fixed_layout: All models have the layout, whoever wrote the file.
        buffers: Entries under `packed` that are no parameters.
        decoder: A name that stands only beside the attention of a decoder.
        order: By names above the layer: whether the layer norm stands before the attention.
        activation_keys, epsilon_key: Where a config.json tells the feed-forward's activation and the norms' epsilon.
    """

    title: str
    packed: str
    qkv: tuple[str, ...]
    out: str
    norm: str
    feed_forward: tuple[str, str]
    feed_forward_norm: str
    layer: tuple[str, ...]
    layout: Layout
    normalize_before: bool | None
    only_qkv: bool = False
    fixed_layout: bool = False
    causal: bool = False
    buffers: tuple[str, ...] = ()
    decoder: str | None = None
    order: dict[str, bool] = field(default_factory=dict)
    activation_keys: tuple[str, ...] = ()
    epsilon_key: str | None = None


NAMINGS = (
    Naming(
        "Paddle",
        "self_attn",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.out_proj",
        "norm1",
        ("linear1", "linear2"),
        "norm2",
        (),
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
        "output.LayerNorm",
        (),
        layout="out-in",
        normalize_before=False,
        decoder="crossattention.self.query.weight",
        activation_keys=("hidden_act",),
        epsilon_key="layer_norm_eps",
    ),
    Naming(
        "Hugging Face ViT",
        "attention",
        ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        "attention.output.dense",
        "layernorm_before",
        ("intermediate.dense", "output.dense"),
        "layernorm_after",
        (),
        layout="out-in",
        normalize_before=True,
        activation_keys=("hidden_act",),
        epsilon_key="layer_norm_eps",
    ),
    Naming(
        "GPT",
        "attn",
        ("attn.c_attn",),
        "attn.c_proj",
        "ln_1",
        ("mlp.c_fc", "mlp.c_proj"),
        "ln_2",
        ("crossattention", "ln_cross_attn"),
        layout="in-out",
        normalize_before=None,
        fixed_layout=True,
        causal=True,
        buffers=("attn.bias", "attn.masked_bias"),
        order={"ln_f.weight": True, "tokens_embed.weight": False},  # GPT-2 and OpenAI's first GPT
        activation_keys=("activation_function", "afn"),
        epsilon_key="layer_norm_epsilon",
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

# By the key and the value of a config.json: the layer's name of a feed-forward's activation.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_ACTIVATIONS_OF_KEYS = {
    "hidden_act": _ACTIVATIONS,
    "activation_function": _ACTIVATIONS,
    "afn": {**_ACTIVATIONS, "gelu": "gelu_tanh"},  # OpenAI's GPT calls the approximation by the short name
}

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
        self._config = config
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

    def activation(self, naming: Naming) -> str | None:
        """The layer's name of the feed-forward's activation, by the config.json; None if it does not tell."""
        return next((name for _, _, name in self._activations(naming) if name is not None), None)

    def against_activation(self, naming: Naming) -> str | None:
        """Why the feed-forward half computes something else, by the config.json; None if it does not tell so."""
        for key, told, name in self._activations(naming):
            if name is None:
                return f"its config.json says {key} {told!r}, an activation that {WHOLE_LAYER} does not have"
        return None

    def _activations(self, naming: Naming) -> list[tuple[str, Any, str | None]]:
        told = [(key, self._config[key]) for key in naming.activation_keys if self._config.get(key) is not None]
        return [
            (key, value, _ACTIVATIONS_OF_KEYS[key].get(value) if isinstance(value, str) else None)
            for key, value in told
        ]

    def epsilon(self, naming: Naming) -> float | None:
        """The layer norms' epsilon, by the config.json; None if it does not tell."""
        value = None if naming.epsilon_key is None else self._config.get(naming.epsilon_key)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

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
    """A layer with the names of an attention block; `prefix` ends in a dot or is empty. `whole`: packed with its
    feed-forward half, under the names of a FusedTransformerEncoderLayer."""

    prefix: str
    naming: Naming
    whole: bool = False

    @property
    def name(self) -> str:
        return self.prefix + self.naming.packed

    @property
    def packed_name(self) -> str:
        """The packed attention."""
        return self.prefix + (WHOLE_ATTENTION if self.whole else self.naming.packed)

    @property
    def packed_feed_forward(self) -> str:
        return self.prefix + WHOLE_FEED_FORWARD

    @property
    def only_qkv(self) -> bool:
        return self.naming.only_qkv and not self.whole

    @property
    def packed_names(self) -> list[str]:
        """All names that its packed parameters may have."""
        names = [f"{self.packed_name}.{part}" for part in PACKED_PARTS]
        return names + [f"{self.packed_feed_forward}.{part}" for part in FEED_FORWARD_PARTS] if self.whole else names

    def names(self, suffix: str) -> list[str]:
        return [f"{self.prefix}{part}.{suffix}" for part in (*self.naming.qkv, self.naming.out)]

    def feed_forward_names(self, suffix: str) -> list[str]:
        return [f"{self.prefix}{part}.{suffix}" for part in self.naming.feed_forward]

    def packed_norms(self, normalize_before: bool | None) -> list[str]:
        """What the layer norms of an attention and of a feed-forward half are called, without _scale and _bias."""
        return [
            f"{self.packed_name}.{'pre_ln' if normalize_before else 'ln'}",
            f"{self.packed_feed_forward}.{'_ln1' if normalize_before else '_ln2'}",
        ]

    @property
    def norms(self) -> list[str]:
        """The layer norms that are packed."""
        names = [self.naming.norm, self.naming.feed_forward_norm]
        return [self.prefix + name for name in (names if self.whole else [] if self.only_qkv else names[:1])]


def blocks_in(arrays: dict[Any, Any], whole: bool = False) -> list[NamedBlock]:
    found = []
    for name in arrays:
        for naming in NAMINGS:
            anchor = naming.qkv[0] + ".weight"
            if isinstance(name, str) and (name == anchor or name.endswith("." + anchor)):
                found.append(NamedBlock(name[: len(name) - len(anchor)], naming, whole))
    return found


def packed_blocks_in(arrays: dict[Any, Any]) -> list[str]:
    return [name[: -len(".qkv_weight")] for name in arrays if isinstance(name, str) and name.endswith(".qkv_weight")]


def names_of_norm(arrays: dict[Any, Any], norm: str) -> tuple[str, str] | None:
    """The names of a norm's scale and shift; None if there is no norm, or one with both kinds of names."""
    there = [pair for pair in NORM_NAMES if any(f"{norm}.{name}" in arrays for name in pair)]
    return there[0] if len(there) == 1 else None


def reason_against(arrays: dict[Any, Any], block: NamedBlock, signs: Signs) -> str | None:
    """Why a block can't be packed; None if it can."""
    prefix, naming = block.prefix, block.naming
    if naming.decoder is not None and prefix + naming.decoder in arrays:
        return f"it has {naming.decoder} beside it, as in a decoder"
    sign = signs.against(prefix, naming) or (signs.against_activation(naming) if block.whole else None)
    if sign is not None:
        return sign
    norms = [f"{norm}.{part}" for norm in block.norms for part in names_of_norm(arrays, norm) or NORM_NAMES[0]]
    # What stays as it is has to be that of a known layer all the same.
    first_norm = norms[:2] or [f"{prefix}{naming.norm}.{part}" for part in NORM_NAMES[0]]
    weights, biases = block.names("weight"), block.names("bias")
    matrices, more_biases = (block.feed_forward_names(kind) if block.whole else [] for kind in ("weight", "bias"))
    needed = [*weights, *norms, *matrices]
    if any(name in arrays for name in biases[:-1]):
        needed = [*needed, *biases[:-1]]
    missing = _missing(arrays, needed)
    if missing is not None:
        return missing
    ours = {*weights, *biases, *first_norm, *norms, *matrices, *more_biases}
    unknown = _unknown_name(arrays, block, ours)
    if unknown is not None:
        return _no_part(unknown, block)
    no_floats = _no_floats(arrays, sorted(ours & set(arrays)))
    if no_floats is not None:
        return no_floats
    wide = first_norm[0] if first_norm[0] in arrays else weights[-1]
    embed_dim = (arrays[wide].shape or (1,))[0]
    if embed_dim == 0:
        return f"{wide} is empty"
    columns = embed_dim * 3 // len(naming.qkv)
    expected: dict[str, tuple[int, ...]] = {name: (embed_dim,) for name in (*first_norm, *norms, biases[-1])}
    expected.update({name: (columns,) for name in biases[:-1]})
    expected.update({name: (embed_dim, columns) for name in weights[:-1]})
    expected[weights[-1]] = (embed_dim, embed_dim)
    if block.whole:
        shape = arrays[matrices[0]].shape
        if len(shape) != 2 or embed_dim not in shape:
            return _other_shape(arrays, matrices[0], f"[{embed_dim}, dim_feedforward]")
        hidden = shape[1] if shape[0] == embed_dim else shape[0]
        if hidden == 0:
            return f"{matrices[0]} is empty"
        expected.update({matrices[1]: (hidden, embed_dim), more_biases[0]: (hidden,), more_biases[1]: (embed_dim,)})
    for name, shape in expected.items():
        # A single projection may be transposed: its shape tells the layout.
        if name in arrays and arrays[name].shape not in (shape, shape[::-1]):
            return _other_shape(arrays, name, list(shape))
    for names, suffix in ((weights[:-1], "weight"), (biases[:-1], "bias")):
        if len({arrays[name].dtype for name in names if name in arrays}) > 1:
            return f"its query, key and value {suffix} are of different dtypes"
    return None


def reason_against_packed(arrays: dict[Any, Any], block: NamedBlock) -> str | None:
    """Why a packed block can't be unpacked; None if it can."""
    own, other = f"{block.packed_name}.", f"{block.packed_feed_forward}."
    there = [name for name in block.packed_names if name in arrays]
    before, after = block.packed_norms(True), block.packed_norms(False)
    for pair in zip(before, after):
        found = [[name for name in there if name in (f"{norm}_scale", f"{norm}_bias")] for norm in pair]
        if all(found):
            return f"there are both {found[0][0]} and {found[1][0]}, of which it has one"
    needed = []
    if not block.only_qkv or not set(there) <= {own + part for part in QKV_PARAMETERS}:
        order = block.naming.normalize_before
        norms = before if order or (order is None and f"{before[0]}_scale" in there) else after
        needed += [f"{own}linear_weight", f"{norms[0]}_scale", f"{norms[0]}_bias"]
        if block.whole:
            needed += [f"{other}_linear1_weight", f"{other}_linear2_weight", f"{norms[1]}_scale", f"{norms[1]}_bias"]
    reason = _missing(arrays, needed)
    if reason is not None:
        return reason
    parts = (*block.naming.qkv, block.naming.out, block.naming.norm, *block.naming.feed_forward)
    known = tuple(f"{block.prefix}{part}." for part in (*parts, block.naming.feed_forward_norm))
    buffers = {block.prefix + buffer for buffer in block.naming.buffers}
    for name in arrays:
        if isinstance(name, str) and name.startswith((own, other) if block.whole else own):
            if name not in there and name not in buffers and not name.startswith(known):
                return _no_part(name, block)
    reason = _no_floats(arrays, there)
    if reason is not None:
        return reason
    qkv_weight = f"{own}qkv_weight"
    shape = arrays[qkv_weight].shape
    if len(shape) != 4 or shape[0] != 3 or shape[1] * shape[2] != shape[3]:
        return _other_shape(arrays, qkv_weight, "[3, H, D, H * D]")
    embed_dim = shape[3]
    if embed_dim == 0:
        return f"{qkv_weight} is empty"
    expected = {qkv_weight: shape, f"{own}qkv_bias": shape[:3], f"{own}linear_weight": (embed_dim, embed_dim)}
    if block.whole:
        matrix = f"{other}_linear1_weight"
        shape = arrays[matrix].shape
        if len(shape) != 2 or shape[0] != embed_dim:
            return _other_shape(arrays, matrix, f"[{embed_dim}, dim_feedforward]")
        hidden = shape[1]
        if hidden == 0:
            return f"{matrix} is empty"
        expected.update({matrix: shape, f"{other}_linear1_bias": (hidden,)})
        expected[f"{other}_linear2_weight"] = (hidden, embed_dim)
    for name in there:
        if arrays[name].shape != expected.get(name, (embed_dim,)):
            return _other_shape(arrays, name, list(expected.get(name, (embed_dim,))))
    return None


def _missing(arrays: dict[Any, Any], names: list[str]) -> str | None:
    return next((f"{name} is missing" for name in names if name not in arrays), None)


def _no_part(name: str, block: NamedBlock) -> str:
    packed = f"a {WHOLE_LAYER}" if block.whole else "the operator's attention"
    return f"there is {name}, which is no part of {packed}"


def _no_floats(arrays: dict[Any, Any], names: list[str]) -> str | None:
    for name in names:
        if not isinstance(arrays[name], np.ndarray):
            return f"{name} is not an array of numbers"
        if arrays[name].dtype.name not in ("float16", "float32", "float64", "uint16"):  # uint16 is bfloat16
            return f"{name} has dtype {arrays[name].dtype}, which is no float of 16, 32 or 64 bits"
    return None


def _other_shape(arrays: dict[Any, Any], name: str, expected: Any) -> str:
    return f"{name} has shape {list(arrays[name].shape)}, not {expected}"


def _unknown_name(arrays: dict[Any, Any], block: NamedBlock, ours: set) -> str | None:
    """A name in what is packed, or of an unknown part of the layer, that the naming does not know."""
    prefix, naming = block.prefix, block.naming
    own, norm = f"{block.name}.", f"{prefix}{naming.norm}."
    known = {*ours, *(prefix + buffer for buffer in naming.buffers), *(own + part for part in PACKED_PARTS)}
    feed_forward = (*naming.feed_forward, naming.feed_forward_norm)
    layer = {naming.packed, naming.norm, *naming.layer, *(part.split(".")[0] for part in feed_forward)}
    if block.whole:
        layer |= {WHOLE_ATTENTION, WHOLE_FEED_FORWARD}
    for name in arrays:
        if not isinstance(name, str) or not name.startswith(prefix) or name in known:
            continue
        # Without a prefix the layer is the whole checkpoint, which may hold other things.
        word = name[len(prefix) :].split(".")[0]
        if block.whole:
            unknown = bool(prefix) or word in layer
        else:
            unknown = name.startswith((own, norm)) or (bool(prefix) and word not in layer)
        if unknown:
            return name
    return None


def layout_by_shapes(arrays: dict[Any, Any], block: NamedBlock, width: int) -> dict[str, Layout]:
    """The layouts that the matrices in the block's layer show by their shapes, by name; square ones show none."""
    widening = [block.naming.feed_forward[0], *(block.naming.qkv if len(block.naming.qkv) == 1 else ())]
    told: dict[str, Layout] = {}
    for part in (*widening, block.naming.feed_forward[1]):
        name = f"{block.prefix}{part}.weight"
        shape: tuple[int, ...] = getattr(arrays.get(name), "shape", ())
        if len(shape) == 2 and shape[0] != shape[1] and width in shape:
            told[name] = "in-out" if (shape[0] == width) == (part in widening) else "out-in"
    return told


def packed_block(arrays: dict[Any, Any], name: str, title: str | None) -> NamedBlock | None:
    """The block whose packed attention has the name; `title` is that of its naming, if a record tells it.

    A whole layer has the same packed names in every naming: without a record it is taken for Paddle's.
    """
    prefix, _, packed = name.rpartition(".")
    prefix += "." if prefix else ""
    if packed == WHOLE_ATTENTION:
        if title is None and f"{prefix}{WHOLE_FEED_FORWARD}.{FEED_FORWARD_PARTS[0]}" not in arrays:
            return None
        return NamedBlock(prefix, next(naming for naming in NAMINGS if title in (None, naming.title)), whole=True)
    for naming in NAMINGS:
        if packed == naming.packed:
            for normalize_before in (True, False) if naming.normalize_before is None else (naming.normalize_before,):
                if f"{name}.{'pre_ln' if normalize_before else 'ln'}_scale" in arrays:
                    return NamedBlock(prefix, naming)
            if naming.only_qkv and f"{prefix}{naming.out}.weight" in arrays:
                return NamedBlock(prefix, naming)
    return None
