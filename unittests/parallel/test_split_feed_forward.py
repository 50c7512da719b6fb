"""The feed-forward block with its hidden numbers spread over two and three processes of the CPU against one, by ring_id
and by Paddle's auto-parallel engine.
"""

import feed_forward_worker as worker
import numpy as np
import paddle
import pytest
from paddle_fused_attention import fused_feedforward, incubate
from processes import run_script

DEGREES = (2, 3)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each process of each degree found."""
    directory, found = tmp_path_factory.mktemp("split"), {}
    for degree in DEGREES:
        result = run_script(worker.__file__, degree, directory, threads=1, directory=directory)
        assert result.returncode == 0, result.stderr[-3000:]
        found[degree] = [dict(np.load(directory / f"degree{degree}_rank{rank}.npz")) for rank in range(degree)]
    return found


@pytest.fixture(scope="module")
def wholes():
    """What one process finds, with the dropout masks of the same seeds."""
    device = paddle.get_device()
    paddle.set_device("cpu")
    found = {
        block: {
            name: t.numpy()
            for name, t in worker.results_of(
                {name: paddle.to_tensor(array) for name, array in worker.arrays_of(block).items()}, block
            ).items()
        }
        for block in worker.BLOCKS
    }
    yield found
    paddle.set_device(device)


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("block", worker.BLOCKS)
def test_group(runs, wholes, block, degree):
    """Every process has the whole's result, its shares of the weights' gradients, and whole gradients of the rest."""
    for rank, found in enumerate(runs[degree]):
        names = [name.split("/")[-1] for name in found if name.startswith(f"group/{block}/")]
        assert sorted(names) == sorted(wholes[block])
        for name, whole in wholes[block].items():
            expected = worker.share_of(name, whole, rank, degree)
            np.testing.assert_allclose(found[f"group/{block}/{name}"], expected, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("degree", DEGREES)
def test_layer(runs, degree):
    for found in runs[degree]:
        assert found["layer/drops"] > 1e-2
        assert np.array_equal(found["layer/first"], runs[degree][0]["layer/first"])
        np.testing.assert_allclose(found["layer/evaluated"], found["layer/whole"], rtol=1e-5, atol=1e-5)
        assert found["layer/distributed"].tolist() == [True, True, True, False, False, False]


@pytest.mark.skipif(paddle.__version__.startswith("2."), reason="Paddle 2 has no rules for custom operators")
@pytest.mark.parametrize(
    "kind, block", [("rows", "evaluated")] + [("hidden", b) for b in worker.BLOCKS if b != "plain"]
)
def test_mesh(runs, wholes, kind, block):
    for found in runs[2]:
        for name, whole in wholes[block].items():
            np.testing.assert_allclose(found[f"mesh/{kind}/{block}/{name}"], whole, rtol=1e-9, atol=1e-9, err_msg=name)
        if kind == "hidden" and block != "gated":
            assert found[f"mesh/{kind}/{block}/local"].tolist() == [worker.WIDTH, worker.HIDDEN // 2]
    x = paddle.to_tensor(worker.arrays_of("bare")["x"], place=paddle.CPUPlace())
    expected = paddle.nn.functional.layer_norm(2 * x, [worker.WIDTH]).numpy()
    np.testing.assert_allclose(runs[2][0]["mesh/tail"], expected, rtol=1e-6, atol=1e-6)


def test_mesh_on_paddle_2(runs):
    if paddle.__version__.startswith("2."):
        assert str(runs[2][0]["mesh/error"]).startswith("x: expected ordinary tensors")


@pytest.mark.parametrize("changes, message", [(dict(ring_id=99), "ring_id: expected -1 or the id of a group")])
def test_errors(changes, message):
    tensors = {name: paddle.to_tensor(array) for name, array in worker.arrays_of("plain").items()}
    for function in (fused_feedforward, incubate.functional.fused_feedforward):
        with pytest.raises(ValueError, match=message):
            function(**tensors, **changes)
    with pytest.raises(TypeError, match="ring_id: expected an int, got None"):
        fused_feedforward(**tensors, ring_id=None)
