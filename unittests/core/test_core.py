"""The core on NumPy arrays, without Paddle: every instruction set that this processor has, against the reference."""

import functools
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import cases
import common
import numpy as np
import pytest
from cases import DTYPES, FEATURES, SIXTEEN_BIT, Case, Mask
from core_config import config_of

pfa_core = pytest.importorskip("pfa_core", reason="the module pfa_core of CMakeLists.txt is not on PYTHONPATH")

INSTRUCTION_SETS = pfa_core.instruction_sets()
# The topmost decorator, so that a case's results in every set follow one another, and the reference computes once.
EVERY_ISA = pytest.mark.parametrize("isa", INSTRUCTION_SETS)
FULL = cases.FULL.but(seq_len=21, mask=Mask("B1SS", "bool"), offset=3)


def cannot(case):
    """Why the module has no way for a case; None if it has one."""
    if case.mask and case.dtype_of("attn_mask") == "bfloat16" and "attn_mask" not in case.absent:
        return "NumPy has no bfloat16, and pfa_core takes no mask of its bits"
    return None


def run(case, arrays, wanted, isa="", **changes):
    """Result and gradients; `changes` are further entries of the config."""
    config, seed, offset = config_of(case)
    config.update(changes)
    inputs = {name: a for name, a in arrays.items() if name != "d_out"}
    out, saved = pfa_core.forward(inputs, config, seed=seed, offset=offset, saves=bool(wanted), isa=isa)
    if not wanted:
        assert saved is None
        return out, {}
    return out, pfa_core.backward(inputs, config, arrays["d_out"], saved, wanted, isa=isa)


@functools.lru_cache(maxsize=4)
def inputs_and_expected(case):
    inputs = common.make_inputs(case)
    return inputs, common.expect(case, inputs)


def check_case(case, isa="", wanted=None):
    if cannot(case):
        pytest.skip(cannot(case))
    inputs, expected = inputs_and_expected(case)
    arrays = common.stored_inputs(case, inputs)
    wanted = common.differentiable(inputs) if wanted is None else list(wanted)
    out, gradients = run(case, arrays, wanted, isa)
    assert sorted(gradients) == sorted(wanted)
    common.check(
        case,
        expected,
        common.from_storage(out),
        {name: common.from_storage(g) for name, g in gradients.items()},
    )
    alone, _ = run(case, arrays, [], isa)  # without saving anything
    assert np.array_equal(alone, out)


@EVERY_ISA
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature, dtype, isa):
    check_case(FEATURES[feature].but(dtype=dtype, seq_len=21), isa)


@EVERY_ISA
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("feature", FEATURES)
def test_float32_residual(feature, dtype, isa):
    check_case(FEATURES[feature].but(dtype=dtype, residual_dtype="float32", seq_len=21), isa)


@EVERY_ISA
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("feature", [name for name in FEATURES if name.startswith("full-bool-")])
def test_float32_residual_of_more_rows(feature, dtype, isa):
    case = FEATURES[feature].but(dtype=dtype, residual_dtype="float32", dropout_rate=0.0, seq_len=150)
    check_case(case, isa)


@EVERY_ISA
@pytest.mark.parametrize("case", cases.ABSENT_PAIRS + cases.NORM_PARAMETERS_IN_16_BIT, ids=str)
def test_absent_inputs_and_16_bit_norms(case, isa):
    check_case(case.but(seq_len=21), isa)


@EVERY_ISA
@pytest.mark.parametrize("size", [1e6, 1e7, 1e8])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_large_scores(dtype, size, isa):
    """The probabilities that backward computes add up to one however large the scores are."""
    case, inputs = common.equal_keys(dtype, size)
    out, gradients = run(case, common.stored_inputs(case, inputs), common.differentiable(inputs), isa)
    common.check_equal_keys(
        case, inputs, common.from_storage(out), {name: common.from_storage(g) for name, g in gradients.items()}
    )


@EVERY_ISA
@pytest.mark.parametrize("head_dim", (20, 64))
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_what_all_keys_have_in_common(dtype, head_dim, isa):
    case, inputs = common.rows_with_much_in_common(dtype, head_dim=head_dim)
    arrays = common.stored_inputs(case, inputs)
    _, gradients = run(case, arrays, common.differentiable(inputs), isa)
    gradients = {name: common.from_storage(a) for name, a in gradients.items()}
    common.check_as_exact(common.expect(case, inputs), gradients)


@EVERY_ISA
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases.SIZES, ids=str)
def test_sizes(case, dtype, isa):
    check_case(case.but(dtype=dtype), isa)


# From here on many tests run on the best instruction set alone: loops over tiles and rows are the same code in all.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases.LENGTHS + cases.HEAD_DIMS + cases.LONG, ids=str)
def test_lengths_and_head_dims(case, dtype):
    check_case(case.but(dtype=dtype))


@EVERY_ISA
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", cases.MASKS, ids=str)
def test_masks(mask, causal, isa):
    check_case(Case(2, 37, 3, 8, "float32", mask=mask).but(causal=causal), isa)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", cases.MASKS_FOR_EVERY_DTYPE + cases.MASKS_OVER_TILES, ids=str)
def test_masks_for_every_dtype(mask, dtype):
    check_case(Case(2, 37, 2, 8, dtype, mask=mask).but(attn_dropout_rate=0.1, seed=1))


@EVERY_ISA
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", cases.HARD_MASKS, ids=str)
def test_hard_masks(mask, dtype, isa):
    """Rows that see no key give zeros, with the residual and where nothing is added to attention."""
    check_case(Case(2, 37, 2, 8, dtype, mask=mask, absent=("linear_bias",)).but(final_layer_norm=False), isa)
    check_case(cases.bare(mask, dtype=dtype), isa)


@EVERY_ISA
def test_masks_of_any_strides(isa):
    case = Case(2, 19, 3, 8, "float32", mask=Mask("BHSS", "bool"))
    inputs = common.make_inputs(case)
    arrays = common.stored_inputs(case, inputs)
    mask = arrays["attn_mask"]
    wide = np.zeros((2, 3, 38, 25), bool)
    wide[:, :, ::2, 3:22] = mask
    for view in (np.asfortranarray(mask), wide[:, :, ::2, 3:22], mask[:, :, ::-1].copy()[:, :, ::-1]):
        assert not view.flags.c_contiguous and np.array_equal(view, mask)
        out, _ = run(case, dict(arrays, attn_mask=view), [], isa)
        common.check(case, common.expect(case, inputs), common.from_storage(out), {})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases.EMPTY, ids=str)
def test_zero_sizes(case, dtype):
    check_case(case.but(dtype=dtype, mask=FULL.mask))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases.DROPOUT, ids=str)
def test_dropout(case, dtype):
    check_case(case.but(dtype=dtype))


@pytest.mark.parametrize("case", cases.SEEDS + cases.RATES_BETWEEN_STEPS, ids=str)
def test_seeds_and_rates(case):
    check_case(case)


@pytest.mark.parametrize("case, wanted", cases.subsets(FULL, cases.WANTED + cases.PAIRS), ids=cases.name_of_subset)
def test_subsets_of_gradients(case, wanted):
    check_case(case, wanted=wanted)


def test_instruction_sets_agree():
    """Not bit for bit, but far closer than the tolerances."""
    assert len(set(INSTRUCTION_SETS)) == len(INSTRUCTION_SETS) >= 1
    inputs = common.make_inputs(FULL)
    arrays = common.stored_inputs(FULL, inputs)
    wanted = common.differentiable(inputs)
    results = [run(FULL, arrays, wanted, isa) for isa in INSTRUCTION_SETS]
    for out, gradients in results[1:]:
        np.testing.assert_allclose(out, results[0][0], rtol=1e-12, atol=1e-12)
        for name in wanted:
            scale = np.abs(gradients[name]).max()
            assert np.abs(gradients[name] - results[0][1][name]).max() <= 1e-12 * scale, name


def test_calls_at_the_same_time():
    """Python threads with blocks of different sizes, forward and backward: each gets the bits that one alone gets."""
    blocks = [Case(2, 90, 3, 32, "float32"), Case(1, 200, 2, 40, "bfloat16"), FULL, Case(1, 130, 2, 16, "float16")]
    blocks = [
        case.but(attn_dropout_rate=0.1, dropout_rate=0.1, causal=True, seed=seed) for seed, case in enumerate(blocks)
    ]
    inputs = [common.make_inputs(case) for case in blocks]
    start = threading.Barrier(len(blocks))

    def results(case, inputs):
        out, gradients = run(case, common.stored_inputs(case, inputs), common.differentiable(inputs))
        return [out, *(gradients[name] for name in sorted(gradients))]

    def repeat(case, inputs):
        start.wait()
        return [results(case, inputs) for _ in range(20)]

    alone = [results(*pair) for pair in zip(blocks, inputs)]
    with ThreadPoolExecutor(len(blocks)) as pool:
        for expected, runs in zip(alone, pool.map(repeat, blocks, inputs)):
            for arrays in runs:
                assert len(arrays) == len(expected) and all(map(np.array_equal, arrays, expected))


UNDER_SIGNALS = """
import signal, sys, threading, time
import numpy as np
import common, test_core
from cases import DTYPES, Case

def results(case, arrays, wanted, isa):
    out, gradients = test_core.run(case, arrays, wanted, isa)
    return [out, *(gradients[name] for name in sorted(gradients))]

work = []
for dtype in DTYPES:
    for sizes in ((32, 20, 12, 32), (1, 200, 2, 64)):
        case = Case(*sizes, dtype=dtype).but(attn_dropout_rate=0.1, dropout_rate=0.1, seed=3)
        inputs = common.make_inputs(case)
        arguments = case, common.stored_inputs(case, inputs), common.differentiable(inputs), sys.argv[1]
        work.append((arguments, results(*arguments)))

handled, wrong = [], []
def repeat(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for arguments, expected in work:
            if not all(map(np.array_equal, results(*arguments), expected)):
                wrong.append(str(arguments[0]))

signal.signal(signal.SIGALRM, lambda *_: handled.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
threads = [threading.Thread(target=repeat, args=(4,)) for _ in range(2)]
for thread in threads:
    thread.start()
repeat(4)
for thread in threads:
    thread.join()
signal.setitimer(signal.ITIMER_REAL, 0)
assert not wrong, wrong
assert len(handled) > 20, len(handled)
"""


@pytest.mark.slow
@EVERY_ISA
def test_signals(isa):
    """A signal may come at any instruction, on any thread: nothing below the stack pointer, and no memory, may be left
    in a state that its handler spoils.
    """
    path = os.pathsep.join([*sys.path, os.path.dirname(__file__)])
    environment = dict(os.environ, PYTHONPATH=path)
    command = [sys.executable, "-c", UNDER_SIGNALS, isa]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{result.returncode}: {result.stderr}"


def test_paddle_is_not_needed():
    code = "import sys, numpy, pfa_core; assert not any(name.startswith('paddle') for name in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


BAD = [
    (dict(x=np.zeros((2, 21, 15))), {}, ValueError, ["x", "[2, 21, 16]", "(2, 21, 15)"]),
    (dict(x=np.zeros((2, 21, 16), "float32")), {}, TypeError, ["x", "float64"]),
    (dict(x=np.zeros((2, 16, 21)).swapaxes(1, 2)), {}, ValueError, ["x", "contiguous"]),
    (dict(x=None), {}, ValueError, ["x"]),
    (dict(x=[1.0]), {}, TypeError, ["x", "array"]),
    (dict(qkv_weight=np.zeros((3, 2, 8, 15))), {}, ValueError, ["qkv_weight", "[3, 2, 8, 16]", "(3, 2, 8, 15)"]),
    (dict(attn_mask=np.zeros((21, 20), bool)), {}, ValueError, ["attn_mask", "(21, 20)"]),
    (dict(attn_mask=np.zeros((1, 2, 2, 21, 21), bool)), {}, ValueError, ["attn_mask", "(1, 2, 2, 21, 21)"]),
    (dict(attn_mask=np.zeros((21, 21), "complex64")), {}, ValueError, ["complex64"]),
    (dict(key=np.zeros((2, 21, 16))), {}, ValueError, ["key"]),
    ({}, dict(mode="none"), ValueError, ["mode", "upscale_in_train", "none"]),
    ({}, dict(dropout_rate=1.5), ValueError, ["[0, 1]"]),
    ({}, dict(dtype="int32"), ValueError, ["dtype", "int32"]),
    ({}, dict(dtype="half"), ValueError, ["half"]),
    ({}, dict(num_heads=3), ValueError, ["qkv_weight", "[3, 3, 8, 16]", "(3, 2, 8, 16)"]),
    ({}, dict(batch=-1), ValueError, ["-1"]),
    ({}, dict(head_size=8), ValueError, ["head_size"]),
]


@pytest.mark.parametrize("arrays, config, error, words", BAD, ids=[str(n) for n in range(len(BAD))])
def test_bad_input(arrays, config, error, words):
    good = common.stored_inputs(FULL, common.make_inputs(FULL))
    with pytest.raises(error) as raised:
        run(FULL, dict(good, **arrays), [], **config)
    for word in words:
        assert word in str(raised.value), str(raised.value)


def test_bad_saved_memory_and_needs():
    arrays = common.stored_inputs(FULL, common.make_inputs(FULL))
    with pytest.raises(ValueError):
        run(FULL, arrays, ["attn_mask"])
    with pytest.raises(ValueError):
        run(FULL, {n: a for n, a in arrays.items() if n != "qkv_bias"}, ["qkv_bias"])
    with pytest.raises(ValueError):
        run(FULL, arrays, [], isa="sse9")
