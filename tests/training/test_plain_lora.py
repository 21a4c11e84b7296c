"""AdaMSS as the plain LoRA that a run leaves of it, and what would come back of it and of FRoD without."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft import AdamssConfig, FrodConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from paca.messages.errors import PacaError
from paca.training import describe, load_run_config
from paca.training.plain_lora import check_clusters, save_as_plain_lora

TOKENS = torch.arange(12)[None]


def base(bias: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": bias}
    model: Any = LlamaForCausalLM(LlamaConfig(**shape, **heads, tie_word_embeddings=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3 if name.endswith("bias") else parameter * 4)
    return model.to(dtype).eval()


def trained(config: Any, model: Any) -> Any:
    adapted = get_peft_model(model, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * (0.5 * parameter.abs().mean() + 0.05))
    return adapted


def adamss(**settings: Any) -> AdamssConfig:
    given = {"r": 20, "num_subspaces": 3, "target_modules": ["q_proj", "k_proj"], **settings}
    return AdamssConfig(task_type="CAUSAL_LM", **given)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.float()


@pytest.mark.parametrize("bias", [False, True])
def test_clusters_come_back_as_plain_lora(tmp_path: Path, bias: bool) -> None:
    """`k_proj` has fewer rows than r; a whole head is trained beside."""
    adapted = trained(adamss(modules_to_save=["lm_head"]), base(bias))
    expected = logits(adapted)
    adapted.save_pretrained(str(tmp_path))
    save_as_plain_lora(tmp_path, adapted, SimpleNamespace(adapter={"peft_type": "ADAMSS"}), tmp_path)  # type: ignore[arg-type]
    loaded = PeftModel.from_pretrained(base(bias), tmp_path).eval()
    assert loaded.peft_config["default"].peft_type == "LORA"
    assert (expected - logits(base(bias))).abs().max() > 0.1
    close = 3e-5 * expected.abs().max()
    assert (logits(loaded) - expected).abs().max() <= close
    assert (logits(loaded.merge_and_unload()) - expected).abs().max() <= close  # type: ignore[operator]


def in_another_dtype(folder: Path, config: Any, convert: bool) -> tuple[float, float]:
    """How far the logits were moved by training in bfloat16, and how far off those are that come back in float32."""
    adapted = trained(config, base(dtype=torch.bfloat16))
    expected = logits(adapted)
    adapted.save_pretrained(str(folder))
    if convert:
        save_as_plain_lora(folder, adapted, SimpleNamespace(adapter={"peft_type": "ADAMSS"}), folder)  # type: ignore[arg-type]
    loaded = PeftModel.from_pretrained(base(), folder).eval()
    moved = (expected - logits(base(dtype=torch.bfloat16))).abs().max()
    return float(moved), float((logits(loaded) - expected).abs().max())


def test_in_another_dtype_the_plain_lora_comes_back_and_what_peft_saves_does_not(tmp_path: Path) -> None:
    moved, off = in_another_dtype(tmp_path / "plain", adamss(), convert=True)
    assert off < 0.2 * moved
    moved, off = in_another_dtype(tmp_path / "adamss", adamss(), convert=False)
    assert off > 0.5 * moved


def test_frod_does_not_come_back_in_another_dtype_which_is_why_it_is_refused(tmp_path: Path) -> None:
    config = FrodConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], progressbar=False)
    moved, off = in_another_dtype(tmp_path, config, convert=False)
    assert off > 0.5 * moved
    file = tmp_path / "run.yaml"
    file.write_text("model: {name: some/model}\ndata: {train: some/data}\npeft: {peft_type: FROD}\n")
    with pytest.raises(PacaError, match=r"FROD can't be trained here: .* in another dtype what was trained does not"):
        load_run_config(file)


def test_layers_of_which_some_have_a_bias_are_refused() -> None:
    model = base(bias=True)
    model.model.layers[1].self_attn.k_proj.bias = None
    with pytest.raises(
        PacaError, match=r"in all layers or in none: \S+q_proj has one, \S+1\.self_attn\.k_proj has none"
    ):
        check_clusters(peft.get_peft_model(model, adamss()))


def test_what_its_clusters_go_by_later_is_refused(config_file: Path) -> None:
    overrides = ["paca=null", "peft.peft_type=ADAMSS", "peft.r=8"]
    assert describe(load_run_config(config_file, overrides)).trainable_parameters > 0
    with pytest.raises(PacaError, match=r"peft\.use_asa can't be trained here: checkpoints lack what it goes by"):
        load_run_config(config_file, [*overrides, "peft.use_asa=true"])
