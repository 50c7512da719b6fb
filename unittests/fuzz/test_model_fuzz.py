"""A short run of the random models, and whether they would find a fault."""

import models
import numpy as np
import pytest


@pytest.mark.slow
def test_some_models(capsys):
    status = models.main(["--seed", "2021", "--cases", "5"])
    assert status == 0, capsys.readouterr().out


def of_kind(kind, **changes):
    drawn = next(drawn for drawn in (models.draw(3, number) for number in range(100)) if drawn.kind == kind)
    return drawn._replace(activation="gelu", dtype="float64", num_heads=2, head_dim=8, **changes)


@pytest.fixture(autouse=True)
def float64():
    with models.default_dtype("float64"):
        yield


@pytest.mark.parametrize("kind", ["encoder", "transformer"])
def test_a_wrong_conversion_is_found(kind, monkeypatch):
    def convert_wrongly(model, **options):
        model, report = convert(model, **options)
        parameter = next(p for name, p in model.named_parameters() if name.endswith("qkv_weight"))
        parameter.set_value(parameter.numpy() * (1 + 1e-4))
        return model, report

    convert = models.convert
    drawn = of_kind(kind, lengths=(5, 3))
    assert not models.check_conversion(drawn)
    monkeypatch.setattr(models, "convert", convert_wrongly)
    found = models.check_conversion(drawn)
    assert any(line.startswith("out: error") for line in found)
    assert any(line.startswith("separate_state_dict: ") for line in found)


def test_a_wrong_checkpoint_is_found(monkeypatch):
    def unpack_wrongly(arrays, **options):
        state, report = unpack(arrays, **options)
        name = next(name for name in state if name.endswith("k_proj.weight"))
        return {**state, name: np.roll(state[name], 1)}, report

    unpack = models.checkpoint.unpack
    drawn = of_kind("encoder", stored="float32")
    assert not models.check_checkpoint(drawn)
    monkeypatch.setattr(models.checkpoint, "unpack", unpack_wrongly)
    assert models.check_checkpoint(drawn) == [f"unpack: {drawn.prefix}layers.0.self_attn.k_proj.weight differs"]
