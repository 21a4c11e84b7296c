from __future__ import annotations

import pytest
import torch

from paca.bench.saved_activations import measure_saved_activations
from paca.lean import gated_linear_unit as module
from paca.lean.activations import ACTIVATIONS
from paca.lean.gated_linear_unit import fused_gated_linear_unit, gated_linear_unit

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(5,), (1, 1), (0, 5), (3, 7, 33)]


def operands(shape, dtype):
    torch.manual_seed(0)
    gate, up = ((2 * torch.randn(shape)).to(dtype).requires_grad_() for _ in range(2))
    return gate, up, torch.randn(shape).to(dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_are_bitwise_stock(activation, dtype, shape, monkeypatch):
    monkeypatch.setattr(module, "_ELEMENTS_PER_THREAD", 64)
    gate, up, grad = operands(shape, dtype)
    stock = ACTIVATIONS[activation].forward(gate) * up
    lean = gated_linear_unit(gate, up, activation)
    assert torch.equal(lean, stock)
    for got, want in zip(
        torch.autograd.grad(lean, (gate, up), grad), torch.autograd.grad(stock, (gate, up), grad), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_formula_gelu_agrees_with_float64(dtype):
    gate, up, grad = operands((9, 35), dtype)
    lean = gated_linear_unit(gate, up, "gelu_new")
    assert torch.equal(lean, ACTIVATIONS["gelu_new"].forward(gate) * up)
    got = torch.autograd.grad(lean, (gate, up), grad)
    exact_gate, exact_up = (tensor.detach().double().requires_grad_() for tensor in (gate, up))
    exact = ACTIVATIONS["gelu_new"].forward(exact_gate) * exact_up
    want = torch.autograd.grad(exact, (exact_gate, exact_up), grad.double())
    # To gate: two roundings; where 1 - tanh**2 cancels, x up to 6 magnifies the arithmetic's error 15 times, grad * up
    # 15 times. To up: the formula's seven roundings in dtype, where 1 + tanh cancels 3 * 3 times magnified.
    eps, arithmetic = torch.finfo(dtype).eps, torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps
    torch.testing.assert_close(got[0].double(), want[0], rtol=3 * eps, atol=225 * arithmetic)
    torch.testing.assert_close(got[1].double(), want[1], rtol=8 * eps, atol=9 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6,), (3, 7, 66), (0, 4)])
def test_fused_halves_are_the_same(dtype, shape):
    torch.manual_seed(0)
    gate_up = torch.randn(shape).to(dtype).requires_grad_()
    gate, up = gate_up.chunk(2, dim=-1)
    stock = up * torch.nn.functional.silu(gate)
    lean = fused_gated_linear_unit(gate_up, "silu")
    assert torch.equal(lean, stock)
    grad = torch.randn(stock.shape).to(dtype)
    (got,), (want,) = (torch.autograd.grad(y, gate_up, grad) for y in (lean, stock))
    assert torch.equal(got, want)


def test_non_contiguous_operands():
    gate, up, grad = operands((4, 5, 6), torch.bfloat16)
    gate, up, grad = (tensor.detach().transpose(0, 1).requires_grad_() for tensor in (gate, up, grad))
    lean, stock = gated_linear_unit(gate, up, "silu"), torch.nn.functional.silu(gate) * up
    assert torch.equal(lean, stock)
    for got, want in zip(
        torch.autograd.grad(lean, (gate, up), grad), torch.autograd.grad(stock, (gate, up), grad), strict=True
    ):
        assert torch.equal(got, want)


def test_gate_and_up_of_different_dtypes():
    gate = torch.randn(3, 5, requires_grad=True)
    up = torch.randn(3, 5).bfloat16().requires_grad_()
    y = gated_linear_unit(gate, up, "silu")
    assert y.dtype == torch.float32
    assert torch.equal(y, torch.nn.functional.silu(gate) * up)
    y.sum().backward()
    assert gate.grad.dtype == torch.float32
    assert up.grad.dtype == torch.bfloat16


def test_keeps_gate_and_up_only():
    gate, up, _ = operands((11, 32), torch.bfloat16)
    nothing = torch.nn.Module()
    lean = measure_saved_activations(lambda: gated_linear_unit(gate, up, "silu"), nothing)
    assert lean.bytes == 2 * 11 * 32 * 2
    gate_up = torch.cat((gate, up), -1).detach().requires_grad_()
    fused = measure_saved_activations(lambda: fused_gated_linear_unit(gate_up, "silu"), nothing)
    assert fused.bytes == 2 * 11 * 32 * 2
