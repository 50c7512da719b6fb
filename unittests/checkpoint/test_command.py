"""`python -m paddle_fused_attention`: its arguments, reports, errors, and that it never leaves half a file."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import paddle
import pytest
from families import (
    EMBED,
    HEADS,
    SUFFIXES,
    assert_same,
    bert_block,
    check_error,
    draw,
    load,
    packed_by,
    paddle_block,
    save,
)
from paddle_fused_attention import checkpoint, checkpoint_files
from paddle_fused_attention.__main__ import main
from paddle_fused_attention.checkpoint import CheckpointError
from processes import run_python


def run(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "paddle_fused_attention", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_command(tmp_path):
    """As a process: exit status, report, one line for an error."""
    source = save(tmp_path / "in.pdparams", paddle_block("encoder.layers.0."))
    target = tmp_path / "out.pdparams"
    status, out, error = run(["convert", source, target, "--num-heads", HEADS])
    use = "for a model after paddle_fused_attention.convert(model) (an encoder layer)"
    report = f"encoder.layers.0.self_attn: Paddle, weights [in, out], {use}"
    counts = f"{target}: 1 blocks packed, 0 left alone, 10 values unchanged"
    assert (status, out.splitlines()) == (0, [report, counts]), error
    status, out, error = run(["convert", source, target, "--num-heads", HEADS])
    assert (
        status == 1 and out == "" and error.splitlines()[-1] == f"error: {target}: exists already; --force replaces it"
    )
    assert "Traceback" not in error
    status, _, error = run(["convert", source, target])
    assert status == 2 and "--num-heads" in error
    status, out, _ = run(["--help"])
    assert status == 0 and "convert" in out and "revert" in out


def test_names(tmp_path, capsys):
    state = {**paddle_block("encoder.layers.0."), **paddle_block("encoder.layers.1."), **paddle_block("other.0.")}
    source, packed, back = (
        save(tmp_path / "in.pdparams", state),
        tmp_path / "packed.pdparams",
        tmp_path / "back.pdparams",
    )
    assert main(["convert", str(source), str(packed), "--num-heads", "4", "--names", "encoder.*.1.*"]) == 0
    output = capsys.readouterr().out
    assert "encoder.layers.0.self_attn: left alone, it is not among the names 'encoder.*.1.*'" in output
    assert "1 blocks packed, 2 left alone" in output
    found = load(packed)
    assert [name for name in found if name.endswith("qkv_weight")] == ["encoder.layers.1.self_attn.qkv_weight"]
    assert main(["revert", str(packed), str(back)]) == 0
    assert_same(load(back), state)


def test_errors(tmp_path):
    source = save(tmp_path / "in.pdparams", bert_block("enc.0.", False))
    packed, other = tmp_path / "packed.pdparams", tmp_path / "other.pdparams"
    save(packed, {"enc.0.self_attn.qkv_weight": draw(3, 4, 4, EMBED), "enc.0.self_attn.ln_scale": draw(EMBED)})
    save(other, {"x.weight": draw(3)})
    out = tmp_path / "out.pdparams"
    heads = ["--num-heads", 4]
    check_error(["convert", tmp_path / "no.pdparams", out, *heads], "no.pdparams: no such file")
    check_error(
        ["convert", source, tmp_path / "out.bin", *heads],
        r"out.bin: expected a name that ends in .pdparams or .safetensors",
    )
    check_error(["convert", source, source, *heads], "in.pdparams: exists already; --force replaces it")
    for count in (5, 0, -4):
        message = f"--num-heads: expected a divisor of 16, the width of enc.0.attention, got {count}"
        check_error(["convert", source, out, "--num-heads", count], message)
    check_error(["convert", other, out, *heads], "no attention of a known naming was found")
    check_error(["convert", source, out, *heads, "--names", "dec.*"], r"no attention .* among the names 'dec.\*'")
    check_error(["revert", source, out], "no packed attention was found")
    check_error(["revert", packed, out], "enc.0.self_attn: enc.0.self_attn.linear_weight is missing")
    both = save(tmp_path / "both.pdparams", {**bert_block("enc.0.", False), "enc.0.attention.qkv_weight": draw(3)})
    check_error(["convert", both, out, *heads], "enc.0.attention.qkv_weight: expected no packed parameter")
    check_error(
        ["convert", source, tmp_path / "no" / "out.pdparams", *heads], "out.pdparams: can't be written: no such folder"
    )
    paddle.save([1, 2], str(tmp_path / "list.pdparams"))
    check_error(["convert", tmp_path / "list.pdparams", out, *heads], "list.pdparams: expected a state dict, got list")
    assert not out.exists() and not [p for p in tmp_path.iterdir() if p.name.endswith(".partial")]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "content", [b"", b"\x00\x01", b"not a checkpoint at all", b"\xff" * 64, b"\x40" + b"\x00" * 7 + b"{}"]
)
def test_broken_files(content, suffix, tmp_path):
    source = tmp_path / f"in{suffix}"
    source.write_bytes(content)
    check_error(
        ["convert", source, tmp_path / f"out{suffix}", "--num-heads", 4], f"in{suffix}: can't be read as {suffix}"
    )
    assert list(tmp_path.iterdir()) == [source]


def test_truncated_safetensors(tmp_path):
    source = save(tmp_path / "in.safetensors", bert_block(""))
    whole = source.read_bytes()
    source.write_bytes(whole[:-1])
    check_error(["convert", source, tmp_path / "out.safetensors", "--num-heads", 4], "lies beyond its end")
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(whole) - 8 - int.from_bytes(
        whole[:8], "little"
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_never_half_written(suffix, tmp_path, monkeypatch):
    """An error in the middle of writing leaves the old file and nothing beside it."""
    source, target = save(tmp_path / f"in{suffix}", bert_block("", suffix != ".pdparams")), tmp_path / f"out{suffix}"
    target.write_bytes(b"old")
    arguments = ["convert", source, target, "--num-heads", 4, "--force"]

    def fail_after_a_part(file, *_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    writer = "_write_pdparams" if suffix == ".pdparams" else "_write_safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_files, writer, fail_after_a_part)
        check_error(arguments, f"out{suffix}: can't be written: No space left on device")
        assert target.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2

        def interrupted(file, *_):
            file.write(b"half")
            raise KeyboardInterrupt

        patched.setattr(checkpoint_files, writer, interrupted)
        check_error(arguments, "interrupted", status=130, start="")
        assert target.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
    assert main([str(argument) for argument in arguments]) == 0
    assert "attention.qkv_weight" in load(target)
    assert (target.stat().st_mode & 0o777) == (0o666 & ~current_umask())


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_progress_bar(capsys, monkeypatch, tmp_path):
    """On a terminal only, on stderr."""
    source = save(tmp_path / "in.pdparams", {**bert_block("0.", False), **bert_block("1.", False)})
    arguments = ["convert", str(source), str(tmp_path / "out.pdparams"), "--num-heads", "4", "--force"]
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(arguments) == 0
    error = capsys.readouterr().err
    assert error.endswith(f"\rconvert [{'#' * 30}] 2/2\n") and f"\rconvert [{'#' * 15}{'.' * 15}] 1/2" in error


def test_heads_by_pattern(tmp_path):
    """One number is not for blocks of several widths."""
    wide = {name: np.concatenate([np.concatenate([a, a])] * 2, -1) if a.ndim == 2 else np.concatenate([a, a])
            for name, a in bert_block("wide.0.", False).items()}  # fmt: skip
    state = {**bert_block("text.0.", False), **wide}
    source, out = save(tmp_path / "in.pdparams", state), tmp_path / "out.pdparams"
    command = ["convert", source, out, "--force"]
    widths = "text.0.attention is 16 wide and wide.0.attention is 32"
    message = f"--num-heads: expected a number for each width, .* {widths}; got 4"
    check_error([*command, "--num-heads", 4], message)
    check_error(
        [*command, "--num-heads", "text.*=4"], "--num-heads: expected a pattern that fits wide.0.attention, got 'text"
    )
    check_error([*command, "--num-heads", "text.*=5", "--num-heads", "*=8"], "--num-heads: expected a divisor of 16")
    check_error(
        [*command, "--num-heads", "*=4", "--num-heads", "texts.*=4"],
        "--num-heads: there is no block with a name like 'texts",
    )
    check_error(
        [*command, "--num-heads", "4", "--num-heads", "8"], "--num-heads: expected it once, or each time with a pattern"
    )
    for words in (["text.*=4", "*=8"], ["text.*=4", "wide.*=8"]):
        assert main([str(word) for word in command] + [word for text in words for word in ("--num-heads", text)]) == 0
        found = load(out)
        assert found["text.0.attention.qkv_weight"].shape == (3, 4, 4, 16)
        assert found["wide.0.attention.qkv_weight"].shape == (3, 8, 4, 32)
    assert main([str(word) for word in (*command, "--num-heads", 2, "--names", "wide.*")]) == 0
    for text in ("x", "*=", "*=x", "4.0"):
        with pytest.raises(SystemExit, match="2"):
            main([*map(str, command), "--num-heads", text])
    for count in (True, "4", 2.0, None):
        with pytest.raises(CheckpointError, match="--num-heads: expected a divisor of 16"):
            packed_by(bert_block("a."), count)


def test_other_keys_and_strange_names(tmp_path, capsys):
    """Keys that are no strings pass through; what is printed stays one line of a bearable length."""
    strange = "x\n\x1b[31mred\u202e." + "y" * 5000 + ".self_attn.q_proj.weight"
    state = {
        **bert_block("a.", False),
        strange: draw(2, 2),
        "\x07.attn.c_attn.weight": draw(2),
        5: draw(2),
        None: draw(3),
    }
    packed, report = checkpoint.pack(state, HEADS)
    assert {5, None} <= set(packed) and list(report.converted) == ["a.attention"]
    unpacked, _ = checkpoint.unpack(packed, metadata=report.metadata)
    assert set(unpacked) == set(state)
    source = save(tmp_path / "in.pdparams", {name: a for name, a in state.items() if isinstance(name, str)})
    assert main(["convert", str(source), str(tmp_path / "out.pdparams"), "--num-heads", "4"]) == 0
    lines = capsys.readouterr().out.split("\n")[:-1]
    assert len(lines) == 4 and all(line.isprintable() and len(line) < 1100 for line in lines)
    assert any(line.startswith(r"x\n\x1b[31mred\u202e.yyy") for line in lines)
    source = save(tmp_path / "in.pdparams", {strange: draw(2, 2)})
    check_error(
        ["convert", source, tmp_path / "out.pdparams", "--num-heads", 4, "--force"], r"no attention .*x\\n\\x1b"
    )


TERMINATED = """
import os, runpy, signal, sys
from paddle_fused_attention import checkpoint

checkpoint.pack = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
runpy.run_module("paddle_fused_attention", run_name="__main__")
"""


@pytest.mark.slow
def test_sigterm_prints_no_trace(tmp_path):
    source, out = save(tmp_path / "in.pdparams", bert_block("a.", False)), tmp_path / "out.pdparams"
    end = run_python(TERMINATED, "convert", source, out, "--num-heads", 4)
    assert end.returncode == -signal.SIGTERM
    assert "Traceback" not in end.stdout + end.stderr and list(tmp_path.iterdir()) == [source]


@pytest.mark.slow
def test_a_report_that_can_not_be_printed(tmp_path):
    """The file is there all the same; one line says so."""
    source, out = save(tmp_path / "in.pdparams", bert_block("a.", False)), tmp_path / "out.pdparams"
    command = [sys.executable, "-m", "paddle_fused_attention", "convert", str(source), str(out), "--num-heads", "4"]
    with open("/dev/full", "w") as full:
        end = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert end.returncode == 1 and "Traceback" not in end.stderr
    message = "error: the file is written, but its report can't be: No space left on device"
    assert end.stderr.splitlines()[-1] == message
    assert "a.attention.qkv_weight" in load(out)


def test_arguments_are_printed_escaped(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["convert", "a", "b", "\x1b[31m", "--num-heads", "4"])
    assert r"unrecognized arguments: \x1b[31m" in capsys.readouterr().err


def test_too_little_memory_is_one_line(tmp_path, monkeypatch):
    source, out = save(tmp_path / "in.pdparams", bert_block("a.", False)), tmp_path / "out.pdparams"

    def no_memory(*_, **__):
        raise MemoryError

    for module, name, message in (
        (checkpoint, "pack", "not enough memory$"),
        (checkpoint_files, "_write_pdparams", f"{out}: not enough memory to write it$"),
        (checkpoint_files, "_read_pdparams", f"{source}: not enough memory to read it$"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, no_memory)
            check_error(["convert", source, out, "--num-heads", 4], message)
    assert list(tmp_path.iterdir()) == [source]


def test_a_config_that_is_no_file(tmp_path):
    """It is not waited for."""
    source, out = save(tmp_path / "in.pdparams", bert_block("a.", False)), tmp_path / "out.pdparams"
    os.mkfifo(tmp_path / "config.json")
    assert main(["convert", str(source), str(out), "--num-heads", "4"]) == 0


def test_an_interrupt_is_one_line(tmp_path, monkeypatch):
    source, out = save(tmp_path / "in.pdparams", bert_block("a.", False)), tmp_path / "out.pdparams"

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "pack", interrupted)
    check_error(["convert", source, out, "--num-heads", 4], "interrupted$", status=130, start="")
    assert not out.exists()
