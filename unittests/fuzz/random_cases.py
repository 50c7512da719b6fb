"""Random cases of attention by itself, of its weights, of the attention block and of the feed-forward block. Each is a
function of (seed, number) alone.

A `Drawn` is a case, the gradients that are asked for, and whether the mask is read through strides. Sizes are mostly
small, and odd or zero at times; a few are large, where walks over tiles differ. What a float32 or 16-bit number cannot
hold is not drawn: scores so far apart that gradients vanish beside their rounding, layer norms of a few numbers without
an epsilon. Nor is a block of 16 bits that drops all of its output: there a chain of ops, whose errors are the measure,
has nothing to round.
"""

from dataclasses import dataclass
from typing import Tuple, Union

import attention_cases
import attention_reference
import block_cases
import cases
import numpy as np

Case = Union[attention_cases.Case, block_cases.AttentionBlockCase, cases.FeedForwardCase]

MASK_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
LARGE = 150  # of so many cases of attention one is large


@dataclass(frozen=True)
class Drawn:
    case: Case
    wanted: Tuple[str, ...]
    strides_mask: bool = False

    def __str__(self):
        strided = ", the mask through strides" * self.strides_mask
        return f"{self.case}\n  gradients of {', '.join(self.wanted) or 'nothing'}{strided}"


class _Dice:
    def __init__(self, seed, number):
        self._rng = np.random.default_rng([seed, number])

    def chance(self, probability):
        return bool(self._rng.random() < probability)

    def one_of(self, *values):
        return values[self._rng.integers(len(values))]

    def between(self, first, last):
        return int(self._rng.integers(first, last + 1))

    def size(self, least=1, most=300):
        """Mostly small, often beside a multiple of the tiles' sizes."""
        kind = self.between(0, 9)
        if kind < 6:
            found = self.between(least, 20)
        elif kind < 8:
            found = self.one_of(16, 32, 64, 128, 256) + self.between(-1, 1)
        else:
            found = self.between(least, most)
        return max(least, min(found, most))

    def some_of(self, names, probability):
        return tuple(name for name in names if self.chance(probability))

    def wanted(self, names):
        """All, some or none of them."""
        return self.some_of(names, self.one_of(1.0, 1.0, 0.7, 0.3, 0.0))

    def rate(self):
        if self.chance(0.5):
            return 0.0
        return self.one_of(0.1, 0.2, 0.5, 1.0, round(self._rng.random(), 3), 2.0**-17, 1 - 2.0**-4)

    def scale(self, head_dim):
        """That of scores; None for its default."""
        if self.chance(0.7):
            return None
        return self.one_of(0.0, round(self._rng.uniform(-1.2, 1.2), 3), 1.0) * head_dim**-0.5

    def switches_of_dropout(self):
        return dict(
            training=self.chance(0.8),
            mode=self.one_of("upscale_in_train", "downscale_in_infer"),
            seed=int(self._rng.integers(-(2**63), 2**63)) if self.chance(0.5) else self.between(0, 100),
            offset=self.one_of(0, 1, 5, 2**33),
        )

    def visibility(self, longest):
        found = dict(causal=self.chance(0.35))
        if self.chance(0.25):
            found["window_left"] = self.one_of(-1, 0, self.between(0, longest + 2))
            found["window_right"] = self.one_of(-1, 0, self.between(0, longest + 2))
        return found

    def lengths(self, most, equal):
        """Of packed sequences: pairs of queries and keys, of which there is one query at least."""
        pairs = [(self.between(0, most), self.between(0, most)) for _ in range(self.between(1, 6))]
        pairs[self.between(0, len(pairs) - 1)] = (self.between(1, most), self.between(0, most))
        return tuple((queries, queries if equal else keys) for queries, keys in pairs)

    def mask_shape(self, letters):
        """In letters and ones, of any rank."""
        whole = "".join(letter if self.chance(0.6) else "1" for letter in letters)
        return whole[self.one_of(0, 0, 0, 1, 2, 3) :]

    def dtype(self):
        return self.one_of(*cases.DTYPES)

    def mask_dtype(self, dtype):
        """NumPy, which the core's module takes its masks from, has no bfloat16."""
        return self.one_of(*MASK_DTYPES) if self.chance(0.6) or dtype == "bfloat16" else dtype


def _contents_of_rows(shape, *contents):
    """Those that need queries in the mask's shape."""
    return contents if len(shape) > 1 else ()


def _attention(dice):
    dtype = dice.dtype()
    kv_heads = dice.one_of(1, 1, 2, 3)
    heads = kv_heads * dice.one_of(1, 1, 2, 3)
    large = dice.between(1, LARGE) == 1
    sides = [dice.between(500, 2000) if large else dice.size(0, 300) for _ in range(2)]
    if dice.chance(0.4):
        sides[1] = sides[0]
    if dice.chance(0.1):
        sides[0] = 1
    head_dim = dice.size(1, 300)
    batch = 1 if large else dice.one_of(0, 1, 1, 2, 2, 3) if dice.chance(0.3) else dice.between(1, 3)
    if large or sides[0] * sides[1] > 10000:
        batch, heads, kv_heads = 1, min(heads, 2), 1
    case = attention_cases.Case(batch, *sides, heads, kv_heads, head_dim, dtype)
    case = case.but(scale=dice.scale(head_dim), **dice.visibility(max(sides)))
    if dice.chance(0.5):
        case = case.but(dropout_rate=dice.rate(), **dice.switches_of_dropout())
    if dice.chance(0.25):
        case = case.but(lengths=dice.lengths(1 + max(sides) // 2, dice.chance(0.5)))
    else:
        if dice.chance(0.5):
            shape, mask_dtype = dice.mask_shape("BHQK"), dice.mask_dtype(dtype)
            content = dice.one_of("random", "-inf", *_contents_of_rows(shape, "rows"))
            case = case.but(mask=shape, mask_dtype=mask_dtype, content=content)
        if dice.chance(0.2):
            columns = dice.one_of(1, 2) if case.config.causal else dice.one_of(2, 4)
            case = case.but(ranges=columns, range_heads=dice.one_of(1, kv_heads))
    names = list(attention_reference.DIFFERENTIABLE[:3])
    if case.mask and "float" in case.dtype_of("attn_mask"):
        names.append("attn_mask")
    wanted = dice.wanted(names)
    return Drawn(case, wanted, bool(case.mask) and "attn_mask" not in wanted and dice.chance(0.5))


def _attention_weights(dice):
    drawn = _attention(dice)
    while drawn.case.lengths or drawn.case.queries * drawn.case.keys > 60000:
        drawn = _attention(dice)
    wanted = tuple(name for name in drawn.wanted if name != "value")
    return Drawn(attention_cases.of_weights(drawn.case), wanted, drawn.strides_mask)


def _epsilon(dice, width):
    return 0.5 if width < 16 else dice.one_of(1e-5, 1e-3, 0.1)


def _output_rate(dice, dtype):
    rate = dice.rate()
    return 0.5 if rate == 1.0 and dtype in cases.SIXTEEN_BIT else rate


def _residual_and_norm_dtypes(dice, dtype):
    if dtype not in cases.SIXTEEN_BIT:
        return {}
    residual = dice.one_of(None, "float32")
    return dict(residual_dtype=residual, norm_dtype=None if residual else dice.one_of(None, dtype))


def _attention_block(dice):
    dtype = dice.dtype()
    kv_heads = dice.one_of(1, 1, 2)
    heads = kv_heads if dice.chance(0.6) else kv_heads * dice.one_of(1, 2, 3)
    large = dice.between(1, LARGE) == 1
    seq_len = dice.between(300, 1000) if large else dice.size(0, 200)
    head_dim = dice.size(1, 64 if seq_len > 30 else 300)
    batch = dice.one_of(0, 1, 2, 3) if dice.chance(0.2) else dice.between(1, 2)
    if seq_len > 60:
        batch, heads, kv_heads = min(batch, 1), min(heads, 2), 1
    # Else these are some heads of a layer that is spread over devices.
    width = heads * head_dim if dice.chance(0.8) else dice.size(1, 300)
    case = block_cases.AttentionBlockCase(batch, seq_len, heads, head_dim, dtype, kv_heads=kv_heads, width=width)
    case = case.but(**_residual_and_norm_dtypes(dice, dtype), absent=dice.some_of(cases.OPTIONAL[:-1], 0.2))
    case = case.but(
        pre_layer_norm=dice.chance(0.5),
        final_layer_norm=dice.chance(0.5),
        add_residual=dice.chance(0.7),
        pre_ln_epsilon=_epsilon(dice, width),
        ln_epsilon=_epsilon(dice, width),
        **dice.visibility(seq_len),
    )
    case = case.but(scale=dice.scale(head_dim))
    if dice.chance(0.5):
        switches = dice.switches_of_dropout()
        case = case.but(dropout_rate=_output_rate(dice, dtype), attn_dropout_rate=dice.rate(), **switches)
    if dice.chance(0.2):
        lengths = dice.lengths(1 + seq_len // 2, True)
        case = case.but(lengths=lengths, batch=len(lengths), seq_len=max(n for n, _ in lengths))
    elif dice.chance(0.5):
        shape, mask_dtype = dice.mask_shape("BHSS"), dice.mask_dtype(dtype)
        contents = ["random", "-inf", "none", *_contents_of_rows(shape, "rows")]
        if shape[-1:] == "S":
            contents += ["start", "end", "sides"]
        case = case.but(mask=cases.Mask(shape, mask_dtype, dice.one_of(*contents)))
    names = block_cases.differentiable(case)
    wanted = dice.wanted(names)
    return Drawn(case, wanted, bool(case.mask) and "attn_mask" not in wanted and dice.chance(0.5))


def _feed_forward(dice):
    dtype = dice.dtype()
    rows = dice.between(300, 1500) if dice.between(1, LARGE) == 1 else dice.size(0, 300)
    shape = dice.one_of((rows,), (1, rows), (rows, 1), (2, -(-rows // 2)))
    activation = dice.one_of(*cases.ACTIVATIONS)
    width, hidden = dice.size(), dice.size()
    if activation == "relu":  # its kink, which inputs are drawn anew to keep off: of few numbers none might
        width, hidden = max(width, 8), min(hidden, 24)
        shape = tuple(min(n, 50) for n in shape)
    case = cases.FeedForwardCase(shape, width, dtype, hidden=hidden)
    case = case.but(**_residual_and_norm_dtypes(dice, dtype), absent=dice.some_of(cases.FEED_FORWARD_OPTIONAL, 0.2))
    case = case.but(
        pre_layer_norm=dice.chance(0.5),
        final_layer_norm=dice.chance(0.5),
        add_residual=dice.chance(0.7),
        ln1_epsilon=_epsilon(dice, width),
        ln2_epsilon=_epsilon(dice, width),
        activation=activation,
        gated=dice.chance(0.4),
    )
    if dice.chance(0.5):
        switches = dice.switches_of_dropout()
        case = case.but(dropout1_rate=dice.rate(), dropout2_rate=_output_rate(dice, dtype), **switches)
        if dice.chance(0.2):
            first = dice.between(0, 50)
            case = case.but(first_hidden=first, total_hidden=first + hidden + dice.between(0, 50))
    names = [name for name in case.drawn() if name != "d_out" and name not in case.absent]
    return Drawn(case, dice.wanted(names))


BLOCKS = {
    "attention": _attention,
    "attention_weights": _attention_weights,
    "attention_block": _attention_block,
    "feed_forward": _feed_forward,
}


def draw(seed, number):
    """Case `number`: the blocks take turns."""
    kinds = list(BLOCKS.values())
    return kinds[number % len(kinds)](_Dice(seed, number))


def with_other_values(drawn, times):
    """The case with inputs and a seed that are drawn anew."""
    seed = (drawn.case.config.seed + times + 2**63) % 2**64 - 2**63
    return Drawn(drawn.case.but(seed=seed), drawn.wanted, drawn.strides_mask)
