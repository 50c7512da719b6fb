"""Files that are cut off or have bytes changed are read, or refused in one line."""

import numpy as np
import paddle
import pytest
from file_bytes import DATA, STATE, optimizer_state, state_dict
from paddle_fused_attention.checkpoint_files import Checkpoint, CheckpointError, read, write


def good_files(folder):
    for name in ("torch_zip.bin", "torch_legacy.bin"):
        yield folder / f"a{name}", (DATA / name).read_bytes()
    state = {name: STATE[name] for name in ("layer.weight", "bfloat16", "scalar")}
    for suffix in (".pdparams", ".safetensors"):
        path = folder / f"good{suffix}"
        write(path, Checkpoint(state, {"format": "pt"}))
        yield folder / f"a{suffix}", path.read_bytes()
    for protocol in (2, 4):
        path = folder / f"saved{protocol}.pdparams"
        paddle.save({"model": state_dict(), "optimizer": optimizer_state(), "epoch": 3}, str(path), protocol=protocol)
        yield folder / f"a{protocol}.pdparams", path.read_bytes()


def test_truncated_files(tmp_path):
    """At any length, one line or, where only the metadata is cut off, nothing of it."""
    for path, data in good_files(tmp_path):
        read_at = []
        for length in range(0, len(data), 1 + len(data) // 150):
            path.write_bytes(data[:length])
            try:
                read(path)
                read_at.append(length)
            except CheckpointError as error:
                assert str(error).startswith(str(path)) and "\n" not in str(error)
        assert len(read_at) <= (path.name == "a.pdparams"), (path, read_at)


@pytest.mark.filterwarnings("error")
def test_random_changes(tmp_path):
    """A file with a few bytes changed is read, or refused in one line."""
    random = np.random.default_rng(0)
    for path, data in good_files(tmp_path):
        refusals = 0
        for _ in range(100):
            changed = bytearray(data)
            for place in random.integers(0, len(data), random.integers(1, 4)):
                changed[place] = random.integers(0, 256)
            path.write_bytes(changed)
            try:
                read(path)
            except CheckpointError as error:
                refusals += 1
                assert str(error).startswith(str(path)) and "\n" not in str(error) and str(error).isprintable()
        assert refusals > 10
