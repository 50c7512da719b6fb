"""Fixtures of all tests. Threads are set before Paddle is imported: Paddle sets one thread otherwise."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest  # noqa: E402


@pytest.fixture(params=["cpu", "gpu"])
def place(request):
    """The device to run on: the CPU always, a GPU where Paddle has one."""
    paddle = pytest.importorskip("paddle")
    if request.param == "cpu":
        return paddle.CPUPlace()
    if not paddle.is_compiled_with_cuda():
        pytest.skip("this Paddle is built without CUDA")
    if paddle.device.cuda.device_count() == 0:
        pytest.skip("no GPU is visible")
    return paddle.CUDAPlace(0)
