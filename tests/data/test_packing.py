"""Packing is foretold from lengths as TRL's trainer does it with tokens."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from models import llama
from paca.data.packing import packed, packed_lengths
from tiny_checkpoint import byte_tokenizer


@pytest.mark.parametrize(
    ("count", "settings"),
    [
        (1, {}),
        (300, {"packing_strategy": "bfd"}),
        (300, {"packing_strategy": "bfd_split"}),
        (300, {"packing_strategy": "wrapped"}),
        (1500, {"packing_strategy": "bfd_split", "shuffle_dataset": True}),  # in two batches, each packed apart
        (1500, {"dataset_num_proc": 2}),
    ],
)
def test_the_sequences_are_those_of_the_trainer(tmp_path: Path, count: int, settings: dict[str, Any]) -> None:
    draw = random.Random(0)
    lengths = [draw.choice([1, 7, draw.randrange(1, 70)]) for _ in range(count)]
    settings = {"packing": True, "max_length": 48, "seed": 3, **settings}
    rows = Dataset.from_list([{"input_ids": [1] * length, "labels": [1] * length} for length in lengths])
    arguments = SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, **settings)
    trainer = SFTTrainer(llama(vocab_size=300), arguments, train_dataset=rows, processing_class=byte_tokenizer())
    made = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    assert sorted(packed_lengths(lengths, settings)) == sorted(made)
    found = packed(lengths, count, settings)
    assert (found.sequences, found.mean, found.exact) == (len(made), pytest.approx(sum(made) / len(made)), True)


def test_a_sample_stands_for_as_many_as_there_are() -> None:
    found = packed([10] * 20, 1000, {"max_length": 20})
    assert (found.sequences, found.mean, found.exact) == (500, 20.0, False)
