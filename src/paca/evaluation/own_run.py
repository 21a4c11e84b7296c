"""The held-out data of a finished run, or other data, as a task: its base and its adapter beside each other."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paca.data import Examples
from paca.data.evenly import spread_evenly
from paca.data.overlap import shared
from paca.data.recognition import LacksColumns
from paca.evaluation.identity import identity
from paca.evaluation.kept_lines import KeptAnswers
from paca.evaluation.labelled import measure_labels
from paca.evaluation.own_data import Measurement, Score, measure, scorer
from paca.evaluation.side_by_side import Row
from paca.evaluation.sides import ADAPTER, BASE, Watcher, sides_of
from paca.evaluation.statistics import Mean, as_numbers, ratio_with_error
from paca.messages.errors import PacaError, about
from paca.pretrained.adapter_folder import find_adapter, find_dtype
from paca.pretrained.bounded_template import check_template_ends
from paca.pretrained.conversation import answering
from paca.pretrained.generation import LoadedModel, load_for_generation, load_saved
from paca.pretrained.purpose import classifier_in, listed
from paca.pretrained.whole_output import write_whole
from paca.training.config.config_file import config_without_run, load_run_config
from paca.training.config.run_config import RunConfig
from paca.training.config.strict_yaml import read_yaml
from paca.training.folder.run_folder import RunFolder
from paca.training.folder.same_run import inputs_of
from paca.training.trainers import trainer_kind
from paca.training.trainers.classification import Classification, numbered
from paca.training.trainers.sft import Sft

_DIGITS = 32
"""Of the hash of one part of the data."""
_TEXT = "text"
"""The form of data without prompts."""


def config_of_run(
    path: str | Path,
    data: str | None = None,
    columns: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """The config of a run whose held-out data can be measured.

    Args:
        path: Folder of the run; with `data` also an adapter or a model that no run left, whose loss is measured.
        data: A file, a folder of images or a hub id to measure on in place of its `data.eval`, all of it.
        columns: Of `data`, in place of the run's `data.columns`: names that a form knows, each with the data's own.
        overrides: `"eval.key=value"` each.

    Raises:
        PacaError: It is no folder of a run, or the run is of another kind, or the run had no held-out data.
    """
    file, named = RunFolder(Path(path)).config, dict(columns) if columns else None
    if data is not None and not file.is_file():
        if classifier_in(path) is not None:
            raise PacaError(f"{path} is a classifier, which --data measures by its run: give that folder.")
        return config_without_run(str(path), data, named, overrides)
    other = [] if data is None else [f"data.eval={json.dumps(data)}", "eval.limit=null"]
    other += [] if named is None else [f"data.columns={json.dumps(named)}"]
    if any(re.match(r"\s*eval\.metric\s*=(?!\s*exact_match\s*$)", one) for one in overrides):
        other.append("eval.answer_pattern=null")  # the run's own goes with its own metric
    config = _config_in(path, [*other, *overrides])
    kind = trainer_kind(config.train)
    if not isinstance(kind, Sft | Classification):
        instead = " Give --tasks or --mt-bench." if kind.task_type == "CAUSAL_LM" else ""
        raise PacaError(
            f"{path} is a run of train.trainer: {kind.name}, whose answers paca evaluate does not compare with data. "
            f"What training measured is in {RunFolder(Path(path)).summary}.{instead}"
        )
    if config.data.eval is None:
        instead = "--data" if isinstance(kind, Classification) else "--data, --tasks or --mt-bench"
        raise PacaError(f"{path} was trained without held-out data (data.eval). Give {instead}.")
    return config


def _config_in(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a run, with the model that it unpacked where the GGUF file that this is from is gone, and without
    the adapter that it trained on from: what that decided is in the config, and its tokenizer beside the run's own."""
    folder = RunFolder(Path(path))
    config = load_run_config(folder.config, ["model.adapter=null", *overrides])
    model = config.model
    if folder.base.is_dir() and not Path(model.name).expanduser().exists():
        model = dataclasses.replace(model, name=str(folder.base))
    if model.tokenizer is None and read_yaml(folder.config)[0]["model"].get("adapter") is not None:
        model = dataclasses.replace(model, tokenizer=str(folder.adapter))
    return dataclasses.replace(config, model=model)


def load_run(path: str | Path, config: RunConfig, base_model: str | None = None) -> LoadedModel:
    """The model of a run, ready to be measured.

    Raises:
        PacaError: It can't be loaded, or its chat template does not end.
    """
    if isinstance(trainer_kind(config.train), Classification):
        return load_saved(path, base_model=base_model, dtype=find_dtype(find_adapter(path)))
    loaded = load_for_generation(path, base_model=base_model)
    check_template_ends(loaded.tokenizer)
    return loaded


def metric_of(config: RunConfig) -> str:
    """What is measured first."""
    return config.eval.metric or trainer_kind(config.train).score or "loss"


def other_data(path: str | Path, config: RunConfig, *, columns_given: bool = False) -> Examples:
    """Data that a run is measured on in place of its own, which need not be there. It is recognised where it is not of
    the run's `data.format`. With `columns_given` its `data.columns` are of this data, which has to have each.

    Raises:
        PacaError: It can't be read, or an example has a label that the model does not know.
    """
    kind, data = trainer_kind(config.train), config.data
    assert isinstance(kind, Sft | Classification)
    assert isinstance(data.eval, str)
    classifier = classifier_in(path)
    with about("--data"):
        try:
            examples = kind.loader(config, held_out=not columns_given)(data.eval, split=data.eval_split)
        except LacksColumns:
            free = dataclasses.replace(config, data=dataclasses.replace(data, format=None))
            examples = kind.loader(free, held_out=not columns_given)(data.eval, split=data.eval_split)
        return examples if classifier is None else numbered(examples, classifier.labels)


def other_form(path: str | Path, other: Examples, metric: str) -> str | None:
    """What to say of `other_data` of which other tokens are scored than the run was trained on; None of a run whose
    summary does not say, and where a `metric` counts no tokens."""
    if not RunFolder(Path(path)).finished() or metric not in ("loss", "token_accuracy"):
        return None
    before, now = RunFolder(Path(path)).read_summary()["data"].get("format"), other.format
    if before is None or (before == _TEXT) == (now == _TEXT):
        return None
    scored = "every token of its texts" if now == _TEXT else "its answers alone"
    return f"The run was trained on data of the form {before}. This is of the form {now}: {scored} will be scored."


def trained_on(path: str | Path, other: Examples) -> str | None:
    """What to say of `other_data` that is trained on as well, as far as that is found: not on the hub."""
    if not RunFolder(Path(path)).config.is_file():
        return None
    config = _config_in(path)
    if not all(map(os.path.exists, config.data.sources)):
        return None
    try:
        count = shared(trainer_kind(config.train).read(config).train.dataset, other.dataset)
    except PacaError:
        return None  # as where the data is not what it was
    if not count:
        return None
    return (
        f"{count:,} of the {len(other.dataset):,} examples are in the run's training data: it has seen their answers."
    )


def has_turns(data: Examples) -> bool:
    """Whether an example may hold several answers: training counts all of them, what is measured here the last."""
    dataset = data.dataset
    if "messages" not in dataset.column_names:
        return False
    return any(sum(turn["role"] == "assistant" for turn in messages) > 1 for messages in dataset["messages"][:1000])


def held_out_of(path: str | Path, config: RunConfig, limit: int | None = None) -> tuple[Examples, str | None]:
    """A run's held-out data as it is now, and what to say of it if the run had other data.

    Args:
        path: Folder of the run.
        config: From `config_of_run`.
        limit: How many examples are wanted, where that may be more than its `eval.limit`.

    Raises:
        PacaError: It can't be read, or was split off from training data that is no longer the same: what was trained on
            might be among it; or a classifier's labels are not those that it was trained on.
    """
    kind = trainer_kind(config.train)
    data = kind.read(config)
    assert data.eval is not None
    classifier = classifier_in(path)
    if classifier is not None and classifier.labels != data.labels:
        raise PacaError(
            f"The labels in the data of {path} are {listed(data.labels or [])}. It was trained on others: "
            f"{listed(classifier.labels)}. Restore the data, or give other data: --data FILE."
        )
    before, now = RunFolder(Path(path)).recorded_inputs(), inputs_of(config, data.train, data.eval)
    held_out = data.eval
    if limit is not None and config.eval.limit is not None and limit > config.eval.limit:
        more = dataclasses.replace(config, eval=dataclasses.replace(config.eval, limit=limit))
        held_out = kind.read(more).eval or held_out
    if isinstance(config.data.eval, str):
        if before.get("data.eval", now["data.eval"]) == now["data.eval"]:
            return held_out, None
        return held_out, f"data.eval ({config.data.eval}) is not what it was in training: these are other examples."
    # Both parts of the split are in there, the training examples first; eval.limit changes the other one.
    if before.get("data.train", now["data.train"])[:_DIGITS] != now["data.train"][:_DIGITS]:
        raise PacaError(
            f"The held-out data of {path} was split off from data.train ({config.data.named}), whose content or split "
            "has changed: examples that it was trained on would be among it. Restore the data, or set data.eval in "
            f"{RunFolder(Path(path)).config} to a file of others."
        )
    return held_out, None


def evaluate_run(
    loaded: LoadedModel,
    config: RunConfig,
    held_out: Examples,
    limit: int | None,
    batch_size: int,
    output: Path | None,
    watcher: Watcher,
) -> dict[str, Score]:
    """Measure a run's `eval.metric` (the loss where it names none; of a classifier the accuracy) on held-out data.

    Args:
        loaded: The run's model.
        config: Of the run; see `config_of_run`.
        held_out: From `held_out_of` or `other_data`.
        limit: Only so many examples, spread evenly over them; else as many as `eval.limit` says.
        batch_size: Examples at a time.
        output: A folder, where answers are kept as they come, and those of an earlier, interrupted evaluation are
            used; None keeps nothing.
        watcher: Told how far it is.

    Returns:
        By side: `base` and `adapter`, or `model`. A classifier has no base: what gives labels is trained with it.

    Raises:
        PacaError: The data lacks what the metric needs.
    """
    dataset = spread_evenly(held_out.dataset, limit)
    if isinstance(trainer_kind(config.train), Classification):
        side = sides_of(loaded)[-1]
        kept = _kept(loaded, side, config.train.get("max_length"), output, watcher)
        some = dataclasses.replace(held_out, dataset=dataset)
        return {side: measure_labels(loaded, some, config, batch_size, kept)}
    measurement = dataclasses.replace(scorer(config.eval) or Measurement("loss"), batch_size=batch_size)
    measurement = dataclasses.replace(measurement, samples=output is not None)
    rows, cut = list(dataset), str(measurement.max_new_tokens)
    cut += "" if measurement.metric == "exact_match" else "-samples"  # which are shorter where the context is
    found = {}
    for side in sides_of(loaded):
        with answering(loaded, base=side == BASE):
            kept = _kept(loaded, side, cut, output, watcher)
            found[side] = measure(loaded.model, loaded.tokenizer, rows, measurement, kept)
    return found


def _kept(loaded: LoadedModel, side: str, cut: str | int | None, output: Path | None, watcher: Watcher) -> KeptAnswers:
    """In another file for each model, and for each length at which answers, or texts, are cut."""
    name = f"own_data-{side}-{identity(loaded, side)}-{cut}.jsonl"
    return KeptAnswers(side, watcher, None if output is None else output / "answers" / name)


def rows_of_run(scores: dict[str, Score], data: str = "held-out data") -> list[Row]:
    """For the table: every metric of what was measured on `data`, base and adapter beside each other."""
    first = next(iter(scores.values()))
    rows = []
    for name in first.sums:
        values = {side: score.means[name] for side, score in scores.items()}
        task = f"{data}, {first.examples:,} examples"
        of_tokens = name in ("loss", "token_accuracy")
        rows.append(Row(task, 0, name, values, _difference(scores, name), first.examples, of_tokens))
    return rows


def _difference(scores: dict[str, Score], name: str) -> Mean | None:
    """Adapter less base; both answered the same examples, so its error comes from the differences one by one."""
    if BASE not in scores:
        return None
    before, after = scores[BASE], scores[ADAPTER]
    pairs = zip(before.sums[name], after.sums[name], strict=True)
    return ratio_with_error([new - old for old, new in pairs], after.weights)


def write_scores(output: Path, scores: dict[str, Score], data: str) -> Path:
    """Write `own_data.json` in the folder `output`: which `data` it was, by side what `summary.json` says of a score,
    and the difference."""
    output.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"data": data, **{side: score.as_dict() for side, score in scores.items()}}
    if BASE in scores:
        found = {row.metric: row.difference for row in rows_of_run(scores) if row.difference is not None}
        content["difference"] = as_numbers(found)
    write_whole(output / "own_data.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return output / "own_data.json"
