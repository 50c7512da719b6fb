"""Reads pickles of numbers, strings, plain containers and NumPy arrays. Nothing that a pickle names is imported or
called.

A small machine runs the opcodes of protocols 2 to 5. A table has a stand-in for each global that a pickle may name;
others are refused. A stand-in makes what the real global would make of good arguments, and refuses others. A pickle
describes an array piece by piece, so an array is first an `Unresolved` and becomes a NumPy array in `resolve`.

A pickle's length bounds the memory of its values: a `Budget` counts what is copied or referred to more than once, keys
are plain values, and depth has a limit.
"""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from typing import Any, BinaryIO, Callable, Mapping

import numpy as np

Globals = Mapping[str, "Global"]  # by module and name, with a dot between them

_MAX_DEPTH = 100
_KEY_TYPES = (str, int, float, bool, bytes, type(None))
_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")


class FormatError(Exception):
    """Why a file's content is refused, in one line."""


def shown_name(text: str) -> str:
    """A name out of a file as messages have it: escaped, and not long."""
    escaped = ascii(text[:200])[1:-1]
    return escaped if len(text) <= 200 and len(escaped) <= 100 else f"{escaped[:80]}...{ascii(text[-8:])[1:-1]}"


class Budget:
    """The number of bytes that the values of a file of `size` bytes may take beyond its own."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._left = 8 * size + 2**24

    def take(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise FormatError(f"its values would take far more memory than its {self._size} bytes")


class Global:
    """Stands for a function or type that a pickle may name; has no attributes that one could set."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)


class Unresolved:
    """A value that is complete only when the whole file is read."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: Any = None

    def build(self, state: Any, budget: Budget) -> None:
        raise FormatError("it sets the state of a value that has none")

    def resolved(self) -> Any:
        return self.value


class _Dtype(Unresolved):
    __slots__ = ()

    def __init__(self, name: Any, *_: Any) -> None:
        if not isinstance(name, str) or name not in _NUMBERS:
            got = shown_name(name) if isinstance(name, str) else f"of type {type(name).__name__.strip('_')}"
            raise FormatError(f"expected arrays of numbers, got a dtype {got}")
        self.value = np.dtype(name)

    def build(self, state: Any, budget: Budget) -> None:
        _check(isinstance(state, tuple) and len(state) >= 2 and state[1] in ("<", ">", "|", "="), "a dtype's state")
        self.value = self.value.newbyteorder(state[1])


class _Array(Unresolved):
    __slots__ = ()

    def build(self, state: Any, budget: Budget) -> None:
        _check(isinstance(state, tuple) and len(state) == 5, "an array's state")
        _, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran else "C", budget)

    def resolved(self) -> np.ndarray:
        _check(isinstance(self.value, np.ndarray), "an array's state")
        return self.value


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise FormatError(f"{what} is not as expected")


def _array(data: Any, dtype: Any, shape: Any, order: str, budget: Budget) -> np.ndarray:
    """A read-only array on `data`, in this machine's byte order."""
    if isinstance(data, str):
        data = data.encode("latin1")  # bytes of Python 2
    _check(isinstance(data, bytes) and isinstance(dtype, _Dtype) and is_shape(shape), "an array's state")
    size = math.prod(shape) * dtype.value.itemsize
    if size != len(data):
        raise FormatError(f"an array of shape {list(shape)} and {dtype.value.name} has {len(data)} bytes, not {size}")
    budget.take(size)
    array = np.frombuffer(data, dtype.value) if size else np.empty(0, dtype.value)
    return array.astype(dtype.value.newbyteorder("="), copy=False).reshape(shape, order=order)


def are_counts(values: Any) -> bool:
    """Whether it is a sequence of sizes or offsets, a few and none of them negative."""
    return (
        isinstance(values, (list, tuple))
        and len(values) <= 32
        and all(type(n) is int and 0 <= n < 2**60 for n in values)
    )


def is_shape(shape: Any) -> bool:
    """Whether it can be that of an array in NumPy."""
    return isinstance(shape, tuple) and are_counts(shape) and math.prod(max(n, 1) for n in shape) < 2**60


def _plain_globals(budget: Budget) -> dict[str, Global]:
    def encode(text: Any, encoding: Any = None) -> bytes:
        _check(isinstance(text, str) and encoding in ("latin1", "latin-1"), "the argument of _codecs.encode")
        budget.take(len(text))
        return text.encode("latin1")

    def elements(values: Any) -> Any:
        _check(isinstance(values, (list, tuple)), "the argument of a container")
        budget.take(8 * len(values))
        return values

    def ordered_dict(pairs: Any = ()) -> OrderedDict:
        found: OrderedDict = OrderedDict()
        for pair in elements(pairs):
            _check(isinstance(pair, (list, tuple)) and len(pair) == 2, "the argument of a container")
            found[_key(pair[0])] = pair[1]
        return found

    def new_array(kind: Any, *_: Any) -> _Array:
        _check(kind is ndarray, "the type of an array")
        return _Array()

    def scalar(dtype: Any, data: Any) -> Any:
        return _array(data, dtype, (), "C", budget)[()]

    def from_buffer(data: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> _Array:
        found = _Array()
        _check(order in ("C", "F"), "the order of an array")
        found.value = _array(data, dtype, shape, order, budget)
        return found

    def dense_tensor(expression: Any, names: Any) -> Any:
        # Paddle pickles a DenseTensor as eval("data", {"data": array}).
        if expression != "data" or not isinstance(names, dict) or not isinstance(names.get("data"), _Array):
            raise FormatError(
                f"it asks for eval of {shown_name(expression) if isinstance(expression, str) else 'an object'}"
            )
        return names["data"]

    def empty_bytes() -> bytes:
        return b""

    def is_no_function(*_: Any) -> None:
        raise FormatError("it calls numpy.ndarray")

    ndarray = Global(is_no_function)
    found = {
        "_codecs.encode": Global(encode),
        "collections.OrderedDict": Global(ordered_dict),
        "numpy.dtype": Global(_Dtype),
        "numpy.ndarray": ndarray,
    }
    for core in ("numpy.core", "numpy._core"):
        found[f"{core}.multiarray._reconstruct"] = Global(new_array)
        found[f"{core}.multiarray.scalar"] = Global(scalar)
        found[f"{core}.numeric._frombuffer"] = Global(from_buffer)
    for module in ("builtins", "__builtin__"):
        found[f"{module}.tuple"] = Global(lambda values=(): tuple(elements(values)))
        found[f"{module}.set"] = Global(lambda values=(): {_key(value) for value in elements(values)})
        found[f"{module}.frozenset"] = Global(lambda values=(): frozenset(_key(value) for value in elements(values)))
        found[f"{module}.complex"] = Global(_complex)
        found[f"{module}.bytes"] = Global(empty_bytes)
        found[f"{module}.eval"] = Global(dense_tensor)
    return found


def _complex(real: Any, imaginary: Any) -> complex:
    _check(type(real) is float and type(imaginary) is float, "the argument of complex")
    return complex(real, imaginary)


def _key(value: Any) -> Any:
    """Only plain values may be keys: others compare and hash by calling each other, as deep as the file says."""
    if type(value) not in _KEY_TYPES:
        raise FormatError(f"a value of type {type(value).__name__.strip('_')} can't be a key")
    return value


class _Mark:
    __slots__ = ()


_MARK = _Mark()


class Unpickler:
    """Reads pickles that stand one after the other from `file`, whose bytes end at `size`.

    Args:
        file: Opened for reading, at the first pickle.
        size: Where the last byte ends, counted as `file` tells its position.
        budget: Of the whole file.
        more: Stand-ins beside those of Python and NumPy.
        persistent: What a persistent id stands for; None: there are none.
    """

    def __init__(
        self,
        file: BinaryIO,
        size: int,
        budget: Budget,
        more: Globals | None = None,
        persistent: Callable[[Any], Any] | None = None,
    ) -> None:
        self._file = file
        self._left = size - file.tell()
        self._budget = budget
        self._globals: dict[str, Global] = {**_plain_globals(budget), **(more or {})}
        self._persistent = persistent

    def load(self) -> Any:
        """The next pickle's value, in which arrays are still `Unresolved`."""
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        if self._read(1) != b"\x80" or not 2 <= self._read(1)[0] <= 5:
            raise FormatError("it is no pickle of protocol 2 to 5")
        while True:
            code = self._read(1)
            if code == b".":
                value = self._pop()
                if self._stack:
                    raise FormatError("its pickle leaves values over")
                return value
            step = _STEPS.get(code)
            if step is None:
                raise FormatError(f"its pickle has the opcode 0x{code.hex()}, which no file of tensors has")
            step(self)

    def _read(self, count: int) -> bytes:
        if count > self._left:
            raise FormatError("it is not complete")
        self._left -= count
        data = self._file.read(count)
        if len(data) != count:
            raise FormatError("it is not complete")
        return data

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._read(struct.calcsize(form)))[0]

    def _line(self) -> str:
        line = self._file.readline(min(self._left, 1000))
        self._left -= len(line)
        if not line.endswith(b"\n"):
            raise FormatError("it is not complete, or names something very long")
        return line[:-1].decode("utf-8", "backslashreplace")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise FormatError("its pickle takes a value where there is none")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        stack = self._stack
        for i in range(len(stack) - 1, -1, -1):
            if stack[i] is _MARK:
                values = stack[i + 1 :]
                del stack[i:]
                return values
        raise FormatError("its pickle takes a value where there is none")

    def _top(self, *types: type) -> Any:
        if not self._stack or not isinstance(self._stack[-1], types):
            raise FormatError("its pickle fills what is no container")
        return self._stack[-1]

    def _text(self, form: str, encoding: str) -> None:
        self._push(
            self._read(self._number(form)).decode(encoding, "surrogatepass" if encoding == "utf-8" else "strict")
        )

    def _bytes(self, form: str) -> None:
        self._push(self._read(self._number(form)))

    def _long(self, form: str) -> None:
        count = self._number(form)
        if count < 0:
            raise FormatError("it is not complete")
        self._push(int.from_bytes(self._read(count), "little", signed=True))

    def _tuple(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._push(tuple(values[::-1]))

    def _set_items(self, values: list[Any]) -> None:
        found = self._top(dict)
        if len(values) % 2:
            raise FormatError("its pickle has a key without a value")
        for i in range(0, len(values), 2):
            found[_key(values[i])] = values[i + 1]

    def _append(self, values: list[Any]) -> None:
        self._top(list).extend(values)

    def _add(self, values: list[Any]) -> None:
        self._top(set).update(_key(value) for value in values)

    def _put(self, index: int) -> None:
        if not self._stack or self._stack[-1] is _MARK:
            raise FormatError("its pickle takes a value where there is none")
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise FormatError("its pickle takes a value where there is none")
        self._push(self._memo[index])

    def _global(self, module: Any, name: Any) -> None:
        _check(isinstance(module, str) and isinstance(name, str), "a global's name")
        found = self._globals.get(f"{module}.{name}")
        if found is None:
            raise FormatError(
                f"it asks for {shown_name(f'{module}.{name}')}, which is no tensor, array or plain container"
            )
        self._push(found)

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self._global(module, name)

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise FormatError("its pickle calls what is no function")
        try:
            self._push(function(*arguments))
        except TypeError:
            raise FormatError("its pickle calls a function with other arguments than it has") from None

    def _instance(self) -> None:
        arguments = tuple(self._pop_to_mark())
        self._global(self._line(), self._line())
        self._push(arguments)
        self._reduce()

    def _build(self) -> None:
        state = self._pop()
        target = self._pop()
        if isinstance(target, Unresolved):
            target.build(state, self._budget)
        elif not isinstance(target, OrderedDict):  # attributes of an OrderedDict, as PyTorch's _metadata, are left out
            raise FormatError("it sets the state of a value that has none")
        self._push(target)

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise FormatError("its pickle refers to values outside it")
        self._push(self._persistent(self._pop()))


_STEPS: dict[bytes, Callable[[Unpickler], Any]] = {
    b"(": lambda m: m._push(_MARK),
    b"0": lambda m: m._pop_to_mark() if m._stack and m._stack[-1] is _MARK else m._pop(),
    b"1": lambda m: m._pop_to_mark(),
    b"2": lambda m: m._push(m._top(object)),
    b"N": lambda m: m._push(None),
    b"\x88": lambda m: m._push(True),
    b"\x89": lambda m: m._push(False),
    b"J": lambda m: m._push(m._number("<i")),
    b"K": lambda m: m._push(m._number("<B")),
    b"M": lambda m: m._push(m._number("<H")),
    b"\x8a": lambda m: m._long("<B"),
    b"\x8b": lambda m: m._long("<i"),
    b"G": lambda m: m._push(m._number(">d")),
    b"U": lambda m: m._text("<B", "latin1"),
    b"T": lambda m: m._text("<I", "latin1"),
    b"X": lambda m: m._text("<I", "utf-8"),
    b"\x8c": lambda m: m._text("<B", "utf-8"),
    b"\x8d": lambda m: m._text("<Q", "utf-8"),
    b"B": lambda m: m._bytes("<I"),
    b"C": lambda m: m._bytes("<B"),
    b"\x8e": lambda m: m._bytes("<Q"),
    b"\x96": lambda m: m._bytes("<Q"),
    b"\x95": lambda m: m._number("<Q"),
    b")": lambda m: m._push(()),
    b"]": lambda m: m._push([]),
    b"}": lambda m: m._push({}),
    b"\x8f": lambda m: m._push(set()),
    b"t": lambda m: m._push(tuple(m._pop_to_mark())),
    b"\x85": lambda m: m._tuple(1),
    b"\x86": lambda m: m._tuple(2),
    b"\x87": lambda m: m._tuple(3),
    b"l": lambda m: m._push(m._pop_to_mark()),
    b"\x91": lambda m: m._push(frozenset(_key(value) for value in m._pop_to_mark())),
    b"a": lambda m: m._append([m._pop()]),
    b"e": lambda m: m._append(m._pop_to_mark()),
    b"s": lambda m: m._set_items([m._pop(), m._pop()][::-1]),
    b"u": lambda m: m._set_items(m._pop_to_mark()),
    b"\x90": lambda m: m._add(m._pop_to_mark()),
    b"q": lambda m: m._put(m._number("<B")),
    b"r": lambda m: m._put(m._number("<I")),
    b"\x94": lambda m: m._put(len(m._memo)),
    b"h": lambda m: m._get(m._number("<B")),
    b"j": lambda m: m._get(m._number("<I")),
    b"c": lambda m: m._global(m._line(), m._line()),
    b"\x93": lambda m: m._stack_global(),
    b"R": lambda m: m._reduce(),
    b"i": lambda m: m._instance(),
    b"b": lambda m: m._build(),
    b"Q": lambda m: m._persistent_id(),
}


def resolve(value: Any, budget: Budget) -> Any:
    """The value with every `Unresolved` in it replaced, in place where it is a list or dict.

    Each reference to an array counts: a file can refer to one array a thousand times, and a writer writes it each time.
    """
    done: dict[int, Any] = {}
    open_: set = set()

    def visit(value: Any, depth: int) -> Any:
        if isinstance(value, Unresolved):
            found = value.resolved()
            if isinstance(found, np.ndarray):
                budget.take(found.nbytes)
            return found
        if isinstance(value, (Global, _Mark)):
            raise FormatError("it holds a function or type where a value is expected")
        if not isinstance(value, (dict, list, tuple)):
            return value
        if id(value) in done:
            return done[id(value)][1]
        if id(value) in open_ or depth > _MAX_DEPTH:
            raise FormatError(f"its containers are nested more than {_MAX_DEPTH} deep, or hold themselves")
        open_.add(id(value))
        result: Any = value
        if isinstance(value, dict):
            for key in value:
                value[key] = visit(value[key], depth + 1)
        elif isinstance(value, list):
            value[:] = [visit(element, depth + 1) for element in value]
        else:
            result = tuple(visit(element, depth + 1) for element in value)
        open_.discard(id(value))
        done[id(value)] = (value, result)  # the value itself keeps its id from being taken by another
        return result

    return visit(value, 0)
