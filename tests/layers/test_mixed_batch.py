"""Columns that are added to a layer's output, each adapter's for its own samples; and which sample has which."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from functional.fixed_weight import FixedWeight, columns
from paca.columns.state import ActiveColumns, AdapterColumns, State
from paca.functional.linear import LinearProduct
from paca.functional.train_columns import train_columns
from paca.layers.mixed_batch import BASE, MixedBatch, current_mixed_batch, running
from paca.layers.overlaid_weight import AddedPass

SAMPLES, IN, OUT = 5, 11, 7


class Group(NamedTuple):
    """The columns of one adapter, and the samples they are for."""

    rows: Tensor
    delta: Tensor
    indices: Tensor
    scale: float


def add(y: Tensor, x: Tensor, groups, source=None) -> Tensor:
    rows, deltas, indices, scales = zip(*groups, strict=True) if groups else ((), (), (), ())
    trained = columns(deltas, indices, scales, rows)
    return train_columns(LinearProduct(1), x, None, None, trained, source or FixedWeight(None), added_to=y)


def groups_of(dtype=torch.float32, requires_grad=False):
    """Adapters of rank 1, 4 and 11 (all columns); sample 2 has none."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for rows, r, scale in (([3], 1, 2.0), ([0, 4], 4, 0.75), ([1], IN, -1.0)):
        delta = torch.randn(OUT, r, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)
        indices = torch.randperm(IN, generator=generator)[:r].sort().values
        groups.append(Group(torch.tensor(rows), delta, indices, scale))
    return groups


def reference(y: Tensor, x: Tensor, groups) -> Tensor:
    result = list(y.double())
    for rows, delta, indices, scale in groups:
        for row in rows.tolist():
            result[row] = result[row] + scale * (x.double()[row][..., indices] @ delta.double().t())
    return torch.stack(result)


def magnitude(y: Tensor, x: Tensor, groups) -> Tensor:
    absolute = [g._replace(delta=g.delta.abs(), scale=abs(g.scale)) for g in groups]
    return reference(y.abs(), x.abs(), absolute)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("middle", [(), (3,), (2, 3)])
def test_each_row_gets_its_own_columns(middle, dtype, grad):
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, *middle, IN).to(dtype)
    y = torch.randn(SAMPLES, *middle, OUT).to(dtype)
    delta_dtype = torch.promote_types(dtype, torch.float32)
    groups = groups_of(delta_dtype, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        got = add(y, x, groups)
    assert got.dtype == dtype
    assert torch.equal(got[2], y[2])  # of no adapter
    # Each of the at most 12 terms is rounded as often as it has factors and sums (the delta, the products, the sum).
    bound = (IN + 4) * torch.finfo(dtype).eps * magnitude(y, x, groups)
    assert bool(((got.double() - reference(y, x, groups)).abs() <= bound).all())


def test_gradients_are_those_of_the_reference():
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, 3, IN, dtype=torch.float64, requires_grad=True)
    y = torch.randn(SAMPLES, 3, OUT, dtype=torch.float64, requires_grad=True)
    groups = groups_of(torch.float64, requires_grad=True)
    weights = torch.randn(SAMPLES, 3, OUT, dtype=torch.float64)
    inputs = [x, y, *(g.delta for g in groups)]
    want = torch.autograd.grad((reference(y, x, groups) * weights).sum(), inputs)
    source = FixedWeight(None, tag=7)
    result = add(y, x, groups, source)
    got = torch.autograd.grad((result * weights).sum(), inputs)
    assert source.seen == [7]  # the backward pass checks that the columns are the same
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-13, atol=1e-13)


def test_only_what_needs_a_gradient_gets_one():
    x = torch.randn(SAMPLES, IN)
    y = torch.randn(SAMPLES, OUT)
    groups = groups_of(requires_grad=True)
    groups[1].delta.requires_grad_(False)
    add(y, x, groups).sum().backward()
    assert [g.delta.grad is not None for g in groups] == [True, False, True]
    frozen = groups_of()
    x.requires_grad_()
    add(y, x, frozen).sum().backward()
    want = torch.zeros(SAMPLES, IN)
    for rows, delta, indices, scale in frozen:
        for row in rows:
            want[row, indices] += scale * delta.sum(0)
    torch.testing.assert_close(x.grad, want)


@pytest.mark.parametrize("grad", [False, True])
def test_the_inputs_are_not_written(grad):
    x, y = torch.randn(SAMPLES, IN), torch.randn(SAMPLES, OUT)
    before = x.clone(), y.clone()
    with torch.set_grad_enabled(grad):
        add(y, x, groups_of(requires_grad=True))
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def test_only_the_selected_inputs_of_an_adapters_samples_are_kept():
    x, y, groups, kept = torch.randn(SAMPLES, 3, IN), torch.randn(SAMPLES, 3, OUT), groups_of(requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        add(y, x, groups)
    assert [tuple(t.shape) for t in kept if t.is_floating_point()] == [(1, 3, 1), (2, 3, 4), (1, 3, IN)]


def test_views_and_an_empty_batch():
    groups = groups_of()
    x = torch.randn(IN, 3, SAMPLES).permute(2, 1, 0)
    y = torch.randn(OUT, 3, SAMPLES).permute(2, 1, 0)
    with torch.no_grad():
        got = add(y, x, groups)
        torch.testing.assert_close(got.double(), reference(y, x, groups), rtol=1e-5, atol=1e-5)
        assert add(torch.empty(0, OUT), torch.empty(0, IN), []).shape == (0, OUT)
        assert add(torch.empty(SAMPLES, 0, OUT), torch.empty(SAMPLES, 0, IN), groups).numel() == 0


def columns_of(groups, active):
    """What the layer above knows of the groups' adapters."""
    names = [f"a{n}" for n in range(len(groups))]
    for name in names:
        active.changed(name)
    return tuple(
        AdapterColumns(name, g.delta, g.indices, g.scale, active.revisions[name])
        for name, g in zip(names, groups, strict=True)
    )


def checkpointed(tags, groups):
    """The sum of an output whose batch has another tag each time that its forward pass runs."""
    active, tags = ActiveColumns(), iter(tags)
    its = columns_of(groups, active)

    def run(y, x):
        return add(y, x, groups, AddedPass(active, State(its, active.base), next(tags)))

    return checkpoint(run, torch.randn(SAMPLES, OUT), torch.randn(SAMPLES, IN), use_reentrant=False).sum()


def test_checkpointing_that_repeats_it_for_other_samples_raises():
    with pytest.raises(RuntimeError, match="Activation checkpointing repeats a forward pass"):
        checkpointed([1, 2], groups_of(requires_grad=True)).backward()


def test_checkpointing_that_repeats_it_for_the_same_samples_gives_the_gradients():
    groups = groups_of(requires_grad=True)
    torch.manual_seed(0)
    checkpointed([1, 1], groups).backward()
    again = groups_of(requires_grad=True)
    torch.manual_seed(0)
    add(torch.randn(SAMPLES, OUT), torch.randn(SAMPLES, IN), again).sum().backward()
    for one, other in zip(groups, again, strict=True):
        assert torch.equal(one.delta.grad, other.delta.grad)


@pytest.mark.parametrize("change", ["delta", "indices", "revision"])
@pytest.mark.parametrize("needs_x", [True, False])
def test_columns_that_change_before_backward_raise(change, needs_x):
    groups, active = groups_of(requires_grad=True), ActiveColumns()
    source = AddedPass(active, State(columns_of(groups, active), active.base), 1)
    x = torch.randn(SAMPLES, IN, requires_grad=needs_x)
    loss = add(torch.randn(SAMPLES, OUT), x, groups, source).sum()
    if change == "revision":
        active.changed("a1")  # a step that no version counter shows
    else:
        (groups[1].delta.detach() if change == "delta" else groups[1].indices).add_(0)
    with pytest.raises(RuntimeError, match=r"adapter 'a1', adapter 'a2' were modified between forward and backward"):
        loss.backward()


def test_names_and_rows():
    batch = MixedBatch(["b", BASE, "a", "b"])
    rows = batch.rows_of(4, torch.device("cpu"))
    assert {name: r.tolist() for name, r in rows.items()} == {"b": [0, 3], "a": [2]}
    assert batch.rows_of(4, torch.device("cpu")) is rows  # once per batch
    with pytest.raises(ValueError, match=r"gives 4 names for an input with 5 samples.*'__base__'"):
        batch.rows_of(5, torch.device("cpu"))
    with pytest.raises(ValueError, match="gives 4 names for an input with 8 samples"):
        batch.rows_of(8, torch.device("cpu"))


def test_repeated_samples_keep_their_adapter():
    batch = MixedBatch(["a", "b"], repeats=3)
    assert batch.names_of(2) == ("a", "b")  # an encoder
    assert batch.names_of(6) == ("a", "a", "a", "b", "b", "b")
    with pytest.raises(ValueError, match="2 names, each repeated 3 times, for an input with 4 samples"):
        batch.names_of(4)


def test_the_current_batch_ends_with_its_block_also_after_an_error():
    batch = MixedBatch(["a"])

    def fail():
        with running(batch):
            assert current_mixed_batch() is batch
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert current_mixed_batch() is None


def test_an_adapter_costs_gathers_and_one_skinny_product():
    x, y, groups = torch.randn(SAMPLES, 3, IN), torch.randn(SAMPLES, 3, OUT), groups_of()
    with torch.no_grad(), Operators() as operators:
        add(y, x, groups)
    assert operators.count("aten::addmm") == operators.count("aten::index_copy_") == len(groups)
    # Columns, their samples, the output's samples; the last adapter has a block of columns, which needs no index.
    assert operators.count("aten::index_select") == 3 * len(groups) - 1
    assert operators.count("aten::clone") == 2  # of the whole output, which others may hold, and of that block
    assert not {"aten::mm", "aten::bmm", "aten::matmul"} & set(operators.names)


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []
        self.count = self.names.count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))
