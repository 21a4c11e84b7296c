from __future__ import annotations

import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, SeedableRandomSampler, skip_first_batches
from torch.utils.data import BatchSampler, DataLoader
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from paca.training.data_order import SetEpochOfSampler

EXAMPLES = 16


def batches(loader: DataLoader) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def sharded_loader(process: int) -> DataLoader:
    sampler = SeedableRandomSampler(range(EXAMPLES), data_seed=0)
    shard = BatchSamplerShard(BatchSampler(sampler, batch_size=2, drop_last=False), 2, process)
    return DataLoaderShard(torch.arange(EXAMPLES), batch_sampler=shard)


def test_the_rest_of_a_later_epoch_comes_in_that_epochs_order() -> None:
    epochs = {}
    for process in (0, 1):
        loader = sharded_loader(process)
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            epochs[process, epoch] = batches(loader)
    assert epochs[0, 0] != epochs[0, 1]
    for process in (0, 1):
        loader = sharded_loader(process)
        arguments = TrainingArguments(output_dir="unused", use_cpu=True, report_to="none")
        state = TrainerState(epoch=1.5)
        SetEpochOfSampler().on_epoch_begin(arguments, state, TrainerControl(), train_dataloader=loader)
        resumed = skip_first_batches(loader, 2)
        resumed.set_epoch(1)
        assert batches(resumed) == epochs[process, 1][2:]


def test_batches_grouped_by_length_come_in_the_order_of_the_seed_alone() -> None:
    lengths = [7, 3, 9, 1, 4, 8, 2, 6, 5, 10] * 20
    arguments = TrainingArguments(output_dir="unused", use_cpu=True, report_to="none", seed=3)

    def order(epoch: float, moved: int) -> list[list[int]]:
        torch.manual_seed(moved)  # as whatever ran before may have left it
        sampler = LengthGroupedSampler(2, lengths=lengths)
        loader = DataLoader(torch.arange(len(lengths)), batch_sampler=BatchSampler(sampler, 2, drop_last=False))
        SetEpochOfSampler().on_epoch_begin(
            arguments, TrainerState(epoch=epoch), TrainerControl(), train_dataloader=loader
        )
        return batches(loader)

    assert order(0.0, moved=1) == order(0.0, moved=2)
    assert order(1.0, moved=1) == order(1.5, moved=2)
    assert order(0.0, moved=1) != order(1.0, moved=1)
