"""Steps that are simulated on a device of the table: operators, their times, and the methods beside each other."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import peft
import pytest
import torch
from architectures import config
from torch._subclasses.fake_tensor import FakeTensorMode

import paca
from paca.planning import MemoryEstimate, Setting, estimate, memory_estimate
from paca.planning.device_time import Efficiency, host_seconds, step_time, tile_share
from paca.planning.devices import DEVICES, find_device
from paca.planning.live_memory import LiveMemory
from paca.planning.memory_estimate import prepare_model, trace_step
from paca.planning.on_device import OnDevice, simulate_on
from paca.planning.operators import Operator
from paca.planning.repeated_blocks import copy_with_blocks, find_blocks
from paca.planning.simulated_step import simulate
from paca.planning.step_trace import StepTrace

A100 = find_device("a100-80gb")
R, ROWS = 16, (2, 32)


@cache
def timed() -> MemoryEstimate:
    setting = Setting(ROWS[1], ROWS[0], device="cuda", chunked_loss=False)
    return estimate(config("llama", dtype=torch.bfloat16), setting, paca.PacaConfig(r=R, paca_alpha=R), timed=True)


def operator(name: str = "add", phase: str = "forward", **more: Any) -> Operator:
    fields = {"flops": 0, "bytes": 0, "product": None, "dtype": torch.bfloat16, "launches": True, "tensors": 1, **more}
    return Operator(name, phase, **fields)


def recorded(run: Any, *shapes: tuple[int, ...]) -> Operator:
    """What `run` launches on tensors of these shapes in bfloat16."""
    with FakeTensorMode():
        tensors = [torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes]
        with LiveMemory() as memory:
            run(*tensors)
    (only,) = [found for found in memory.operators if found.launches]
    return only


def test_the_table_of_devices_is_well_formed() -> None:
    assert len(DEVICES) == 25
    for name, device in DEVICES.items():
        assert name == device.name
        assert "data sheet" in device.source or "white paper" in device.source
        assert 10 * 2**30 <= device.memory <= 192 * 2**30
        assert 0.97 <= device.usable / device.memory < 1
        assert " issue " in device.usable_source or "an estimate: 98 %" in device.usable_source
        assert 0.3e12 <= device.bandwidth < 9e12  # bytes, not GB
        half = device.peak["float16"]
        assert device.peak.get("bfloat16", half) == half > device.peak["float32"] > 8e12
        assert 0 < device.attention < 1
        assert device.cache < device.memory / 100
        # The product of matrices of 8192 is bound by operations, the sum of two by the memory.
        assert 2 * 8192**3 / half > 3 * 2 * 8192**2 / device.bandwidth
    assert A100.peak_of(torch.float64) == A100.peak_of(torch.float32)


def test_without_units_for_bfloat16_the_rate_is_that_of_float32() -> None:
    old = {name for name, device in DEVICES.items() if not device.has_bfloat16}
    assert old == {"t4", "v100-16gb", "v100-32gb"}
    for name in old:
        device = find_device(name)
        assert device.peak_of(torch.bfloat16) == device.peak_of(torch.float32) < device.peak_of(torch.float16) / 7
    product = {"flops": 10**12, "product": (1, 8192, 8192, 8192), "bytes": 10**8}
    slow, fast = (operator("mm", dtype=dtype, **product) for dtype in (torch.bfloat16, torch.float16))
    t4 = find_device("t4")
    assert step_time({slow: 1}, t4).device > 7 * step_time({fast: 1}, t4).device
    assert "counted at its rate in float32" in OnDevice(t4, (), torch.bfloat16).notes[0]
    sentences = OnDevice(t4, (), torch.bfloat16).notes[1].split(". ")
    assert len(sentences) == 2
    assert not OnDevice(A100, (), torch.bfloat16).notes


def test_devices_are_found_as_people_write_them() -> None:
    assert find_device("A100") is find_device("A100-80GB") is A100
    assert find_device("RTX 4090").name == "rtx4090"
    assert find_device("RTX A6000").name == "a6000"
    with pytest.raises(paca.PacaError, match="Did you mean 'h100'"):
        find_device("h10")
    with pytest.raises(paca.PacaError, match="gaudi2"):
        find_device("abacus")


def test_the_operations_of_a_step_are_those_of_the_formula() -> None:
    shape = config("llama")
    tokens = ROWS[0] * ROWS[1]
    h, m, kv = shape.hidden_size, shape.intermediate_size, shape.hidden_size // 2
    layers = [(h, h), (h, kv), (h, kv), (h, h), (h, m), (h, m), (m, h)]  # q, k, v, o, gate, up, down
    blocks = shape.num_hidden_layers
    forward = blocks * sum(2 * tokens * n * k for k, n in layers)
    no_gradient = sum(2 * tokens * n * k for k, n in layers[:3])  # nothing is trained below the first block
    columns = blocks * sum(2 * tokens * n * R for _, n in layers)
    head = 2 * 2 * tokens * h * shape.vocab_size
    heads, width = shape.num_attention_heads, h // shape.num_attention_heads
    one = 2 * ROWS[0] * heads * ROWS[1] ** 2 * width // 2  # causal
    attention = blocks * (2 + 5) * one
    assert timed().flops == 2 * forward - no_gradient + columns + head + attention
    counted = sum(o.flops * count for o, count in timed().operators.items())
    assert counted == 2 * forward - no_gradient + columns + head + attention


def test_bytes_are_those_that_are_read_and_written() -> None:
    product = recorded(torch.matmul, (3, 5), (5, 7))
    assert (product.bytes, product.product) == (2 * (3 * 5 + 5 * 7 + 3 * 7), (1, 3, 7, 5))
    assert recorded(lambda a, b: a + b.expand(8, 4), (8, 4), (1, 4)).bytes == 2 * (32 + 4 + 32)
    assert recorded(lambda a, b: a.copy_(b), (8, 4), (8, 4)).bytes == 2 * 2 * 32
    assert recorded(lambda a, b: a.add_(b), (8, 4), (8, 4)).bytes == 2 * 3 * 32
    assert recorded(lambda a: a.index_select(0, torch.empty(3, dtype=torch.int64)), (800, 4)).bytes == 2 * 2 * 12
    listed = recorded(lambda a, b: torch._foreach_add([a, b], 1), (8,), (4,))
    assert (listed.tensors, listed.bytes) == (2, 2 * 2 * 12)
    assert recorded(lambda a: a.t()[1:].neg(), (4, 4)).name == "neg"  # views launch nothing


def test_a_later_step_of_paca_writes_its_columns_all_together() -> None:
    names: Counter[str] = Counter()
    for found, count in timed().operators.items():
        names[f"{found.phase} {found.name}"] += count
    assert names["step _foreach_copy_"] == names["step _foreach_add"] == names["step _fused_adamw_"] == 1
    assert not any("index_copy" in name for name in names)
    assert not any(name.startswith("forward _foreach") for name in names)
    assert sum(found.waits * count for found, count in timed().operators.items()) == 0


@pytest.mark.slow(reason="simulates models over and over")
def test_a_few_blocks_tell_the_time_of_all() -> None:
    setting = Setting(32, 2, device="cuda", chunked_loss=False)
    shape = config("llama", dtype=torch.bfloat16, num_hidden_layers=5)
    root = prepare_model(shape, paca.PacaConfig(r=R)).get_base_model()
    few = trace_step(root, setting, timed=True)
    everything = copy_with_blocks(root, None, ())
    blocks = find_blocks(root)
    whole = simulate(everything, setting, blocks.owner(everything), None, timed=True)
    times = [step_time(trace.operators, A100) for trace in (few, whole)]
    for name in ("device", "host", "total"):
        assert getattr(times[0], name) == pytest.approx(getattr(times[1], name), rel=1e-9)


def test_tiles_that_fill_the_device_reach_its_rate() -> None:
    assert tile_share((1, 12 * 256, 9 * 128, 4096), 108) == 1  # one tile for each
    assert tile_share((1, 12 * 256 + 1, 9 * 128, 4096), 108) < 0.9
    assert tile_share((1, 8, 4096, 4096), 108) < 0.3  # 8 rows in tiles of at least 64
    assert tile_share((1, 128, 128, 128), 108) < 0.03
    assert tile_share((1, 128, 128, 8192), 108) > 5 * tile_share((1, 128, 128, 128), 108)  # the sum is split


def test_the_slower_of_device_and_host_counts() -> None:
    large = operator("mm", flops=10**12, product=(1, 8192, 8192, 8192), bytes=10**8)
    small = operator("add", "backward", bytes=2)
    time = step_time({large: 1, small: 100}, A100, Efficiency(kernel=1e-6, host_backward=1e-5))
    assert time.device == pytest.approx(
        10**12 / (312e12 * 0.74 * tile_share(large.product, 108)) + 1e-6 + 1e-4, rel=1e-3
    )
    assert time.total == pytest.approx(time.device - 1e-4 + 100 * 1e-5, rel=1e-3)
    assert 0 < time.launch_bound < 1
    assert step_time({operator("_local_scalar_dense"): 3}, A100).waits == 3
    listed = operator("_foreach_add", tensors=101)
    assert host_seconds(listed, Efficiency()) > host_seconds(operator(), Efficiency()) + 50e-6
    held, moved = operator(bytes=A100.cache // 2), operator(bytes=A100.cache // 2 + 1)
    assert step_time({held: 1}, A100).device < step_time({moved: 1}, A100).device


@pytest.mark.slow(reason="simulates models over and over")
def test_methods_stand_beside_each_other() -> None:
    pytest.importorskip("bitsandbytes")
    model = prepare_model(config("llama", dtype=torch.bfloat16, num_hidden_layers=2))
    found = simulate_on(model, Setting(64), paca.PacaConfig(r=4), find_device("h100"), compare=True)  # type: ignore[arg-type]
    rows = {row.method: row for row in found.rows}
    assert [*rows] == ["paca", "lora", "lora-tuned", "qpaca", "qlora"]
    assert not found.refused
    trainable = {row.estimate.trainable for row in found.rows}
    assert max(trainable) / min(trainable) < 1.15
    assert rows["lora"].r == rows["qlora"].r == 2
    assert (
        rows["lora"].estimate.activations > rows["lora-tuned"].estimate.activations > rows["paca"].estimate.activations
    )
    assert rows["qpaca"].estimate.parts["weights"] < rows["paca"].estimate.parts["weights"]
    assert rows["paca"].time.host < rows["lora-tuned"].time.host < rows["lora"].time.host
    assert rows["paca"].hours(3600) == rows["paca"].time.total
    assert rows["paca"].tokens_per_second == 64 / rows["paca"].time.total
    (alone,) = simulate_on(model, Setting(64), None, A100).rows  # type: ignore[arg-type]
    assert alone.method == "full"


@pytest.mark.parametrize(
    ("where", "layers"),
    [
        ({"layers_to_transform": 1, "layers_pattern": "layers", "exclude_modules": ["down_proj"]}, 6),
        ({"target_modules": r".*\.0\..*_proj"}, 7),
        ({"modules_to_save": ["lm_head"]}, 14),
        (None, 4),
    ],
)
def test_the_other_methods_go_where_the_planned_one_goes(
    where: dict[str, Any] | None, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = StepTrace(peaks={"no step": Counter()})  # what steps take, the tests above see
    monkeypatch.setattr(memory_estimate, "trace_step", lambda *_: nothing)
    model: Any = prepare_model(config("llama", dtype=torch.bfloat16, num_hidden_layers=2))
    adapter: Any = peft.LoraConfig(r=4, task_type="CAUSAL_LM")  # query and value alone, as PEFT has it
    if where is not None:
        adapter = paca.PacaConfig(r=8, **where)
    others = simulate_on(model, Setting(64), adapter, find_device("h100"), compare=True).rows[:3]
    assert {row.method for row in others} == {"paca", "lora", "lora-tuned"}
    assert [row.estimate.layers for row in others] == [layers] * 3
    trained = [row.estimate.trainable for row in others]
    assert max(trained) / min(trained) < 1.2
    ranks = {row.method: row.r for row in others}
    assert 0.25 < ranks["lora"] / ranks["paca"] < 0.75  # type: ignore[operator]  # a LoRA's column has two sides
