"""Whole transformer encoders on the CPU: ours against Paddle's layers, PyTorch, ONNX Runtime and OpenVINO.

    python benchmarks/encoder.py [--cases NAME ...] [--dtypes float32 bfloat16] [--threads 2 1] [--peers NAME ...]
        [--passes forward forward+backward] [--turns 7] [--json FILE] [--chart FILE]
    python benchmarks/encoder.py --draw FILE [--chart FILE]     # the chart of an earlier run

Layers normalise after attention and feed-forward and have exact GELU, as in BERT; there is no mask. Forward is in eval
mode without gradients, forward and backward in training with dropout 0.1; the mode is set before the time is taken.
Peers that are not installed are left out (benchmarks/requirements.txt):

    ours           paddle.nn.TransformerEncoder after paddle_fused_attention.convert
    ours_saved     forward only: the same after arrange_weights, saved by paddle.jit.save, by paddle.inference
    paddle         paddle.nn.TransformerEncoder; its layers have no bfloat16 on the CPU
    torch          PyTorch: one projection for query, key and value, scaled_dot_product_attention
    torch_nn       torch.nn.TransformerEncoder, in eval mode on its fast path
    torch_compile  `torch` by torch.compile, forward with frozen weights
    onnxruntime    forward only: the graph after ONNX Runtime's transformer optimizer, which puts Attention, BiasGelu
                   and SkipLayerNormalization in; ONNX Runtime has no bfloat16 on the CPU
    openvino       forward only: the same graph before that; OpenVINO fuses by itself

Each library runs in a process of its own, pinned to as many cores as it has threads, and all take turns; the medians
are compared. A turn is one step, or for a quarter of a second steps after a first one that is not counted. Before that
each library's output, and where it trains the gradient of x without dropout, is compared with Paddle's layers in
float64 on the same weights; one that differs ends the benchmark. (Not the gradient of `torch_compile`, which would be
compiled once more for that.)
"""

import importlib.metadata
import json
import os
from contextlib import ExitStack, suppress
from typing import NamedTuple

import numpy as np
import peers


class Case(NamedTuple):
    batch: int
    seq_len: int
    embed_dim: int
    num_heads: int
    hidden: int
    num_layers: int


CASES = {
    "minilm_32x128": Case(32, 128, 384, 12, 1536, 6),
    "minilm_1x64": Case(1, 64, 384, 12, 1536, 6),
    "bert_8x128": Case(8, 128, 768, 12, 3072, 12),
    "bert_2x512": Case(2, 512, 768, 12, 3072, 12),
    "tiny": Case(2, 9, 32, 4, 64, 2),
}
PEERS = {  # what each imports
    "ours_saved": ("paddle",),
    "paddle": ("paddle",),
    "torch": ("torch",),
    "torch_nn": ("torch",),
    "torch_compile": ("torch",),
    "onnxruntime": ("onnx", "onnxruntime"),
    "openvino": ("onnx", "openvino"),
}
PACKAGES = ("paddlepaddle", "torch", "onnxruntime", "openvino")
ONNX = ("onnxruntime", "openvino")
DROPOUT = 0.1
EPSILON = 1e-5


def draw_weights(case):
    """A state of paddle.nn.TransformerEncoder: float32, linear weights [in, out]."""
    generator = np.random.default_rng(0)
    state = {}

    def add(name, *shape):
        state[name + ".weight"] = generator.standard_normal(shape, np.float32) * shape[0] ** -0.5
        state[name + ".bias"] = 0.1 * generator.standard_normal(shape[1], np.float32)

    for i in range(case.num_layers):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            add(f"layers.{i}.self_attn.{name}", case.embed_dim, case.embed_dim)
        add(f"layers.{i}.linear1", case.embed_dim, case.hidden)
        add(f"layers.{i}.linear2", case.hidden, case.embed_dim)
        for name in ("norm1", "norm2"):
            state[f"layers.{i}.{name}.weight"] = 1 + 0.1 * generator.standard_normal(case.embed_dim, np.float32)
            state[f"layers.{i}.{name}.bias"] = 0.1 * generator.standard_normal(case.embed_dim, np.float32)
    return state


def draw_inputs(case):
    """x and the gradient of the output, [B, S, E] float32."""
    return np.random.default_rng(1).standard_normal((2, case.batch, case.seq_len, case.embed_dim), np.float32)


class PaddleEncoder(peers.Model):
    def __init__(self, case, dtype, converted=False):
        import paddle

        self._paddle = paddle
        layer = paddle.nn.TransformerEncoderLayer(
            case.embed_dim, case.num_heads, case.hidden, dropout=DROPOUT, activation="gelu"
        )
        self._model = paddle.nn.TransformerEncoder(layer, case.num_layers)
        self._model.set_state_dict(draw_weights(case))
        if converted:
            from paddle_fused_attention import convert

            convert(self._model)
        self._model.to(dtype=dtype)
        self._x, self._d_out = (paddle.to_tensor(array).astype(dtype) for array in draw_inputs(case))
        self._x.stop_gradient = False

    def set_training(self, training):
        (self._model.train if training else self._model.eval)()

    def forward(self):
        with self._paddle.no_grad():
            return self._model(self._x)

    def train(self):
        self._model(self._x).backward(self._d_out)
        self._model.clear_gradients()
        self._x.clear_gradient()

    def output(self):
        return self.forward().astype("float64").numpy()

    def gradient(self):
        self._model(self._x).backward(self._d_out)
        gradient = self._x.grad.astype("float64").numpy()
        self._model.clear_gradients()
        self._x.clear_gradient()
        return gradient


def make_saved(case, dtype):
    return peers.SavedModel(PaddleEncoder(case, dtype, converted=True)._model, dtype, draw_inputs(case)[0])


def torch_state(case):
    """The weights for torch.nn.TransformerEncoder: query, key and value in one, linear weights [out, in]."""
    import torch

    state = draw_weights(case)
    for i in range(case.num_layers):
        attention = f"layers.{i}.self_attn."
        for part in ("weight", "bias"):
            arrays = [state.pop(f"{attention}{name}_proj.{part}") for name in "qkv"]
            state[f"{attention}in_proj_{part}"] = np.concatenate(arrays, axis=-1)
    return {name: torch.from_numpy(np.ascontiguousarray(array.T)) for name, array in state.items()}


def torch_model(case, own):
    """torch.nn.TransformerEncoder, or `own` layers with the same parameters."""
    import torch
    import torch.nn.functional as F

    class Layer(torch.nn.TransformerEncoderLayer):
        def forward(self, x):
            rate = DROPOUT if self.training else 0.0
            batch, seq_len, embed_dim = x.shape
            qkv = F.linear(x, self.self_attn.in_proj_weight, self.self_attn.in_proj_bias)
            q, k, v = qkv.view(batch, seq_len, 3, case.num_heads, -1).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)
            attended = self.self_attn.out_proj(attended.transpose(1, 2).reshape(batch, seq_len, embed_dim))
            x = self.norm1(x + F.dropout(attended, rate, self.training))
            u = F.dropout(F.gelu(self.linear1(x)), rate, self.training)
            return self.norm2(x + F.dropout(self.linear2(u), rate, self.training))

    class Encoder(torch.nn.TransformerEncoder):
        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    sizes = (case.embed_dim, case.num_heads, case.hidden, DROPOUT)
    layer = (Layer if own else torch.nn.TransformerEncoderLayer)(*sizes, activation="gelu", batch_first=True)
    model = (Encoder if own else torch.nn.TransformerEncoder)(layer, case.num_layers)
    model.load_state_dict(torch_state(case))
    return model


class TorchEncoder(peers.Model):
    def __init__(self, case, dtype, way):
        import torch

        self._torch = torch
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        torch_dtype = getattr(torch, dtype)
        self._model = torch_model(case, own=way != "torch_nn").to(torch_dtype)
        self._infer = self._learn = self._model
        if way == "torch_compile":
            self._infer = torch.compile(self._model, options={"freezing": True})
            self._learn = torch.compile(self._model)
        self._x, self._d_out = (torch.from_numpy(array).to(torch_dtype) for array in draw_inputs(case))
        self._x.requires_grad_()

    def set_training(self, training):
        self._model.train(training)

    def forward(self):
        with self._torch.no_grad():
            return self._infer(self._x)

    def train(self):
        self._learn(self._x).backward(self._d_out)
        self._model.zero_grad()
        self._x.grad = None

    def output(self):
        return self.forward().double().numpy()

    def gradient(self):
        self._learn(self._x).backward(self._d_out)
        gradient = self._x.grad.double().numpy()
        self._model.zero_grad()
        self._x.grad = None
        return gradient


def make_onnx(library, case, dtype):
    from onnx import TensorProto

    from examples.semantic_search import onnx_encoder

    shape = [case.batch, case.seq_len, case.embed_dim]
    graph = onnx_encoder.Graph()
    output = onnx_encoder.add_encoder(graph, "x", draw_weights(case), case.num_heads, EPSILON)
    model = graph.model([("x", TensorProto.FLOAT, shape)], output, shape)

    def fuse(model):
        return onnx_encoder.fuse(model, case.num_heads, case.embed_dim, case.num_layers)

    return peers.OnnxModel(library, dtype, model, fuse, draw_inputs(case)[0])


def make_encoder(library, case, dtype):
    if library in ("ours", "paddle"):
        return PaddleEncoder(case, dtype, converted=library == "ours")
    if library == "ours_saved":
        return make_saved(case, dtype)
    return make_onnx(library, case, dtype) if library in ONNX else TorchEncoder(case, dtype, library)


class Reference:
    """Outputs and gradients of Paddle's layers in float64, each computed once."""

    def __init__(self):
        self._arrays = {}

    def expected(self, case, do):
        if (case, do) not in self._arrays:
            with peers.Worker(__file__, "paddle", len(os.sched_getaffinity(0))) as worker:
                self._arrays[case, do] = peers.saved(worker, case, "float64", do)
        return self._arrays[case, do]


def compare(libraries, threads, reference, arguments):
    """Runs and prints all cases; {"case dtype": {pass: {library: seconds}}} and {"case dtype": {library: errors}}."""
    print(f"{threads} threads, median of {arguments.turns} turns; milliseconds, and (the time / ours)")
    peers.print_header(libraries)
    results, errors = {}, {}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(peers.Worker(__file__, name, threads)) for name in libraries}
        for dtype in arguments.dtypes:
            for case in arguments.cases:
                row = f"{case} {dtype}"
                results[row], errors[row] = {}, {}
                for which in arguments.passes:
                    taking = {name: workers[name] for name in libraries if peers.computes(name, dtype, which)}
                    do = "output" if which == "forward" else "gradient"
                    errors[row][do] = {
                        name: peers.check(worker, case, dtype, do, reference.expected(case, do))
                        for name, worker in taking.items()
                        if (name, do) != ("torch_compile", "gradient")
                    }
                    seconds = peers.take_turns(taking, arguments.turns, case=case, dtype=dtype, do=which)
                    results[row][which] = seconds
                    peers.print_row(case, dtype, which, seconds, libraries)
    print(flush=True)
    return results, errors


def print_errors(errors):
    print("relative error against Paddle's layers in float64, of the output and of the gradient of x without dropout")
    for row, by_tensor in errors.items():
        for do, by_library in by_tensor.items():
            shown = "   ".join(f"{name} {error:.0e}" for name, error in by_library.items())
            print(f"{row:<28}{do:<10}{shown}")


def installed_versions():
    versions = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def measure(arguments):
    """Runs everything; the report that becomes the JSON file."""
    libraries = ["ours", *peers.installed(arguments.peers, PEERS)]
    versions = installed_versions()
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    report = {"versions": versions, "libraries": libraries, "passes": arguments.passes, "turns": arguments.turns}
    report.update(seconds={}, errors={})
    reference = Reference()
    for threads in arguments.threads:
        results, errors = compare(libraries, threads, reference, arguments)
        report["seconds"][threads], report["errors"][threads] = results, errors
    print_errors(report["errors"][arguments.threads[0]])
    return report


def main():
    parser = peers.parser_of(__doc__, CASES, ("ours", *PEERS))
    parser.add_argument("--peers", choices=PEERS, nargs="*", default=list(PEERS))
    parser.add_argument("--json", default="build/encoder.json")
    parser.add_argument("--chart", default="build/encoder.svg")
    parser.add_argument("--draw", metavar="FILE", help="draw the chart of this JSON file, and measure nothing")
    arguments = parser.parse_args()
    if arguments.worker:
        library = arguments.worker
        return peers.serve(peers.answers(lambda case, dtype: make_encoder(library, CASES[case], dtype)))
    if arguments.draw:
        with open(arguments.draw) as file:
            report = json.load(file)
    else:
        report = measure(arguments)
        peers.write(report, arguments.json)
    threads = next(iter(report["seconds"]))
    try:
        peers.draw(report["seconds"][threads], report["libraries"], report["passes"], threads, arguments.chart)
    except ImportError:
        print("no chart: matplotlib is not installed")


if __name__ == "__main__":
    main()
