"""benchmarks/encoder.py on a tiny encoder, and how benchmarks/peers.py runs libraries in processes and in turns."""

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("peers")
    monkeypatch.setattr(module, "PAUSE", 0)
    return module


@pytest.fixture
def encoder(peers):
    return importlib.import_module("encoder")


def installed(*modules):
    return all(importlib.util.find_spec(module) for module in modules)


@pytest.mark.slow
def test_tiny_run(tmp_path):
    report_file, chart = tmp_path / "encoder.json", tmp_path / "encoder.svg"
    peers = ("ours_saved", "paddle", "torch", "torch_nn", "onnxruntime", "openvino")  # the compiled one takes long
    command = [sys.executable, str(BENCHMARKS / "encoder.py"), "--cases", "tiny", "--dtypes", "float32"]
    command += ["--threads", "1", "--turns", "1", "--peers", *peers, "--json", str(report_file), "--chart", str(chart)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(report_file.read_text())
    training = ["ours", "paddle"] + ["torch", "torch_nn"] * installed("torch")
    forward = ["ours", "ours_saved", *training[1:]]
    forward += [name for name in ("onnxruntime", "openvino") if installed("onnx", name)]
    row = "tiny float32"
    expected = {"forward": ("output", forward), "forward+backward": ("gradient", training)}
    assert report["libraries"] == forward
    for which, (tensor, libraries) in expected.items():
        seconds, errors = report["seconds"]["1"][row][which], report["errors"]["1"][row][tensor]
        assert list(seconds) == list(errors) == libraries
        assert all(value > 0 for value in seconds.values())
        assert all(value < 1e-5 for value in errors.values())
    rows = [line.split() for line in run.stdout.splitlines() if line.startswith("tiny")]
    assert [row[:3] for row in rows[:2]] == [["tiny", "float32", which] for which in expected]
    for name in set(peers) - set(forward):
        assert f"{name} is left out" in run.stdout
    assert chart.exists() == installed("matplotlib")


@pytest.mark.parametrize("library", ["ours_saved", "onnxruntime", "openvino"])
def test_forward_only(encoder, library):
    assert encoder.computes(library, "float32", "forward")
    assert not encoder.computes(library, "float32", "forward+backward")


@pytest.mark.parametrize("library", ["paddle", "onnxruntime"])
def test_float32_only(encoder, library):
    assert not encoder.computes(library, "bfloat16", "forward")


class OneAnswer:
    """Stands for the process of a library that computes one array, or takes some seconds."""

    library = "theirs"

    def __init__(self, array=None, seconds=None):
        self.array, self.seconds, self.asked = array, seconds, 0

    def ask(self, file=None, **request):
        self.asked += 1
        if file is not None:
            np.save(file, self.array)
        return self.seconds


@pytest.mark.parametrize("wrong", [1.001, np.nan])
def test_library_that_differs_ends_the_benchmark(encoder, tmp_path, wrong):
    array = np.ones((2, 3))
    np.save(tmp_path / "tiny-output.npy", array)
    reference = encoder.Reference(str(tmp_path))
    assert reference.error(OneAnswer(array + 1e-7), "tiny", "float32", "output") == pytest.approx(1e-7, rel=1e-3)
    with pytest.raises(SystemExit, match="theirs at tiny float32: its output is off by"):
        reference.error(OneAnswer(array * wrong), "tiny", "float32", "output")


def test_slow_libraries_take_three_turns(peers):
    workers = {"fast": OneAnswer(seconds=0.5), "slow": OneAnswer(seconds=30.0)}
    assert peers.take_turns(workers, 7, do="forward") == {"fast": 0.5, "slow": 30.0}
    assert (workers["fast"].asked, workers["slow"].asked) == (7, 3)


def test_short_steps_are_repeated_and_the_first_is_not_counted(peers, monkeypatch):
    # What perf_counter says: a first step of 0.2 seconds, then three of 0.1.
    clock = iter([0.0, 0.2, 1.0, 1.1, 2.0, 2.1, 3.0, 3.1])
    monkeypatch.setattr(peers.time, "perf_counter", lambda: next(clock))
    steps = []
    assert peers.time_step(lambda: steps.append(1), 0.25) == pytest.approx(0.1)
    assert len(steps) == 4


def test_long_step_is_done_once(peers, monkeypatch):
    clock = iter([0.0, 0.3])
    monkeypatch.setattr(peers.time, "perf_counter", lambda: next(clock))
    assert peers.time_step(lambda: None, 0.25) == pytest.approx(0.3)


def make_script(tmp_path, answer):
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(BENCHMARKS)!r})\nimport peers\n"
        f"def answer(number):\n    print('not an answer')\n    {answer}\npeers.serve(answer)\n"
    )
    return script


def test_worker_answers_on_its_cores(peers, tmp_path):
    script = make_script(tmp_path, "return [number, len(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS']]")
    with peers.Worker(script, "theirs", 1) as worker:
        assert worker.ask(number=3) == [3, 1, "1"]
        assert worker.ask(number=4)[0] == 4


@pytest.mark.parametrize(
    "answer, reason", [("raise ValueError('no such\\nnumber')", "ValueError: no such number"), ("os._exit(1)", "ended")]
)
def test_worker_that_fails_ends_the_benchmark(peers, tmp_path, answer, reason):
    with peers.Worker(make_script(tmp_path, answer), "theirs", 1) as worker:
        with pytest.raises(SystemExit, match=f"theirs failed at 3: .*{reason}"):
            worker.ask(number=3)


@pytest.mark.skipif(not installed("onnx", "onnxruntime", "sympy"), reason="onnx, onnxruntime or sympy is not installed")
def test_graph_that_is_not_fused_is_refused(encoder):
    from onnx import TensorProto

    from examples.semantic_search import onnx_encoder

    case = encoder.CASES["tiny"]
    graph = onnx_encoder.Graph()
    output = onnx_encoder.add_encoder(graph, "x", encoder.draw_weights(case), case.num_heads, 1e-5)
    shape = [case.batch, case.seq_len, case.embed_dim]
    model = graph.model([("x", TensorProto.FLOAT, shape)], output, shape)
    onnx_encoder.fuse(model, case.num_heads, case.embed_dim, 2)
    with pytest.raises(RuntimeError, match="expected {'Attention': 3.*got {'Attention': 2"):
        onnx_encoder.fuse(model, case.num_heads, case.embed_dim, 3)
