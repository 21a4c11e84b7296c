"""Whether the scores of runs mean the same, and what else is not the same for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from paca.comparison.methods import JUDGING, LOSS_SCOPE
from paca.comparison.rows import Row
from paca.training.folder.same_run import PRODUCTS

_JUDGED_BY = (
    "metric", "eval_examples", "model.name", "data.eval", "data.eval_split", "data.heldout_seed", "eval.limit",
    "data.format", "data.columns", "data.label", "eval.answer_pattern", "eval.max_new_tokens",
    *(f"{section}.{name}" for section, names in JUDGING.items() for name in names),
)  # fmt: skip


_REWARDS = "train.reward_funcs"
_BY_DEFAULT: Mapping[str, Any] = {
    "train.truncation_mode": "keep_start", "train.temperature": 1.0, "train.top_p": 1.0, "train.top_k": 0,
    "train.repetition_penalty": 1.0, "train.label_smoothing_factor": 0.0, "train.packing": False,
    "train.train_sampling_strategy": "random",
}  # fmt: skip
"""What TRL and transformers take where a run says nothing."""
_SEEN: Mapping[str, str] = {
    "train.packing": "packing",
    "train.data_seed": "seed of the data's order",
    "train.train_sampling_strategy": "order of the data",
    "train.max_length": "longest sequence",
    "train.packing_strategy": "way of packing",
    "train.shuffle_dataset": "shuffling",
}
"""What a run sees of its data, and when; in words."""


def incomparable(rows: Iterable[Row]) -> list[str]:
    """The settings in which runs differ so that their scores can't be compared, each with its values; empty for none.

    What is scored by its answers is not touched by where the training loss falls.
    """
    rows = list(rows)
    split_off = any(not isinstance(at(row["run_info"]["config"], ("data", "eval")), str) for row in rows)
    keys = [*_JUDGED_BY, *(("data.train", "data.limit") if split_off else ())]
    if all(row["metric"] in ("exact_match", "choice") for row in rows):
        keys = [key for key in keys if key.removeprefix("train.") not in LOSS_SCOPE]
    apart = [f"{key} ({' or '.join(map(_shown, values))})" for key, values in _differing(rows, keys).items()]
    if any(row["metric"] == "loss" for row in rows):
        found = {batching(row["run_info"]["config"]) for row in rows}
        apart += [" and ".join(sorted(found))] if len(found) > 1 else []
    return apart + [f"the content of {key}" for key in _other_contents(rows, split_off)]


def batching(config: Mapping[str, Any]) -> str:
    """How the held-out examples of a run come in batches, in words, where its loss is a mean over batches.

    That of `eval.metric: loss` is one over tokens.
    """
    if at(config, ("eval", "metric")) is not None:
        return "a loss over tokens"
    train = config.get("train", {})
    own = train.get("eval_packing")
    packed = bool(train.get("packing") if own is None else own)
    size = train.get("per_device_eval_batch_size", 8)  # transformers' default
    grouped = train.get("train_sampling_strategy") == "group_by_length"  # also those of the held-out examples
    return f"a loss over batches of {size}{' packed' if packed else ''}{' of like length' if grouped else ''}"


def _other_contents(rows: list[Row], split_off: bool) -> list[str]:
    """The settings that name the same in all runs, and meant other things."""
    rewards = sorted({key for row in rows for key in contents_of(row) if key.startswith(_REWARDS)})
    keys = ("data.train" if split_off else "data.eval", "data.template", "model.name", *rewards)
    return [key for key in keys if _has_other_content(rows, key)]


def contents_of(row: Row) -> Mapping[str, str]:
    """Hashes of what the settings of a run named; older rows have none. Those of reward functions have the paths of
    files in their keys, which say nothing: of each name they are one."""
    found: dict[str, str] = {}
    for key, content in sorted(row["run_info"].get("contents", {}).items()):
        name = f"{key.rpartition(', ')[0]})" if key.startswith(_REWARDS) else key
        found[name] = found.get(name, "") + content
    return found


def _has_other_content(rows: Iterable[Row], key: str) -> bool:
    contents: dict[str, set[str]] = {}
    for row in rows:
        content = contents_of(row).get(key)
        # Quantization changes the model as it came, and a new head is drawn by the seed.
        like = (at(row["run_info"]["config"], ("model",)), row["seed"]) if key == "model.name" else None
        if content is not None:
            contents.setdefault(json.dumps(like, sort_keys=True), set()).add(content)
    return any(len(of_one) > 1 for of_one in contents.values())


def trained_alike(rows: Iterable[Row]) -> bool:
    """Whether all runs had the same training data, as far as is known: by its name, its limit, its content, and what
    they see of it."""
    rows = list(rows)
    return not _differing(rows, ("data.train", "data.limit", *_SEEN)) and not _has_other_content(rows, "data.train")


def unlike(rows: Iterable[Row]) -> list[str]:
    """What else is not the same for all runs, and a reader has to know."""
    named = {
        "data.train": "training data",
        "data.limit": "limit of the training data",
        **_SEEN,
        "steps": "steps",
        "run_info.train_config.dtype": "type of the weights",  # of `auto` too
        "model.adapter": "adapter that was trained on",
        "model.quantization": "quantization",
        "train.bf16": "autocast",
        "train.fp16": "float16 autocast",
        "train.lr_scheduler_type": "schedule of the rate",
        "train.optim": "optimizer",
        "meta_info.system_info.cpu": "processor",
        "meta_info.system_info.device_name": "device",
        "meta_info.package_info": "versions of libraries",
        "meta_info.git": "state of the code",
        "meta_info.code": "state of paca's code",
    }
    rows = list(rows)
    sequences = {_sequences_per_step(row["run_info"]["config"].get("train", {})) for row in rows}
    batches = ["sequences in a step"] if len(sequences) > 1 else []
    precisions = {row["run_info"].get("contents", {}).get(PRODUCTS) for row in rows} - {None}
    batches += ["precision of products"] if len(precisions) > 1 else []
    differing = _differing(rows, tuple(named))
    if "data.train" not in differing and _has_other_content(rows, "data.train"):
        batches.append("content of the training data")
    return batches + [named[key] for key in differing]


def _sequences_per_step(train: Mapping[str, Any]) -> int:
    """In each process."""
    return train.get("per_device_train_batch_size", 8) * train.get("gradient_accumulation_steps", 1)


def _shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _differing(rows: Iterable[Row], keys: Sequence[str]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {key: [] for key in keys}
    for row in rows:
        for key, values in found.items():
            path = key.split(".")
            value = at(row, path) if path[0] in row else at(row["run_info"]["config"], path)
            value = _BY_DEFAULT.get(key) if value is None else value
            if value not in values:
                values.append(value)
    return {key: values for key, values in found.items() if len(values) > 1}


def at(values: Any, path: Sequence[str]) -> Any:
    """The value at a path of names; None where there is none."""
    for name in path:
        values = values.get(name) if isinstance(values, Mapping) else None
    return values
