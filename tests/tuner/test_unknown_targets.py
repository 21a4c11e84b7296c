"""A name in `target_modules` that no module has is told, with the one that was meant."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaForSequenceClassification

import paca
from models import adapt, llama
from paca.convert.exported import export_adapter
from paca.layers import paca_layers
from tiny_checkpoint import save_adapter, save_base

LAYERS = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["nothing", "at_all"], rf"no module named at_all, nothing \(target_modules\)\..* are embed_tokens, {LAYERS}"),
        (["layers.7.self_attn.q_proj"], r"no module named layers\.7\.self_attn\.q_proj"),
        ("vproj", r"no module named vproj .*Did you mean v_proj\?"),
        ("v_proj", r"is the text 'v_proj', a pattern that matches no whole name.* \[v_proj\]"),
        (r".*\.c_attn", rf"c_attn not found in the base model\..*Its layers with weights are embed_tokens, {LAYERS}"),
    ],
)
@pytest.mark.parametrize("second", [False, True])
def test_a_name_without_a_module_is_told(targets: list[str] | str, said: str, second: bool) -> None:
    model = adapt(llama(), "other") if second else llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = len(paca_layers(model))
    config = paca.PacaConfig(r=2, target_modules=targets)
    with pytest.raises(ValueError, match=said):
        model.add_adapter("default", config) if second else peft.get_peft_model(model, config)
    assert len(paca_layers(model)) == layers
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("second", [False, True])
def test_a_name_without_a_module_beside_others_is_warned_of(second: bool) -> None:
    """PEFT leaves it out without a word, and a list for several architectures may have it."""
    model = adapt(llama(), "other", target_modules=["o_proj"]) if second else llama()
    config = paca.PacaConfig(r=2, target_modules=["q_proj", "vproj"])
    with pytest.warns(UserWarning, match=r"without some names: it has no module named vproj .*Did you mean v_proj\?"):
        adapted = model.add_adapter("default", config) or model if second else peft.get_peft_model(model, config)
    assert sum("default" in layer.paca_delta for layer in paca_layers(adapted)) == 2


def test_a_layer_within_a_module_that_is_trained_whole_has_its_name() -> None:
    model = nn.ModuleDict({"body": nn.Linear(16, 16), "head": nn.Sequential(nn.Linear(16, 16))})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(model, target_modules=["body", "head.0"], modules_to_save=["head"])


def test_names_and_ends_of_names_are_known() -> None:
    for targets in (["self_attn.q_proj"], ["model.layers.0.mlp.up_proj"], {"q_proj", "layers.1.mlp.up_proj"}):
        assert paca_layers(adapt(llama(), target_modules=targets))
    assert paca_layers(adapt(nn.Sequential(nn.Linear(16, 16)), target_modules=["0"]))
    assert paca_layers(adapt(llama(), target_modules=["q_proj", "lm_head"], exclude_modules=["lm_head"]))


def test_an_adapter_that_is_there_may_name_more(tmp_path: Path) -> None:
    """As of PEFT's own PaCA, which trains what there is of a list for several architectures."""
    save_adapter(tmp_path / "adapter", save_base(tmp_path / "model"))
    file = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"target_modules": [*settings["target_modules"], "c_attn"]}))
    assert export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora").output.is_dir()
    model = paca_layers(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"))
    assert len(model) == 14


@pytest.mark.parametrize("second", [False, True])
def test_a_module_to_save_that_there_is_not_is_refused(second: bool) -> None:
    """PEFT trains nothing then without a word: a head stays as random as it came."""
    model = adapt(llama(), "other") if second else llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = paca.PacaConfig(r=2, modules_to_save=["lm_haed"])
    said = r"LlamaForCausalLM has no module named lm_haed \(modules_to_save\).*Did you mean lm_head\? Its own modules"
    with pytest.raises(ValueError, match=said):
        model.add_adapter("default", config) if second else peft.get_peft_model(model, config)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"modules_to_save": ["embed_tokens", "wte"]}, r"no module named wte \(modules_to_save\)"),
        ({"task_type": "SEQ_CLS"}, r"no module named classifier, score .*name this one's, or it stays frozen"),
    ],
)
def test_one_that_there_is_not_beside_others_is_warned_of(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    base = llama()
    with pytest.warns(UserWarning, match=said) as told:
        model = peft.get_peft_model(base, paca.PacaConfig(r=2, target_modules=["q_proj"], **settings))
    assert sum("modules_to_save" in str(one.message) for one in told) == 1
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peft.PeftModel.from_pretrained(llama(), str(tmp_path))


def test_the_heads_that_peft_names_for_a_task_are_no_mistake() -> None:
    model = LlamaForSequenceClassification(llama().config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peft.get_peft_model(model, paca.PacaConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
