"""Plans of quantized weights, against what bitsandbytes really makes."""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from architectures import config
from peft.utils import integrations
from quantized_checkpoint import quantized_model
from torch import Tensor
from transformers import BitsAndBytesConfig

import paca
from paca.planning import MemoryEstimate, Setting, estimate, fit, fitting, step_seconds
from paca.planning.device_rates import MatmulRate, fixed_rate, given_bandwidth, measure_dequantize_rate
from paca.planning.fitting import Technique
from paca.planning.memory_estimate import prepare_model
from paca.planning.quantized_layers import unpacked_by_peft
from paca.quantized import quantization_of

pytest.importorskip("bitsandbytes")

PACA = paca.PacaConfig(r=8)
SETTING = Setting(sequence_length=32)
SHAPE = {"dtype": torch.bfloat16, "num_hidden_layers": 2}
ONCE = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=False,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


def bytes_held(model: Any) -> int:
    """Storages of parameters, buffers and bitsandbytes' states, without what is trained."""
    tensors = [p.data for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    for module in model.modules():
        if quantization_of(module) is not None:
            state = module.quant_state if hasattr(module, "quant_state") else module.state
            holders = [h for h in (state, module.weight, getattr(state, "state2", None)) if h is not None]
            tensors += [t for holder in holders for t in vars(holder).values() if isinstance(t, Tensor)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("quantization", ["nf4", ONCE, "fp4", "int8"], ids=["nf4", "nf4 once", "fp4", "int8"])
def test_the_bytes_of_the_weights_are_exact(architecture: str, quantization: Any) -> None:
    shape = config(architecture, **SHAPE)
    real = peft.get_peft_model(quantized_model(copy.deepcopy(shape), quantization), copy.deepcopy(PACA))
    if isinstance(quantization, str):
        planned = estimate(shape, replace(SETTING, quantization=quantization), PACA)
    else:  # as the configuration of a checkpoint says that was saved quantized
        shape.quantization_config = quantization.to_dict()
        planned = estimate(shape, SETTING, PACA)
    assert planned.parts["weights"] == bytes_held(real)
    layers = [layer for layer in real.modules() if isinstance(layer, paca.layers.overlaid.OverlaidLinear)]
    assert planned.weights == layers[0].quantization_name
    assert planned.trainable == sum(p.numel() for p in real.parameters() if p.requires_grad)
    plain = estimate(config(architecture, **SHAPE), SETTING, PACA)
    assert planned.parameters == plain.parameters
    assert planned.trainable == plain.trainable


def test_each_pass_unpacks_each_layer_once_and_one_at_a_time() -> None:
    shape = config("llama", **SHAPE)
    planned = estimate(shape, replace(SETTING, quantization="nf4"), PACA)
    # Codes and scales are read, the weight is written; so are the scales in float32, to be read again.
    moved = {
        name: 2.5 * p.numel() + (p.numel() / 64) * (1 + 4 + 4) + math.ceil(p.numel() / 64 / 256) * 4
        for name, p in prepare_model(shape).named_parameters()
        if "proj" in name
    }
    below = sum(moved[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv")  # nothing to train below them
    assert planned.dequantized == 2 * sum(moved.values()) - below
    accumulated = estimate(shape, replace(SETTING, quantization="nf4", gradient_accumulation=3), PACA)
    assert accumulated.dequantized == 3 * planned.dequantized
    checkpointed = estimate(shape, replace(SETTING, quantization="nf4", checkpointing=True), PACA)
    assert checkpointed.dequantized == 3 * sum(moved.values())  # the first block's input gets a gradient there
    plain = estimate(shape, SETTING, PACA)
    assert plain.dequantized == 0
    assert planned.flops == plain.flops


def test_the_largest_unpacked_weight_counts_as_a_temporary() -> None:
    shape = config("llama", **{**SHAPE, "hidden_size": 512, "intermediate_size": 4096, "vocab_size": 50})
    setting = Setting(sequence_length=4, quantization="nf4")
    planned = estimate(shape, setting, PACA)
    assert 2 * 512 * 4096 <= planned.parts["temporaries"] <= 3 * 512 * 4096


def test_time_counts_the_unpacking_at_the_given_or_measured_rate() -> None:
    planned = estimate(config("llama", **SHAPE), replace(SETTING, quantization="nf4"), PACA)
    work = planned.flops / 1e12
    assert step_seconds(planned, fixed_rate(1e12)) == work
    unpacking = planned.dequantized / 2e9
    assert step_seconds(planned, fixed_rate(1e12), given_bandwidth(2e9)) == pytest.approx(work + unpacking)
    with pytest.raises(paca.PacaError, match="above 0"):
        given_bandwidth(0)
    for weights in ("nf4", "nf4 without double quantization", "int8"):
        rate = measure_dequantize_rate("cpu", torch.float32, 64, weights, seconds=0.01)
        assert rate.bytes_per_second > 0
        assert weights in rate.source


def test_a_plan_leaves_bitsandbytes_able_to_quantize() -> None:
    prepare_model(config("llama", **SHAPE), PACA, "nf4")
    linear = torch.nn.Linear(64, 64)
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, module=layer)
    layer.to("cpu")
    assert layer.quant_state.state2.code.device.type == "cpu"


@pytest.mark.slow(reason="simulates models over and over")
def test_sixteen_bits_come_first_and_four_where_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = config("llama", **SHAPE)
    made: dict[Setting, MemoryEstimate] = {}

    def once(model: Any, setting: Setting) -> MemoryEstimate:  # the searches repeat them
        if setting not in made:
            made[setting] = estimate(model, setting)
        return made[setting]

    monkeypatch.setattr(fitting, "estimate", once)
    base = replace(SETTING, sequence_length=256, chunked_loss=False, padded=None)
    options: dict[str, Any] = {"global_batch": 2, "adapter": PACA, "quantizations": (None, "nf4")}
    options |= {"dequantize": given_bandwidth(1e15), "rate": MatmulRate({256: 1e11, 512: 1e12}, "made up")}
    options["techniques"] = [Technique(False, None, False), Technique(True, None, False), Technique(True, None, True)]
    roomy = fit(shape, base, memory=2**40, **options)
    assert roomy.setting.quantization is None
    assert {c.setting.quantization for c in roomy.candidates} == {None}
    assert "nothing has to be computed twice" in str(roomy.weights_reason)

    lean = replace(base, batch_size=2, lean=True)
    budget = estimate(shape, replace(lean, quantization="nf4"), PACA).total
    assert estimate(shape, lean, PACA).total > budget
    tight = fit(shape, base, memory=budget, **options)
    assert tight.setting.quantization is None  # by other means
    assert "because they fit and are exact; nf4" in str(tight.weights_reason)
    assert "--quantization nf4" in str(tight.weights_reason)
    assert fit(shape, base, memory=budget, fastest_weights=True, **options).setting.quantization == "nf4"

    one = {**options, "global_batch": 1}
    least = min(c.estimate.total for c in fit(shape, base, memory=2**40, **one).candidates)
    smallest = estimate(shape, replace(base, lean=True, checkpointing=True), PACA).total
    none_left = fit(shape, base, memory=min(least, smallest) - 2**16, **one)
    assert none_left.setting.quantization == "nf4"
    assert "fits in no way" in str(none_left.weights_reason)


def test_what_can_not_be_quantized_is_refused() -> None:
    shape = config("llama", **SHAPE)
    four_bit = replace(SETTING, quantization="nf4")
    with pytest.raises(paca.PacaError, match="not trained"):
        estimate(shape, four_bit)
    with pytest.raises(paca.PacaError, match="Unknown quantization 'nf3'"):
        estimate(shape, replace(SETTING, quantization="nf3"), PACA)
    with pytest.raises(paca.PacaError, match="without the adapter"):
        estimate(prepare_model(shape, PACA), four_bit)
    prepared = prepare_model(shape, PACA, "nf4")
    assert estimate(prepared, four_bit).parts == estimate(shape, four_bit, PACA).parts
    shape.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(paca.PacaError, match="gptq"):
        estimate(shape, SETTING, PACA)
    shape.quantization_config = ONCE.to_dict()
    with pytest.raises(paca.PacaError, match="quantized already"):
        estimate(shape, four_bit, PACA)


def test_peft_has_its_own_functions_back_in_modules_that_were_imported_meanwhile(monkeypatch) -> None:
    """It imports modules where a layer needs them, and real weights would be given to our functions there."""
    imported: Any = ModuleType("peft.tuners.meanwhile")
    monkeypatch.setitem(sys.modules, imported.__name__, imported)
    theirs = integrations.dequantize_bnb_weight
    with unpacked_by_peft(prepare_model(config("llama"), None)):
        assert integrations.dequantize_bnb_weight is theirs  # nothing is quantized
    with unpacked_by_peft(prepare_model(config("llama"), PACA, "nf4")):
        assert integrations.dequantize_bnb_weight is not theirs
        imported.dequantize_bnb_weight = integrations.dequantize_bnb_weight
    assert imported.dequantize_bnb_weight is integrations.dequantize_bnb_weight is theirs


def test_a_method_without_a_form_for_quantized_weights_is_named() -> None:
    adapter = peft.LoHaConfig(r=4, task_type="CAUSAL_LM")
    with pytest.raises(paca.PacaError, match=r"^LOHA can't be planned on nf4 weights: .* or plan paca or lora\.$"):
        estimate(config("llama"), replace(SETTING, quantization="nf4"), adapter)
