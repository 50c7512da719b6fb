"""The weights that attention gives to its values, beside its result: against float64 in every graph mode."""

import attention_cases
import numpy as np
import paddle
import pytest
from attention_cases import (
    DTYPES,
    FEATURES,
    FEATURES_OF_WEIGHTS,
    FORM_CASES,
    FORMS,
    FORMS_OF_CASES,
    FULL,
    in_form,
    make_inputs,
    of_weights,
    out_of_form,
    stored,
)
from graphs import GRAPHS, call, describe, run
from paddle_fused_attention import _op
from paddle_fused_attention._attention import WEIGHTS, attention_with_weights
from runners import legacy_programs, static_mode, to_tensors

MIXED = FULL.but(
    queries=70, keys=75, heads=4, head_dim=24, mask="1HQK", causal=True, window_left=65, dropout_rate=0.1, seed=2
)


def with_values(case):
    """Of a WeightsCase its inputs, the function that gives the weights, and arrays for that: values of the operator's
    shape, which say nothing."""
    inputs = make_inputs(case)

    def weights(tensors):
        return attention_with_weights(describe(tensors, case.config))[1]

    arrays = stored(case, inputs)
    arrays.update(value=np.zeros_like(arrays["key"]), d_out=np.ascontiguousarray(arrays["d_out"].swapaxes(1, 2)))
    return inputs, weights, arrays


def check(case, place, graph="dygraph", unknown=(), wanted=None):
    inputs, weights, arrays = with_values(case)
    if wanted is None:
        wanted = attention_cases.differentiable_of_weights(inputs)
    found, gradients = run(graph, weights, arrays, wanted, place, unknown)
    attention_cases.check(case, inputs, found.swapaxes(1, 2), gradients)


@GRAPHS
@pytest.mark.parametrize("feature", FEATURES_OF_WEIGHTS)
def test_features(feature, graph, place):
    check(FEATURES_OF_WEIGHTS[feature], place, graph)


@GRAPHS
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, graph, place):
    check(of_weights(MIXED.but(dtype=dtype)), place, graph)


@pytest.mark.parametrize("sizes", [dict(keys=0), dict(queries=0), dict(batch=0)], ids=str)
def test_nothing_at_all(sizes, place):
    check(of_weights(FULL.but(mask="1HQK", **sizes)), place)


def test_unknown_sizes(place):
    check(of_weights(MIXED.but(mask=None)), place, "program", unknown=(0,))
    check(of_weights(MIXED.but(mask=None)), place, "program", unknown=(0, 1), wanted=[])


@pytest.mark.usefixtures("needs_paddle")
@GRAPHS
def test_both_results_have_gradients(graph, place):
    """The weights by which the values are multiplied anew give the same result, with the same gradients."""
    case = FULL.but(queries=20, keys=35, heads=4, dropout_rate=0.3, seed=5)
    arrays = stored(case, make_inputs(case))

    def both(tensors):
        out, weights = attention_with_weights(describe(tensors, case.config))
        value = paddle.concat([tensors["value"]] * 2, axis=3).reshape([case.batch, case.keys, case.heads, -1])
        again = paddle.matmul(weights, value.transpose([0, 2, 1, 3])).transpose([0, 2, 1, 3])
        return out * 0.25 + again * 0.75

    found = run(graph, both, arrays, ["query", "key", "value"], place)
    attention_cases.check(case, make_inputs(case), *found)


@GRAPHS
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_is_the_same_to_the_bit(dtype, graph, place):
    case = MIXED.but(dtype=dtype)
    arrays = stored(case, make_inputs(case))
    out, _ = run(graph, lambda tensors: call(tensors, case.config), arrays, [], place)
    beside, _ = run(graph, lambda tensors: attention_with_weights(describe(tensors, case.config))[0], arrays, [], place)
    assert np.array_equal(beside, out)


def draws(tensors, config):
    return attention_with_weights(describe(tensors, config, seed=None))


@pytest.mark.usefixtures("needs_paddle")
@GRAPHS
def test_what_is_drawn_is_dropped_from_both(graph, place):
    """Nobody knows the seed, but the two operators."""
    case = FULL.but(queries=40, keys=64, head_dim=64, dropout_rate=0.5)
    arrays = stored(case, make_inputs(case))
    arrays["value"] = np.broadcast_to(np.eye(64)[:, None], arrays["value"].shape).copy()

    def difference(tensors):
        out, weights = draws(tensors, case.config)
        return out.transpose([0, 2, 1, 3]) - weights

    assert abs(run(graph, difference, arrays, [], place)[0]).max() < 1e-12


@pytest.mark.usefixtures("needs_paddle")
@pytest.mark.parametrize("form, name", [pair for pair in FORMS_OF_CASES if not FORM_CASES[pair[1]].lengths])
def test_shared_tensors(form, name, place):
    case = of_weights(FORM_CASES[name])
    inputs, _, arrays = with_values(case)
    shared = in_form(form, arrays)

    def weights(tensors):
        changes = dict(keys_by_head=FORMS[form], num_kv_heads=case.kv_heads)
        return attention_with_weights(describe(tensors, case.config, **changes))[1]

    wanted = [name for name in ("query", "key", "attn_mask") if name in shared]
    found, gradients = run("dygraph", weights, shared, wanted, place)
    gradients.setdefault("value", np.zeros_like(arrays["value"].swapaxes(1, 2) if FORMS[form] else arrays["value"]))
    gradients = out_of_form(form, gradients, case.heads, case.kv_heads)
    assert not gradients.pop("value").any()
    attention_cases.check(case, inputs, found.swapaxes(1, 2), gradients)


def test_nothing_is_recorded_where_no_gradient_is_wanted(place):
    tensors = to_tensors(stored(FULL, make_inputs(FULL)), place, ["query"])
    with paddle.no_grad():
        out, weights = attention_with_weights(describe(tensors, FULL.config))
    assert out.stop_gradient and weights.stop_gradient
    tensors["query"].stop_gradient = True
    out, weights = attention_with_weights(describe(tensors, FULL.config))
    assert out.stop_gradient and weights.stop_gradient


def test_a_program_for_testing(place):
    """The attention saves what its weights are made of there too, and nothing is dropped."""
    case = of_weights(FULL.but(dropout_rate=0.5))
    inputs, weights, arrays = with_values(case)
    del arrays["d_out"]
    with legacy_programs(), static_mode():  # others have no clones for testing
        main = paddle.static.Program()
        with paddle.static.program_guard(main, paddle.static.Program()):
            found = weights({name: paddle.static.data(name, a.shape, str(a.dtype)) for name, a in arrays.items()})
        test = main.clone(for_test=True)
        (result,) = paddle.static.Executor(place).run(test, feed=arrays, fetch_list=[found.name])
    expected = attention_cases.expect(case.but(training=False), inputs).out
    np.testing.assert_allclose(result.swapaxes(1, 2), expected, rtol=0, atol=1e-12)


def test_bad_inputs(place):
    packed = FEATURES["packed"]
    tensors = to_tensors(stored(packed, make_inputs(packed)), place)
    with pytest.raises(NotImplementedError, match="need_weights: expected none beside cu_seqlens"):
        attention_with_weights(describe(tensors, packed.config, packed.longest))
    tensors = to_tensors(stored(FULL, make_inputs(FULL)), place)
    with pytest.raises(ValueError, match="attn_mask: expected a shape that broadcasts"):
        attention_with_weights(describe(dict(tensors, attn_mask=paddle.zeros([3, 5, 7])), FULL.config))

    def ask(statistics, key=tensors["key"]):
        inputs = (tensors["query"], key, None, None, statistics)
        return WEIGHTS.call(inputs, True, _op.SAVE_ALWAYS, (0.5, 0.0), (0,) * 8)

    with pytest.raises(TypeError, match="statistics: expected a tensor, got none"):
        ask(None)
    with pytest.raises(TypeError, match="statistics: expected uint8, got float64"):
        ask(tensors["query"])
    with pytest.raises(ValueError, match=r"statistics: expected \d+ bytes, as this attention saves, got 8"):
        ask(paddle.zeros([8], "uint8"))
    with pytest.raises(ValueError, match="statistics: expected shape"):
        ask(paddle.zeros([8, 1], "uint8"))
    with pytest.raises(ValueError, match="key: expected shape"):
        ask(paddle.zeros([8], "uint8"), paddle.zeros([2, 7, 3, 8], "float64"))
