"""Bad input of every public function, layer and command: an error that names the argument, or the right result, and
never the end of the process.

The calls are judged in processes of their own, of which each serves many tests; one that ends in a call is replaced,
and goes on with the next one.
"""

import json
import os
import subprocess
import sys

import bad_call_judge
import bad_calls
import paddle
import paddle_fused_attention as pfa
import pytest
from bad_call_judge import GOOD, MODES, cases_of, targets_of
from paddle_fused_attention import attention_functional, incubate, varlen_functional


class Judge:
    """A process that judges, with what becomes of it."""

    def __init__(self):
        self._process = None

    def _start(self):
        environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path))
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self._process = subprocess.Popen([sys.executable, bad_call_judge.__file__], env=environment, **pipes)

    def stop(self):
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def verdicts(self, target, mode):
        """The verdict and the text of every case of a target, by its number; "crash" where the process ended."""
        found, first = {}, 0
        while True:
            number, verdict = self._run(target, mode, first, found)
            if verdict == "end":
                return found
            first = number + 1

    def _run(self, target, mode, first, found):
        if self._process is None:
            self._start()
        self._process.stdin.write(json.dumps([target, mode, first]) + "\n")
        self._process.stdin.flush()
        number, verdict = first, "begun"
        for line in self._process.stdout:
            number, verdict, text = json.loads(line)
            if verdict == "end":
                return number, verdict
            found[number] = (verdict, text)
        found[number] = ("crash", f"status {self._process.wait()}")
        self.stop()
        return number, "crash"


@pytest.fixture(scope="module")
def judge():
    judge = Judge()
    yield judge
    judge.stop()


# What Paddle raises before the operator runs, by target and argument: where its reshape copies a view, and on Paddle
# 2.6 where its concat, matmul and reshape refuse tensors without elements and, in graphs, its cast and others dtypes.
PADDED = ("flash_attn_varlen_qkvpacked of padded sequences", "qkv")
OF_PADDLE = {
    PADDED: ["view beyond memory"],
    ("flash_attn_qkvpacked", "qkv"): ["view beyond memory"],
    ("flash_attn_varlen_qkvpacked", "qkv"): ["view beyond memory"],
}
if paddle.__version__.startswith("2."):
    OF_PADDLE[PADDED] += ["int8", "complex64", "complex128"]
    OF_PADDLE.update(
        {
            ("incubate fused_multi_head_attention with a cache", "x"): ["none of dimension 1"],
            ("incubate FusedMultiHeadAttention call", "query"): ["none of dimension 1"],
            ("incubate FusedTransformerEncoderLayer call", "src"): ["none of dimension 1"],
            ("incubate fused_matmul_bias of batches", "x"): ["none of dimension 1"],
            ("incubate fused_matmul_bias of batches", "y"): ["none of dimension 2"],
            ("incubate FusedMultiHeadAttention call", "attn_mask"): ["int8"],
            ("incubate FusedMultiHeadAttention call with other keys", "attn_mask"): ["int8"],
            ("incubate FusedTransformerEncoderLayer call", "src_mask"): ["int8"],
            ("pad", "tokens"): ["none of dimension 1"],
            ("incubate fused_multi_head_attention transposed", "qkv_weight"): ["int8", "uint8", "int16"],
            **{("scaled_dot_product_attention without a batch", name): ["uint8"] for name in ("query", "key", "value")},
        }
    )


@pytest.mark.parametrize("mode, name", [(mode, name) for mode in MODES for name in targets_of(mode)])
def test_every_bad_value_is_refused_by_name_or_taken_right(mode, name, judge):
    cases = cases_of(bad_calls.TARGETS[name], mode)
    verdicts = judge.verdicts(name, mode)
    assert len(verdicts) == len(cases)
    faults = [
        f"{case}: {': '.join(verdicts[number])}"
        for number, case in enumerate(cases)
        if verdicts[number][0] not in GOOD and case.variant.label not in OF_PADDLE.get((name, case.argument), ())
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", bad_calls.FAULTS)
def test_faults_are_found(name, judge):
    """In a process that goes on after a crash."""
    verdicts = judge.verdicts(name, "dygraph")
    assert [verdicts[number][0] for number in range(2)] == name.split(", ")[:2]


def test_every_public_function_and_layer_has_cases():
    """But classes that only users' code or results are made of, and what takes no argument."""
    without = {
        *("AttentionAdapter", "FeedForwardAdapter", "VisionTransformerAdapter", "VisionTransformerMlpAdapter"),
        *("Packed", "incubate", "incubate functional", "unpatch"),
    }
    names = {*pfa.__all__, *attention_functional.__all__, *varlen_functional.__all__}
    names |= {f"incubate {name}" for name in (*incubate.__all__, *incubate.functional.__all__)}
    assert {name for name in names - without if name not in bad_calls.TARGETS} == set()
    assert sum(len(cases_of(bad_calls.TARGETS[name], mode)) for mode in MODES for name in targets_of(mode)) > 2000
