"""Calls that want no gradient go past Paddle's dispatch of operators: with the same bits and errors as by it, in which
case they leave to it what it has to do.
"""

import sys
import threading
import time

import numpy as np
import paddle
import paddle_fused_attention as pfa
import pytest
from paddle_fused_attention import _op, functional


def on(place, shape, first=-1.0, last=1.0):
    """Numbers from `first` to `last`."""
    numbers = np.linspace(first, last, int(np.prod(shape)), dtype="float32").reshape(shape)
    return paddle.to_tensor(numbers, place=place)


def attend(x, **changes):
    return functional.scaled_dot_product_attention(*[x.reshape([*x.shape[:2], 2, 4])] * 3, **changes)


def block(x):
    return pfa.fused_multi_head_attention(x, on(x.place, (3, 2, 4, 8)), on(x.place, (8, 8)), training=False)


def feed_forward(x):
    weights = on(x.place, (8, 5)), on(x.place, (5, 8))
    return pfa.fused_feedforward(x, *weights, activation="gelu", training=False)


def linear(x):
    return pfa.fused_linear(x, on(x.place, (8, 7)))


def residual_norm(x):
    return pfa.fused_bias_dropout_residual_layer_norm(x, x, training=False)


CALLS = {
    "custom_attention": attend,
    "custom_fused_attention": block,
    "custom_fused_feedforward": feed_forward,
    "custom_fused_linear": linear,
    "custom_residual_norm": residual_norm,
}


@pytest.fixture
def x(place):
    return paddle.sin(on(paddle.CPUPlace(), (2, 3, 8), 0.0, 60.0))._copy_to(place, True)


@pytest.fixture
def by_paddle(monkeypatch):
    """The operators that Paddle is asked to run."""
    asked = []
    run = _op._run_custom_op

    def recorded(op_type, *arguments):
        asked.append(op_type)
        return run(op_type, *arguments)

    monkeypatch.setattr(_op, "_run_custom_op", recorded)
    return asked


@pytest.mark.parametrize("name", CALLS)
def test_same_bits_as_by_paddle(name, x, by_paddle, monkeypatch):
    with paddle.no_grad():
        direct = CALLS[name](x)
        assert by_paddle == []
        assert direct.stop_gradient and str(direct.place) == str(x.place)
        monkeypatch.setattr(paddle.profiler.utils, "_is_profiler_used", True)
        dispatched = CALLS[name](x)
    assert by_paddle == [f"{name}_forward"]
    np.testing.assert_array_equal(direct.numpy(), dispatched.numpy())
    assert type(direct) is type(dispatched)


def test_what_paddle_records_is_left_to_it(x, by_paddle):
    x.stop_gradient = False
    attend(x).sum().backward()
    assert by_paddle == ["custom_attention"]
    attend(x.detach())
    assert by_paddle == ["custom_attention"]


@pytest.mark.parametrize("name", CALLS)
def test_strided_tensors_are_left_to_paddle(name, by_paddle):
    """Reading them as if they were contiguous would give numbers of other elements."""
    x = on(paddle.CPUPlace(), (2, 3, 8))
    strided = paddle.as_strided(paddle.concat([x, x + 1.0]).flatten(), [2, 3, 8], [24, 8, 1], offset=4)
    same = paddle.to_tensor(strided.numpy())
    transposed = paddle.transpose(paddle.transpose(x, [0, 2, 1]).contiguous(), [0, 2, 1])
    assert not transposed.is_contiguous()
    with paddle.no_grad():
        np.testing.assert_array_equal(CALLS[name](strided).numpy(), CALLS[name](same).numpy())
        by_paddle.clear()
        np.testing.assert_array_equal(CALLS[name](transposed).numpy(), CALLS[name](x).numpy())
    if name != "custom_attention":  # which reshapes its argument first
        assert by_paddle == [f"{name}_forward"]


def test_empty_tensors(place):
    with paddle.no_grad():
        out = attend(on(place, (2, 0, 8)))
    assert out.shape == [2, 0, 2, 4] and str(out.place) == str(place)


def test_errors_are_the_same(x):
    with paddle.no_grad(), pytest.raises(ValueError, match=r"^attn_mask: expected a shape that broadcasts to"):
        attend(x, attn_mask=on(x.place, (5, 5)))
    with paddle.no_grad(), pytest.raises(TypeError, match=r"^weight: expected float32 like x, got float64"):
        pfa.fused_linear(x, paddle.to_tensor(np.ones((8, 7)), place=x.place))


def test_objects_are_kept_as_long_as_they_are_used(x):
    with paddle.no_grad():
        for _ in range(3):  # what is cached is there then
            linear(x)
        weight = on(x.place, (8, 7))
        before = sys.getrefcount(x), sys.getrefcount(weight), sys.getrefcount(None)
        for _ in range(50):
            out = pfa.fused_linear(x, weight)
        after = sys.getrefcount(x), sys.getrefcount(weight), sys.getrefcount(None)
    assert after[:2] == before[:2]
    assert abs(after[2] - before[2]) < 50
    assert sys.getrefcount(out) == 2


def test_other_threads_of_python_run_meanwhile():
    """For longer than Python takes to change threads by itself."""
    heads = on(paddle.CPUPlace(), (4, 2048, 8, 64))
    times = []
    ended = threading.Event()

    def tick():
        while not ended.is_set():
            times.append(time.perf_counter())
            time.sleep(0.001)

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=tick)
    thread.start()
    try:
        sys.setswitchinterval(1e-4)
        with paddle.no_grad():
            begin = time.perf_counter()
            functional.scaled_dot_product_attention(heads, heads, heads).numpy()
            end = time.perf_counter()
    finally:
        sys.setswitchinterval(interval)
        ended.set()
        thread.join()
    inside = [t for t in times if begin + 0.1 * (end - begin) < t < end - 0.1 * (end - begin)]
    assert inside
