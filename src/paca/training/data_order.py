"""The order of the data after a resume, with several processes."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerState


class SetEpochOfSampler(TrainerCallback):
    """Tells the sampler which epoch begins.

    With several processes the trainer can't: where a resumed run skips the first batches of its epoch, the sampler
    lies one wrapper deeper than accelerate 1.15 and transformers 5.24 look (`SkipBatchSampler` around
    `BatchSamplerShard`), and the rest of the epoch comes in the order of the first one.
    """

    def on_epoch_begin(
        self, args: Any, state: TrainerState, control: Any, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Find the sampler, which all wrappers share, and set its epoch."""
        sampler = getattr(train_dataloader, "batch_sampler", None)
        while sampler is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(int(state.epoch or 0))
            sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
