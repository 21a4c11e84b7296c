from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from paca.bench.saved_activations import measure_saved_activations
from paca.lean import rms_norm as module
from paca.lean.rms_norm import rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(5,), (1, 1), (0, 5), (3, 7, 33), (2, 3, 4, 10)]


def stock_norm(style: str, features: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(features)
    norm = (LlamaRMSNorm if style == "llama" else Gemma2RMSNorm)(features, eps=1e-5)
    nn.init.normal_(norm.weight, mean=0.5, std=0.5)
    return norm.to(dtype)


def reference_gradients(
    style: str, x: torch.Tensor, weight: torch.Tensor, eps: float, grad: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Of the exact function, in float64."""
    x, weight = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    factor = weight if style == "llama" else 1 + weight
    y = factor * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return torch.autograd.grad(y, (x, weight), grad.double())


@pytest.mark.parametrize("style", ["llama", "gemma"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_bitwise_stock_and_gradients_are_exact_to_rounding(style, dtype, shape, monkeypatch):
    monkeypatch.setattr(module, "_ELEMENTS_PER_THREAD", 70)  # several blocks, the last one partial
    norm = stock_norm(style, shape[-1], dtype)
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = rms_norm(x, norm.weight, 1e-5, style)
    assert torch.equal(y, norm(x))
    assert y.dtype == dtype

    grad = torch.randn(shape).to(dtype)
    got = torch.autograd.grad(y, (x, norm.weight), grad)
    want = reference_gradients(style, x, norm.weight, 1e-5, grad)
    # Arithmetic is float32 for every dtype (as in the stock modules), then one rounding to dtype.
    tolerance = max(torch.finfo(dtype).eps, 16 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(got[0].double(), want[0], rtol=tolerance, atol=tolerance)
    # The weight's gradient sums over rows what the forward pass had rounded.
    rows = x.numel() // shape[-1]
    torch.testing.assert_close(got[1].double(), want[1], rtol=tolerance, atol=tolerance * (rows + 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_is_at_least_as_exact_as_the_stock_modules(dtype):
    norm = stock_norm("llama", 65, dtype)
    torch.manual_seed(0)
    x, grad = torch.randn(50, 65).to(dtype).requires_grad_(), torch.randn(50, 65).to(dtype)
    want, _ = reference_gradients("llama", x, norm.weight, 1e-5, grad)
    (stock,) = torch.autograd.grad(norm(x), x, grad)
    (lean,) = torch.autograd.grad(rms_norm(x, norm.weight, 1e-5, "llama"), x, grad)
    assert (lean.double() - want).norm() < 0.9 * (stock.double() - want).norm()


def test_mixed_dtypes_promote_as_in_the_stock_module():
    norm = stock_norm("llama", 9, torch.float32)
    x = torch.randn(4, 9).bfloat16().requires_grad_()
    y = rms_norm(x, norm.weight, 1e-5, "llama")
    assert y.dtype == torch.float32
    assert torch.equal(y, norm(x))
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert norm.weight.grad.dtype == torch.float32


def test_transposed_input_keeps_its_layout():
    norm = stock_norm("gemma", 10, torch.bfloat16)
    x = torch.randn(2, 7, 3, 10).bfloat16().transpose(1, 2).requires_grad_()
    y = rms_norm(x, norm.weight, 1e-5, "gemma")
    assert torch.equal(y, norm(x))
    assert y.stride() == norm(x).stride()
    grad = torch.randn(2, 3, 7, 10).bfloat16()  # another layout than x's
    (got,) = torch.autograd.grad(y, x, grad)
    (want,) = torch.autograd.grad(rms_norm(x.contiguous(), norm.weight, 1e-5, "gemma"), x, grad)
    assert torch.equal(got, want)


def test_expanded_and_strided_inputs():
    norm = stock_norm("llama", 6, torch.float32)
    for x in (torch.randn(1, 6).expand(5, 6), torch.randn(5, 12)[:, ::2], torch.randn(6, 5).t()):
        assert torch.equal(rms_norm(x, norm.weight, 1e-5, "llama"), norm(x))


def test_keeps_the_half_precision_input_and_one_float_a_row():
    norm = stock_norm("llama", 32, torch.bfloat16).requires_grad_(False)
    x = torch.randn(11, 32).bfloat16().requires_grad_()
    lean = measure_saved_activations(lambda: rms_norm(x, norm.weight, 1e-5, "llama"), norm)
    assert lean.bytes == 11 * 32 * 2 + 11 * 4
    stock = measure_saved_activations(lambda: norm(x), norm)
    assert stock.bytes == 11 * 32 * 4 + 11 * 4


def test_second_derivative_is_refused():
    norm = stock_norm("llama", 6, torch.float32)
    x = torch.randn(2, 6, requires_grad=True)
    y = rms_norm(x, norm.weight, 1e-5, "llama")
    (grad,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="Second derivatives"):
        grad.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Second derivatives"):
        torch.autograd.grad(grad.sum(), x)  # which does not run what leads elsewhere
