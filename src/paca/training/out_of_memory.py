"""Memory ran out: what a user can change."""

from __future__ import annotations

from paca.training.run_config import RunConfig


def remedies(config: RunConfig) -> str:
    """What makes this run smaller, cheapest in time first, leaving out what it does already."""
    train, model = config.train, config.model
    tries = []
    if not model.lean:
        tries.append("model.lean=true (blocks that keep less)")
    tries.append(
        f"a smaller train.per_device_train_batch_size (now {train['per_device_train_batch_size']}, with more "
        "train.gradient_accumulation_steps)"
    )
    if model.recompute is None:
        tries.append("model.recompute=mlp (with model.lean=true)")
    if not (train.get("gradient_checkpointing") or train.get("activation_checkpointing")):
        tries.append("train.gradient_checkpointing=true")
    for name in ("max_length", "max_completion_length"):
        if name in train:
            tries.append(f"a smaller train.{name} (now {train[name]})")
    if model.dtype != "bfloat16":
        tries.append("model.dtype=bfloat16")
    return f"In this order, try: {', '.join(tries)}. `paca plan` finds settings that fit."
