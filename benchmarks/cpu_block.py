"""The attention block on the CPU: ours against the same block of Paddle's layers, PyTorch, ONNX Runtime and OpenVINO.

    python benchmarks/cpu_block.py [--cases NAME ...] [--dtypes float32 bfloat16] [--threads 2 1] [--peers NAME ...]
        [--passes forward forward+backward] [--turns 7] [--stages PROGRAM] [--json FILE] [--chart FILE]

Each library runs in a process of its own, pinned to as many cores as it has threads. They take turns at a case (three
if these take long), and the medians are compared: forward in eval mode without gradients, and forward and backward in
training with dropout 0.1. Peers that are not installed are left out (benchmarks/requirements.txt):

    ours_saved     forward only: the layer after arrange_weights, saved by paddle.jit.save, by paddle.inference
    paddle         the block of Paddle's layers, which have no bfloat16 on the CPU
    torch          one projection for query, key and value, scaled_dot_product_attention
    onnxruntime    forward in float32 only, constant weights: its own Attention and SkipLayerNormalization
    openvino       forward only, constant weights: the graph before these, which it fuses by itself

Before that each library's output is compared with NumPy's in float64 on the same weights; one that differs ends the
benchmark. A fresh process that runs nothing else measures by how much a training step raises the peak of its memory.
Then, if cpu_stages of the core's build is given, as `make bench-block` does, each stage of ours is timed alone and
compared with its floor.
"""

import os
import subprocess
from contextlib import ExitStack

import numpy as np
import peers

CASES = {  # batch, seq_len, embed_dim, num_heads
    "b8_s128_e768": (8, 128, 768, 12),
    "b2_s1024_e768": (2, 1024, 768, 12),
    "b1_s2048_e1024": (1, 2048, 1024, 16),
    "b1_s8192_e512": (1, 8192, 512, 8),
    "minilm_b32_s128": (32, 128, 384, 12),  # one layer of the encoder in examples/semantic_search
    "b1_s64_e384": (1, 64, 384, 12),
    "b1_s64_e768": (1, 64, 768, 12),
    "tiny": (2, 9, 32, 4),
}
PEERS = {  # what each imports
    "ours_saved": ("paddle",),
    "paddle": ("paddle",),
    "torch": ("torch",),
    "onnxruntime": ("onnx", "onnxruntime"),
    "openvino": ("onnx", "openvino"),
}
DROPOUT = 0.1
EPSILON = 1e-5
MEMORY = "memory"


def draw_weights(case):
    """The attention half of paddle.nn.TransformerEncoder's state: float32, linear weights [in, out]."""
    generator = np.random.default_rng(0)
    embed_dim = CASES[case][2]
    state = {}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        weight = generator.standard_normal((embed_dim, embed_dim), np.float32)
        state[f"layers.0.self_attn.{name}.weight"] = weight * embed_dim**-0.5
        state[f"layers.0.self_attn.{name}.bias"] = 0.1 * generator.standard_normal(embed_dim, np.float32)
    state["layers.0.norm1.weight"] = 1 + 0.1 * generator.standard_normal(embed_dim, np.float32)
    state["layers.0.norm1.bias"] = 0.1 * generator.standard_normal(embed_dim, np.float32)
    return state


def packed_weights(case):
    """Weights and biases [in, out] of query, key and value side by side, of the output, and scale and bias of the layer
    norm."""
    state = draw_weights(case)
    linear = {
        part: [state[f"layers.0.self_attn.{name}_proj.{part}"] for name in ("q", "k", "v", "out")]
        for part in ("weight", "bias")
    }
    packed = [np.concatenate(linear[part][:3], axis=-1) for part in ("weight", "bias")]
    norm = [state[f"layers.0.norm1.{part}"] for part in ("weight", "bias")]
    return [*packed, linear["weight"][3], linear["bias"][3], *norm]


def draw_inputs(case):
    """x and the gradient of the output, [B, S, E] float32."""
    return np.random.default_rng(1).standard_normal((2, *CASES[case][:3]), np.float32)


def expected_output(case):
    """The block's output in float64, by NumPy."""
    batch, seq_len, embed_dim, num_heads = CASES[case]
    x = draw_inputs(case)[0].astype(np.float64)
    qkv_weight, qkv_bias, weight, bias, scale, shift = (array.astype(np.float64) for array in packed_weights(case))
    qkv = (x @ qkv_weight + qkv_bias).reshape(batch, seq_len, 3, num_heads, -1).transpose(2, 0, 3, 1, 4)
    attended = np.empty_like(qkv[0])
    rows = 1024  # of scores at a time
    for index in np.ndindex(batch, num_heads):
        query, key, value = (part[index] for part in qkv)
        for first in range(0, seq_len, rows):
            scores = query[first : first + rows] @ key.T * query.shape[-1] ** -0.5
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            attended[index][first : first + rows] = weights @ value / weights.sum(axis=-1, keepdims=True)
    z = x + attended.transpose(0, 2, 1, 3).reshape(x.shape) @ weight + bias
    centred = z - z.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPSILON) * scale + shift


class PaddleBlock(peers.Model):
    def __init__(self, case, dtype, fused):
        import paddle
        import paddle.nn.functional as F

        batch, seq_len, embed_dim, num_heads = CASES[case]
        head_dim = embed_dim // num_heads

        class Composed(paddle.nn.Layer):
            def __init__(self):
                super().__init__()
                self.qkv = paddle.nn.Linear(embed_dim, 3 * embed_dim)
                self.out = paddle.nn.Linear(embed_dim, embed_dim)
                self.norm = paddle.nn.LayerNorm(embed_dim)

            def forward(self, x):
                qkv = self.qkv(x).reshape([batch, seq_len, 3, num_heads, head_dim]).transpose([2, 0, 3, 1, 4])
                scores = paddle.matmul(qkv[0] * head_dim**-0.5, qkv[1], transpose_y=True)
                probabilities = F.dropout(F.softmax(scores), DROPOUT, training=self.training)
                attended = paddle.matmul(probabilities, qkv[2]).transpose([0, 2, 1, 3])
                out = self.out(attended.reshape([batch, seq_len, embed_dim]))
                return self.norm(x + F.dropout(out, DROPOUT, training=self.training))

        arrays = packed_weights(case)
        if fused:
            from paddle_fused_attention import FusedMultiHeadAttention

            layer = FusedMultiHeadAttention(embed_dim, num_heads, DROPOUT, DROPOUT, epsilon=EPSILON)
            arrays[0] = arrays[0].T
            parameters = (layer.qkv_weight, layer.qkv_bias, layer.linear_weight, layer.linear_bias)
            parameters += (layer.ln_scale, layer.ln_bias)
        else:
            layer = Composed()
            parts = (layer.qkv, layer.out, layer.norm)
            parameters = [parameter for part in parts for parameter in (part.weight, part.bias)]
        for parameter, array in zip(parameters, arrays):
            parameter.set_value(np.ascontiguousarray(array).reshape(parameter.shape))
        self._paddle, self._layer = paddle, layer.to(dtype=dtype)
        self._x, self._d_out = (paddle.to_tensor(array).astype(dtype) for array in draw_inputs(case))
        self._x.stop_gradient = False

    def set_training(self, training):
        (self._layer.train if training else self._layer.eval)()

    def forward(self):
        with self._paddle.no_grad():
            return self._layer(self._x)

    def train(self):
        self._layer(self._x).backward(self._d_out)
        self._layer.clear_gradients()
        self._x.clear_gradient()

    def output(self):
        return self.forward().astype("float64").numpy()


class TorchBlock(peers.Model):
    def __init__(self, case, dtype):
        import torch
        import torch.nn.functional as F

        batch, seq_len, embed_dim, num_heads = CASES[case]
        head_dim = embed_dim // num_heads

        class Composed(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.qkv = torch.nn.Linear(embed_dim, 3 * embed_dim)
                self.out = torch.nn.Linear(embed_dim, embed_dim)
                self.norm = torch.nn.LayerNorm(embed_dim)

            def forward(self, x):
                q, k, v = self.qkv(x).view(batch, seq_len, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4)
                attended = F.scaled_dot_product_attention(q, k, v, dropout_p=DROPOUT if self.training else 0.0)
                attended = attended.transpose(1, 2).reshape(batch, seq_len, embed_dim)
                return self.norm(x + F.dropout(self.out(attended), DROPOUT, self.training))

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        torch_dtype = getattr(torch, dtype)
        layer = Composed()
        with torch.no_grad():
            for parameter, array in zip(layer.parameters(), packed_weights(case)):
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(array.T)))
        self._torch, self._layer = torch, layer.to(torch_dtype)
        self._x, self._d_out = (torch.from_numpy(array).to(torch_dtype) for array in draw_inputs(case))
        self._x.requires_grad_()

    def set_training(self, training):
        self._layer.train(training)

    def forward(self):
        with self._torch.no_grad():
            return self._layer(self._x)

    def train(self):
        self._layer(self._x).backward(self._d_out)
        self._layer.zero_grad()
        self._x.grad = None

    def output(self):
        return self.forward().double().numpy()


def make_saved(case, dtype):
    return peers.SavedModel(PaddleBlock(case, dtype, fused=True)._layer, dtype, draw_inputs(case)[0])


def make_onnx(library, case, dtype):
    from onnx import TensorProto

    from examples.semantic_search import onnx_encoder

    *shape, num_heads = CASES[case]
    graph = onnx_encoder.Graph()
    output = onnx_encoder.add_attention(graph, "x", draw_weights(case), num_heads, EPSILON)
    model = graph.model([("x", TensorProto.FLOAT, shape)], output, shape)

    def fuse(model):
        return onnx_encoder.fuse(model, num_heads, shape[-1], 1, feed_forward=False)

    return peers.OnnxModel(library, dtype, model, fuse, draw_inputs(case)[0])


def make_block(library, case, dtype):
    if library in ("ours", "paddle"):
        return PaddleBlock(case, dtype, fused=library == "ours")
    if library == "ours_saved":
        return make_saved(case, dtype)
    return TorchBlock(case, dtype) if library == "torch" else make_onnx(library, case, dtype)


def peak_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def measure_memory(library, case):
    """By how many bytes one training step raises the peak of this fresh process."""
    block = make_block(library, case, "float32")
    block.set_training(True)
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # the peak begins anew
    before = peak_bytes()
    block.train()
    return peak_bytes() - before


def serve(library):
    """Answers also with the growth of the memory."""
    answer_others = peers.answers(lambda case, dtype: make_block(library, case, dtype))

    def answer(case, dtype, do, file=None):
        return measure_memory(library, case) if do == MEMORY else answer_others(case, dtype, do, file)

    peers.serve(answer)


def compare(libraries, threads, arguments, expected):
    """Runs and prints all cases; {"case dtype": {pass: {library: seconds}}}."""
    print(f"{threads} threads, median of {arguments.turns} turns; milliseconds, and (the time / ours)")
    peers.print_header(libraries)
    results = {}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(peers.Worker(__file__, name, threads)) for name in libraries}
        for dtype in arguments.dtypes:
            for case in arguments.cases:
                if case not in expected:
                    expected[case] = expected_output(case)
                row = results[f"{case} {dtype}"] = {}
                for name, worker in workers.items():
                    if any(peers.computes(name, dtype, which) for which in arguments.passes):
                        peers.check(worker, case, dtype, "output", expected[case])
                for which in arguments.passes:
                    taking = {name: worker for name, worker in workers.items() if peers.computes(name, dtype, which)}
                    row[which] = peers.take_turns(taking, arguments.turns, case=case, dtype=dtype, do=which)
                    peers.print_row(case, dtype, which, row[which], libraries)
    print(flush=True)
    return results


def memory_growth(library, case, threads):
    with peers.Worker(__file__, library, threads) as worker:
        return worker.ask(case=case, dtype="float32", do=MEMORY)


def compare_memory(libraries, threads, cases):
    print("growth of the peak memory in a training step, float32: MiB, and (that over ours)")
    results = {}
    for case in cases:
        results[case] = growth = {name: memory_growth(name, case, threads) for name in libraries}
        sizes = "   ".join(f"{name} {size / 2**20:.0f} ({size / growth['ours']:.2f})" for name, size in growth.items())
        print(f"{case:<18}{sizes}", flush=True)
    print(flush=True)
    return results


def time_stages(program, threads, arguments):
    """Prints the stages of all cases; {"case dtype": {stage: [seconds, floor]}}."""
    print(f"{threads} threads, stages in training: milliseconds, and that over the floor")
    results = {}
    for dtype in arguments.dtypes:
        for case in arguments.cases:
            command = [program, dtype, *map(str, CASES[case]), str(DROPOUT), str(arguments.turns)]
            output = subprocess.run(
                command,
                env=dict(os.environ, OMP_NUM_THREADS=str(threads)),
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            ).stdout
            stages = {name: [float(value) for value in values] for name, *values in map(str.split, output.splitlines())}
            results[f"{case} {dtype}"] = stages
            for name, (seconds, floor) in stages.items():
                print(f"{case:<18}{dtype:<10}{name:<24}{1e3 * seconds:>10.2f}{seconds / floor:>8.2f}", flush=True)
    print(flush=True)
    return results


def main():
    parser = peers.parser_of(__doc__, CASES, ("ours", *PEERS))
    parser.add_argument("--peers", choices=PEERS, nargs="*", default=list(PEERS))
    parser.add_argument("--stages", metavar="PROGRAM", help="cpu_stages of the core's build")
    parser.add_argument("--json", default="build/cpu_block.json")
    parser.add_argument("--chart", default="build/cpu_block.png")
    arguments = parser.parse_args()
    if arguments.worker:
        return serve(arguments.worker)

    libraries = ["ours", *peers.installed(arguments.peers, PEERS)]
    training = [name for name in libraries if name not in peers.FORWARD_ONLY]
    expected = {}
    results = {"turns": arguments.turns, "seconds": {}, "stages": {}}
    for threads in arguments.threads:
        results["seconds"][threads] = compare(libraries, threads, arguments, expected)
    results["peak growth"] = compare_memory(training, arguments.threads[0], arguments.cases)
    for threads in arguments.threads if arguments.stages else ():
        results["stages"][threads] = time_stages(arguments.stages, threads, arguments)
    peers.write(results, arguments.json)
    try:
        threads = arguments.threads[0]
        peers.draw(results["seconds"][threads], libraries, arguments.passes, threads, arguments.chart)
    except ImportError:
        print("no chart: matplotlib is not installed")


if __name__ == "__main__":
    main()
