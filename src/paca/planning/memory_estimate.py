"""The memory and the work of a training step, from the model's shapes alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, ShadowConfig, ShiraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from paca.messages.errors import PacaError, first_line, within_peft
from paca.messages.units import format_bytes
from paca.planning import learned_prompt, shadow
from paca.planning.compiled_products import program_bytes
from paca.planning.operators import Operator
from paca.planning.output_layer import check_output_layer
from paca.planning.passes import hold_copy, task_of
from paca.planning.quantized_layers import quantization_name, unpacked_by_peft, unpacked_numel
from paca.planning.repeated_blocks import copy_with_blocks, find_blocks
from paca.planning.setting import Setting
from paca.planning.simulated_step import simulate
from paca.planning.step_trace import StepTrace
from paca.planning.unseen_values import give_places, nothing_drawn
from paca.pretrained.quantizing import quantize_outline

FRAMEWORK = "framework overhead"
FRAMEWORK_BYTES = {"cpu": 720 * 2**20, "cuda": 600 * 2**20}
"""What a process holds before there is a model: on a CPU the resident libraries, on CUDA the context and the
workspaces of the matrix libraries. See docs/guides/planning.md for where the numbers come from."""
PROGRAMS = "compiled products"
_ADDED = (".modules_to_save.", ".trainable_tokens_delta.")  # in names of parameters that an adapter brings


@dataclass(frozen=True)
class MemoryEstimate:
    """What a training step takes."""

    setting: Setting
    parameters: int
    """Of the model without its adapters."""
    trainable: int
    """Parameters that are trained."""
    layers: int
    """How many modules have an adapter."""
    parts: Mapping[str, int]
    """Bytes by part, at the moment when most is allocated; their sum is `total`."""
    moment: str
    """When that is."""
    saved: Mapping[str, int]
    """Bytes that the autograd graph holds at the end of the forward pass, by kind, without parameters."""
    flops: int
    """Of the matrix products and attention in one optimizer step."""
    weights: str
    """How the weights are kept: a dtype, or how the linear layers are quantized."""
    dequantized: int
    """Bytes read and written in one optimizer step to unpack quantized weights."""
    operators: Mapping[Operator, int]
    """How often one optimizer step runs each operator; empty unless it was asked for."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def activations(self) -> int:
        """What the autograd graph holds at the end of the forward pass, in bytes."""
        return sum(self.saved.values())

    def __str__(self) -> str:
        lines = [(name, format_bytes(count)) for name, count in self.parts.items()]
        lines.append((f"total ({self.moment})", format_bytes(self.total)))
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {text:>12}" for name, text in lines)


PlannedModel = PeftModel | PreTrainedModel


def prepare_model(
    model: str | PreTrainedConfig | PlannedModel,
    adapter: PeftConfig | None = None,
    quantization: str | None = None,
    *,
    autocast_adapter_dtype: bool = True,
) -> PlannedModel:
    """The model to plan for, on the meta device.

    Args:
        model: A hub id or folder, a configuration, or a model on the meta device; a model stays as it is.
        adapter: The adapter to put in. Without it the model is trained as it comes: all of it, or its own adapters.
        quantization: Of its linear layers, before the adapter is put in; see `Setting.quantization`. A checkpoint that
            is quantized by bitsandbytes is planned so by itself.
        autocast_adapter_dtype: See `Setting.autocast_adapter_dtype`.

    Raises:
        PacaError: The model has weights, can't be found, can't be quantized, or the adapter does not fit it.
    """
    made = _quantized(_on_meta(model), quantization, model)
    if adapter is None:
        if not isinstance(made, PeftModel) and quantization_name(made) is not None:
            raise PacaError("Quantized weights are not trained: plan them with an adapter.")
        return made
    if made is model:
        made = copy.deepcopy(made)
    adapter = copy.deepcopy(adapter)  # PEFT writes into both
    if isinstance(adapter, ShiraConfig):
        adapter.mask_fn = None  # it looks at the weights
    # SHADOW makes its second network where it likes. Others make tables on the CPU, and look into them.
    try:
        where = torch.device("meta") if isinstance(adapter, ShadowConfig) else nullcontext()
        with where, nothing_drawn(adapter), unpacked_by_peft(made):
            adapted = get_peft_model(made, adapter, autocast_adapter_dtype=autocast_adapter_dtype)
    except (ValueError, TypeError) as error:
        raise PacaError(f"The adapter does not fit {type(made).__name__}: {error}") from error
    except RuntimeError as error:  # of which torch's errors about missing values are kinds
        raise _unplannable(adapter, made, error) from error
    give_places(adapted)
    shadow.put_inside(adapted)
    return adapted


def _unplannable(adapter: PeftConfig, model: PlannedModel, error: BaseException) -> PacaError:
    """What to say of a method of PEFT whose code looks at values: `error` is torch's."""
    method, kind = PeftType(adapter.peft_type).value, quantization_name(model)
    if kind is not None:
        return PacaError(
            f"{method} can't be planned on {kind} weights: {first_line(error).rstrip('.')}. Many methods of PEFT have "
            "no form for quantized weights. Leave out the quantization, or plan paca or lora."
        )
    return PacaError(
        f"{method} can't be planned: its layers look at values ({first_line(error)}), and a plan has tensors without "
        "any. `paca train --probe` measures the memory of a run with it. Or plan another method."
    )


def root_of(model: PlannedModel) -> PreTrainedModel:
    """The model without PEFT's wrapper; an adapter stays in it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def _quantized(
    made: PlannedModel, quantization: str | None, given: str | PreTrainedConfig | PlannedModel
) -> PlannedModel:
    present = quantization_name(made)
    if present is not None or isinstance(made, PeftModel):
        if quantization not in (None, present):
            raise PacaError(
                f"The model is planned with weights in {present or made.dtype} and has its adapter already; to plan it "
                f"in {quantization}, give it without the adapter."
            )
        return made
    if quantization is None and getattr(made.config, "quantization_config", None) is None:
        return made
    return quantize_outline(copy.deepcopy(made) if made is given else made, quantization)


def _on_meta(model: str | PreTrainedConfig | PlannedModel) -> PlannedModel:
    if isinstance(model, str):
        from paca.pretrained import load_config

        return load_config(model).model
    if isinstance(model, PreTrainedConfig):
        ran_before = type(model).__module__.startswith("transformers_modules")  # its code was let run, to make it
        try:
            with torch.device("meta"):
                made = AutoModelForCausalLM.from_config(copy.deepcopy(model), trust_remote_code=ran_before)
        except ValueError as error:
            raise PacaError(f"{type(model).__name__} is not the configuration of a causal language model.") from error
        made.tie_weights()
        return made
    if any(p.device.type != "meta" for p in model.parameters()):
        raise PacaError(
            "Plans are made from a model without weights: make it on the meta device, as paca.pretrained.load_config "
            "does, or give its configuration."
        )
    return model


def estimate(
    model: str | PreTrainedConfig | PlannedModel,
    setting: Setting,
    adapter: PeftConfig | None = None,
    timed: bool = False,
) -> MemoryEstimate:
    """What a training step of `model` takes under `setting`, once `adapter` is in it; `model` as in `prepare_model`.

    The forward and backward pass are run on tensors without values; see `paca.planning.simulated_step`. With `timed`
    they run once more, and the optimizer's step with them, for `operators`.

    Raises:
        PacaError: The model can't be found, planned, or made lean, or the adapter adds to its input, or is on the
            output layer, where `setting.chunked_loss` would not train it.
    """
    autocast = setting.autocast_adapter_dtype
    prepared = prepare_model(model, adapter, setting.quantization, autocast_adapter_dtype=autocast)
    if isinstance(prepared, PeftModel) and setting.copied_adapter:
        prepared = copy.deepcopy(prepared) if prepared is model else prepared
        hold_copy(prepared)
    root = root_of(prepared)
    task = task_of(root)
    if task is None:
        raise PacaError(
            "Plans can be made for causal language models and classifiers of transformers, not for "
            f"{type(root).__name__}."
        )
    learned = isinstance(prepared, PeftModel) and prepared.active_peft_config.is_prompt_learning
    if isinstance(prepared, PeftModel) and learned and not learned_prompt.put_inside(prepared):
        raise PacaError(
            f"{prepared.active_peft_config.peft_type.value} adds to the model's input, and no plan is made for that. "
            "`paca train --probe` measures such a run."
        )
    if task != "text":
        setting = replace(setting, chunked_loss=False)  # which is that of a vocabulary
    if setting.chunked_loss:
        check_output_layer(root)
    try:
        trace = trace_step(root, setting, timed)
    except PacaError as error:
        if not isinstance(prepared, PeftModel) or not within_peft(error.__cause__):
            raise
        raise _unplannable(prepared.active_peft_config, root, error.__cause__ or error) from error
    moment, peak = max(trace.peaks.items(), key=lambda item: sum(item[1].values()))
    counts = {name: count for name, count in sorted(peak.items(), key=lambda item: -item[1]) if count > 0}
    compiled = program_bytes(trace.operators, setting.lengths) if setting.device == "cpu" else 0
    programs = {PROGRAMS: compiled} if compiled else {}
    parameters = {id(p): p for p in root.parameters()}.values()
    unpacked = unpacked_numel(root)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    marks: tuple[str, ...] = ()
    if isinstance(prepared, PeftModel):
        base: Any = prepared.base_model
        marks = (f"{learned_prompt.NAME}." if learned else getattr(base, "prefix", "adaption_"), *_ADDED)
    added = sum(p.numel() for name, p in root.named_parameters() if any(mark in name for mark in marks))
    return MemoryEstimate(
        setting=setting,
        parameters=sum(unpacked.get(id(p), p.numel()) for p in parameters) - added,
        trainable=trainable,
        layers=len(getattr(prepared.base_model, "targeted_module_names", ())),
        parts={**counts, **programs, FRAMEWORK: FRAMEWORK_BYTES[setting.device]},
        moment=moment,
        saved={name: count for name, count in trace.saved.most_common() if count > 0},
        flops=trace.flops * setting.gradient_accumulation,
        weights=quantization_name(root) or str(root.dtype).removeprefix("torch."),
        dequantized=trace.dequantized * setting.gradient_accumulation,
        operators={
            operator: count * (1 if operator.phase == "step" else setting.gradient_accumulation)
            for operator, count in (trace.operators.items() if timed else ())
        },
    )


def trace_step(root: PreTrainedModel, setting: Setting, timed: bool = False) -> StepTrace:
    """The trace of one forward and backward pass of the whole model, from runs with two and three blocks of a kind.

    `timed`: see `simulate`.
    """
    blocks = find_blocks(root)
    if blocks is None:
        small = copy_with_blocks(root, None, ())
        return simulate(small, setting, small.base_model, None, timed)

    def run(chosen: tuple[int, ...]) -> StepTrace:
        small = copy_with_blocks(root, blocks, chosen)
        block_list: Any = small.get_submodule(blocks.path)
        before_last = block_list[-2] if len(block_list) > 1 else None
        return simulate(small, setting, blocks.owner(small), before_last, timed)

    sample = blocks.sample(2)
    trace = start = run(sample)
    for kind in dict.fromkeys(blocks.kinds):
        missing = blocks.kinds.count(kind) - sum(blocks.kinds[number] == kind for number in sample)
        if missing:
            trace = trace.plus(run(blocks.with_one_more(sample, kind)), start, missing)
    return trace
