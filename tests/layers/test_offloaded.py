"""Weights that accelerate keeps on the CPU or the disk until their layer runs: additive, with the real hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, init_empty_weights, load_checkpoint_and_dispatch
from transformers import AutoModelForCausalLM

from models import adapt, gpt2, llama, tokens
from paca.config import PacaConfig
from paca.layers import paca_layers

DEVICE_MAP: dict[str, Any] = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}
ADDITIVE, MIXED = {"additive"}, {"additive", "resident"}


def on_cpu(model: Any, folder: Path) -> Any:
    return cpu_offload(model)


def on_disk(model: Any, folder: Path) -> Any:
    return disk_offload(model, folder)


def dispatched(model: Any, folder: Path) -> Any:
    return dispatch_model(model, DEVICE_MAP, main_device="cpu", offload_dir=folder)


def loaded_and_dispatched(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder / "model")
    with init_empty_weights():
        empty = llama()
    return load_checkpoint_and_dispatch(empty, folder / "model", DEVICE_MAP, offload_folder=folder / "off").eval()


PLACES = [(on_cpu, ADDITIVE), (on_disk, ADDITIVE), (dispatched, MIXED), (loaded_and_dispatched, MIXED)]
offloading = pytest.mark.parametrize(("offload", "modes"), PLACES)
Offload = Callable[[Any, Path], Any]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model(tokens(), labels=tokens()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def expected() -> Any:
    """The same adapter on the same model, nothing offloaded."""
    return adapt(llama().eval())


def test_the_selection_needs_no_weight(tmp_path):
    model = adapt(cpu_offload(gpt2().eval()), target_modules=["c_attn"])
    want = adapt(gpt2().eval(), target_modules=["c_attn"])
    for layer, other in zip(paca_layers(model), paca_layers(want), strict=True):
        assert torch.equal(layer.paca_indices["default"], other.paca_indices["default"])
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(want))
    torch.testing.assert_close(model(tokens()).logits, want(tokens()).logits)


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_layers_that_are_offloaded_one_by_one(offload, tmp_path):
    expected = adapt(llama().eval(), target_modules=["q_proj", "down_proj"])
    expected.save_pretrained(tmp_path)
    model = llama().eval()
    for number, module in enumerate([m for n, m in model.named_modules() if n.endswith(("q_proj", "down_proj"))]):
        offload(module, *([] if offload is cpu_offload else [tmp_path / str(number)]))
    loaded = peft.PeftModel.from_pretrained(model, tmp_path, is_trainable=True)
    assert {layer.mode for layer in paca_layers(loaded)} == ADDITIVE
    torch.testing.assert_close(loaded(tokens()).logits, expected(tokens()).logits)
    for (name, gradient), want in zip(gradients(loaded).items(), gradients(expected).values(), strict=True):
        torch.testing.assert_close(gradient, want, msg=name)


@offloading
def test_outputs_and_gradients_are_those_of_a_model_in_memory(offload: Offload, modes, tmp_path, expected):
    model = adapt(offload(llama().eval(), tmp_path))
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(expected))
    assert {layer.mode for layer in paca_layers(model)} == modes
    torch.testing.assert_close(model(tokens()).logits, expected(tokens()).logits)
    want = gradients(expected)
    found = gradients(model)
    assert found.keys() == want.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, want[name], msg=name)


@offloading
def test_disabled_is_the_base_model_bitwise(offload: Offload, modes, tmp_path):
    model = adapt(offload(llama().eval(), tmp_path))
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(tokens()).logits, llama().eval()(tokens()).logits)


@offloading
def test_merging_is_refused_before_anything_is_merged(offload: Offload, modes, tmp_path):
    model = adapt(offload(llama().eval(), tmp_path))
    want = model(tokens()).logits
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"q_proj: Adapter 'default' can't be merged: accelerate offloads"):
            merge()
    assert torch.equal(model(tokens()).logits, want)


@pytest.mark.parametrize("offload", [on_cpu, on_disk])
def test_unloading_gives_the_offloaded_model_back(offload: Offload, tmp_path):
    model = adapt(offload(llama().eval(), tmp_path)).unload()
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, llama().eval()(tokens()).logits)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_several_adapters_saved_and_loaded(tmp_path, expected):
    model = adapt(on_cpu(llama().eval(), tmp_path))
    expected.save_pretrained(tmp_path / "saved")
    model.load_adapter(tmp_path / "saved", "second")
    model.set_adapter("second")
    torch.testing.assert_close(model(tokens()).logits, expected(tokens()).logits)
    model.delete_adapter("default")
    model.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(llama().eval(), tmp_path / "again" / "second")
    torch.testing.assert_close(again(tokens()).logits, expected(tokens()).logits)


def test_an_adapter_is_loaded_onto_a_dispatched_model(tmp_path, monkeypatch, expected):
    monkeypatch.chdir(tmp_path)  # PEFT writes its new offload index there
    llama().save_pretrained(tmp_path / "model")
    expected.save_pretrained(tmp_path / "saved")
    off = tmp_path / "off"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=DEVICE_MAP, offload_folder=off).eval()
    inner = {f"base_model.model.{name}": place for name, place in DEVICE_MAP.items()}
    model = peft.PeftModel.from_pretrained(
        base, tmp_path / "saved", is_trainable=True, device_map=inner, offload_folder=off
    )
    model.eval()
    torch.testing.assert_close(model(tokens()).logits, expected(tokens()).logits)
    want = gradients(expected)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, want[name], msg=name)


@pytest.mark.parametrize("whole", [False, True])
def test_a_base_model_that_peft_would_write_over_is_refused(tmp_path, monkeypatch, expected, whole):
    llama().save_pretrained(tmp_path / "model")
    expected.save_pretrained(tmp_path / "saved")
    file = tmp_path / "model" / "model.safetensors"
    before, off, name = file.read_bytes(), tmp_path / "off", str(tmp_path / "model") if whole else "model"
    monkeypatch.chdir("/" if whole else tmp_path)
    base = AutoModelForCausalLM.from_pretrained(name, device_map=DEVICE_MAP, offload_folder=off).eval()
    inner = {f"base_model.model.{name}": place for name, place in DEVICE_MAP.items()}
    with pytest.raises(ValueError, match=f"loaded from {name}, and is partly on the disk: PEFT would write"):
        peft.PeftModel.from_pretrained(base, tmp_path / "saved", device_map=inner, offload_folder=off)
    assert file.read_bytes() == before


@pytest.mark.parametrize("layer", [torch.nn.Conv2d(4, 6, 3), torch.nn.Embedding(7, 4)])
def test_other_kinds_of_offloaded_layers_are_refused_by_name(layer):
    model = torch.nn.ModuleDict({"body": torch.nn.ModuleDict({"target": layer})})
    cpu_offload(model, execution_device=torch.device("cpu"))
    before = type(layer)
    with pytest.raises(ValueError, match=r"body\.target is offloaded by accelerate, and of the layers"):
        peft.get_peft_model(model, PacaConfig(r=2, target_modules=["target"]))
    assert type(layer) is before


@offloading
@torch.no_grad()
def test_mixed_batches_give_each_sample_its_adapter(offload: Offload, modes, tmp_path):
    model = adapt(offload(llama().eval(), tmp_path)).eval()
    model.add_adapter(
        "second", PacaConfig(r=5, random_seed=1, init_weights=False, target_modules=["q_proj", "up_proj"])
    )
    ids, names = tokens(4), ["second", "default", "__base__", "second"]
    mixed = model(input_ids=ids, adapter_names=names).logits
    for n, name in enumerate(names):
        with model.disable_adapter() if name == "__base__" else contextlib.nullcontext():
            model.set_adapter(name if name != "__base__" else "default")
            torch.testing.assert_close(mixed[n], model(input_ids=ids[n : n + 1]).logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_a_model_that_is_offloaded_after_it_was_adapted_is_refused(how, recorded, tmp_path):
    model, cpu = adapt(llama()).eval(), torch.device("cpu")
    model(input_ids=tokens())
    places = {f"base_model.model.{name}": place for name, place in DEVICE_MAP.items()}

    def offloaded_pass():
        if how == "cpu_offload":
            cpu_offload(model, execution_device=cpu)
        elif how == "disk_offload":
            disk_offload(model, tmp_path, execution_device=cpu)
        else:
            dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
        model(input_ids=tokens())

    with torch.set_grad_enabled(recorded), pytest.raises(RuntimeError, match="Offload the model first"):
        offloaded_pass()
