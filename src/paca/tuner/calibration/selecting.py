"""``paca.select``: the columns of every target layer, found before the adapter is put in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from paca.columns.selection import FROM_BATCHES, select_columns
from paca.config import PacaConfig
from paca.tuner.calibration.batches import Batch
from paca.tuner.calibration.observers import Observer
from paca.tuner.calibration.targets import Target, find_targets
from paca.tuner.calibration.unchanged import left_as_it_was
from paca.tuner.column_choice import choose_columns, given_columns, rank_of

Loss = Callable[[Any, Any], Tensor]


def select(
    model: nn.Module,
    config: PacaConfig,
    batches: Iterable[Any] | None = None,
    progress: Console | bool | None = None,
    *,
    loss: Loss | None = None,
) -> PacaConfig:
    """Choose the columns that ``config.selection`` asks for, from the model's weights or from calibration batches.

    The model is run in evaluation mode and left as it was: weights, modes, gradients, hooks and random generators.
    Tokens that an ``attention_mask`` marks as padding do not count.

    Args:
        model: as it will be given to ``peft.get_peft_model``.
        config: what to select, and for which layers. Columns that its ``indices`` give are kept.
        batches: for ``"activation_norm"``, ``"activation_variance"`` and ``"gradient_norm"``: mappings of the model's
            keyword arguments, tensors, or tuples of positional arguments (a target after them is left out). A few
            hundred short sequences are plenty. They are gone through once.
        progress: where progress is shown; True and False are standard error and nowhere. Default: standard error if
            that is a terminal.
        loss: for ``"gradient_norm"``, ``(output, batch) -> scalar``. Default: the loss that the model returns; a causal
            language model without labels learns its input.

    Returns:
        A copy of ``config`` whose ``indices`` list the columns of every target layer by its full name.

    Raises:
        ValueError: for a rank above a layer's columns, columns that are not there or given twice, targets that can't be
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
    for key, target in targets.items():
        if key in scores:
            r = rank_of(selected, key)
            chosen = select_columns(
                selected.selection, r, in_features=target.in_features, scores=scores[key], module_name=key
            )
        else:
            chosen = choose_columns(selected, target.module, target.in_features, key)
        columns[key] = chosen.tolist()
    return with_indices(selected, columns)


def with_indices(config: PacaConfig, indices: dict[str, list[int]] | None) -> PacaConfig:
    """A copy of ``config`` with other ``indices``, that targets the same layers."""
    selected = copy.deepcopy(config)
    if selected.target_modules is None and not selected.target_parameters and not selected.indices:
        selected.target_modules = "all-linear"  # the default, which indices would be taken to narrow
    selected.indices = indices
    return selected


def collect_scores(
    model: nn.Module,
    targets: dict[str, Target],
    strategy: str,
    batches: Iterable[Any] | None,
    progress: Console | bool | None = None,
    loss: Loss | None = None,
) -> dict[str, Tensor]:
    """What ``strategy`` ranks the columns of each target by, ``(in_features,)`` each.

    Args:
        model: holds the targets, and is run.
        targets: from ``find_targets``.
        strategy: one of ``paca.selection.FROM_BATCHES``.
        batches: as in :func:`select`.
        progress: as in :func:`select`.
        loss: as in :func:`select`.

    Raises:
        ValueError: as in :func:`select`.
    """
    stacks = [key for key, target in targets.items() if target.is_parameter]
    if stacks:
        raise ValueError(
            f"{stacks[0]} is a stack of experts, for which selection={strategy!r} is not there: which rows of it are "
            "padding is known to the router alone. Use selection='weight_norm' or 'random', or list its columns in "
            "indices."
        )
    if batches is None:
        raise ValueError(
            f"selection={strategy!r} chooses columns by what batches of data show: call paca.select(model, config, "
            "batches) with some."
        )
    observers = [Observer(key, t.module, t.in_features, strategy) for key, t in targets.items()]
    with ExitStack() as stack:
        stack.enter_context(left_as_it_was(model, freeze=strategy == "gradient_norm"))
        run: _ForwardPasses
        if strategy == "gradient_norm":
            run = _BackwardPasses(model, observers, loss, stack)
        else:
            run = _ForwardPasses(model, observers, stack)
        number = 0
        for number, content in enumerate(_shown(batches, progress), 1):
            run(content, number)
        if number == 0:
            raise ValueError(f"selection={strategy!r} needs batches, and there was none in those that were given.")
    return {observer.key: observer.scores() for observer in observers}


class _ForwardPasses:
    """Runs batches forward, for strategies about activations."""

    def __init__(self, model: nn.Module, observers: list[Observer], stack: ExitStack) -> None:
        self.model, self.observers = model, observers
        for observer in observers:
            handle = observer.module.register_forward_hook(self._hook(observer), with_kwargs=True)
            stack.callback(handle.remove)

    def _hook(self, observer: Observer) -> Any:
        return observer.see_forward

    def __call__(self, content: Any, number: int) -> None:
        batch = Batch(content, self.model, number)
        before = sum(observer.count for observer in self.observers)
        for observer in self.observers:
            observer.padding = batch.padding
        self._pass(batch, content)
        if sum(observer.count for observer in self.observers) == before:
            raise ValueError(f"Batch {number} gives no tokens: none reached any of the {len(self.observers)} targets.")

    def _pass(self, batch: Batch, content: Any) -> None:
        with torch.no_grad():
            self.model(*batch.args, **batch.kwargs)


class _BackwardPasses(_ForwardPasses):
    """Runs batches forward and backward, with gradients of activations only."""

    def __init__(self, model: nn.Module, observers: list[Observer], loss: Loss | None, stack: ExitStack) -> None:
        self.loss = loss
        self.anchor = torch.zeros((), requires_grad=True)
        super().__init__(model, observers, stack)

    def _hook(self, observer: Observer) -> Any:
        return observer.watch_backward(self.anchor)

    def _pass(self, batch: Batch, content: Any) -> None:
        if self.loss is None:
            batch.add_labels(self.model)
        with torch.enable_grad():
            output = self.model(*batch.args, **batch.kwargs)
            value = batch.loss_of(output) if self.loss is None else self.loss(output, content)
        if not bool(value.detach().isfinite()):
            raise ValueError(
                f"Batch {batch.number}: its loss is {float(value.detach())}, so there is no gradient to go by. Are all "
                "its labels -100, or does the model overflow on it?"
            )
        if not value.requires_grad:
            raise ValueError(
                f"Batch {batch.number}: its loss does not depend on the target layers, or the model computes it "
                "without gradients, so that gradient_norm has none to go by."
            )
        value.backward()


def _shown(batches: Iterable[Any], progress: Console | bool | None) -> Iterable[Any]:
    console = progress if isinstance(progress, Console) else Console(stderr=True)
    if progress is False or (progress is not True and not console.is_terminal) or console.quiet:
        return batches
    total = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    return track(batches, "Choosing columns", total, console=console, transient=True)
