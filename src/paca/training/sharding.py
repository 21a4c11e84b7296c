"""How FSDP and DeepSpeed may shard a run: what a method can't train under is refused before the model is loaded."""

from __future__ import annotations

import copy
import os
import typing
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from paca.columns.selection import AT_RANDOM
from paca.config import PacaConfig
from paca.messages.errors import PacaError
from paca.pretrained.generation_settings import LEARNED_CACHES
from paca.training.config.adapter_settings import is_made
from paca.training.config.run_config import RunConfig


def check_sharding(arguments: TrainingArguments, config: RunConfig) -> None:
    """Refuse settings that would fail, or train wrongly, later.

    Args:
        arguments: Of the trainer.
        config: The resolved run.

    Raises:
        PacaError: One process, FSDP1, settings of FSDP2 or ZeRO-3 under which results were wrong or lost, or settings
            of DeepSpeed that are not the run's.
    """
    method = config.method
    fsdp = _fsdp_settings(arguments)
    peft_type = config.adapter.get("peft_type")
    shards = fsdp is not None or arguments.deepspeed_plugin is not None
    if peft_type in (*LEARNED_CACHES, "ADAPTION_PROMPT") and shards:
        raise PacaError(
            f"peft.peft_type: {peft_type} was not tried with FSDP and DeepSpeed. Train with "
            "DistributedDataParallel, or another method."
        )
    if peft_type in ("ADALORA", "ADAMSS", "CPT", "P_TUNING") and shards:
        raise PacaError(
            f"peft.peft_type: {peft_type} needs whole parameters and gradients after each step or for checkpoints, and "
            "FSDP and DeepSpeed shard or move them. Train with DistributedDataParallel, or another method."
        )
    if is_made(config.adapter) and (fsdp is not None or arguments.deepspeed_plugin is not None):
        raise PacaError(
            f"lora.init_lora_weights: {config.adapter['init_lora_weights']} needs whole weights, which FSDP and "
            "DeepSpeed shard or move. Train with DistributedDataParallel, or leave it out."
        )
    if fsdp is not None:
        if arguments.world_size == 1:
            raise PacaError(
                "train.fsdp shards the model over several processes, but this run has one. Start it with torchrun "
                "--nproc-per-node N --no-python paca train ..., or leave train.fsdp out."
            )
        version = int(fsdp.get("version", 2))
        if version != 2 and method == "paca":
            raise PacaError(
                f"train.fsdp_config asks for FSDP {version}, which flattens weights and trains all of each, "
                "where PaCA trains columns. Leave version out: FSDP2 (version: 2) is the default."
            )
        if str(fsdp.get("cpu_ram_efficient_loading", False)).lower() in ("true", "1") and method == "paca":
            raise PacaError(
                "train.fsdp_config.cpu_ram_efficient_loading does not go with PaCA: accelerate sends parameters to the "
                "other processes, but not the buffers that say which columns are trained. Leave it out; each process "
                "then reads the model."
            )
        if str(fsdp.get("activation_checkpointing", False)).lower() in ("true", "1") and method != "full":
            raise PacaError(
                "With train.fsdp_config.activation_checkpointing the names of parameters change, and the saved adapter "
                "would be empty. Set train.gradient_checkpointing: true instead."
            )
        if config.train.get("factor_rank") is not None:
            raise PacaError(
                "train.factor_rank does not go with train.fsdp, which shards the deltas. Leave it out, or train with "
                "DistributedDataParallel."
            )
        if config.adapter.get("trainable_token_indices"):
            raise PacaError(
                f"{method}.trainable_token_indices does not go with train.fsdp: PEFT's layers of single tokens do not "
                "know sharded embeddings. Leave it out, or train with DistributedDataParallel."
            )
        if config.adapter.get("modules_to_save"):
            raise PacaError(
                f"{method}.modules_to_save does not go with train.fsdp: the gradient of an output layer that is "
                "trained whole came out wrong there. Leave it out, or train with DistributedDataParallel."
            )
        if arguments.load_best_model_at_end and fsdp.get("state_dict_type") == "SHARDED_STATE_DICT":
            raise PacaError(
                "train.load_best_model_at_end does not go with state_dict_type: SHARDED_STATE_DICT: the processes may "
                "disagree on which checkpoint is the best, and wait for each other. Use FULL_STATE_DICT."
            )
    if arguments.deepspeed_plugin is not None:
        _check_deepspeed(arguments, config)


def _fsdp_settings(arguments: TrainingArguments) -> dict[str, Any] | None:
    """How FSDP is to shard: as `train.fsdp` says, or accelerate's launcher, which tells by environment variables."""
    if arguments.fsdp:
        return typing.cast("dict[str, Any]", arguments.fsdp_config or {})
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    return {name.removeprefix("FSDP_").lower(): value for name, value in os.environ.items() if name.startswith("FSDP_")}


def _check_deepspeed(arguments: TrainingArguments, config: RunConfig) -> None:
    differing = _differing(arguments)
    if differing:
        raise PacaError(
            "What DeepSpeed is told (by accelerate launch, or by train.deepspeed) is not what the run's config says: "
            f"{'; '.join(differing)}. Make them the same, or give DeepSpeed the value auto."
        )
    own = {
        "paca.rotate_every": config.adapter.get("rotate_every"),
        "train.factor_rank": config.train.get("factor_rank"),
    }
    for key in (key for key, value in own.items() if config.method == "paca" and value is not None):
        raise PacaError(
            f"{key} does not go with DeepSpeed, whose optimizer keeps copies of what is trained. Leave it out, or "
            "train with DistributedDataParallel."
        )
    if config.method != "paca" or not is_deepspeed_zero3_enabled():
        return
    selection = config.adapter.get("selection", PacaConfig.selection)
    if selection not in AT_RANDOM:
        raise PacaError(
            f"paca.selection: {selection} needs whole weights, and DeepSpeed's ZeRO-3 takes them apart as they are "
            "loaded. Choose random_blocks or random, or use FSDP2 (train.fsdp: true) or ZeRO stage 1 or 2."
        )
    if config.model.quantization is not None:
        raise PacaError(
            "model.quantization does not go with DeepSpeed's ZeRO-3: it was not tried. Use ZeRO stage 1 or 2, whose "
            "weights are whole in every process."
        )


def _differing(arguments: TrainingArguments) -> list[str]:
    """In what the settings of DeepSpeed and those of the trainer differ; the trainer would say so after loading."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    plugin: Any = arguments.deepspeed_plugin
    told = getattr(arguments, "hf_deepspeed_config", None)  # of train.deepspeed, which the trainer has compared already
    if told is None:
        told = HfTrainerDeepSpeedConfig(copy.deepcopy(plugin.hf_ds_config.config))
        told.trainer_config_process(arguments)
        plugin.set_deepspeed_weakref()  # transformers knows ZeRO-3 by the newest of these objects, as long as it lives
    return [line.removeprefix("- ").replace("ds ", "DeepSpeed's ").replace("hf ", "train.") for line in told.mismatches]


def spare_buffers(arguments: TrainingArguments, model: nn.Module) -> None:
    """Let DDP send no buffers before each forward pass, unless the user says so or some change as the model trains.

    The numbers of the columns are buffers. In a run every process has the same: they follow from the seed, or the first
    process chose them.

    Args:
        arguments: Of the trainer, which is yet to be made.
        model: That it is made for.
    """
    changing = any(getattr(module, "track_running_stats", False) for module in model.modules())  # batch normalization
    if arguments.ddp_broadcast_buffers is None and not changing:
        arguments.ddp_broadcast_buffers = False


def devices_warning(arguments: TrainingArguments, is_sharded: bool) -> str | None:
    """What to tell the user if GPUs are left unused, or `train.fsdp` was asked for and is not done."""
    if arguments.world_size == 1 and arguments.device.type == "cuda" and (count := torch.cuda.device_count()) > 1:
        return (
            f"{count} GPUs are there, and one process trains on one of them. To train on all: torchrun "
            f"--nproc-per-node {count} --no-python paca train ..."
        )
    if not arguments.fsdp or is_sharded:
        return None
    return (
        "train.fsdp has no effect: accelerate shards models on accelerators only, and there is none here. The model is "
        "whole in every process."
    )
