"""The fine-tuning example: a BERT learns the same before and after convert, on the operators, and the command says
so. `make test-libraries` runs it."""

import importlib.util

import numpy as np
import pytest
import runners

from examples.fine_tuning import cli

if importlib.util.find_spec("paddlenlp") is None:
    pytest.skip("paddlenlp is not installed: make test-libraries", allow_module_level=True)

from examples.fine_tuning import training  # noqa: E402

SMALL = ["--steps", "6", "--layers", "2", "--hidden-size", "64", "--seq-len", "16", "--batch-size", "4"]
SETTINGS = training.Settings(steps=30, layers=1, hidden_size=64, num_heads=1, seq_len=16, seed=1)


def test_batches():
    """Each number has its own batch, and the words tell the class."""
    sequences, classes = training.batch(SETTINGS, 3)
    assert sequences.shape == (16, 16) and set(classes) == {0, 1}
    again, _ = training.batch(SETTINGS, 3)
    other, _ = training.batch(SETTINGS, 4)
    assert np.array_equal(again, sequences) and not np.array_equal(other, sequences)
    lengths = (sequences != training.PADDING).sum(axis=1)
    assert lengths.min() > 8 and len(set(lengths)) > 1
    first_half = (sequences >= training.FIRST_WORD) & (sequences < training.FIRST_WORD + training.WORDS // 2)
    assert ((first_half.sum(axis=1) > lengths / 2) == classes).mean() > 0.9


def test_both_runs_learn_the_same():
    with runners.operator_calls() as calls, runners.feed_forward_calls() as feed_forwards:
        plain, converted = training.compare(SETTINGS)
    assert len(calls) == len(feed_forwards) == SETTINGS.steps + training.TEST_BATCHES
    np.testing.assert_allclose(converted.losses, plain.losses, rtol=1e-3)
    assert np.mean(plain.losses[-5:]) < np.mean(plain.losses[:5])
    assert plain.accuracy == pytest.approx(converted.accuracy, abs=0.02)
    assert "attention and feed-forward" in converted.report and not plain.report


def test_command(capsys):
    assert cli.main(SMALL) == 0
    said = capsys.readouterr().out
    for words in ("as it is", "after convert", "Speed after convert:", "Largest difference of the losses:"):
        assert words in said
    assert said.count("encoder layer, attention and feed-forward") == 2


def test_losses_that_differ_fail_the_command(capsys, monkeypatch):
    run = training.Run([1.0, 0.5], 1.0, 0.5, "")
    monkeypatch.setattr(training, "compare", lambda settings: (run, training.Run([1.0, 0.6], 1.0, 0.5, "")))
    assert cli.main(SMALL) == 1
    assert "The losses should agree" in capsys.readouterr().err
    assert cli.main([*SMALL, "--dropout", "0.1"]) == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--steps", "2"], "--steps: expected at least 3, got 2"),
        (["--layers", "0"], "--layers: expected at least 1, got 0"),
        (["--hidden-size", "100"], "--hidden-size: expected a multiple of 64, got 100"),
        (["--dropout", "1"], "--dropout: expected a number in"),
        (["--seed", "-1"], "--seed: expected 0 to"),
    ],
)
def test_bad_arguments(arguments, word, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.parse_arguments(arguments)
    assert raised.value.code == 2 and word in capsys.readouterr().err
