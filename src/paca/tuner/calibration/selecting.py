"""`paca.select`: the columns of every target layer, found before the adapter is put in."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from paca.columns.scores import select_columns
from paca.columns.selection import FROM_BATCHES
from paca.config import PacaConfig
from paca.tuner.calibration.scores import Loss, collect_scores
from paca.tuner.calibration.targets import find_targets
from paca.tuner.column_choice import choose_columns, given_columns, rank_of


def select(
    model: nn.Module,
    config: PacaConfig,
    batches: Iterable[Any] | None = None,
    progress: Console | bool | None = None,
    *,
    loss: Loss | None = None,
) -> PacaConfig:
    """Choose the columns that `config.selection` asks for, from the model's weights or from calibration batches.

    The model is run in evaluation mode and left as it was: weights, modes, gradients, hooks and random generators.
    Tokens that an `attention_mask` marks as padding do not count.

    Args:
        model: As it will be given to `peft.get_peft_model`.
        config: What to select, and for which layers. Columns that its `indices` give are kept.
        batches: For `"activation_norm"`, `"activation_variance"` and `"gradient_norm"`: mappings of the model's keyword
            arguments, tensors, or tuples of positional arguments (a target after them is left out). A few hundred short
            sequences are plenty. They are gone through once.
        progress: Where progress is shown; True and False are standard error and nowhere. Default: standard error if
            that is a terminal.
        loss: For `"gradient_norm"`, `(output, batch) -> scalar`. Default: the loss that the model returns; a causal
            language model without labels learns its input.

    Returns:
        A copy of `config` whose `indices` list the columns of every target layer by its full name.

    Raises:
        ValueError: For a rank above a layer's columns, columns that are not there or given twice, targets that can't be
            adapted, no batches where they are needed, a batch without tokens, or statistics that are not finite.
    """
    if not isinstance(config, PacaConfig):
        raise TypeError(f"paca.select needs a paca.PacaConfig; got a {type(config).__name__}.")
    selected = with_indices(config, config.indices)
    targets = find_targets(model, selected)
    scores: dict[str, Tensor] = {}
    if selected.selection in FROM_BATCHES:
        wanted = {k: t for k, t in targets.items() if given_columns(selected, t.in_features, k) is None}
        if wanted:
            scores = collect_scores(model, wanted, selected.selection, batches, progress, loss)
    columns = {}
    for key, (module, in_features, _) in targets.items():
        if key in scores:
            columns[key] = select_columns(selected.selection, rank_of(selected, key), scores[key], key).tolist()
        else:
            columns[key] = choose_columns(selected, module, in_features, key).tolist()
    return with_indices(selected, columns)


def with_indices(config: PacaConfig, indices: dict[str, list[int]] | None) -> PacaConfig:
    """A copy of `config` with other `indices`, that targets the same layers."""
    selected = copy.deepcopy(config)
    if selected.target_modules is None and not selected.target_parameters and not selected.indices:
        selected.target_modules = "all-linear"  # the default, which indices would be taken to narrow
    selected.indices = indices
    return selected
