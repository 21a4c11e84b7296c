"""The first half of a run: its data is read and every setting decided, without loading weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import get_peft_model
from transformers import PreTrainedModel

from paca.config import PacaConfig
from paca.data.packing import Packed
from paca.data.system_message import shared_system
from paca.lean import make_lean, undo_lean
from paca.messages.errors import PacaError, about
from paca.messages.processes import launched_processes
from paca.planning.memory_estimate import PlannedModel
from paca.planning.output_layer import check_output_layer
from paca.planning.quantized_layers import unpacked_by_peft
from paca.planning.unseen_values import nothing_drawn
from paca.pretrained.context_length import context_length, position_table
from paca.pretrained.location import locate
from paca.pretrained.quantizing import quantize_outline
from paca.pretrained.trainable_copy import unpacked
from paca.pretrained.weight_size import weight_size
from paca.training.config import adapter_settings, train_settings
from paca.training.config.learning_rate import AUTO, automatic_rate, far_off, follows_weights, of_adam
from paca.training.config.run_config import RunConfig
from paca.training.config.target_names import check_target_names
from paca.training.folder.disk_need import disk_need
from paca.training.folder.run_folder import RunFolder
from paca.training.folder.same_run import inputs_of
from paca.training.learned_tokens import check_learned_tokens
from paca.training.lora_start import check_directions
from paca.training.method_state import check_budget
from paca.training.named_model import check_same_labels, new_modules, outline_of, train_heads
from paca.training.plain_lora import check_clusters
from paca.training.plan import Plan, planned_steps
from paca.training.positions import check_positions
from paca.training.trainers import trainer_kind
from paca.training.untrained_layers import told_of_experts
from paca.tuner.target_names import told_of_layers


@dataclass
class PreparedRun:
    """A plan, and what is needed beside it to carry it out."""

    plan: Plan
    inputs: dict[str, str]
    """From `inputs_of`, in the first process."""
    outline: PlannedModel
    """The adapted model without weights, for what is foretold of its memory."""


def describe(config: RunConfig) -> Plan:
    """What `config` will do; reads the data and the model's shapes, not its weights.

    Raises:
        PacaError: The model or the data can't be found or read, or the settings don't fit them.
    """
    return prepare(config, whole=False).plan


def prepare(config: RunConfig, *, whole: bool = True, fetch: bool = False) -> PreparedRun:
    """As `describe`, keeping what a run needs.

    Args:
        config: Of the run.
        whole: Tokenize the data, all of it.
        fetch: Of a model on the hub, fetch the weights that an automatic rate depends on, as with `whole`.

    Raises:
        PacaError: The model or the data can't be found or read, or the settings don't fit them.
    """
    config = copy.deepcopy(config)
    named, given, method, rank = config.model, config.train, config.method, config.train.get("factor_rank")
    kind = trainer_kind(given)
    if rank is not None and rank >= (columns := config.adapter.get("r", PacaConfig.r)):
        raise PacaError(
            f"train.factor_rank is {rank} and paca.r {columns}: factors as wide as the deltas gain nothing. Give a "
            "quarter of paca.r."
        )
    if method == "full" and named.dtype == "auto":
        named.dtype = "float32"  # as TRL loads models: in 16 bits, small steps would be lost
    with about("model.name"):
        location = locate(named.name)  # before its tokenizer is looked for
    data = kind.read(config)
    check_same_labels(named, data.labels)
    train, held_out = data.train, data.eval
    model = outline_of(named, kind.auto_class, data.labels).model
    data.context = context_length(model)
    if named.lean:  # a block that it does not know is refused here, before weights are loaded
        undo_lean(make_lean(model, named.recompute))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = next(model.parameters()).dtype
    automatic = given.get("learning_rate", AUTO) == AUTO
    size = None
    if follows_weights(method, config.adapter):
        size = weight_size(location, named.revision, fetch=automatic and (whole or fetch))
    config.train = train_settings.with_defaults(
        given, model, has_eval=held_out is not None, method=method, adapter=config.adapter, weight_size=size
    )
    rate, rule = automatic_rate(kind, method, config.adapter, size, rank)
    rule = of_adam(rule, given.get("optim"))
    check_target_names(method, config.adapter, model, named.name)
    if named.quantization is not None:
        model = quantize_outline(model, named.quantization)
    if data.labels is not None:
        new = new_modules(named, kind.auto_class, data.labels, fetch=whole or fetch)
        train_heads(config, model, new)
    adapted = _adapted_outline(config, model, kind.task_type)
    check_clusters(adapted)
    check_directions(config, adapted)
    if kind.task_type == "CAUSAL_LM":
        with about(f"The section {method} does not fit {named.name}"):
            check_output_layer(adapted)
    if named.quantization is not None and method == "paca":
        if config.adapter.get("rotate_every") is not None:
            raise PacaError(
                "paca.rotate_every folds columns into the weights, which quantized ones can't take. Leave it out, or "
                "leave out model.quantization."
            )
        config.adapter.setdefault("original_weights", named.name)
    config.adapter = adapter_settings.with_defaults(method, config.adapter)
    processes = launched_processes()
    steps = _steps(config, given, len(train.dataset), processes)
    layers = _adapted_layers(adapted.base_model) if method != "full" else []
    sequences = config.train["per_device_train_batch_size"] * config.train["gradient_accumulation_steps"] * processes
    inputs = inputs_of(config, train, held_out) if whole and os.environ.get("RANK", "0") == "0" else {}
    data.system = shared_system(train) if whole else None
    data = kind.shape(config, data, whole=whole)
    check_positions(data.sample, config.train, position_table(model))
    if data.packed is not None:
        steps = _steps(config, given, len(train.dataset), processes, data.packed)
    guessed = data.packed is not None and not data.packed.exact and config.train.get("max_steps", -1) <= 0
    typical = None if data.sample is None or not kind.lengths_known else data.sample.mean
    if data.packed is not None:
        typical, sequences = data.packed.mean, min(sequences, data.packed.sequences)
    elif typical is not None:
        sequences = min(sequences, len(train.dataset))
    base = 0
    if location.source == "gguf":
        place = RunFolder(Path(config.output.dir)).base
        base = 0 if unpacked(named.name, place, named.dtype, named.tokenizer) else parameters * dtype.itemsize
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    if not trained:
        raise PacaError(
            f"The settings of {config.method} leave nothing to train. Give the fields that say what it trains, such "
            "as target_modules (of peft_type TRAINABLE_TOKENS: token_indices)."
        )
    plan = Plan(
        config=config,
        source=location.source,
        architecture=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        parameters=parameters,
        trainable_parameters=trained,
        method=adapter_settings.method_name(method, config.adapter),
        targets=list(dict.fromkeys(layers)),  # in the order of the model
        adapted_layers=len(layers),
        experts=told_of_experts(model, method, config.adapter),
        rate_rule=f"auto: {rule}" if automatic else f"auto would be {rate:g}",
        # A rate that follows no rule is no measure of a user's.
        rate_far_off=None if automatic or size is None else far_off(config.train["learning_rate"], rate),
        own_defaults=train_settings.own_defaults(given, config.train),
        train_examples=len(train.dataset),
        eval_examples=None if held_out is None else len(held_out.dataset),
        data=data,
        processes=processes,
        sequences_per_step=sequences,
        tokens_per_step=None if typical is None else round(sequences * typical),
        steps=None if guessed else steps,
        disk=disk_need(config, adapted, steps, base),
    )
    return PreparedRun(plan, inputs, adapted)


def _steps(
    config: RunConfig, given: Mapping[str, Any], examples: int, processes: int, packed: Packed | None = None
) -> int | None:
    """The optimizer steps, and what depends on them: the default of `train.warmup_steps`, and whether they suffice.

    Args:
        config: With its other defaults.
        given: What the user gave of `train`.
        examples: To train on.
        processes: How many train.
        packed: What packing makes of them; None is returned without it where packing decides.

    Raises:
        PacaError: The run would train nothing.
    """
    kind, train, sequences = trainer_kind(config.train), config.train, examples
    if packed is not None:
        train, sequences = {**train, "packing": False}, packed.sequences
    sure = packed is None or packed.exact
    if sure:
        kind.check_batches(sequences, train, processes)
    steps = planned_steps(sequences, train, processes)
    if steps is None:
        return None
    if "warmup_steps" not in given:
        config.train["warmup_steps"] = steps * 3 // 100  # rounded down, as a warm-up starts with a step at rate 0
    elif sure and steps == 1 and config.train["warmup_steps"]:
        raise PacaError(
            "The only step of this run would be the first of its warm-up, whose rate is 0: it would train nothing. "
            "Leave out train.warmup_steps, or train for more steps."
        )
    if sure and config.adapter.get("peft_type") == "ADALORA":
        check_budget(config.adapter["tinit"], config.adapter["tfinal"], config.adapter.get("total_step") or steps)
    return steps


def _adapted_layers(model: Any) -> list[str]:
    """What PEFT adapts, in words: each layer by its name in its block, stacks of experts with their module's."""
    modules, stacks = (getattr(model, f"targeted_{kind}_names", []) for kind in ("module", "parameter"))
    return [".".join(name.split(".")[-parts:]) for names, parts in ((modules, 1), (stacks, 2)) for name in names]


def _adapted_outline(config: RunConfig, model: PreTrainedModel, task_type: str | None) -> PlannedModel:
    adapter = adapter_settings.outline_config(config.method, config.adapter, task_type)
    if adapter is None:
        return model
    check_learned_tokens(adapter, model)
    try:
        with nothing_drawn(adapter), unpacked_by_peft(model):
            return get_peft_model(model, adapter, autocast_adapter_dtype=config.train["autocast_adapter_dtype"])
    except (ValueError, TypeError, RuntimeError, StopIteration) as error:
        if isinstance(error, StopIteration):  # PEFT's search for a layer's device
            reason = "a layer that it names has no weights. Name others with target_modules."
        elif "No modules were targeted" in str(error):
            reason = f"nothing is adapted in it. Name layers with target_modules. {told_of_layers(model)}"
        elif "Please specify `target_modules`" in str(error):
            choose = f"Give {config.method}.target_modules: all-linear, or name layers."
            reason = f"PEFT has no layers of choice for a model of type {model.config.model_type}. {choose}"
        else:
            reason = str(error)
        raise PacaError(f"The section {config.method} does not fit {config.model.name}: {reason}") from error
