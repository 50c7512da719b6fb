"""Tests of the CUDA core by pfa_core, on tensors of PyTorch. Left out where there is no GPU, PyTorch or CUDA build."""

import pytest


def missing():
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    if not torch.cuda.is_available():
        return "no GPU is visible"
    try:
        import pfa_core
    except ImportError:
        return "pfa_core is not built (make gpu-core)"
    return "" if hasattr(pfa_core, "CudaBlock") else "pfa_core is built without CUDA"


collect_ignore_glob = []
REASON = missing()
if REASON:
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header():
    if REASON:
        return f"unittests/gpu: left out, {REASON}"
    import torch

    return f"unittests/gpu: {torch.cuda.get_device_name()}"


@pytest.fixture(autouse=True)
def release_memory():
    yield
    import torch

    torch.cuda.empty_cache()
