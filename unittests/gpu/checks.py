"""What the suites of all blocks check, on a case of any of them."""

import common
import torch
from device import Run, run_case


def check(case, **options):
    inputs = common.make_inputs(case)
    common.check(case, common.expect(case, inputs), *run_case(case, inputs, **options))


def check_forward_alone(case):
    """Without saving anything the result has the same bits."""
    inputs = common.make_inputs(case)
    saving, _ = run_case(case, inputs, wanted=[])
    alone, _ = run_case(case, inputs, wanted=[], saves=False)
    assert (saving == alone).all()


def check_deterministic(case):
    inputs = common.make_inputs(case)
    first = run_case(case, inputs, deterministic=True)
    second = run_case(case, inputs, deterministic=True)
    assert (first[0] == second[0]).all()
    for name, gradient in first[1].items():
        assert (gradient == second[1][name]).all(), name


def check_empty(case):
    out, gradients = run_case(case, common.make_inputs(case))
    assert out.size == 0
    for name, gradient in gradients.items():
        assert (gradient == 0).all(), name


def check_graph(case, tolerance=0.0):
    """Captured into a CUDA graph, forward and backward give what they give outside."""
    inputs = common.make_inputs(case)
    run = Run(case, inputs)
    wanted = common.differentiable(inputs)
    run.forward()
    run.backward(wanted)
    torch.cuda.synchronize()
    eager = [run.out.clone()] + [gradient.clone() for gradient in run.gradients.values()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.forward()
        run.backward(wanted)
    for tensor in [run.saved, run.workspace, run.backward_workspace]:
        tensor.fill_(255)
    for tensor in [run.out, *run.gradients.values()]:
        tensor.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    run.memory.check()
    for before, after in zip(eager, [run.out, *run.gradients.values()]):
        torch.testing.assert_close(after, before, rtol=tolerance, atol=tolerance * float(before.abs().max()))


def offset_of(dtype):
    """Bytes by which memory lies off an aligned address."""
    return 8 if dtype == "float64" else 4
