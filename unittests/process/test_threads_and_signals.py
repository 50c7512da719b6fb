"""The same bits for any number of threads, whatever ran before, and under signals."""

import pytest
from cases import DTYPES
from processes import run_python

BITS = """
import hashlib
import common, runners, paddle
from cases import DTYPES, Case, Mask

# Of the second one's matrix products, some are a single block with long sums.
cases = [(sizes, dtype) for sizes in ((3, 150, 3, 24), (1, 4096, 1, 64)) for dtype in DTYPES]
for sizes, dtype in cases:
    case = Case(*sizes, dtype, mask=Mask("B1SS" if sizes[0] > 1 else "S", "float32"))
    case = case.but(attn_dropout_rate=0.1, dropout_rate=0.1, pre_layer_norm=True)
    inputs = common.make_inputs(case)
    out, gradients = runners.run_dygraph(
        common.stored_inputs(case, inputs), case.config, paddle.CPUPlace(), common.differentiable(inputs)
    )
    for name, a in [("out", out)] + sorted(gradients.items()):
        print(dtype, sizes, name, hashlib.sha256(a.tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_same_bits_for_any_number_of_threads():
    outputs = []
    for threads in (1, 2, 2, 3):
        result = run_python(BITS, threads=threads)
        assert result.returncode == 0, result.stderr[-3000:]
        outputs.append([line for line in result.stdout.splitlines() if line.startswith(DTYPES)])
    assert len(outputs[0]) == 2 * 4 * 10
    for other in outputs[1:]:
        assert [line for line in other if line not in outputs[0]] == []


@pytest.mark.slow
def test_same_bits_whatever_ran_before():
    """Libraries that Paddle loads in its own products, MKL among them, have no say in ours."""
    outputs = []
    for before in ("", "import paddle; a = paddle.ones([64, 64], 'float64'); paddle.matmul(a, a)\n"):
        result = run_python(before + BITS)
        assert result.returncode == 0, result.stderr[-3000:]
        outputs.append([line for line in result.stdout.splitlines() if line.startswith(DTYPES)])
    assert outputs[0] == outputs[1]


UNDER_SIGNALS = """
import signal, threading, time
import numpy as np
import common, runners, paddle
from cases import DTYPES, Case
from paddle_fused_attention import FusedMultiHeadAttention

layer = FusedMultiHeadAttention(384, 12)
layer.eval()
x = paddle.randn([32, 20, 384])
with paddle.no_grad():
    expected = layer(x).numpy()

cases = []
for dtype in DTYPES:
    for sizes in ((4, 60, 4, 32), (1, 7, 2, 64)):
        case = Case(*sizes, dtype).but(attn_dropout_rate=0.1, dropout_rate=0.1, seed=3)
        inputs = common.make_inputs(case)
        arguments = common.stored_inputs(case, inputs), case.config, paddle.CPUPlace()
        cases.append((arguments, common.differentiable(inputs)))

def results(arguments, wanted):
    out, gradients = runners.run_dygraph(*arguments, wanted)
    return [out, *gradients.values()]

alone = [results(*case) for case in cases]
handled, wrong = [], []

def repeat(end, backward):
    while time.monotonic() < end:
        for (arguments, wanted), arrays in zip(cases, alone):
            found = results(arguments, wanted if backward else [])
            if not all(map(np.array_equal, found, arrays)):
                wrong.append(arguments[1])
        with paddle.no_grad():
            for _ in range(50):
                out = layer(x)
        if not np.array_equal(out.numpy(), expected):
            wrong.append("layer")

signal.signal(signal.SIGALRM, lambda *_: handled.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
end = time.monotonic() + 6
other = threading.Thread(target=repeat, args=(end, False))  # two backward passes at a time are more than Paddle bears
other.start()
repeat(end, True)
other.join()
signal.setitimer(signal.ITIMER_REAL, 0)
assert not wrong, wrong
assert len(handled) > 20, len(handled)
"""


@pytest.mark.slow
def test_signals():
    """A handler may run at any instruction: of every dtype, forward and backward, in two Python threads."""
    result = run_python(UNDER_SIGNALS)
    assert result.returncode == 0, f"{result.returncode}: {result.stderr[-3000:]}"
