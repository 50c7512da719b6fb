"""Loads the operator library and calls its operators in each of Paddle's graph modes.

The library is compiled for one version of Paddle. Another version would load it and misbehave, so the versions are
compared first.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import itertools
import os
import re
import struct
from glob import glob
from pathlib import Path
from typing import Any, Sequence

import paddle
from paddle.base import core
from paddle.base.dygraph.base import in_to_static_mode
from paddle.base.framework import _dygraph_tracer
from paddle.framework import in_dynamic_or_pir_mode
from paddle.profiler import utils as _profiler

from . import _amp
from ._block import OF_NUMBERS, OF_TENSORS, PLAIN_SCORES, TENSORS, Block
from ._checks import dtype_name
from ._descriptions import MODES

# Bits of the attribute `switches`.
PRE_LAYER_NORM = 1
FINAL_LAYER_NORM = 2
ADD_RESIDUAL = 4
CAUSAL = 8
UPSCALE_IN_TRAIN = 16
SAVE_FOR_BACKWARD = 32
FIXED_SEED = 64
NEEDS_GRAD_HOLDS = 128
GATED = 256
TRANSPOSE_X = 512
TRANSPOSE_WEIGHT = 1024
KEYS_BY_HEAD = 2048
SAVE_ALWAYS = 4096

# The scale that stands for head_dim ** -0.5, which is not always known while a graph is built.
DEFAULT_SCALE = float("nan")

# A number for each call with dropout in a static graph. Paddle's passes merge operators with equal inputs and
# attributes, which would give two calls the same dropout masks.
_call_numbers = itertools.count(1)

_ERROR = re.compile(r"\[custom_\w+\] (ValueError|TypeError): (.*?)(?: \(at [^\n]*\))?(?:\n|$)")
_ERROR_TYPES = {"ValueError": ValueError, "TypeError": TypeError}


def _rebuild() -> str:
    """The command that builds the package again."""
    # Nothing but this message needs them.
    import importlib.metadata
    import json
    import shlex
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    advice = "Build the package again for the Paddle that is installed:\n    "
    sources = Path(__file__).parents[2]
    if (sources / "setup.py").exists():  # imported from there
        return f"{advice}cd {shlex.quote(str(sources))} && python setup.py build_ext --inplace"
    try:  # what pip installed from a folder says which
        record = importlib.metadata.distribution("paddle-fused-attention").read_text("direct_url.json")
        sources = Path(url2pathname(urlsplit(json.loads(record or "")["url"]).path))
    except (importlib.metadata.PackageNotFoundError, ValueError, KeyError):
        pass
    install = "pip install --force-reinstall --no-deps --no-build-isolation --no-cache-dir"
    if (sources / "setup.py").exists():
        return f"{advice}{install} {shlex.quote(str(sources))}"
    return f"{advice}{install} .    (in the folder of its sources)"


def _load() -> Any:
    """Registers the operator and returns its library."""
    try:
        build = importlib.import_module(f"{__package__}._build_info")  # which the build writes
    except ImportError:
        raise ImportError(f"paddle_fused_attention has not been built. {_rebuild()}") from None
    installed = (paddle.__version__, paddle.is_compiled_with_cuda())
    built_for = (build.PADDLE_VERSION, build.WITH_CUDA)
    if installed != built_for:
        kinds = {True: "with CUDA", False: "for the CPU"}
        raise ImportError(
            f"paddle_fused_attention was built for Paddle {built_for[0]} {kinds[built_for[1]]}, but the Paddle that "
            f"is installed is {installed[0]} {kinds[installed[1]]}. {_rebuild()}"
        )
    libraries = glob(str(Path(__file__).with_name("_C*.so")))
    if not libraries:
        raise ImportError(f"paddle_fused_attention: its operator library _C.so is missing. {_rebuild()}")
    # Paddle's own function for this, in utils.cpp_extension, would require setuptools at run time.
    registered = core.load_op_meta_info_and_register_op(libraries[0])
    # Since Paddle 3.2 the registration returns the new operators' names, which the next call takes.
    names = () if registered is None else (registered,)
    paddle.base.framework.OpProtoHolder.instance().update_op_proto(*names)
    # to_static with full_graph=False must run these files as they are: Paddle 2.6 resumes wrongly in the middle of
    # functions with keyword-only arguments, and 3.3 never ends over some jumps.
    core.eval_frame_skip_file_prefix((f"{Path(__file__).parent}{os.sep}",))
    return ctypes.PyDLL(libraries[0])


library = _load()

_run_custom_op = getattr(paddle._C_ops, "_run_custom_op", None) or core.eager._run_custom_op
_absent_tensor: Any = None


def _absent_eager() -> Any:
    """The placeholder of absent inputs in dygraph. The kernels never read it, so one on the CPU serves every device."""
    global _absent_tensor
    # Paddle makes this very object an auto-parallel tensor when it comes beside such tensors.
    if _absent_tensor is None or _absent_tensor.is_dist():
        _absent_tensor = paddle.to_tensor([0.0], dtype="float32", place=paddle.CPUPlace())
    return _absent_tensor


@functools.lru_cache(maxsize=256)
def _float_bits(numbers: tuple[float, ...]) -> tuple[int, ...]:
    """The bits of float64 numbers as int64: custom operators have no float64 attribute on Paddle 2.6."""
    return struct.unpack(f"<{len(numbers)}q", struct.pack(f"<{len(numbers)}d", *numbers))


@functools.lru_cache(maxsize=256)
def _bytes_of(common: tuple[int, ...], numbers: tuple[float, ...], integers: tuple[int, ...]) -> bytes:
    """An operator's attributes as the library reads them: int64 and float64."""
    return struct.pack(f"<{len(common)}q{len(numbers)}d{len(integers)}q", *common, *numbers, *integers)


_NO_TENSOR = ctypes.py_object(None)


def _raise_checked(message: str) -> None:
    """Raises what the operators' checks found as ValueError or TypeError; returns if the message is not theirs."""
    found = _ERROR.search(message)
    if found is not None:
        raise _ERROR_TYPES[found.group(1)](found.group(2)) from None


class Operator:
    """An operator of the library: its names, and its call in dygraph, in PIR and in legacy programs.

    Beside it there is one of the same inputs and attributes without a gradient, `<op_type>_forward`: Paddle records an
    operator that has a gradient even where none is wanted.

    Args:
        op_type: Its name.
        tensors: What errors call its inputs, in order. Bit i of the attributes `present` and `needs_grad` belongs to
            input i.
        input_names: The inputs' names in a program.
        numbers: The names of its float attributes, which are handed on as their bits.
        integers: The names of the attributes after these. The first is the seed if there is dropout.
        norms: The inputs that are layer-norm parameters, by their names among `tensors`.
        residual: The inputs of one dtype, float32 if one of them is, under auto_cast.
        like_residual: The inputs that are float32 if these are.
        mask: The input that is a mask, which auto_cast leaves as it is. It may be of integers, which have no gradient;
            where a graph is built it gets one only if it wants one then.
        differentiable: How many of the inputs, the first, have gradients; None: all.
        listed_as: The operator whose name in the lists of auto_cast stands for this one too; None: this one.
    """

    def __init__(
        self,
        op_type: str,
        tensors: Sequence[str],
        input_names: Sequence[str],
        numbers: Sequence[str],
        integers: Sequence[str],
        norms: Sequence[str] = (),
        residual: Sequence[str] = (),
        like_residual: Sequence[str] = (),
        mask: str | None = None,
        differentiable: int | None = None,
        listed_as: str | None = None,
    ) -> None:
        self.type = op_type
        self._forward_type = f"{op_type}_forward"
        self._listed_as = listed_as or op_type
        self.tensors = tuple(tensors)
        self._input_names = tuple(input_names)
        self._attribute_names = ("is_test", "switches", "present", "needs_grad", *numbers, *integers)
        self._rates = tuple(i for i, name in enumerate(numbers) if name.endswith("_rate"))
        self._norms = tuple(map(self.tensors.index, norms))
        self._residual = tuple(map(self.tensors.index, residual))
        self._like_residual = tuple(map(self.tensors.index, like_residual))
        self._mask = None if mask is None else self.tensors.index(mask)
        self._mask_bit = 0 if self._mask is None else 1 << self._mask
        every_bit = (1 << len(self.tensors)) - 1
        self._gradient_bits = every_bit if differentiable is None else (1 << differentiable) - 1
        self._special_bits = self._mask_bit | (every_bit ^ self._gradient_bits)
        self._check = library[f"{op_type}_check"]  # of the inputs of a static graph
        self._check.restype = ctypes.c_char_p
        self._call_directly = library[f"{op_type}_direct"]
        self._call_directly.restype = ctypes.py_object
        self._objects = ctypes.py_object * len(self.tensors)

    def call(self, *arguments: Any) -> Any:
        """Calls the operator, with the arguments of :meth:`outputs`, and returns Out."""
        return self.outputs(*arguments)[0]

    def outputs(
        self,
        inputs: Sequence[Any],
        training: bool,
        switches: int,
        numbers: tuple[float, ...],
        integers: tuple[int, ...],
    ) -> Sequence[Any]:
        """Calls the operator and returns Out and, with SAVE_ALWAYS, what it saved. An input may be None."""
        tracer = _dygraph_tracer()
        if tracer is None:
            return self._call_static(inputs, training, switches, numbers, integers)
        amp_dtype = _amp.target_dtype(self._listed_as, tracer)
        if amp_dtype is not None:
            inputs = self._cast(inputs, amp_dtype)
        present = 0
        needs_grad = 0
        bit = 1
        for tensor in inputs:
            if tensor is not None:
                present |= bit
                if not tensor.stop_gradient:
                    needs_grad |= bit
                    if not tensor._is_initialized():  # Paddle's record of gradients ends the process at such a one
                        check_tensors(self.tensors, inputs)
            bit <<= 1
        op_type = self.type if switches & SAVE_ALWAYS else self._forward_type
        if needs_grad and paddle.is_grad_enabled():
            if needs_grad & self._special_bits:
                needs_grad = self._with_gradient(needs_grad, inputs)
            switches |= NEEDS_GRAD_HOLDS | SAVE_FOR_BACKWARD if training else NEEDS_GRAD_HOLDS
            if needs_grad:
                op_type = self.type
        if op_type != self.type and not _profiler._is_profiler_used:
            attributes = _bytes_of((not training, switches, present, needs_grad), numbers, integers)
            out = self._call_directly(self._objects(*inputs), attributes, _NO_TENSOR)
            if out is not None:
                return (out,)
        absent = _absent_eager()
        tensors = [absent if tensor is None else tensor for tensor in inputs]
        try:
            outputs = _run_custom_op(
                op_type, *tensors, not training, switches, present, needs_grad, *_float_bits(numbers), *integers
            )
        except Exception as error:
            _raise_checked(str(error))
            check_tensors(self.tensors, inputs)
            self._raise_with_shapes(error, inputs)
            raise
        if op_type == self.type and not (needs_grad and paddle.is_grad_enabled()):
            return [output.detach() for output in outputs]  # of what Paddle has recorded nevertheless
        return outputs

    def _raise_with_shapes(self, error: Exception, inputs: Sequence[Any]) -> None:
        """Raises what Paddle says of memory, too little or less than a view claims, with the inputs' names."""
        found = str(error).split("\n")[0]
        is_short = isinstance(error, MemoryError) or "ResourceExhausted" in str(error)  # which is OSError on Paddle 2.6
        if is_short or "the size of its memory" in found:
            shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in zip(self.tensors, inputs) if t is not None)
            kind = MemoryError if is_short else ValueError
            raise kind(f"{self.tensors[0]}: expected tensors that memory holds, got {shapes}: {found}") from None

    def _call_static(
        self, inputs: Sequence[Any], training: bool, switches: int, numbers: tuple, integers: tuple
    ) -> Sequence[Any]:
        check_graph(self.tensors, inputs)
        wants_grad = self._wants_grad_static(inputs)  # before they are cast
        amp_dtype = _amp.target_dtype(self._listed_as, None)
        if amp_dtype is not None:
            inputs = self._cast(inputs, amp_dtype)
        if training and not switches & FIXED_SEED and any(numbers[i] > 0.0 for i in self._rates):
            integers = (next(_call_numbers), *integers[1:])
        attributes = self._static_attributes(inputs, training, switches, numbers, integers)
        self._check_attributes(inputs, attributes)
        call = self._call_pir if in_dynamic_or_pir_mode() else self._append_to_program
        outputs = call(inputs, attributes, switches & SAVE_ALWAYS)
        if not wants_grad:
            outputs[0].stop_gradient = True
        return outputs

    def _cast(self, inputs: Sequence[Any], dtype: Any) -> list[Any]:
        try:
            return _amp.cast_inputs(inputs, self._norms, self._residual, self._like_residual, self._mask, dtype)
        except Exception:
            check_tensors(self.tensors, inputs)
            raise

    def check(self, *arguments: Any) -> None:
        """Refuses shapes and dtypes that the operator does not take, before there are values. The arguments are those
        of a call."""
        self._check_attributes(arguments[0], self._static_attributes(*arguments))

    def checked_inputs(self, inputs: Sequence[Any], *others: Any) -> Sequence[Any]:
        """The inputs as auto_cast wants them, checked as by a call with these arguments, for ordinary ops in the
        operator's place."""
        check_tensors(self.tensors, inputs)
        amp_dtype = _amp.target_dtype(self._listed_as, _dygraph_tracer())
        if amp_dtype is not None:
            inputs = self._cast(inputs, amp_dtype)
        self.check(inputs, *others)
        return inputs

    def _static_attributes(
        self, inputs: Sequence[Any], training: bool, switches: int, numbers: tuple, integers: tuple
    ) -> tuple:
        present = sum(1 << i for i, value in enumerate(inputs) if value is not None)
        # All gradients: what is frozen now may be trained when the program runs. But that of a constant mask.
        needs_grad = present
        if self._mask is not None and is_constant_mask(inputs[self._mask]):
            needs_grad &= ~self._mask_bit
        return (not training, switches | SAVE_FOR_BACKWARD, present, needs_grad, *_float_bits(numbers), *integers)

    def _check_attributes(self, inputs: Sequence[Any], attributes: tuple) -> None:
        shapes = [[] if value is None else list(value.shape) for value in inputs]
        dimensions = [size for shape in shapes for size in shape]
        dtypes = [b"" if value is None else dtype_name(value).encode() for value in inputs]
        message = self._check(
            (ctypes.c_int64 * len(dimensions))(*dimensions),
            (ctypes.c_int32 * len(shapes))(*map(len, shapes)),
            (ctypes.c_char_p * len(dtypes))(*dtypes),
            (ctypes.c_int64 * len(attributes))(*attributes),
        )
        if message is not None:
            _raise_checked(message.decode())

    def _wants_grad_static(self, inputs: Sequence[Any]) -> bool:
        """Whether the result may have a gradient, as with Paddle's own operators: on Paddle 2.6 they give one under
        no_grad too."""
        if in_dynamic_or_pir_mode() and not paddle.is_grad_enabled():
            return False
        wanted = sum(1 << i for i, value in enumerate(inputs) if value is not None and not value.stop_gradient)
        return self._with_gradient(wanted, inputs) != 0

    def _with_gradient(self, wanted: int, inputs: Sequence[Any]) -> int:
        """Of the inputs at the bits `wanted`, those that have a gradient."""
        if wanted & self._mask_bit and is_constant_mask(inputs[self._mask]):  # type: ignore[index]
            wanted ^= self._mask_bit
        return wanted & self._gradient_bits

    def _call_pir(self, inputs: Sequence[Any], attributes: tuple, saves_always: int) -> Sequence[Any]:
        absent = None
        values = []
        for i, value in enumerate(inputs):
            if i == self._mask and value is not None and value.persistable and value.stop_gradient:
                value = paddle.assign(value)  # a frozen parameter is not trained through this graph later either
                value.stop_gradient = True
            if value is None:
                if absent is None:
                    absent = paddle.full([1], 0.0, dtype="float32")
                    absent.stop_gradient = True
                value = absent
            values.append(value)
        op_type = self.type if saves_always or paddle.is_grad_enabled() else self._forward_type
        return _run_custom_op(op_type, *values, *attributes)

    def _append_to_program(self, inputs: Sequence[Any], attributes: tuple, _: int) -> Sequence[Any]:
        """Adds the operator to a static graph of Paddle 2.6. There append_backward fails if an input has stop_gradient
        set, so such inputs and the placeholders go in as copies without it."""
        from paddle.base.layer_helper import LayerHelper

        helper = LayerHelper(self.type)
        variables = {}
        for name, value in zip(self._input_names, inputs):
            if value is None:
                value = paddle.full([1], 0.0, dtype="float32")
                value.stop_gradient = False
            elif value.stop_gradient:
                # assign has no int16, of which only a mask can be: of that only whether an element is 0 counts.
                value = value.cast("int32") if value.dtype == paddle.int16 else paddle.assign(value)
                value.stop_gradient = False
            variables[name] = [value]
        out = helper.create_variable_for_type_inference(dtype=inputs[0].dtype)
        saved = helper.create_variable_for_type_inference(dtype="uint8")
        helper.append_op(
            type=self.type,
            inputs=variables,
            outputs={"Out": [out], "Saved": [saved]},
            attrs=dict(zip(self._attribute_names, attributes)),
        )
        return out, saved


_BLOCK_INPUTS = (
    "X",
    "QKVWeight",
    "LinearWeight",
    "PreLnScale",
    "PreLnBias",
    "LnScale",
    "LnBias",
    "QKVBias",
    "LinearBias",
    "AttnMask",
)
_BLOCK_NUMBERS = ("pre_ln_epsilon", "ln_epsilon", "dropout_rate", "attn_dropout_rate")
_BLOCK_INTEGERS = ("seed", "first_head", "total_heads")
_BLOCK_NORMS = ("pre_ln_scale", "pre_ln_bias", "ln_scale", "ln_bias")

# The operator of most blocks, as programs that were saved know it, and that of all blocks.
ATTENTION = Operator(
    "custom_fused_attention",
    TENSORS,
    _BLOCK_INPUTS,
    _BLOCK_NUMBERS,
    _BLOCK_INTEGERS,
    norms=_BLOCK_NORMS,
    residual=("x",),
    mask="attn_mask",
)
GENERAL_ATTENTION = Operator(
    "custom_fused_attention_general",
    (*TENSORS, "cu_seqlens"),
    (*_BLOCK_INPUTS, "CuSeqlens"),
    _BLOCK_NUMBERS,
    (*_BLOCK_INTEGERS, "scale", "window_left", "window_right", "max_seqlen"),
    norms=_BLOCK_NORMS,
    residual=("x",),
    mask="attn_mask",
    differentiable=len(TENSORS),
    listed_as=ATTENTION.type,
)


def switches_of_block(description: Any) -> int:
    """The bits of what the descriptions of the attention and of the feed-forward block have in common."""
    switches = FIXED_SEED if description.seed is not None else 0
    if description.pre_layer_norm:
        switches |= PRE_LAYER_NORM
    if description.final_layer_norm:
        switches |= FINAL_LAYER_NORM
    if description.add_residual:
        switches |= ADD_RESIDUAL
    if description.mode == MODES[0]:
        switches |= UPSCALE_IN_TRAIN
    return switches


def _attention_call(block: Block, first_head: int, total_heads: int) -> tuple[Operator, tuple]:
    """The operator of a block, and the arguments of its call."""
    fields: Any = block
    if block.scores is PLAIN_SCORES and len(block.qkv_weight.shape) != 3 and is_constant_mask(block.attn_mask):
        integers = (block.seed or 0, first_head, total_heads)
        return ATTENTION, (fields[OF_TENSORS], block.training, _switches_of(block), fields[OF_NUMBERS], integers)
    return GENERAL_ATTENTION, _general_arguments(block, first_head, total_heads)


def _switches_of(block: Block) -> int:
    return switches_of_block(block) | (CAUSAL if block.causal else 0)


def _general_arguments(block: Block, first_head: int, total_heads: int) -> tuple:
    """Those of a call of GENERAL_ATTENTION."""
    fields: Any = block
    scale, window, longest = block.scores
    scale_bits = _float_bits((DEFAULT_SCALE if scale is None else scale,))
    integers = (block.seed or 0, first_head, total_heads, *scale_bits, *window, longest or 0)
    inputs = (*fields[OF_TENSORS], block.cu_seqlens)
    return inputs, block.training, _switches_of(block), fields[OF_NUMBERS], integers


@paddle.jit.not_to_static
def fused_attention(block: Block, first_head: int = 0, total_heads: int = 0) -> Any:
    """Computes a checked block by the operator.

    If `total_heads` is not 0, the weights hold only the heads from `first_head` on of a layer with that many heads, and
    the result is their part of a sum.
    """
    operator, arguments = _attention_call(block, first_head, total_heads)
    return operator.call(*arguments)


_call_cached = library["custom_fused_attention_cached"]
_call_cached.restype = ctypes.py_object
_CACHED_INPUTS = ctypes.py_object * (len(TENSORS) + 3)  # with cu_seqlens, and the cache's key and value


def fused_attention_with_cache(block: Block, cache: Any, is_static: bool) -> Any:
    """Computes a checked block with a cache by one call of the library: in dygraph on the CPU, where nobody wants a
    gradient and nothing is dropped. Its host time is a fraction of that of the smaller operators.

    Args:
        cache: Keys and values as a pair or one tensor, as ``_composed_attention.Source`` has them.
        is_static: Whether they are all that there are.

    Returns:
        A tuple of the result and, unless the cache is static, the tensor or tensors of the new cache; None where the
        smaller operators serve, or raise what is wrong.
    """
    tracer = _dygraph_tracer()
    if tracer is None or _profiler._is_profiler_used or _amp.target_dtype(ATTENTION.type, tracer) is not None:
        return None
    inputs, training, switches, numbers, integers = _general_arguments(block, 0, 0)
    inputs = (*inputs, *(cache if isinstance(cache, tuple) else (cache, None)))
    if paddle.is_grad_enabled() and any(tensor is not None and not tensor.stop_gradient for tensor in inputs):
        return None
    present = sum(1 << i for i, tensor in enumerate(inputs[:-2]) if tensor is not None)
    attributes = _bytes_of((not training, switches, present, 0), numbers, integers)
    found = _call_cached(_CACHED_INPUTS(*inputs), attributes, is_static, _NO_TENSOR)
    if found is not None:
        return found
    try:  # a token of several sequences is a view
        if block.x.is_contiguous() or not block.x.place.is_cpu_place():
            return None
        x = block.x.contiguous()
    except Exception:  # of a tensor that is not dense, or claims more memory than there is
        return None
    return _call_cached(_CACHED_INPUTS(x, *inputs[1:]), attributes, is_static, _NO_TENSOR)


def checked_block(block: Block, first_head: int = 0, total_heads: int = 0) -> Block:
    """The block with its tensors as auto_cast wants them, checked as by the operator, for what stands in its place."""
    operator, arguments = _attention_call(block, first_head, total_heads)
    fields: Any = block
    inputs = operator.checked_inputs(*arguments)[OF_TENSORS]
    return Block._make((*inputs, *fields[OF_TENSORS.stop :]))


def check_graph(names: Sequence[str], values: Sequence[Any]) -> None:
    """Refuses what is no dense variable of a static graph. to_static also takes dygraph's tensors, which become
    constants."""
    takes_eager = in_to_static_mode()
    for name, value in zip(names, values):
        if value is None:
            continue
        if isinstance(value, core.eager.Tensor):
            if not takes_eager:
                raise TypeError(
                    f"{name}: expected a variable of the static graph, got a dygraph Tensor: make tensors and layers "
                    "after paddle.enable_static()"
                )
        elif not _is_dense_variable(value):
            raise TypeError(f"{name}: expected a dense tensor, got {value}")


def _is_dense_variable(value: Any) -> bool:
    if isinstance(value, paddle.static.Variable):
        return value.type == core.VarDesc.VarType.LOD_TENSOR
    return value.is_dense_tensor_type() or value.is_dist_dense_tensor_type()


def check_tensors(names: Sequence[str], values: Sequence[Any]) -> None:
    """Refuses tensors with which Paddle's own operators may end the process. Ours checks its inputs itself in
    dygraph."""
    if _dygraph_tracer() is None:
        check_graph(names, values)
        return
    for name, value in zip(names, values):
        if value is None:
            continue
        if not isinstance(value, core.eager.Tensor):
            raise TypeError(f"{name}: expected a dygraph Tensor, got a variable of a static graph")
        if value.is_selected_rows() or value.is_sparse():
            kind = "SelectedRows" if value.is_selected_rows() else "a sparse tensor"
            raise TypeError(f"{name}: expected a dense tensor, got {kind}")
        if not value._is_initialized() and 0 not in value.shape:
            raise ValueError(f"{name}: expected a tensor with values, got one without memory")


def is_constant_mask(mask: Any) -> bool:
    """Whether a mask gets no gradient."""
    return mask is None or mask.stop_gradient or not paddle.is_floating_point(mask)
