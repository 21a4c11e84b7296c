"""How many sequences TRL makes of examples when it packs them, found from their lengths alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from trl import pack_dataset

from paca.pretrained.quiet import without_progress_bars


@dataclass(frozen=True)
class Packed:
    """Sequences that are filled with the training data."""

    sequences: int
    mean: float
    """Tokens of one."""
    exact: bool
    """Whether the lengths of all examples are known; else both are those of a sample, for as many as there are."""


def packed(lengths: Sequence[int], examples: int, train: Mapping[str, Any]) -> Packed:
    """What `SFTTrainer` will make of examples with `train.packing`.

    Args:
        lengths: Tokens of each example, in their order; or of a sample of them.
        examples: How many there are in all.
        train: The trainer's settings.
    """
    filled = packed_lengths(lengths, train)
    times = examples / len(lengths)
    return Packed(max(1, round(len(filled) * times)), float(np.mean(filled)), exact=len(lengths) == examples)


def packed_lengths(lengths: Sequence[int], train: Mapping[str, Any]) -> list[int]:
    """Tokens of each sequence that TRL packs examples of such lengths into, by the settings of its trainer.

    TRL itself packs stand-ins of one byte a token. It does so by a thousand examples, and in each process apart.
    """
    table = Dataset.from_dict({"length": lengths})
    if train.get("shuffle_dataset"):
        table = table.shuffle(seed=train["seed"])
    with without_progress_bars(datasets):
        filled = table.map(
            _fill,
            batched=True,
            num_proc=train.get("dataset_num_proc"),
            remove_columns="length",
            fn_kwargs={"size": train["max_length"], "strategy": train.get("packing_strategy", "bfd")},
        )
    return filled["length_of_sequence"][:]


def _fill(batch: Mapping[str, list[int]], size: int, strategy: str) -> dict[str, list[int]]:
    offsets = np.concatenate([[0], np.cumsum(batch["length"])])
    tokens = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(np.zeros(offsets[-1], np.int8)))
    stand_ins = Dataset(pa.table({"input_ids": tokens}))
    filled = pack_dataset(stand_ins, size, strategy).with_format("arrow")[:]
    return {"length_of_sequence": pc.list_value_length(filled["input_ids"]).to_pylist()}
