"""What fails once a run is on its way, and what the user can change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from paca.messages.errors import PacaError
from paca.messages.out_of_memory import is_out_of_memory
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


@contextmanager
def explained(config: RunConfig) -> Iterator[None]:
    """Turn a lack of memory, and of an optional package, into messages for the user: `PacaError`."""
    try:
        yield
    except PacaError:
        raise
    except SafetensorError as error:
        raise PacaError(
            f"A weights file of the run can't be read: {error}. Remove that checkpoint and resume."
        ) from error
    except ImportError as error:  # of a tracker, an optimizer, a kernel that the settings name
        raise PacaError(f"A setting needs a package that is not installed: {error}") from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise PacaError(f"Memory ran out. {remedies(config)}") from error
