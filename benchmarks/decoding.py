"""A token through six decoder layers with caches, in dygraph: Paddle's own, converted, and with arranged weights.

    python benchmarks/decoding.py [--threads 2] [--width 512] [--cached 128] [--memory 64] [--turns 60]

The models take turns; printed are medians, and Paddle's over each.
"""

import argparse
import os
import statistics
import time

LAYERS = 6


def models(width):
    import paddle
    from paddle import nn
    from paddle_fused_attention import arrange_weights, convert

    made = {}
    for name in ("paddle", "converted", "arranged"):
        paddle.seed(0)
        layer = nn.TransformerDecoderLayer(width, max(width // 64, 1), 4 * width, activation="gelu")
        made[name] = nn.TransformerDecoder(layer, LAYERS)
        made[name].eval()
        if name != "paddle":
            convert(made[name])
    arrange_weights(made["arranged"])
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("threads", 2), ("width", 512), ("cached", 128), ("memory", 64), ("turns", 60)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import paddle

    def draw(tokens):
        return paddle.randn([1, tokens, options.width])

    memory, start, token = draw(options.memory), draw(options.cached), draw(1)
    times = {}
    with paddle.no_grad():
        of_model = {}
        for name, model in models(options.width).items():
            of_model[name] = (model, model(start, memory, cache=model.gen_cache(memory))[1])
            times[name] = []
        for turn in range(-3, options.turns):
            for name, (model, caches) in of_model.items():
                begin = time.perf_counter()
                model(token, memory, cache=caches)
                if turn >= 0:
                    times[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"Paddle {paddle.__version__}, {options.threads} threads, median of {options.turns} turns: ms, Paddle's / it")
    for name, median in medians.items():
        print(f"  {name:10}{1e3 * median:8.2f}   {medians['paddle'] / median:5.2f}")


if __name__ == "__main__":
    main()
