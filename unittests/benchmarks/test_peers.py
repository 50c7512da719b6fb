"""How benchmarks/peers.py runs libraries in processes and in turns."""

import importlib
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


@pytest.mark.parametrize("library", ["ours_saved", "onnxruntime", "openvino"])
def test_forward_only(peers, library):
    assert peers.computes(library, "float32", "forward")
    assert not peers.computes(library, "float32", "forward+backward")


@pytest.mark.parametrize("library", ["paddle", "onnxruntime"])
def test_float32_only(peers, library):
    assert not peers.computes(library, "bfloat16", "forward")


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
def test_library_that_differs_ends_the_benchmark(peers, wrong):
    array = np.ones((2, 3))
    error = peers.check(OneAnswer(array + 1e-7), "tiny", "float32", "output", array)
    assert error == pytest.approx(1e-7, rel=1e-3)
    with pytest.raises(SystemExit, match="theirs at tiny float32: its output is off by"):
        peers.check(OneAnswer(array * wrong), "tiny", "float32", "output", array)


class Recorder:
    """A model that notes what is called."""

    def __init__(self, case, dtype):
        self.case, self.dtype, self.calls = case, dtype, []

    def set_training(self, training):
        self.calls.append(training)

    def forward(self):
        self.calls.append("forward")

    def train(self):
        self.calls.append("train")

    def output(self):
        return np.full(2, 3.0)


def test_one_model_at_a_time_answers(peers, monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "TURN", 0.0)
    made = []

    def make(case, dtype):
        made.append(Recorder(case, dtype))
        return made[-1]

    answer = peers.answers(make)
    answer("a", "float32", "output", str(tmp_path / "array.npy"))
    assert np.load(tmp_path / "array.npy").tolist() == [3.0, 3.0]
    assert answer("a", "float32", "forward") >= 0
    assert answer("a", "float32", "forward") >= 0
    assert made[0].calls == [False, False, "forward", "forward", False, "forward"]  # the first is not counted
    assert answer("a", "bfloat16", "forward+backward") >= 0
    assert [(model.case, model.dtype) for model in made] == [("a", "float32"), ("a", "bfloat16")]
    assert made[1].calls == [True, "train", "train"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_model(peers, monkeypatch, request, dtype):
    """The predictor's program gives what the layer gives, in float32."""
    paddle = pytest.importorskip("paddle")
    from paddle_fused_attention import FusedMultiHeadAttention

    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    device = paddle.get_device()
    paddle.set_device("cpu")
    request.addfinalizer(lambda: paddle.set_device(device))
    layer = FusedMultiHeadAttention(32, 4).to(dtype=dtype)
    layer.eval()
    x = np.random.default_rng(0).standard_normal((2, 9, 32), np.float32)
    with paddle.no_grad():
        expected = layer(paddle.to_tensor(x).astype(dtype)).astype("float64").numpy()
    model = peers.SavedModel(layer, dtype, x)
    for _ in range(2):
        np.testing.assert_array_equal(model.output(), expected)


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
    seen = "[os.environ[name] for name in ('OMP_NUM_THREADS', 'CUDA_VISIBLE_DEVICES')]"
    script = make_script(tmp_path, f"return [number, len(os.sched_getaffinity(0)), *{seen}]")
    with peers.Worker(script, "theirs", 1) as worker:
        assert worker.ask(number=3) == [3, 1, "1", ""]
        assert worker.ask(number=4)[0] == 4


@pytest.mark.parametrize(
    "answer, reason", [("raise ValueError('no such\\nnumber')", "ValueError: no such number"), ("os._exit(1)", "ended")]
)
def test_worker_that_fails_ends_the_benchmark(peers, tmp_path, answer, reason):
    with peers.Worker(make_script(tmp_path, answer), "theirs", 1) as worker:
        with pytest.raises(SystemExit, match=f"theirs failed at 3: .*{reason}"):
            worker.ask(number=3)
