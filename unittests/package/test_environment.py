"""`python -m paddle_fused_attention info` and `--version`: what they print is so."""

import os
import platform
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import paddle
import paddle_fused_attention as pfa
import pytest
from paddle_fused_attention import _environment, explain
from paddle_fused_attention.__main__ import main
from processes import run_module

PACKAGE = Path(pfa.__file__).parent
SETUP = Path(__file__).parents[2] / "setup.py"
DTYPES = ("float32", "float64", "float16", "bfloat16")


def facts_and_attention(text):
    """The texts by label, in order, and the lines on attention."""
    lines = text.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("attention on "))
    facts = {}
    for line in lines[:begin]:
        facts.setdefault(line[:15].strip(), []).append(line[15:])
    return facts, lines[begin:]


def printed(capsys, *arguments):
    assert main(["info", *arguments]) == 0
    return facts_and_attention(capsys.readouterr().out)


def test_it_tells_what_is_installed(capsys):
    facts, _ = printed(capsys)
    with_cuda = paddle.is_compiled_with_cuda()
    kind = "with CUDA" if with_cuda else "for the CPU"
    assert facts["package"][0].startswith(f"paddle-fused-attention {pfa.__version__}, in ")
    assert facts["built for"] == [f"Paddle {paddle.__version__} {kind}"]
    assert facts["Paddle"][0].startswith(f"{paddle.__version__} {kind}")
    assert facts["Python"][0].split()[0] == platform.python_version() and facts["Python"][0].endswith(np.__version__)
    assert platform.release() in facts["platform"][0] and platform.machine() in facts["platform"][0]
    assert facts["cores"] == [f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"]
    assert facts["CUDA kernels"][0].startswith("for " if with_cuda else "none")
    assert ("GPU" in facts) == with_cuda


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are those of x86-64")
def test_the_features_of_the_processor_fit_the_instruction_set_that_is_taken(capsys):
    facts, _ = printed(capsys)
    assert facts["processor"][0] in Path("/proc/cpuinfo").read_text()
    needed = {"avx2": "avx2", "avx512": "avx512vl", "avx512_bf16": "avx512_bf16", "amx": "amx_bf16"}
    taken = explain(64, "float32", "cpu").forward.implementation
    assert taken == "baseline" or needed[taken] in facts["features"][0].split()


@pytest.mark.slow
def test_threads_and_variables_are_those_that_the_process_was_given():
    """Not those that Paddle sets at import. The home folder is a ~."""
    home = str(PACKAGE.parent)
    given = {"HOME": home, "CXXFLAGS": f"-O2 -I{home}/include", "UNRELATED": "text"}
    end = run_module("paddle_fused_attention", "info", threads=3, **given)
    assert end.returncode == 0, end.stderr
    facts, _ = facts_and_attention(end.stdout)
    assert facts["package"][0].endswith(f", in ~/{PACKAGE.name}") and home not in end.stdout
    assert facts["threads"] == ["3"]
    assert {"CXXFLAGS=-O2 -I~/include", "OMP_NUM_THREADS=3"} <= set(facts["environment"])
    assert "UNRELATED" not in end.stdout and "HOME" not in [line.split("=")[0] for line in facts["environment"]]

    end = run_module("paddle_fused_attention", "info", threads=None)
    facts, _ = facts_and_attention(end.stdout)
    assert facts["threads"][0].split()[0] == "1" and "OMP_NUM_THREADS is not set" in facts["threads"][0]
    assert not any(line.startswith("OMP_NUM_THREADS=") for line in facts.get("environment", []))


@pytest.mark.parametrize("home", ["/", "", "/nowhere/user/"])
def test_only_whole_names_of_the_home_folder_are_shortened(home, monkeypatch):
    monkeypatch.setenv("HOME", home)
    text = "-I/nowhere/user/include:/nowhere/user /nowhere/users/x / ."
    shorter = "-I~/include:~ /nowhere/users/x / ."
    assert _environment._without_home(text) == (shorter if len(home) > 1 else text)


def test_all_that_setup_reads_is_told():
    names = set(re.findall(r"environ(?:\.get|\.pop)?[(\[]\"(\w+)\"", SETUP.read_text()))
    assert "PADDLE_CUDA_ARCH_LIST" in names and names <= set(_environment._VARIABLES)


def test_it_tells_what_explain_tells_of_every_dtype(capsys):
    _, attention = printed(capsys)
    told = {}
    for line in attention:
        if line.startswith("attention on "):
            device, dtypes = re.fullmatch(r"attention on (\S+), (.*), head_dim 64", line).groups()
            answer = []
            told.update({(device, dtype): answer for dtype in dtypes.split(", ")})
        else:
            answer.append(line)
    assert [dtype for device, dtype in told if device == "cpu"] == list(DTYPES)
    for (device, dtype), answer in told.items():
        assert answer == str(explain(64, dtype, device)).splitlines()[1:]


def test_options_choose_the_attention(capsys):
    _, attention = printed(capsys, "--head-dim", "80", "--dtype", "bfloat16", "--device", "cpu")
    assert attention == str(explain(80, "bfloat16", "cpu")).splitlines()


def test_gpus_of_one_kind_are_told_once(capsys, monkeypatch):
    """On cards as Paddle would name them: what a kind has no kernels for is told too."""
    names = ["Big", "Small", "Big"]
    build = types.SimpleNamespace(PADDLE_VERSION="3.3.1", WITH_CUDA=True, CUDA_ARCHITECTURES=("80", "90a"))
    monkeypatch.setitem(sys.modules, "paddle_fused_attention._build_info", build)
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(paddle.device.cuda, "get_device_name", lambda card: names[card])
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda card: (9, 0) if card != 1 else (7, 5))
    choices = {
        "gpu:0": pfa._explain.Choice("hopper", {"one_query": "many queries"}),
        "cpu": pfa._explain.Choice("avx2", {}),
    }

    def explained(head_dim, dtype, device):
        if device == "gpu:1":
            raise ValueError(f"head_dim: no implementation serves {head_dim}: {dtype}")
        return pfa._explain.Explanation(device, dtype, head_dim, choices[device], choices[device])

    monkeypatch.setattr(_environment, "explain", explained)
    facts, attention = printed(capsys, "--head-dim", "300")
    assert facts["CUDA kernels"] == ["for 80, 90a"]
    assert facts["GPU"] == ["gpu:0, gpu:2: Big, compute capability 9.0", "gpu:1: Small, compute capability 7.5"]
    heads = [line for line in attention if line.startswith("attention on ")]
    all_dtypes = ", ".join(DTYPES)
    assert heads == [
        *(f"attention on {device}, {all_dtypes}, head_dim 300" for device in ("cpu", "gpu:0")),
        *(f"attention on gpu:1, {dtype}, head_dim 300" for dtype in DTYPES),
    ]
    assert attention.count("            not one_query: many queries") == 2
    assert attention[-1] == "  head_dim: no implementation serves 300: bfloat16"


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"paddle-fused-attention {pfa.__version__}\n"


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--head-dim", "0", "expected at least 1, got 0"),
        ("--head-dim", "1.5", "expected a number, got '1.5'"),
        ("--head-dim", str(2**31), "expected at least 1 and less than 2^31, got 2147483648"),
        ("--dtype", "int8", "invalid choice: 'int8' (choose from "),
        ("--device", "xpu", "expected 'cpu', 'gpu' or 'gpu:N', got 'xpu'"),
        ("--device", "gpu:4096", "expected one of the "),
    ],
)
def test_bad_options_are_refused_in_one_line(option, value, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["info", option, value])
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines()[-1].startswith(
        f"python -m paddle_fused_attention info: error: argument {option}: {message}"
    )


@pytest.mark.slow
def test_a_report_that_can_not_be_printed_is_one_line():
    command = [sys.executable, "-m", "paddle_fused_attention", "info"]
    with open("/dev/full", "w") as full:
        end = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert end.returncode == 1 and "Traceback" not in end.stderr
    assert end.stderr.splitlines()[-1] == "error: the report can't be printed: No space left on device"
