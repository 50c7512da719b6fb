"""The training example: checkpoints go on bit for bit, and the fused loss curve is that of Paddle's layers."""

import importlib.util
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

MISSING = [name for name in ("sklearn", "matplotlib", "tqdm") if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"{MISSING} not installed: pip install -r examples/requirements.txt", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
import paddle  # noqa: E402

from examples.digits import cli, data, training  # noqa: E402
from examples.digits.training import CheckpointError, Settings, train  # noqa: E402

STEPS = 11  # of an epoch of 1437 images with 128 in a batch
SETTINGS = Settings(epochs=1, batch_size=128, dropout=0.1, seed=3)


@pytest.fixture(scope="module")
def images():
    return data.load()[0]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Sets what the command sets where it is not set, so that it changes nothing for other tests."""
    for name, value in (("OMP_NUM_THREADS", "2"), ("GLOG_minloglevel", "2"), ("NVIDIA_TF32_OVERRIDE", "0")):
        monkeypatch.setenv(name, os.environ.get(name, value))
    # A predictor that others made has left one thread, and sums of other parts have other last bits.
    paddle.base.core.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def test_patches():
    """Each patch is a square of the image, in its place."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    train_images, test_images = data.load()
    assert len(train_images.labels) == 1437 and len(test_images.labels) == 360
    assert set(train_images.labels) == set(test_images.labels) == set(range(10))
    for image, patches, label in ((5, test_images.patches[1], test_images.labels[1]), (1, train_images.patches[0], 1)):
        assert digits.target[image] == label
        for i in range(data.TOKENS):
            row, column = divmod(i, 4)
            square = digits.images[image][2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert np.array_equal(patches[i], (square / 8 - 1).reshape(-1).astype("float32"))


def test_batches():
    """An epoch is a permutation, epochs differ, and a step's batch depends on seed and step alone."""
    rows = [data.batch_rows(100, 10, 1, step) for step in range(20)]
    assert sorted(np.concatenate(rows[:10])) == sorted(np.concatenate(rows[10:])) == list(range(100))
    assert not np.array_equal(rows[0], rows[10]) and not np.array_equal(rows[0], data.batch_rows(100, 10, 2, 0))
    assert np.array_equal(rows[13], data.batch_rows(100, 10, 1, 13))


INTERRUPTED = """
import sys
from pathlib import Path
from examples.startup import import_paddle
import_paddle()
import paddle
from examples.digits import data
from examples.digits.training import Settings, train

paddle.nn.Linear(2, 2)  # parameters of other models must not matter
settings = Settings(epochs=1, batch_size=128, dropout=0.1, seed=3)
train(sys.argv[1], settings, data.load()[0], Path(sys.argv[2]), max_steps=7)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fused", "plain"])
def test_resume_is_bit_for_bit(kind, images, tmp_path):
    """Seven steps in another process and the rest in this one, with dropout, are one run."""
    whole = train(kind, SETTINGS, images, tmp_path / "whole")
    assert whole.steps == STEPS and len(whole.losses) == STEPS and whole.losses.all()
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, kind, str(tmp_path / "parts")],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path])),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    resumed = train(kind, SETTINGS, images, tmp_path / "parts", resume=True)
    assert resumed.steps == STEPS - 7
    assert np.array_equal(resumed.losses, whole.losses)
    parameters = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert np.array_equal(parameter.numpy(), parameters[name].numpy()), name
    states = [paddle.load(str(tmp_path / name), return_numpy=True)["optimizer"] for name in ("whole", "parts")]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 2 * len(parameters)
    for name, value in states[0].items():
        assert np.array_equal(value, states[1][name]) if isinstance(value, np.ndarray) else value == states[1][name], (
            name
        )


def test_a_checkpoint_matters(images, tmp_path):
    """Without it the same steps give other numbers, and dropout does something."""
    start = train("fused", SETTINGS, images, tmp_path / "run", max_steps=3)
    again = train("fused", SETTINGS, images, tmp_path / "run", max_steps=3)
    assert np.array_equal(start.losses, again.losses) and again.steps == 3
    more = train("fused", SETTINGS, images, tmp_path / "run", max_steps=1, resume=True)
    assert len(more.losses) == 4 and np.array_equal(more.losses[:3], start.losses)
    plain = train("fused", Settings(epochs=1, batch_size=128, seed=3), images, tmp_path / "other", max_steps=2)
    assert not np.array_equal(plain.losses, start.losses[:2])


@pytest.mark.slow
def test_curves_of_fused_and_plain_layers_agree(images, tmp_path):
    settings = Settings(epochs=2, batch_size=128, seed=1)
    fused, plain = (train(kind, settings, images, tmp_path / kind) for kind in ("fused", "plain"))
    np.testing.assert_allclose(fused.losses, plain.losses, rtol=1e-3)
    assert not np.array_equal(fused.losses, plain.losses), "both are the same layers"
    assert fused.losses[-1] < 0.8 * fused.losses[0]
    assert (
        0.3 < training.accuracy(fused.model, images) == pytest.approx(training.accuracy(plain.model, images), abs=0.01)
    )


def test_a_checkpoint_that_can_not_be_written(images, tmp_path):
    """The one of before stays, with its mode and nothing beside it."""
    path = tmp_path / "checkpoint"
    train("plain", SETTINGS, images, path, max_steps=1)
    path.chmod(0o600)
    content = path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(OSError, match=f"File too large: '{path}'"):
            train("plain", SETTINGS, images, path, max_steps=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]
    assert train("plain", SETTINGS, images, path, max_steps=1, resume=True).losses.all()
    assert path.stat().st_mode & 0o777 == 0o600 and list(tmp_path.iterdir()) == [path]


def test_checkpoints_of_other_runs(images, tmp_path):
    path = tmp_path / "checkpoint"
    train("plain", SETTINGS, images, path, max_steps=1)
    for kind, settings, word in (
        ("fused", SETTINGS, "kind"),
        ("plain", Settings(epochs=1, batch_size=128, seed=3), "dropout"),
        ("plain", Settings(epochs=2, batch_size=128, dropout=0.1, seed=3), "epochs"),
    ):
        with pytest.raises(CheckpointError, match=word):
            train(kind, settings, images, path, resume=True)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="no checkpoint"):
        train("plain", SETTINGS, images, path, resume=True)


@pytest.mark.parametrize(
    "content", [{"run": 1}, [1], {"run": 1, "step": 1, "losses": np.zeros(3), "model": {}, "optimizer": {}}]
)
def test_files_that_are_no_checkpoints(content, images, tmp_path):
    paddle.save(content, str(tmp_path / "checkpoint"))
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        train("plain", SETTINGS, images, tmp_path / "checkpoint", resume=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"run": {"epochs": paddle.ones([2])}}, "epochs: expected 1, got a checkpoint of a run with Tensor"),
        ({"run": {"kind": "x" * 1000}}, "kind: expected 'plain', got a checkpoint of a run with 'x{99}$"),
        ({"losses": np.zeros((3, 3), "float32")}, "its losses or weights have other names or shapes"),
        ({"model": {"head.weight": paddle.ones([2])}}, "its losses or weights have other names or shapes"),
    ],
)
def test_checkpoints_that_do_not_fit(change, message, images, tmp_path):
    path = tmp_path / "checkpoint"
    train("plain", SETTINGS, images, path, max_steps=1)
    state = paddle.load(str(path))
    for name, value in change.items():
        state[name] = {**state[name], **value} if isinstance(value, dict) else value
    paddle.save(state, str(path))
    with pytest.raises(CheckpointError, match=message):
        train("plain", SETTINGS, images, path, resume=True)


def test_resume_runs_no_code(images, tmp_path):
    """What a checkpoint's pickle says is not called, and the error names it."""

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "marker"),)

    (tmp_path / "checkpoint").write_bytes(pickle.dumps({"run": Hostile()}))
    with pytest.raises(CheckpointError, match=r"asks for \w+\.mkdir"):
        train("plain", SETTINGS, images, tmp_path / "checkpoint", resume=True)
    assert not (tmp_path / "marker").exists()


@pytest.mark.slow
def test_command(tmp_path, monkeypatch, capsys):
    """Trains both, compares and draws them, and fails if they differ. With --resume no finished run is made again."""
    arguments = ["--epochs", "1", "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    first = capsys.readouterr().out
    assert "Largest difference" in first and "FusedMultiHeadAttention" in first and "Paddle's own layers" in first
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "fused.checkpoint",
        "loss.png",
        "plain.checkpoint",
    ]
    assert cli.main([*arguments, "--resume"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == first.splitlines()[-1]
    assert cli.main([*arguments, "--resume", "--seed", "1"]) == 1
    assert "seed" in capsys.readouterr().err
    monkeypatch.setattr(cli, "TOLERANCE", 1e-12)
    assert cli.main([*arguments, "--resume"]) == 1
    assert "should agree" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--epochs", "0"], ["--dropout", "1"], ["--dropout", "x"], ["--seed", "-1"], ["--attention", "other"], ["more"]],
)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code == 2 and capsys.readouterr().err
