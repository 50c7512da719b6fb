"""The GPU and the CPU draw the same dropout masks and compute the same block; so does a second GPU, be it the current
device or not.
"""

from dataclasses import asdict

import common
import numpy as np
import pfa_core
import pytest
import reference
import torch
from cases import DTYPES, Case, Mask
from device import Run, run_case, to_numpy
from reference import Config

CASES = [
    Case(seq_len=37, config=Config(dropout_rate=0.3, attn_dropout_rate=0.2, seed=2**63 + 5, offset=2**33 + 1)),
    Case(
        seq_len=130,
        head_dim=40,
        config=Config(pre_layer_norm=True, dropout_rate=0.5, attn_dropout_rate=0.5, causal=True),
    ),
    Case(
        seq_len=65, head_dim=3, num_heads=3, mask=Mask("BHSS"), config=Config(dropout_rate=0.1, attn_dropout_rate=0.1)
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_as_cpu(case):
    if not hasattr(pfa_core, "forward"):
        pytest.skip("pfa_core is built without the CPU")
    inputs = common.make_inputs(case)
    names = [name for name in reference.DIFFERENTIABLE if name in inputs]
    config = asdict(case.config)
    seed, offset = config.pop("seed"), config.pop("offset")
    config.update(batch=case.batch, seq_len=case.seq_len, embed_dim=case.embed_dim, num_heads=case.num_heads)
    config.update(head_dim=case.head_dim, dtype="float64")
    d_out = inputs["d_out"]
    arrays = {name: np.ascontiguousarray(a) for name, a in inputs.items() if name != "d_out"}
    out, saved = pfa_core.forward(arrays, config, seed=seed, offset=offset)
    gradients = pfa_core.backward(arrays, config, d_out, saved, names)
    gpu_out, gpu_gradients = run_case(case, inputs)
    # Far below what one element dropped or kept differently would make.
    np.testing.assert_allclose(gpu_out, out, rtol=0, atol=1e-11 * abs(out).max())
    for name in names:
        np.testing.assert_allclose(
            gpu_gradients[name], gradients[name], rtol=0, atol=1e-11 * abs(gradients[name]).max()
        )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("current", (0, 1))
@pytest.mark.parametrize("dtype", DTYPES)
def test_second_gpu(dtype, current):
    case = Case(
        dtype=dtype, seq_len=257, head_dim=64, config=Config(dropout_rate=0.1, attn_dropout_rate=0.1, causal=True)
    )
    inputs = common.make_inputs(case)
    names = [name for name in reference.DIFFERENTIABLE if name in inputs]
    with torch.cuda.device(1):
        run = Run(case, inputs)
        run.forward()
        run.backward(names)
    for result in (run.out, *run.gradients.values()):
        result.fill_(float("nan"))
    torch.cuda.synchronize(1)
    with torch.cuda.device(current):
        run.forward()
        run.backward(names)
        assert torch.cuda.current_device() == current
    torch.cuda.synchronize(1)
    run.memory.check()
    gradients = {name: to_numpy(gradient) for name, gradient in run.gradients.items()}
    common.check(case, common.expect(case, inputs), to_numpy(run.out), gradients)
