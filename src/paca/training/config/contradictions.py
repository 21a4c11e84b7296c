"""Values of a config that can't work, alone or with others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from paca.training.config.run_config import CalibrationSection, RunConfig


def contradictions(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Values that can't work, alone or with others: the key, and what is wrong with it."""
    model, data, evaluation, train = config.model, config.data, config.eval, config.train
    saves_best = train.get("save_strategy") == "best"
    if isinstance(data.eval, float) and not 0 < data.eval < 1:
        yield (
            "data.eval",
            f"is {data.eval}; to hold out a part of data.train give a fraction between 0 and 1 or a whole number of "
            "records.",
        )
    if not data.sources:
        yield "data.train", "is an empty list; name at least one file, folder or hub id."
    for key, count in (("data.eval", data.eval), ("data.limit", data.limit), ("eval.limit", evaluation.limit)):
        if isinstance(count, int) and count < 1:
            yield key, f"is {count}; a count of records must be 1 or more."
    if evaluation.metric is not None and data.eval is None:
        yield "eval.metric", "is measured on held-out data; give data.eval too."
    patience = train.get("early_stopping_patience")
    by_best = {"load_best_model_at_end": train.get("load_best_model_at_end"), "early_stopping_patience": patience}
    for key, needs in {**by_best, "save_strategy": saves_best}.items():
        if needs and data.eval is None:
            yield f"train.{key}", f"is {train[key]}: the best one is that of held-out data. Give data.eval too."
    if patience is not None and train.get("eval_strategy") == "no":
        yield (
            "train.early_stopping_patience",
            "goes by evaluations, and train.eval_strategy is no. Leave one of them out.",
        )
    if evaluation.answer_pattern is not None and evaluation.metric != "exact_match":
        yield "eval.answer_pattern", "goes with eval.metric: exact_match. Leave it out."
    counts = {f"calibration.{name}": count for name, count in dataclasses.asdict(config.calibration).items()}
    for key, count in {"eval.max_new_tokens": evaluation.max_new_tokens, **counts}.items():
        if count < 1:
            yield key, f"is {count}; it must be 1 or more."
    if model.recompute is not None and not model.lean:
        yield "model.recompute", "is a part of the lean blocks; give model.lean: true too."
    if model.lean and train.get("use_liger_kernel"):
        yield (
            "train.use_liger_kernel",
            "replaces the blocks that model.lean makes lean. Choose one of them; on CUDA, lean blocks use Liger's "
            "kernels where they are installed.",
        )
    if config.method == "full" and model.quantization is not None:
        yield (
            "model.quantization",
            "does not go with full: quantized weights can't be trained themselves. Leave it out, or train an adapter "
            "on them: paca, lora or peft.",
        )
    if train.get("factor_rank") is not None:
        if config.method != "paca":
            yield (
                "train.factor_rank",
                f"is about PaCA's deltas, and {config.method} has none. Leave it out; to compare methods, give it in a "
                "file of its own (--methods paca,factored=FILE,lora).",
            )
        elif train.get("optim_args") or train.get("optim_target_modules"):
            yield "train.factor_rank", "takes none of train.optim_args and train.optim_target_modules. Leave them out."
        elif train.get("optim", "adamw_torch") not in ("adamw_torch", "adamw_torch_fused"):
            yield "train.factor_rank", f"is AdamW's, and train.optim is {train['optim']}. Leave one of them out."
    if config.method == "full" and "autocast_adapter_dtype" in train:
        yield (
            "train.autocast_adapter_dtype",
            "is about adapters, and full has none. Leave it out; model.dtype is the type of the weights.",
        )


def contradictions_with_trainer(config: RunConfig) -> Iterator[tuple[str, str]]:
    """The same of other sections, which the run's trainer has no use for, or can't work with."""
    from paca.columns.selection import FROM_BATCHES
    from paca.pretrained.adapter_folder import text_setting
    from paca.pretrained.changed_base import left_by, not_saved
    from paca.pretrained.generation_settings import LEARNED_CACHES
    from paca.training.config.adapter_settings import FROM_DATA
    from paca.training.trainers import trainer_kind

    kind = trainer_kind(config.train)
    task = None if config.model.adapter is None else text_setting(Path(config.model.adapter), "task_type")
    if task is not None and task != kind.task_type:
        yield (
            "model.adapter",
            f"is for the task {task} by its config, and train.trainer: {kind.name} for {kind.task_type or 'images'}. "
            "Give another trainer or adapter.",
        )
    if config.data.columns is not None and kind.name == "image_classification":
        yield "data.columns", "is for texts; of images data.label names the column with the label. Leave it out."
    if config.data.format is not None and kind.name == "image_classification":
        yield "data.format", "is of texts. Leave it out."
    if not isinstance(config.data.train, str) and kind.name == "image_classification":
        yield "data.train", "is a list; of images give one folder, Parquet file or hub id."
    if config.data.label is not None and kind.name != "image_classification":
        yield "data.label", f"goes with train.trainer: image_classification, not {kind.name}. Leave it out."
    if config.data.template is not None and not kind.renders:
        yield "data.template", f"has no effect with train.trainer: {kind.name}. Leave it out."
    best = str(config.train.get("metric_for_best_model") or "loss").removeprefix("eval_")
    if config.data.eval is not None and kind.measured is not None and best not in kind.measured:
        yield (
            "train.metric_for_best_model",
            f"is {best}, and what is measured while training is {', '.join(kind.measured)}. Give one of them; "
            "eval.metric is measured once, after the last step.",
        )
    if config.eval.metric is not None and kind.score is not None:
        yield "eval.metric", f"goes with train.trainer: sft; {kind.name} measures {kind.score}. Leave it out."
    held_against = kind.name == "dpo" or (kind.name == "grpo" and config.train.get("beta"))
    if held_against and (changed := left_by(config.adapter)) is not None:
        yield (
            f"{config.method}.{changed.partition(':')[0].partition(' ')[0]}",
            f"does not go with train.trainer: {kind.name}, whose reference is the model without its adapter: "
            f"{changed}. Leave it out.",
        )
    selection = config.adapter.get("selection") if config.method == "paca" else None
    if selection in FROM_BATCHES and kind.name != "sft":
        yield (
            "paca.selection",
            f"is {selection}, which goes by batches as train.trainer: sft makes them. For {kind.name} choose "
            "random_blocks, random or weight_norm, or give paca.indices.",
        )
    start = config.adapter.get("init_lora_weights")
    if start in FROM_DATA and kind.name != "sft":
        yield (
            f"{config.method}.init_lora_weights",
            f"is {start}, which goes by batches as train.trainer: sft makes them. For {kind.name} leave it out.",
        )
    if not_saved(config.adapter) and config.model.quantization is not None:
        yield (
            f"{config.method}.init_lora_weights",
            f"is {start}, which takes a part out of the weights, and quantized ones can't be changed. Leave it out, or "
            "leave out model.quantization.",
        )
    if config.model.quantization is not None and kind.task_type != "CAUSAL_LM":
        yield (
            "model.quantization",
            f"does not go with train.trainer: {kind.name}, whose new head would be quantized before it is trained. "
            "Leave it out.",
        )
    learns = config.adapter.get("peft_type")
    if learns in (*LEARNED_CACHES, "ADAPTION_PROMPT") and kind.task_type != "CAUSAL_LM":
        yield (
            "peft.peft_type",
            f"is {learns}, with which PEFT trains no classifier here. Give a method whose config has modules_to_save, "
            "or prompt tuning.",
        )
    if learns == "CPT" and kind.name != "sft":
        yield "peft.peft_type", f"is CPT, whose loss goes with train.trainer: sft, not {kind.name}. Choose another one."
    if learns == "CPT" and config.train.get("loss_type", "nll") != "nll":
        yield "train.loss_type", "does not go with CPT, which has a loss of its own. Leave it out."
    if learns in ("CPT", "PROMPT_TUNING", "P_TUNING") and config.train.get("label_smoothing_factor"):
        yield (
            "train.label_smoothing_factor",
            f"does not go with {learns}: transformers smooths over the tokens of the text, and the logits have those "
            "that are learned as well. Leave it out.",
        )
    if learns in LEARNED_CACHES and config.train.get("packing"):
        yield (
            "train.packing",
            f"does not go with {learns}: with keys and values before a sequence, its examples would read each other. "
            "Leave it out.",
        )
    for key in ("gradient_checkpointing", "activation_checkpointing"):
        if learns in LEARNED_CACHES and config.train.get(key):
            yield (
                f"train.{key}",
                f"lets blocks keep no keys and values, which {learns} learns. Leave it out; model.lean: true saves "
                "memory too.",
            )


def unused(config: RunConfig) -> Iterator[tuple[str, str]]:
    """The same of `calibration`, where nothing in the run goes by it. Defaults, which a run writes, may stand."""
    from paca.columns.selection import FROM_BATCHES
    from paca.training.config.adapter_settings import FROM_DATA, goes_by_data

    if config.calibration != CalibrationSection() and not goes_by_data(config.method, config.adapter):
        yield (
            "calibration",
            f"has no effect: no columns are chosen by the data (paca.selection: {' or '.join(FROM_BATCHES)}), and no "
            f"LoRA starts by it (lora.init_lora_weights: {', '.join(FROM_DATA)}). Leave it out.",
        )
