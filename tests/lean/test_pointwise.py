from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from paca.bench.saved_activations import measure_saved_activations
from paca.lean import pointwise as module
from paca.lean.activations import ACTIVATIONS, activation_name
from paca.lean.pointwise import lean_activation, pack_bits, unpack_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (9,), (0, 3), (3, 5, 7), (64, 33)])
def test_bits_round_trip(shape):
    torch.manual_seed(0)
    mask = torch.rand(shape) < 0.5
    bits = pack_bits(mask)
    assert bits.dtype == torch.uint8
    assert bits.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack_bits(bits, mask.shape), mask)


def test_bits_of_a_non_contiguous_mask():
    mask = (torch.rand(9, 5) < 0.5).t()
    assert torch.equal(unpack_bits(pack_bits(mask), mask.shape), mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (0, 5), (3, 7, 33)])
def test_relu_is_bitwise_stock(dtype, shape):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    if x.numel() > 2:
        x.view(-1)[:2] = torch.tensor([0.0, float("nan")])
    x.requires_grad_()
    lean, stock = lean_activation(x, "relu"), torch.relu(x)
    assert torch.equal(lean.nan_to_num(9), stock.nan_to_num(9))
    grad = torch.randn(shape).to(dtype)
    (got,), (want,) = (torch.autograd.grad(y, x, grad) for y in (lean, stock))
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (0, 5), (3, 7, 33)])
def test_formula_gelu_is_bitwise_stock_forward_and_exact_to_rounding_backward(dtype, shape, monkeypatch):
    monkeypatch.setattr(module, "_ELEMENTS_PER_THREAD", 64)
    torch.manual_seed(0)
    x = (2 * torch.randn(shape)).to(dtype).requires_grad_()
    lean = lean_activation(x, "gelu_new")
    assert torch.equal(lean, ACT2FN["gelu_new"](x))
    grad = torch.randn(shape).to(dtype)
    (got,) = torch.autograd.grad(lean, x, grad)
    exact = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(ACT2FN["gelu_new"](exact), exact, grad.double())
    # Half precision computes in float32. Where 1 - tanh**2 cancels, x up to 7 magnifies the error 20 times, grad 3.
    arithmetic = torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps
    torch.testing.assert_close(got.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=60 * arithmetic)


def test_what_is_kept():
    x = torch.randn(10, 32).bfloat16().requires_grad_()
    nothing = torch.nn.Module()
    assert measure_saved_activations(lambda: lean_activation(x, "relu"), nothing).bytes == 40
    assert measure_saved_activations(lambda: lean_activation(x, "gelu_new"), nothing).bytes == 640


@pytest.mark.parametrize(
    ("stock", "name"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_python_tanh", "gelu_new"),
        ("gelu_new", "gelu_new"),
        ("relu", "relu"),
        ("gelu_python", None),
        ("quick_gelu", None),
    ],
)
def test_stock_activations_are_recognized_as_what_they_compute(stock, name):
    module = ACT2FN[stock]
    assert activation_name(module) == name
    if name is not None:
        x = torch.randn(50).bfloat16()
        assert torch.equal(ACTIVATIONS[name].forward(x), module(x))
