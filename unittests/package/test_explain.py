"""explain(): the implementations that it names are those the library chooses by."""

import pathlib
import platform

import paddle
import pytest
from paddle_fused_attention import explain

ON_CPU = ["amx", "avx512_bf16", "avx512", "avx2", "baseline"]  # fastest first
ON_GPU = ["one_query", "hopper", "mma", "plain"]


def processor_flags():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return set(next(line for line in lines if line.startswith("flags")).split())


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", paddle.float16])
def test_cpu_takes_one_implementation_for_both_passes_and_gives_a_reason_for_each_faster_one(dtype):
    found = explain(64, dtype, "cpu")
    assert found.forward == found.backward
    names = [*found.forward.rejected, found.forward.implementation]
    assert names == [name for name in ON_CPU if name in names]
    assert all(found.forward.rejected.values())
    assert (found.device, found.head_dim) == ("cpu", 64)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are those of x86-64")
def test_cpu_takes_the_instruction_set_that_the_processor_has():
    flags = processor_flags()
    taken = explain(64, "float32", "cpu").forward.implementation
    avx512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags
    if not {"avx2", "fma"} <= flags:
        assert taken == "baseline"
    elif not avx512:
        assert taken == "avx2"
    else:
        assert taken == "avx512" or "avx512_bf16" in flags and taken in ("avx512_bf16", "amx")


def test_as_a_string_it_has_a_line_for_each_pass_and_each_reason():
    found = explain(80, "bfloat16", "cpu")
    lines = str(found).splitlines()
    assert lines[0] == "attention on cpu, bfloat16, head_dim 80"
    reasons = [*found.forward.rejected.values(), *found.backward.rejected.values()]
    assert [line.split(": ", 1)[1] for line in lines if line.strip().startswith("not ")] == reasons
    assert [line.split() for line in lines if line.startswith(("  forward", "  backward"))] == [
        ["forward", found.forward.implementation],
        ["backward", found.backward.implementation],
    ]


def test_defaults_are_paddles_dtype_and_device():
    found = explain(64)
    assert found.dtype == paddle.get_default_dtype()
    assert found.device == paddle.get_device()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((0,), ValueError, "head_dim: expected at least 1, got 0"),
        ((2**31,), ValueError, "head_dim: "),
        ((64.0,), TypeError, "head_dim: expected an int, got 64.0"),
        ((64, "int8"), ValueError, "dtype: expected one of float32, float64, float16, bfloat16, got 'int8'"),
        ((64, "float32", "xpu"), ValueError, "device: expected 'cpu', 'gpu' or 'gpu:N', got 'xpu'"),
        ((64, "float32", "cpu:1"), ValueError, "device: expected 'cpu', 'gpu' or 'gpu:N', got 'cpu:1'"),
        ((64, "float32", "gpu:4096"), ValueError, "device: expected one of the "),
        ((64, "float32", "gpu:" + "9" * 5000), ValueError, "device: expected one of the "),
        ((64, "float32", 0), TypeError, "device: expected a string, got int"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, error, message):
    with pytest.raises(error) as raised:
        explain(*arguments)
    assert str(raised.value).startswith(message)


def test_place_names_its_own_implementations(place):
    device = "cpu" if isinstance(place, paddle.CPUPlace) else "gpu:0"
    known = ON_CPU if isinstance(place, paddle.CPUPlace) else ON_GPU
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        for head_dim in (1, 40, 64, 128, 200, 256):
            found = explain(head_dim, dtype, device)
            for choice in (found.forward, found.backward):
                names = [*choice.rejected, choice.implementation]
                assert names == [name for name in known if name in names]
                if device != "cpu":
                    assert names[0] == "one_query"  # the list is the whole one
    if device != "cpu":
        assert explain(64, "float64", device).forward.implementation == "plain"
        assert "head_dim" in explain(256, "float16", device).forward.rejected["hopper"] or (
            "compute capability" in explain(256, "float16", device).forward.rejected["hopper"]
        )
        with pytest.raises(ValueError, match="head_dim: no implementation serves 257"):
            explain(257, "float16", device)


def test_hopper_serves_dense_tensors(place):
    if isinstance(place, paddle.CPUPlace) or paddle.device.cuda.get_device_capability(0) != (9, 0):
        pytest.skip("for GPUs of compute capability 9.0")
    for dtype in ("float16", "bfloat16"):
        for head_dim in (8, 40, 64, 128):
            found = explain(head_dim, dtype, "gpu:0")
            for choice in (found.forward, found.backward):
                assert choice.implementation == "hopper" or "not compiled" in choice.rejected["hopper"]
