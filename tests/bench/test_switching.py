"""Switching between two adapters."""

from __future__ import annotations

import pytest
import torch

from bench.tiny_bench import prepared, settings, step
from paca.bench.base_model import build_base_model
from paca.bench.methods import METHODS, MethodUnavailable
from paca.bench.switching import RECOMPILATIONS, add_second_adapter, count_recompilations, time_switches


def test_the_second_adapter_trains_other_columns() -> None:
    one = step("paca")
    add_second_adapter(one.model, METHODS["paca"])
    layer = one.model.get_submodule("base_model.model.layers.0.mlp.up_proj")
    assert not torch.equal(layer.paca_indices["default"], layer.paca_indices["second"])
    assert one.model.active_adapter == "default"
    assert len(time_switches(one, rounds=3)) == 3
    assert one.model.active_adapter == "default"


def test_the_second_adapter_has_the_dtype_of_the_first() -> None:
    base = build_base_model(settings())
    for name, dtype in (("lora", torch.float32), ("lora-tuned", torch.bfloat16)):
        model = prepared(base, name)
        add_second_adapter(model, METHODS[name])
        assert {p.dtype for n, p in model.named_parameters() if ".second." in n} == {dtype}


@pytest.mark.parametrize("name", ["frozen", "full"])
def test_without_adapters_there_is_nothing_to_switch(name: str) -> None:
    with pytest.raises(MethodUnavailable, match="no adapter"):
        add_second_adapter(prepared(build_base_model(settings()), name), METHODS[name])


def test_recompilations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are counted over the steps that they belong to; the compiler is played by the step."""
    graphs = [0]
    active = ["default"]
    made = {"default": False, "second": False}

    class Model:
        def set_adapter(self, name: str) -> None:
            active[0] = name

    class Step:
        model = Model()

        def run(self) -> None:
            if not made[active[0]]:
                made[active[0]] = True
                graphs[0] += 2

    monkeypatch.setattr("paca.bench.switching.graphs_compiled", lambda: graphs[0])
    found = count_recompilations(Step())  # type: ignore[arg-type]
    assert dict(zip(RECOMPILATIONS, found, strict=True)) == {"steps": 0, "first_switch": 2, "switch_back": 0}
