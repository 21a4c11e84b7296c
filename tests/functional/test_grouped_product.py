"""The grouped linear map against a naive float64 loop over experts."""

from __future__ import annotations

import pytest
import torch

from functional.fixed_weight import FixedWeight, columns
from paca.functional.grouped import GroupedProduct
from paca.functional.train_columns import train_columns
from reference import tolerance

COUNTS = (3, 0, 5, 1)  # the second expert gets no rows
IN, OUT = 24, 16


def matmuls(dtype):
    import transformers.integrations.moe  # noqa: F401  (defines the fallback)

    fallback = torch.ops.transformers.grouped_mm_fallback
    return [fallback] if dtype == torch.float64 else [fallback, torch._grouped_mm]  # the kernel has no float64


def case(dtype, ranks=(3,), seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(COUNTS), IN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(COUNTS), OUT, IN, generator=generator).to(dtype)
    deltas = [torch.zeros(len(COUNTS), OUT, r, dtype=torch.promote_types(dtype, torch.float32)) for r in ranks]
    indices = [torch.randperm(IN, generator=generator)[:r].sort().values for r in ranks]
    grad_output = torch.randn(sum(COUNTS), OUT, generator=generator).to(dtype)
    return x, weight, [d.requires_grad_() for d in deltas], indices, grad_output


def run(x, weight, deltas, indices, scales, input_dim, matmul, source=None):
    product = GroupedProduct(input_dim, torch.tensor(COUNTS).cumsum(0, dtype=torch.int32), matmul)
    stored = weight if input_dim == -1 else weight.mT.contiguous()
    trained = columns(deltas, indices, scales)
    return train_columns(product, x, stored if source is None else None, None, trained, source)


@pytest.mark.parametrize("input_dim", [-1, -2])
@pytest.mark.parametrize("ranks", [(1,), (3, 8), (IN,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_output_and_gradients_equal_a_loop_over_experts_in_float64(dtype, ranks, input_dim):
    for matmul in matmuls(dtype):
        x, weight, deltas, indices, grad_output = case(dtype, ranks)
        scales = [0.5 * (n + 1) for n in range(len(ranks))]
        y = run(x, weight, deltas, indices, scales, input_dim, matmul)
        y.backward(grad_output)
        start = 0
        for expert, count in enumerate(COUNTS):
            rows = slice(start, start + count)
            x64, w64, g64 = x.detach()[rows].double(), weight[expert].double(), grad_output[rows].double()
            start += count
            torch.testing.assert_close(y[rows].double(), x64 @ w64.T, **tolerance(dtype, IN))
            torch.testing.assert_close(x.grad[rows].double(), g64 @ w64, **tolerance(dtype, OUT))
            for delta, chosen, scale in zip(deltas, indices, scales, strict=True):
                want = scale * g64.T @ x64[:, chosen]
                torch.testing.assert_close(delta.grad[expert].double(), want, **tolerance(dtype, max(count, 1)))
                assert delta.grad.dtype == delta.dtype
                if count == 0:
                    assert not bool(delta.grad[expert].any())


def test_rows_past_the_last_offset_are_nobodys():
    x, weight, deltas, indices, grad_output = case(torch.float32)
    more = torch.cat([x.detach(), torch.full((2, IN), 1e9)])
    y = run(more, weight, deltas, indices, [1.0], -1, torch._grouped_mm)
    y.backward(torch.cat([grad_output, torch.full((2, OUT), 1e9)]))
    alone = [d.detach().clone().requires_grad_() for d in deltas]
    run(x, weight, alone, indices, [1.0], -1, torch._grouped_mm).backward(grad_output)
    torch.testing.assert_close(deltas[0].grad, alone[0].grad)


def test_only_the_selected_columns_of_the_rows_are_kept():
    x, weight, deltas, indices, _ = case(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(x, weight, deltas, indices, [1.0], -1, torch._grouped_mm, FixedWeight(weight))
    assert sorted(tuple(t.shape) for t in kept) == [(), (sum(COUNTS), 3)]  # the tag and the rows


def test_what_needs_no_gradient_gets_none_and_keeps_nothing():
    x, weight, deltas, indices, grad_output = case(torch.float32, (3, 8))
    deltas[0].requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = run(x.detach(), weight, deltas, indices, [1.0, 1.0], -1, torch._grouped_mm, FixedWeight(weight))
    assert [tuple(t.shape) for t in kept if t.is_floating_point()] == [(sum(COUNTS), 8)]
    y.backward(grad_output)
    assert x.grad is None
    assert deltas[0].grad is None
    assert deltas[1].grad is not None


def test_the_backward_pass_reads_the_weight_that_the_source_gives_again():
    x, weight, deltas, indices, grad_output = case(torch.float32)
    source = FixedWeight(weight.clone(), tag=7)
    y = run(x, weight, deltas, indices, [1.0], -1, torch._grouped_mm, source)
    source.fixed.mul_(2)
    y.backward(grad_output)
    assert source.seen == [7]
    again = x.detach().requires_grad_()
    run(again, 2 * weight, deltas, indices, [1.0], -1, torch._grouped_mm).backward(grad_output)
    assert torch.equal(x.grad, again.grad)


def test_a_stack_that_requires_grad_is_refused():
    x, weight, deltas, indices, _ = case(torch.float32)
    with pytest.raises(ValueError, match="trains its columns only"):
        run(x, weight.requires_grad_(), deltas, indices, [1.0], -1, torch._grouped_mm)
