"""`paca train --probe`: the longest batch first, so that a run which does not fit fails in its first seconds."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from paca.columns.factored import FactoredAdamW
from paca.messages.errors import PacaError
from paca.messages.units import format_bytes
from paca.planning.optimizer_state import optimizer_of, state_bytes
from paca.pretrained.out_of_memory import is_out_of_memory
from paca.training.config.run_config import RunConfig
from paca.training.failures import remedies
from paca.training.memory import describe_peak_memory, peak_memory, reset_peak_memory
from paca.training.trainers import trainer_kind

_KEPT = ("_metrics", "_total_train_tokens")
"""What TRL's trainer counts in each forward pass, for its next log."""


class ProbeLongestBatch(TrainerCallback):
    """Runs one forward and backward pass on the longest batch before the first step, and reports the peak memory.

    Afterwards everything is as before: random generators, gradients, weights, optimizer and what is logged. The state
    of the optimizer, which is not there yet, is stood in for by as much memory. Under gradient accumulation a second
    pass follows, with the gradients of the first in place. With several processes each of them probes.

    Raises:
        PacaError: Memory runs out; says what to change.
    """

    def __init__(self, trainer: Trainer, config: RunConfig, announce: Callable[[str], None]) -> None:
        """Args:
        trainer: Whose model and data are probed.
        config: The run, for the advice when memory runs out.
        announce: Shows the user a line.
        """
        self.trainer = trainer
        self.config = config
        self.announce = announce

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Probe."""
        dataset: Any = self.trainer.train_dataset
        kind = trainer_kind(self.config.train)
        # A batch is padded to its longest example, and what is longer than max_length is cut.
        lengths, cut = kind.lengths(dataset), self.config.train.get("max_length") or math.inf
        by_length = sorted(range(len(lengths)), key=lambda number: -min(lengths[number], cut))
        chosen = by_length[: args.per_device_train_batch_size]
        if args.remove_unused_columns:
            dataset = self.trainer._remove_unused_columns(dataset)
        batch = dict(self.trainer.data_collator([dataset[number] for number in chosen]))
        shape = next(iter(batch[name] for name in ("input_ids", "pixel_values") if name in batch)).shape
        what = f"{' x '.join(map(str, shape))} {'tokens' if kind.counts == 'tokens' else 'values of pixels'}"
        reset_peak_memory()
        try:
            with self._nothing_changed():
                self._passes(batch, min(2, args.gradient_accumulation_steps))
                peak = peak_memory(args.device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise PacaError(f"The longest batch ({what}) does not fit into memory. {remedies(self.config)}") from error
        reset_peak_memory()
        self.announce(
            f"The longest batch ({what}) fits: peak memory {format_bytes(peak)} ({describe_peak_memory(args.device)})."
        )

    def _passes(self, batch: dict[str, Tensor], count: int) -> None:
        trainer = self.trainer
        in_place_of_optimizer_state = self._ballast()
        vars(trainer)["current_gradient_accumulation_steps"] = 1  # the loop sets it anew with each batch
        labels = batch.get("labels")
        tokens = None if labels is None else torch.tensor(int((labels != -100).sum()), device=trainer.args.device)
        for _ in range(count):
            trainer.training_step(trainer.model_wrapped, dict(batch), tokens)
        del in_place_of_optimizer_state

    def _ballast(self) -> Tensor | None:
        trainer: Any = self.trainer
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate's, around it
        if isinstance(optimizer, FactoredAdamW):
            optimizer.begin()  # backward passes need factors
        if optimizer.state:  # these, or of a resumed run
            return None
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        local = [p.to_local() if hasattr(p, "to_local") else p for p in trained]
        try:
            size = state_bytes(optimizer_of(self.config.train), local)
        except PacaError as error:
            self.announce(f"The probe leaves out the optimizer's state. {error}")
            return None
        # Written to: an operating system counts a page only once it is.
        return torch.ones(size, dtype=torch.uint8, device=trainer.args.device)

    @contextmanager
    def _nothing_changed(self) -> Iterator[None]:
        trainer: Any = self.trainer
        kept = {name: copy.deepcopy(getattr(trainer, name)) for name in _KEPT if hasattr(trainer, name)}
        python, numpy = random.getstate(), np.random.get_state()
        devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            vars(trainer).update(kept)
            trainer.model_wrapped.zero_grad(set_to_none=True)
