"""Checkpoints in several files, which are read by their index."""

import json

import pytest
from file_bytes import FLOATS, refused, same, torch_floats
from paddle_fused_attention import checkpoint_files
from paddle_fused_attention.checkpoint_files import Checkpoint, CheckpointError, read, write


def index(path, weight_map, **more):
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map, **more}))
    return path


def shards(folder, suffix, metadata=({"format": "pt", "part": "1"}, {"format": "pt", "part": "2"})):
    """Two files; `a` and `c` are in the first."""
    first, second = (f"model-0000{i}-of-00002{suffix}" for i in (1, 2))
    if suffix == ".bin":
        torch_floats(folder / first, "a", "c")
        torch_floats(folder / second, "b")
    else:
        write(folder / first, Checkpoint({"a": FLOATS.reshape(2, 3), "c": FLOATS.reshape(2, 3) + 1}, metadata[0]))
        write(folder / second, Checkpoint({"b": FLOATS.reshape(2, 3)}, metadata[1]))
    return {"a": first, "b": second, "c": first}


KINDS = [
    (".safetensors", "model.safetensors.index.json", "out-in"),
    (".bin", "pytorch_model.bin.index.json", "out-in"),
    (".pdparams", "model_state.pdparams.index.json", "in-out"),
]


@pytest.mark.parametrize("suffix, name, layout", KINDS)
def test_several_files(suffix, name, layout, tmp_path, monkeypatch):
    path = index(tmp_path / name, shards(tmp_path, suffix))
    opened = []
    monkeypatch.setattr(checkpoint_files, "read", lambda path: opened.append(path.name) or read(path))
    found = read(path)
    same(found.arrays, {"a": FLOATS.reshape(2, 3), "b": FLOATS.reshape(2, 3), "c": FLOATS.reshape(2, 3) + 1})
    assert found.layout == layout and found.metadata == (None if suffix == ".bin" else {"format": "pt"})
    assert sorted(opened) == sorted(set(opened)) and len(opened) == 2


@pytest.mark.parametrize("suffix, name, layout", KINDS)
def test_several_files_that_do_not_fit(suffix, name, layout, tmp_path):
    path, places = tmp_path / name, shards(tmp_path, suffix)
    first = places["a"]
    refused(index(path, {**places, "d": first}), f"d is missing in {first}")
    refused(index(path, {key: places[key] for key in "ab"}), f"c is not in its weight_map, but in {first}")
    refused(index(path, {**places, "b": first}), f"b is missing in {first}")
    message = f"{tmp_path / 'no'}{suffix}: no such file"
    with pytest.raises(CheckpointError, match=f"^{message}$"):
        read(index(path, {**places, "d": f"no{suffix}"}))
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / first).write_bytes((tmp_path / first).read_bytes())
    for outside in (
        f"../{tmp_path.name}/{first}",
        str(tmp_path / first),
        f"inner/{first}",
        f"..\\{first}",
        "..",
        "",
        f"a\0{suffix}",
    ):
        refused(
            index(path, {**places, "a": outside, "c": outside}),
            "is not in the index's own folder" if outside not in ("..", "") else "",
        )
    refused(index(path, {**places, "d": name}), "is of no kind that can be read")
    (tmp_path / first).write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=f"{first}: can't be read as {suffix}"):
        read(index(path, places))


def test_indices_that_are_none(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    for content in (
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"weight_map": {}}',
        b'{"weight_map": ["a"]}',
        b'{"weight_map": {"a": 1}}',
    ):
        path.write_bytes(content)
        refused(path, "can't be read as .index.json")
    path.write_bytes(b'{"weight_map": {"a": "b.bin", "a": "c.bin"}}')
    refused(path, "a stands in it twice")
    path.write_bytes(b"[" * 100000)
    refused(path)
    refused(tmp_path / "no.bin.index.json", "no such file")
    with pytest.raises(
        CheckpointError, match="expected a name that ends in .pdparams, .safetensors, .bin, .pt, .pth or .index.json"
    ):
        read(tmp_path / "config.json")


def test_metadata_of_several_files(tmp_path):
    """What is the same in all is kept; files of different formats are no checkpoint."""
    path = tmp_path / "model.safetensors.index.json"
    own = "paddle_fused_attention.layout"
    for each, expected in (
        ((None, None), None),
        (({}, None), {}),
        (({"format": "pt"}, None), {"format": "pt"}),
        (({"a": "1", "b": "1"}, {"a": "1", "b": "2", "c": "3"}), {"a": "1", "c": "3"}),
    ):
        found = read(index(path, shards(tmp_path, ".safetensors", each)))
        assert found.metadata == expected and found.layout == ("out-in" if expected == {"format": "pt"} else None)
    for each in (({"format": "pt"}, {"format": "np"}), ({own: "in-out"}, {own: "out-in"})):
        refused(index(path, shards(tmp_path, ".safetensors", each)), "its files disagree about")
    refused(
        index(path, shards(tmp_path, ".safetensors", ({"format": "pt"}, {own: "in-out"}))), "disagree about the layout"
    )
