"""Columns that lie side by side are copied as blocks, with the results of copying them one by one."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from models import adapt, llama, tokens
from paca.functional.column_blocks import put_columns, read_columns, runs_of, take_columns
from paca.layers import paca_layers

CHOICES = {
    "one run": (list(range(16, 32)), ((16, 16),)),
    "the whole dimension": (list(range(64)), ((0, 64),)),
    "two runs": ([*range(8), *range(40, 60)], ((0, 8), (40, 20))),
    "uneven runs": ([3, *range(5, 28)], ((3, 1), (5, 23))),
    "runs that touch": ([*range(16), *range(16, 32)], ((0, 32),)),
    "unsorted, as a foreign file may have them": ([*range(32, 48), *range(16)], ((32, 16), (0, 16))),
    "descending": (list(range(31, 15, -1)), None),
    "scattered": (list(range(0, 32, 2)), None),
    "runs too short": ([*range(7), *range(20, 27)], None),
    "too few": ([1, 2, 3], None),
    "none": ([], None),
}


@pytest.mark.parametrize("name", CHOICES)
def test_runs_are_found(name):
    columns, runs = CHOICES[name]
    assert runs_of(torch.tensor(columns, dtype=torch.int64)) == runs


def test_runs_are_not_looked_for_where_that_would_wait_for_a_device():
    assert runs_of(torch.arange(16, device="meta")) is None


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("transposed", [False, True])
def test_columns_are_taken_as_by_index(name, transposed):
    indices = torch.tensor(CHOICES[name][0], dtype=torch.int64)
    x = torch.randn(64, 5).t() if transposed else torch.randn(2, 5, 64)
    taken = take_columns(x, indices, runs_of(indices))
    assert torch.equal(taken, x.index_select(-1, indices))
    assert taken.is_contiguous()
    assert taken.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() or not taken.numel()


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(("shape", "dim"), [((7, 64), 1), ((64, 7), 0), ((3, 7, 64), -1), ((3, 64, 7), -2)])
def test_columns_are_put_as_by_index_and_the_version_counter_moves(name, shape, dim):
    indices = torch.tensor(CHOICES[name][0], dtype=torch.int64)
    weight = torch.nn.Parameter(torch.randn(shape), requires_grad=False)
    values = torch.randn(shape).index_select(dim, indices)
    read = read_columns(weight, dim, indices)
    assert torch.equal(read, weight.index_select(dim, indices))
    assert read.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr() or not read.numel()
    want, before = weight.index_copy(dim, indices, values), weight._version
    put_columns(weight, dim, indices, values)
    assert torch.equal(weight, want)
    assert weight._version > before or not indices.numel()


class Operators(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("selection", "one_by_one"), [("random", True), ("random_blocks", False)])
def test_a_training_step_copies_blocks(selection, one_by_one):
    model = adapt(llama(hidden_size=64, intermediate_size=96), r=16, selection=selection, target_modules="all-linear")
    ids = tokens()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with Operators() as seen:
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    assert ({"index_copy_", "index_select"} <= seen.names) == one_by_one
    assert ("index_copy_" in seen.names) == one_by_one
    layers = paca_layers(model)
    trained = [layer.base_layer.weight[:, layer.paca_indices["default"]] for layer in layers]
    with model.disable_adapter():
        for layer, now in zip(layers, trained, strict=True):
            delta, columns = layer.paca_delta["default"], layer.paca_indices["default"]
            assert delta.grad is not None
            original = layer.base_layer.weight[:, columns]
            torch.testing.assert_close(now, original + layer.scaling["default"] * delta.detach())


@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 5, 48), (2, 3, 5, 48)])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_an_activation_in_place_may_follow(kind, shape):
    torch.manual_seed(0)
    first = torch.nn.Linear(48, 64) if kind == "linear" else Conv1D(64, 48)
    net = torch.nn.Sequential(first, torch.nn.ReLU(inplace=True), torch.nn.Linear(64, 8))
    model, x = adapt(net, r=16, selection="random_blocks", target_modules=["0", "2"]), torch.randn(shape)
    model(x).square().sum().backward()
    got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    net[1].inplace = False
    model.zero_grad()
    model(x).square().sum().backward()
    assert len(got) == 2
    for one, other in zip(got, (p.grad for p in model.parameters() if p.grad is not None), strict=True):
        assert torch.equal(one, other)
