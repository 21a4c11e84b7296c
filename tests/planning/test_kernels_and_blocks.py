from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils
from trl.kernels import chunked_logprob

from paca.lean import gated_linear_unit, pointwise, rms_norm
from paca.planning.attention_kernels import attention_of
from paca.planning.fake_model import without_values
from paca.planning.live_memory import LiveMemory
from paca.planning.repeated_blocks import RepeatedBlocks


class Operators(TorchDispatchMode):
    """Names of the attention and matrix operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if "attention" in name or name in ("bmm", "mm", "where"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def operators(mask: str | None, fake: bool, **options: Any) -> list[str]:
    gqa = options.get("enable_gqa", False)
    with FakeTensorMode() if fake else torch.enable_grad():
        query = torch.zeros(2, 4, 6, 8, requires_grad=True)
        key, value = (torch.zeros(2, 2 if gqa else 4, 6, 8, requires_grad=True) for _ in range(2))
        if mask is not None:
            dtype = torch.bool if mask == "bool" else torch.float32
            options["attn_mask"] = torch.zeros(2, 1, 6, 6, dtype=dtype).requires_grad_(mask == "trained")
        attention = attention_of("cpu") if fake else F.scaled_dot_product_attention
        with Operators() as seen:
            attention(query, key, value, **options).sum().backward()
    return seen.names


@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (None, {"is_causal": True}),
        (None, {"is_causal": True, "enable_gqa": True}),
        (None, {"is_causal": True, "dropout_p": 0.1}),
        ("bool", {}),
        ("additive", {"scale": 0.3}),
        ("trained", {}),
    ],
)
def test_fake_attention_runs_the_operators_of_a_real_cpu(mask: str | None, options: dict[str, Any]) -> None:
    real = operators(mask, False, **dict(options))
    assert operators(mask, True, **dict(options)) == real
    assert real


@pytest.mark.parametrize(
    ("dtype", "masked", "kernel"),
    [
        (torch.bfloat16, False, "_scaled_dot_product_flash_attention"),
        (torch.bfloat16, True, "_scaled_dot_product_efficient_attention"),
        (torch.float32, False, "_scaled_dot_product_efficient_attention"),
    ],
)
def test_cuda_attention_goes_forward_and_backward_without_a_gpu(dtype: torch.dtype, masked: bool, kernel: str) -> None:
    with FakeTensorMode(), Operators() as seen:
        query, key, value = (torch.zeros(2, 4, 6, 8, dtype=dtype, requires_grad=True) for _ in range(3))
        mask = torch.zeros(2, 1, 6, 6, dtype=torch.bool) if masked else None
        output = attention_of("cuda")(query, key, value, attn_mask=mask)
        assert output.shape == query.shape
        output.sum().backward()
        assert key.grad.shape == key.shape
    assert [name for name in seen.names if "attention" in name] == [kernel, f"{kernel}_backward"]


def test_live_memory_follows_every_storage_once() -> None:
    with FakeTensorMode(), LiveMemory() as memory:
        memory.begin_window("first")
        x = torch.zeros(1000)  # 4000 bytes
        view = x[:10]
        y = x + 1
        del x
        assert memory.bytes == 8000  # the view holds all of x
        del view
        assert memory.bytes == 4000
        memory.begin_window("second")
        z = y * 2 + 3  # three at once
        del y, z
        assert memory.bytes == 0
    assert {name: sum(peak.values()) for name, peak in memory.peaks().items()} == {"first": 8000, "second": 12000}


def test_live_memory_counts_products_and_half_of_causal_attention() -> None:
    with FakeTensorMode(), LiveMemory() as memory:
        torch.zeros(3, 5) @ torch.zeros(5, 7)
        assert memory.flops == 2 * 3 * 5 * 7
        torch.zeros(3, 7).addmm_(torch.zeros(3, 5), torch.zeros(5, 7))
        assert memory.flops == 2 * 2 * 3 * 5 * 7
        memory.operators.clear()
        query = torch.zeros(2, 4, 6, 8)
        attention_of("cpu")(query, query, query, is_causal=True)
        assert memory.flops == 2 * 4 * 6 * 6 * (8 + 8)


def test_everything_replaced_for_a_simulation_is_put_back() -> None:
    def replaced() -> list[Any]:
        return [
            F.scaled_dot_product_attention,
            rms_norm.row_blocks,
            gated_linear_unit.row_blocks,
            pointwise.row_blocks,
            masking_utils.find_packed_sequence_indices,
            chunked_logprob._forward_tile,
            chunked_logprob._backward_tile,
        ]

    def fail() -> None:
        with without_values("cuda"):
            assert not any(now is then for now, then in zip(replaced(), before, strict=True))
            raise RuntimeError("inside")

    before = replaced()
    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert replaced() == before


def test_samples_hold_the_last_blocks_of_each_kind_in_order() -> None:
    blocks = RepeatedBlocks("layers", ("first", "a", "b", "a", "b", "a"))
    assert blocks.sample(2) == (0, 2, 3, 4, 5)
    assert blocks.with_one_more((0, 2, 3, 4, 5), "a") == (0, 1, 2, 3, 4, 5)
