"""What a run's config means for its memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from paca.messages.errors import PacaError
from paca.planning import Setting
from paca.planning.optimizer_state import known, optimizer_of
from paca.planning.setting import ALWAYS_CHUNKED, Answering
from paca.planning.target import outline_of
from paca.training.config.run_config import RunConfig


def setting_of_run(config: RunConfig, device: str, longest: int | None = None, lengths: int = 1) -> Setting:
    """The setting under which `paca train` would train `config`.

    Args:
        config: With our defaults in place (as `paca.training.prepare` resolves it).
        device: `"cpu"` or `"cuda"`.
        longest: Tokens of the longest example, where it is known; 1 for each image.
        lengths: How many different lengths its batches may have before they are padded to a multiple.

    Raises:
        PacaError: Neither the config nor `longest` limits the sequences, or a second copy of the model can't be found.
    """
    train = config.train
    limits = [limit for limit in (train.get("max_length"), longest) if limit is not None]
    if not limits:
        raise PacaError("train.max_length is null, so sequences have no limit to plan for; set it, or give --seq.")
    optimizer, multiple = optimizer_of(train), train.get("pad_to_multiple_of")
    trainer = train.get("trainer") or "sft"
    return Setting(
        sequence_length=min(limits),
        batch_size=train["per_device_train_batch_size"],
        eval_batch_size=train["per_device_eval_batch_size"] if config.data.eval is not None else None,
        gradient_accumulation=train["gradient_accumulation_steps"],
        lean=config.model.lean,
        recompute=config.model.recompute,
        checkpointing=bool(train.get("gradient_checkpointing") or train.get("activation_checkpointing")),
        chunked_loss=trainer in ALWAYS_CHUNKED or not holds_all_logits(train),
        quantization=config.model.quantization,
        padded=True if train.get("packing") or train.get("padding_free") else None,
        autocast=torch.bfloat16 if train.get("bf16") else torch.float16 if train.get("fp16") else None,
        autocast_adapter_dtype=train.get("autocast_adapter_dtype", True),
        # An optimizer that is not known is taken for one that keeps two moments: few keep more.
        optimizer=optimizer if known(optimizer) else "adamw_torch_fused",
        device=device,  # type: ignore[arg-type]
        lengths=-(-lengths // multiple) if isinstance(multiple, int) else lengths,
        trainer=trainer,
        reference=_reference(config, trainer),
        copied_adapter=trainer == "dpo" and config.model.adapter is not None,
        disable_dropout=bool(train.get("disable_dropout", trainer == "dpo")),
        answering=_answering(train) if trainer == "grpo" else None,
    )


def _answering(train: Mapping[str, Any]) -> Answering:
    return Answering(
        train["max_completion_length"],
        train["num_generations"],
        train.get("steps_per_generation"),
        train.get("generation_batch_size"),
        train.get("num_iterations") or 1,
    )


def _reference(config: RunConfig, trainer: str) -> Literal["without adapter"] | torch.dtype | None:
    """As `Setting.reference`. What GRPO asks of one without the adapter is asked between its passes."""
    train, named = config.train, config.model
    asked = trainer == "dpo" and not train.get("precompute_ref_log_probs")
    if config.method != "full":
        return "without adapter" if asked else None
    if not asked and not (trainer == "grpo" and train.get("beta")):
        return None
    return outline_of(named.name, named.dtype, named.revision, named.trust_remote_code).dtype  # as `load_reference`


def holds_all_logits(train: Mapping[str, Any]) -> bool:
    """Whether the logits of a whole batch are ever there: tokens x vocabulary, often the largest tensor of a step.

    TRL's trainer (>= 1.16) computes the loss from all of them for label smoothing alone. Otherwise its output head and
    its loss are one function that goes through the positions with a label in tiles of at most 4096 tokens by 32768 of
    the vocabulary, for `loss_type: nll` and `dft`, on every device, and with Liger's kernels as well.

    Args:
        train: The section of a run's config.
    """
    return bool(train.get("label_smoothing_factor"))
