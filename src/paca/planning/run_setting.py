"""What a run's config means for memory, and whether it is too much."""

from __future__ import annotations

from typing import Any

import torch

from paca.messages.errors import PacaError
from paca.planning.budget import available_memory
from paca.planning.estimate import PlannedModel, estimate
from paca.planning.optimizer_state import KNOWN_OPTIMIZERS
from paca.planning.setting import Setting
from paca.training.loss_memory import holds_all_logits
from paca.training.memory import format_bytes
from paca.training.run_config import RunConfig


def setting_of_run(config: RunConfig, device: str, longest: int | None = None) -> Setting:
    """The setting under which `paca train` would train `config`.

    Args:
        config: with our defaults in place (as `paca.training.plan` resolves it).
        device: `"cpu"` or `"cuda"`.
        longest: tokens of the longest example, where it is known.

    Raises:
        PacaError: neither the config nor `longest` limits the sequences.
    """
    train = config.train
    limits = [limit for limit in (train["max_length"], longest) if limit is not None]
    if not limits:
        raise PacaError("train.max_length is null, so sequences have no limit to plan for; set it, or give --seq.")
    packed = bool(train.get("packing") or train.get("padding_free"))
    batch_size = train["per_device_train_batch_size"]
    optimizer = str(train["optim"])
    return Setting(
        sequence_length=min(limits),
        batch_size=batch_size,
        gradient_accumulation=train["gradient_accumulation_steps"],
        lean=config.model.lean,
        recompute=config.model.recompute,
        checkpointing=bool(train.get("gradient_checkpointing") or train.get("activation_checkpointing")),
        chunked_loss=not holds_all_logits(train),
        quantization=config.model.quantization,
        padded=packed or batch_size > 1,
        autocast=_autocast(train),
        # An optimizer that is not known is taken for one that keeps two moments: few keep more.
        optimizer=optimizer if optimizer in KNOWN_OPTIMIZERS else "adamw_torch_fused",
        device=device,  # type: ignore[arg-type]
    )


def warn_if_too_large(model: PlannedModel, setting: Setting, available: int | None = None) -> str | None:
    """Say so if training would need more memory than there is.

    Args:
        model: on the meta device, with its adapter in.
        setting: how it is trained.
        available: bytes; what the device has free when None.

    Returns:
        A message that says how much is missing and what would help, or None if it fits or can't be foretold.
    """
    available = available_memory(setting.device) if available is None else available
    try:
        needed = estimate(model, setting)
    except PacaError:
        return None  # a model that can't be planned may train all the same
    if needed.total <= available:
        return None
    largest = next(iter(needed.parts))
    return (
        f"This run needs about {format_bytes(needed.total)} ({setting.batch_size} sequences of "
        f"{setting.sequence_length} tokens at a time), and {format_bytes(available)} are available. The largest part "
        f"is {largest}: {format_bytes(needed.parts[largest])}. `paca plan` finds settings that fit."
    )


def _autocast(train: dict[str, Any]) -> torch.dtype | None:
    if train.get("bf16"):
        return torch.bfloat16
    return torch.float16 if train.get("fp16") else None
