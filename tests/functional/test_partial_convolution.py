"""The partially trained convolution against torch's own, in float64 and at its own precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paca.functional.convolution import Geometry, partial_convolution, plain_convolution

MODULES = {
    "1d": lambda: nn.Conv1d(5, 7, 3),
    "1d pointwise": lambda: nn.Conv1d(5, 4, 1, stride=2, bias=False),
    "1d same, uneven, dilated": lambda: nn.Conv1d(5, 4, 4, padding="same", dilation=3),
    "2d": lambda: nn.Conv2d(5, 6, 3, padding=1),
    "2d pointwise": lambda: nn.Conv2d(5, 6, 1, bias=False),
    "2d strides": lambda: nn.Conv2d(5, 6, (3, 2), stride=(2, 3), padding=(2, 1), dilation=(1, 2)),
    "2d same": lambda: nn.Conv2d(5, 6, 3, padding="same"),
    "2d same, uneven": lambda: nn.Conv2d(5, 6, (4, 3), padding="same"),
    "2d valid": lambda: nn.Conv2d(5, 6, 3, padding="valid"),
    "2d circular": lambda: nn.Conv2d(5, 6, 3, stride=2, padding=(2, 1), padding_mode="circular"),
    "2d reflect": lambda: nn.Conv2d(5, 6, 3, padding=(1, 2), padding_mode="reflect"),
    "2d replicate": lambda: nn.Conv2d(5, 6, 3, padding=2, dilation=2, padding_mode="replicate"),
    "2d reflect same, uneven": lambda: nn.Conv2d(5, 6, (4, 2), padding="same", padding_mode="reflect"),
    "2d groups": lambda: nn.Conv2d(15, 6, 3, padding=1, groups=3),
    "2d groups circular": lambda: nn.Conv2d(10, 6, 2, padding=1, groups=2, padding_mode="circular"),
    "3d": lambda: nn.Conv3d(5, 4, (1, 2, 3), padding=(0, 1, 1), stride=(1, 1, 2)),
}
SPACE = {1: (11,), 2: (9, 8), 3: (3, 4, 5)}


def run(module, x, deltas, indices, scales):
    return partial_convolution(
        x,
        module.weight,
        module.bias,
        deltas,
        indices,
        scales,
        geometry=Geometry.of(module),
        before_backward=lambda tag: None,
        state_tag=torch.tensor(0),
    )


def make(kind, dtype, batch=(2,), r=(2,)):
    torch.manual_seed(0)
    module = MODULES[kind]().to(dtype)
    module.weight.requires_grad_(False)
    x = torch.randn(*batch, module.in_channels, *SPACE[len(module.kernel_size)]).to(dtype).requires_grad_()
    indices = [torch.randperm(module.weight.shape[1])[:n].sort().values for n in r]
    deltas = [torch.zeros(module.out_channels, n, *module.kernel_size, requires_grad=True) for n in r]
    return module, x, deltas, indices


def reference(module, x, grad_output):
    """Output and gradients of torch's own module in float64, the weight's too."""
    twin = float64_twin(module)
    x64 = x.detach().double().requires_grad_()
    y = twin(x64)
    y.backward(grad_output.double())
    return y.detach(), x64.grad, twin.weight.grad, None if twin.bias is None else twin.bias.grad


def float64_twin(module):
    twin = type(module)(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        bias=module.bias is not None,
        padding_mode=module.padding_mode,
    ).double()
    twin.load_state_dict({k: v.double() for k, v in module.state_dict().items()})
    return twin


def check(got, want, dtype, terms):
    """Within the error of a sum of ``terms`` products, accumulated in float32 or wider and rounded once."""
    unit = torch.finfo(dtype).eps
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    size = float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got.double(), want, rtol=unit, atol=size * (unit + wide * terms))


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outputs_and_gradients_agree_with_float64(kind, dtype):
    module, x, deltas, indices = make(kind, dtype, r=(2, 5))
    y = run(module, x, deltas, indices, [3.0, 1.0])
    stock = module(x.detach())
    assert torch.equal(y, stock)
    assert y.dtype == dtype
    grad_output = torch.randn_like(y)
    y.backward(grad_output)
    _, grad_x, grad_weight, grad_bias = reference(module, x, grad_output)
    check(x.grad, grad_x, dtype, 6 * 9)
    for delta, chosen, scale in zip(deltas, indices, (3.0, 1.0), strict=True):
        assert delta.grad.dtype == torch.float32
        check(
            delta.grad, scale * grad_weight[:, chosen], max(dtype, torch.float32, key=lambda d: torch.finfo(d).eps), 200
        )
    if module.bias is not None:
        check(module.bias.grad, grad_bias, dtype, 200)


@pytest.mark.parametrize("kind", MODULES)
def test_the_input_gradient_is_torchs_own_bitwise(kind):
    module, x, deltas, indices = make(kind, torch.float32)
    y = run(module, x, deltas, indices, [1.0])
    grad_output = torch.randn_like(y)
    (mine,) = torch.autograd.grad(y, x, grad_output)
    (theirs,) = torch.autograd.grad(module(x), x, grad_output)
    if module.padding_mode in ("circular", "reflect", "replicate"):  # overlapping edges are added in another order
        torch.testing.assert_close(mine, theirs)
    else:
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", ["1d", "2d groups", "2d reflect", "2d same, uneven", "3d"])
@pytest.mark.parametrize("batch", [(), (0,), (1,)])
def test_inputs_without_a_batch_and_empty_ones(kind, batch):
    module, x, deltas, indices = make(kind, torch.float64, batch)
    if batch == (0,) and module.padding_mode == "reflect":
        pytest.skip("torch's own reflection padding refuses an empty batch")
    y = run(module, x, deltas, indices, [2.0])
    assert torch.equal(y, module(x.detach()))
    grad_output = torch.randn_like(y)
    y.backward(grad_output)
    _, grad_x, grad_weight, _ = reference(module, x, grad_output)
    torch.testing.assert_close(x.grad, grad_x)
    torch.testing.assert_close(deltas[0].grad.double(), 2 * grad_weight[:, indices[0]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["channels_last", "transposed", "expanded"])
def test_inputs_of_any_strides(form):
    module, x, deltas, indices = make("2d", torch.float64, (3,))
    if form == "channels_last":
        x = x.detach().to(memory_format=torch.channels_last)
        module = module.to(memory_format=torch.channels_last)
    elif form == "transposed":
        x = x.detach().transpose(2, 3)
    else:
        x = x.detach()[:1].expand(3, -1, -1, -1)
    x.requires_grad_()
    y = run(module, x, deltas, indices, [1.0])
    assert torch.equal(y, module(x.detach()))
    grad_output = torch.randn_like(y).transpose(2, 3).contiguous().transpose(2, 3)
    (grad_x,) = torch.autograd.grad(y, x, grad_output, retain_graph=True)
    y.backward(grad_output)
    _, want, grad_weight, _ = reference(module, x, grad_output)
    torch.testing.assert_close(grad_x, want)
    torch.testing.assert_close(deltas[0].grad.double(), grad_weight[:, indices[0]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", MODULES)
def test_only_the_selected_channels_are_kept(kind):
    module, x, deltas, indices = make(kind, torch.float32, r=(1,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        run(module, x, deltas, indices, [1.0])
    assert sum(t.numel() for t in kept) == x.numel() * module.groups // module.in_channels + 1


def test_a_frozen_delta_and_an_input_without_grad_cost_nothing():
    module, x, deltas, indices = make("2d", torch.float32, r=(1, 2))
    deltas[0].requires_grad_(False)
    module.bias.requires_grad_(False)
    run(module, x.detach(), deltas, indices, [1.0, 1.0]).sum().backward()
    assert deltas[0].grad is None
    assert deltas[1].grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_as_torch_does_and_keeps_half_precision(dtype):
    module, x, deltas, indices = make("2d", torch.float32)
    kept = []
    with (
        torch.autocast("cpu", dtype),
        torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t),
    ):
        y = run(module, x, deltas, indices, [1.0])
        stock = module(x.detach())
    assert y.dtype == dtype
    assert torch.equal(y, stock)
    assert {t.dtype for t in kept if t.dim()} == {dtype}
    grad_output = torch.randn_like(y)
    y.backward(grad_output)
    _, grad_x, grad_weight, _ = reference(module, x, grad_output)
    assert x.grad.dtype == torch.float32
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(x.grad.double(), grad_x, rtol=0, atol=4 * unit * float(grad_x.abs().max()))
    want = grad_weight[:, indices[0]]
    torch.testing.assert_close(deltas[0].grad.double(), want, rtol=0, atol=4 * unit * float(want.abs().max()))


def test_a_weight_that_requires_grad_is_refused():
    module, x, deltas, indices = make("2d", torch.float32)
    module.weight.requires_grad_()
    with pytest.raises(ValueError, match="requires grad"):
        run(module, x, deltas, indices, [1.0])


@pytest.mark.parametrize("kind", MODULES)
def test_the_output_size_is_known_before(kind):
    module, x, _, _ = make(kind, torch.float32)
    geometry = Geometry.of(module)
    y = plain_convolution(x, module.weight, module.bias, geometry)
    assert geometry.output_size(x.shape, module.out_channels, module.kernel_size) == list(y.shape)
    assert geometry.output_size(x[0].shape, module.out_channels, module.kernel_size) == list(y[0].shape)


def test_a_step_along_the_gradient_is_a_step_of_the_weight():
    """The gradient of delta is the derivative of the output by the columns: a finite difference says so."""
    module, x, deltas, indices = make("2d groups circular", torch.float64, r=(2,))
    out = run(module, x, deltas, indices, [2.0]).square().sum()
    out.backward()
    direction, step = torch.randn_like(deltas[0], dtype=torch.float64), 1e-6
    geometry, around = Geometry.of(module), []
    for sign in (1, -1):
        weight = module.weight.index_add(1, indices[0], direction, alpha=2.0 * sign * step)
        around.append(plain_convolution(x.detach(), weight, module.bias, geometry).square().sum())
    slope = (around[0] - around[1]) / (2 * step)
    torch.testing.assert_close((deltas[0].grad.double() * direction).sum(), slope, rtol=1e-5, atol=1e-5)
