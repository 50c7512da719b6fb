"""Runs a case through Paddle: dygraph or a static program, on a given device. Everything goes in and comes out as
NumPy.

Only the operator and copies run on the device: gradients start from explicit tensors, never from a loss computed there,
so that the same tests serve on devices where Paddle itself has no kernels.
"""

import contextlib
import functools
from dataclasses import asdict

import common
import numpy as np
import paddle
import reference
from paddle_fused_attention import (
    _attention,
    _feed_forward,
    _op,
    fused_bias_dropout_residual_layer_norm,
    fused_feedforward,
    fused_linear_activation,
    fused_multi_head_attention,
)


def _call_linear(x, weight, bias=None, *, transpose_x, transpose_weight, activation):
    return fused_linear_activation(x, weight, bias, transpose_x, transpose_weight, activation)


_FUNCTIONS = {
    reference.Config: fused_multi_head_attention,
    reference.FeedForwardConfig: fused_feedforward,
    reference.ResidualNormConfig: fused_bias_dropout_residual_layer_norm,
    reference.LinearConfig: _call_linear,
}
_NOT_ARGUMENTS = ("offset", "first_hidden", "total_hidden")


def call(tensors, config, **changes):
    """The public function of the config's block on a dict of tensors (or static variables) by argument name."""
    switches = {name: value for name, value in asdict(config).items() if name not in _NOT_ARGUMENTS}
    switches.update(changes)
    return _FUNCTIONS[type(config)](**{n: t for n, t in tensors.items() if n != "d_out"}, **switches)


@functools.lru_cache(maxsize=None)
def paddle_computes_on(place):
    """Whether Paddle's own kernels work there: those of a Paddle that was not built for the GPU may do nothing and say
    nothing.
    """
    one = paddle.to_tensor([1.0], place=place)
    return (one + one).numpy()[0] == 2.0


def to_tensors(arrays, place, wanted=()):
    return {
        name: paddle.to_tensor(a, place=place, stop_gradient=name not in wanted)
        for name, a in arrays.items()
        if name != "d_out"
    }


def run_dygraph(arrays, config, place, wanted=(), **changes):
    """Result and the `wanted` gradients, as stored; `changes` replace arguments of the call."""
    tensors = to_tensors(arrays, place, wanted)
    out = call(tensors, config, **changes)
    if not wanted:
        return out.numpy(), {}
    d_out = paddle.to_tensor(arrays["d_out"], place=place)
    gradients = paddle.grad([out], [tensors[name] for name in wanted], grad_outputs=[d_out])
    return out.numpy(), {name: g.numpy() for name, g in zip(wanted, gradients)}


@contextlib.contextmanager
def static_mode():
    paddle.enable_static()
    try:
        yield
    finally:
        paddle.disable_static()


def legacy_programs():
    """Programs before PIR, which are all there is on Paddle 2.6."""
    guard = getattr(getattr(paddle, "pir_utils", None), "OldIrGuard", contextlib.nullcontext)
    return guard()


def run_static(arrays, config, place, wanted=(), unknown=(), **changes):
    """As run_dygraph, by a program. Sizes of x, the residual, d_out and the mask at the axes in `unknown` are declared
    as -1.
    """
    feed = {name: a for name, a in arrays.items() if wanted or name != "d_out"}
    with static_mode():
        main = paddle.static.Program()
        with paddle.static.program_guard(main, paddle.static.Program()):
            variables = {}
            for name, a in feed.items():
                shape = list(a.shape)
                if name in ("x", "residual", "d_out"):
                    shape = [-1 if axis in unknown else n for axis, n in enumerate(shape)]
                if name == "attn_mask" and unknown:
                    shape = [n if n == 1 else -1 for n in shape]
                dtype = "bfloat16" if a.dtype == np.uint16 else str(a.dtype)
                variables[name] = paddle.static.data(name, shape, dtype)
                variables[name].stop_gradient = name not in wanted
            out = call(variables, config, **changes)
            fetched = [out]
            if wanted:
                fetched += paddle.static.gradients(
                    [out], [variables[name] for name in wanted], target_gradients=[variables["d_out"]]
                )
        results = paddle.static.Executor(place).run(main, feed=feed, fetch_list=fetched)
    return results[0], dict(zip(wanted, results[1:]))


def as_called(case):
    """The case as the public function can be asked for it: a seed of 64 bits with a sign, and no offset, which is the
    generator's.
    """
    if not hasattr(case.config, "seed"):
        return case
    return case.but(seed=(case.config.seed + 2**63) % 2**64 - 2**63, offset=0)


def check_case(case, place, run=run_dygraph, wanted=None, **changes):
    """Runs a case and compares the result and every gradient, or those `wanted`, with the reference."""
    case = as_called(case)
    inputs = common.make_inputs(case)
    wanted = common.differentiable(inputs) if wanted is None else list(wanted)
    out, gradients = run(common.stored_inputs(case, inputs), case.config, place, wanted, **changes)
    assert list(gradients) == wanted
    check_stored(case, common.expect(case, inputs), out, gradients)


def check_stored(case, expected, out, gradients):
    """Compares arrays as Paddle gives them, whose dtypes are checked too."""
    for name, a in dict(gradients, out=out).items():
        dtype = case.dtype_of("x" if name == "out" else name)
        assert a.dtype == (np.uint16 if dtype == "bfloat16" else np.dtype(dtype)), f"{name}: {a.dtype}"
    common.check(
        case, expected, common.from_storage(out), {name: common.from_storage(g) for name, g in gradients.items()}
    )


@contextlib.contextmanager
def operator_calls():
    """Collects the blocks that the operator is called for, in dygraph and in graphs as they are built."""
    calls, call = [], _op.fused_attention

    def counted(block, *part):
        calls.append(block)
        return call(block, *part)

    _op.fused_attention = counted
    try:
        yield calls
    finally:
        _op.fused_attention = call


@contextlib.contextmanager
def attention_calls():
    """Collects the descriptions of attention by itself that its operator is called for."""
    calls, arguments_of = [], _attention._arguments

    def remembered(description):
        calls.append(description)
        return arguments_of(description)

    _attention._arguments = remembered
    try:
        yield calls
    finally:
        _attention._arguments = arguments_of


@contextlib.contextmanager
def feed_forward_calls():
    """Collects the feed-forwards that the operator is called for, in dygraph and in graphs as they are built."""
    calls, described = [], []
    operator, arguments_of = _feed_forward.FEED_FORWARD, _feed_forward._arguments
    call = operator.call

    def remembered(description, *part):
        described[:] = [description]
        return arguments_of(description, *part)

    def counted(*arguments):
        calls.extend(described)
        return call(*arguments)

    _feed_forward._arguments, operator.call = remembered, counted
    try:
        yield calls
    finally:
        _feed_forward._arguments, operator.call = arguments_of, call
