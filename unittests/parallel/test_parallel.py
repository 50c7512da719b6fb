"""Tensor parallelism over two and four processes of the CPU against one."""

import numpy as np
import paddle
import parallel_worker as worker
import pytest
from paddle_fused_attention import FusedMultiHeadAttention
from paddle_fused_attention.parallel import (
    ParallelClipGradByGlobalNorm,
    ParallelFusedMultiHeadAttention,
    full_state_dict,
    load_full_state_dict,
)
from processes import run_script

DEGREES = (2, 4)
AXES = {"qkv_weight": 1, "qkv_bias": 1, "linear_weight": 0}


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    device = paddle.get_device()
    paddle.set_device("cpu")
    yield
    paddle.set_device(device)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def runs(directory):
    """What each process of each degree found."""
    found = {}
    for degree in DEGREES:
        result = run_script(worker.__file__, degree, directory, threads=1, directory=directory)
        assert result.returncode == 0, result.stderr[-3000:]
        found[degree] = [dict(np.load(directory / f"degree{degree}_rank{rank}.npz")) for rank in range(degree)]
    return found


@pytest.mark.slow
def test_loss_curve_is_that_of_one_process(runs):
    expected = worker.train(worker.make_network(), worker.FIRST)
    assert expected[-1] < expected[0]
    for degree in DEGREES:
        for found in runs[degree]:
            np.testing.assert_allclose(found["losses"], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_dropout_drops(runs):
    without = worker.train(worker.make_network(0.0), worker.FIRST)
    assert np.abs(runs[2][0]["losses"] - without).max() > 1e-2


@pytest.mark.slow
def test_gradients_are_those_of_one_process(runs):
    expected = worker.gradients()
    for degree in DEGREES:
        for name, gradient in expected.items():
            shares = [found[f"gradient/{name}"] for found in runs[degree]]
            axis = AXES.get(name.split(".")[-1])
            if axis is None:
                for share in shares[1:]:
                    np.testing.assert_array_equal(share, shares[0], err_msg=name)
                whole = shares[0]
            else:
                assert shares[0].shape[axis] == gradient.shape[axis] // degree
                whole = np.concatenate(shares, axis)
            np.testing.assert_allclose(whole, gradient, rtol=0, atol=2e-5 * np.abs(gradient).max() + 1e-7, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("key_len", [worker.SEQ_LEN, 10])
def test_other_keys_and_values(runs, key_len):
    """Computed of ordinary ops, with dropout; the gradients of what every process uses are whole on each."""
    expected = worker.gradients_with_keys(key_len)
    if key_len == worker.SEQ_LEN:
        layer = worker.make_network().second
        x = paddle.to_tensor(worker.make_batch(0)[0])
        mask = paddle.to_tensor(
            np.random.default_rng(9).random((worker.BATCH, worker.NUM_HEADS, key_len, key_len)) > 0.3
        )
        paddle.seed(12)
        np.testing.assert_allclose(expected["out"], layer(x, attn_mask=mask).numpy(), rtol=0, atol=1e-5)
    for degree in DEGREES:
        for name, whole in expected.items():
            shares = [found[f"keys {key_len}/{name}"] for found in runs[degree]]
            axis = AXES.get(name)
            for share in shares if axis is None else [np.concatenate(shares, axis)]:
                np.testing.assert_allclose(share, whole, rtol=0, atol=2e-5 * np.abs(whole).max() + 1e-7, err_msg=name)


@pytest.mark.slow
def test_clipped_by_global_norm(runs):
    expected = worker.train(worker.make_network(), range(5), paddle.nn.ClipGradByGlobalNorm(0.1))
    alone = worker.train(worker.make_network(), range(5), ParallelClipGradByGlobalNorm(0.1))
    np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-6)
    for degree in DEGREES:
        for found in runs[degree]:
            np.testing.assert_allclose(found["clipped"], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_checkpoints_load_at_other_degrees(runs, directory):
    """Two processes, then four, then one."""
    alone = worker.make_network()
    worker.train(alone, worker.FIRST)
    np.testing.assert_allclose(runs[4][0]["continued"], worker.resume(alone, worker.SECOND), rtol=0, atol=1e-5)
    network = worker.make_network()
    load_full_state_dict(network, paddle.load(str(directory / "degree4.pdparams")))
    np.testing.assert_allclose(
        worker.resume(network, worker.THIRD), worker.resume(alone, worker.THIRD), rtol=0, atol=1e-5
    )


@pytest.mark.slow
def test_checkpoint_for_the_single_layer(runs, directory):
    state = paddle.load(str(directory / "degree4.pdparams"))
    network, alone = worker.make_network(), worker.make_network(layer_class=FusedMultiHeadAttention)
    assert alone.set_state_dict(state) == ([], [])
    load_full_state_dict(network, state)
    network.eval(), alone.eval()
    x, mask = paddle.to_tensor(worker.make_batch(0)[0]), paddle.to_tensor(worker.make_mask())
    np.testing.assert_allclose(network(x, mask).numpy(), alone(x, mask).numpy(), rtol=0, atol=1e-5)
    assert list(full_state_dict(network)) == list(alone.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float16", 1e-2), ("bfloat16", 6e-2)])
def test_evaluation(runs, dtype, tolerance):
    layer = worker.make_network(layer_class=FusedMultiHeadAttention).second
    layer.eval()
    expected = layer(paddle.to_tensor(worker.make_batch(0)[0]), attn_mask=paddle.to_tensor(worker.make_mask())).numpy()
    for found in (*runs[2], *runs[4], {f"evaluated/{dtype}": worker.evaluate(dtype)}):
        np.testing.assert_allclose(found[f"evaluated/{dtype}"], expected, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.skipif(paddle.__version__.startswith("2."), reason="Paddle 2 has no rules for custom operators")
@pytest.mark.parametrize("kind, dropout_rate", [("batch", 0.0), ("heads", 0.2)])
def test_mesh(runs, kind, dropout_rate):
    """Inputs sharded over the batch, and weights over heads, stay so and train as one process does."""
    network = worker.make_network(dropout_rate, FusedMultiHeadAttention)
    for layer in (network.first, network.second):
        layer.dropout_rate = 0.0
    optimizer = paddle.optimizer.Momentum(0.1, 0.9, parameters=network.parameters())
    mask = paddle.to_tensor(worker.make_mask())
    expected = []
    for step in range(worker.MESH_STEPS):
        x, y = map(paddle.to_tensor, worker.make_batch(step))
        loss = ((network(x, mask) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        expected.append(float(loss))
    for found in runs[2]:
        np.testing.assert_allclose(found[f"mesh/{kind}/losses"], expected, rtol=0, atol=1e-5)
        assert str(found[f"mesh/{kind}/placed"]) == ("[Shard(dim=0)]" if kind == "batch" else "[Replicate()]")
        shape = [3, 4, 6, 24] if kind == "batch" else [3, 2, 6, 24]
        assert found[f"mesh/{kind}/gradient"].tolist() == found[f"mesh/{kind}/local"].tolist() == shape
        assert np.array_equal(found[f"mesh/{kind}/recorded"], found[f"mesh/{kind}/unrecorded"])


@pytest.mark.slow
def test_ring_id(runs):
    """Results and gradients of Paddle's layer with nranks and ring_id, against those of the whole layer."""
    for found in runs[2]:
        differences = {name: value for name, value in found.items() if name.startswith("ring/")}
        assert len(differences) == 4 * 8 * 2
        assert max(differences.values()) < 2e-5, differences


@pytest.mark.slow
def test_conversions(runs):
    for found in runs[2]:
        for name in ("split", "copy", "again", "group of one", "attention", "attention again"):
            assert found[f"difference/{name}"] < 1e-5, name
        assert found["frozen"].tolist() == [True, True, False]


@pytest.mark.slow
def test_errors(runs):
    for rank, found in enumerate(runs[2]):
        errors = {name.split("/")[1]: str(text) for name, text in found.items() if name.startswith("error/")}
        mesh = errors.pop("mesh", "")
        assert mesh.startswith("NotImplementedError: x: expected ordinary tensors") == paddle.__version__.startswith(
            "2."
        )
        assert errors == {
            "heads": "ValueError: num_heads: expected a multiple of the group's 2 processes, got 3",
            "type": "TypeError: group: expected a group of paddle.distributed.new_group or None, got list",
            "member": "ValueError: group: expected a group that this process belongs to, got one of ranks "
            f"[{1 - rank}] on rank {rank}",
            "seed": "ValueError: paddle.seed: expected the same seed on every process of the group, got [1, 2]",
            "mask type": "TypeError: attn_mask: expected a Tensor or None, got int",
            "mask": "ValueError: attn_mask: expected a shape that broadcasts to [batch, num_heads, seq_len, seq_len] = "
            "[4, 4, 7, 7], got [4, 2, 7, 7]",
            "state": "ValueError: qkv_weight: expected shape [3, 4, 6, 24], that of the whole layer, got [3, 2, 6, 24]",
            "full": "TypeError: layer: expected a FusedMultiHeadAttention with all heads, got "
            "ParallelFusedMultiHeadAttention",
            "ring size": "ValueError: nranks: expected 2, the number of processes of ring_id 0, got 4",
            "ring cache": "NotImplementedError: cache_kv: expected None with tensor parallelism, ring_id 0, got a "
            "Tensor",
            "static": "NotImplementedError: tensor parallelism: expected dygraph, since the sum over the group is "
            "taken between operators, got a static graph",
        }


def test_one_process():
    """Without communication the layer is the single layer, but for its dropout masks."""
    arguments = dict(normalize_before=True, epsilon=0.01, final_layer_norm=True)
    paddle.seed(3)
    layer = ParallelFusedMultiHeadAttention(24, 4, 0.0, 0.0, **arguments)
    paddle.seed(3)
    single = FusedMultiHeadAttention(24, 4, 0.0, 0.0, **arguments)
    x = paddle.to_tensor(worker.make_batch(1)[0])
    np.testing.assert_allclose(layer(x).numpy(), single(x).numpy(), rtol=0, atol=1e-5)
    assert layer.degree == 1 and "degree=1" in repr(layer)


@pytest.mark.parametrize("full_graph", [True, False])
def test_one_process_to_static(full_graph):
    paddle.seed(3)
    layer = ParallelFusedMultiHeadAttention(24, 4)
    layer.eval()
    x = paddle.to_tensor(worker.make_batch(1)[0])
    expected = layer(x).numpy()
    found = paddle.jit.to_static(layer, full_graph=full_graph)(x)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)


def test_one_process_static():
    paddle.enable_static()
    try:
        program, startup = paddle.static.Program(), paddle.static.Program()
        with paddle.static.program_guard(program, startup):
            x = paddle.static.data("x", [-1, -1, 24])
            loss = ParallelFusedMultiHeadAttention(24, 4)(x).square().mean()
            paddle.optimizer.SGD(0.1).minimize(loss)
        executor = paddle.static.Executor(paddle.CPUPlace())
        executor.run(startup)
        feed = {"x": worker.make_batch(1)[0]}
        (found,) = executor.run(program, feed=feed, fetch_list=[loss])
    finally:
        paddle.disable_static()
    assert abs(float(found) - 1) < 1e-3  # layer-normalised
