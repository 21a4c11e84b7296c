"""The partially trained embedding against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paca.functional.embedding import partial_embedding


def run(weight, tokens, deltas, indices, scales, padding_idx=None, by_frequency=False):
    return partial_embedding(
        tokens,
        weight,
        deltas,
        indices,
        scales,
        gradient_settings=(-1 if padding_idx is None else padding_idx, by_frequency),
        before_backward=lambda tag: None,
        state_tag=torch.tensor(0),
    )


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


def test_only_the_tokens_and_indices_are_kept():
    tokens, weight = torch.randint(0, 11, (50, 3)), torch.randn(11, 7)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        run(weight, tokens, [torch.zeros(11, 2, requires_grad=True)], [torch.tensor([1, 4])], [1.0])
    assert sorted(t.numel() for t in kept) == [1, 2, 150]
    assert not any(t.is_floating_point() for t in kept)


def test_a_weight_that_requires_grad_is_refused():
    with pytest.raises(ValueError, match="requires grad"):
        run(torch.zeros(3, 3, requires_grad=True), torch.tensor([1]), [torch.zeros(3, 1)], [torch.tensor([0])], [1.0])
