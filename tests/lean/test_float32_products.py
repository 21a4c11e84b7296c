from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import pairwise
from multiprocessing.pool import ThreadPool

import pytest
import torch

from paca.lean import float32_products as module
from paca.lean.float32_products import faster_in_float32, fastest_products, float32_products

DTYPES = [torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1])).to(dtype)


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU on which small products gain too."""
    monkeypatch.setattr(module, "times_as_slow", lambda dtype: 7.0)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The products that were made in float32, by name."""
    names: list[str] = []

    def noting(name: str, product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *values, **options: [names.append(name), product(*values, **options)][1]

    monkeypatch.setattr(module, "_PRODUCTS", {name: noting(name, value) for name, value in module._PRODUCTS.items()})
    return names


def check_rounded_once(found: torch.Tensor, exact: torch.Tensor) -> None:
    assert found.dtype in DTYPES
    step = torch.finfo(found.dtype).eps * exact.abs() / 2
    assert ((found.double() - exact).abs() <= step * 1.01 + 1e-4 * exact.abs().max()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(70, 90, 80), (1030, 64, 1100), (100, 2500, 100)])
def test_a_product_is_summed_in_float32_and_rounded_once(
    shape: tuple[int, int, int], dtype: torch.dtype, seen: list[str]
) -> None:
    rows, inner, columns = shape
    a, b = drawn(rows, inner, dtype=dtype), drawn(columns, inner, dtype=dtype)
    with float32_products():
        found = a @ b.T
    check_rounded_once(found, a.double() @ b.T.double())
    assert seen == ["mm"]


@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (0.5, 2), (0, 1)])
@pytest.mark.parametrize("added", [(1100,), (1030, 1), (1030, 1100)])
def test_what_is_added_is_added_before_rounding(
    added: tuple[int, ...], beta: float, alpha: float, seen: list[str]
) -> None:
    a, b, more = drawn(1030, 70), drawn(70, 1100), drawn(*added)
    if not beta:
        more = torch.full_like(more, float("nan"))  # is not looked at
    with float32_products():
        found = torch.addmm(more, a, b, beta=beta, alpha=alpha)
    check_rounded_once(found, alpha * (a.double() @ b.double()) + (beta * more.double() if beta else 0))
    assert seen == ["addmm"]


@pytest.mark.parametrize(("batch", "columns"), [(3, 200), (40, 200), (2, 6000)])
def test_products_of_batches(batch: int, columns: int, seen: list[str]) -> None:
    a, b = drawn(batch, 200, 64), drawn(batch, columns, 64).transpose(1, 2)
    with float32_products():
        found = torch.bmm(a, b)
    check_rounded_once(found, a.double() @ b.double())
    assert seen == ["bmm"]


def test_results_go_where_they_are_asked_for(seen: list[str]) -> None:
    a, b, out = drawn(80, 90), drawn(90, 100), torch.empty(80, 100, dtype=torch.bfloat16)
    with float32_products():
        assert torch.mm(a, b, out=out) is out
        assert torch.equal(out, a @ b)
        assert torch.mm(a, b, out=out.new_empty(0)).shape == (80, 100)  # torch's own makes room
        with pytest.raises(RuntimeError, match="dtype"):
            torch.mm(a, b, out=out.float())
    assert seen == ["mm", "mm"]


def test_autocast_to_another_dtype_leaves_the_sums_in_float32() -> None:
    large = torch.full((2, 100, 100), 1000.0, dtype=torch.bfloat16)  # sums that float16 can't hold
    with float32_products(), torch.autocast("cpu", dtype=torch.float16):
        assert torch.bmm(large, large, out=torch.empty_like(large)).isfinite().all()


def test_contexts_may_end_in_any_order_in_any_thread() -> None:
    done, a, trouble = threading.Event(), drawn(64, 64), []

    def multiply() -> None:
        try:
            while not done.is_set():
                with float32_products():
                    a @ a
        except RuntimeError as error:
            trouble.append(error)

    threads = [threading.Thread(target=multiply) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        first, second = float32_products(), float32_products()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        a @ a
        second.__exit__(None, None, None)
    done.set()
    for thread in threads:
        thread.join()
    assert not trouble
    assert module._wanted == [0]


@pytest.mark.parametrize(("slower", "shape", "gains"), [
    (7.0, (600, 16, 1536), True), (7.0, (1, 1024, 1024), False), (1.8, (600, 16, 1536), False),
    (1.8, (600, 64, 1536), False), (1.8, (2048, 128, 2048), False), (1.8, (200, 576, 1536), True),
])  # fmt: skip
def test_products_that_convert_much_for_little_are_left_alone(
    slower: float, shape: tuple[int, int, int], gains: bool, monkeypatch: pytest.MonkeyPatch, seen: list[str]
) -> None:
    monkeypatch.setattr(module, "times_as_slow", lambda dtype: slower)
    rows, inner, columns = shape
    with float32_products():
        drawn(rows, inner) @ drawn(inner, columns)
    assert bool(seen) == gains


def test_layers_and_their_gradients_are_multiplied_so(seen: list[str]) -> None:
    layer, x = torch.nn.Linear(80, 96, dtype=torch.bfloat16), drawn(2, 50, 80).requires_grad_()
    with float32_products():
        layer(x).sum().backward()
    assert sorted(seen) == ["addmm", "mm", "mm"]
    assert x.grad is not None
    check_rounded_once(x.grad, layer.weight.detach().double().sum(0).expand(2, 50, 80))


def test_what_gains_nothing_is_left_alone(seen: list[str]) -> None:
    few, weight, wide = drawn(1, 64), drawn(64, 64), torch.randn(100, 100)
    products = [(few, weight), (wide, wide), (wide[None], wide[None]), (drawn(100, 0), drawn(0, 100))]
    before = [a @ b for a, b in products]
    with float32_products():
        after = [a @ b for a, b in products]
    assert all(map(torch.equal, before, after))
    assert not seen


def test_it_ends_with_the_context_also_after_an_error(seen: list[str]) -> None:
    a = drawn(100, 100)
    native = a @ a
    with pytest.raises(RuntimeError, match="shape"), float32_products(), float32_products():
        torch.nn.functional.linear(a, drawn(100, 90))
    assert torch.equal(a @ a, native)
    assert not seen


def test_compiled_products_too(seen: list[str]) -> None:
    a, b = drawn(100, 90), drawn(90, 110)
    with float32_products():
        found = torch.compile(lambda: a @ b, fullgraph=True)()
    check_rounded_once(found, a.double() @ b.double())
    assert seen == ["mm"]


def test_wrong_shapes_are_refused_as_before() -> None:
    a, b = drawn(100, 90), drawn(90, 100)
    batches, others = a.expand(2, 100, 90), b.expand(3, 90, 100)
    wrong = [(torch.mm, a, a), (torch.bmm, batches, others), (torch.mm, a, b.float()), (torch.mm, a, b.half()),
             (torch.addmm, b[0].float(), a, b), (torch.addmm, b, a, b)]  # fmt: skip
    wrong += [(torch.bmm, a, b), (torch.mm, batches, b)]
    for product, *factors in wrong:
        with pytest.raises(RuntimeError) as before:
            product(*factors)
        with float32_products(), pytest.raises(RuntimeError) as after:
            product(*factors)
        assert str(after.value) == str(before.value)


@pytest.mark.parametrize(("slower", "chosen"), [(1.7, True), (1.1, False), (0.5, False)])
def test_it_is_used_where_the_cpu_is_slower(
    slower: float, chosen: bool, monkeypatch: pytest.MonkeyPatch, seen: list[str]
) -> None:
    monkeypatch.setattr(module, "times_as_slow", lambda dtype: slower)
    a = drawn(400, 400)
    with fastest_products(CPU, torch.bfloat16):
        a @ a
    assert bool(seen) == chosen
    assert faster_in_float32(CPU, torch.bfloat16) == chosen
    assert not faster_in_float32(CPU, torch.float32)
    assert not faster_in_float32(torch.device("cuda"), torch.bfloat16)


TIMED = module.times_as_slow


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_times", {})


@pytest.mark.usefixtures("untimed")
def test_products_are_timed_in_each_dtype() -> None:
    threads = torch.get_num_threads()
    assert all(0 < TIMED(dtype) < 1000 for dtype in DTYPES)
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("untimed")
def test_a_timing_within_autocast_is_of_the_dtypes_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[torch.dtype] = []
    linear = torch.nn.functional.linear

    def noting(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        results.append((y := linear(x, weight)).dtype)
        return y

    monkeypatch.setattr(torch.nn.functional, "linear", noting)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        TIMED(torch.float16)
    assert set(results) == {torch.float16, torch.float32}


@pytest.mark.usefixtures("untimed")
def test_threads_that_ask_at_once_wait_for_one_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = []

    def slowly(dtype: torch.dtype) -> float:
        timings.append(dtype)
        time.sleep(0.05)
        return 2.0

    monkeypatch.setattr(module, "_measured", slowly)
    with ThreadPool(4) as pool:
        assert pool.map(TIMED, [torch.bfloat16] * 4) == [2.0] * 4
    assert timings == [torch.bfloat16]


@pytest.mark.parametrize("size", [0, 1, 1024, 1025, 5000])
def test_blocks_cover_each_place_once(size: int) -> None:
    blocks = module._blocks(size)
    assert blocks[0].start == 0
    assert blocks[-1].stop == size
    assert all(left.stop == right.start for left, right in pairwise(blocks))
    assert all(block.stop - block.start <= 1024 for block in blocks)
