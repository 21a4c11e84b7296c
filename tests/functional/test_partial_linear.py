from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from paca.functional.linear import column_gradient, partial_linear, plain_linear
from reference import reference_gradients, tolerance

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make(dtype, out=7, inp=5, r=3, shape=(4,), bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, inp, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(out, inp, generator=g).to(dtype)
    b = torch.randn(out, generator=g).to(dtype) if bias else None
    indices = torch.randperm(inp, generator=g)[:r].sort().values
    delta = torch.zeros(out, r, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    return x, weight, b, delta, indices


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("input_dim", [1, 0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3), (2, 1, 3)], ids=str)
def test_gradients_agree_with_the_float64_reference(dtype, input_dim, bias, shape):
    x, weight, b, delta, indices = make(dtype, shape=shape, bias=bias)
    stored = weight if input_dim == 1 else weight.t().contiguous()
    y = partial_linear(x, stored, b, [delta], [indices], [0.5], input_dim=input_dim)
    gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y.backward(gy)
    want_y, want_gx, (want_gd,) = reference_gradients(x, weight, b, [(delta, indices, 0.5)], gy)
    torch.testing.assert_close(y.double(), want_y, **tolerance(dtype, 6))
    torch.testing.assert_close(x.grad.double(), want_gx, **tolerance(dtype, 7))
    torch.testing.assert_close(delta.grad.double(), want_gd, **tolerance(dtype, max(1, y.numel() // 7)))
    assert delta.grad.dtype == delta.dtype
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("input_dim", [1, 0])
def test_gradcheck(input_dim):
    x, weight, _, delta, indices = make(torch.float64, shape=(2, 3))
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)

    def with_columns_written(x, delta, bias):
        stored = weight.index_add(1, indices, 0.7 * delta.detach()) if input_dim == 1 else None
        if stored is None:
            stored = weight.index_add(1, indices, 0.7 * delta.detach()).t().contiguous()
        return partial_linear(x, stored, bias, [delta], [indices], [0.7], input_dim=input_dim)

    assert torch.autograd.gradcheck(with_columns_written, (x, delta, bias))


@pytest.mark.parametrize("r", [1, 5])
def test_one_column_and_all_columns(r):
    x, weight, b, delta, indices = make(torch.float64, r=r)
    y = partial_linear(x, weight, b, [delta], [indices], [2.0])
    gy = torch.randn_like(y)
    y.backward(gy)
    torch.testing.assert_close(delta.grad, 2.0 * gy.T @ x.detach()[:, indices])


def test_empty_batch():
    x, weight, b, delta, indices = make(torch.float32, shape=(0, 3))
    y = partial_linear(x, weight, b, [delta], [indices], [1.0])
    assert y.shape == (0, 3, 7)
    y.sum().backward()
    assert torch.equal(delta.grad, torch.zeros(7, 3))
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("input_dim", [1, 0])
def test_strides_do_not_matter(input_dim):
    x, weight, b, delta, indices = make(torch.float64, shape=(3, 4))
    stored = weight if input_dim == 1 else weight.t().contiguous()
    strided = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not strided.is_contiguous()
    gy = torch.randn(4, 3, 7, dtype=torch.float64).transpose(0, 1)
    for inputs in (x, strided):
        partial_linear(inputs, stored, b, [delta], [indices], [1.0], input_dim=input_dim).backward(gy)
    torch.testing.assert_close(x.grad, strided.grad)
    torch.testing.assert_close(delta.grad, 2 * gy.reshape(-1, 7).T @ x.detach().reshape(-1, 5)[:, indices])


def test_only_the_selected_inputs_are_kept():
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    x, weight, b, delta, indices = make(torch.bfloat16, out=64, inp=48, r=2, shape=(100,))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        partial_linear(
            x, weight, b, [delta], [indices], [1.0], before_backward=lambda tag: None, state_tag=torch.tensor(1)
        )
    assert [(tuple(t.shape), t.dtype) for t in kept if t.numel() > 1] == [((100, 2), torch.bfloat16)]
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        partial_linear(x, weight, b, [delta], [indices], [1.0])
    assert {t.data_ptr() for t in kept} - {weight.data_ptr()} == {t.data_ptr() for t in kept if t.shape == (100, 2)}


def test_kept_inputs_have_the_dtype_of_the_matmul_under_autocast():
    kept = []
    x, weight, b, delta, indices = make(torch.float32, shape=(8,))
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        y = partial_linear(x, weight, b, [delta], [indices], [1.0])
    assert y.dtype == torch.bfloat16
    assert [t.dtype for t in kept if t.shape == (8, 3)] == [torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward_inside", [True, False])
def test_autocast_gives_the_gradients_of_a_stock_linear_under_autocast(dtype, backward_inside):
    x, weight, b, delta, indices = make(torch.float32, shape=(8,))
    x2, w2 = x.detach().clone().requires_grad_(), weight.clone().requires_grad_()
    gy = torch.randn(8, 7).to(dtype)
    for run, inputs in (
        (lambda: partial_linear(x, weight, b, [delta], [indices], [1.0]), x),
        (lambda: torch.nn.functional.linear(x2, w2, b), x2),
    ):
        with torch.autocast("cpu", dtype):
            y = run()
            if backward_inside:
                y.backward(gy)
        if not backward_inside:
            y.backward(gy)
        assert inputs.grad.dtype == torch.float32
    assert torch.equal(x.grad, x2.grad)
    torch.testing.assert_close(delta.grad, w2.grad[:, indices], **tolerance(dtype, 8))


def test_an_input_that_needs_no_gradient_gets_none_and_costs_no_gemm():
    from torch.utils.flop_counter import FlopCounterMode

    x, weight, b, delta, indices = make(torch.float32, out=64, inp=32, r=2, shape=(16,))
    flops = []
    for needed in (True, False):
        y = partial_linear(x.detach().requires_grad_(needed), weight, b, [delta], [indices], [1.0])
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] - flops[1] == 2 * 16 * 64 * 32


def test_a_frozen_delta_keeps_no_activation():
    kept = []
    x, weight, b, delta, indices = make(torch.float32, shape=(8,))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        partial_linear(x, weight, b, [delta.detach()], [indices], [1.0])
    assert {t.data_ptr() for t in kept} == {weight.data_ptr()}


def test_several_adapters_get_their_own_gradients():
    x, weight, b, first, first_indices = make(torch.float64, r=2, shape=(6,))
    second = torch.zeros(7, 4, dtype=torch.float64, requires_grad=True)
    second_indices = torch.tensor([0, 1, 3, 4])
    frozen = torch.zeros(7, 1, dtype=torch.float64)
    y = partial_linear(
        x, weight, b, [first, frozen, second], [first_indices, torch.tensor([2]), second_indices], [0.5, 1.0, 3.0]
    )
    gy = torch.randn_like(y)
    y.backward(gy)
    torch.testing.assert_close(first.grad, 0.5 * gy.T @ x.detach()[:, first_indices])
    torch.testing.assert_close(second.grad, 3.0 * gy.T @ x.detach()[:, second_indices])


def test_a_trainable_bias_is_trained():
    x, weight, b, delta, indices = make(torch.float64, shape=(2, 3))
    b.requires_grad_()
    partial_linear(x, weight, b, [delta], [indices], [1.0]).sum().backward()
    torch.testing.assert_close(b.grad, torch.full((7,), 6.0, dtype=torch.float64))


def test_a_weight_that_requires_grad_is_refused():
    x, weight, b, delta, indices = make(torch.float32)
    with pytest.raises(ValueError, match="requires grad"):
        partial_linear(x, weight.requires_grad_(), b, [delta], [indices], [1.0])


def test_a_second_derivative_is_refused():
    x, weight, b, delta, indices = make(torch.float64)
    y = partial_linear(x, weight, b, [delta], [indices], [1.0])
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_without_a_callback_a_weight_written_in_between_raises():
    x, weight, b, delta, indices = make(torch.float32)
    y = partial_linear(x, weight, b, [delta], [indices], [1.0])
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients_bitwise(use_reentrant):
    x, weight, b, delta, indices = make(torch.float32, shape=(6,))

    def run(inputs):
        return partial_linear(inputs, weight, b, [delta], [indices], [1.0]).tanh()

    run(x).sum().backward()
    plain = x.grad.clone(), delta.grad.clone()
    x.grad = delta.grad = None
    checkpoint(run, x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(x.grad, plain[0])
    assert torch.equal(delta.grad, plain[1])


def test_the_output_is_the_stock_modules_bitwise():
    from transformers.pytorch_utils import Conv1D

    x = torch.randn(2, 3, 5)
    linear, conv = torch.nn.Linear(5, 7), Conv1D(7, 5)
    assert torch.equal(plain_linear(x, linear.weight, linear.bias, 1), linear(x))
    assert torch.equal(plain_linear(x, conv.weight, conv.bias, 0), conv(x))


def test_column_gradient_is_scaled_and_transposed():
    selected, rows = torch.randn(2, 3, 4), torch.randn(6, 5)
    torch.testing.assert_close(
        column_gradient(selected, rows, 0.25, torch.float64), (0.25 * rows.T @ selected.reshape(6, 4)).double()
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_accumulated_in_float32_on_cuda(dtype):
    selected = torch.randn(4096, 16, device="cuda").to(dtype)
    rows = torch.randn(4096, 64, device="cuda").to(dtype)
    got = column_gradient(selected, rows, 1.0, torch.float32)
    want = rows.double().T @ selected.double()
    # One rounding to half precision would leave an error of about eps * |value|; float32 leaves far less.
    assert (got.double() - want).abs().max() < torch.finfo(dtype).eps * want.abs().max() / 50
