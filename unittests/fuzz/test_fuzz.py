"""A short run of the random cases on the CPU's core, and whether they would find a fault."""

import importlib.util
import os

import block_cases
import cases
import common
import numpy as np
import pytest
import random_cases

pytest.importorskip("pfa_core", reason="the module pfa_core of CMakeLists.txt is not on PYTHONPATH")

import comparison  # noqa: E402
import core_on_cpu  # noqa: E402

# A folder's __main__.py is no module that could be imported by its name.
SPEC = importlib.util.spec_from_file_location("fuzz_command", os.path.join(os.path.dirname(__file__), "__main__.py"))
COMMAND = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(COMMAND)


@pytest.mark.slow
def test_some_cases(capsys):
    status = COMMAND.main(["--seed", "2021", "--cases", "1200"])
    assert status == 0, capsys.readouterr().out


class Faulty:
    """The CPU's core, but one number of one result is changed by `change`."""

    ways = staticmethod(core_on_cpu.ways)

    def __init__(self, which, change):
        self.which, self.change = which, change

    def run(self, drawn, inputs, way):
        out, gradients, broken = core_on_cpu.run(drawn, inputs, way)
        a = dict(gradients, out=out)[self.which].reshape(-1)
        a[a.size // 2] = self.change(a[a.size // 2], np.abs(a).max())
        return out, gradients, broken


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("block", random_cases.BLOCKS)
def test_a_fault_is_found(block, dtype):
    numbers = range(list(random_cases.BLOCKS).index(block), 3000, len(random_cases.BLOCKS))
    drawn = (random_cases.draw(5, number) for number in numbers)
    fit = (d for d in drawn if d.case.dtype == dtype and len(d.wanted) > 2)
    case = next(d for d in fit if 40 < comparison.make_inputs(d.case)["d_out"].size < 1000)
    assert comparison.complaints(case, core_on_cpu) == []
    for which in ("out", case.wanted[1]):
        found = comparison.complaints(case, Faulty(which, lambda a, largest: a + 0.5 * max(largest, 1.0)))
        assert found and all(f" {which}:" in line for line in found), f"{which} of {case}: {found}"
        assert comparison.complaints(case, Faulty(which, lambda a, largest: np.nan)), f"{which} of {case}"


def test_a_case_is_its_seed_and_number():
    first, again, other = (str(random_cases.draw(seed, 1234)) for seed in (7, 7, 8))
    assert first == again != other


def test_a_failure_prints_how_to_repeat_it(capsys, monkeypatch):
    monkeypatch.setattr(COMMAND, "core_of", lambda device: core_on_cpu)
    monkeypatch.setattr(COMMAND, "complaints", lambda drawn, core: ["x: wrong"])
    assert COMMAND.main(["--seed", "3", "--first", "17", "--cases", "2"]) == 1
    printed = capsys.readouterr().out
    assert 'make fuzz FUZZ="--seed 3 --case 17"' in printed and 'make fuzz FUZZ="--seed 3 --case 18"' in printed
    assert "x: wrong" in printed and str(random_cases.draw(3, 17)) in printed


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("feature", [name for name in cases.FEATURES if name.startswith(("full", "pre", "plain"))])
def test_the_block_is_that_of_the_reference(feature, dtype):
    """Where it has none of what is general."""
    plain = cases.FEATURES[feature].but(dtype=dtype, absent=())
    mask = plain.mask and cases.Mask(plain.mask.shape, "float32")
    fields = {name: getattr(plain, name) for name in plain.__dataclass_fields__}
    case = block_cases.AttentionBlockCase(**dict(fields, mask=mask))
    inputs = block_cases.make_inputs(case)
    own, others = block_cases.expect(case, inputs), common.expect(case, inputs)
    pairs = [(own.out, others.out), (own.peer_out, others.peer_out)]
    pairs += [(own.gradients[name], a) for name, a in others.gradients.items()]
    pairs += [(own.peer_gradients[name], a) for name, a in (others.peer_gradients or {}).items()]
    for found, wanted in pairs:
        if wanted is not None:
            limit = 1e-12 if dtype == "float64" else 4 * common.UNIT_ROUNDOFF[dtype]
            np.testing.assert_allclose(found, wanted, rtol=0, atol=limit * np.abs(wanted).max())
