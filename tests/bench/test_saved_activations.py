from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from paca.bench.saved_activations import measure_saved_activations


def frozen(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers).requires_grad_(False)


def test_counts_activations_and_leaves_parameters_out():
    module = frozen(nn.Linear(6, 5), nn.GELU())
    x = torch.randn(3, 6, requires_grad=True)
    saved = measure_saved_activations(lambda: module(x), module)
    assert saved.bytes == 3 * 5 * 4  # GELU's input; the frozen linear layer keeps its weight only
    module.requires_grad_(True)
    assert measure_saved_activations(lambda: module(x), module).bytes == 3 * 5 * 4 + 3 * 6 * 4


def test_a_storage_counts_once_and_whole():
    x = torch.randn(4, 8, requires_grad=True)

    def forward() -> torch.Tensor:
        y = x * 1.0
        return torch.sigmoid(y).sum() + y.exp().sum() + y[:1].pow(2).sum() + y[1:].pow(2).sum()

    saved = measure_saved_activations(forward, frozen())
    # sigmoid's and exp's results, and y once although two views of it are kept.
    assert saved.bytes == 3 * 4 * 8 * 4
    assert len(saved.tensors) == 3

    view = measure_saved_activations(lambda: (x * 1.0)[:1].pow(2), frozen())
    assert view.bytes == 4 * 8 * 4  # one row keeps all four alive
    assert view.tensors[0].shape == (1, 8)


def test_what_is_freed_before_the_end_is_not_counted():
    x = torch.randn(4, 8, requires_grad=True)

    def forward() -> torch.Tensor:
        x.exp().sum()  # its graph dies here
        return torch.sigmoid(x)

    assert measure_saved_activations(forward, frozen()).bytes == 4 * 8 * 4


def test_checkpointing_counts_its_input_only():
    module = frozen(nn.Linear(6, 50), nn.GELU(), nn.Linear(50, 6))
    x = torch.randn(3, 6, requires_grad=True)
    saved = measure_saved_activations(lambda: checkpoint(module, x, use_reentrant=False), module)
    assert saved.bytes == 3 * 6 * 4


def test_half_precision_and_buffers():
    norm = frozen(nn.BatchNorm1d(6).bfloat16().eval())
    x = torch.randn(3, 6).bfloat16().requires_grad_()
    saved = measure_saved_activations(lambda: F.relu(norm(x)), norm)
    assert {(tensor.shape, tensor.dtype) for tensor in saved.tensors} == {((3, 6), torch.bfloat16)}


def test_result_may_be_nested_and_keeps_the_graph():
    x = torch.randn(4, 8, requires_grad=True)
    saved = measure_saved_activations(lambda: {"outputs": (None, x.exp())}, frozen())
    assert saved.bytes == 4 * 8 * 4


def test_gradients_still_work_and_memory_is_released():
    x = torch.randn(4, 8, requires_grad=True)
    results = []

    def forward() -> torch.Tensor:
        results.append(x.exp())
        return results[0]

    measure_saved_activations(forward, frozen())
    results[0].sum().backward()
    torch.testing.assert_close(x.grad, x.detach().exp())


def test_no_graph_is_an_error():
    with pytest.raises(ValueError, match="requires grad"):
        measure_saved_activations(lambda: torch.randn(3).exp(), frozen())
