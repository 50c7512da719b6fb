"""State dicts of converted models under the names from before, loading of every naming, and optimizer states in both
directions.
"""

import copy

import numpy as np
import paddle
import pytest
from encoders import EMBED, HEADS, check, encoder, make_x, state_of
from paddle import nn
from paddle_fused_attention import (
    convert,
    pack_optimizer_state,
    pack_qkv_bias,
    pack_qkv_weight,
    revert,
    separate_optimizer_state,
    separate_state_dict,
)

ATTENTION = "layers.0.self_attn."


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and list(actual[name].shape) == list(value.shape), name
        np.testing.assert_array_equal(np.asarray(actual[name]), np.asarray(value), name)


@pytest.mark.parametrize("bias", [None, False])
def test_separate_state_dict(bias):
    """Names, order, bits, and what Paddle calls the parameters."""
    model = nn.Sequential(encoder(bias_attr=bias), nn.Linear(EMBED, 2))
    before, names = state_of(model), {name: value.name for name, value in model.state_dict().items()}
    convert(model)
    packed = state_of(model)
    assert f"0.{ATTENTION}qkv_weight" in packed
    separate = separate_state_dict(model)
    assert_same({name: value.numpy() for name, value in separate.items()}, before)
    assert {name: value.name for name, value in separate.items()} == names
    assert list(state_of(model)) == list(packed)
    other = nn.Sequential(encoder(bias_attr=bias), nn.Linear(EMBED, 2))
    assert other.set_state_dict(separate) == ([], [])
    with pytest.raises(TypeError, match="model: expected a paddle.nn.Layer, got dict"):
        separate_state_dict({})


def old_names(state, normalize_before):
    """As earlier versions of this package named a converted encoder's parameters."""
    result, norm = {}, "pre_ln" if normalize_before else "ln"
    for name, value in state.items():
        prefix = (
            name[: name.index("self_attn" if "self_attn" in name else "norm1")]
            if "self_attn" in name or "norm1" in name
            else ""
        )
        new = {
            "self_attn.out_proj.weight": "self_attn.linear_weight",
            "self_attn.out_proj.bias": "self_attn.linear_bias",
            "norm1.weight": f"self_attn.{norm}_scale",
            "norm1.bias": f"self_attn.{norm}_bias",
        }.get(name[len(prefix) :])
        result[name if new is None else prefix + new] = value
    return result


@pytest.mark.parametrize("naming", ["packed", "separate", "old"])
@pytest.mark.parametrize("kind", ["tensors", "arrays", "float64 arrays", "file"])
@pytest.mark.parametrize("normalize_before", [False, True])
def test_every_naming_loads(normalize_before, kind, naming, tmp_path):
    source = encoder(normalize_before)
    x = make_x()
    expected = source(x).numpy()
    separate = source.state_dict()
    packed = convert(copy.deepcopy(source)).state_dict()
    state = {"packed": packed, "separate": separate, "old": old_names(packed, normalize_before)}[naming]
    if kind == "file":
        paddle.save(state, str(tmp_path / "state.pdparams"))
        state = paddle.load(str(tmp_path / "state.pdparams"))
    elif kind != "tensors":
        wide = [name for name in state if kind == "float64 arrays" and ("self_attn" in name or "norm1" in name)]
        state = {name: value.numpy().astype("float64" if name in wide else "float32") for name, value in state.items()}
    model = convert(nn.Sequential(encoder(normalize_before)))
    for p in model.parameters():
        p.set_value(paddle.zeros_like(p))
    assert model.set_state_dict({f"0.{name}": value for name, value in state.items()}) == ([], [])
    check("out", model(x).numpy(), expected, "float32")


def test_what_is_missing_is_told():
    model = convert(encoder())
    separate = separate_state_dict(model)
    key = f"{ATTENTION}k_proj.weight"
    value = separate.pop(key)
    separate["other"] = value
    with pytest.warns(UserWarning, match=f"Skip loading for {key}"):
        missing, unexpected = model.set_state_dict(separate)
    assert missing == [key] and unexpected == ["other"]
    separate[key] = value[:, :3]
    with pytest.warns(UserWarning, match=r"k_proj.weight receives a shape \[16, 3\]"):
        model.set_state_dict(separate)


def test_loading_by_parameter_names():
    """use_structured_name=False: by what Paddle calls the parameters."""
    source = encoder()
    state = {p.name: p for p in source.parameters()}
    model = encoder()
    for p, like in zip(model.parameters(), source.parameters()):
        p.name = like.name
    convert(model)
    missing, unexpected = model.set_state_dict(state, use_structured_name=False)
    assert (missing, unexpected) == ([], [])
    check("out", model(make_x()).numpy(), source(make_x()).numpy(), "float32")


def test_a_library_that_saves_gets_the_names_from_before():
    """PaddleNLP's save_pretrained, whose files are read into models that are not converted."""
    model = encoder()
    before = list(model.state_dict())
    convert(model)
    library = {"__name__": "paddlenlp.transformers.model_utils"}
    exec(
        "def save_pretrained(model):\n    return model.state_dict()\ndef count(model):\n    return model.state_dict()",
        library,
    )
    assert list(library["save_pretrained"](model)) == before
    assert list(library["count"](model)) == list(model.state_dict()) != before


def steps(model, optimizer, numbers):
    for step in numbers:
        (model(make_x(seed=step)) - make_x(seed=100 + step)).square().mean().backward()
        optimizer.step()
        optimizer.clear_grad()


OPTIMIZERS = {
    "Momentum": lambda p: paddle.optimizer.Momentum(1e-2, parameters=p),
    "Adam": lambda p: paddle.optimizer.Adam(1e-2, parameters=p),
    "AdamW": lambda p: paddle.optimizer.AdamW(1e-2, weight_decay=0.1, parameters=p),
    "RMSProp": lambda p: paddle.optimizer.RMSProp(1e-2, parameters=p),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_after_conversion(kind, tmp_path):
    """Three steps, then three on the converted model with the optimizer's state: as six steps without conversion; and
    back again.
    """
    make = OPTIMIZERS[kind]

    def started(change, weights=None):
        paddle.seed(1)
        model = encoder(normalize_before=True)
        if weights is not None:
            model.set_state_dict(weights)
        model = change(model)
        return model, make(model.parameters())

    process = paddle.utils.unique_name.guard  # in which names of parameters and of their states begin anew

    with process():
        model, optimizer = started(lambda model: model)
        start = state_of(model)
        steps(model, optimizer, range(3))
        paddle.save(optimizer.state_dict(), str(tmp_path / "opt.pdopt"))
        middle = state_of(model)
        steps(model, optimizer, range(3, 6))
        expected = state_of(model)

    def assert_agrees(state):
        for name, value in state.items():
            if not name.endswith("k_proj.bias"):
                np.testing.assert_allclose(value.numpy(), expected[name], atol=1e-4, err_msg=name)
                assert np.abs(expected[name] - start[name]).max() > 1e-3

    with process():
        model, optimizer = started(convert, middle)
        optimizer.set_state_dict(pack_optimizer_state(model, paddle.load(str(tmp_path / "opt.pdopt"))))
        steps(model, optimizer, range(3, 4))
        state, weights = separate_optimizer_state(model, optimizer.state_dict()), separate_state_dict(model)
        state = {name: value.clone() if isinstance(value, paddle.Tensor) else value for name, value in state.items()}
        weights = {name: value.clone() for name, value in weights.items()}
        steps(model, optimizer, range(4, 6))
        assert_agrees(separate_state_dict(model))

    with process():
        model, optimizer = started(lambda model: model, weights)
        optimizer.set_state_dict(state)
        steps(model, optimizer, range(4, 6))
        assert_agrees(model.state_dict())


def test_optimizer_states_bit_for_bit():
    """There and back, master weights too, which are float32 beside 16-bit parameters; the state that was given stays as
    it is.
    """
    model = convert(encoder())
    attention = model.layers[0].self_attn
    packing = attention._packing
    rng = np.random.default_rng(2)
    moments = {
        packing.parameter_names[name, kind]: rng.standard_normal(
            (EMBED, EMBED) if kind == "weight" else (EMBED,)
        ).astype("float32")
        for name in packing.projections
        for kind in ("weight", "bias")
    }
    state = {f"{name}_moment1_0": value for name, value in moments.items()}
    state.update({f"{name}_beta1_pow_acc_0": np.array([0.9], "float32") for name in moments})
    state["master_weights"] = dict(moments)
    state["LR_Scheduler"] = {"last_epoch": 3}
    given = copy.deepcopy(state)
    packed = pack_optimizer_state(model, state)
    assert sorted(state) == sorted(given) and sorted(state["master_weights"]) == sorted(given["master_weights"])
    weight, bias = attention.qkv_weight.name, attention.qkv_bias.name
    expected = pack_qkv_weight(
        *(moments[packing.parameter_names[name, "weight"]] for name in packing.projections), HEADS
    )
    np.testing.assert_array_equal(packed[f"{weight}_moment1_0"].numpy(), expected)
    np.testing.assert_array_equal(packed["master_weights"][weight].numpy(), expected)
    expected = pack_qkv_bias(*(moments[packing.parameter_names[name, "bias"]] for name in packing.projections), HEADS)
    np.testing.assert_array_equal(packed[f"{bias}_moment1_0"].numpy(), expected)
    assert packed["LR_Scheduler"] == {"last_epoch": 3}
    assert packed[f"{weight}_beta1_pow_acc_0"].item() == np.float32(0.9)
    back = separate_optimizer_state(model, packed)
    assert sorted(back) == sorted(given) and sorted(back["master_weights"]) == sorted(given["master_weights"])
    for found, wanted in ((back, given), (back["master_weights"], given["master_weights"])):
        for name, value in wanted.items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(found[name].numpy(), value)


def test_optimizer_states_that_do_not_fit():
    model = convert(encoder())
    packing = model.layers[0].self_attn._packing
    q, k, v = (packing.parameter_names[name, "weight"] for name in packing.projections)
    full = np.zeros((EMBED, EMBED), "float32")
    with pytest.raises(ValueError, match=f"state: expected {k}_moment1_0 beside {q}_moment1_0, found none"):
        pack_optimizer_state(model, {f"{q}_moment1_0": full})
    with pytest.raises(
        ValueError, match=r"state: expected .*_moment1_0 and its like of shape \[16, 16\] or one number"
    ):
        pack_optimizer_state(model, {f"{name}_moment1_0": full[:2] for name in (q, k, v)})
    with pytest.raises(ValueError, match="state: expected the same number"):
        pack_optimizer_state(model, {f"{name}_pow_0": np.array([i], "float32") for i, name in enumerate((q, k, v))})
    with pytest.raises(
        ValueError, match=r"state: expected .*_moment1_0 of shape \[3, 4, 4, 16\] or one number, got \[2\]"
    ):
        separate_optimizer_state(
            model, {f"{model.layers[0].self_attn.qkv_weight.name}_moment1_0": np.zeros(2, "float32")}
        )
    for function in (pack_optimizer_state, separate_optimizer_state):
        with pytest.raises(TypeError, match="state: expected a dict"):
            function(model, [])
        with pytest.raises(TypeError, match="model: expected a paddle.nn.Layer"):
            function({}, {})
    assert pack_optimizer_state(revert(model), {"a": 1}) == {"a": 1}
