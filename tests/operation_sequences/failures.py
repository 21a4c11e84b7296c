"""Operations that fail in the middle: by an exception of somebody else's, or by Ctrl-C."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import rule
from torch import Tensor, nn, optim

import paca
from operation_sequences.checks import COUNTS, Checked
from operation_sequences.expected import Adapter, loss_of
from operation_sequences.interrupts import interrupted_at
from operation_sequences.subjects import tokens

INTERRUPTED = ["train", "infer", "switch", "disable", "enable", "merge", "unmerge", "rotate"]
INTERRUPTED += ["add", "delete", "save", "load", "swap", "cast", "state", "copy"]


class Planned(Exception):
    """Raised by the tests."""


class Breaks(optim.Optimizer):
    """Writes some of its parameters, then raises."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        for parameter in parameters[: (len(parameters) + 1) // 2]:
            if parameter.grad is not None:
                parameter.data.sub_(parameter.grad, alpha=0.05)
        raise Planned


class Failures(Checked):
    """After each of them the base is known, and whatever is active is right."""

    zero_gradients: Any
    forward_backward: Any
    name: Any
    switch_to: Any

    @rule(
        number=st.integers(0, 3), place=st.integers(0, 20), when=st.sampled_from(["forward", "inference", "backward"])
    )
    def pass_fails(self, number: int, place: int, when: str) -> None:
        kinds = (nn.Linear, nn.Conv1d, nn.Embedding)
        modules = [m for m in self.model.get_base_model().modules() if isinstance(m, kinds)]

        def fail(*_: Any) -> Any:
            raise Planned

        def fail_later(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(fail)

        handle = modules[place % len(modules)].register_forward_hook(fail_later if when == "backward" else fail)
        try:
            with torch.set_grad_enabled(when != "inference"):
                loss = loss_of(self.run(tokens(number)))
            if loss.requires_grad:
                loss.backward()
        except Planned:
            COUNTS[f"passes that failed: {when}"] += 1
        finally:
            handle.remove()
        self.zero_gradients()
        self.passes += 1
        self.at_once, self.may_be_parked = False, True

    @rule()
    def step_fails(self) -> None:
        """What it wrote already is found by the next pass."""
        held = [p for _, p in self.deltas() if p.requires_grad]
        if not held:
            return
        self.zero_gradients()
        self.forward_backward(0)
        with pytest.raises(Planned):
            Breaks(held).step()
        for (layer, name), delta in self.deltas():
            self.expected.adapters[name][layer].delta = delta.detach().clone()
            self.touched[name] += 1
        self.zero_gradients()
        self.compare_pass(1, gradients=True)
        self.doubtful = False
        COUNTS["steps that failed"] += 1

    # -- Ctrl-C --------------------------------------------------------------------------------------------------------

    @rule(
        what=st.sampled_from(INTERRUPTED),
        at=st.integers(1, 900),
        number=st.integers(0, 3),
        several=st.booleans(),
    )
    def interrupt(self, what: str, at: int, number: int, several: bool) -> None:
        name, expected, model = self.name(number), self.expected, self.model
        names = sorted({name, self.name(number + 1)}) if several else [name]
        self.zero_gradients()
        before = {n: _unions(a, self.subject.delta_dim) for n, a in expected.adapters.items()}
        if what in ("save", "load", "swap") and not self.saved:
            what = "state"
        if (what == "swap" and expected.merged) or (what == "cast" and expected.merged):
            what = "unmerge"
        if what in ("add", "load") and len(expected.adapters) > 3:
            what = "switch"
        if what == "delete" and (len(expected.adapters) < 2 or expected.merged):
            what = "switch"
        if what == "rotate" and expected.merged:
            what = "unmerge"
        held = [p for _, p in self.deltas() if p.requires_grad]
        optimizer = optim.AdamW(held, 0.01) if held else None

        def train() -> None:
            loss = loss_of(self.run(tokens(number)))
            if loss.requires_grad and optimizer is not None:
                loss.backward()
                optimizer.step()

        def swap() -> None:
            folder, _ = self.saved[number % len(self.saved)]
            with contextlib.suppress(ValueError):  # it does not fit
                paca.hotswap_adapter(model, folder, name)

        run = {
            "train": train,
            "infer": lambda: torch.no_grad()(self.run)(tokens(number)),
            "switch": lambda: model.base_model.set_adapter(names),
            "disable": model.base_model.disable_adapter_layers,
            "enable": model.base_model.enable_adapter_layers,
            "merge": lambda: model.merge_adapter(names),
            "unmerge": model.unmerge_adapter,
            "rotate": lambda: paca.rotate(model, None, at, adapter_name=name),
            "add": lambda: model.add_adapter("z", self.config({"r": 2, "random_seed": at})),
            "delete": lambda: model.delete_adapter(name),
            "save": lambda: model.save_pretrained(self.folder / "interrupted", selected_adapters=[name]),
            "load": lambda: model.load_adapter(self.saved[0][0], "z"),
            "swap": swap,
            "cast": lambda: model.to(expected.dtype),
            "state": model.state_dict,
            "copy": lambda: copy.deepcopy(model),
        }[what]
        with interrupted_at(at) as report:
            run()
        COUNTS[f"interrupted: {what}" if report.where else f"not interrupted in time: {what}"] += 1
        self._recover(what, name, names, before, bool(report.where))

    def _recover(self, what: str, name: str, names: list[str], before: Any, interrupted: bool) -> None:
        """Say once more what is to be active, and compare all."""
        expected, model = self.expected, self.model
        self.pending = None
        self.zero_gradients()
        self.doubtful = False
        if what == "delete":
            for layer in self.layers().values():
                if name in layer.r:
                    layer.delete_adapter(name)  # PEFT deletes its own entry first
            model.peft_config.pop(name, None)
            del expected.adapters[name]
            before.pop(name)
            expected.active = [n for n in expected.active if n != name] or [sorted(expected.adapters)[0]]
            model.base_model.set_adapter(expected.active)  # PEFT still names the one that is gone
        if what in ("add", "load"):
            if "z" in model.peft_config:
                model.delete_adapter("z")
            assert not any("z" in layer.r for layer in self.layers().values()), "a part of the new adapter is there"
        model.base_model.disable_adapter_layers()
        expected.merged, expected.disabled = {}, True
        for key, layer in self.layers().items():
            assert torch.equal(layer.base_layer.weight, expected.original(key)), f"{key} after Ctrl-C, disabled"
        model.base_model.enable_adapter_layers()
        expected.disabled = False
        for one in expected.adapters:
            found = self.read(one)
            if what not in ("train", "swap", "cast"):
                union = _unions(found, self.subject.delta_dim)
                assert union.keys() == before[one].keys()
                for key, values in before[one].items():
                    assert all(key_value_equal(union[key].get(c), v) for c, v in values.items()), f"{one} in {key} lost"
            expected.adapters[one] = found
        self.optimizers.clear()
        self.touched.update(["", *expected.adapters])
        active = [n for n in (names if what == "switch" else expected.active) if n in expected.adapters]
        self.switch_to(active or [sorted(expected.adapters)[0]])
        self.compare_pass(2, gradients=True)
        COUNTS["recoveries compared"] += 1


def key_value_equal(found: Tensor | None, want: Tensor) -> bool:
    return not want.any() if found is None else torch.equal(found.double(), want.double())


def _unions(adapter: Adapter, dim: int) -> dict[str, dict[int, Tensor]]:
    return {key: columns.union(dim) for key, columns in adapter.items()}
