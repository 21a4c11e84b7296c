"""The partially trained convolution against torch's own, in float64 and at its own precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from functional.fixed_weight import FixedWeight, columns
from paca.functional.convolution import ConvolutionProduct
from paca.functional.train_columns import train_columns

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


def product(module):
    return ConvolutionProduct.of(module)


def run(module, x, deltas, indices, scales):
    return train_columns(product(module), x, module.weight, module.bias, columns(deltas, indices, scales))


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
    """Within the error of a sum of `terms` products, accumulated in float32 or wider and rounded once."""
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


def test_an_activation_in_place_may_follow():
    module, x, deltas, indices = make("2d", torch.float32)
    run(module, x, deltas, indices, [1.0]).relu().sum().backward()
    want, x.grad, deltas[0].grad = (x.grad, deltas[0].grad), None, None
    run(module, x, deltas, indices, [1.0]).relu_().sum().backward()
    assert torch.equal(x.grad, want[0])
    assert torch.equal(deltas[0].grad, want[1])


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
        trained = columns(deltas, indices, [1.0])
        train_columns(product(module), x, None, module.bias, trained, FixedWeight(module.weight))
    assert sum(t.numel() for t in kept if t.is_floating_point()) == x.numel() * module.groups // module.in_channels
    assert [t.numel() for t in kept if not t.is_floating_point()] == [1]  # the tag


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
    with torch.autocast("cpu", dtype):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            y = run(module, x, deltas, indices, [1.0])
        stock = module(x.detach())
    assert y.dtype == dtype
    assert torch.equal(y, stock)
    inputs = [t for t in kept if t.is_floating_point() and t.data_ptr() != module.weight.data_ptr()]
    assert [(t.dtype, t.shape[1]) for t in inputs] == [(dtype, 2)]
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


def test_a_step_along_the_gradient_is_a_step_of_the_weight():
    """The gradient of delta is the derivative of the output by the columns: a finite difference says so."""
    module, x, deltas, indices = make("2d groups circular", torch.float64, r=(2,))
    out = run(module, x, deltas, indices, [2.0]).square().sum()
    out.backward()
    direction, step = torch.randn_like(deltas[0], dtype=torch.float64), 1e-6
    around = []
    for sign in (1, -1):
        weight = module.weight.index_add(1, indices[0], direction, alpha=2.0 * sign * step)
        around.append(product(module).apply(x.detach(), weight, module.bias).square().sum())
    slope = (around[0] - around[1]) / (2 * step)
    torch.testing.assert_close((deltas[0].grad.double() * direction).sum(), slope, rtol=1e-5, atol=1e-5)


# -- columns that are added to an output -----------------------------------------------------------------------------


def added(module, y, x, deltas, indices, scales, rows=None):
    trained = columns(deltas, indices, scales, rows)
    return train_columns(product(module), x, None, None, trained, FixedWeight(None), added_to=y)


def added_reference(module, y, x, deltas, indices, scales, rows):
    """A whole convolution for each sample, with the columns in its weight, in float64."""
    twin, samples = float64_twin(module), []
    for sample in range(x.shape[0]):
        weight = twin.weight.detach()
        for delta, chosen, scale, its in zip(deltas, indices, scales, rows, strict=True):
            if its is None or sample in its.tolist():
                weight = weight.index_add(1, chosen, delta, alpha=scale)
        inputs = x[sample : sample + 1]
        change = product(module).apply(inputs, weight, None) - product(module).apply(inputs, twin.weight.detach(), None)
        samples.append(y[sample : sample + 1] + change)
    return torch.cat(samples)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_added_columns_agree_with_float64(kind, dtype, by_row):
    module, x, deltas, indices = make(kind, dtype, (4,), r=(2, 5))
    deltas = [torch.randn_like(delta).to(dtype).float().requires_grad_() for delta in deltas]
    y = module(x.detach()).detach().requires_grad_()
    rows = [torch.tensor([3, 0]), torch.tensor([1])] if by_row else [None, None]
    total = added(module, y, x, deltas, indices, [3.0, -0.5], rows)
    assert total.dtype == dtype
    if by_row:
        assert torch.equal(total[2], y[2])
    grad_output = torch.randn_like(total)
    total.backward(grad_output)
    x64, *deltas64 = (t.detach().double().requires_grad_() for t in (x, *deltas))
    want = added_reference(module, y.detach().double(), x64, deltas64, indices, [3.0, -0.5], rows)
    want.backward(grad_output.double())
    terms = module.weight[0].numel() * 4
    check(total, want, dtype, terms)
    # Each adapter's part of the gradient is rounded to the dtype before they are added.
    torch.testing.assert_close(
        x.grad.double(), x64.grad, rtol=0, atol=4 * torch.finfo(dtype).eps * terms**0.5 * float(x64.grad.abs().max())
    )
    assert torch.equal(y.grad, grad_output)
    for delta, wide in zip(deltas, deltas64, strict=True):
        check(delta.grad, wide.grad, max(dtype, torch.float32, key=lambda d: torch.finfo(d).eps), 200)


@pytest.mark.parametrize("kind", ["1d", "2d groups", "2d reflect"])
def test_added_columns_for_inputs_without_a_batch_and_empty_ones(kind):
    module, x, deltas, indices = make(kind, torch.float64, ())
    deltas = [torch.randn_like(deltas[0]).requires_grad_()]
    y = module(x.detach()).detach()
    total = added(module, y, x, deltas, indices, [2.0])
    total.sum().backward()
    one = [t.detach().requires_grad_() for t in (x[None], deltas[0])]
    together = added(module, y[None], one[0], one[1:], indices, [2.0])
    together.sum().backward()
    torch.testing.assert_close(total, together[0])
    torch.testing.assert_close(x.grad, one[0].grad[0])
    torch.testing.assert_close(deltas[0].grad, one[1].grad)
    if module.padding_mode != "reflect":  # torch's own reflection padding refuses an empty batch
        empty = x.detach()[None][:0].requires_grad_()
        none = added(module, y[None][:0], empty, deltas, indices, [2.0])
        deltas[0].grad = None
        none.sum().backward()
        assert none.shape == (0, *y.shape)
        assert empty.grad.shape == empty.shape
        assert not bool(deltas[0].grad.any())


@pytest.mark.parametrize("grad", [False, True])
def test_added_columns_write_nothing(grad):
    module, x, deltas, indices = make("2d", torch.float32, (3,))
    y = module(x.detach())
    before = y.clone()
    with torch.set_grad_enabled(grad):
        for rows in (None, [torch.tensor([1])]):
            added(module, y, x, [torch.randn_like(deltas[0]).requires_grad_(grad)], indices, [1.0], rows)
    assert torch.equal(y, before)
