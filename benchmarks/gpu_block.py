"""The attention block on one GPU: ours against PyTorch's ways, attention alone, and each of our stages against its
floor.

    make gpu-bench
    PYTHONPATH=build/gpu python3 benchmarks/gpu_block.py [--cases bert_base ...] [--compile flash cudnn]
        [--parts block ...]

All contenders of a case run in one process, taking turns; a time is the median over turns of the time per call, host
work included. `forward` is inference: no dropout, nothing saved. `training` is forward and gradients of x and of all
parameters, with the case's dropout; `in a graph` it is a replayed CUDA graph, without host work. Peak memory is what a
training step allocates beyond what exists before it. The stages are timed as replays of a CUDA graph too; their floors
are bytes over the copy rate and operations over the rate of a large matrix product, both measured at the start.

Writes gpu_block.json and gpu_block.png into --out (default: build).
"""

import argparse
import contextlib
import json
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pfa_core
import torch
import torch.nn.functional as F
import torch.utils.cpp_extension
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    seq_len: int
    embed_dim: int
    num_heads: int
    dtype: str
    pre_layer_norm: bool
    causal: bool
    rate: float
    peers: tuple = ("unfused", "flash", "cudnn")

    @property
    def head_dim(self):
        return self.embed_dim // self.num_heads

    @property
    def rows(self):
        return self.batch * self.seq_len

    def config(self, training):
        return dict(
            batch=self.batch,
            seq_len=self.seq_len,
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            pre_layer_norm=self.pre_layer_norm,
            final_layer_norm=not self.pre_layer_norm,
            causal=self.causal,
            dropout_rate=self.rate,
            attn_dropout_rate=self.rate,
            training=training,
            allow_tf32=True,
        )


CASES = [
    Case("pr_test_fp32", 8, 128, 1024, 16, "float32", False, False, 0.0, ("unfused", "efficient")),
    Case("pr_test", 8, 128, 1024, 16, "float16", False, False, 0.1),
    Case("bert_base", 32, 512, 768, 12, "float16", False, False, 0.1),
    Case("bert_large", 16, 512, 1024, 16, "bfloat16", False, False, 0.1),
    Case("gpt_2k", 8, 2048, 2048, 16, "bfloat16", True, True, 0.1),
    Case("gpt_2k_nodrop", 8, 2048, 2048, 16, "bfloat16", True, True, 0.0),
    Case("long_16k", 1, 16384, 4096, 32, "bfloat16", True, True, 0.0, ("flash", "cudnn")),
]


def random_mask(*shape):
    return torch.rand(*shape, device="cuda") > 0.1


def padding(batch, seq_len):
    """[batch, 1, 1, seq_len]: sequences of half the length up to the whole."""
    lengths = torch.linspace(seq_len // 2, seq_len, batch, device="cuda").int()
    return (torch.arange(seq_len, device="cuda") < lengths[:, None])[:, None, None]


# label, batch, seq_len, num_heads, head_dim, causal, and what makes the mask of the first three sizes
ATTENTION = [
    ("causal", 4, 4096, 16, 128, True, None),
    ("full", 4, 4096, 16, 128, False, None),
    ("causal", 4, 4096, 32, 64, True, None),
    ("full", 4, 4096, 32, 64, False, None),
    ("full", 32, 512, 12, 64, False, None),
]
MASKED_ATTENTION = [
    ("bool [B,1,1,S], padding", 16, 512, 16, 64, False, lambda b, s, h: padding(b, s)),
    ("float32 [B,1,1,S], padding", 2, 4096, 16, 128, False, lambda b, s, h: torch.where(padding(b, s), 0.0, -1e4)),
    ("bool [B,1,1,S], padding, causal", 8, 2048, 16, 128, True, lambda b, s, h: padding(b, s)),
    ("bool [B,1,S,S]", 16, 512, 16, 64, False, lambda b, s, h: random_mask(b, 1, s, s)),
    ("int64 [B,1,S,S]", 16, 512, 16, 64, False, lambda b, s, h: random_mask(b, 1, s, s).long()),
    ("float32 [B,1,S,S]", 16, 512, 16, 64, False, lambda b, s, h: torch.randn(b, 1, s, s, device="cuda")),
    ("bfloat16 [B,H,S,S]", 16, 512, 16, 64, False, lambda b, s, h: torch.randn(b, h, s, s, device="cuda").bfloat16()),
    ("bfloat16 [1,H,S,S]", 2, 4096, 16, 128, False, lambda b, s, h: torch.randn(1, h, s, s, device="cuda").bfloat16()),
    ("bfloat16 [1,H,S,S]", 16, 511, 16, 64, False, lambda b, s, h: torch.randn(1, h, s, s, device="cuda").bfloat16()),
]

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}

PARAMETERS = {
    "qkv_weight": lambda c: (3 * c.embed_dim, c.embed_dim),
    "qkv_bias": lambda c: (3 * c.embed_dim,),
    "linear_weight": lambda c: (c.embed_dim, c.embed_dim),
    "linear_bias": lambda c: (c.embed_dim,),
    "ln_scale": lambda c: (c.embed_dim,),
    "ln_bias": lambda c: (c.embed_dim,),
}


def draw_parameters(case, shapes=PARAMETERS):
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    parameters = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape(case), device="cuda") * (case.embed_dim**-0.5 if "weight" in name else 0.1)
        if name.endswith("scale"):
            tensor += 1
        parameters[name] = tensor.to(dtype).requires_grad_()
    return parameters


# The contenders. Each is a function (x, parameters, training) -> out.


def address(tensor):
    return tensor.data_ptr()


def current_stream():
    return torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())


def load_extension():
    """torch_block.cc, built against the core's library that lies beside pfa_core."""
    root = Path(__file__).resolve().parents[1]
    return torch.utils.cpp_extension.load(
        name="pfa_torch_block",
        sources=[str(root / "benchmarks/torch_block.cc"), str(root / "custom_ops/pybind/config.cc")],
        extra_include_paths=[str(root / "custom_ops")],
        extra_cflags=["-O2"],
        extra_ldflags=[str(Path(pfa_core.__file__).parent / "libpfa.a"), "-fopenmp", "-ldl"],
        with_cuda=True,
    )


class Ours:
    """A block as an autograd function on PyTorch's tensors: x and those of `names`."""

    def __init__(self, config, names):
        extension = load_extension()
        self.blocks = {training: extension.Block(config(training), ["x", *names]) for training in (False, True)}

    def __call__(self, x, parameters, training):
        return self.blocks[training]([x, *parameters.values()], training)


def our_attention_block(case):
    return Ours(case.config, [("pre_" if case.pre_layer_norm else "") * n.startswith("ln_") + n for n in PARAMETERS])


def plain_torch_block(case, attention):
    """The block of PyTorch's functions, with an attention function (q, k, v, rate) on [B, H, S, D]."""

    def block(x, parameters, training):
        b, s, e = x.shape
        h = x
        rate = case.rate if training else 0.0
        norm = dict(weight=parameters["ln_scale"], bias=parameters["ln_bias"])
        if case.pre_layer_norm:
            h = F.layer_norm(h, (e,), **norm)
        qkv = F.linear(h, parameters["qkv_weight"], parameters["qkv_bias"])
        q, k, v = qkv.view(b, s, 3, case.num_heads, case.head_dim).permute(2, 0, 3, 1, 4)
        o = attention(q, k, v, rate).transpose(1, 2).reshape(b, s, e)
        y = F.linear(o, parameters["linear_weight"].t(), parameters["linear_bias"])
        z = x + F.dropout(y, rate, training)
        return z if case.pre_layer_norm else F.layer_norm(z, (e,), **norm)

    return block


def unfused_attention(case):
    hidden = None
    if case.causal:
        hidden = torch.ones(case.seq_len, case.seq_len, dtype=torch.bool, device="cuda").triu(1)

    def attention(q, k, v, rate):
        scores = (q * case.head_dim**-0.5) @ k.transpose(-1, -2)
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        return F.dropout(scores.softmax(-1), rate, rate > 0) @ v

    return attention


def library_attention(case, backend):
    def attention(q, k, v, rate):
        with sdpa_kernel(BACKENDS[backend]):
            return F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=case.causal)

    return attention


def contenders(case, options, ours=our_attention_block, plain=plain_torch_block):
    """Ours and the peers: functions of the case, the latter of an attention function too, that make what is timed."""
    yield "ours", ours(case)
    for peer in case.peers:
        attention = unfused_attention(case) if peer == "unfused" else library_attention(case, peer)
        block = plain(case, attention)
        yield f"{peer} eager", block
        if peer in options.compile:
            yield f"{peer} compiled", torch.compile(block, dynamic=False)


# Measuring


def elapsed(call, count):
    """Milliseconds per call over `count` calls."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def take_turns(calls, turns, turn_ms=12.0):
    """Median milliseconds of every call, by name; a call that fails is left out and its error printed."""
    counts = {}
    for name, call in list(calls.items()):
        try:
            for _ in range(3):
                call()
            counts[name] = max(1, min(200, int(turn_ms / elapsed(call, 2))))
        except Exception as error:  # a way that does not exist for this case, or out of memory
            print(f"    {name}: {str(error).strip().splitlines()[0][:120]}")
            torch.cuda.empty_cache()
    times = {name: [] for name in counts}
    for _ in range(turns):
        for name, count in counts.items():
            times[name].append(elapsed(calls[name], count))
    return {name: statistics.median(values) for name, values in times.items()}


def graphed_ms(call, repeats=20, turns=7):
    """Milliseconds per call without host work: replays of a graph of `repeats` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(stream.cuda_stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            call(stream.cuda_stream)
    graph.replay()
    return statistics.median(elapsed(graph.replay, 2) for _ in range(turns)) / repeats


def peak_mib(call):
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_rate():
    """Bytes per second, read and written."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(elapsed(lambda: target.copy_(source), 5) for _ in range(5)) * 1e3


def product_rate(dtype):
    """Operations per second of a large matrix product."""
    n = 8192
    a = torch.randn(n, n, device="cuda").to(getattr(torch, dtype))
    return 2 * n**3 / statistics.median(elapsed(lambda: a @ a, 3) for _ in range(5)) * 1e3


# The parts


def run_block(case, options, parameters, blocks):
    """Times `blocks`, pairs of a name and a function (x, parameters, training) -> out; the first is ours."""
    x = (
        torch.randn(case.batch, case.seq_len, case.embed_dim, device="cuda")
        .to(getattr(torch, case.dtype))
        .requires_grad_()
    )
    d_out = torch.randn_like(x)
    forward, training = {}, {}

    def training_step(block):
        return torch.autograd.grad(block(x, parameters, True), [x, *parameters.values()], d_out)

    def inference(block):
        with torch.no_grad():
            return block(x, parameters, False)

    for name, block in blocks:
        forward[name] = lambda block=block: inference(block)
        training[name] = lambda block=block: training_step(block)
    result = {
        "case": asdict(case),
        "forward_ms": take_turns(forward, options.turns),
        "training_ms": take_turns(training, options.turns),
    }
    result["peak_mib"] = {name: peak_mib(training[name]) for name in result["training_ms"]}
    result["graph_ms"] = {}
    for name in ("ours", "flash eager", "efficient eager"):
        if name in training:
            result["graph_ms"][name] = graphed_ms(lambda _, name=name: training[name](), repeats=1)
    if options.profile:
        profile(case, training["ours"], options.profile)
    torch.compiler.reset()
    return result


def profile(case, call, steps):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            call()
        torch.cuda.synchronize()
    events = [e for e in profiler.key_averages() if e.device_time_total > 0]
    events.sort(key=lambda e: -e.device_time_total)
    launches = sum(e.count for e in events) / steps
    total = sum(e.device_time_total for e in events) / steps
    print(f"  {case.name}: {launches:.0f} launches, {total:.0f} us of kernels in a training step of ours")
    for e in events[:16]:
        print(f"    {e.device_time_total / steps:9.1f} us {e.count / steps:4.0f} x  {e.key[:110]}")


def print_block(result):
    name = result["case"]["name"]
    print(f"\n{name}: milliseconds, and how many times ours")
    titles = {
        "forward_ms": "forward",
        "training_ms": "training",
        "peak_mib": "peak MiB",
        "graph_ms": "training in a graph",
    }
    print(f"  {'':22}" + "".join(f"{title:>22}" for title in titles.values()))
    for contender in dict.fromkeys(n for key in titles for n in result[key]):
        line = f"  {contender:22}"
        for key in titles:
            if contender in result[key]:
                value = result[key][contender]
                line += f"{value:14.{0 if key == 'peak_mib' else 3}f} {value / result[key]['ours']:6.2f}x"
            else:
                line += f"{'-':>22}"
        print(line)


def peer_mask(mask, seq_len, causal):
    """What PyTorch takes for a mask of ours: bool, or of the query's dtype, and none beside is_causal."""
    if mask is None:
        return dict(is_causal=causal)
    mask = mask.bfloat16() if mask.is_floating_point() else mask.bool()
    if causal:
        mask = mask & torch.ones(seq_len, seq_len, dtype=torch.bool, device="cuda").tril()
    return dict(attn_mask=mask)


def time_attention(batch, seq_len, num_heads, head_dim, causal, peers, turns, mask):
    config = dict(batch=batch, seq_len=seq_len, embed_dim=num_heads * head_dim, num_heads=num_heads, head_dim=head_dim)
    block = pfa_core.CudaBlock(dict(config, dtype="bfloat16", causal=causal))
    qkv = torch.randn(batch, seq_len, 3, num_heads, head_dim, device="cuda").bfloat16()
    d_qkv, out, d_out = torch.empty_like(qkv), torch.empty_like(qkv[:, :, 0]), torch.randn_like(qkv[:, :, 0])
    log_sum_exp = torch.empty(batch, num_heads, seq_len, device="cuda")
    score_shift = torch.empty_like(log_sum_exp)
    arrays = dict(qkv=qkv, attn_out=out, log_sum_exp=log_sum_exp, score_shift=score_shift, x=out, out=out)
    arrays.update(d_attn_out=d_out, d_qkv=d_qkv)
    arrays = {n: address(t) for n, t in arrays.items()}
    if mask is not None:
        strides = mask.expand(batch, num_heads, seq_len, seq_len).stride()
        arrays.update(mask=(address(mask), str(mask.dtype).split(".")[1], strides))
    size = block.stage_workspace_bytes(dict(arrays, d_x=arrays["x"]), True)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    arrays["stage_workspace"] = address(workspace)
    stream = current_stream()
    forward = {"ours": lambda: block.run_stage("attention_forward", arrays, stream)}
    backward = {"ours": lambda: block.run_stage("attention_backward", arrays, stream)}
    q, k, v = (t.detach().requires_grad_() for t in qkv.permute(2, 0, 3, 1, 4))
    peer_d_out = d_out.transpose(1, 2)
    switches = peer_mask(mask, seq_len, causal)
    for backend in peers:

        def attention(backend=backend):
            with sdpa_kernel(BACKENDS[backend]):
                return F.scaled_dot_product_attention(q, k, v, **switches)

        def gradients(o):
            return torch.autograd.grad(o, (q, k, v), peer_d_out, retain_graph=True)

        try:
            backward[backend] = partial(gradients, attention())
        except RuntimeError as error:  # a way that does not exist for this mask
            print(f"    {backend}: {str(error).strip().splitlines()[0][:120]}")
            continue
        forward[backend] = attention
    with torch.no_grad():
        times = {"forward": take_turns(forward, turns)}
    times["backward"] = take_turns(backward, turns)
    return times


def print_attention(results, peers, rivals, title):
    print(f"\n{title}: TFLOP/s forward / backward, and ours over {' or '.join(rivals)}")
    print(f"  {'':52}" + "".join(f"{n:>16}" for n in ("ours", *peers, "ratio")))
    for r in results:
        line = f"  {r['name']:52}"
        for n in ("ours", *peers):
            line += f"{r['tflops']['forward'].get(n, 0):9.0f} /{r['tflops']['backward'].get(n, 0):5.0f}"
        for direction, width in (("forward", 9), ("backward", 5)):
            rates = r["tflops"][direction]
            best = max((rates[n] for n in rivals if n in rates), default=float("nan"))
            line += f"{' /' if direction == 'backward' else ''}{rates['ours'] / best:{width}.2f}"
        print(line)


def run_attention(cases, peers, rivals, title, turns):
    results = []
    for label, batch, seq_len, num_heads, head_dim, causal, make_mask in cases:
        mask = make_mask(batch, seq_len, num_heads) if make_mask else None
        times = time_attention(batch, seq_len, num_heads, head_dim, causal, peers, turns, mask)
        torch.cuda.empty_cache()
        operations = 4 * batch * num_heads * seq_len**2 * head_dim / (2 if causal else 1)
        rates = {
            direction: {n: factor * operations / ms / 1e9 for n, ms in times[direction].items()}
            for direction, factor in (("forward", 1.0), ("backward", 2.5))
        }
        results.append({"name": f"B{batch} S{seq_len} H{num_heads} D{head_dim} {label}", "ms": times, "tflops": rates})
    print_attention(results, peers, rivals, title)
    return results


def stage_costs(case):
    """Stage -> (operations, bytes) that it cannot do without, in training."""
    m, e = case.rows, case.embed_dim
    size = getattr(torch, case.dtype).itemsize
    qkv, activation = 3 * m * e * size, m * e * size
    weight = e * e * size
    scores = 4 * case.batch * case.num_heads * case.seq_len**2 * case.head_dim / (2 if case.causal else 1)
    dropped = case.rate > 0
    costs = {
        "qkv_linear_forward": (6 * m * e * e, activation + qkv + 3 * weight),
        "attention_forward": (scores, qkv + activation),
        "output_linear_forward": (2 * m * e * e, (2 if dropped else 3) * activation + weight),
        "output_linear_backward": (4 * m * e * e, 3 * activation + 2 * weight),
        "attention_backward": (2.5 * scores, 2 * qkv + 2 * activation),
        "qkv_linear_backward": (12 * m * e * e, 2 * qkv + (2 if case.pre_layer_norm else 3) * activation + 6 * weight),
    }
    if case.pre_layer_norm:
        costs["layer_norm_forward"] = (0, 2 * activation)
        costs["layer_norm_backward"] = (0, 4 * activation)
        if dropped:
            costs["residual_forward"] = (0, 3 * activation)
            costs["residual_backward"] = (0, 2 * activation)
        else:
            costs["residual_backward"] = (0, activation)  # the bias's gradient
    else:
        costs["residual_forward"] = (0, (4 if dropped else 2) * activation)
        costs["residual_backward"] = (0, (4 if dropped else 3) * activation)
    return costs


def run_attention_stages(case, copy, products):
    dtype = getattr(torch, case.dtype)
    m, e = case.rows, case.embed_dim

    def new(*shape, dtype=dtype):
        return torch.randn(*shape, device="cuda").to(dtype)

    tensors = {n: t.detach() for n, t in draw_parameters(case).items()}
    prefix = "pre_" if case.pre_layer_norm else ""
    tensors = {prefix + n if n.startswith("ln_") else n: t for n, t in tensors.items()}
    tensors.update({"d_" + n: torch.empty_like(t) for n, t in tensors.items()})
    for name in ("x", "hidden", "attn_out", "residual", "out"):
        tensors[name], tensors["d_" + name] = new(m, e), new(m, e)
    tensors["d_linear"] = new(m, e)
    if not case.pre_layer_norm:
        tensors["hidden"] = tensors["x"]
        tensors["d_hidden"] = tensors["d_x"]
    if not case.rate:
        tensors["d_linear"] = tensors["d_residual"]
    tensors["qkv"], tensors["d_qkv"] = new(m, 3 * e), new(m, 3 * e)
    for name in ("pre_ln_mean", "pre_ln_rstd", "ln_mean", "ln_rstd"):
        tensors[name] = torch.zeros(m, device="cuda") if "mean" in name else torch.ones(m, device="cuda")
    for name in ("log_sum_exp", "score_shift"):
        tensors[name] = torch.zeros(case.batch, case.num_heads, case.seq_len, device="cuda")
    return run_stages(case, case.config(True), tensors, stage_costs(case), copy, products, before=["attention_forward"])


def run_stages(case, config, tensors, costs, copy, products, before=()):
    """Times each stage of `costs` on its own, after those of `before` have run; y stands where z will."""
    block = pfa_core.CudaBlock(config)
    tensors = dict(tensors, y=tensors["residual"], random_state=torch.tensor([1, 2], device="cuda"))
    arrays = {n: address(t) for n, t in tensors.items()}
    size = max(block.stage_workspace_bytes(arrays, backward) for backward in (False, True))
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    arrays["stage_workspace"] = address(workspace)
    for stage in before:
        block.run_stage(stage, arrays, current_stream())

    results = {}
    for stage, (operations, moved) in costs.items():
        ms = graphed_ms(lambda stream, stage=stage: block.run_stage(stage, arrays, stream))
        floor = 1e3 * max(operations / products[case.dtype], moved / copy)
        results[stage] = {
            "ms": ms,
            "floor_ms": floor,
            "tflops": operations / ms / 1e9,
            "copy_share": moved / copy * 1e3 / ms,
        }
    print(f"\n{case.name}: our stages alone")
    print(f"  {'':24}{'us':>10}{'floor us':>10}{'floor/ours':>12}{'TFLOP/s':>10}{'of copy rate':>14}")
    for stage, r in results.items():
        rate = f"{r['tflops']:10.0f}" if r["tflops"] else f"{'-':>10}"
        print(
            f"  {stage:24}{1e3 * r['ms']:10.1f}{1e3 * r['floor_ms']:10.1f}{r['floor_ms'] / r['ms']:12.2f}{rate}"
            f"{100 * r['copy_share']:13.0f}%"
        )
    return {"case": case.name, "stages": results}


def draw_chart(results, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [r["case"]["name"] for r in results]
    figure, axes = plt.subplots(2, 1, figsize=(11, 8), constrained_layout=True)
    for axis, key, title in zip(axes, ("forward_ms", "training_ms"), ("forward", "forward and backward")):
        peers = [p for p in ("unfused", "efficient", "flash", "cudnn") if any(f"{p} eager" in r[key] for r in results)]
        width = 0.8 / len(peers)
        for i, peer in enumerate(peers):
            places, heights = [], []
            for j, r in enumerate(results):
                times = [ms for n, ms in r[key].items() if n.startswith(peer)]
                if times:
                    places.append(j + (i - (len(peers) - 1) / 2) * width)
                    heights.append(min(times) / r[key]["ours"])
            bars = axis.bar(places, heights, width, label=f"PyTorch, {peer}")
            axis.bar_label(bars, fmt="%.2f", fontsize=8)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(names)), names)
        axis.set_ylabel("time / ours")
        axis.set_title(f"Attention block, {title}: the better of eager and compiled over ours")
        axis.legend()
    figure.savefig(path, dpi=130)


@contextlib.contextmanager
def tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def parse_options(description, cases, parts):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--cases", nargs="*", default=[case.name for case in cases])
    parser.add_argument("--parts", nargs="*", default=parts)
    parser.add_argument(
        "--compile",
        nargs="*",
        default=["unfused", "efficient", "flash", "cudnn"],
        help="PyTorch's ways to try compiled, too",
    )
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument(
        "--profile", type=int, default=0, metavar="STEPS", help="also list the kernels of our training step"
    )
    parser.add_argument("--out", type=Path, default=Path("build"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def start_report():
    """What a report begins with, the card's rates; they are printed too."""
    copy, products = copy_rate(), {dtype: product_rate(dtype) for dtype in ("float16", "bfloat16", "float32")}
    card = torch.cuda.get_device_name()
    print(f"{card}, PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    rates = ", ".join(f"{rate / 1e12:.0f} TFLOP/s {dtype}" for dtype, rate in products.items())
    print(f"copy {copy / 1e12:.2f} TB/s; matrix products {rates} (float32: TF32)")
    report = {"card": card, "copy_bytes_per_s": copy, "product_ops_per_s": products, "torch": torch.__version__}
    report["blocks"], report["stages"] = [], []
    return report


def main():
    options = parse_options(__doc__.splitlines()[0], CASES, ["block", "attention", "masks", "stages"])
    cases = [case for case in CASES if case.name in options.cases]

    with tf32():
        report = start_report()
        copy, products = report["copy_bytes_per_s"], report["product_ops_per_s"]
        for case in cases:
            if "block" in options.parts:
                blocks = contenders(case, options)
                report["blocks"].append(run_block(case, options, draw_parameters(case), blocks))
                print_block(report["blocks"][-1])
                torch.cuda.empty_cache()
            if "stages" in options.parts:
                report["stages"].append(run_attention_stages(case, copy, products))
                torch.cuda.empty_cache()
        if "attention" in options.parts:
            peers, title = ("flash", "cudnn"), "attention alone, bfloat16"
            report["attention"] = run_attention(ATTENTION, peers, ("flash",), title, options.turns)
        if "masks" in options.parts:
            peers, title = (
                ("efficient", "cudnn"),
                "attention with masks, bfloat16; of the work that there is without a mask",
            )
            report["masks"] = run_attention(MASKED_ATTENTION, peers, peers, title, options.turns)
    (options.out / "gpu_block.json").write_text(json.dumps(report, indent=1))
    if report["blocks"]:
        draw_chart(report["blocks"], options.out / "gpu_block.png")
    print(f"\nwrote {options.out}/gpu_block.json" + (" and gpu_block.png" if report["blocks"] else ""))


if __name__ == "__main__":
    main()
