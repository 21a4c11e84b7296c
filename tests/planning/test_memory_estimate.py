from __future__ import annotations

import functools
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import config
from transformers import AutoModelForCausalLM

import paca
from paca.layers import paca_layers
from paca.planning import MemoryEstimate, Setting, estimate
from paca.planning.compiled_products import PROGRAM_BYTES
from paca.planning.memory_estimate import FRAMEWORK, PROGRAMS, prepare_model, trace_step
from paca.planning.repeated_blocks import copy_with_blocks, find_blocks
from paca.planning.setting import Answering
from paca.planning.simulated_step import simulate
from paca.tuner.entry import entry_of

PACA = paca.PacaConfig(r=8)


@functools.cache
def planned(architecture: str = "llama", adapter: Any = PACA, **settings: Any) -> MemoryEstimate:
    setting = Setting(**{"sequence_length": 32, "batch_size": 2, **settings})
    return estimate(config(architecture, dtype=torch.bfloat16), setting, adapter)


@pytest.mark.slow(reason="simulates models over and over")
@pytest.mark.parametrize(
    ("architecture", "options", "settings", "adapter"),
    [
        ("gemma3", {}, {}, PACA),
        ("opt", {}, {}, None),
        ("llama", {}, {"checkpointing": True}, None),
        # With few blocks the logits make the peak, with many the gradients, which pile up until the first block.
        (
            "llama",
            {"vocab_size": 20000, "intermediate_size": 2048, "num_hidden_layers": 12},
            {"batch_size": 1, "sequence_length": 16, "chunked_loss": False},
            paca.PacaConfig(r=64),
        ),
    ],
    ids=["two kinds of block", "full", "full, checkpointed", "peak moves"],
)
def test_a_few_blocks_tell_what_the_whole_model_takes(
    architecture: str, options: dict[str, Any], settings: dict[str, Any], adapter: Any
) -> None:
    setting = Setting(**{"sequence_length": 48, "batch_size": 2, **settings})
    shape = config(architecture, **{"num_hidden_layers": 6, "dtype": torch.float32, **options})
    model = prepare_model(shape, adapter)
    root = model.get_base_model() if adapter else model
    few = trace_step(root, setting)
    blocks = find_blocks(root)
    everything = copy_with_blocks(root, None, ())
    block_list = everything.get_submodule(blocks.path)
    whole = simulate(everything, setting, blocks.owner(everything), block_list[-2])
    assert few.saved == whole.saved
    assert few.flops == whole.flops
    peak, whole_peak = (max(sum(p.values()) for p in trace.peaks.values()) for trace in (few, whole))
    assert peak == pytest.approx(whole_peak, rel=0.001)


def test_a_model_that_was_copied_still_looks_after_its_layers() -> None:
    root = prepare_model(config("llama", num_hidden_layers=2, dtype=torch.float32), PACA).get_base_model()
    copied = copy_with_blocks(root, find_blocks(root), (0,))
    layers, few = paca_layers(root), paca_layers(copied)
    assert 0 < len(few) < len(layers)
    for model, own in ((root, layers), (copied, few)):
        entry = entry_of(model)
        assert {id(layer) for layer in (*entry.layers, *entry.others)} == {id(layer) for layer in own}
        assert all(layer.base_layer.columns.entry is entry for layer in own)


@pytest.mark.slow(reason="simulates models over and over")
@pytest.mark.parametrize("length", [4, 24, 44])
def test_a_few_blocks_tell_what_answers_of_the_whole_model_take(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where most is held, reading prompts or making the last token, depends on the depth."""
    shape = config("llama", num_hidden_layers=4, dtype=torch.float32)
    answering = Answering(length, generation_batch_size=512)
    setting = Setting(sequence_length=48, trainer="grpo", answering=answering)
    few = estimate(shape, setting, paca.PacaConfig(r=8))
    monkeypatch.setattr("paca.planning.memory_estimate.find_blocks", lambda model: None)
    whole = estimate(shape, setting, paca.PacaConfig(r=8))
    assert (few.moment, few.parts) == (whole.moment, whole.parts)
    assert few.moment.startswith("reading prompts" if length == 4 else "making answers" if length == 44 else "")


def test_parameters_are_those_of_the_real_model() -> None:
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_config(config("llama", dtype=torch.bfloat16)), paca.PacaConfig(r=8)
    )
    trainable = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    result = planned()
    assert result.parameters == sum(p.numel() for p in frozen)
    assert result.trainable == sum(p.numel() for p in trainable)
    assert result.parts["trainable parameters"] == 4 * result.trainable
    assert result.parts["optimizer state"] == 8 * result.trainable
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert result.parts["weights"] == sum(p.numel() * 2 for p in frozen) + buffers


def test_the_kept_columns_are_counted() -> None:
    result = planned()
    columns = result.trainable * 2  # per trained value the original, in the weight's dtype
    assert columns <= result.parts["original columns"] <= 1.1 * columns


def test_an_evaluation_with_a_large_batch_makes_the_peak() -> None:
    step, small, large = planned(), planned(eval_batch_size=1), planned(eval_batch_size=64)
    assert small.parts == step.parts
    assert (small.moment, large.moment) == (step.moment, "evaluation")
    assert large.total > step.total
    assert not {"gradients", "activations: MLP", "activations: attention"} & large.parts.keys()
    assert large.parts["optimizer state"] == step.parts["optimizer state"]
    assert (large.saved, large.flops) == (step.saved, step.flops)


@pytest.mark.slow(reason="simulates models over and over")
def test_a_cpu_keeps_programs_for_each_length_of_products_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    def programs(**settings: Any) -> int:
        return planned.__wrapped__(**settings).parts.get(PROGRAMS, 0) // PROGRAM_BYTES

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    # Products with 4 shapes of weights and with the output's; their gradients; and those of 3 heights of deltas.
    assert programs(chunked_loss=False) == 5 + 5 + 3
    assert programs(chunked_loss=False, lengths=10) == 130
    assert programs(lengths=2000) == 1024
    assert programs(lengths=2000, device="cuda") == 0
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    assert programs(lengths=2000) == 1024  # torch's own cache keeps them
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "100")
    assert programs(lengths=2000) == 100
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert programs() == 0


def test_experts_get_other_numbers_of_rows_in_each_step_and_fill_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "200")
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "200")
    assert planned.__wrapped__("qwen3_moe").parts[PROGRAMS] == 200 * PROGRAM_BYTES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_work_of_experts_counts(dtype: torch.dtype) -> None:
    def work(width: int) -> int:
        shape = config("qwen3_moe", dtype=dtype, num_hidden_layers=2, moe_intermediate_size=width)
        return estimate(shape, Setting(sequence_length=32), PACA).flops

    # Forward, and backward for the input alone: 2 experts for each token, 3 matrices of 128 rows, 2 blocks.
    assert work(96) - work(64) == 2 * 2 * (32 * 2 * 3 * 128 * 2) * (96 - 64)


def test_accumulation_keeps_gradients_and_multiplies_the_work() -> None:
    once, four = planned(), planned(gradient_accumulation=4)
    assert four.flops == 4 * once.flops
    assert four.parts["gradients"] == 4 * four.trainable
    assert four.activations == once.activations


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_tied_weight_has_one_gradient_and_one_state(checkpointing: bool) -> None:
    shape = config("llama", dtype=torch.float32, tie_word_embeddings=True)
    for passes in (1, 2):
        setting = Setting(16, gradient_accumulation=passes, checkpointing=checkpointing)
        made = estimate(shape, setting, timed=True)
        assert made.trainable == made.parameters
        assert made.parts["optimizer state"] == 2 * 4 * made.trainable
        assert made.parts["trainable parameters"] == 4 * made.trainable
        assert made.parts["gradients"] <= 4 * made.trainable


def test_operations_are_those_of_the_matrix_products() -> None:
    result = planned(adapter=None, chunked_loss=False)
    tokens = 64
    sizes = [p.numel() for p in prepare_model(config("llama")).parameters() if p.dim() == 2]
    products = sum(sizes) - 500 * 128  # the embedding is looked up
    attention = 2 * 2 * 4 * 32 * 32 * 32 * 7  # blocks, batch, heads, queries, keys, width; 7 products of them, halved
    assert result.flops == 6 * tokens * products + attention


def test_each_technique_saves_memory_and_says_what_it_costs() -> None:
    stock, lean, recomputed = planned(), planned(lean=True), planned(lean=True, recompute="mlp")
    checkpointed = planned(checkpointing=True)
    assert stock.activations > lean.activations > recomputed.activations > checkpointed.activations
    assert stock.flops == lean.flops < recomputed.flops < checkpointed.flops


def test_a_cuda_device_uses_its_own_attention_and_loss_kernels() -> None:
    cpu, cuda = planned(), planned(device="cuda")
    assert cuda.saved["activations: attention"] == pytest.approx(cpu.saved["activations: attention"], rel=0.05)
    wide = config("llama", dtype=torch.bfloat16, vocab_size=32768)
    on_cpu, on_cuda = (estimate(wide, Setting(2048, device=device), PACA) for device in ("cpu", "cuda"))
    assert on_cpu.parts["logits and loss"] < on_cuda.parts["logits and loss"]  # blocks of 32 MiB
    assert planned(device="cuda", padded=True).activations > cuda.activations  # the additive mask of each layer


def test_checkpointed_blocks_run_the_same_attention_kernel_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from paca.planning import operators

    calls: list[str] = []
    count = operators.flops_of

    def counted(operator: Any, *rest: Any) -> int:
        calls.append(operator._overloadpacket.__name__)
        return count(operator, *rest)

    monkeypatch.setattr(operators, "flops_of", counted)
    planned.__wrapped__(checkpointing=True, padded=True)
    forward = calls.count("_scaled_dot_product_flash_attention_for_cpu")
    assert forward == 2 * calls.count("_scaled_dot_product_flash_attention_for_cpu_backward") > 0
    assert "bmm" not in calls


def test_the_given_model_stays_as_it_was() -> None:
    model = prepare_model(config("llama"), PACA)
    names = [name for name, _ in model.named_parameters()]
    hooks = len(model.get_base_model()._forward_pre_hooks)
    first = estimate(model, Setting(32, lean=True, checkpointing=True))
    assert [name for name, _ in model.named_parameters()] == names
    assert len(model.get_base_model()._forward_pre_hooks) == hooks
    assert all(p.device.type == "meta" for p in model.parameters())
    assert estimate(model, Setting(32, lean=True, checkpointing=True)).parts == first.parts


def test_text_lists_the_parts_and_the_total() -> None:
    result = planned()
    text = str(result)
    assert all(part in text for part in result.parts)
    assert FRAMEWORK in text
    assert "total" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_length": 0}, "sequence_length is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"recompute": "mlp"}, "set lean"),
        ({"device": "tpu"}, "'cpu' and 'cuda'"),
        ({"optimizer": "muon"}, "adamw_torch"),
    ],
)
def test_settings_that_can_not_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(paca.PacaError, match=message):
        planned(**settings)


def test_models_that_can_not_be_planned_are_refused() -> None:
    real = AutoModelForCausalLM.from_config(config("llama", num_hidden_layers=1))
    with pytest.raises(paca.PacaError, match="meta device"):
        estimate(real, Setting(8))
    multitask = peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=2)
    with pytest.raises(paca.PacaError, match="MULTITASK_PROMPT_TUNING adds to the model's input, and no plan is made"):
        planned.__wrapped__(adapter=multitask)
    with pytest.raises(paca.PacaError, match="does not fit"):
        planned.__wrapped__(adapter=paca.PacaConfig(target_modules=["nothing"]))
    with pytest.raises(paca.PacaError, match=r"can.t be made lean"):
        estimate(config("bloom"), Setting(8, lean=True), PACA)
    with pytest.raises(paca.PacaError, match="not the configuration of a causal language model"):
        estimate(transformers.T5Config(), Setting(8))
