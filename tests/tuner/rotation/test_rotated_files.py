"""A rotated adapter in files and state dicts: the union of all its columns, as any PEFT loads it."""

from __future__ import annotations

import peft
import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import paca
from models import adapt, adapted_perceptron, gpt2, llama, perceptron, tokens
from paca.layers import paca_layers
from paca.tuner.rotation.union_config import alpha_for
from rotating import equal, rotated, trainable


def settings_of_llama(**more):
    return {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 5}, "paca_alpha": 5, **more}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_saved_adapter_is_the_union_and_computes_the_same_bits(tmp_path, dtype):
    x = tokens()
    model = rotated(adapt(llama().to(dtype), **settings_of_llama(rotate_every=2)), x)
    with torch.no_grad():
        logits = model(x).logits
    model.save_pretrained(tmp_path)
    config = paca.PacaConfig.from_pretrained(str(tmp_path))
    assert config.rotate_every is None
    loaded = peft.PeftModel.from_pretrained(llama().to(dtype), str(tmp_path))
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, logits)
    for layer, source in zip(paca_layers(loaded), paca_layers(model), strict=True):
        columns = source.columns_of("default").parts()
        union = torch.cat([c.indices for c in columns])
        assert torch.equal(layer.paca_indices["default"], union.sort().values)
        assert union.unique().numel() == union.numel() == 4 * source.r["default"]
        assert layer.scaling == source.scaling
        assert not layer.folded
    assert model.peft_config["default"].r == 3  # the model itself goes on as before
    plain = llama().to(dtype)
    paca_merged = loaded.merge_and_unload()
    with torch.no_grad():
        assert torch.equal(paca_merged(x).logits, logits)
        assert not torch.equal(plain(x).logits, logits)


def test_a_rotated_adapter_exports_to_lora(tmp_path):
    from paca.convert.lora import save_as_lora

    x = tokens()
    model = rotated(adapt(gpt2(), r=3, paca_alpha=6, target_modules=["c_attn", "c_fc"]), x)
    save_as_lora(model, tmp_path)
    lora = peft.PeftModel.from_pretrained(gpt2(), str(tmp_path))
    assert lora.peft_config["default"].peft_type == "LORA"
    with torch.no_grad():
        torch.testing.assert_close(lora(x).logits, model(x).logits, rtol=1e-4, atol=1e-5)
        assert (gpt2()(x).logits - model(x).logits).abs().max() > 1e-2


def test_columns_given_by_hand_do_not_stand_in_the_way_of_the_union(tmp_path):
    x = torch.randn(6, 7)
    model = rotated(adapt(perceptron(), indices={"lin1": [0, 1], "lin2": [3]}), x)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(perceptron(), str(tmp_path))
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_a_saved_union_is_loaded_back_into_the_rotating_adapter(tmp_path):
    x = torch.randn(6, 7)
    model = rotated(adapted_perceptron(rotate_every=2), x)
    model.save_pretrained(tmp_path / "one")
    with torch.no_grad():
        y = model(x)
    columns = paca.trained_columns(model)
    other = adapted_perceptron(rotate_every=2)
    other.load_adapter(str(tmp_path / "one"), "default")
    with torch.no_grad():
        assert torch.equal(other(x), y)
    paca.set_trained_columns(other, columns)
    with torch.no_grad():
        assert torch.equal(other(x), y)
    assert equal([p.detach() for p in trainable(model)], [p.detach() for p in trainable(other)])
    other.save_pretrained(tmp_path / "two")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    model.load_adapter(str(tmp_path / "two"), "default")  # into one that is rotated already
    with torch.no_grad():
        assert torch.equal(model(x), y)
    with pytest.raises(ValueError, match="must have"):  # an adapter that does not rotate has no place for more columns
        adapted_perceptron().load_adapter(str(tmp_path / "one"), "default")


def test_a_state_dict_of_the_whole_model_holds_the_folded_columns():
    x = torch.randn(6, 7)
    model = adapted_perceptron()
    early = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        y_early = model(x)
    rotated(model, x)
    with torch.no_grad():
        y = model(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    other = adapted_perceptron()
    assert not other.load_state_dict(state).unexpected_keys
    with torch.no_grad():
        assert torch.equal(other(x), y)
    other.load_state_dict(early)  # from before any rotation: what was folded is gone
    with torch.no_grad():
        assert torch.equal(other(x), y_early)
    assert not any(layer.folded for layer in paca_layers(other))


def test_torchs_checkpoints_take_a_rotated_adapter():
    """They follow the name of everything in a state dict through the modules: of folded columns as well."""
    x = torch.randn(6, 7)
    model = rotated(adapted_perceptron(), x)
    state = {name: value.clone() for name, value in get_model_state_dict(model).items()}
    assert state.keys() == model.state_dict().keys()
    other = adapted_perceptron()
    set_model_state_dict(other, state)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
    assert all(layer.folded for layer in paca_layers(other))


@pytest.mark.parametrize(("alpha", "r"), [(16, 16), (5, 3), (1, 7), (0.1, 3), (32, 24), (1 / 3, 11)])
def test_the_scale_survives_another_rank(alpha, r):
    for k in range(r, 40 * r, 7):
        assert alpha_for(alpha / r, k) / k == pytest.approx(alpha / r, rel=3e-16, abs=0)


def test_columns_that_a_loaded_adapter_never_trained_make_room_for_its_own(tmp_path):
    x = torch.randn(6, 7)
    model = rotated(adapted_perceptron(rotate_every=2), x, rotations=1)
    model.save_pretrained(tmp_path / "one")
    trained = torch.cat([c.indices for c in paca_layers(model)[1].columns_of("default").parts()]).tolist()
    free = sorted(set(range(13)) - set(trained))
    other = adapted_perceptron(rotate_every=2, indices={"lin2": [trained[0], *free[:2]]})
    other.load_adapter(str(tmp_path / "one"), "default")
    paca.set_trained_columns(other, paca.trained_columns(model))
    other.save_pretrained(tmp_path / "two")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_averages_of_parameters_leave_folded_columns():
    x = torch.randn(6, 7)
    model = rotated(adapted_perceptron(), x)
    want = model(x)
    own = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict({name: torch.zeros_like(p) for name, p in own.items()}, strict=False)
    assert not torch.equal(model(x), want)
    model.load_state_dict(own, strict=False)
    assert torch.equal(model(x), want)


def test_a_load_that_fails_leaves_folded_columns():
    x = torch.randn(6, 7)
    model = rotated(adapted_perceptron(), x)
    want, own = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    folded = [layer.folded["default"].indices.numel() for layer in paca_layers(model)]
    wrong = {name: torch.zeros(2, 2) for name, p in model.named_parameters() if p.requires_grad}
    others = rotated(adapted_perceptron(r=2), x).state_dict()
    for state in (wrong, others):
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.load_state_dict(state, strict=False)
        assert [list(layer.folded) for layer in paca_layers(model)] == [["default"]] * 2
        assert all(
            layer.folded["default"].delta.shape == (layer.out_features, kept)
            for layer, kept in zip(paca_layers(model), folded, strict=True)
        )
    model.load_state_dict(own, strict=False)
    assert torch.equal(model(x), want)


def test_an_adapter_saved_from_parameters_alone_has_its_folded_columns(tmp_path):
    x = torch.randn(6, 7)
    model = rotated(adapted_perceptron(), x)
    model.save_pretrained(tmp_path, state_dict={name: p.detach() for name, p in model.named_parameters()})
    loaded = peft.PeftModel.from_pretrained(perceptron(), str(tmp_path))
    assert torch.equal(loaded(x), model(x))
