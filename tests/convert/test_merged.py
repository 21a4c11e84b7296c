"""Merging to a plain checkpoint."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    PvtV2Config,
    PvtV2ForImageClassification,
    TorchAoConfig,
    ViTImageProcessor,
)

import paca
import paca.convert.merged as merged_module
from forked_process import run_forked
from paca.convert.merged import merge_to_folder
from paca.messages.errors import PacaError
from paca.pretrained.generation import load_for_generation
from paca.pretrained.purpose import save_classifier_config
from tiny_checkpoint import save_base, save_run

TOKENS = torch.arange(2, 26).reshape(2, 12)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def bfloat16_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("runs") / "tiny", torch.bfloat16)


def test_the_merged_checkpoint_answers_bitwise_as_the_adapted_model(
    run: Path, bfloat16_run: Path, tmp_path: Path
) -> None:
    for name, source in (("float32", run), ("bfloat16", bfloat16_run)):
        adapted, base = load_for_generation(source).model, AutoModelForCausalLM.from_pretrained(source / "base")
        result = merge_to_folder(source, tmp_path / name)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert merged.dtype == result.dtype == getattr(torch, name)
        assert torch.equal(logits(merged), logits(adapted))
        assert not torch.allclose(logits(merged), logits(base), atol=0.1)
        assert result.difference == 0


def test_the_merged_checkpoint_loads_in_a_process_without_paca_or_peft(run: Path, tmp_path: Path) -> None:
    merge_to_folder(run, tmp_path / "merged")
    torch.save(logits(load_for_generation(run).model), tmp_path / "expected.pt")
    script = """
import sys, torch
sys.modules["paca"] = sys.modules["peft"] = None  # an import of either fails
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    found = model(input_ids=torch.arange(2, 26).reshape(2, 12)).logits
assert torch.equal(found, torch.load(sys.argv[2])), "logits differ"
turn = [{"role": "user", "content": "hi"}]
print(tokenizer.apply_chat_template(turn, tokenize=False))
"""
    done = run_forked(script, tmp_path / "merged", tmp_path / "expected.pt")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "<|im_start|>user\nhi<|im_end|>\n\n"


def test_another_dtype_rounds_the_float32_sum_once(bfloat16_run: Path, tmp_path: Path) -> None:
    exact = merge_to_folder(bfloat16_run, tmp_path / "float32", "float32")
    assert exact.difference == 0
    half = merge_to_folder(bfloat16_run, tmp_path / "float16", "float16")
    assert 0 < half.difference < 16 * torch.finfo(torch.float16).eps
    wide, narrow = (load_file(tmp_path / name / "model.safetensors") for name in ("float32", "float16"))
    weights = load_file(bfloat16_run / "base/model.safetensors")
    moved = 0
    for name, weight in wide.items():
        assert weight.dtype == torch.float32
        assert torch.equal(narrow[name], weight.to(torch.float16))
        # The sum was not rounded to bfloat16, the base's dtype, on its way.
        moved += int((weight != weight.bfloat16().float()).sum())
        untouched = weight == weights[name].float()
        assert untouched.float().mean() > 0.5
    assert moved > 0


def test_an_adapter_on_an_explicit_base_model(run: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))
    base = Path(shutil.copytree(run / "base", tmp_path / "model"))
    merge_to_folder(adapter, tmp_path / "merged", base_model=str(base))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(merged), logits(load_for_generation(run).model))


@pytest.mark.filterwarnings("ignore:Adapter 'default' was made for weights quantized as 'none'")
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_of_peft_on_one_of_two_tied_embeddings_leaves_the_other_alone(tmp_path: Path, target: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(save_base(tmp_path / "base", tie_word_embeddings=True))
    lora = peft.LoraConfig(target_modules=["q_proj", target], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=False
    )
    result = merge_to_folder(tmp_path / "adapter", tmp_path / "merged")
    assert result.difference is not None
    assert result.difference < 1e-6
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    untouched = merged.lm_head if target == "embed_tokens" else merged.model.embed_tokens
    assert torch.equal(untouched.weight, base.lm_head.weight)


def test_a_part_of_an_adapter_that_peft_does_not_merge_is_named(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    lora = peft.LoraConfig(target_modules=["lm_head"], trainable_token_indices=[1], task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(tmp_path / "adapter")
    with pytest.raises(PacaError, match=r"cannot be merged: PEFT leaves a part of it in lm_head"):
        merge_to_folder(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_on_the_embedding_of_a_classifier_is_merged(tmp_path: Path) -> None:
    """It has no output layer that could be tied."""
    base = save_base(tmp_path / "base")
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=2)
    lora = peft.LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False, task_type="SEQ_CLS")
    adapted = peft.get_peft_model(model, lora)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    save_classifier_config(tmp_path / "adapter", adapted)
    difference = merge_to_folder(tmp_path / "adapter", tmp_path / "merged").difference
    assert difference is not None
    assert difference < 1e-6


@pytest.mark.parametrize(
    "method",
    [
        peft.LoHaConfig(r=2, alpha=4, target_modules="all-linear", init_weights=False),
        peft.LNTuningConfig(target_modules=[r"attention.output.LayerNorm"]),
    ],
    ids=["LoHa", "LN tuning"],
)
def test_a_head_and_a_pooler_that_were_trained_whole_are_merged(tmp_path: Path, method: peft.PeftConfig) -> None:
    """PEFT leaves them wrapped in some methods, and fails at the pooler, which has no weight itself, in others."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=1000, max_position_embeddings=64, **sizes))
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(save_base(tmp_path / "texts")).save_pretrained(tmp_path / "base")
    method.task_type, method.modules_to_save = "SEQ_CLS", ["pooler", "classifier"]
    adapted = peft.get_peft_model(model, method)
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    save_classifier_config(tmp_path / "adapter", adapted)
    result = merge_to_folder(tmp_path / "adapter", tmp_path / "merged", base_model=str(tmp_path / "base"))
    assert result.difference is not None
    assert result.difference < 1e-6
    merged = BertForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), logits(adapted.eval()), rtol=1e-5, atol=1e-5)


def test_a_checkpoint_that_torchao_quantized_becomes_a_plain_one(run: Path, tmp_path: Path) -> None:
    ao = pytest.importorskip("torchao.quantization")
    quantized = tmp_path / "quantized"
    config = TorchAoConfig(ao.Int8WeightOnlyConfig())
    AutoModelForCausalLM.from_pretrained(run / "base", quantization_config=config).save_pretrained(quantized)
    AutoTokenizer.from_pretrained(run / "base").save_pretrained(quantized)
    adapted = load_for_generation(run, base_model=str(quantized)).model
    assert merge_to_folder(run, tmp_path / "merged", base_model=str(quantized)).difference == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    assert torch.equal(logits(merged), logits(adapted))


def test_an_output_in_use_is_refused_and_left_alone(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    output.mkdir()
    (output / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(PacaError, match=r"not empty.*--overwrite"):
        merge_to_folder(run, output)
    with pytest.raises(PacaError, match=r"no config.json.*not overwritten"):
        merge_to_folder(run, output, overwrite=True)
    assert (output / "thesis.txt").read_text() == "irreplaceable"
    with pytest.raises(PacaError, match="is a file"):
        merge_to_folder(run, output / "thesis.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_overwrite_replaces_a_model_whole(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    merge_to_folder(run, output)
    (output / "leftover.txt").write_text("of the earlier one")
    with pytest.raises(PacaError, match="not empty"):
        merge_to_folder(run, output)
    merge_to_folder(run, output, overwrite=True)
    assert not (output / "leftover.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_an_output_that_holds_what_is_read_is_refused(run: Path) -> None:
    for output in (run, run / "adapter", run / "base", run.parent):
        with pytest.raises(PacaError, match="which the merge reads"):
            merge_to_folder(run, output, overwrite=True)
    assert load_for_generation(run).adapter == run / "adapter"


def test_the_output_folder_has_the_usual_permissions(run: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    merge_to_folder(run, tmp_path / "merged")
    usual = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert stat.S_IMODE((tmp_path / "merged").stat().st_mode) == usual


def test_a_checkpoint_that_answers_differently_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = merged_module._write

    def write_damaged(loaded: object, dtype: torch.dtype, folder: Path) -> None:
        write(loaded, dtype, folder)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.0.mlp.up_proj.weight"] *= 1.001
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(merged_module, "_write", write_damaged)
    with pytest.raises(PacaError, match="does not answer as the adapted model"):
        merge_to_folder(run, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
    assert merge_to_folder(run, tmp_path / "merged", verify=False).difference is None


def test_logits_that_are_all_zero_are_no_difference(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged_module, "_probe_logits", lambda _: torch.zeros(2, 3))
    assert merge_to_folder(run, tmp_path / "merged").difference == 0


def test_a_failure_while_writing_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(merged_module, "_write", full_disk)
    with pytest.raises(PacaError, match=r"The disk is full: .*merged could not be written"):
        merge_to_folder(run, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_for_another_task_is_refused_by_it(run: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "classifier"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"task_type": "SEQ_CLS", "base_model_name_or_path": "x"}')
    with pytest.raises(PacaError, match=r"trained for the task SEQ_CLS, and no config.json .* merge_and_unload"):
        merge_to_folder(adapter, tmp_path / "merged")


def test_what_cannot_be_merged_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(PacaError, match="a whole model, not an adapter"):
        merge_to_folder(run / "base", tmp_path / "merged")
    with pytest.raises(PacaError, match=r"Unknown dtype 'int4'. Give one of: bfloat16"):
        merge_to_folder(run, tmp_path / "merged", "int4")
    with pytest.raises(PacaError, match="No such folder"):
        merge_to_folder(tmp_path / "nowhere", tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_images_of_a_model_that_takes_a_pair_of_sizes(tmp_path: Path) -> None:
    """Its logits before and after are compared, so that the images have to fit it."""
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "sr_ratios": [2, 1], "num_attention_heads": [1, 2]}
    shape = {"patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2], "num_encoder_blocks": 2}
    model = PvtV2ForImageClassification(PvtV2Config(image_size=32, num_labels=3, **sizes, **shape))
    assert isinstance(model.config.image_size, tuple | list)
    model.save_pretrained(tmp_path / "base")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, paca.PacaConfig(r=2, target_modules=["query", "value"]))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    save_classifier_config(tmp_path / "adapter", adapted)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "adapter")
    assert merge_to_folder(tmp_path / "adapter", tmp_path / "merged").difference == 0
