"""The partially trained embedding against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from functional.fixed_weight import FixedWeight, columns
from paca.functional.embedding import EmbeddingProduct
from paca.functional.train_columns import train_columns
from reference import nearest


def product(padding_idx=None, by_frequency=False):
    return EmbeddingProduct(-1 if padding_idx is None else padding_idx, by_frequency)


def run(weight, tokens, deltas, indices, scales, padding_idx=None, by_frequency=False):
    trained = columns(deltas, indices, scales)
    return train_columns(product(padding_idx, by_frequency), tokens, weight, None, trained)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding_idx", [None, 0, 10])
@pytest.mark.parametrize("by_frequency", [False, True])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4), (2, 1, 6)])
def test_outputs_and_gradients_agree_with_torch(dtype, padding_idx, by_frequency, shape):
    torch.manual_seed(0)
    stock = nn.Embedding(11, 7, padding_idx, scale_grad_by_freq=by_frequency).double()
    weight = stock.weight.detach().to(dtype)
    tokens = torch.randint(0, 11, shape)
    indices = [torch.tensor([1, 2, 6]), torch.arange(7), torch.tensor([4])]
    deltas = [torch.zeros(11, len(i), requires_grad=n != 2) for n, i in enumerate(indices)]
    y = run(weight, tokens, deltas, indices, [2.0, 1.0, 1.0], padding_idx, by_frequency)
    assert torch.equal(y, nn.functional.embedding(tokens, weight))
    grad_output = torch.randn(*shape, 7).to(dtype)
    y.backward(grad_output)
    stock(tokens).backward(grad_output.double())
    for delta, chosen, scale in zip(deltas[:2], indices, (2.0, 1.0), strict=False):
        # accumulated in float32, whatever the weight's dtype
        torch.testing.assert_close(delta.grad.double(), scale * stock.weight.grad[:, chosen], rtol=1e-6, atol=1e-6)
    assert deltas[2].grad is None


def test_only_the_tokens_are_kept():
    tokens, weight = torch.randint(0, 11, (50, 3)), torch.randn(11, 7)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        trained = columns([torch.zeros(11, 2, requires_grad=True)], [torch.tensor([1, 4])], [1.0])
        train_columns(product(), tokens, None, None, trained, FixedWeight(weight))
    assert sorted(t.numel() for t in kept) == [1, 150]  # the tag and the tokens
    assert not any(t.is_floating_point() for t in kept)


def test_a_weight_that_requires_grad_is_refused():
    with pytest.raises(ValueError, match="requires grad"):
        run(torch.zeros(3, 3, requires_grad=True), torch.tensor([1]), [torch.zeros(3, 1)], [torch.tensor([0])], [1.0])


# -- columns that are added to an output -----------------------------------------------------------------------------


def added(y, tokens, deltas, indices, scales, rows=None, **settings):
    trained = columns(deltas, indices, scales, rows)
    return train_columns(product(**settings), tokens, None, None, trained, FixedWeight(None), added_to=y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("by_frequency", [False, True])
@pytest.mark.parametrize("shape", [(4,), (4, 5), (4, 1, 6)])
def test_added_columns_agree_with_float64(dtype, by_row, padding_idx, by_frequency, shape):
    torch.manual_seed(0)
    tokens = torch.randint(0, 11, shape)
    wide = torch.promote_types(dtype, torch.float32)
    indices = [torch.tensor([1, 2, 6]), torch.tensor([4])]  # none in common: each value is rounded once
    deltas = [torch.randn(11, len(i), dtype=wide).requires_grad_() for i in indices]
    rows = [torch.tensor([3, 0]), torch.tensor([1])] if by_row else [None, None]
    y = torch.randn(*shape, 7).to(dtype).requires_grad_()
    settings = {"padding_idx": padding_idx, "by_frequency": by_frequency}
    total = added(y, tokens, deltas, indices, [2.0, -0.5], rows, **settings)
    assert total.dtype == dtype
    grad_output = torch.randn(*shape, 7).to(dtype)
    total.backward(grad_output)
    want = y.detach().double()
    for delta, chosen, scale, its in zip(deltas, indices, [2.0, -0.5], rows, strict=True):
        its = torch.arange(4) if its is None else its
        table = torch.zeros(11, 7, dtype=torch.float64)
        table[:, chosen] = scale * delta.detach().double()
        want[its] += nn.functional.embedding(tokens[its], table)
        stock = nn.Embedding(11, 7, padding_idx, scale_grad_by_freq=by_frequency).double()
        stock(tokens[its]).backward(grad_output[its].double())
        torch.testing.assert_close(delta.grad.double(), scale * stock.weight.grad[:, chosen], rtol=1e-6, atol=1e-6)
    if dtype in (torch.float16, torch.bfloat16):  # a sum in float32 may land on another side of a tie
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(total.double(), nearest(want, dtype).double(), rtol=unit, atol=0)
    else:
        torch.testing.assert_close(total.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(y.grad, grad_output)


def test_added_columns_leave_other_dimensions_and_samples_as_they_are():
    tokens, y = torch.randint(0, 11, (3, 5)), torch.randn(3, 5, 7)
    before = y.clone()
    for grad in (False, True):
        delta = torch.randn(11, 2, requires_grad=grad)
        with torch.set_grad_enabled(grad):
            total = added(y, tokens, [delta], [torch.tensor([1, 4])], [1.0], [torch.tensor([2])])
        assert torch.equal(y, before)
        assert torch.equal(total[:2], y[:2])
        others = torch.tensor([0, 2, 3, 5, 6])
        assert torch.equal(total[..., others], y[..., others])
        assert not torch.equal(total[2], y[2])
