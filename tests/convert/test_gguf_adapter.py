"""PaCA as a LoRA adapter for llama.cpp: what the file holds, and what llama.cpp computes with it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

import paca
from convert.saved_adapters import change, logits, save_adapted
from models import gpt2, llama
from paca.convert.adapter import adapter_in_model
from paca.convert.exported import export_adapter
from paca.convert.gguf_adapter import ARCHITECTURES, architecture_of, gguf_tensors, pairs_of_neighbours
from paca.messages.errors import PacaError
from tiny_checkpoint import byte_tokenizer
from tiny_gguf import write_gguf

gguf = pytest.importorskip("gguf")

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
HEADS = {"head_dim": 8}
MODELS: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "mistral": (MistralForCausalLM, MistralConfig, HEADS),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, HEADS),
    "gemma": (GemmaForCausalLM, GemmaConfig, HEADS),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, HEADS),
    "gemma3_text": (Gemma3ForCausalLM, Gemma3TextConfig, HEADS),
    "phi3": (Phi3ForCausalLM, Phi3Config, {}),
}

# The names of the linear layers of a block, as llama.cpp's own converter writes them.
SEPARATE = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NAMES = {
    "phi3": {
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    "gpt2": {
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
}


def make(model_type: str) -> nn.Module:
    torch.manual_seed(0)
    if model_type == "llama":
        return llama()
    if model_type == "gpt2":
        return gpt2()
    model_class, config_class, more = MODELS[model_type]
    return model_class(config_class(**SHAPE, **more))


def ggml_order(rows: Tensor, heads: int) -> Tensor:
    """By the meaning of it: dimension i of each half of a head becomes 2 i and 2 i + 1."""
    size = rows.shape[0] // heads
    result = torch.empty_like(rows)
    for head in range(heads):
        for half in range(2):
            for i in range(size // 2):
                result[head * size + 2 * i + half] = rows[head * size + half * (size // 2) + i]
    return result


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert {tensor.tensor_type for tensor in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    return fields, {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_file_holds_the_change_of_each_weight_under_llama_cpps_name(model_type: str, tmp_path: Path) -> None:
    names = NAMES.get(model_type, SEPARATE)
    # Two layers with ranks of their own, and a scale that is no power of two.
    wide, narrow = (list(names)[place] for place in (0, -1))
    uneven = {"rank_pattern": {f"1.{wide}": 5, narrow: 1}, "alpha_pattern": {narrow: 2.5}}
    base = make(model_type)
    model = save_adapted(tmp_path, base, r=3, paca_alpha=7, **uneven)
    result = export_adapter(tmp_path / "adapter", tmp_path / "lora.gguf", "gguf")
    fields, tensors = read(tmp_path / "lora.gguf")
    expected = {"mistral": "llama", "gemma3_text": "gemma3"}.get(model_type, model_type)
    assert (fields["general.architecture"], architecture_of(result.adapter).name) == (expected, expected)
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    alpha = fields["adapter.lora.alpha"]
    layers = {name: m for name, m in model.get_base_model().named_modules() if hasattr(m, "paca_delta")}
    assert len(tensors) == 2 * len(layers) == 2 * 2 * len(names) == 2 * len(result.adapter.layers)
    for name, layer in layers.items():
        block, _, kind = name.partition("layers." if model_type != "gpt2" else "h.")[2].partition(".")
        target = f"blk.{block}.{names[kind]}.weight"
        a, b = tensors[f"{target}.lora_a"], tensors[f"{target}.lora_b"]
        rank = {f"1.{wide}": 5, f"0.{narrow}": 1, f"1.{narrow}": 1}.get(f"{block}.{kind}", 3)
        assert (a.shape, b.shape) == ((rank, layer.in_features), (layer.out_features, rank))
        delta, indices = layer.paca_delta["default"].detach(), layer.paca_indices["default"]
        weight = change(delta, indices, (2.5 if kind == narrow else 7) / rank, layer.in_features)
        if kind in ("self_attn.q_proj", "self_attn.k_proj") and model_type in ("llama", "mistral", "smollm3"):
            weight = ggml_order(weight, 4 if kind == "self_attn.q_proj" else 2)
        found = alpha / rank * (b.double() @ a.double())  # what llama.cpp adds
        assert torch.allclose(found, weight, rtol=3e-7, atol=0)
        if rank == alpha:
            assert torch.equal(b @ a, weight.float())


@pytest.mark.parametrize("shape", [(24, 5), (8,), (16, 1, 3)])
def test_the_order_of_the_rows_is_that_of_ggml(shape: tuple[int, ...]) -> None:
    rows = torch.randn(shape)
    for heads in (1, 2, 4):
        assert torch.equal(pairs_of_neighbours(rows, heads), ggml_order(rows, heads))


def test_what_llama_cpp_has_no_place_for_is_refused_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    opt = OPTForCausalLM(
        OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4)
    )
    save_adapted(tmp_path / "opt", opt)
    with pytest.raises(PacaError, match=r"type 'opt' can't be exported.*llama, mistral.*--to merged"):
        export_adapter(tmp_path / "opt/adapter", tmp_path / "a.gguf", "gguf")
    save_adapted(tmp_path / "head", llama(), modules_to_save=["lm_head"])
    with pytest.raises(PacaError, match=r"base_model\.model\.lm_head\.weight whole.*--to merged"):
        export_adapter(tmp_path / "head/adapter", tmp_path / "a.gguf", "gguf")
    adapter = adapter_in_model(save_adapted(tmp_path / "odd", llama(), target_modules=["q_proj"]))
    adapter.layers["model.vision.fc1"] = adapter.layers["model.layers.0.self_attn.q_proj"]
    with pytest.raises(PacaError, match=r"model\.vision\.fc1 has no counterpart .* 'llama' models"):
        gguf_tensors(adapter)
    assert not (tmp_path / "a.gguf").exists()


def test_columns_of_an_output_layer_that_the_file_has_not_are_refused(tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=True)
    assert paca.untie_embeddings(base)
    model = save_adapted(tmp_path, base, target_modules=["lm_head"])
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    with pytest.raises(PacaError, match=r"also holds \S*lm_head.base_layer.weight whole, which"):
        export_adapter(tmp_path / "adapter", tmp_path / "lora.gguf", "gguf")
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(PacaError, match="columns in one of two embeddings that are one weight in the base model"):
        export_adapter(tmp_path / "adapter", tmp_path / "lora.gguf", "gguf")


def test_a_classifiers_backbone_is_refused_for_its_head(tmp_path: Path) -> None:
    base = LlamaForSequenceClassification(llama().config)
    save_adapted(tmp_path, base, task_type="SEQ_CLS")
    with pytest.raises(PacaError, match=r"score\.weight whole"):
        export_adapter(tmp_path / "adapter", tmp_path / "a.gguf", "gguf")


def test_an_output_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    save_adapted(tmp_path, llama(), target_modules=["q_proj"])
    with pytest.raises(PacaError, match=r"ends in \.gguf"):
        export_adapter(tmp_path / "adapter", tmp_path / "lora", "gguf")
    output = tmp_path / "lora.gguf"
    for content in (b"of somebody else", b"GGUF, a model", b""):
        output.write_bytes(content)
        with pytest.raises(PacaError, match=r"exists.*--overwrite"):
            export_adapter(tmp_path / "adapter", output, "gguf")
        with pytest.raises(PacaError, match="is no LoRA adapter in GGUF, so it is not overwritten"):
            export_adapter(tmp_path / "adapter", output, "gguf", overwrite=True)
        assert output.read_bytes() == content
    with pytest.raises(PacaError, match="which the export reads"):
        export_adapter(tmp_path / "adapter", output, "gguf", base_model=str(output), overwrite=True)
    output.unlink()
    for overwrite in (False, True):
        export_adapter(tmp_path / "adapter", output, "gguf", overwrite=overwrite)
        assert len(read(output)[1]) == 4
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(PacaError, match="is a folder"):
        export_adapter(tmp_path / "adapter", tmp_path / "folder.gguf", "gguf", overwrite=True)
    with pytest.raises(PacaError, match="cannot be written to"):
        export_adapter(tmp_path / "adapter", output / "in-a-file.gguf", "gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "folder.gguf", "lora.gguf"]


def test_a_missing_gguf_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapted(tmp_path, llama(), target_modules=["q_proj"])
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(PacaError, match="pip install gguf"):
        export_adapter(tmp_path / "adapter", tmp_path / "lora.gguf", "gguf")


def test_llama_cpp_answers_as_the_adapted_model(tmp_path: Path) -> None:
    """Needs llama.cpp's Python binding (pip install llama-cpp-python), which is built from source."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (it is built from source)")
    base = llama(vocab_size=len(byte_tokenizer()), hidden_size=32, intermediate_size=56, initializer_range=0.15, seed=5)
    model = save_adapted(tmp_path, base, r=5, paca_alpha=7, rank_pattern={"layers.1.self_attn.k_proj": 2})
    byte_tokenizer().save_pretrained(tmp_path / "base")
    write_gguf(tmp_path / "base.gguf", tmp_path / "base", quantized=False)
    export_adapter(tmp_path / "adapter", tmp_path / "lora.gguf", "gguf")
    tokens = torch.arange(2, 26)

    def by_llama_cpp(lora: Path | None) -> Tensor:
        engine = llama_cpp.Llama(
            str(tmp_path / "base.gguf"),
            lora_path=None if lora is None else str(lora),
            logits_all=True,
            n_ctx=64,
            n_threads=1,
            type_k=0,  # keys and values in float32: the default rounds them to 16 bits
            type_v=0,
            verbose=False,
        )
        engine.eval(tokens.tolist())
        return torch.tensor(engine.scores[: len(tokens)])

    adapted = logits(model, tokens[None])[0]
    with model.disable_adapter():
        pretrained = logits(model, tokens[None])[0]
    moved = adapted - pretrained
    assert moved.abs().max() > 1
    assert (by_llama_cpp(None) - pretrained).abs().max() < 1e-4
    assert (by_llama_cpp(tmp_path / "lora.gguf") - adapted).abs().max() < 1e-4
