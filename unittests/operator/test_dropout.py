"""Dropout: the masks are those of Philox at the known seed and offset, in both passes; statistics; the random
generator.
"""

import contextlib

import cases
import common
import numpy as np
import paddle
import paddle_fused_attention as pfa
import pytest
import reference
from cases import DTYPES
from runners import call, check_case, check_stored, run_dygraph, static_mode, to_tensors

CASE = cases.DROPOUT_BASE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases.DROPOUT, ids=str)
def test_masks_of_a_known_seed(case, dtype, place):
    """Result and gradients with the same masks as the reference: so backward's are forward's."""
    check_case(case.but(dtype=dtype), place)


@pytest.mark.parametrize("case", cases.SEEDS, ids=str)
def test_seeds(case, place):
    check_case(case, place)


@pytest.mark.parametrize("case", cases.RATES_BETWEEN_STEPS, ids=str)
def test_rates_between_two_steps(case, place):
    """The rate is rounded to a multiple of 2^-16; the scale is that of the rate itself."""
    check_case(case, place)


def test_an_element_whose_number_is_the_threshold_is_kept(place):
    """Rates are chosen so that some element's number equals the threshold: there, and only there, > and >= differ."""
    case = CASE.but(seed=5)
    attention = reference.attention_random(5, 0, case.batch, case.num_heads, case.seq_len)
    output = reference.output_random(5, 0, case.batch * case.seq_len, case.embed_dim)
    # A key that the mask hides would prove nothing: this one may be seen.
    visible = np.broadcast_to(common.make_inputs(case)["attn_mask"], attention.shape)
    for n in (0, 7, 100):
        changes = dict(attn_dropout_rate=attention[visible][n] / 65536, dropout_rate=output.reshape(-1)[n] / 65536)
        changed = case.but(**changes)
        inputs = common.make_inputs(case)
        wanted = common.differentiable(inputs)
        results = run_dygraph(common.stored_inputs(case, inputs), changed.config, place, wanted)
        check_stored(changed, common.expect(changed, inputs), *results)


def factors(shape, place, seed, **changes):
    """The factors of the output dropout: weights are zero and linear_bias one, so they are what comes out."""
    batch, seq_len, embed_dim = shape
    arrays = {
        "x": np.zeros(shape, "float32"),
        "qkv_weight": np.zeros((3, 1, embed_dim, embed_dim), "float32"),
        "linear_weight": np.zeros((embed_dim, embed_dim), "float32"),
        "linear_bias": np.ones(embed_dim, "float32"),
    }
    config = reference.Config(final_layer_norm=False, dropout_rate=0.3)
    return run_dygraph(arrays, config, place, seed=seed, **changes)[0]


def attention_means(batch, seq_len, rate, place, seed, mode="upscale_in_train"):
    """With equal scores and v of ones each result is the mean of the factors over the keys: [B, S, H]."""
    num_heads, head_dim = 4, 4
    embed_dim = num_heads * head_dim
    bias = np.zeros((3, num_heads, head_dim), "float32")
    bias[2] = 1
    arrays = {
        "x": np.zeros((batch, seq_len, embed_dim), "float32"),
        "qkv_weight": np.zeros((3, num_heads, head_dim, embed_dim), "float32"),
        "linear_weight": np.eye(embed_dim, dtype="float32"),
        "qkv_bias": bias,
    }
    config = reference.Config(final_layer_norm=False, add_residual=False, attn_dropout_rate=rate, mode=mode)
    out = run_dygraph(arrays, config, place, seed=seed)[0].reshape(batch, seq_len, num_heads, head_dim)
    assert np.allclose(out, out[..., :1], atol=1e-6)
    return out[..., 0]


@pytest.mark.parametrize("mode, kept", [("upscale_in_train", 1 / 0.7), ("downscale_in_infer", 1.0)])
def test_output_statistics(mode, kept, place):
    """Elements are kept with probability 0.7, whatever their neighbours are."""
    f = factors((4, 256, 64), place, 9, mode=mode)
    assert set(np.unique(f)) == {np.float32(0), np.float32(kept)}
    keep = (f != 0).astype(np.float64)
    deviation = np.sqrt(0.3 * 0.7 / keep.size)
    assert abs(keep.mean() - 0.7) < 5 * deviation
    for axis in range(3):
        a = keep - 0.7
        neighbours = np.delete(a, 0, axis) * np.delete(a, -1, axis)
        assert abs(neighbours.mean()) < 5 * 0.3 * 0.7 / np.sqrt(neighbours.size), axis


@pytest.mark.parametrize("mode, mean", [("upscale_in_train", 1.0), ("downscale_in_infer", 0.6)])
def test_attention_statistics(mode, mean, place):
    batch, seq_len, rate = 2, 256, 0.4
    means = attention_means(batch, seq_len, rate, place, 9, mode)
    spread = mean / (1 - rate) * np.sqrt(rate * (1 - rate) / seq_len)  # of one row's mean
    assert abs(means.mean() - mean) < 5 * spread / np.sqrt(means.size)
    assert 0.9 * spread < means.std() < 1.1 * spread
    for axis in range(3):
        a = means - mean
        neighbours = np.delete(a, 0, axis) * np.delete(a, -1, axis)
        assert abs(neighbours.mean()) < 5 * spread**2 / np.sqrt(neighbours.size), axis


def test_seed_fixes_the_mask_and_other_seeds_differ(place):
    one, again, other = (factors((2, 50, 16), place, seed) for seed in (3, 3, 4))
    assert np.array_equal(one, again)
    assert 0.2 < (one != other).mean() < 0.65  # 2 * 0.3 * 0.7 = 0.42 for independent masks


def generator_state(place):
    """Seed and offset of the device's generator, from the text of its state."""
    paddle_state = paddle.get_rng_state(device="gpu:0" if place.is_gpu_place() else "cpu")[0]
    _, seed, offset = str(paddle_state).split()[:3]
    return int(seed), int(offset)


@pytest.fixture
def state(place):
    """The place as a set_device'd one, and its generator seeded."""
    core_place = paddle.base.core.Place()
    core_place.set_place(place)
    before = paddle.device.get_device()
    paddle.set_device("gpu:0" if core_place.is_gpu_place() else "cpu")
    paddle.seed(1234)
    yield core_place
    paddle.set_device(before)


DROP = CASE.but(dropout_rate=0.4, attn_dropout_rate=0.2)


def test_masks_of_the_generator(place, state):
    """seed=None takes seed and offset from Paddle's generator; the gradient uses those of its forward pass."""
    inputs = common.make_inputs(DROP)
    arrays = common.stored_inputs(DROP, inputs)
    wanted = common.differentiable(inputs)
    offsets = []
    for _ in range(3):
        seed, offset = generator_state(state)
        tensors = to_tensors(arrays, place, wanted)
        out = call(tensors, DROP.config, seed=None)
        factors((1, 3, 4), place, None)  # another draw between the passes
        gradients = paddle.grad(
            [out], [tensors[n] for n in wanted], grad_outputs=[paddle.to_tensor(arrays["d_out"], place=place)]
        )
        expected = common.expect(DROP.but(seed=seed, offset=offset), inputs)
        check_stored(DROP, expected, out.numpy(), {n: g.numpy() for n, g in zip(wanted, gradients)})
        assert seed == 1234
        offsets.append(offset)
    assert len(set(offsets)) == 3


def test_paddle_seed_and_rng_state(place, state):
    arrays = common.stored_inputs(DROP, common.make_inputs(DROP))

    def run():
        return run_dygraph(arrays, DROP.config, place, seed=None)[0]

    first, second = run(), run()
    assert not np.array_equal(first, second)
    paddle.seed(1234)
    assert np.array_equal(run(), first)
    kept = paddle.get_rng_state()
    assert np.array_equal(run(), second)
    third = run()
    paddle.set_rng_state(kept)
    assert np.array_equal(run(), second)
    assert np.array_equal(run(), third)
    paddle.seed(1235)
    assert not np.array_equal(run(), first)


@pytest.mark.parametrize(
    "changes, draws",
    [
        (dict(seed=None), True),
        (dict(seed=None, dropout_rate=0.0), True),
        (dict(seed=None, attn_dropout_rate=0.0), True),
        (dict(seed=None, mode="downscale_in_infer"), True),
        (dict(seed=None, dropout_rate=0.0, attn_dropout_rate=0.0), False),
        (dict(seed=None, training=False), False),
        (dict(seed=None, training=False, mode="downscale_in_infer"), False),
        (dict(seed=7), False),
    ],
    ids=str,
)
def test_the_generator_moves_only_when_something_is_dropped(changes, draws, place, state):
    arrays = common.stored_inputs(DROP, common.make_inputs(DROP))
    before = generator_state(state)
    run_dygraph(arrays, DROP.config, place, ["x", "qkv_weight"], **changes)
    after = generator_state(state)
    assert (after != before) == draws


def test_recompute_by_hand(place, state):
    """A forward pass replayed from a kept state gives the same numbers and gradients: what recomputation relies on."""
    inputs = common.make_inputs(DROP)
    arrays = common.stored_inputs(DROP, inputs)
    wanted = common.differentiable(inputs)
    kept = paddle.get_rng_state()
    first = run_dygraph(arrays, DROP.config, place, wanted, seed=None)
    paddle.set_rng_state(kept)
    replayed = run_dygraph(arrays, DROP.config, place, wanted, seed=None)
    assert np.array_equal(first[0], replayed[0])
    np.testing.assert_allclose(first[1]["x"], replayed[1]["x"], rtol=1e-9, atol=1e-12)


def test_fleet_recompute(place, state):
    """Paddle's own recomputation of a segment gives the result and the gradients of the segment itself."""
    recompute = pytest.importorskip("paddle.distributed.fleet.utils").recompute
    inputs = common.make_inputs(DROP)
    arrays = common.stored_inputs(DROP, inputs)
    wanted = common.differentiable(inputs)

    def run(wrap):
        paddle.seed(31)
        tensors = to_tensors(arrays, place, wanted)
        out = wrap(lambda x: call(dict(tensors, x=x), DROP.config, seed=None), tensors["x"])
        out.backward(paddle.to_tensor(arrays["d_out"], place=place))
        return [out.numpy()] + [tensors[name].grad.numpy() for name in wanted]

    direct = run(lambda function, x: function(x))
    for a, b in zip(direct, run(recompute)):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def make_layer(kind, **changes):
    arguments = dict(dict(embed_dim=16, num_heads=2, dropout_rate=0.5, attn_dropout_rate=0.5), **changes)
    if kind == "converted":
        encoder = paddle.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.5, attn_dropout=0.5, act_dropout=0.0)
        fused = pfa.convert(encoder)
        fused.dropout2.p = 0.0  # Paddle's own: only the block's masks are left
        return fused
    classes = {
        "block": pfa.FusedMultiHeadAttention,
        "incubate": pfa.incubate.FusedMultiHeadAttention,
        "parallel": pfa.ParallelFusedMultiHeadAttention,
    }
    return classes[kind](**arguments)


class Twice(paddle.nn.Layer):
    """Two passes over one input, as SimCSE and R-Drop make them."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x) * 2, self.block(x) * 2


@pytest.mark.parametrize("changes", [{}, {"dropout_rate": 0.0}, {"attn_dropout_rate": 0.0}], ids=str)
@pytest.mark.parametrize("kind", ["block", "incubate", "parallel", "converted"])
def test_two_passes_in_a_full_graph_have_masks_of_their_own(kind, changes):
    """Paddle's search for common subexpressions must not make them one."""
    network = paddle.jit.to_static(Twice(make_layer(kind, **changes)), full_graph=True)
    x = paddle.to_tensor(np.random.default_rng(0).standard_normal((2, 5, 16)), dtype="float32")
    for _ in range(2):
        first, second = network(x)
        assert not np.array_equal(first.numpy(), second.numpy())
    network.eval()
    first, second = network(x)
    assert np.array_equal(first.numpy(), second.numpy())


class Seeded(Twice):
    def forward(self, x):
        weights = (self.block.qkv_weight, self.block.linear_weight)
        first = pfa.fused_multi_head_attention(x, *weights, seed=1) * 2
        again = pfa.fused_multi_head_attention(x, *weights, seed=1) * 2
        return first, again, pfa.fused_multi_head_attention(x, *weights, seed=2) * 2


def test_equal_seeds_in_a_full_graph_share_a_mask():
    network = paddle.jit.to_static(Seeded(make_layer("block")), full_graph=True)
    x = paddle.to_tensor(np.random.default_rng(0).standard_normal((2, 5, 16)), dtype="float32")
    first, again, other = (tensor.numpy() for tensor in network(x))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_a_full_graph_is_traced_once():
    """What tells calls apart is no part of what Paddle keeps traced programs by."""
    network = paddle.jit.to_static(Twice(make_layer("block")), full_graph=True)
    x = paddle.ones([2, 5, 16])
    for _ in range(3):
        network(x)
    assert len(network.forward.program_cache) == 1


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "default"])
def test_two_passes_in_a_program(legacy):
    guard = contextlib.nullcontext
    if legacy and hasattr(paddle, "pir_utils"):
        guard = getattr(paddle.pir_utils, "OldIrGuard", guard)
    arrays = common.stored_inputs(DROP, common.make_inputs(DROP))
    feed = {name: a for name, a in arrays.items() if name != "d_out"}
    with guard(), static_mode():
        main = paddle.static.Program()
        with paddle.static.program_guard(main, paddle.static.Program()):
            variables = {name: paddle.static.data(name, a.shape, str(a.dtype)) for name, a in feed.items()}
            outs = [call(variables, DROP.config, seed=None) for _ in range(2)]
            outs += [call(variables, DROP.config, seed=5) for _ in range(2)]
        executor = paddle.static.Executor(paddle.CPUPlace())
        a, b, c, d = executor.run(main, feed=feed, fetch_list=outs)
        assert not np.array_equal(a, b) and np.array_equal(c, d)
