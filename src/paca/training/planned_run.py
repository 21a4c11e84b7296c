"""A run as the target of a plan: its model, and how long its examples are where that is soon found."""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paca.data import Examples, encode, split_heldout, training_template
from paca.data.tokens import IGNORED, what_stays
from paca.messages.errors import PacaError, about, first_line
from paca.messages.units import format_bytes
from paca.planning.target import Target, outline_of
from paca.training.calibration import told_of_pass
from paca.training.config import train_settings
from paca.training.config.adapter_settings import outline_config
from paca.training.config.config_file import load_run_config
from paca.training.config.run_config import RunConfig
from paca.training.learned_tokens import check_learned_tokens
from paca.training.named_model import set_attention, train_heads
from paca.training.prompt_form import tokenizer_of, trains_everything
from paca.training.run_setting import setting_of_run
from paca.training.trainers import trainer_kind
from paca.training.trainers.kind import RunData, TrainerKind

READ_AT_MOST = 64 * 2**20
"""Bytes of data files; more would take more than a few seconds."""
TOKENIZED = 256
"""Examples that are tokenized, those with the most characters: the one with the most tokens is among them, or about as
long as the longest of them."""


_UNKNOWN_LABELS = {
    "reward": ["reward"],
    "classification": ["", " "],
    "image_classification": ["", " "],
}
"""Labels of a head whose data was not read: two, as a hundred would hardly take more."""


def target_of_run(
    path: Path,
    overrides: Sequence[str],
    device: str,
    sequence_length: int | None,
    batch_size: int | None,
) -> Target:
    """The run that a YAML file describes. Its memory is that of its longest example and its time that of typical ones,
    where they are soon found.

    Args:
        path: As for `paca train`.
        overrides: `"section.key=value"` each.
        device: `"cpu"` or `"cuda"`.
        sequence_length: In place of the longest example and `train.max_length`.
        batch_size: In place of `train.per_device_train_batch_size`.

    Raises:
        PacaError: The config is wrong, the model can't be found, or nothing limits its sequences.
    """
    config = load_run_config(path, overrides, all_used=True)
    kind = trainer_kind(config.train)
    held_out, config.data.eval = config.data.eval, None  # what is split off the training data counts as well
    texts = kind.name in ("sft", "dpo", "grpo")  # whose head has no labels
    data, unread, failure = None, None, None
    try:
        if not texts or sequence_length is None:
            data, unread = _read(config, kind)
    except PacaError as error:
        failure = error
    config.data.eval = held_out
    labels = _UNKNOWN_LABELS.get(kind.name) if data is None else data.labels
    named = config.model
    dtype = "float32" if config.method == "full" and named.dtype == "auto" else named.dtype  # as a run does
    with about("model.name"):
        outline = outline_of(
            named.name, dtype, named.revision, named.trust_remote_code, auto_class=kind.auto_class, labels=labels
        )
    set_attention(outline, named)
    has_eval = held_out is not None
    newer = config.train.get("activation_checkpointing") is not None
    config.train = train_settings.with_defaults(
        config.train, outline, has_eval=has_eval, method=config.method, adapter=config.adapter, device=device
    )
    if batch_size is not None:
        config.train["per_device_train_batch_size"] = batch_size
    kind.check_planned(config.train)
    longest, typical, different = (1 if kind.counts == "images" else None), None, 1
    lengths = unread if kind.counts == "tokens" else None
    if sequence_length is not None:
        config.train["max_length"], lengths, failure = sequence_length, None, None
    elif kind.counts == "tokens" and data is not None:
        try:
            longest, typical, different, lengths = _lengths_of(config, kind, data)
        except PacaError as error:
            failure = error
    warning = None
    if failure is not None:
        lengths = f"the examples could not be read ({first_line(failure)})"
        warning = f"The length is that of train.max_length: {lengths}. Mend that, or give the longest one's (--seq)."
        if kind.counts == "images":
            warning = f"The head is planned with two labels: {lengths}. Mend that."
    if kind.name == "grpo" and longest is None and sequence_length is None:
        raise PacaError(f"How long the prompts are is not known: {lengths}. Give --seq, prompt and answer together.")
    if longest is None and failure is not None and config.train.get("max_length") is None:
        raise PacaError(f"train.max_length is null, and {lengths}. Mend that, or give --seq.")
    setting = setting_of_run(config, device, longest, different)
    if lengths is not None and longest is None:
        lengths = f"train.max_length: {lengths}"
    elif longest is not None and setting.sequence_length < longest:
        lengths = f"train.max_length, which cuts {lengths}"
    if labels is not None:
        train_heads(config, outline)
    adapter = outline_config(config.method, config.adapter, kind.task_type)
    if adapter is not None:
        check_learned_tokens(adapter, outline)
    return Target(
        str(path),
        outline,
        adapter,
        setting,
        lengths,
        warning,
        typical,
        _steps(config, kind, data, held_out),
        checkpointing_key="activation_checkpointing" if newer else "gradient_checkpointing",
        counts=kind.counts,
        before=told_of_pass(config),
    )


def _read(config: RunConfig, kind: TrainerKind) -> tuple[RunData | None, str | None]:
    """The training data; else None, and why it was not read: it is not in local files, is large, or is packed.
    PacaError where it is here and can't be read."""
    if config.train.get("packing"):
        return None, "packed sequences are filled up"
    if (unread := _unread(config)) is not None:
        return None, unread
    return kind.read(config), None


def _steps(config: RunConfig, kind: TrainerKind, data: RunData | None, held_out: str | float | None) -> int | None:
    """Optimizer steps of the run in one process; None where its data was not read and it does not say how many."""
    settings = config.train
    if settings.get("max_steps", -1) > 0:
        return int(settings["max_steps"])
    if data is None:
        return None
    examples = data.train
    if isinstance(held_out, float | int):
        examples, _ = split_heldout(examples, held_out, seed=0)
    return kind.steps(len(examples.dataset), settings, processes=1)


def _lengths_of(config: RunConfig, kind: TrainerKind, data: RunData) -> tuple[int, int, int, str]:
    """Tokens of the longest example before it is cut, those that a batch is padded to on average once examples are, how
    many different lengths batches may have, and where that is from, for people. PacaError where the examples can't be
    read as tokens.
    """
    sample = kind.shape(config, data, whole=False).sample
    assert sample is not None
    longest, which = sample.longest_learned, "the longest example"
    if kind.name == "sft":
        longest = max(longest, _longest(config, data.train))
    elif sample.sampled < sample.examples:
        which = f"the longest of {sample.sampled:,} examples"
    made = config.train["max_completion_length"] if kind.name == "grpo" else 0
    longest, beside = longest + made, f", with an answer of {made} tokens" if made else ""
    cut = min(longest, config.train.get("max_length") or longest)
    different = min(sample.examples, max(1, cut - sample.shortest + 1))
    return longest, round(sample.padded) + made, different, f"{which} of {config.data.named}{beside}"


def _longest(config: RunConfig, examples: Examples) -> int:
    """Tokens before it is cut of the longest of those with the most characters that the run learns from; 0 if none."""
    tokenizer, everything = tokenizer_of(config), trains_everything(config, examples)
    template, settings = training_template(tokenizer), config.train
    most = heapq.nlargest(TOKENIZED, (dict(row) for row in examples.dataset), key=_characters)
    found = [encode(one, tokenizer, everything=everything, template=template) for one in most]
    if config.data.unusable == "leave_out":
        stays = what_stays(settings.get("max_length"), keep_end=settings.get("truncation_mode") == "keep_end")
        found = [tokens for tokens in found if any(label != IGNORED for label in tokens.labels[stays][1:])]
    return max((len(tokens.ids) for tokens in found), default=0)


def _unread(config: RunConfig) -> str | None:
    """Why the training data is not read for a plan: it may take long."""
    size = 0
    for name in config.data.sources:
        source = Path(name).expanduser()
        files = [source] if source.is_file() else sorted(source.rglob("*")) if source.is_dir() else []
        if not files:
            return f"{name} is not a local file, so it was not read"
        size += sum(file.stat().st_size for file in files if file.is_file())
    return f"{config.data.named} has {format_bytes(size)}, so it was not read" if size > READ_AT_MOST else None


def _characters(example: dict[str, Any]) -> int:
    return sum(
        len(value) if isinstance(value, str) else len(json.dumps(value, ensure_ascii=False, default=str))
        for name, value in example.items()
        if name in ("text", "prompt", "completion", "messages", "tools")
    )
