"""Whether a run is going to fit, foretold once its data is tokenized and before it begins."""

from __future__ import annotations

import logging

from datasets import Dataset
from transformers import TrainingArguments

from paca.messages.errors import PacaError
from paca.messages.processes import launched_processes
from paca.planning.budget import available_memory, warn_if_too_large
from paca.training.prepare import PreparedRun
from paca.training.run_setting import setting_of_run
from paca.training.trainers import trainer_kind

logger = logging.getLogger(__name__)


def memory_at_hand(arguments: TrainingArguments) -> int | None:
    """Bytes that this process may use where it will train; ask before the model is loaded.

    None where no plan is made: for devices that the planner does not know, and for weights that are sharded.
    """
    device = arguments.device.type
    if device not in ("cpu", "cuda") or arguments.fsdp or arguments.deepspeed_plugin:
        return None
    try:
        available = available_memory(device)
    except PacaError:  # no such device after all
        return None
    # Processes on one machine share the CPU's memory; each has a GPU of its own.
    return available // launched_processes("LOCAL_WORLD_SIZE") if device == "cpu" else available


def memory_warning(
    prepared: PreparedRun, dataset: Dataset, arguments: TrainingArguments, available: int | None
) -> str | None:
    """What to tell the user if the longest batch needs more than there is; None if it fits or can't be foretold.

    Args:
        prepared: The run.
        dataset: Tokenized, as the trainer has it.
        arguments: Of the trainer.
        available: From `memory_at_hand`.
    """
    kind = trainer_kind(prepared.plan.config.train)
    if available is None or not kind.probed:
        return None
    lengths = set(kind.lengths(dataset)) or {1}
    try:
        setting = setting_of_run(prepared.plan.config, arguments.device.type, max(lengths), len(lengths))
        return warn_if_too_large(prepared.outline, setting, available)
    except Exception as error:  # a model's own code, run on tensors without values; a forecast never stops a run
        logger.warning(
            "What this run needs can't be foretold (%s: %s). --probe measures it.", type(error).__name__, error
        )
        return None
