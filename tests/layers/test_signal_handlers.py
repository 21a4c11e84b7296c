"""A signal's handler that uses the adapted model: it runs within whatever it interrupts, at any line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import paca
from models import adapt, perceptron

STOCK = {name: value.clone() for name, value in perceptron(seed=0).state_dict().items()}
LAYERS = ("lin1", "lin2")
X = torch.randn(4, 7, generator=torch.Generator().manual_seed(3))


def adapted() -> Any:
    model = adapt(perceptron(seed=0), target_modules=list(LAYERS))
    config = paca.PacaConfig(
        r=2, paca_alpha=4, init_weights=False, selection="random", random_seed=5, target_modules=list(LAYERS)
    )
    model.add_adapter("other", config)
    model.set_adapter("default")
    return model


def stepped(model: Any) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(X).pow(2).sum().backward()
    optimizer.step()


def switched(model: Any) -> None:
    model.set_adapter("other")
    model.set_adapter("default")


def merged(model: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def disabled(model: Any) -> None:
    with model.disable_adapter(), torch.no_grad():
        model(X)


def passed(model: Any) -> None:
    with torch.no_grad():
        model(X)


OPERATIONS = {"step": stepped, "switch": switched, "merge": merged, "disable": disabled,
              "state dict": lambda model: model.state_dict()}  # fmt: skip


def interrupt(model: Any, operation: Callable[[Any], Any], at: int, handler: Callable[[Any], Any]) -> int:
    """Run `handler` at the `at`-th line of paca's in `operation`. What a handler raises there it catches itself, as one
    that logs it does, if paca says that it came into a write. Gives the number of lines."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        if "/paca/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            lines += 1
            if lines == at:
                try:
                    handler(model)
                except RuntimeError as error:
                    if "A signal's handler" not in str(error):
                        raise
        return trace

    sys.settrace(trace)
    try:
        operation(model)
    except RuntimeError as error:  # a state dict within a backward pass
        if "wrote other columns into a weight in the middle" not in str(error):
            raise
    finally:
        sys.settrace(None)
    return lines


def expected(model: Any) -> torch.Tensor:
    plain = perceptron(seed=0)
    with torch.no_grad():
        for name in LAYERS:
            layer = model.base_model.model.get_submodule(name)
            delta = layer.scaling["default"] * layer.paca_delta["default"]
            plain.get_submodule(name).weight[:, layer.paca_indices["default"]] += delta
        return plain(X)


@pytest.mark.parametrize("handler", ["pass", "state dict"])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_a_handler_at_any_line_changes_no_output_and_no_pretrained_weight(name: str, handler: str) -> None:
    held: list[dict[str, torch.Tensor]] = []
    handlers = {"pass": passed, "state dict": lambda model: held.append(model.state_dict())}
    lines = interrupt(adapted(), OPERATIONS[name], -1, passed)
    assert lines > 150
    for at in range(1, lines, 13):
        model, held[:] = adapted(), []
        if at % 2:  # the weights hold columns, and the model's look finds nothing to write
            stepped(model)
        interrupt(model, OPERATIONS[name], at, handlers[handler])
        with torch.no_grad():
            torch.testing.assert_close(model(X), expected(model), msg=f"line {at}")
        for layer in LAYERS:
            for found in held if name != "merge" else []:  # one that is taken of merged weights holds these
                assert torch.equal(found[f"base_model.model.{layer}.base_layer.weight"], STOCK[f"{layer}.weight"]), at
            with model.disable_adapter():
                weight = model.base_model.model.get_submodule(layer).base_layer.weight
                assert torch.equal(weight, STOCK[f"{layer}.weight"]), f"line {at}"


@pytest.mark.slow(reason="tries many cases")
def test_a_handler_that_unmerges_within_a_merge_loses_nothing() -> None:
    lines = interrupt(adapted(), merged, -1, passed)
    for at in range(1, lines, 5):
        model = adapted()
        interrupt(model, merged, at, disabled)
        model.set_adapter("default")
        for layer in nn.ModuleList([model]).modules():
            if hasattr(layer, "_disable_adapters"):
                layer.enable_adapters(True)  # where the handler was refused in the middle
        with model.disable_adapter():
            for layer in LAYERS:
                weight = model.base_model.model.get_submodule(layer).base_layer.weight
                assert torch.equal(weight, STOCK[f"{layer}.weight"]), f"line {at}"
