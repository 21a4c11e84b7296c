"""`paca.select`: the columns of every target layer, found before the adapter is put in. Batches run through the model,
which is left as it was.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from paca.columns.scores import select_columns
from paca.columns.selection import FROM_BATCHES
from paca.config import PacaConfig
from paca.layers.overlaid_weight import OverlaidWeight
from paca.quantized import quantization_of
from paca.tuner.calibration.batches import Batch, loss_of
from paca.tuner.calibration.observers import Observer
from paca.tuner.calibration.targets import Target, find_targets
from paca.tuner.column_choice import choose_columns, for_layer, given_columns

Loss = Callable[[Any, Any], Tensor]


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
            r = for_layer(key, selected.rank_pattern, selected.r)
            columns[key] = select_columns(selected.selection, r, scores[key], key).tolist()
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


def collect_scores(
    model: nn.Module,
    targets: dict[str, Target],
    strategy: str,
    batches: Iterable[Any] | None,
    progress: Console | bool | None = None,
    loss: Loss | None = None,
) -> dict[str, Tensor]:
    """What `strategy`, one of `FROM_BATCHES`, ranks the columns of each target by, `(in_features,)` each.

    The rest is as in `select`.
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
    gradients, anchor, number = strategy == "gradient_norm", torch.zeros((), requires_grad=True), 0
    with ExitStack() as stack:
        stack.enter_context(left_as_it_was(model, freeze=gradients))
        for observer in observers:
            hook = partial(observer.watch_backward, anchor) if gradients else observer.see_forward
            stack.callback(observer.module.register_forward_hook(hook, with_kwargs=True).remove)
        for number, content in enumerate(_shown(batches, progress), 1):
            batch = Batch(content, model, number)
            before = sum(observer.count for observer in observers)
            for observer in observers:
                observer.real = batch.real
            if gradients:
                _run_backward(model, batch, loss)
            else:
                with torch.no_grad():
                    model(*batch.args, **batch.kwargs)
            if sum(observer.count for observer in observers) == before:
                raise ValueError(f"Batch {number} gives no tokens: none reached any of the {len(observers)} targets.")
    if number == 0:
        raise ValueError(f"selection={strategy!r} needs batches, and there was none in those that were given.")
    return {observer.key: observer.scores() for observer in observers}


def _run_backward(model: nn.Module, batch: Batch, loss: Loss | None) -> None:
    if loss is None:
        batch.add_labels(model)
    with torch.enable_grad():
        output = model(*batch.args, **batch.kwargs)
        value = loss_of(output) if loss is None else loss(output, batch.content)
    if not bool(value.detach().isfinite()):
        raise ValueError(
            f"Batch {batch.number}: its loss is {float(value.detach())}, so there is no gradient to go by. Are all its "
            "labels -100, or does the model overflow on it?"
        )
    if not value.requires_grad:
        raise ValueError(
            f"Batch {batch.number}: its loss does not depend on the target layers, or the model computes it without "
            "gradients, so that gradient_norm has none to go by."
        )
    value.backward()


@contextmanager
def left_as_it_was(model: nn.Module, *, freeze: bool) -> Iterator[None]:
    """Run `model` in evaluation mode, none of its parameters requiring grad if `freeze`.

    Its modes, what requires grad, and all random generators are put back.
    """
    training = [(module, module.training) for module in model.modules()]
    requiring = [p for p in model.parameters() if p.requires_grad] if freeze else []
    # In evaluation mode some quantized layers repack their weight, into a form without a backward pass.
    quantized = [(q, m) for m in model.modules() if not isinstance(m, OverlaidWeight) and (q := quantization_of(m))]
    python, numpy = random.getstate(), np.random.get_state()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices):
            for quantization, module in quantized:
                quantization.adopt(module)
            model.eval()
            for parameter in requiring:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter in requiring:
            parameter.requires_grad_(True)
        for quantization, module in quantized:
            quantization.release(module)
        for module, mode in training:
            module.training = mode
        random.setstate(python)
        np.random.set_state(numpy)


def _shown(batches: Iterable[Any], progress: Console | bool | None) -> Iterable[Any]:
    console = progress if isinstance(progress, Console) else Console(stderr=True)
    if progress is False or (progress is not True and not console.is_terminal) or console.quiet:
        return batches
    return track(batches, "Choosing columns", console=console, transient=True)
