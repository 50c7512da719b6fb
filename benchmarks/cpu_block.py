"""The attention block on the CPU: ours against the same block composed of Paddle's layers and of PyTorch's.

    python benchmarks/cpu_block.py [--threads 2 1] [--dtype float32 bfloat16] [--rounds 7] [--case NAME ...]
        [--json FILE] [--chart FILE]

Each library runs in a process of its own. They take turns at a case for several rounds (three if these take long), and
the medians are compared: forward in eval mode without gradients, and forward and backward in training with dropout 0.1.
Paddle's layers have no bfloat16 on the CPU. A fresh process that runs nothing else measures by how much a training step
raises the peak of its memory. Then each stage of ours is timed alone and compared with its floor (cpu_stages.cc, for
which g++ is needed). benchmarks/requirements.txt has PyTorch, which is left out if it is not installed, and matplotlib.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from glob import glob

import peers

CASES = {  # batch, seq_len, embed_dim, num_heads
    "b8_s128_e768": (8, 128, 768, 12),
    "b2_s1024_e768": (2, 1024, 768, 12),
    "b1_s2048_e1024": (1, 2048, 1024, 16),
    "b1_s8192_e512": (1, 8192, 512, 8),
    "minilm_b32_s128": (32, 128, 384, 12),  # one layer of the encoder in examples/semantic_search
}
LIBRARIES = ("ours", "paddle", "torch")
PASSES = ("forward", "forward+backward")
DTYPES = ("float32", "bfloat16")
DROPOUT = 0.1
TURN = 0.25  # seconds of steps
MEMORY = "memory"
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def paddle_steps(case, dtype, fused):
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
            attended = paddle.matmul(probabilities, qkv[2]).transpose([0, 2, 1, 3]).reshape([batch, seq_len, embed_dim])
            return self.norm(x + F.dropout(self.out(attended), DROPOUT, training=self.training))

    if fused:
        from paddle_fused_attention import FusedMultiHeadAttention

        layer = FusedMultiHeadAttention(embed_dim, num_heads, DROPOUT, DROPOUT)
    else:
        layer = Composed()
    layer.to(dtype=dtype)
    x = paddle.randn([batch, seq_len, embed_dim]).astype(dtype)
    x.stop_gradient = False
    d_out = paddle.randn(x.shape).astype(dtype)

    def forward():
        layer.eval()
        with paddle.no_grad():
            layer(x)

    def train():
        layer.train()
        layer(x).backward(d_out)
        layer.clear_gradients()
        x.clear_gradient()

    return forward, train


def torch_steps(case, dtype):
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
    layer = Composed().to(torch_dtype)
    x = torch.randn(batch, seq_len, embed_dim, dtype=torch_dtype, requires_grad=True)
    d_out = torch.randn(batch, seq_len, embed_dim).to(torch_dtype)

    def forward():
        layer.eval()
        with torch.no_grad():
            layer(x)

    def train():
        layer.train()
        layer(x).backward(d_out)
        layer.zero_grad()
        x.grad = None

    return forward, train


def steps(library, case, dtype):
    return torch_steps(case, dtype) if library == "torch" else paddle_steps(case, dtype, fused=library == "ours")


def peak_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def measure_memory(library, case):
    """By how many bytes one training step raises the peak of this fresh process."""
    _, train = steps(library, case, "float32")
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # the peak begins anew
    before = peak_bytes()
    train()
    return peak_bytes() - before


def serve(library):
    """Answers with the seconds of a pass, or with the growth of the memory."""
    prepared = {}

    def answer(case, dtype, which):
        if which == MEMORY:
            return measure_memory(library, case)
        if (case, dtype) not in prepared:
            prepared.clear()
            prepared[case, dtype] = steps(library, case, dtype)
            for step in prepared[case, dtype]:
                step()
        return peers.time_step(prepared[case, dtype][PASSES.index(which)], TURN)

    peers.serve(answer)


def run_case(workers, case, dtype, rounds):
    """The median seconds by pass and library."""
    taking = {name: worker for name, worker in workers.items() if name != "paddle" or dtype == "float32"}
    return {which: peers.take_turns(taking, rounds, case=case, dtype=dtype, which=which) for which in PASSES}


def compare(libraries, threads, arguments):
    """Runs and prints all cases; {"case dtype": {pass: {library: seconds}}}."""
    print(f"{threads} threads, median of {arguments.rounds} rounds; milliseconds, and (the time / ours)")
    peers.print_header(libraries)
    results = {}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(peers.Worker(__file__, name, threads)) for name in libraries}
        for dtype in arguments.dtype:
            for case in arguments.case:
                results[f"{case} {dtype}"] = medians = run_case(workers, case, dtype, arguments.rounds)
                for which, seconds in medians.items():
                    peers.print_row(case, dtype, which, seconds, libraries)
    print(flush=True)
    return results


def memory_growth(library, case, threads):
    with peers.Worker(__file__, library, threads) as worker:
        return worker.ask(case=case, dtype="float32", which=MEMORY)


def compare_memory(libraries, threads, cases):
    print("growth of the peak memory in a training step, float32, MiB, and relative to Paddle's layers")
    results = {}
    for case in cases:
        results[case] = growth = {name: memory_growth(name, case, threads) for name in libraries}
        sizes = "".join(f"{name}: {size / 2**20:.0f}   " for name, size in growth.items())
        print(f"{case:<18}{sizes}ours / paddle: {growth['ours'] / growth['paddle']:.2f}", flush=True)
    print(flush=True)
    return results


def build_stages():
    """Compiles cpu_stages.cc and the core; the program's path."""
    import paddle

    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise SystemExit(f"{compiler} was not found, which the times of the stages need: --no-stages leaves them out")
    library = paddle.sysconfig.get_lib()
    folder = os.path.join(ROOT, "build", "cpu_stages")
    os.makedirs(folder, exist_ok=True)
    flags = ["-std=c++17", "-O3", "-DNDEBUG", "-fopenmp", "-ffp-contract=fast", "-I" + os.path.join(ROOT, "custom_ops")]

    def compile_source(source):
        target = os.path.join(folder, os.path.basename(source) + ".o")
        native = ["-march=native"] if source.endswith("cpu_stages.cc") else []
        subprocess.run([compiler, *flags, *native, "-c", source, "-o", target], check=True)
        return target

    sources = [
        os.path.join(ROOT, "benchmarks", "cpu_stages.cc"),
        *glob(os.path.join(ROOT, "custom_ops", "core", "cpu", "*.cc")),
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_source, sources))
    program = os.path.join(folder, "cpu_stages")
    libraries = ["-L" + library, "-l:libiomp5.so", "-Wl,-rpath," + library]
    subprocess.run([compiler, *objects, "-o", program, *libraries], check=True)
    return program


def time_stages(program, threads, arguments):
    """Prints the stages of all cases; {"case dtype": {stage: [seconds, floor]}}."""
    print(f"{threads} threads, stages in training: milliseconds, and that over the floor")
    results = {}
    for dtype in arguments.dtype:
        for case in arguments.case:
            command = [program, dtype, *map(str, CASES[case]), str(DROPOUT), str(arguments.rounds)]
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({os.cpu_count(), 1}, reverse=True))
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--no-stages", action="store_true", help="time the whole block only")
    parser.add_argument("--json", default="build/cpu_block.json")
    parser.add_argument("--chart", default="build/cpu_block.png")
    parser.add_argument("--worker", choices=LIBRARIES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return serve(arguments.worker)

    program = None if arguments.no_stages else build_stages()
    libraries = [name for name in LIBRARIES if name != "torch" or importlib.util.find_spec(name)]
    results = {"rounds": arguments.rounds, "seconds": {}, "stages": {}}
    for threads in arguments.threads:
        results["seconds"][threads] = compare(libraries, threads, arguments)
    results["peak growth"] = compare_memory(libraries, arguments.threads[0], arguments.case)
    for threads in arguments.threads if program else ():
        results["stages"][threads] = time_stages(program, threads, arguments)
    peers.write(results, arguments.json)
    try:
        threads = arguments.threads[0]
        peers.draw(results["seconds"][threads], libraries, PASSES, threads, arguments.chart)
    except ImportError:
        print("no chart: matplotlib is not installed")


if __name__ == "__main__":
    main()
