"""Libraries that take turns at the same work, each in a process of its own: their threads would disturb each other in
one. All get the same cores and the same number of threads.

A benchmark starts itself anew as the process of a library, a `Worker`, which answers requests by `serve`: of a `Model`
of the case that is asked for, the output, the gradient or the time of a pass.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PASSES = ("forward", "forward+backward")
DTYPES = ("float32", "bfloat16")
TOLERANCES = {"float32": 1e-5, "bfloat16": 3e-2}  # of the norm of the difference, relative to that of the tensor
FORWARD_ONLY = ("ours_saved", "onnxruntime", "openvino")
FLOAT32_ONLY = ("paddle", "onnxruntime")  # on the CPU
TURN = 0.25  # seconds of steps
LONG = 20.0  # seconds that a library's turns may take, once it has had three
PAUSE = 0.3  # seconds before a turn: the threads of the library before wait busily for 0.2 seconds for more work


def parser_of(description, cases, libraries):
    """A parser of the arguments that such a benchmark has; `description` begins with a line of its own. Cases whose
    names begin with "tiny" are there to try the benchmark itself: others are measured unless these are named."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    usual = [name for name in cases if not name.startswith("tiny")]
    parser.add_argument("--cases", choices=cases, nargs="+", default=usual)
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=list(DTYPES))
    threads = sorted({len(os.sched_getaffinity(0)), 1}, reverse=True)
    parser.add_argument("--threads", type=int, nargs="+", default=threads)
    parser.add_argument("--passes", choices=PASSES, nargs="+", default=list(PASSES))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--worker", choices=libraries, help=argparse.SUPPRESS)
    return parser


class Worker:
    """The process of a library, pinned to `threads` cores: `script --worker library`."""

    def __init__(self, script, library, threads):
        self.library = library
        cores = sorted(os.sched_getaffinity(0))[:threads]
        # Before the library is imported; GPUs are hidden, which it would take by itself.
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), CUDA_VISIBLE_DEVICES="")
        for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):  # they would hold back peers
            environment.pop(name, None)
        self._process = subprocess.Popen(
            [sys.executable, os.path.abspath(script), "--worker", library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )

    def ask(self, **request):
        """The library's answer; where it fails, the benchmark ends with the reason."""
        print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "its process ended"}
        if "error" in answer:
            self.close()
            raise SystemExit(f"{self.library} failed at {' '.join(map(str, request.values()))}: {answer['error']}")
        return answer["value"]

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def serve(answer):
    """In the process of a library: answers requests by `answer(**request)`, until standard input ends."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints is no answer
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the examples' graphs
    for line in sys.stdin:
        try:
            reply = {"value": answer(**json.loads(line))}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        print(json.dumps(reply), file=channel, flush=True)


class Model:
    """What a library computes of a case: `forward()` without gradients, `train()` forward and backward, `output()` and
    `gradient()` in float64."""

    def set_training(self, training):
        """Called before a pass; for models in which training differs by more than the gradients."""


class SavedModel(Model):
    """A Paddle layer in eval mode as it is deployed: weights arranged, saved, run by Paddle's predictor.

    Args:
        layer: [B, S, E] to the same, parameters of `dtype`.
        x: float32; so is the output.
    """

    def __init__(self, layer, dtype, x):
        import paddle
        from paddle_fused_attention import arrange_weights

        class WithCasts(paddle.nn.Layer):
            def __init__(self):
                super().__init__()
                self.layer, self.dtype = layer, dtype  # Paddle 2.6 can't trace names of outside

            def forward(self, x):
                return self.layer(x.astype(self.dtype)).astype("float32")

        model = layer if dtype == "float32" else WithCasts()
        model.eval()
        arrange_weights(model)
        self._x = x
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model")
            paddle.jit.save(model, path, [paddle.static.InputSpec(x.shape, "float32", "x")])
            program = path + (".json" if os.path.exists(path + ".json") else ".pdmodel")
            config = paddle.inference.Config(program, path + ".pdiparams")
            config.disable_glog_info()
            config.set_cpu_math_library_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # one by default
            config.disable_mkldnn()  # whose casts are slow
            # Else a thread that frees tensors spins beside the operator's threads.
            paddle.set_flags({"FLAGS_eager_delete_tensor_gb": -1.0})
            self._predictor = paddle.inference.create_predictor(config)
        self._input = self._predictor.get_input_handle(self._predictor.get_input_names()[0])
        self._output = self._predictor.get_output_handle(self._predictor.get_output_names()[0])

    def forward(self):
        self._input.copy_from_cpu(self._x)
        self._predictor.run()
        return self._output.copy_to_cpu()

    def output(self):
        return self.forward().astype("float64")


class OnnxModel(Model):
    """A graph of the input x, run by ONNX Runtime or OpenVINO.

    Args:
        library: "onnxruntime" or "openvino".
        model: of ordinary operators.
        fuse: puts ONNX Runtime's own operators in.
        x: float32.
    """

    def __init__(self, library, dtype, model, fuse, x):
        from examples.semantic_search import onnx_encoder

        threads = int(os.environ["OMP_NUM_THREADS"])
        if library == "onnxruntime":
            self._run = onnx_encoder.onnxruntime_run(fuse(model), threads)
        else:
            precision = {"float32": "f32", "bfloat16": "bf16"}[dtype]
            self._run = onnx_encoder.openvino_run(model, threads, precision)
        self._inputs = {"x": x}

    def forward(self):
        return self._run(self._inputs)

    def output(self):
        return self.forward().astype("float64")


def answers(make):
    """What a library's process answers, of the models that `make(case, dtype)` gives, one at a time: "output" or
    "gradient", saved in a file, or the seconds of a pass, after one that is not counted."""
    made, warm = {}, set()

    def answer(case, dtype, do, file=None):
        if (case, dtype) not in made:
            made.clear()
            warm.clear()
            made[case, dtype] = make(case, dtype)
        model = made[case, dtype]
        model.set_training(do == "forward+backward")
        if do not in PASSES:
            return np.save(file, getattr(model, do)())
        step = model.forward if do == "forward" else model.train
        if do not in warm:
            step()
            warm.add(do)
        return time_step(step, TURN)

    return answer


def computes(library, dtype, which):
    """Whether a library has the pass, in the dtype, on the CPU."""
    return not (library in FORWARD_ONLY and which != "forward" or library in FLOAT32_ONLY and dtype != "float32")


def saved(worker, case, dtype, do):
    """A library's "output" or "gradient"."""
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "array.npy")
        worker.ask(case=case, dtype=dtype, do=do, file=file)
        return np.load(file)


def check(worker, case, dtype, do, expected):
    """The relative error of a library's "output" or "gradient": the norm of the difference over that of what is
    expected.

    Raises:
        SystemExit: it is above the tolerance, or not a number.
    """
    error = float(np.linalg.norm(saved(worker, case, dtype, do) - expected) / np.linalg.norm(expected))
    if not error < TOLERANCES[dtype]:
        raise SystemExit(
            f"{worker.library} at {case} {dtype}: its {do} is off by {error:.1e}, expected less than "
            f"{TOLERANCES[dtype]:.0e}"
        )
    return error


def time_step(step, seconds):
    """The seconds of a step: of one, if it takes `seconds`, and else the median of as many as take these, after it."""
    times = []
    while not times or sum(times[1:]) < seconds:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
        if times[0] >= seconds:
            return times[0]
    return statistics.median(times[1:])


def installed(libraries, modules):
    """Those of the libraries whose modules, by `modules[library]`, are installed; says which are not."""
    found = []
    for name in libraries:
        missing = [module for module in modules[name] if importlib.util.find_spec(module) is None]
        if missing:
            print(f"{name} is left out: {' and '.join(missing)} not installed")
        else:
            found.append(name)
    return found


def take_turns(workers, turns, **request):
    """The median of the answers, seconds, by a worker's name. Where turns take long there are fewer, three at least."""
    seconds = {name: [] for name in workers}
    for _ in range(turns):
        for name, times in seconds.items():
            if len(times) >= 3 and sum(times) > LONG:
                continue
            time.sleep(PAUSE)
            times.append(workers[name].ask(**request))
    return {name: statistics.median(times) for name, times in seconds.items()}


def print_header(libraries):
    """The head of a table: milliseconds of the first of the libraries, and of each other with the ratio to it."""
    first, *others = libraries
    print(f"{'case':<18}{'dtype':<10}{'pass':<18}{first:>9}" + "".join(f"{name:>17}" for name in others), flush=True)


def print_row(case, dtype, which, seconds, libraries):
    first, *others = libraries
    cells = "".join(
        f"{1e3 * seconds[name]:>9.1f} {f'({seconds[name] / seconds[first]:.2f})':>7}"
        if name in seconds
        else f"{'-':>17}"
        for name in others
    )
    print(f"{case:<18}{dtype:<10}{which:<18}{1e3 * seconds[first]:>9.1f}{cells}", flush=True)


def write(report, path):
    """All numbers of a run as JSON, in a folder that is made where there is none."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(report, indent=1))


def draw(results, libraries, passes, threads, path):
    """A chart of how many times the first library's time the others take, in a folder likewise. `results`: seconds by
    row, pass, library."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first, *others = libraries
    figure, axes = plt.subplots(1, len(passes), figsize=(7 * len(passes), 5), sharey=True, squeeze=False)
    width = 0.8 / max(1, len(others))
    for axis, which in zip(axes[0], passes):
        rows = [row.get(which, {}) for row in results.values()]
        for i, name in enumerate(others):
            found = [(j, row[name] / row[first]) for j, row in enumerate(rows) if name in row]
            if not found:
                continue
            bars = axis.bar([j + width * i for j, _ in found], [y for _, y in found], width, label=f"{name} / {first}")
            axis.bar_label(bars, fmt="%.1f", fontsize="small")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks([j + width * (len(others) - 1) / 2 for j in range(len(rows))])
        axis.set_xticklabels(list(results), rotation=30, ha="right")
        axis.set_title(f"{which}, {threads} threads")
        axis.legend()
    axes[0][0].set_ylabel(f"time relative to {first}")
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
