"""PaCA as LoRA: the same model, in programs that know LoRA only."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from convert.saved_adapters import change, logits, save_adapted
from forked_process import run_forked
from models import adapt, adapted_perceptron, gpt2, llama, tokens
from paca.convert.adapter import AdaptedLayer, Adapter, adapter_in_model
from paca.convert.export_card import export_card
from paca.convert.exported import export_adapter
from paca.convert.lora import save_as_lora, to_lora
from paca.messages.errors import PacaError

UNEVEN = {
    "r": 3,
    "paca_alpha": 7,
    "rank_pattern": {"layers.1.self_attn.q_proj": 5, "down_proj": 1},
    "alpha_pattern": {"down_proj": 2.5},
}


def lora_layers(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


def load_lora(base: nn.Module, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(base, str(folder)).eval()


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    save_adapted(tmp_path, llama(), **UNEVEN, target_modules=["q_proj", "down_proj", "up_proj"])
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_lora_weight_is_the_scaled_delta_rounded_once(kind: str, dtype: torch.dtype) -> None:
    model = adapted_perceptron(kind, dtype, r=3, paca_alpha=7, rank_pattern={"lin2": 13, "lin1": 1})
    adapter = adapter_in_model(model)
    config, tensors = to_lora(adapter)
    for name, out_features, in_features, r in (("lin1", 13, 7, 1), ("lin2", 5, 13, 13)):
        a, b = (tensors[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
        assert (a.shape, b.shape) == ((r, in_features), (out_features, r))
        assert a.dtype == b.dtype == torch.float32
        layer = model.get_submodule(f"base_model.model.{name}")
        delta, indices = layer.paca_delta["default"].detach(), layer.paca_indices["default"]
        assert torch.equal(b @ a, change(delta, indices, 7 / r, in_features).float())
    assert config.fan_in_fan_out == (kind == "conv1d")


def test_every_layer_has_scale_one_whatever_its_rank(uneven: Path, tmp_path: Path) -> None:
    result = export_adapter(uneven / "adapter", tmp_path / "lora", "lora")
    assert (len(result.adapter.layers), result.adapter.ranks) == (6, [1, 3, 5])
    layers = lora_layers(load_lora(llama(), tmp_path / "lora"))
    assert {name.rpartition("layers.")[2]: layer.r["default"] for name, layer in layers.items()} == {
        "0.self_attn.q_proj": 3,
        "1.self_attn.q_proj": 5,
        **{f"{block}.mlp.{name}_proj": r for block in (0, 1) for name, r in (("down", 1), ("up", 3))},
    }
    assert {layer.scaling["default"] for layer in layers.values()} == {1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_are_the_same_to_rounding(tmp_path: Path, dtype: torch.dtype) -> None:
    base = llama(initializer_range=0.15).to(dtype)
    adapted = save_adapted(tmp_path, base, **UNEVEN)
    expected = logits(adapted, tokens())
    with adapted.disable_adapter():
        moved = (expected - logits(adapted, tokens())).abs().max()
    export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora")
    found = logits(load_lora(llama(initializer_range=0.15).to(dtype), tmp_path / "lora"), tokens())
    # Two blocks of seven layers; in bfloat16 our weight is rounded once more, theirs adds a rounded product.
    tolerance = 32 * torch.finfo(dtype).eps * expected.abs().max()
    assert (found - expected).abs().max() <= tolerance
    assert moved > 10 * tolerance or dtype == torch.bfloat16


def test_stock_peft_loads_it_in_a_process_without_paca(tmp_path: Path) -> None:
    adapted = {
        "llama": save_adapted(tmp_path / "llama", llama(), **UNEVEN, modules_to_save=["lm_head"]),
        "gpt2": save_adapted(tmp_path / "gpt2", gpt2(), r=4, paca_alpha=7, target_modules=["c_attn", "c_proj"]),
    }
    with torch.no_grad():  # as if it had been trained
        adapted["llama"].base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    adapted["llama"].save_pretrained(tmp_path / "llama/adapter")
    for name, model in adapted.items():
        export_adapter(tmp_path / name / "adapter", tmp_path / name / "lora", "lora")
        torch.save((tokens(), logits(model, tokens())), tmp_path / name / "expected.pt")
    script = """
import sys, torch, warnings
warnings.filterwarnings("error", category=UserWarning, module=r"peft\\Z")
sys.modules["paca"] = None  # an import of it fails
from peft import AutoPeftModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoPeftModelForCausalLM.from_pretrained(folder + "/lora").eval()
    tokens, expected = torch.load(folder + "/expected.pt")
    with torch.no_grad():
        found = model(input_ids=tokens, use_cache=False).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max(), folder
    card = open(folder + "/lora/README.md").read()
    scope = {}
    exec(card.split("```python\\n")[1].split("```")[0].replace("path/to/this/folder", folder + "/lora"), scope)
    with torch.no_grad():
        assert torch.equal(scope["model"].eval()(input_ids=tokens, use_cache=False).logits, found), folder
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=tokens, use_cache=False).logits
    assert (base - expected).abs().max() > 1e-2 * expected.abs().max(), folder
    merged = model.merge_and_unload()
    assert torch.allclose(merged(input_ids=tokens, use_cache=False).logits, expected, atol=1e-5), folder
    print(type(merged).__name__)
"""
    done = run_forked(script, *(tmp_path / name for name in adapted))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["LlamaForCausalLM", "GPT2LMHeadModel"]


def test_only_the_adapted_layers_are_matched(tmp_path: Path) -> None:
    adapted = save_adapted(
        tmp_path, llama(num_hidden_layers=3), target_modules=["q_proj", "up_proj"], layers_to_transform=[1]
    )
    save_as_lora(adapted, tmp_path / "lora")
    expected = {"base_model.model.model.layers.1.self_attn.q_proj", "base_model.model.model.layers.1.mlp.up_proj"}
    assert set(lora_layers(load_lora(llama(num_hidden_layers=3), tmp_path / "lora"))) == expected


def test_whole_modules_and_the_settings_of_the_adapter_are_kept(tmp_path: Path) -> None:
    base = LlamaForSequenceClassification(llama(num_labels=3).config)
    base.save_pretrained(tmp_path / "base")
    adapted = adapt(base, task_type="SEQ_CLS", modules_to_save=["score"])
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.peft_config["default"].revision = "v2"
    adapted.save_pretrained(tmp_path / "adapter")
    result = export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora")
    assert sorted(result.adapter.saved_whole) == ["base_model.model.score.weight"]
    settings = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert {key: settings[key] for key in ("peft_type", "task_type", "revision", "base_model_name_or_path")} == {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "revision": "v2",
        "base_model_name_or_path": str(tmp_path / "base"),
    }
    assert "score" in settings["modules_to_save"]
    before, after = (load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("adapter", "lora"))
    name = "base_model.model.score.weight"
    assert torch.equal(before[name], after[name])
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path / "lora"), num_labels=3)
    assert torch.equal(loaded.base_model.model.score.modules_to_save["default"].weight, before[name])


def test_the_config_alone_of_the_base_model_is_needed(uneven: Path, tmp_path: Path) -> None:
    export_adapter(uneven / "adapter", tmp_path / "with", "lora")
    (uneven / "base/model.safetensors").unlink()
    shutil.copytree(uneven / "base", tmp_path / "elsewhere")
    export_adapter(uneven / "adapter", tmp_path / "without", "lora", base_model=str(tmp_path / "elsewhere"))
    a, b = (load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("with", "without"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    settings = json.loads((tmp_path / "without/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "elsewhere")


def test_a_model_in_memory_is_exported_as_it_is_now(tmp_path: Path) -> None:
    model = adapted_perceptron(r=2, paca_alpha=4)
    x = torch.randn(5, 7)
    model(x)  # the columns are in the weight
    layer = model.base_model.model.lin1
    layer.set_scale("default", 3)
    expected = model(x).detach()
    save_as_lora(model, tmp_path)
    b = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.lin1.lora_B.weight"]
    assert torch.equal(b, layer.paca_delta["default"].detach() * 6)
    assert torch.equal(model(x), expected)
    with pytest.raises(ValueError, match="no adapter 'other'; it has: default"):
        save_as_lora(model, tmp_path, "other")
    with pytest.raises(ValueError, match="not a Perceptron"):
        save_as_lora(model.get_base_model(), tmp_path)


def test_the_tokenizer_goes_along_and_nothing_else(uneven: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "optimizer.pt"):
        (uneven / "adapter" / name).write_text(name)
    export_adapter(uneven / "adapter", tmp_path / "lora", "lora")
    found = {file.name for file in (tmp_path / "lora").iterdir()}
    written = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert found == written | {"tokenizer.json", "chat_template.jinja"}
    assert (tmp_path / "lora/tokenizer.json").read_text() == "tokenizer.json"


def test_its_card_names_layers_ranks_and_the_weights_that_it_is_exact_on() -> None:
    adapter = adapter_in_model(adapted_perceptron(r=2, rank_pattern={"lin1": 3}))
    card = export_card(adapter, "lora")
    assert "2 layers (lin1, lin2) of rank 2, 3, each at scale 1" in card
    assert "base_model:" not in card
    assert "```" not in card  # nobody knows how to load that model
    config: Any = adapter.config
    config.base_model_name_or_path, config.revision, config.base_quantization = "owner/model", "v2", "nf4"
    card = export_card(adapter, "lora")
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "owner/model"
    assert 'from_pretrained("owner/model", dtype="auto", revision="v2")' in card
    assert "quantized as nf4, and is exact on those alone" in card


def test_a_layer_that_lora_cannot_express_is_refused_by_name() -> None:
    layer = AdaptedLayer(torch.zeros(4, 2), torch.arange(2), 1.0, 8, nn.Conv2d)
    adapter = Adapter(adapted_perceptron().peft_config["default"], {"stem.conv": layer}, {}, {"stem.conv"}, None)
    with pytest.raises(PacaError, match=r"stem\.conv is a Conv2d.*--to merged"):
        to_lora(adapter)


def test_an_infinite_scaled_delta_is_refused_by_name() -> None:
    model = adapted_perceptron()
    with torch.no_grad():
        model.base_model.model.lin2.paca_delta["default"][0, 0] = 3e38
    with pytest.raises(PacaError, match="lin2: the delta"):
        to_lora(adapter_in_model(model))


def test_what_is_no_paca_adapter_is_refused(uneven: Path, tmp_path: Path) -> None:
    export_adapter(uneven / "adapter", tmp_path / "lora", "lora")
    with pytest.raises(PacaError, match="holds an adapter of LORA, which PEFT loads as it is"):
        export_adapter(tmp_path / "lora", tmp_path / "again", "lora")
    learned = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    peft.get_peft_model(llama(), learned).save_pretrained(tmp_path / "prompt")
    with pytest.raises(PacaError, match=r"adapter of PROMPT_TUNING, .* only PaCA's are exported.$"):  # nor merged
        export_adapter(tmp_path / "prompt", tmp_path / "again", "lora", base_model=str(uneven / "base"))
    with pytest.raises(PacaError, match="a whole model, not an adapter"):
        export_adapter(uneven / "base", tmp_path / "again", "lora")
    with pytest.raises(PacaError, match="No such folder"):
        export_adapter(tmp_path / "nowhere", tmp_path / "again", "lora")
    llama(hidden_size=64).save_pretrained(tmp_path / "wider")
    with pytest.raises(PacaError, match="does not fit the model"):
        export_adapter(uneven / "adapter", tmp_path / "again", "lora", base_model=str(tmp_path / "wider"))
    broken = Path(shutil.copytree(uneven / "adapter", tmp_path / "broken"))
    tensors = load_file(broken / "adapter_model.safetensors")
    tensors[next(name for name in tensors if name.endswith("indices"))][0] = 10_000
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(PacaError, match=r"paca_indices: column 10000 is out of range"):
        export_adapter(broken, tmp_path / "again", "lora")
    (broken / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(PacaError, match="is broken"):
        export_adapter(broken, tmp_path / "again", "lora")
    (broken / "adapter_model.safetensors").unlink()
    with pytest.raises(PacaError, match="weights are missing"):
        export_adapter(broken, tmp_path / "again", "lora")
    assert not (tmp_path / "again").exists()


def test_columns_that_were_chosen_by_norms_are_those_of_the_file(tmp_path: Path) -> None:
    model = save_adapted(tmp_path, llama(), r=4, selection="weight_norm", target_modules=["q_proj"])
    export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora")
    loaded = load_lora(llama(), tmp_path / "lora").eval()
    assert torch.allclose(logits(loaded, tokens()), logits(model, tokens()), atol=1e-5)


def test_a_base_model_that_is_given_is_recorded_by_its_whole_path(
    uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(uneven)
    export_adapter("adapter", tmp_path / "lora", "lora", base_model="./base")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(uneven / "base")


def test_an_output_in_use_is_refused_and_left_alone(uneven: Path, tmp_path: Path) -> None:
    output = tmp_path / "lora"
    export_adapter(uneven / "adapter", output, "lora")
    with pytest.raises(PacaError, match=r"not empty.*--overwrite"):
        export_adapter(uneven / "adapter", output, "lora")
    (output / "leftover").write_text("")
    export_adapter(uneven / "adapter", output, "lora", overwrite=True)
    assert not (output / "leftover").exists()
    (in_use := tmp_path / "in_use").mkdir()
    (in_use / "notes.txt").write_text("mine")
    with pytest.raises(PacaError, match="does not hold an adapter"):
        export_adapter(uneven / "adapter", in_use, "lora", overwrite=True)
    with pytest.raises(PacaError, match="which the export reads"):
        export_adapter(uneven / "adapter", uneven / "base", "lora", overwrite=True)
    with pytest.raises(PacaError, match="which the export reads"):
        export_adapter(uneven / "adapter", uneven / "adapter", "lora", overwrite=True)
    before = (uneven / "adapter/adapter_config.json").read_text()
    with pytest.raises(PacaError, match="which the export reads"):  # of a run's folder, its adapter
        export_adapter(uneven, uneven / "adapter", "lora", overwrite=True)
    assert (uneven / "adapter/adapter_config.json").read_text() == before
    assert AutoModelForCausalLM.from_pretrained(uneven / "base").dtype == torch.float32


def test_the_code_on_its_card_is_ours_whatever_the_adapter_names() -> None:
    evil = 'main"); __import__("os").system("evil"); ("'
    adapter = adapter_in_model(adapted_perceptron())
    adapter.config.task_type, adapter.config.base_model_name_or_path, adapter.config.revision = "CAUSAL_LM", evil, evil
    code = export_card(adapter, "lora").split("```python\n")[1].split("```")[0]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert [ast.unparse(call.func).rpartition(".")[2] for call in calls] == ["from_pretrained", "from_pretrained"]
    assert ast.literal_eval(calls[0].args[0]) == evil
