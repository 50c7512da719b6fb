"""The cases of attention by itself: shapes, masks, visibility and switches, their inputs, and how results are compared.
NumPy only.
"""

import zlib
from dataclasses import dataclass, field, replace
from typing import Optional, Tuple

import attention_reference
import common
import numpy as np
import reference
from attention_reference import Config

DTYPES = ("float32", "float64", "float16", "bfloat16")
SIXTEEN_BIT = ("float16", "bfloat16")


@dataclass(frozen=True)
class Case:
    """`lengths`, pairs of queries and keys, are those of packed sequences, which then say the sizes. A mask has a shape
    in letters and ones ("BHQK"), and a dtype, None for the case's; `content` is "random", "-inf" (a float mask, much of
    it -inf) or "rows" (some queries see no key). `ranges` are columns of a random flash mask, of 1 or all key heads.
    """

    batch: int = 2
    queries: int = 7
    keys: int = 7
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 8
    dtype: str = "float64"
    lengths: Tuple[Tuple[int, int], ...] = ()
    mask: Optional[str] = None
    mask_dtype: Optional[str] = None
    content: str = "random"
    ranges: int = 0
    range_heads: int = 1
    config: Config = field(default_factory=Config)

    def but(self, **changes):
        own = {k: v for k, v in changes.items() if k in self.__dataclass_fields__}
        return replace(self, config=replace(self.config, **{k: v for k, v in changes.items() if k not in own}), **own)

    @property
    def longest(self):
        return tuple(max(1, *side) if len(side) > 1 else max(1, side[0]) for side in zip(*self.lengths))

    def dtype_of(self, name):
        return (self.mask_dtype or self.dtype) if name == "attn_mask" else self.dtype


class WeightsCase(Case):
    """Asks for the weights. They are the result for values of one 1 each, but lie as [batch, queries, heads, keys]."""


def of_weights(case):
    return WeightsCase(**{name: getattr(case, name) for name in Case.__dataclass_fields__})


def _mask(case, rng):
    sizes = {"B": case.batch, "H": case.heads, "Q": case.queries, "K": case.keys, "1": 1}
    shape = tuple(sizes[letter] for letter in case.mask)
    keep = rng.random(shape) < 0.6
    if case.content == "rows":
        keep[..., ::3, :] = False
    dtype = case.dtype_of("attn_mask")
    if "float" in dtype:
        values = reference.round_to(rng.standard_normal(shape), dtype).astype(np.float64)
        return values if case.content == "random" else np.where(keep, values, -np.inf)
    return keep if dtype == "bool" else np.where(keep, rng.choice([1, -3, 64], shape), 0).astype(dtype)


def _ranges(case, rng):
    bounds = rng.integers(0, case.queries + 2, (case.batch, case.range_heads, case.keys, case.ranges))
    return bounds.astype("int32")


def make_inputs(case):
    """float64 arrays of the numbers that the dtype holds, under the names of the operator's inputs, and d_out."""
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    leading = [(case.batch, case.queries), (case.batch, case.keys)]
    inputs = {}
    if case.lengths:
        leading = [(sum(side),) for side in zip(*case.lengths)]
        for name, side in zip(("cu_seqlens_q", "cu_seqlens_k"), zip(*case.lengths)):
            inputs[name] = np.cumsum((0, *side)).astype("int32")
    shapes = {
        "query": (*leading[0], case.heads, case.head_dim),
        "key": (*leading[1], case.kv_heads, case.head_dim),
        "value": (*leading[1], case.kv_heads, case.head_dim),
        "d_out": (*leading[0], case.heads, case.head_dim),
    }
    for name, shape in shapes.items():
        inputs[name] = reference.round_to(rng.standard_normal(shape), case.dtype).astype(np.float64)
    if case.mask:
        inputs["attn_mask"] = _mask(case, rng)
    if case.ranges:
        inputs["startend_row_indices"] = _ranges(case, rng)
    if isinstance(case, WeightsCase):
        one_each = np.eye(case.keys)[:, None].repeat(case.kv_heads, 1)
        inputs["value"] = np.broadcast_to(one_each, (case.batch, *one_each.shape))
        d_weights = rng.standard_normal((case.batch, case.queries, case.heads, case.keys))
        inputs["d_out"] = reference.round_to(d_weights, case.dtype).astype(np.float64)
    return inputs


def stored(case, inputs):
    """The arrays as Paddle takes them."""
    return {
        name: common.to_storage(a, case.dtype_of(name)) if a.dtype == np.float64 else a for name, a in inputs.items()
    }


def differentiable(inputs):
    return [n for n in attention_reference.DIFFERENTIABLE if n in inputs and inputs[n].dtype.kind == "f"]


def differentiable_of_weights(inputs):
    return [name for name in differentiable(inputs) if name != "value"]


def expect(case, inputs):
    """What the reference gives, and for 16-bit dtypes what the composed ops give."""
    arrays = {name: a for name, a in inputs.items() if name != "d_out"}
    expected = common.Expected(
        attention_reference.forward(arrays, case.config),
        attention_reference.backward(arrays, case.config, inputs["d_out"]),
    )
    if case.dtype in SIXTEEN_BIT:
        peers = attention_reference.composed_16bit(arrays, case.config, inputs["d_out"], case.dtype)
        expected.peer_out, expected.peer_gradients = peers
    return expected


def check(case, inputs, out, gradients):
    """Compares arrays as Paddle gives them, or those gradients that were asked for, with the reference."""
    expected = expect(case, inputs)
    peers = expected.peer_gradients or {}
    complaints = []
    for name, found, wanted, peer in [
        ("out", out, expected.out, expected.peer_out),
        *((n, g, expected.gradients[n], peers.get(n)) for n, g in gradients.items()),
    ]:
        dtype = case.dtype_of(name)
        assert found.dtype == (np.uint16 if dtype == "bfloat16" else np.dtype(dtype)), f"{name}: {found.dtype}"
        try:
            check_tensor(name, common.from_storage(found), wanted, case.dtype, dtype, peer)
        except AssertionError as error:
            complaints.append(str(error))
    assert not complaints, "{}\n{}".format(case, "\n".join(complaints))


def check_tensor(name, found, wanted, dtype, own_dtype, peer, cancelled=None):
    """As common.check_tensor; `own_dtype` is the tensor's, `dtype` that of the products. Where sums cancel to 0 the
    measure is the size of what they cancel: the inputs' unit, or `cancelled` and in 16 bits also what a chain of such
    ops makes of that 0."""
    narrow = {"float32": 2.0**-24, **common.UNIT_ROUNDOFF}.get(own_dtype, 0.0)
    if np.abs(wanted).max(initial=0.0) < 1e-12:
        limit = (cancelled or 1.0) * common.TOLERANCE.get(dtype, common.UNIT_ROUNDOFF.get(dtype))
        if cancelled is not None and dtype in SIXTEEN_BIT:
            limit = max(limit, common.PEER_FACTOR["gradient"] * np.abs(peer).max(initial=0.0))
        assert np.abs(found - wanted).max(initial=0.0) <= limit, f"{name}: {np.abs(found).max()} instead of 0"
    elif dtype not in SIXTEEN_BIT and narrow > common.TOLERANCE[dtype]:
        assert found.shape == wanted.shape
        least = 2.0**-25 if own_dtype == "float16" else 0.0  # half of its smallest number
        limit = np.maximum(narrow * np.abs(wanted), least) + common.TOLERANCE[dtype] * np.abs(wanted).max()
        assert (np.abs(found - wanted) <= limit).all(), f"{name}: {np.abs(found - wanted).max()}"
    else:
        common.check_tensor(name, found, wanted, dtype, peer, own_dtype)


FULL = Case()
LENGTHS = ((5, 5), (1, 1), (0, 0), (19, 19), (3, 3))
OTHER_LENGTHS = ((5, 9), (1, 17), (4, 0), (0, 3), (6, 2))

FEATURES = {
    "plain": FULL,
    "other keys": FULL.but(queries=5, keys=11),
    "fewer keys": FULL.but(queries=11, keys=5),
    "one query": FULL.but(queries=1, keys=33),
    "one of all": Case(1, 1, 1, 1, 1, 1),
    "long": Case(1, 129, 200, 2, 1, 40),
    "scale": FULL.but(scale=0.3),
    "grouped": FULL.but(heads=6, kv_heads=2),
    "one kv head": FULL.but(heads=5, kv_heads=1, queries=9),
    "causal": FULL.but(causal=True, queries=40, keys=40),
    "causal, more keys": FULL.but(causal=True, queries=5, keys=12),
    "causal, fewer keys": FULL.but(causal=True, queries=12, keys=5),
    "window": FULL.but(queries=40, keys=40, window_left=5, window_right=3),
    "window left": FULL.but(queries=30, keys=37, window_left=4),
    "window right": FULL.but(queries=37, keys=30, window_right=0),
    "window of one": FULL.but(window_left=0, window_right=0),
    "causal window": FULL.but(causal=True, queries=40, keys=40, window_left=6),
    "dropout": FULL.but(queries=20, keys=35, dropout_rate=0.3, seed=5),
    "dropout, all": FULL.but(dropout_rate=1.0, seed=5),
    "downscale": FULL.but(dropout_rate=0.3, mode="downscale_in_infer", seed=9),
    "downscale in evaluation": FULL.but(dropout_rate=0.3, mode="downscale_in_infer", training=False),
    "evaluation": FULL.but(dropout_rate=0.3, training=False),
    "bool mask": FULL.but(mask="B1QK", mask_dtype="bool", queries=9),
    "rows without keys": FULL.but(mask="BHQK", mask_dtype="bool", content="rows"),
    "int mask": FULL.but(mask="11QK", mask_dtype="int64"),
    "key mask": FULL.but(mask="B11K", mask_dtype="bool", keys=19),
    "float mask": FULL.but(mask="BHQK", queries=9, keys=20),
    "-inf in the mask": FULL.but(mask="BHQK", content="-inf"),
    "mask of heads": FULL.but(mask="1HQK", keys=12),
    "mask of keys": FULL.but(mask="B11K"),
    "mask of queries": FULL.but(mask="BHQ1"),
    "mask of one": FULL.but(mask="1"),
    "mask of two": FULL.but(mask="QK", queries=17, keys=18),
    "float32 mask": FULL.but(mask="BHQK", mask_dtype="float32", dtype="float32"),
    "mask, grouped": FULL.but(mask="BHQK", heads=4, dropout_rate=0.2, seed=3),
    "mask, causal": FULL.but(mask="BHQK", causal=True, keys=9),
    "mask, window": FULL.but(mask="B1QK", queries=20, keys=20, window_left=3, window_right=2),
    "ranges, 1": FULL.but(ranges=1, causal=True, queries=21, keys=21),
    "ranges, 2, causal": FULL.but(ranges=2, causal=True, queries=21, keys=21, range_heads=2),
    "ranges, 2": FULL.but(ranges=2, queries=21, keys=17),
    "ranges, 4": FULL.but(ranges=4, queries=21, keys=40, range_heads=2, heads=4),
    "ranges, dropout": FULL.but(ranges=2, queries=21, keys=21, dropout_rate=0.2, seed=4),
    "ranges, mask": FULL.but(ranges=4, queries=21, keys=21, mask="B1QK"),
    "packed": FULL.but(lengths=LENGTHS),
    "packed, causal": FULL.but(lengths=LENGTHS, causal=True, heads=4),
    "packed, other keys": FULL.but(lengths=OTHER_LENGTHS),
    "packed, other keys, causal": FULL.but(lengths=OTHER_LENGTHS, causal=True),
    "packed, window": FULL.but(lengths=LENGTHS, window_left=4, window_right=1),
    "packed, dropout": FULL.but(lengths=LENGTHS, dropout_rate=0.3, seed=8, heads=4),
    "packed, one": FULL.but(lengths=((40, 40),), causal=True),
}

FEATURES_OF_WEIGHTS = {name: of_weights(case) for name, case in FEATURES.items() if not case.lengths}

# How query, key and value may share tensors, by letters for what each tensor holds; and whether key and value are by
# head.
FORMS = {"qkv": False, "q kv": False, "qk v": False, "q k v by head": True, "q kv by head": True}
_TENSORS = {"q": "query", "k": "key", "v": "value"}


def _groups(form):
    return [[_TENSORS[letter] for letter in word] for word in form.replace(" by head", "").split()]


def in_form(form, arrays):
    """The arrays with query, key and value joined as the form says, each group under the name of its first."""
    result = dict(arrays)
    for first, *others in _groups(form):
        joined = np.concatenate([arrays[name] for name in (first, *others)], axis=-2)
        by_head = FORMS[form] and first != "query"
        result[first] = np.ascontiguousarray(joined.swapaxes(1, 2) if by_head else joined)
        for name in others:
            del result[name]
    return result


def out_of_form(form, gradients, heads, kv_heads):
    """The gradients of query, key and value by themselves."""
    result = dict(gradients)
    for group in _groups(form):
        joined = result.pop(group[0])
        if FORMS[form] and group[0] != "query":
            joined = joined.swapaxes(1, 2)
        start = 0
        for name in group:
            stop = start + (heads if name == "query" else kv_heads)
            result[name] = joined[..., start:stop, :]
            start = stop
        assert stop == joined.shape[-2]
    return result


FORM_CASES = {
    "grouped": Case(2, 9, 9, 6, 2, 16, mask="B1QK", config=Config(dropout_rate=0.2, seed=3)),
    "equal": FULL.but(queries=33, keys=33, causal=True),
    "packed": FULL.but(lengths=LENGTHS, heads=4, causal=True),
    "other keys": FULL.but(queries=5, keys=37, heads=4),
    "one query": FULL.but(queries=1, keys=70),
}
FORMS_OF_CASES = [
    (form, name)
    for form, by_head in FORMS.items()
    for name, case in FORM_CASES.items()
    if not (by_head and case.lengths) and (not form.startswith("qk") or case.queries == case.keys)
]
