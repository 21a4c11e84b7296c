"""Operations that write, move, copy or average values from outside."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import paca
from operation_sequences.checks import COUNTS, PREFIX, Checked
from operation_sequences.subjects import logits_of, tokens

SEEDS = st.integers(0, 9)


def noise_like(tensor: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.1).to(tensor.dtype)


class Values(Checked):
    """Scales, writes into deltas and weights, casts, copies, averages, state dicts."""

    model: Any
    forward_backward: Any
    step: Any
    zero_gradients: Any
    name: Any
    written: Any

    # -- scales --------------------------------------------------------------------------------------------------------

    @rule(number=st.integers(0, 3), scale=st.sampled_from([0.5, 1.0, -2.0]), how=st.sampled_from(["set", "times"]))
    def scale(self, number: int, scale: float, how: str) -> None:
        name = self.name(number)
        if self.pending is not None:
            self.pending.held = ("another scale",)  # a checkpointed pass can't be repeated then
        for key, layer in self.layers().items():
            if how == "set" and name in layer.scaling:
                layer.set_scale(name, scale)
                self.expected.adapters[name][key].scale = scale * layer.paca_alpha[name] / layer.r[name]
            elif how == "times":
                layer.scale_layer(scale)
                for active in self.expected.active:
                    if key in self.expected.adapters[active]:
                        self.expected.adapters[active][key].scale *= scale

    # -- deltas --------------------------------------------------------------------------------------------------------

    @rule(
        number=st.integers(0, 3),
        seed=SEEDS,
        how=st.sampled_from(["in place", "replaced", "load_state_dict", ".data, refresh"]),
    )
    def write_delta(self, number: int, seed: int, how: str) -> None:
        name = self.name(number)
        values = {key: delta.detach() + noise_like(delta, seed) for key, delta in self.deltas(name)}
        if how == "load_state_dict":
            state = {f"{PREFIX}{layer}.paca_delta.{name}": value for (layer, _), value in values.items()}
            folded = {
                key: value
                for key, value in self.model.state_dict().items()
                if "paca_folded" in key and key.endswith(f".{name}")
            }
            self.model.load_state_dict({**state, **folded}, strict=False)
        elif how == "replaced":
            for layer, adapter in values:
                old = self.layers()[layer].paca_delta[adapter]
                self.layers()[layer].paca_delta[adapter] = nn.Parameter(
                    values[layer, adapter].clone(), requires_grad=old.requires_grad
                )
                self.gradients.pop((layer, adapter), None)
        else:
            for key, delta in self.deltas(name):
                with torch.no_grad():
                    (delta.data if how.startswith(".data") else delta).copy_(values[key])
        if how.startswith(".data"):
            paca.refresh(self.model)
        for (layer, _), value in values.items():
            self.expected.adapters[name][layer].delta = value.clone()
        self.touched[name] += 1
        self.at_once = how in ("load_state_dict", ".data, refresh") and not self.doubtful
        self.doubtful = self.doubtful or not self.at_once
        if how == "load_state_dict":
            self.may_be_parked = True
        COUNTS[f"deltas written: {how}"] += 1

    @rule(seed=SEEDS)
    def step_by_hand(self, seed: int) -> None:
        """An optimizer that is no `Optimizer` and writes through `.data`. Where one that is trained it before,
        `paca.refresh` has to be called (docs/method.md)."""
        self.zero_gradients()
        self.forward_backward(seed % 4)
        trusting = any(not layer.base_layer.columns.trusted.isdisjoint(layer.r) for layer in self.layers().values())
        for (layer, name), delta in self.deltas():
            if delta.grad is not None:
                delta.data.sub_(delta.grad, alpha=0.05)
                self.expected.adapters[name][layer].delta = delta.detach().clone()
                self.touched[name] += 1
        self.zero_gradients()
        if trusting:
            paca.refresh(self.model)
        self.forward_backward(seed % 4)
        self.zero_gradients()

    # -- the pretrained weights ----------------------------------------------------------------------------------------

    @precondition(lambda self: not self.expected.merged)
    @rule(seed=SEEDS, how=st.sampled_from(["load_state_dict", "disabled"]))
    def write_base(self, seed: int, how: str) -> None:
        keys = sorted(self.layers())
        key = keys[seed % len(keys)]
        new = self.expected.original(key) + noise_like(self.expected.original(key), seed)
        self.handed.clear()  # a state dict shares memory with what is loaded into
        if how == "disabled":
            with self.model.disable_adapter(), torch.no_grad():
                self.layers()[key].base_layer.weight.copy_(new)
        else:
            state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            name = f"{PREFIX}{key}.base_layer.weight"
            state[name if name in state else name.removesuffix(".weight")] = new
            self.model.load_state_dict(state)
            self.touched.update(list(self.expected.adapters))
        self.expected.stock.get_parameter(self.expected.weight_name(key)).data.copy_(new)
        self.touched[""] += 1
        self.doubtful = self.doubtful and how == "disabled"
        self.written()

    # -- moves and copies ----------------------------------------------------------------------------------------------

    @rule(
        dtype=st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16]),
        how=st.sampled_from(["to", "base", "type"]),
    )
    def cast(self, dtype: torch.dtype, how: str) -> None:
        if dtype == torch.bfloat16 and not self.subject.low_precision:
            dtype = torch.float32
        if self.expected.merged:
            self.model.unmerge_adapter()
            self.expected.merged = {}
        (self.model.get_base_model() if how == "base" else self.model).to(dtype)
        self.expected.cast(dtype)
        self.zero_gradients()
        self.optimizers.clear()
        self.touched.update(["", *self.expected.adapters])
        self.doubtful = False
        self.written()

    @rule()
    def move(self) -> None:
        self.model.to("cpu")
        self.model.cpu()
        self.touched.update(["", *self.expected.adapters] if self.doubtful else [])
        self.doubtful = False
        self.written()

    @rule(how=st.sampled_from(["deepcopy", "pickle", "torch.save"]), goes_on=st.booleans())
    def copy(self, how: str, goes_on: bool) -> None:
        """A copy is right, and its own; the sequence goes on with it, or with the original."""
        if how == "deepcopy":
            other = copy.deepcopy(self.model)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(self.model))
        else:
            file = io.BytesIO()
            torch.save(self.model, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        mine, self.may_be_parked = self.model, True
        left, taken = (mine, other) if goes_on else (other, mine)
        if goes_on:
            self.model, self.compiled_model = taken, None
            self.optimizers.clear()
            self.gradients, self.pending, self.doubtful = {}, None, False
            self.written()
        with torch.no_grad():
            self.close(logits_of(left(tokens(1))), self.expected.forward(tokens(1)), "output")
            for layer in self.layers(left).values():
                for delta in layer.paca_delta.values():
                    delta.mul_(3)
            left(tokens(1))
        COUNTS[f"copies: {how}"] += 1

    @rule()
    def hold_a_state_dict(self) -> None:
        """What it shares with the model may not change while the model goes on."""
        state = {name: t for name, t in self.model.state_dict().items() if "base_layer" in name}
        self.handed = [(tensor, tensor.clone()) for tensor in state.values()]
        self.may_be_parked = True

    @rule()
    def let_go_of_the_state_dict(self) -> None:
        self.handed = []

    # -- averages ------------------------------------------------------------------------------------------------------

    @rule(how=st.sampled_from(["load_state_dict", "copy_", ".data"]), seed=SEEDS)
    def average(self, how: str, seed: int) -> None:
        """Evaluate with an average of the trained deltas in their place, and go on with the last ones."""
        if not self.trainable() or any(c.folded for a in self.expected.adapters.values() for c in a.values()):
            return
        last = {key: delta.detach().clone() for key, delta in self.deltas() if delta.requires_grad}
        average = {key: delta.lerp(noise_like(delta, seed), 0.5) for key, delta in last.items()}
        training = self.model.training
        for values in (average, last):
            if how == ".data":  # seen where the mode changes, which is when averages are swapped
                self.compare_pass()
                self.model.train(not self.model.training)
            if how == "load_state_dict":
                names = {f"{PREFIX}{layer}.paca_delta.{name}": value for (layer, name), value in values.items()}
                self.model.load_state_dict(names, strict=False)
            for key, delta in self.deltas():
                if key in values and how != "load_state_dict":
                    with torch.no_grad():
                        (delta.data if how == ".data" else delta).copy_(values[key])
                if key in values:
                    self.expected.adapters[key[1]][key[0]].delta = values[key].clone()
                    self.touched[key[1]] += 1
            self.compare_pass()
            self.doubtful = False
        self.model.train(training)
        COUNTS[f"averages: {how}"] += 1

    @rule(kind=st.sampled_from(["SWA", "EMA"]))
    def averaged_model(self, kind: str) -> None:
        """torch's `AveragedModel` averages base weights too: it is right, or raises; the model itself is untouched."""
        if self.expected.merged:
            return
        averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9) if kind == "EMA" else None)
        averaged.update_parameters(self.model)
        before = self.expected.copy()
        self.zero_gradients()
        self.forward_backward(1)
        self.step("AdamW")
        self.zero_gradients()
        averaged.update_parameters(self.model)
        weight = 0.9 if kind == "EMA" else 0.5
        for name, adapter in before.adapters.items():
            for key, columns in adapter.items():
                columns.delta = columns.delta.lerp(self.expected.adapters[name][key].delta, 1 - weight)
        try:
            with torch.no_grad():
                found = logits_of(averaged(tokens(2)))
        except RuntimeError as error:
            if "not known any more" not in str(error):
                raise
            COUNTS[f"{kind} models that raised"] += 1
        else:
            self.close(found, before.forward(tokens(2)), "output")
            COUNTS[f"{kind} models compared"] += 1
        self.may_be_parked = True
