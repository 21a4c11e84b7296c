"""Values swapped through `.data` around an evaluation are seen whichever way, and in whichever thread, layers run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import paca
from quantized_layers import Stack, stack

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))


def whole(model: Any) -> Tensor:
    return model(X)


def parts(model: Any) -> Tensor:
    base = model.get_base_model()
    return base.lin2(torch.tanh(base.lin1(X)))


def in_a_thread(model: Any) -> Tensor:
    def run() -> Tensor:
        with torch.no_grad():
            return model(X)

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(run).result()


def made(kind: str) -> Any:
    torch.manual_seed(0)
    base = Stack() if kind == "plain" else stack(kind, dtype=torch.float32)
    model = peft.get_peft_model(base, paca.PacaConfig(target_modules=["lin1", "lin2"], r=8))
    for number, delta in enumerate(trained(model)):
        nn.init.normal_(delta, std=0.05, generator=torch.Generator().manual_seed(number))
    return model


def trained(model: Any) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def anew(model: Any, way: Callable[[Any], Tensor]) -> Tensor:
    twin = copy.deepcopy(model)
    paca.refresh(twin)
    return way(twin)


@contextmanager
def averages_in(model: Any, averages: list[Tensor]) -> Iterator[None]:
    kept = [delta.detach().clone() for delta in trained(model)]
    for delta, average in zip(trained(model), averages, strict=True):
        delta.data.copy_(average)
    model.eval()
    with torch.no_grad():
        yield
    model.train()
    for delta, its in zip(trained(model), kept, strict=True):
        delta.data.copy_(its)


@pytest.mark.parametrize("kind", ["plain", "nf4"])
@pytest.mark.parametrize(
    ("training", "evaluating"),
    [(whole, parts), (parts, whole), (parts, parts), (whole, in_a_thread)],
    ids=["model, then layers", "layers, then model", "layers", "model in a thread"],
)
def test_averages_that_are_swapped_in_are_seen(
    kind: str, training: Callable[[Any], Tensor], evaluating: Callable[[Any], Tensor]
) -> None:
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    model = made(kind)
    optimizer = torch.optim.AdamW(trained(model), lr=0.02, fused=True)
    averages = [delta.detach().clone() for delta in trained(model)]
    for _ in range(3):
        output = training(model)
        torch.testing.assert_close(output, anew(model, training))
        optimizer.zero_grad()
        output.square().sum().backward()
        optimizer.step()
        for average, delta in zip(averages, trained(model), strict=True):
            average.lerp_(delta.detach(), 0.3)
        with averages_in(model, averages):
            torch.testing.assert_close(evaluating(model), anew(model, whole))


def test_layers_that_go_on_alone_in_one_mode_are_not_compared_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("plain")
    whole(model)
    with torch.no_grad():
        parts(model)
        compared: list[Any] = []
        layer = model.get_base_model().lin1
        write = type(layer).write
        monkeypatch.setattr(
            type(layer),
            "write",
            lambda self, *, compare=False: compared.append(compare) or write(self, compare=compare),
        )
        for _ in range(3):
            parts(model)
    assert compared == []
    parts(model)
    assert compared == [True, True]


def test_layers_that_run_alone_in_a_new_thread_find_a_write() -> None:
    model = made("plain").eval()

    def infer() -> Tensor:
        with torch.no_grad():
            return parts(model)

    for _ in range(3):  # a thread gets the number of one that has ended
        with ThreadPoolExecutor(1) as executor:
            executor.submit(infer).result()
        for delta in trained(model):
            delta.data.add_(0.1)
        with ThreadPoolExecutor(1) as executor:
            found = executor.submit(infer).result()
        torch.testing.assert_close(found, anew(model, whole))
