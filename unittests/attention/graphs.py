"""Runs attention by itself in each of Paddle's graph modes. Everything goes in and comes out as NumPy."""

import attention_cases
import attention_reference
import paddle
import pytest
from paddle_fused_attention._attention import Attention, attention
from runners import static_mode, to_tensors

GRAPHS = pytest.mark.parametrize("graph", ["dygraph", "full_graph", "program"])


def describe(tensors, config, longest=(0, 0), **changes):
    """The description of the config, of tensors or variables by name."""
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "offset"}
    if fields["scale"] is None:
        fields["scale"] = tensors["query"].shape[-1] ** -0.5
    if "cu_seqlens_q" in tensors:
        fields.update(max_seqlen_q=longest[0], max_seqlen_k=longest[1])
    return Attention(**tensors, **{**fields, **changes}).checked()


def call(*arguments, **changes):
    """The result of what `describe` makes of the arguments."""
    return attention(describe(*arguments, **changes))


class _Traced(paddle.nn.Layer):
    """A function of tensors for to_static, which on Paddle 2.6 does not find what a function has around it."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, tensors):
        return self.function(tensors)


def run(graph, function, arrays, wanted, place, unknown=()):
    """The result of a function of a dict of tensors, and the `wanted` gradients, by the d_out among the arrays. In a
    program, sizes at the axes in `unknown` are declared as -1."""
    if graph == "program":
        return _run_program(function, arrays, wanted, place, unknown)
    tensors = to_tensors(arrays, place, wanted)
    if graph == "full_graph":
        function = paddle.jit.to_static(_Traced(paddle.jit.not_to_static(function)), full_graph=True)
    out = function(tensors)
    if wanted:
        out.backward(paddle.to_tensor(arrays["d_out"], place=place))
    return out.numpy(), {name: tensors[name].grad.numpy() for name in wanted}


def _run_program(function, arrays, wanted, place, unknown):
    feed = {name: a for name, a in arrays.items() if wanted or name != "d_out"}
    with static_mode():
        main = paddle.static.Program()
        with paddle.static.program_guard(main, paddle.static.Program()):
            variables = {}
            for name, a in feed.items():
                shape = [-1 if axis in unknown and size != 1 else size for axis, size in enumerate(a.shape)]
                dtype = "bfloat16" if a.dtype == "uint16" else str(a.dtype)
                variables[name] = paddle.static.data(name, shape, dtype)
                variables[name].stop_gradient = name not in wanted
            out = function({name: variable for name, variable in variables.items() if name != "d_out"})
            fetched = [out]
            if wanted:
                fetched += paddle.static.gradients(
                    [out], [variables[name] for name in wanted], target_gradients=[variables["d_out"]]
                )
        results = paddle.static.Executor(place).run(main, feed=feed, fetch_list=fetched)
    return results[0], dict(zip(wanted, results[1:]))


def check_case(case, place, graph="dygraph", function=None, wanted=None, unknown=()):
    """Runs a case, or a function of its tensors, and compares the result and every gradient, or those `wanted`."""
    inputs = attention_cases.make_inputs(case)
    wanted = attention_cases.differentiable(inputs) if wanted is None else wanted
    function = function or (lambda tensors: call(tensors, case.config, case.lengths and case.longest))
    attention_cases.check(
        case, inputs, *run(graph, function, attention_cases.stored(case, inputs), wanted, place, unknown)
    )


def expected_of(inputs, config):
    return attention_reference.forward({n: a for n, a in inputs.items() if n != "d_out"}, config)
