"""Attention by itself against float64: every feature in every graph mode, dtypes, sizes, subsets of gradients."""

import itertools

import numpy as np
import paddle
import pytest
from attention_cases import (
    DTYPES,
    FEATURES,
    FORM_CASES,
    FORMS,
    FORMS_OF_CASES,
    FULL,
    LENGTHS,
    check,
    differentiable,
    in_form,
    make_inputs,
    out_of_form,
    stored,
)
from graphs import GRAPHS, call, check_case, run

MIXED = FULL.but(
    queries=33, keys=40, heads=4, head_dim=24, mask="B1QK", causal=True, window_left=25, dropout_rate=0.1, seed=2
)
PACKED = FULL.but(lengths=LENGTHS, heads=4, causal=True, dropout_rate=0.1, seed=2)
RANGES = FULL.but(queries=33, keys=33, heads=4, ranges=4, range_heads=2)


@GRAPHS
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature, graph, place):
    check_case(FEATURES[feature], place, graph)


@pytest.mark.parametrize("case", [MIXED, PACKED, RANGES], ids=["mixed", "packed", "ranges"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, case, place):
    check_case(case.but(dtype=dtype), place)


@pytest.mark.parametrize("mask_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_masks(dtype, mask_dtype, place):
    """The gradient of a mask is of the mask's dtype, whatever the query's."""
    check_case(FULL.but(mask="1HQK", dtype=dtype, mask_dtype=mask_dtype, queries=20, keys=20), place)


@pytest.mark.parametrize("head_dim", [1, 3, 16, 40, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_head_dims(head_dim, dtype, place):
    check_case(FULL.but(dtype=dtype, head_dim=head_dim, queries=19, keys=35, causal=True), place)


@pytest.mark.parametrize("queries, keys", list(itertools.product([1, 7, 129], repeat=2)))
def test_sizes(queries, keys, place):
    check_case(FULL.but(dtype="float32", queries=queries, keys=keys, mask="BHQK"), place)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_a_thousand(causal, place):
    check_case(FULL.but(dtype="float32", batch=1, queries=1000, keys=1000, head_dim=64, causal=causal), place)


@GRAPHS
@pytest.mark.parametrize(
    "wanted", [w for n in range(1, 4) for w in itertools.combinations(("query", "key", "value", "attn_mask"), n)]
)
def test_subsets_of_gradients(wanted, graph, place):
    check_case(FULL.but(mask="1HQK", heads=4), place, graph, wanted=list(wanted))


@pytest.mark.parametrize("unknown", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("feature", ["causal, more keys", "mask of heads", "ranges, 4", "grouped", "packed, dropout"])
def test_unknown_sizes(feature, unknown, place):
    check_case(FEATURES[feature], place, "program", unknown=unknown)


@GRAPHS
@pytest.mark.parametrize("batch, queries, keys", [(0, 3, 3), (2, 0, 3), (2, 3, 0), (0, 0, 0)])
@pytest.mark.usefixtures("needs_paddle")
def test_zero_sizes(batch, queries, keys, graph, place):
    case = FULL.but(dtype="float32", batch=batch, queries=queries, keys=keys)
    arrays = stored(case, make_inputs(case))
    out, gradients = run(graph, lambda tensors: call(tensors, case.config), arrays, ["query", "key", "value"], place)
    assert out.shape == arrays["query"].shape and not out.any()
    for name, gradient in gradients.items():
        assert gradient.shape == arrays[name].shape and not gradient.any()


@GRAPHS
@pytest.mark.parametrize("form, name", FORMS_OF_CASES)
def test_shared_tensors(form, name, graph, place):
    """Query, key and value in one tensor or two, keys and values by head: no slice is copied."""
    case = FORM_CASES[name]
    inputs = make_inputs(case)
    arrays = in_form(form, stored(case, inputs))
    more = dict(keys_by_head=FORMS[form], num_kv_heads=case.kv_heads)
    out, gradients = run(
        graph,
        lambda tensors: call(tensors, case.config, case.lengths and case.longest, **more),
        arrays,
        [name for name in differentiable(inputs) if name in arrays],
        place,
    )
    check(case, inputs, out, out_of_form(form, gradients, case.heads, case.kv_heads))


@pytest.mark.parametrize("first, count", [(0, 2), (2, 2), (1, 3), (0, 4)])
def test_heads_of_a_part_of_a_layer(first, count, place):
    """Dropout is that of the heads' places in the whole layer."""
    case = FULL.but(queries=20, keys=20, heads=4, kv_heads=4, dropout_rate=0.4, seed=3, dtype="float32")
    arrays = {name: a for name, a in stored(case, make_inputs(case)).items() if name != "d_out"}
    whole = call({name: paddle.to_tensor(a, place=place) for name, a in arrays.items()}, case.config).numpy()
    part = {name: paddle.to_tensor(a[:, :, first : first + count], place=place) for name, a in arrays.items()}
    found = call(part, case.config, first_head=first, total_heads=4).numpy()
    np.testing.assert_array_equal(found, whole[:, :, first : first + count])


@pytest.mark.usefixtures("needs_paddle")
def test_slices_of_a_packed_projection(place):
    """The three parts of [batch, tokens, 3, heads, head_dim], and their gradients in it."""
    projection = paddle.to_tensor(np.random.default_rng(0).standard_normal((2, 9, 3, 2, 8)), place=place)
    projection.stop_gradient = False
    out = call(dict(zip(("query", "key", "value"), paddle.unbind(projection, axis=2))), FULL.config)
    arrays = dict(zip(("query", "key", "value"), np.moveaxis(projection.numpy(), 2, 0)))
    d_out = np.random.default_rng(1).standard_normal(out.shape)
    out.backward(paddle.to_tensor(d_out, place=place))
    expected, gradients = run(
        "dygraph",
        lambda tensors: call(tensors, FULL.config),
        {**{n: np.ascontiguousarray(a) for n, a in arrays.items()}, "d_out": d_out},
        ["query", "key", "value"],
        place,
    )
    np.testing.assert_array_equal(out.numpy(), expected)
    np.testing.assert_array_equal(np.moveaxis(projection.grad.numpy(), 2, 0), list(gradients.values()))


def test_the_same_dropout_as_the_block_s_seed_promises(place):
    """seed=None draws from Paddle's generator, which paddle.seed sets, and two calls differ."""
    case = FULL.but(queries=30, keys=30, dropout_rate=0.5, dtype="float32")
    tensors = {n: paddle.to_tensor(a, place=place) for n, a in stored(case, make_inputs(case)).items() if n != "d_out"}
    paddle.seed(3)
    first, second = (call(tensors, case.config, seed=None).numpy() for _ in range(2))
    paddle.seed(3)
    assert np.array_equal(call(tensors, case.config, seed=None).numpy(), first)
    assert not np.array_equal(first, second)
