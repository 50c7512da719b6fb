"""How exact the attention block is on a GPU: the errors of ours and of PyTorch's ways, on random blocks.

    make gpu-exact
    PYTHONPATH=build/gpu python3 benchmarks/gpu_exact.py [--blocks 1000] [--seed 0] [--offset 1.0]
        [--dtypes bfloat16 ...]

Blocks of random sizes, with biases, and an offset that all rows of x have in common, about as large as the values. An
error is the norm of the difference to the block in float64, of inputs that are rounded already. Printed are quantiles,
over the blocks, of the ratio of our error to that of PyTorch's flash attention and to that of its unfused operations,
each in the same block of PyTorch's functions. No dropout: each draws its own masks.
"""

import argparse
import collections
import random

import torch
from gpu_block import PARAMETERS, Case, library_attention, our_attention_block, plain_torch_block, unfused_attention

QUANTILES = 0.5, 0.99, 1.0


def random_case(rng, dtypes):
    head_dim = rng.choice((32, 64, 64, 80, 96, 128))
    num_heads = rng.choice((1, 2, 4, 8))
    pre_layer_norm, causal = rng.random() < 0.5, rng.random() < 0.5
    sizes = rng.randint(1, 4), rng.choice((64, 128, rng.randint(2, 1024))), num_heads * head_dim, num_heads
    return Case("random", *sizes, rng.choice(dtypes), pre_layer_norm, causal, 0.0)


def draw_inputs(case, offset):
    """x, d_out, and the parameters, which also end in the dtype of the case."""
    dtype = getattr(torch, case.dtype)

    def normal(*shape):
        return torch.randn(*shape, device="cuda")

    x = normal(case.batch, case.seq_len, case.embed_dim) + offset * normal(case.embed_dim)
    tensors = {"x": x, "d_out": normal(*x.shape)}
    for name, shape in PARAMETERS.items():
        tensors[name] = normal(*shape(case)) * (case.embed_dim**-0.5 if "weight" in name else offset)
        if name == "ln_scale":
            tensors[name] = 1 + 0.1 * normal(*shape(case))
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def run(block, tensors):
    """The result and all gradients, in float64."""
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    d_out = tensors.pop("d_out").detach()
    parameters = {name: tensor for name, tensor in tensors.items() if name != "x"}
    out = block(tensors["x"], parameters, True)
    gradients = torch.autograd.grad(out, list(tensors.values()), d_out)
    return {name: tensor.detach().double() for name, tensor in zip(["out", *tensors], (out, *gradients))}


def errors_of(case, offset):
    """Way -> name -> error."""
    tensors = draw_inputs(case, offset)
    unfused = plain_torch_block(case, unfused_attention(case))
    exact = run(unfused, {name: tensor.double() for name, tensor in tensors.items()})
    ways = {
        "ours": our_attention_block(case),
        "flash": plain_torch_block(case, library_attention(case, "flash")),
        "unfused": unfused,
    }
    return {
        way: {name: float((result - exact[name]).norm()) for name, result in run(block, tensors).items()}
        for way, block in ways.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--offset", type=float, default=1.0, help="size of biases and of what rows of x share")
    parser.add_argument("--dtypes", nargs="*", default=["float16", "bfloat16"])
    options = parser.parse_args()

    rng = random.Random(options.seed)
    torch.manual_seed(options.seed)
    ratios = collections.defaultdict(list)  # (name, peer): of the blocks
    for _ in range(options.blocks):
        errors = errors_of(random_case(rng, options.dtypes), options.offset)
        for name, ours in errors["ours"].items():
            for peer in ("flash", "unfused"):
                ratios[name, peer].append(ours / max(errors[peer][name], 1e-30))
    print(f"{torch.cuda.get_device_name()}, {options.blocks} blocks, offset {options.offset}, {options.dtypes}")
    print("our error over that of the peer: median, 99th percentile, largest")
    print(f"  {'':16}{'flash':>24}{'unfused':>24}")
    for name in dict.fromkeys(name for name, _ in ratios):
        line = f"  {name:16}"
        for peer in ("flash", "unfused"):
            of_blocks = torch.tensor(ratios[name, peer]).quantile(torch.tensor(QUANTILES))
            line += "".join(f"{float(value):8.2f}" for value in of_blocks)
        print(line)


if __name__ == "__main__":
    main()
