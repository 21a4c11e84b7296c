"""Reading the original authors' checkpoints, and LoRA adapters that were PaCA."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

import paca
import paca.convert.tensor_files as tensor_files
from convert.saved_adapters import logits, save_adapted
from models import gpt2, llama, tokens
from paca.convert.exported import export_adapter
from paca.convert.imported import import_adapter
from paca.messages.errors import PacaError

LAYERS = {f"model.layers.{block}.{name}" for block in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")}
AUTHORS = {"peft_type": "PACA", "r": 4, "paca_alpha": 7, "bias": "none", "task_type": "CAUSAL_LM"}
SCALE = 7 / 4


def write(folder: Path, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def authors_tensors(base: Any) -> dict[str, Tensor]:
    """As their code leaves them: the columns over the scale, trained a little; indices in the order they were drawn."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in sorted(LAYERS):
        weight = base.get_submodule(name).weight.detach()
        indices = torch.randperm(weight.shape[1], generator=generator)[:4]
        trained = weight[:, indices] * 1 / SCALE
        trained = trained + 0.1 * torch.randn(trained.shape, generator=generator).to(weight.dtype)
        tensors[f"base_model.model.{name}.paca_w"] = trained
        tensors[f"base_model.model.{name}.paca_indices"] = indices
    return tensors


def half_a_unit(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Half of the distance between the neighbours of `values` in `dtype`: the largest error of one rounding."""
    return torch.ldexp(
        torch.full(values.shape, torch.finfo(dtype).eps / 4, dtype=torch.float64), torch.frexp(values).exponent
    )


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save(llama(initializer_range=0.2).to(request.param), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def base32(tmp_path: Path) -> Path:
    save(llama(initializer_range=0.2), tmp_path / "base")
    return tmp_path / "base"


def save(model: Any, folder: Path) -> None:
    from tiny_checkpoint import byte_tokenizer

    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def test_the_authors_columns_are_what_the_imported_adapter_puts_into_the_weight(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    theirs = authors_tensors(model)
    expected = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    for name in LAYERS:  # `paca_update` of their layer.py
        columns, indices = (theirs[f"base_model.model.{name}.{kind}"] for kind in ("paca_w", "paca_indices"))
        expected.get_submodule(name).weight.data[:, indices] = (SCALE * columns.double()).to(model.dtype)
    result = import_adapter(write(tmp_path / "theirs", AUTHORS, theirs), tmp_path / "ours", base_model=str(base))
    assert (result.kind, len(result.adapter.layers), result.adapter.ranks) == ("the original authors' PaCA", 4, [4])
    assert 0.1 < result.largest_move < 2
    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "ours"))
    merged = adapted.merge_and_unload()
    for name in LAYERS:
        columns, indices = (theirs[f"base_model.model.{name}.{kind}"] for kind in ("paca_w", "paca_indices"))
        error = (merged.get_submodule(name).weight[:, indices].double() - SCALE * columns.double()).abs()
        # Rounded once to the weight's dtype; before that, the difference to the pretrained column was to float32.
        assert (error <= half_a_unit(SCALE * columns.double(), model.dtype) + 1e-7).all()
    tolerance = 8 * torch.finfo(model.dtype).eps * logits(expected, tokens()).abs().max()
    assert (logits(merged, tokens()) - logits(expected, tokens())).abs().max() <= tolerance


def test_a_base_folder_is_recorded_by_its_whole_path(
    base32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = authors_tensors(AutoModelForCausalLM.from_pretrained(base32))
    monkeypatch.chdir(base32.parent)
    result = import_adapter(write(tmp_path / "theirs", AUTHORS, theirs), tmp_path / "ours", base_model=base32.name)
    assert result.adapter.base == paca_config(tmp_path / "ours")["base_model_name_or_path"] == str(base32.resolve())


def test_from_the_authors_to_ours_and_back_gives_their_values(base32: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base32)
    theirs = authors_tensors(model)
    import_adapter(write(tmp_path / "theirs", AUTHORS, theirs), tmp_path / "ours", base_model=str(base32))
    ours = load_file(tmp_path / "ours/adapter_model.safetensors")
    config = paca_config(tmp_path / "ours")
    assert (config["r"], config["paca_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (4, 7, {}, {})
    for name in LAYERS:
        delta, indices = (ours[f"base_model.model.{name}.{kind}"] for kind in ("paca_delta", "paca_indices"))
        assert delta.dtype == torch.float32
        their_columns, their_indices = (
            theirs[f"base_model.model.{name}.{kind}"] for kind in ("paca_w", "paca_indices")
        )
        assert torch.equal(indices, their_indices.sort().values)
        back = (model.get_submodule(name).weight[:, indices].double() + SCALE * delta.double()) / SCALE
        wanted = their_columns[:, their_indices.argsort()].double()
        assert (back - wanted).abs().max() <= torch.finfo(torch.float32).eps * delta.abs().max()


def paca_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def test_a_pytorch_file_beside_its_config_is_read_as_well(base32: Path, tmp_path: Path) -> None:
    theirs = authors_tensors(AutoModelForCausalLM.from_pretrained(base32))
    folder = write(tmp_path / "theirs", AUTHORS | {"base_model_name_or_path": str(base32)}, theirs)
    import_adapter(folder, tmp_path / "one")
    torch.save(theirs, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    for path, output in ((folder, "two"), (folder / "adapter_model.bin", "three")):
        import_adapter(path, tmp_path / output)
        one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", output))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert paca_config(tmp_path / "one")["base_model_name_or_path"] == str(base32)


def test_a_layer_with_fewer_inputs_than_r_keeps_the_authors_scale(base32: Path, tmp_path: Path) -> None:
    """Their `torch.randperm(in_features)[:r]` has fewer entries there, and their scale is still alpha / r."""
    model = AutoModelForCausalLM.from_pretrained(base32)
    settings = AUTHORS | {"r": 40}
    theirs = {}
    for name in sorted(LAYERS):
        weight = model.get_submodule(name).weight.detach()
        indices = torch.randperm(weight.shape[1])[:40]
        theirs[f"base_model.model.{name}.paca_w"] = (weight[:, indices] + 0.1) / (7 / 40)
        theirs[f"base_model.model.{name}.paca_indices"] = indices
    result = import_adapter(write(tmp_path / "theirs", settings, theirs), tmp_path / "ours", base_model=str(base32))
    assert result.adapter.ranks == [32, 40]
    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "ours"))
    for name in LAYERS:
        layer = adapted.base_model.model.get_submodule(name)
        assert layer.scaling["default"] == pytest.approx(7 / 40, rel=1e-15)
        change = layer.scaling["default"] * layer.paca_delta["default"]
        assert torch.allclose(change, torch.tensor(0.1), atol=1e-6)


@pytest.mark.parametrize("alpha", [3, 7])
def test_paca_to_lora_and_back_keeps_the_columns_and_their_change_bitwise(alpha: int, tmp_path: Path) -> None:
    uneven = {"r": 3, "paca_alpha": alpha, "rank_pattern": {"1.self_attn.q_proj": 5, "down_proj": 1}}
    model = save_adapted(tmp_path, llama(), **uneven)
    export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora")
    result = import_adapter(tmp_path / "lora", tmp_path / "back")
    assert (result.kind, result.largest_move) == ("LoRA with a one-hot A", None)
    back = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "back")).base_model.model
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "paca_delta"):
            found = back.get_submodule(name)
            assert torch.equal(found.paca_indices["default"], layer.paca_indices["default"])
            scale, delta = layer.scaling["default"], layer.paca_delta["default"].detach()
            assert found.scaling["default"] == 1
            assert torch.equal(found.paca_delta["default"], (delta.double() * scale).float())
            if scale == 1:
                assert torch.equal(found.paca_delta["default"], delta)
    names = [f"{name}_proj" for name in ("down", "gate", "k", "o", "q", "up", "v")]
    assert paca_config(tmp_path / "back")["target_modules"] == names
    export_adapter(tmp_path / "back", tmp_path / "again", "lora")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert paca_config(tmp_path / "lora") == paca_config(tmp_path / "again")


def test_the_rows_of_a_one_hot_lora_may_be_in_any_order(tmp_path: Path) -> None:
    model = save_adapted(tmp_path, llama(), r=5)
    export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora")
    file = tmp_path / "lora/adapter_model.safetensors"
    order = torch.tensor([3, 0, 4, 1, 2])
    save_file({n: (t[order] if "lora_A" in n else t[:, order]).contiguous() for n, t in load_file(file).items()}, file)
    result = import_adapter(tmp_path / "lora", tmp_path / "back")
    assert all(torch.equal(layer.indices, layer.indices.sort().values) for layer in result.adapter.layers.values())
    back = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "back"))
    assert torch.allclose(logits(back.eval(), tokens()), logits(model, tokens()), atol=1e-6)


def test_whole_modules_and_conv1d_come_back(tmp_path: Path) -> None:
    model = save_adapted(tmp_path, gpt2(), target_modules=["c_attn"], modules_to_save=["ln_f"], revision="v2")
    export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora")
    import_adapter(tmp_path / "lora", tmp_path / "back")
    assert paca_config(tmp_path / "back")["revision"] == "v2"
    loaded = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), str(tmp_path / "back"))
    assert torch.allclose(logits(loaded.eval(), tokens()), logits(model, tokens()), atol=1e-6)
    assert torch.equal(
        loaded.base_model.model.transformer.ln_f.modules_to_save["default"].weight,
        model.base_model.model.transformer.ln_f.modules_to_save["default"].weight,
    )


@pytest.mark.parametrize("whole", ["auto", False])
def test_columns_of_a_tied_output_layer_come_back(tmp_path: Path, whole: str | bool) -> None:
    """PEFT saves the pretrained weight of an adapted output layer beside it, unless it is told not to."""
    base = llama(tie_word_embeddings=True)
    assert paca.untie_embeddings(base)
    model = save_adapted(tmp_path, base, target_modules=["q_proj", "lm_head"])
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=whole)
    export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora")
    import_adapter(tmp_path / "lora", tmp_path / "back")
    again = llama(tie_word_embeddings=True)
    paca.untie_embeddings(again)
    back = peft.PeftModel.from_pretrained(again, str(tmp_path / "back")).eval()
    assert torch.allclose(logits(back, tokens()), logits(model, tokens()), atol=1e-6)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    save_adapted(tmp_path, llama(), target_modules=["q_proj"])
    export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora")
    return tmp_path / "lora"


@pytest.mark.parametrize("kind", ["nf4", "none"])
def test_the_quantization_that_the_adapter_was_made_for_comes_back(tmp_path: Path, kind: str) -> None:
    save_adapted(tmp_path, llama(), target_modules=["q_proj"])
    file = tmp_path / "adapter/adapter_config.json"
    assert paca_config(tmp_path / "adapter")["base_quantization"] == "none"
    file.write_text(json.dumps(paca_config(tmp_path / "adapter") | {"base_quantization": kind}))
    export_adapter(tmp_path / "adapter", tmp_path / "lora", "lora")
    assert "base_quantization" not in paca_config(tmp_path / "lora")  # PEFT would warn of it
    import_adapter(tmp_path / "lora", tmp_path / "back")
    assert paca_config(tmp_path / "back")["base_quantization"] == kind


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scale_of_the_lora_adapter_is_read(lora: Path, tmp_path: Path, rslora: bool) -> None:
    name = "model.layers.1.self_attn.q_proj"
    settings = paca_config(lora) | {"lora_alpha": 5, "alpha_pattern": {name: 2}, "use_rslora": rslora}
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    import_adapter(lora, tmp_path / "back")
    models = [peft.PeftModel.from_pretrained(llama(), str(folder)) for folder in (lora, tmp_path / "back")]
    assert len({layer.scaling["default"] for layer in scaled(models[0])}) == 2
    for one, two in zip(*map(scaled, models), strict=True):
        assert one.scaling["default"] == pytest.approx(two.scaling["default"], rel=1e-15)
    assert torch.allclose(logits(models[0].eval(), tokens()), logits(models[1].eval(), tokens()), atol=1e-6)


def scaled(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def test_an_ordinary_lora_adapter_is_refused(lora: Path, tmp_path: Path) -> None:
    tensors = load_file(lora / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    column = int(tensors[name][0].argmax())
    for change in ("value", "second", "repeated", "none"):
        wrong = tensors[name].clone()
        if change == "value":
            wrong[0, column] = 0.5
        elif change == "second":
            wrong[0, (column + 1) % wrong.shape[1]] = 1
        elif change == "repeated":
            wrong[1] = wrong[0]
        else:
            wrong[0] = 0
        write(tmp_path / change, paca_config(lora), {**tensors, name: wrong})
        with pytest.raises(PacaError, match=rf"{name} does not pick single inputs"):
            import_adapter(tmp_path / change, tmp_path / "back")
    for option in ({"use_dora": True}, {"lora_bias": True}):
        write(tmp_path / "variant", paca_config(lora) | option, tensors)
        with pytest.raises(PacaError, match=f"has {next(iter(option))} set"):
            import_adapter(tmp_path / "variant", tmp_path / "back")
    write(tmp_path / "rank", paca_config(lora) | {"r": 2}, tensors)
    with pytest.raises(PacaError, match="has 3 rows, but the adapter's config says r=2"):
        import_adapter(tmp_path / "rank", tmp_path / "back")
    del tensors[name]
    write(tmp_path / "half", paca_config(lora), tensors)
    with pytest.raises(PacaError, match=f"no {name}"):
        import_adapter(tmp_path / "half", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_broken_checkpoint_of_the_authors_is_refused_by_the_tensors_name(base32: Path, tmp_path: Path) -> None:
    theirs = authors_tensors(AutoModelForCausalLM.from_pretrained(base32))
    layer = "base_model.model.model.layers.0.mlp.down_proj"
    w, i = f"{layer}.paca_w", f"{layer}.paca_indices"
    nan = theirs[w].clone()
    nan[0, 0] = float("nan")
    for change, message in (
        ({i: torch.tensor([0, 1, 2, 48])}, f"{i}: column 48 is out of range"),
        ({i: torch.tensor([0, 1, 2, 1])}, f"{i}: column 1 is named more than once"),
        ({i: torch.rand(4)}, f"{i} must be a list of whole numbers"),
        ({w: theirs[w][:, :1]}, rf"{w} has shape \(32, 1\).*\(32, 4\)"),
        ({w: nan}, "paca_delta holds NaN or Inf"),
        ({w: None}, f"no {w}"),
        ({i: None}, f"no {i}"),
        ({f"{layer}.bias": torch.zeros(32)}, f"{layer}.bias, which is neither"),
        (
            {"base_model.model.model.fc.paca_w": nan, "base_model.model.model.fc.paca_indices": torch.arange(4)},
            "no such",
        ),
    ):
        tensors = {name: tensor for name, tensor in {**theirs, **change}.items() if tensor is not None}
        write(tmp_path / "broken", AUTHORS, tensors)
        with pytest.raises(PacaError, match=message):
            import_adapter(tmp_path / "broken", tmp_path / "ours", base_model=str(base32))
    for settings, message in (
        ({"r": 0}, "r as a positive number; it gives 0"),
        ({"paca_alpha": None}, "paca_alpha as a positive number; it gives None"),
        ({"task_type": "SEQ_CLS"}, "task 'SEQ_CLS'"),
    ):
        write(tmp_path / "broken", AUTHORS | settings, theirs)
        with pytest.raises(PacaError, match=message):
            import_adapter(tmp_path / "broken", tmp_path / "ours", base_model=str(base32))
    assert not (tmp_path / "ours").exists()


def test_a_base_model_that_does_not_fit_is_refused(base32: Path, tmp_path: Path) -> None:
    theirs = write(tmp_path / "theirs", AUTHORS, authors_tensors(AutoModelForCausalLM.from_pretrained(base32)))
    save(llama(hidden_size=16, num_attention_heads=2), tmp_path / "narrow")
    with pytest.raises(PacaError, match="has shape"):
        import_adapter(theirs, tmp_path / "ours", base_model=str(tmp_path / "narrow"))
    save(gpt2(), tmp_path / "gpt2")
    with pytest.raises(PacaError, match="no such module"):
        import_adapter(theirs, tmp_path / "ours", base_model=str(tmp_path / "gpt2"))
    theirs_conv1d = {
        "base_model.model.transformer.h.0.attn.c_attn.paca_w": torch.zeros(96, 4),
        "base_model.model.transformer.h.0.attn.c_attn.paca_indices": torch.arange(4),
    }
    write(tmp_path / "conv1d", AUTHORS, theirs_conv1d)
    with pytest.raises(PacaError, match=r"c_attn, which is a Conv1D; Linear was expected"):
        import_adapter(tmp_path / "conv1d", tmp_path / "ours", base_model=str(tmp_path / "gpt2"))
    with pytest.raises(PacaError, match=r"does not name the base model.*--base"):
        import_adapter(theirs, tmp_path / "ours")


def test_what_cannot_be_imported_is_said(lora: Path, tmp_path: Path) -> None:
    with pytest.raises(PacaError, match="holds a PaCA adapter already"):
        import_adapter(tmp_path / "adapter", tmp_path / "back")
    with pytest.raises(PacaError, match="No such file or folder"):
        import_adapter(tmp_path / "nowhere", tmp_path / "back")
    shutil.copy(lora / "adapter_model.safetensors", tmp_path / "lonely.safetensors")
    with pytest.raises(PacaError, match=r"no adapter_config\.json, which gives r and alpha"):
        import_adapter(tmp_path / "lonely.safetensors", tmp_path / "back")
    shutil.copytree(lora, tmp_path / "run" / "adapter")
    with pytest.raises(PacaError, match=r"run is the folder of a run\. Give that of its adapter: .*run/adapter"):
        import_adapter(tmp_path / "run", tmp_path / "back")
    (tmp_path / "answers.jsonl").write_text("{}")
    with pytest.raises(PacaError, match=r"type '\.jsonl', which is no checkpoint.*\.safetensors, \.bin, \.pt"):
        import_adapter(tmp_path / "answers.jsonl", tmp_path / "back")
    write(
        tmp_path / "other", {"peft_type": "VERA", "base_model_name_or_path": "x"}, {"a.vera_lambda_b": torch.zeros(2)}
    )
    with pytest.raises(PacaError, match=r"VERA adapter with tensors such as a\.vera_lambda_b"):
        import_adapter(tmp_path / "other", tmp_path / "back")
    torch.save({"step": 3}, tmp_path / "other/state.bin")
    with pytest.raises(PacaError, match="dense tensors by their names"):
        import_adapter(tmp_path / "other/state.bin", tmp_path / "back")
    (tmp_path / "other/state.bin").write_bytes(b"no pickle")
    with pytest.raises(PacaError, match=r"state\.bin"):
        import_adapter(tmp_path / "other/state.bin", tmp_path / "back")
    (lora / "adapter_config.json").write_text("[]")
    with pytest.raises(PacaError, match="should hold a JSON object"):
        import_adapter(lora, tmp_path / "back")


def test_a_failure_while_writing_leaves_nothing(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(tensor_files, "save_file", full_disk)
    with pytest.raises(PacaError, match=r"The disk is full: .*back could not be written"):
        import_adapter(lora, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
