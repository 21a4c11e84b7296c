"""How FSDP and DeepSpeed may shard a run: what a method can't train under is refused before the model is loaded."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from paca.messages.errors import PacaError


def check_sharding(arguments: TrainingArguments, method: str = "paca", modules_to_save: object = None) -> None:
    """Refuse settings that would fail, or train wrongly, later.

    Args:
        arguments: Of the trainer.
        method: The section of the run.
        modules_to_save: Its key of that name.

    Raises:
        PacaError: One process, FSDP1, settings of FSDP2 under which results were wrong or lost, or ZeRO-3.
    """
    if arguments.fsdp:
        if arguments.world_size == 1:
            raise PacaError(
                "train.fsdp shards the model over several processes, but this run has one. Start it with torchrun "
                "--nproc-per-node N --no-python paca train ..., or leave train.fsdp out."
            )
        config: Any = arguments.fsdp_config or {}
        version = int(config.get("version", 2))
        if version != 2 and method == "paca":
            raise PacaError(
                f"train.fsdp_config asks for FSDP {version}, which flattens weights and trains all of each, "
                "where PaCA trains columns. Leave version out: FSDP2 (version: 2) is the default."
            )
        if str(config.get("cpu_ram_efficient_loading", False)).lower() in ("true", "1") and method == "paca":
            raise PacaError(
                "train.fsdp_config.cpu_ram_efficient_loading does not go with PaCA: accelerate sends parameters to the "
                "other processes, but not the buffers that say which columns are trained. Leave it out; each process "
                "then reads the model."
            )
        if str(config.get("activation_checkpointing", False)).lower() in ("true", "1") and method != "full":
            raise PacaError(
                "With train.fsdp_config.activation_checkpointing the names of parameters change, and the saved adapter "
                "would be empty. Set train.gradient_checkpointing: true instead."
            )
        if modules_to_save:
            raise PacaError(
                f"{method}.modules_to_save does not go with train.fsdp: the gradient of an output layer that is "
                "trained whole came out wrong there. Leave it out, or train with DistributedDataParallel."
            )
        if arguments.load_best_model_at_end and config.get("state_dict_type") == "SHARDED_STATE_DICT":
            raise PacaError(
                "train.load_best_model_at_end does not go with state_dict_type: SHARDED_STATE_DICT: the processes may "
                "disagree on which checkpoint is the best, and wait for each other. Use FULL_STATE_DICT."
            )
    if arguments.deepspeed and is_deepspeed_zero3_enabled() and method == "paca":
        raise PacaError(
            "train.deepspeed shards weights (ZeRO-3), which paca train was not tried with. Use ZeRO stage 1 or 2, or "
            "FSDP2 (train.fsdp: true), under which every process keeps the columns of its rows."
        )


def sharding_warning(arguments: TrainingArguments, is_sharded: bool) -> str | None:
    """What to tell the user if `train.fsdp` was asked for and is not done."""
    if not arguments.fsdp or is_sharded:
        return None
    return (
        "train.fsdp has no effect: accelerate shards models on accelerators only, and there is none here. The model is "
        "whole in every process."
    )
