"""Values by the kind of argument that they are given for: those that must be refused, and those that must be taken as
another, plain value.

A kind makes the valid value of an argument and its variants. A variant that is refused has REFUSED for its plain value.
The sizes of tensors are letters, by which a kind knows whether another size fits: a small one may be any, 0 too.
"""

import fractions
import functools
import zlib
from decimal import Decimal
from typing import Any, Callable, NamedTuple

import numpy as np
import paddle

REFUSED = object()
ANY_EMPTY = object()  # the result has no elements
EITHER = object()  # a clear error is as good as a call without one
ANY = object()  # all that is asked for is a call without an error

SIZES = dict(B=3, S=5, T=7, H=4, G=2, D=8, E=32, F=24, N=6, K=3)
FLOATS = ("float32", "float64", "float16", "bfloat16")
DTYPES = (*FLOATS, "int8", "uint8", "int16", "int32", "int64", "bool", "complex64", "complex128")


class Variant(NamedTuple):
    label: str
    value: Callable  # of the valid value
    plain: Any = REFUSED  # REFUSED, ANY_EMPTY, ANY, or a function of the valid value
    blames_others: bool = False  # whether the error may name another argument, which it does not fit
    is_tensor: bool = False


class Hostile:
    """Raises at whatever is asked of it."""

    def _refuse(self, *_, **__):
        raise ZeroDivisionError("asked of a hostile object")

    __repr__ = __str__ = __eq__ = __ne__ = __bool__ = __len__ = __iter__ = __hash__ = __index__ = __float__ = _refuse
    __int__ = __getitem__ = __contains__ = __array__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise ZeroDivisionError("asked of a hostile object")


class OfInt(int):
    """An int of another class."""


# What is no number, string, tensor or container.
OBJECTS = {
    "object": object,
    "hostile": Hostile,
    "class": lambda: int,
    "function": lambda: len,
    "generator": lambda: (i for i in range(2)),
    "range": lambda: range(3),
    "slice": lambda: slice(2),
    "ellipsis": lambda: Ellipsis,
    "layer": lambda: paddle.nn.Linear(2, 2),
    "dtype": lambda: paddle.float32,
}
CONTAINERS = {
    "list": lambda: [1.0, 2.0],
    "empty list": list,
    "tuple": lambda: (1,),
    "dict": lambda: {"a": 1},
    "empty dict": dict,
    "set": lambda: {1},
    "list of None": lambda: [None, None],
}
STRINGS = {
    "str": lambda: "text",
    "empty str": str,
    "line breaks": lambda: "two\nlines",
    "long str": lambda: "x" * 10**5,
    "str of a number": lambda: "0.5",
    "bytes": lambda: b"bytes",
    "numpy str": lambda: np.str_("text"),
}
ARRAYS = {
    "array": lambda: np.zeros((2, 2), "float32"),
    "large array": lambda: np.arange(10**4),
    "array of objects": lambda: np.array([None, "a"], dtype=object),
    "array of one": lambda: np.array([0.5]),
    "array of no rank": lambda: np.array(0.5),
    "array of strings": lambda: np.array(["a", "b"]),
}
TENSORS = {
    "tensor": lambda: paddle.to_tensor(0.5),
    "bool tensor": lambda: paddle.to_tensor(True),
    "int tensor": lambda: paddle.to_tensor([2, 3]),
}
# Numbers with their values; complex ones, bools and Decimals are none.
NUMBERS = {
    "0": 0,
    "1": 1,
    "0.0": 0.0,
    "0.25": 0.25,
    "-1": -1,
    "-1e-300": -1e-300,
    "1.5": 1.5,
    "1e300": 1e300,
    "2**31": 2**31,
    "2**63": 2**63,
    "10**400": 10**400,
    "10**5000": 10**5000,
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": float("-inf"),
    "numpy float32": np.float32(0.25),
    "numpy float16": np.float16(0.25),
    "numpy float64": np.float64(0.25),
    "numpy nan": np.float32("nan"),
    "numpy int8": np.int8(1),
    "numpy uint64": np.uint64(1),
    "fraction": fractions.Fraction(1, 4),
    "int of a class": OfInt(1),
}
NO_NUMBERS = {
    "True": lambda: True,
    "numpy bool": lambda: np.bool_(True),
    "complex": lambda: 0.5j,
    "numpy complex": lambda: np.complex64(0.5),
    "Decimal": lambda: Decimal("0.5"),
}
NONE = {"None": lambda: None}


def refused(*tables, without=()):
    return [
        Variant(label, lambda _, make=make: make())
        for table in tables
        for label, make in table.items()
        if label not in without
    ]


def plain_value(value, of=None):
    return Variant(repr(value) if of is None else of, lambda _: value, lambda _: value)


class Kind:
    """An argument's kind. `valid` makes a value for a valid call, `variants` are those of a target's argument."""

    def __init__(self, value=None, optional=False):
        self.value, self.optional = value, optional

    def valid(self, static):
        return self.value

    def variants(self, name, kinds, static):
        return [*refused({} if self.optional else NONE), *self.own()]

    def own(self):
        raise NotImplementedError


class Number(Kind):
    """A number in [low, high], that is finite."""

    def __init__(self, value, low=0.0, high=float("inf"), optional=False, open_at=None):
        super().__init__(value, optional)
        self.low, self.high, self.open_at = low, high, open_at

    def own(self):
        found = refused(OBJECTS, CONTAINERS, STRINGS, ARRAYS, TENSORS, NO_NUMBERS)
        for label, number in NUMBERS.items():
            exact = number.item() if isinstance(number, np.generic) else number
            fits = self.low <= exact <= self.high and -1e308 < exact < 1e308 and exact != self.open_at
            found.append(Variant(label, lambda _, n=number: n, (lambda _, n=number: float(n)) if fits else REFUSED))
        return found


def rate(value=0.0, **options):
    return Number(value, 0.0, 1.0, **options)


class Integer(Kind):
    """An int in [low, high]; another one than the valid value's may not fit, so only the bounds are tried."""

    def __init__(self, value, low=1, high=2**31 - 1, optional=False, bad=()):
        super().__init__(value, optional)
        self.low, self.high, self.bad = low, high, bad

    def own(self):
        found = refused(OBJECTS, CONTAINERS, STRINGS, ARRAYS, TENSORS, NO_NUMBERS)
        for label, number in NUMBERS.items():
            is_int = isinstance(number, (int, np.integer))
            if not is_int or not self.low <= number <= self.high:
                found.append(Variant(label, lambda _, n=number: n))
        found += [Variant(str(number), lambda _, n=number: n) for number in (self.low - 1, self.high + 1, *self.bad)]
        for kind in (np.int32, np.int64, OfInt) if self.value is not None else ():
            found.append(Variant(kind.__name__, lambda valid, k=kind: k(valid), lambda valid: valid))
        return found


class Longest(Integer):
    """The length of the longest sequence, which need not be given unless a graph is built."""

    def variants(self, name, kinds, static):
        return [*refused({} if self.optional and not static else NONE), *self.own(static)]

    def own(self, static=False):
        too_short = {str(number) for number in self.bad}
        # In a graph no length is known.
        return [variant for variant in super().own() if not static or variant.label not in too_short]


def seed(value=3):
    return Integer(value, -(2**63), 2**63 - 1, optional=True)


class Switch(Kind):
    def own(self):
        numbers = {label: (lambda n=n: n) for label, n in NUMBERS.items() if n not in (0, 1) or isinstance(n, float)}
        return [
            *refused(OBJECTS, CONTAINERS, STRINGS, ARRAYS, TENSORS, numbers, {"complex": lambda: 1j}),
            Variant("numpy bool", np.bool_, bool),
            Variant("int", int, bool),
            Variant("numpy int", np.int64, bool),
        ]


class Choice(Kind):
    """One of some strings; `takes` are labels of what else is taken."""

    def __init__(self, value=None, optional=False, takes=()):
        super().__init__(value, optional)
        self.takes = takes

    def own(self):
        numbers = {label: (lambda n=n: n) for label, n in NUMBERS.items()}
        upper = {"upper case": lambda: (self.value or "text").upper()}
        return [
            *refused(OBJECTS, CONTAINERS, STRINGS, ARRAYS, TENSORS, NO_NUMBERS, numbers, upper, without=self.takes),
            *([Variant("numpy str of it", np.str_, str)] if self.value else []),
        ]


class Window(Kind):
    """Keys before and after: an int, two or None."""

    def __init__(self, value=(2, 1)):
        super().__init__(value, optional=True)

    def own(self):
        bad = {
            "three": lambda: (1, 2, 3),
            "pair of float": lambda: (0.5, 1),
            "pair of None": lambda: (None, 1),
            "pair of bools": lambda: (True, False),
            "pair too low": lambda: (0, -2),
            "pair too high": lambda: (2**31, 0),
            "pair too high for 64 bits": lambda: (0, 2**64),
            "nested": lambda: ((1, 2), (3, 4)),
        }
        numbers = {
            label: (lambda n=n: n)
            for label, n in NUMBERS.items()
            if not isinstance(n, (int, np.integer)) or not -1 <= n < 2**31
        }
        return [
            *refused(OBJECTS, CONTAINERS, STRINGS, ARRAYS, TENSORS, NO_NUMBERS, numbers, bad),
            Variant("list of two", lambda valid: list(valid), lambda valid: valid),
            Variant("numpy ints", lambda valid: tuple(map(np.int64, valid)), lambda valid: valid),
        ]


class Name(Kind):
    """A name that is not used: whatever it is, the result is right."""

    def __init__(self):
        super().__init__(None, optional=True)

    def own(self):
        return [Variant("str", lambda _: "name", lambda _: None)]


class Exactly(Kind):
    """A value of some class, with variants of its own beside what is refused for all such arguments."""

    def __init__(self, make, variants=(), optional=False, takes=()):
        super().__init__(None, optional)
        self.make, self.more, self.takes = make, tuple(variants), takes

    def valid(self, static):
        return self.make()

    def own(self):
        numbers = {label: (lambda n=n: n) for label, n in NUMBERS.items()}
        tables = (OBJECTS, CONTAINERS, STRINGS, ARRAYS, TENSORS, NO_NUMBERS, numbers)
        return [*refused(*tables, without=self.takes), *self.more]


class Given(Kind):
    """An argument with no variants but those that are listed."""

    def __init__(self, make, variants=()):
        super().__init__(None, optional=True)
        self.make, self.more = make, list(variants)

    def valid(self, static):
        return self.make()

    def own(self):
        return self.more


@functools.lru_cache(maxsize=None)
def random_array(name, shape):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.standard_normal(shape).astype("float32") * 0.5


_in_graph = 0


def variable(shape, dtype):
    global _in_graph
    _in_graph += 1
    return paddle.static.data(f"variable_{_in_graph}", shape, dtype)


def to_value(array, dtype, static):
    """A Tensor of an array's numbers, or a variable like it."""
    if static:
        return variable(list(array.shape), dtype)
    return paddle.to_tensor(array, place=paddle.CPUPlace()).astype(dtype)


class Tensor(Kind):
    """A tensor of sizes that `shape` names by letters, digits being sizes themselves.

    `leading` says whether more dimensions may come first; `dtype_group` with which other tensors it shares the dtype,
    "T" if that may be any float dtype; `accepts` which other dtypes are taken, as float32 or bool, `also` which more
    are as they are, and `any_dtype` whether all are; `arrays` whether NumPy's are. `without` are the labels of shapes
    that fit. A `packed` one is of tokens of several sequences, whose number no graph knows.
    """

    def __init__(
        self,
        shape,
        dtype="float32",
        array=None,
        optional=False,
        leading=False,
        dtype_group="T",
        accepts=(),
        any_dtype=False,
        arrays=False,
        without=(),
        also=(),
        packed=False,
    ):
        super().__init__(None, optional)
        self.letters, self.dtype, self.array = shape.split(), dtype, array
        self.leading, self.dtype_group, self.accepts = leading, dtype_group, accepts
        self.any_dtype, self.arrays, self.without = any_dtype, arrays, without
        self.also, self.packed = also, packed

    def sizes(self):
        return [int(letter) if letter.isdigit() else SIZES[letter.upper()] for letter in self.letters]

    def numbers(self):
        if self.array is not None:
            return np.array(self.array)
        return random_array("".join(self.letters), tuple(self.sizes()))

    def valid(self, static):
        return to_value(self.numbers(), self.dtype, static)

    def variants(self, name, kinds, static):
        others = [kind for other, kind in kinds.items() if other != name and isinstance(kind, Tensor)]
        found = refused({} if self.optional else NONE)
        numbers = {label: (lambda n=n: n) for label, n in NUMBERS.items()}
        found += refused(OBJECTS, CONTAINERS, STRINGS, ARRAYS, NO_NUMBERS, numbers)
        plain = (lambda valid: valid) if self.arrays and not others else REFUSED
        found.append(Variant("array of the right shape", lambda _: self.numbers(), plain))
        found.append(Variant("list of it", lambda valid: [valid]))
        shapes = [variant for variant in self._of_shapes(static) if variant.label not in self.without]
        tensors = [*self._of_dtypes(others, static), *shapes]
        tensors += self._variables() if static else self._tensors()
        return found + [variant._replace(is_tensor=True) for variant in tensors]

    def _of_dtypes(self, others, static):
        alone = self.dtype_group == "T" and all(kind.dtype_group != self.dtype_group for kind in others)
        for dtype in DTYPES:
            if dtype == self.dtype:
                continue
            plain = REFUSED
            if self.any_dtype or dtype in self.also:
                plain = ANY
            elif dtype in self.accepts:
                like = "float32" if dtype in FLOATS else "bool"
                plain = ANY if static else lambda valid, d=dtype, to=like: valid.astype(d).astype(to)
            elif alone and dtype in FLOATS and self.dtype in FLOATS:
                plain = ANY if static else lambda valid, d=dtype: valid.astype(d).astype("float32")
            yield Variant(dtype, lambda valid, d=dtype: self._like(valid, None, d, static), plain, blames_others=True)

    def _like(self, valid, sizes, dtype, static):
        """Of other sizes or another dtype."""
        if static:
            return variable(self.sizes() if sizes is None else sizes, dtype or self.dtype)
        if sizes is None:
            return valid.astype(dtype)
        return paddle.zeros(sizes, dtype or self.dtype)

    def _of_shapes(self, static):
        sizes = self.sizes()
        for axis, letter in enumerate(self.letters):
            if static and self.packed and axis == 0:
                continue
            for label, size in (("one more", sizes[axis] + 1), ("one less", sizes[axis] - 1), ("none", 0)):
                if size and letter.islower():
                    continue
                other = [*sizes[:axis], size, *sizes[axis + 1 :]]
                plain = (ANY if static else ANY_EMPTY) if letter.islower() else REFUSED
                yield Variant(
                    f"{label} of dimension {axis}",
                    lambda valid, o=other: self._like(valid, o, None, static),
                    plain,
                    blames_others=True,
                )
        ranks = {"no dimension": [], "one more dimension": [1, *sizes], "one dimension less": sizes[1:]}
        for label, other in ranks.items():
            if self.leading and (label == "one more dimension" or self.letters[0].islower() and len(other) > 0):
                continue
            yield Variant(label, lambda valid, o=other: self._like(valid, o, None, static), REFUSED, blames_others=True)

    def _variables(self):
        yield Variant("dygraph tensor", lambda _: _made_in_dygraph(self.numbers(), self.dtype))
        yield Variant("unknown sizes", lambda _: variable([-1] * len(self.letters), self.dtype), EITHER, True)

    def _tensors(self):
        yield Variant("static variable", lambda _: _made_in_a_graph(self.sizes(), self.dtype))
        yield Variant("cleared", _cleared)
        yield Variant("reset", _reset, blames_others=True)
        yield Variant("uninitialised", lambda _: paddle.Tensor(), blames_others=True)
        yield Variant("strided", _strided, lambda valid: valid)
        yield Variant("reversed strides", _transposed_view, lambda valid: valid)
        yield Variant("slice", _sliced, lambda valid: valid)
        yield Variant("parameter", _parameter, lambda valid: valid)
        yield Variant("clone", lambda valid: valid.clone(), lambda valid: valid)
        if hasattr(paddle, "as_strided"):
            yield Variant("huge view", lambda valid: _view_of_first(valid, 0), blames_others=True)
            yield Variant("view beyond memory", lambda valid: _view_of_first(valid, 1), blames_others=True)
        if self.dtype in ("float32", "float64"):
            yield Variant("sparse", lambda valid: valid.to_sparse_coo(len(valid.shape)))
            if len(self.letters) in (2, 3):
                yield Variant("sparse rows", lambda valid: valid.to_sparse_csr())
            if len(self.letters) == 2:
                yield Variant("SelectedRows", lambda valid: _selected_rows(*self.sizes()))


class Starts(Tensor):
    """Where packed sequences begin, and where the last one ends."""

    def __init__(self, *bounds, optional=False):
        super().__init__(str(len(bounds)), "int32", bounds, optional, dtype_group="starts")

    def _of_shapes(self, static):
        # How many sequences there are is free, and what the numbers are is not known in a graph.
        found = super()._of_shapes(static)
        return [variant for variant in found if not static or "of dimension" not in variant.label]

    def _tensors(self):
        yield from super()._tensors()
        bounds = list(self.array)
        for label, other in (
            ("beyond the end", [*bounds[:-1], bounds[-1] + 1]),
            ("short of the end", [*bounds[:-1], bounds[-1] - 1]),
            ("late begin", [1, *bounds[1:]]),
            ("negative", [-1, *bounds[1:]]),
            ("descending", [0, bounds[-1] + 1, bounds[-1]]),
            ("huge", [0, 2**31 - 1, bounds[-1]]),
            ("lowest", [0, -(2**31), bounds[-1]]),
        ):
            yield Variant(label, lambda _, o=other: to_value(np.array(o), "int32", False), blames_others=True)


@functools.lru_cache(maxsize=None)
def _program():
    """That of variables in dygraph, kept since they do not keep it themselves."""
    return paddle.static.Program()


def _made_in_a_graph(sizes, dtype):
    paddle.enable_static()
    try:
        with paddle.static.program_guard(_program()):
            return variable(sizes, dtype)
    finally:
        paddle.disable_static()


def _made_in_dygraph(array, dtype):
    paddle.disable_static()
    try:
        return to_value(array, dtype, False)
    finally:
        paddle.enable_static()


def _cleared(valid):
    valid = valid.detach().clone()
    valid._clear_data()
    return valid


def _reset(valid):
    valid = valid.detach().clone()
    valid._clear()
    return valid


def _strided(valid):
    """The same numbers in every second place of memory."""
    wide = paddle.stack([valid, paddle.zeros_like(valid)], axis=-1)
    strides = [2 * stride for stride in valid.contiguous().strides] if hasattr(valid, "strides") else None
    return wide[..., 0] if strides is None else paddle.as_strided(wide, valid.shape, strides)


def _view_of_first(valid, stride):
    """With a first dimension that no machine's memory holds."""
    sizes = list(valid.shape)
    return paddle.as_strided(valid, [2**45, *sizes[1:]], [stride] * len(sizes))


def _transposed_view(valid):
    axes = list(range(len(valid.shape)))[::-1]
    return valid.transpose(axes).contiguous().transpose(axes)


def _sliced(valid):
    return paddle.concat([paddle.zeros_like(valid[:1]), valid])[1:]


def _parameter(valid):
    if not paddle.is_floating_point(valid):
        return valid
    constant = paddle.nn.initializer.Assign(valid.numpy())
    return paddle.create_parameter(valid.shape, "float32", default_initializer=constant)


def _selected_rows(rows, columns):
    """The sparse gradient of an embedding."""
    embedding = paddle.nn.Embedding(rows, columns, sparse=True)
    embedding(paddle.to_tensor([0, 0])).sum().backward()
    return embedding.weight.grad
