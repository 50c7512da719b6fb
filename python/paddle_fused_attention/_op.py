"""Loads the operator library and calls the operator custom_fused_attention in each of Paddle's graph modes.

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
import warnings
from glob import glob
from pathlib import Path
from typing import Any, Sequence

import paddle
from paddle.base import core
from paddle.base.dygraph.base import in_to_static_mode
from paddle.base.framework import _dygraph_tracer
from paddle.framework import in_dynamic_or_pir_mode

from . import _amp
from ._block import OF_NUMBERS, OF_SWITCHES, OF_TENSORS, TENSORS, Block
from ._checks import dtype_name

OP_TYPE = "custom_fused_attention"
# The operator without a gradient: Paddle records an operator that has one even where none is wanted.
_FORWARD_OP_TYPE = f"{OP_TYPE}_forward"

# The operator's inputs, in a Block's order. Bit i of the attributes `present` and `needs_grad` belongs to input i.
INPUT_NAMES = (
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
_NORM_INPUTS = range(INPUT_NAMES.index("PreLnScale"), INPUT_NAMES.index("LnBias") + 1)
_MASK_INPUT = INPUT_NAMES.index("AttnMask")
_MASK_BIT = 1 << _MASK_INPUT
ATTRIBUTE_NAMES = (
    "is_test",
    "switches",
    "present",
    "needs_grad",
    "pre_ln_epsilon",
    "ln_epsilon",
    "dropout_rate",
    "attn_dropout_rate",
    "seed",
    "first_head",
    "total_heads",
)

# Bits of the attribute `switches`.
PRE_LAYER_NORM = 1
FINAL_LAYER_NORM = 2
ADD_RESIDUAL = 4
CAUSAL = 8
UPSCALE_IN_TRAIN = 16
SAVE_FOR_BACKWARD = 32
FIXED_SEED = 64
NEEDS_GRAD_HOLDS = 128

# A number for each call with dropout in a static graph. Paddle's passes merge operators with equal inputs and
# attributes, which would give two calls the same dropout masks.
_call_numbers = itertools.count(1)

_ERROR = re.compile(rf"\[{OP_TYPE}\] (ValueError|TypeError): (.*?)(?: \(at [^\n]*\))?(?:\n|$)")
_ERROR_TYPES = {"ValueError": ValueError, "TypeError": TypeError}


def _load() -> Any:
    """Registers the operator and returns its library."""
    rebuild = (
        "Build the package again for the Paddle that is installed:\n"
        "    pip install --force-reinstall --no-deps --no-build-isolation --no-cache-dir paddle-fused-attention\n"
        "(or, in a source checkout: pip install --no-deps --no-build-isolation .)"
    )
    try:
        build = importlib.import_module(f"{__package__}._build_info")  # which the build writes
    except ImportError:
        raise ImportError(f"paddle_fused_attention has not been built. {rebuild}") from None
    installed = (paddle.__version__, paddle.is_compiled_with_cuda())
    built_for = (build.PADDLE_VERSION, build.WITH_CUDA)
    if installed != built_for:
        kinds = {True: "with CUDA", False: "for the CPU"}
        raise ImportError(
            f"paddle_fused_attention was built for Paddle {built_for[0]} {kinds[built_for[1]]}, but the Paddle that "
            f"is installed is {installed[0]} {kinds[installed[1]]}. {rebuild}"
        )
    libraries = glob(str(Path(__file__).with_name("_C*.so")))
    if not libraries:
        raise ImportError(f"paddle_fused_attention: its operator library _C.so is missing. {rebuild}")
    # Paddle's own function for this, in utils.cpp_extension, would require setuptools at run time.
    registered = core.load_op_meta_info_and_register_op(libraries[0])
    # Since Paddle 3.2 the registration returns the new operators' names, which the next call takes.
    names = () if registered is None else (registered,)
    paddle.base.framework.OpProtoHolder.instance().update_op_proto(*names)
    # to_static with full_graph=False must run these files as they are: Paddle 2.6 resumes wrongly in the middle of
    # functions with keyword-only arguments, and 3.3 never ends over some jumps.
    core.eval_frame_skip_file_prefix((f"{Path(__file__).parent}{os.sep}",))
    return ctypes.CDLL(libraries[0])


library = _load()
_check_inputs = library.custom_fused_attention_check  # of the inputs of a static graph
_check_inputs.restype = ctypes.c_char_p

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


def _raise_checked(message: str) -> None:
    """Raises what the operator's checks found as ValueError or TypeError; returns if the message is not theirs."""
    found = _ERROR.search(message)
    if found is not None:
        raise _ERROR_TYPES[found.group(1)](found.group(2)) from None


@paddle.jit.not_to_static
def fused_attention(block: Block, first_head: int = 0, total_heads: int = 0) -> Any:
    """Calls the operator and returns Out.

    If `total_heads` is not 0, the weights hold only the heads from `first_head` on of a layer with that many heads, and
    Out is their part of a sum.
    """
    fields: Any = block
    inputs, numbers = fields[OF_TENSORS], fields[OF_NUMBERS]
    pre_layer_norm, training, final_layer_norm, add_residual, causal, mode, seed = fields[OF_SWITCHES]
    is_test = not training
    switches = 0
    if pre_layer_norm:
        switches |= PRE_LAYER_NORM
    if final_layer_norm:
        switches |= FINAL_LAYER_NORM
    if add_residual:
        switches |= ADD_RESIDUAL
    if causal:
        switches |= CAUSAL
    if mode == "upscale_in_train":
        switches |= UPSCALE_IN_TRAIN
    if seed is None:
        seed = 0
    else:
        switches |= FIXED_SEED

    tracer = _dygraph_tracer()  # None while a static graph is built
    if tracer is None:
        check_graph(TENSORS, inputs)
        wants_grad = _wants_grad_static(inputs)  # before they are cast
    amp_dtype = _amp.target_dtype(OP_TYPE, tracer)
    if amp_dtype is not None:
        try:
            inputs = tuple(_amp.cast_inputs(inputs, _NORM_INPUTS, _MASK_INPUT, amp_dtype))
        except Exception:
            check_tensors(TENSORS, inputs)
            raise
    if tracer is not None:
        return _call_eager(inputs, is_test, switches, (*_float_bits(numbers), seed, first_head, total_heads))

    present = _present(inputs)
    check_shapes(inputs, first_head, total_heads)
    drops = not is_test and (numbers[2] > 0 or numbers[3] > 0)
    if drops and not switches & FIXED_SEED:
        seed = next(_call_numbers)
    constants = (*_float_bits(numbers), seed, first_head, total_heads)
    # All gradients: what is frozen now may be trained when the program runs.
    attributes = (is_test, switches | SAVE_FOR_BACKWARD, present, present, *constants)
    out = _call_pir(inputs, attributes) if in_dynamic_or_pir_mode() else _append_to_program(inputs, attributes)
    if not wants_grad:
        out.stop_gradient = True
    return out


def _call_eager(inputs: Sequence[Any], is_test: bool, switches: int, constants: tuple) -> Any:
    absent = _absent_eager()
    tensors = []
    present = 0
    needs_grad = 0
    bit = 1
    for tensor in inputs:
        if tensor is None:
            tensors.append(absent)
        else:
            tensors.append(tensor)
            present |= bit
            if not tensor.stop_gradient:
                needs_grad |= bit
        bit <<= 1
    if needs_grad and paddle.is_grad_enabled():
        if needs_grad & _MASK_BIT:
            needs_grad ^= _MASK_BIT
            _warn_of_mask(inputs[_MASK_INPUT])
        switches |= NEEDS_GRAD_HOLDS if is_test else NEEDS_GRAD_HOLDS | SAVE_FOR_BACKWARD
        op_type = OP_TYPE if needs_grad else _FORWARD_OP_TYPE
    else:
        op_type = _FORWARD_OP_TYPE
    try:
        return _run_custom_op(op_type, *tensors, is_test, switches, present, needs_grad, *constants)[0]
    except Exception as error:
        _raise_checked(str(error))
        check_tensors(TENSORS, inputs)
        raise


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


def _wants_grad_static(inputs: Sequence[Any]) -> bool:
    """Whether the result may have a gradient, as with Paddle's own operators: on Paddle 2.6 they give one under no_grad
    too."""
    wanted = [value is not None and not value.stop_gradient for value in inputs]
    if in_dynamic_or_pir_mode() and not paddle.is_grad_enabled():
        return False
    if wanted[_MASK_INPUT]:
        _warn_of_mask(inputs[_MASK_INPUT])
    return any(wanted[:_MASK_INPUT])


def _warn_of_mask(mask: Any) -> None:
    """Says, once, that a float mask that wants a gradient gets none."""
    global _has_warned_of_mask
    if _has_warned_of_mask or not paddle.is_floating_point(mask):
        return
    _has_warned_of_mask = True
    warnings.warn(
        "attn_mask: its stop_gradient is False, but paddle_fused_attention computes no gradient of the mask: what it "
        "is made of will not be trained through it. Set its stop_gradient to True if that is meant.",
        UserWarning,
        stacklevel=4,
    )


_has_warned_of_mask = False


def _present(inputs: Sequence[Any]) -> int:
    return sum(1 << i for i, value in enumerate(inputs) if value is not None)


def check_shapes(inputs: Sequence[Any], first_head: int = 0, total_heads: int = 0) -> None:
    """Refuses shapes and dtypes that the operator does not take, before there are values."""
    shapes = [[] if value is None else list(value.shape) for value in inputs]
    dimensions = [size for shape in shapes for size in shape]
    dtypes = [b"" if value is None else dtype_name(value).encode() for value in inputs]
    attributes = dict.fromkeys(ATTRIBUTE_NAMES, 0)
    attributes.update(present=_present(inputs), first_head=first_head, total_heads=total_heads)
    message = _check_inputs(
        (ctypes.c_int64 * len(dimensions))(*dimensions),
        (ctypes.c_int32 * len(shapes))(*map(len, shapes)),
        (ctypes.c_char_p * len(dtypes))(*dtypes),
        (ctypes.c_int64 * len(attributes))(*attributes.values()),
    )
    if message is not None:
        _raise_checked(message.decode())


def _call_pir(inputs: Sequence[Any], attributes: tuple) -> Any:
    absent = None
    values = []
    for value in inputs:
        if value is None:
            if absent is None:
                absent = paddle.full([1], 0.0, dtype="float32")
                absent.stop_gradient = True
            value = absent
        values.append(value)
    op_type = OP_TYPE if paddle.is_grad_enabled() else _FORWARD_OP_TYPE
    return _run_custom_op(op_type, *values, *attributes)[0]


def _append_to_program(inputs: Sequence[Any], attributes: tuple) -> Any:
    """Adds the operator to a static graph of Paddle 2.6. There append_backward fails if an input has stop_gradient set,
    so such inputs and the placeholders go in as copies without it."""
    from paddle.base.layer_helper import LayerHelper

    helper = LayerHelper(OP_TYPE)
    variables = {}
    for name, value in zip(INPUT_NAMES, inputs):
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
        type=OP_TYPE,
        inputs=variables,
        outputs={"Out": [out], "Saved": [saved]},
        attrs=dict(zip(ATTRIBUTE_NAMES, attributes)),
    )
    return out
