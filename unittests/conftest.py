"""The devices that tests run on, and their threads, which are set before Paddle is imported: it sets one otherwise."""

import gc
import importlib.util
import os

import pytest

# What tests assert by, outside the files of tests.
pytest.register_assert_rewrite("common", "runners", "families", "file_bytes", "built_in", "encoders", "device")

os.environ.setdefault("OMP_NUM_THREADS", "2")
# Threads that wait sleep, and NumPy has none of its own: beside anything else that runs on the machine, small cases of
# the core take several times as long where threads spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def missing_gpu():
    """Why tests don't run on a GPU; None if they do."""
    if importlib.util.find_spec("paddle") is None:
        return "Paddle is not installed"
    import paddle

    if not paddle.is_compiled_with_cuda():
        return "this Paddle is built without CUDA"
    if paddle.device.cuda.device_count() == 0:
        return "no GPU is visible"
    return None


def pytest_configure():
    """float32 is compared at float32's tolerance: Paddle's switch for TF32 matrix products is put off."""
    if missing_gpu() is None:
        from paddle.base import core

        core.set_cublas_switch(False)


def pytest_report_header():
    return f"places: cpu only, for {missing_gpu()}" if missing_gpu() else "places: cpu, gpu"


def pytest_generate_tests(metafunc):
    """Tests that ask for a `place` run on the CPU, and again on a GPU where there is one."""
    if "place" in metafunc.fixturenames:
        import paddle

        places = [paddle.CPUPlace()] if missing_gpu() else [paddle.CPUPlace(), paddle.CUDAPlace(0)]
        metafunc.parametrize("place", places, ids=["cpu", "gpu"][: len(places)], scope="session")


@pytest.fixture
def needs_paddle(place):
    """For tests in which Paddle's own operators run on the place too: a Paddle that was not built for the GPU has some
    that do nothing there and say nothing."""
    from runners import paddle_computes_on

    if not paddle_computes_on(place):
        pytest.skip("Paddle's own kernels do nothing on this GPU")


@pytest.fixture(scope="module", autouse=True)
def leave_out_what_was_there_before():
    """Where all of Python's objects are looked through, as `convert` does for what holds a model: in its tests that
    would take longer than all else. No file's tests look for what those of another have made."""
    gc.collect()
    gc.freeze()
