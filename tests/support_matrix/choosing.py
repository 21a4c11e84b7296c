"""Operations about which columns are trained: chosen by the model and by batches, and changed while training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn

import paca
from support_matrix.case import Case, close, run, weight_of
from tuner.calibration.naive import best


def by_weight(case: Case) -> None:
    """`weight_norm`: the columns with the largest norms in the unquantized weights."""
    plain = case.subject.plain()
    want = {}
    for name in case.layers():
        weight = weight_of(plain, name).detach().double()
        want[name] = best(weight.movedim(case.subject.column_dim, -1).flatten(0, -2).norm(dim=0), 2)
    config = _config(case, "weight_norm")
    assert paca.select(case.subject.base(case.folder / "again"), config).indices == want
    adapted = peft.get_peft_model(case.subject.base(case.folder / "third"), config)
    assert {n: layer.paca_indices["default"].tolist() for n, layer in case.layers(adapted).items()} == want


def by_activations(case: Case) -> None:
    """`activation_norm` and `activation_variance`: the columns whose inputs are largest, and vary most; the model
    stays as it was."""
    _by_batches(case, ("activation_norm", "activation_variance"), _largest_inputs)


def by_gradients(case: Case) -> None:
    """`gradient_norm`: the columns with the largest gradients in the unquantized weight; the model stays as it was."""
    _by_batches(case, ("gradient_norm",), _largest_gradients)


def _config(case: Case, selection: str) -> paca.PacaConfig:
    return paca.PacaConfig(**{**case.subject.targets, "r": 2, "selection": selection})


def _by_batches(case: Case, strategies: tuple[str, ...], reference: Callable[..., dict[str, list[int]]]) -> None:
    base = case.subject.base(case.folder / "again").train(case.subject.stock_training)
    before = run(base, case.x).detach()
    batches = [case.x[:2], case.x[2:]]
    for strategy in strategies:
        config = _config(case, strategy)
        chosen = paca.select(base, config, batches, progress=False, loss=_loss)
        assert chosen.indices == reference(case, strategy, batches)
    assert torch.equal(run(base, case.x), before)
    adapted = peft.get_peft_model(base, chosen)
    assert {n: layer.paca_indices["default"].tolist() for n, layer in case.layers(adapted).items()} == chosen.indices


def _loss(output: Any, batch: Any) -> Tensor:
    return getattr(output, "logits", output).square().mean()


def _largest_inputs(case: Case, strategy: str, batches: list[Tensor]) -> dict[str, list[int]]:
    plain = case.subject.plain().double()
    rows: dict[str, list[Tensor]] = {name: [] for name in case.layers()}
    for name, kept in rows.items():
        module = plain.get_submodule(name)
        channels = getattr(module, "in_channels", 0) // getattr(module, "groups", 1)

        def see(module: nn.Module, args: Any, y: Tensor, kept: Any = kept, channels: int = channels) -> None:
            if isinstance(module, nn.Embedding):
                kept.append(y.flatten(0, -2))
            elif channels:
                kept.append(args[0].movedim(1, -1).reshape(-1, channels))
            else:
                kept.append(args[0].flatten(0, -2))

        module.register_forward_hook(see)
    with torch.no_grad():
        for x in batches:
            run(plain, x.double() if x.is_floating_point() else x)
    scores = {name: torch.cat(kept) for name, kept in rows.items()}
    return {
        name: best(x.norm(dim=0) if strategy == "activation_norm" else x.var(0, correction=0), 2)
        for name, x in scores.items()
    }


def _largest_gradients(case: Case, strategy: str, batches: list[Tensor]) -> dict[str, list[int]]:
    plain = case.subject.plain().double().requires_grad_(False)
    weights = {name: weight_of(plain, name).requires_grad_() for name in case.layers()}
    squares: dict[str, Any] = dict.fromkeys(weights, 0)
    for x in batches:
        with torch.enable_grad():
            _loss(plain(x.double() if x.is_floating_point() else x), x).backward()
        for name, weight in weights.items():
            assert weight.grad is not None
            columns = weight.grad.movedim(case.subject.column_dim, -1).flatten(0, -2)
            squares[name] = squares[name] + columns.square().sum(0)
            weight.grad = None
    return {name: best(square, 2) for name, square in squares.items()}


def rotate(case: Case) -> None:
    """`paca.rotate`: the output stays bit for bit, other columns are trained, and the saved adapter has all of them."""
    model, x = case.model, case.x
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    seen: dict[str, set[int]] = {name: set() for name in case.layers()}
    for number in range(1, 4):
        before = paca.trained_columns(model)
        run(model, x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        want = run(model, x).detach()
        for name, columns in before.items():
            seen[name] |= set(columns)
        if number < 3:
            paca.rotate(model, optimizer, number)
            assert torch.equal(run(model, x), want)
            assert paca.trained_columns(model) != before
    model.save_pretrained(case.folder / "union")
    base = case.subject.base(case.folder / "again")
    again = peft.PeftModel.from_pretrained(base, case.folder / "union", **case.subject.loading(case.folder)).eval()
    assert {n: set(layer.paca_indices["default"].tolist()) for n, layer in case.layers(again).items()} == seen
    close(run(again, x), want)
