from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from functional.fixed_weight import FixedWeight, columns
from paca.functional.linear import LinearProduct, column_gradient
from paca.functional.train_columns import train_columns
from reference import reference_gradients, tolerance

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def run(x, weight, bias, deltas, indices, scales, input_dim=1):
    return train_columns(LinearProduct(input_dim), x, weight, bias, columns(deltas, indices, scales))


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
    y = run(x, stored, b, [delta], [indices], [0.5], input_dim=input_dim)
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
        return run(x, stored, bias, [delta], [indices], [0.7], input_dim=input_dim)

    assert torch.autograd.gradcheck(with_columns_written, (x, delta, bias))


@pytest.mark.parametrize("r", [1, 5])
def test_one_column_and_all_columns(r):
    x, weight, b, delta, indices = make(torch.float64, r=r)
    y = run(x, weight, b, [delta], [indices], [2.0])
    gy = torch.randn_like(y)
    y.backward(gy)
    torch.testing.assert_close(delta.grad, 2.0 * gy.T @ x.detach()[:, indices])


def test_empty_batch():
    x, weight, b, delta, indices = make(torch.float32, shape=(0, 3))
    y = run(x, weight, b, [delta], [indices], [1.0])
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
        run(inputs, stored, b, [delta], [indices], [1.0], input_dim=input_dim).backward(gy)
    torch.testing.assert_close(x.grad, strided.grad)
    torch.testing.assert_close(delta.grad, 2 * gy.reshape(-1, 7).T @ x.detach().reshape(-1, 5)[:, indices])


def test_only_the_selected_inputs_are_kept():
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    x, weight, b, delta, indices = make(torch.bfloat16, out=64, inp=48, r=2, shape=(100,))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        train_columns(LinearProduct(1), x, None, b, columns([delta], [indices], [1.0]), FixedWeight(weight))
    assert [(tuple(t.shape), t.dtype) for t in kept if t.is_floating_point()] == [((100, 2), torch.bfloat16)]
    assert [t.numel() for t in kept if not t.is_floating_point()] == [1]  # the tag
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(x, weight, b, [delta], [indices], [1.0])
    assert {t.data_ptr() for t in kept} - {weight.data_ptr()} == {t.data_ptr() for t in kept if t.shape == (100, 2)}


def test_kept_inputs_have_the_dtype_of_the_matmul_under_autocast():
    kept = []
    x, weight, b, delta, indices = make(torch.float32, shape=(8,))
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        y = run(x, weight, b, [delta], [indices], [1.0])
    assert y.dtype == torch.bfloat16
    assert [t.dtype for t in kept if t.shape == (8, 3)] == [torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward_inside", [True, False])
def test_autocast_gives_the_gradients_of_a_stock_linear_under_autocast(dtype, backward_inside):
    x, weight, b, delta, indices = make(torch.float32, shape=(8,))
    x2, w2 = x.detach().clone().requires_grad_(), weight.clone().requires_grad_()
    gy = torch.randn(8, 7).to(dtype)
    for forward, inputs in (
        (lambda: run(x, weight, b, [delta], [indices], [1.0]), x),
        (lambda: torch.nn.functional.linear(x2, w2, b), x2),
    ):
        with torch.autocast("cpu", dtype):
            y = forward()
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
        y = run(x.detach().requires_grad_(needed), weight, b, [delta], [indices], [1.0])
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] - flops[1] == 2 * 16 * 64 * 32


def test_a_frozen_delta_keeps_no_activation():
    kept = []
    x, weight, b, delta, indices = make(torch.float32, shape=(8,))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(x, weight, b, [delta.detach()], [indices], [1.0])
    assert {t.data_ptr() for t in kept} == {weight.data_ptr()}


def test_several_adapters_get_their_own_gradients():
    x, weight, b, first, first_indices = make(torch.float64, r=2, shape=(6,))
    second = torch.zeros(7, 4, dtype=torch.float64, requires_grad=True)
    second_indices = torch.tensor([0, 1, 3, 4])
    frozen = torch.zeros(7, 1, dtype=torch.float64)
    y = run(x, weight, b, [first, frozen, second], [first_indices, torch.tensor([2]), second_indices], [0.5, 1.0, 3.0])
    gy = torch.randn_like(y)
    y.backward(gy)
    torch.testing.assert_close(first.grad, 0.5 * gy.T @ x.detach()[:, first_indices])
    torch.testing.assert_close(second.grad, 3.0 * gy.T @ x.detach()[:, second_indices])


def test_a_trainable_bias_is_trained():
    x, weight, b, delta, indices = make(torch.float64, shape=(2, 3))
    b.requires_grad_()
    run(x, weight, b, [delta], [indices], [1.0]).sum().backward()
    torch.testing.assert_close(b.grad, torch.full((7,), 6.0, dtype=torch.float64))


def test_a_weight_that_requires_grad_is_refused():
    x, weight, b, delta, indices = make(torch.float32)
    with pytest.raises(ValueError, match="requires grad"):
        run(x, weight.requires_grad_(), b, [delta], [indices], [1.0])


@pytest.mark.parametrize("of", [lambda y: y.square().sum(), torch.sum], ids=["squares", "a sum"])
def test_a_second_derivative_is_refused(of):
    """Of the sum, too: it sends back a constant, which does not say that the gradient depends on the deltas."""
    x, weight, b, delta, indices = make(torch.float64)
    before = (3 * x).tanh()
    y = run(before, weight, b, [delta], [indices], [1.0])
    (gradient,) = torch.autograd.grad(of(y), x, create_graph=True)
    total = y.sum() + gradient.square().sum()
    for derive in (  # with inputs that are named, autograd runs what leads to them alone
        lambda: torch.autograd.grad(total, delta, retain_graph=True),
        lambda: total.backward(inputs=[delta], retain_graph=True),
        lambda: total.backward(retain_graph=True),
    ):
        with pytest.raises(RuntimeError, match="Second derivatives"):
            derive()
    assert delta.grad is None


def test_a_step_within_a_graph_is_not_taken_for_a_constant():
    """As in MAML: the outer loss depends on the deltas through the inner gradient, too."""
    x, weight, b, delta, indices = make(torch.float64)
    y = run(x, weight, b, [delta], [indices], [1.0])
    (gradient,) = torch.autograd.grad(y.square().sum(), delta, create_graph=True)
    again = run(x, weight, b, [delta - 0.1 * gradient], [indices], [1.0])
    with pytest.raises(RuntimeError, match="Second derivatives"):
        torch.autograd.grad(again.square().sum(), delta)


def test_without_a_source_a_weight_written_in_between_raises():
    x, weight, b, delta, indices = make(torch.float32)
    y = run(x, weight, b, [delta], [indices], [1.0])
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_source_gives_the_weight_of_both_passes_and_gets_its_tag_back():
    x, weight, b, delta, indices = make(torch.float64, shape=(6,))
    source = FixedWeight(weight.clone(), tag=7)
    y = train_columns(LinearProduct(1), x, None, b, columns([delta], [indices], [0.5]), source)
    assert torch.equal(y, torch.nn.functional.linear(x, weight, b))
    source.fixed.mul_(2)  # whether that is right is the source's to say
    gy = torch.randn_like(y)
    y.backward(gy)
    assert source.seen == [7]
    torch.testing.assert_close(x.grad, 2 * gy @ weight)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_repeated_forward_pass_replaces_the_tag(use_reentrant):
    x, weight, b, delta, indices = make(torch.float32, shape=(6,))
    tags, sources = iter([1, 2]), []

    def forward(inputs):
        sources.append(FixedWeight(weight, next(tags)))
        return train_columns(LinearProduct(1), inputs, None, b, columns([delta], [indices], [1.0]), sources[-1])

    checkpoint(forward, x, use_reentrant=use_reentrant).sum().backward()
    # Re-entrant, the repeated pass has a backward pass of its own; otherwise the first one's gets what it saved.
    assert [source.seen for source in sources] == ([[], [2]] if use_reentrant else [[2], []])


def test_a_scale_may_be_a_tensor():
    x, weight, b, delta, indices = make(torch.float64, shape=(6,))
    run(x, weight, b, [delta], [indices], [0.5]).sum().backward()
    want, delta.grad = delta.grad, None
    run(x, weight, b, [delta], [indices], [torch.tensor(0.5)]).sum().backward()
    assert torch.equal(delta.grad, want)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("input_dim", [1, 0])
def test_an_activation_in_place_may_follow(shape, input_dim):
    x, weight, b, delta, indices = make(torch.float32, shape=shape)
    stored = weight if input_dim == 1 else weight.t().contiguous()
    run(x, stored, b, [delta], [indices], [1.0], input_dim).relu().sum().backward()
    want, x.grad, delta.grad = (x.grad, delta.grad), None, None
    run(x, stored, b, [delta], [indices], [1.0], input_dim).relu_().sum().backward()
    assert torch.equal(x.grad, want[0])
    assert torch.equal(delta.grad, want[1])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients_bitwise(use_reentrant):
    x, weight, b, delta, indices = make(torch.float32, shape=(6,))

    def forward(inputs):
        return run(inputs, weight, b, [delta], [indices], [1.0]).tanh()

    forward(x).sum().backward()
    plain = x.grad.clone(), delta.grad.clone()
    x.grad = delta.grad = None
    checkpoint(forward, x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(x.grad, plain[0])
    assert torch.equal(delta.grad, plain[1])


def test_the_output_is_the_stock_modules_bitwise():
    from transformers.pytorch_utils import Conv1D

    x = torch.randn(2, 3, 5)
    linear, conv = torch.nn.Linear(5, 7), Conv1D(7, 5)
    assert torch.equal(LinearProduct(1).apply(x, linear.weight, linear.bias), linear(x))
    assert torch.equal(LinearProduct(0).apply(x, conv.weight, conv.bias), conv(x))


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


# -- columns that are added to an output -----------------------------------------------------------------------------


def added(y, x, deltas, indices, scales, rows=None, source=None):
    trained = columns(deltas, indices, scales, rows)
    return train_columns(LinearProduct(1), x, None, None, trained, source or FixedWeight(None), added_to=y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("ranks", [(1,), (5,), (3, 2)], ids=str)
def test_added_columns_agree_with_the_float64_reference(dtype, shape, ranks):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 5, generator=g).to(dtype).requires_grad_()
    y = torch.randn(*shape, 7, generator=g).to(dtype).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    deltas = [torch.randn(7, r, generator=g).to(dtype).to(wide).requires_grad_() for r in ranks]
    indices = [torch.randperm(5, generator=g)[:r].sort().values for r in ranks]
    scales = [0.5, -2.0][: len(ranks)]
    total = added(y, x, deltas, indices, scales)
    assert total.dtype == dtype
    gy = torch.randn(total.shape, generator=g).to(dtype)
    total.backward(gy)
    want, want_gx = y.detach().double(), torch.zeros(*shape, 5, dtype=torch.float64)
    for delta, i, scale in zip(deltas, indices, scales, strict=True):
        want = want + scale * x.detach().double()[..., i] @ delta.detach().double().t()
        want_gx[..., i] += scale * gy.double() @ delta.detach().double()
    torch.testing.assert_close(total.double(), want, **tolerance(dtype, 6 * len(ranks)))
    torch.testing.assert_close(x.grad.double(), want_gx, **tolerance(dtype, 8 * len(ranks)))
    assert torch.equal(y.grad, gy)
    for delta, i, scale in zip(deltas, indices, scales, strict=True):
        want_gd = scale * gy.double().reshape(-1, 7).T @ x.detach().double().reshape(-1, 5)[:, i]
        torch.testing.assert_close(delta.grad.double(), want_gd, **tolerance(dtype, 2 * max(1, gy.numel() // 7)))
        assert delta.grad.dtype == wide


def test_gradcheck_of_added_columns():
    g = torch.Generator().manual_seed(0)
    x, y, first, second = (
        torch.randn(*size, generator=g, dtype=torch.float64, requires_grad=True)
        for size in ((4, 5), (4, 7), (7, 2), (7, 3))
    )
    indices, rows = [torch.tensor([1, 4]), torch.tensor([0, 1, 3])], [torch.tensor([3, 0]), torch.tensor([1])]
    for which in (None, rows):
        assert torch.autograd.gradcheck(
            lambda x, y, *deltas, which=which: added(y, x, deltas, indices, [0.7, -1.5], which), (x, y, first, second)
        )


def test_no_added_columns_give_a_copy():
    x, y = torch.randn(4, 5, requires_grad=True), torch.randn(4, 7, requires_grad=True)
    total = added(y, x, [], [], [])
    total.backward(torch.ones(4, 7))
    assert torch.equal(total, y)
    assert total.data_ptr() != y.data_ptr()
    assert torch.equal(y.grad, torch.ones(4, 7))
    assert x.grad is None or not bool(x.grad.any())


def test_added_columns_keep_the_selected_inputs_alone_and_write_nothing():
    x, y = torch.randn(100, 48), torch.randn(100, 64)
    delta, indices = torch.randn(64, 2, requires_grad=True), torch.tensor([3, 17])
    before, kept = y.clone(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        added(y, x, [delta], [indices], [1.0])
    assert sorted(tuple(t.shape) for t in kept) == [(), (100, 2)]
    assert torch.equal(y, before)
    with torch.no_grad():
        added(y, x, [delta], [indices], [1.0])
    assert torch.equal(y, before)


def test_added_columns_under_autocast_have_the_outputs_dtype():
    x, y = torch.randn(8, 5, requires_grad=True), torch.randn(8, 7).bfloat16().requires_grad_()
    delta, indices, kept = torch.randn(7, 3, requires_grad=True), torch.tensor([0, 2, 3]), []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        total = added(y, x, [delta], [indices], [0.5])
    assert total.dtype == torch.bfloat16
    assert [t.dtype for t in kept if t.shape == (8, 3)] == [torch.bfloat16]
    gy = torch.randn(8, 7).bfloat16()
    total.backward(gy)
    assert (x.grad.dtype, delta.grad.dtype) == (torch.float32, torch.float32)
    want = 0.5 * gy.double().T @ x.detach().bfloat16().double()[:, indices]
    torch.testing.assert_close(delta.grad.double(), want, **tolerance(torch.bfloat16, 8))


def test_the_source_of_added_columns_checks_in_the_backward_pass():
    x, y = torch.randn(4, 5), torch.randn(4, 7)
    delta, source = torch.randn(7, 1, requires_grad=True), FixedWeight(None, tag=7)
    total = added(y, x, [delta], [torch.tensor([2])], [1.0], source=source)
    assert source.seen == []
    total.sum().backward()
    assert source.seen == [7]
