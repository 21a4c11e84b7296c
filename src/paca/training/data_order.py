"""The order of the data: after a resume with several processes, and where batches are grouped by length."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler


class SetEpochOfSampler(TrainerCallback):
    """Tells the sampler which epoch begins.

    With several processes the trainer can't: where a resumed run skips the first batches of its epoch, the sampler
    lies one wrapper deeper than accelerate 1.15 and transformers 5.24 look (`SkipBatchSampler` around
    `BatchSamplerShard`), and the rest of the epoch comes in the order of the first one.

    A sampler that groups by length draws from torch's global generator, which an evaluation before the first step moves
    on. It gets a generator of its own, so that the seed alone decides the order.
    """

    def on_epoch_begin(
        self, args: Any, state: TrainerState, control: Any, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Find the sampler, which all wrappers share, and set its epoch."""
        epoch, sampler = int(state.epoch or 0), getattr(train_dataloader, "batch_sampler", None)
        while sampler is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            if isinstance(sampler, LengthGroupedSampler):
                seed = args.seed if args.data_seed is None else args.data_seed
                sampler.generator = torch.Generator().manual_seed(seed + epoch)
            sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
