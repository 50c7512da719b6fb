"""A whole layer of a transformer, attention and feed-forward block, on one GPU: ours against PyTorch's ways, and each
stage of our feed-forward block against its floor.

    PYTHONPATH=build/gpu python3 benchmarks/gpu_layer.py [--cases bert_large ...] [--compile flash cudnn]
        [--parts layer stages]

What is timed, and how, is that of gpu_block.py, whose contenders these are with a feed-forward block behind them.
Writes gpu_layer.json into --out (default: build).
"""

import json
from dataclasses import dataclass

import gpu_block
import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Layer(gpu_block.Case):
    hidden_dim: int = 0
    activation: str = "gelu"

    def feed_forward_config(self, training):
        return dict(
            block="feed_forward",
            rows=self.rows,
            embed_dim=self.embed_dim,
            hidden_dim=self.hidden_dim,
            dtype=self.dtype,
            pre_layer_norm=self.pre_layer_norm,
            final_layer_norm=not self.pre_layer_norm,
            activation=self.activation,
            hidden_dropout_rate=self.rate,
            dropout_rate=self.rate,
            training=training,
            allow_tf32=True,
        )


PEERS = ("flash", "cudnn")
CASES = [
    Layer("bert_large", 16, 512, 1024, 16, "bfloat16", False, False, 0.1, PEERS, 4096),
    Layer("bert_large_relu", 16, 512, 1024, 16, "bfloat16", False, False, 0.1, PEERS, 4096, "relu"),
    Layer("gpt_2k", 8, 2048, 2048, 16, "bfloat16", True, True, 0.1, PEERS, 8192, "gelu_tanh"),
]

FEED_FORWARD_PARAMETERS = {
    "linear1_weight": lambda c: (c.embed_dim, c.hidden_dim),
    "linear1_bias": lambda c: (c.hidden_dim,),
    "linear2_weight": lambda c: (c.hidden_dim, c.embed_dim),
    "linear2_bias": lambda c: (c.embed_dim,),
    "ffn_ln_scale": lambda c: (c.embed_dim,),
    "ffn_ln_bias": lambda c: (c.embed_dim,),
}

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}


def own_names(case):
    """Our block's names of its parameters."""
    prefix = "ln1_" if case.pre_layer_norm else "ln2_"
    return [name.replace("ffn_ln_", prefix) for name in FEED_FORWARD_PARAMETERS]


def split(parameters):
    """Those of the attention block and those of the feed-forward block."""
    return [{n: parameters[n] for n in names} for names in (gpu_block.PARAMETERS, FEED_FORWARD_PARAMETERS)]


def layer_of(attention_block, feed_forward_block):
    def layer(x, parameters, training):
        first, second = split(parameters)
        return feed_forward_block(attention_block(x, first, training), second, training)

    return layer


def our_layer(case):
    feed_forward = gpu_block.Ours(case.feed_forward_config, own_names(case))
    return layer_of(gpu_block.our_attention_block(case), feed_forward)


def plain_feed_forward(case):
    activation = ACTIVATIONS[case.activation]

    def block(x, parameters, training):
        rate = case.rate if training else 0.0
        shape = (case.embed_dim,)
        norm = dict(weight=parameters["ffn_ln_scale"], bias=parameters["ffn_ln_bias"])
        h = F.layer_norm(x, shape, **norm) if case.pre_layer_norm else x
        u = activation(F.linear(h, parameters["linear1_weight"].t(), parameters["linear1_bias"]))
        u = F.dropout(u, rate, training)
        y = F.linear(u, parameters["linear2_weight"].t(), parameters["linear2_bias"])
        z = x + F.dropout(y, rate, training)
        return z if case.pre_layer_norm else F.layer_norm(z, shape, **norm)

    return block


def plain_layer(case, attention):
    return layer_of(gpu_block.plain_torch_block(case, attention), plain_feed_forward(case))


def stage_costs(case):
    """Stage -> (operations, bytes) that it cannot do without, in training."""
    m, e, f = case.rows, case.embed_dim, case.hidden_dim
    size = getattr(torch, case.dtype).itemsize
    activation, hidden, weight = m * e * size, m * f * size, e * f * size
    product = 2 * m * e * f
    dropped = case.rate > 0
    kept = 1 if case.activation == "relu" else 2  # matrices of hidden numbers that forward writes
    return {
        "linear1_forward": (product, activation + weight + kept * hidden),
        "linear2_forward": (product, hidden + weight + (1 if dropped else 2) * activation),
        "linear2_backward": (2 * product, activation + 2 * weight + 2 * hidden),
        "linear1_backward": (2 * product, hidden + 2 * weight + (2 if case.pre_layer_norm else 3) * activation),
    }


def run_feed_forward_stages(case, copy, products):
    m, e, f = case.rows, case.embed_dim, case.hidden_dim

    def new(*shape):
        return torch.randn(*shape, device="cuda").to(getattr(torch, case.dtype))

    drawn = gpu_block.draw_parameters(case, FEED_FORWARD_PARAMETERS).values()
    tensors = {name: tensor.detach() for name, tensor in zip(own_names(case), drawn)}
    tensors.update({"d_" + n: torch.empty_like(t) for n, t in tensors.items()})
    for name in ("x", "d_x", "hidden", "d_hidden", "residual", "d_residual", "d_linear", "out", "d_out"):
        tensors[name] = new(m, e)
    for name in ("activated", "d_pre_activation"):
        tensors[name] = new(m, f)
    if case.activation != "relu":
        tensors["pre_activation"] = new(m, f)
    return gpu_block.run_stages(
        case, case.feed_forward_config(True), tensors, stage_costs(case), copy, products, before=["linear1_forward"]
    )


def main():
    options = gpu_block.parse_options(" ".join(__doc__.split("\n\n")[0].split()), CASES, ["layer", "stages"])
    with gpu_block.tf32():
        report = gpu_block.start_report()
        copy, products = report["copy_bytes_per_s"], report["product_ops_per_s"]
        for case in CASES:
            if case.name not in options.cases:
                continue
            if "layer" in options.parts:
                parameters = gpu_block.draw_parameters(case, {**gpu_block.PARAMETERS, **FEED_FORWARD_PARAMETERS})
                layers = gpu_block.contenders(case, options, our_layer, plain_layer)
                report["blocks"].append(gpu_block.run_block(case, options, parameters, layers))
                gpu_block.print_block(report["blocks"][-1])
                torch.cuda.empty_cache()
            if "stages" in options.parts:
                report["stages"].append(run_feed_forward_stages(case, copy, products))
                torch.cuda.empty_cache()
    (options.out / "gpu_layer.json").write_text(json.dumps(report, indent=1))
    print(f"\nwrote {options.out}/gpu_layer.json")


if __name__ == "__main__":
    main()
