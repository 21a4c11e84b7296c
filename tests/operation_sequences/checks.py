"""An adapted model beside what is expected of it, and how the two are compared."""

from __future__ import annotations

import copy
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import paca
from operation_sequences.expected import Adapter, Columns, Expected, Gradients
from operation_sequences.subjects import Subject, logits_of, tokens
from paca.layers import PacaLayer, paca_layers

PREFIX = "base_model.model."
RELATIVE = {torch.float64: 1e-7, torch.float32: 2e-4, torch.bfloat16: 0.15}
"""How much of the norm an output or a gradient may be off: some thousand roundings of the dtype. (Norms
of Llama are taken in float32 whatever the dtype: a float64 that rounds to another float32 shows there.)"""
COUNTS: Counter[str] = Counter()
"""What was run and compared in this process."""


@dataclass
class Pending:
    """A forward pass that waits for its backward pass."""

    loss: Tensor
    gradients: Gradients
    touched: dict[str, int]
    held: tuple[str, ...]
    checkpointed: str | None
    compiled: bool
    passes: int


class Checked:
    """A model and what is expected of it. `start` has to be called first."""

    subject: Subject
    model: Any

    def start_with(self, subject: Subject, settings: dict[str, Any], compiled: bool) -> None:
        warnings.filterwarnings("ignore")
        self.subject, self.expected = subject, Expected(subject)
        self.folder = Path(tempfile.mkdtemp(prefix="sequences-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.gradients: Gradients = {}  # accumulated
        self.pending: Pending | None = None
        self.touched: Counter[str] = Counter()  # how often an adapter's values, or the base ("") changed
        self.passes = 0  # that recorded gradients
        self.at_once = True  # the weights have to hold now what is active, or their originals
        self.may_be_parked = False
        self.rotations = 0
        self.saved: list[tuple[Path, Adapter]] = []
        self.handed: list[tuple[Tensor, Tensor]] = []  # of a state dict: its tensors, and what they have to be
        self.optimizers: dict[str, tuple[Any, Any, list[Any], list[Any]]] = {}
        torch.manual_seed(1)
        self.model = peft.get_peft_model(subject.stock(), self.config(settings), adapter_name="k")
        self.model.eval()
        self.expected.adapters["k"], self.expected.active = self.read("k"), ["k"]
        self.compiles, self.compiled_model = compiled, None
        if compiled:
            torch._dynamo.reset()

    def config(self, settings: dict[str, Any]) -> paca.PacaConfig:
        task = {"task_type": "CAUSAL_LM"} if self.subject.is_transformer else {}
        return paca.PacaConfig(**{"init_weights": False, **self.subject.targets, **task, **settings})

    # -- the model's side ----------------------------------------------------------------------------------------------

    def layers(self, model: Any = None) -> dict[str, PacaLayer]:
        """The adapted layers by their names in the base model."""
        found = (self.model if model is None else model).named_modules()
        return {name.removeprefix(PREFIX): m for name, m in found if isinstance(m, PacaLayer)}

    def deltas(self, *names: str) -> Iterator[tuple[tuple[str, str], nn.Parameter]]:
        """Those of adapters, by layer and adapter."""
        for key, layer in self.layers().items():
            for name in names or tuple(layer.paca_delta):
                if name in layer.paca_delta:
                    yield (key, name), layer.paca_delta[name]

    def read(self, name: str) -> Adapter:
        """What the model says an adapter's values are."""
        adapter = {}
        for key, layer in self.layers().items():
            if name in layer.paca_delta:
                indices, folded = layer.paca_indices[name].clone(), layer.folded.get(name)
                assert torch.equal(indices, indices.unique()), "indices are sorted, without repeats"
                dim = self.subject.delta_dim
                parts = (
                    {}
                    if folded is None
                    else dict(zip(folded.indices.tolist(), folded.delta.clone().unbind(dim), strict=True))
                )
                delta = layer.paca_delta[name].detach().clone()
                adapter[key] = Columns(indices, delta, layer.scaling[name], parts)
        return adapter

    def trainable(self, *names: str) -> list[tuple[str, str]]:
        """The deltas that gradients are taken of."""
        return [key for key, delta in self.deltas(*names) if delta.requires_grad]

    def run(self, x: Tensor, entry: str = "model", **settings: Any) -> Tensor:
        """The logits, through one of the ways in."""
        if entry == "base":
            return logits_of(self.model.get_base_model()(x, **settings))
        if self.compiles and entry == "compiled" and not settings:
            if self.compiled_model is None:
                self.compiled_model = torch.compile(self.model, backend="aot_eager")
            COUNTS["passes through a compiled model"] += 1
            return logits_of(self.compiled_model(x))
        return logits_of(self.model(x, **settings))

    # -- comparing -----------------------------------------------------------------------------------------------------

    def close(self, found: Tensor, want: Tensor, what: str, scale: float = 0.0) -> None:
        """Compare within the dtype's rounding; `scale` is a norm that the error may be measured by besides."""
        assert found.shape == want.shape, what
        error = float((found.detach().double() - want.double()).norm())
        bound = RELATIVE[self.expected.dtype] * max(float(want.norm()), scale) + 1e-30
        assert error <= bound, f"{what} is off by {error:.3g}, allowed {bound:.3g}"
        COUNTS[f"{what}s compared"] += 1

    def compare_gradients(self) -> None:
        """All deltas' gradients with those that were accumulated."""
        norms = [float(g.norm()) for g in self.gradients.values()]
        for key, delta in self.deltas():
            want = self.gradients.get(key)
            if want is None:
                assert delta.grad is None or not delta.grad.any(), f"{key} got a gradient"
                continue
            assert delta.grad is not None, f"{key} got no gradient"
            self.close(delta.grad, want, "gradient", 1e-3 * max(norms))

    def compare_pass(self, number: int = 0, *, gradients: bool = False, entry: str = "model") -> None:
        """The output of a pass of the batch `number`."""
        x = tokens(number)
        with torch.set_grad_enabled(gradients):
            self.note_pass(gradients)
            self.close(self.run(x, entry), self.expected.forward(x), "output")
        self.at_once, self.may_be_parked = True, False

    def note_pass(self, gradients: bool = True) -> None:
        self.passes += 1

    def compare_values(self) -> None:
        """The adapters' own tensors, bit for bit, and what is active."""
        assert set(self.model.peft_config) == set(self.expected.adapters)
        for name, adapter in self.expected.adapters.items():
            found = self.read(name)
            assert found.keys() == adapter.keys()
            for key, columns in adapter.items():
                assert torch.equal(found[key].indices, columns.indices), f"indices of {name} in {key}"
                assert found[key].delta.dtype == columns.delta.dtype, f"dtype of {name} in {key}"
                assert torch.equal(found[key].delta, columns.delta), f"delta of {name} in {key}"
                assert abs(found[key].scale - columns.scale) <= 1e-15 * abs(columns.scale), f"scale of {name} in {key}"
                assert found[key].folded.keys() == columns.folded.keys()
                assert all(torch.equal(found[key].folded[c].double(), v.double()) for c, v in columns.folded.items())
        for tensor, want in self.handed:
            assert torch.equal(tensor, want), "a state dict that was handed out changed"

    def compare_weights(self) -> None:
        """What the weights hold, read without running or parking anything."""
        held = self.expected.held()
        for key, layer in self.layers().items():
            weight, original = layer.base_layer.weight.detach(), self.expected.original(key)
            assert torch.equal(_unadapted(layer), original), f"parking {key} would not restore it"
            COUNTS["weights whose kept columns were compared"] += 1
            if not self.at_once or (self.may_be_parked and torch.equal(weight, original)):
                continue
            total = self.expected.weight(key, held)
            unit = torch.finfo(self.expected.dtype).eps
            wide = torch.finfo(torch.promote_types(self.expected.dtype, torch.float32)).eps
            bound = unit * total.abs() + 8 * wide * float(total.abs().max())
            assert bool(((weight.double() - total).abs() <= bound).all()), f"{key} does not hold what is active"
            COUNTS["weights compared at once"] += 1

    def compare_base(self, how: str) -> None:
        """Park in one of several ways, and compare the weights with the pretrained ones, bit for bit."""
        if how == "state dict":
            state = self.model.state_dict()
            for key in self.layers():
                name = f"{PREFIX}{key}.base_layer.weight"
                found = state[name if name in state else name.removesuffix(".weight")]
                self._equal_or_merged(found, key)
            self.may_be_parked = True
        elif how == "disable":
            with self.model.disable_adapter():
                was = self.note_disabled()
                for key, layer in self.layers().items():
                    assert torch.equal(layer.base_layer.weight, self.expected.original(key)), f"{key}, disabled"
            self.note_enabled(was)
        else:
            twin = copy.deepcopy(self.model)
            for key, layer in self.layers(twin).items():
                layer.park()
                self._equal_or_merged(layer.base_layer.weight, key)
            self.may_be_parked = True
        COUNTS[f"parks by {how}"] += 1

    def _equal_or_merged(self, found: Tensor, key: str) -> None:
        if self.expected.merged:
            return  # then the weight is the merged one; that is what was asked for
        assert torch.equal(found, self.expected.original(key)), f"{key} is not the pretrained one"

    def note_disabled(self) -> bool:
        """What `disable_adapter` does besides: it unmerges. Returns whether adapters were disabled before."""
        was, self.expected.disabled = self.expected.disabled, True
        if self.expected.merged:
            self.touched[""] += 1
            self.expected.merged = {}
        self.at_once, self.may_be_parked = True, False
        return was

    def note_enabled(self, disabled: bool = False) -> None:
        self.expected.disabled = disabled
        self.at_once, self.may_be_parked = not self.doubtful, False

    doubtful = False  # a write that only the next pass finds

    # -- the end -------------------------------------------------------------------------------------------------------

    def finish(self, *, failed: bool) -> None:
        """Unload: the stock model, bit for bit. Not if something `failed` before, which this would hide."""
        try:
            if failed:
                return
            layers = set(self.layers())
            stock = self.model.unload()
            assert not paca_layers(stock)
            parameters = dict(stock.named_parameters())
            for key in layers:
                name = self.expected.weight_name(key)
                assert torch.equal(parameters[name], self.expected.original(key)), f"{key}, unloaded"
            assert not any(type(m).__module__.startswith("paca.") for m in stock.modules())
            COUNTS["unloads"] += 1
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


def _unadapted(layer: PacaLayer) -> Tensor:
    """The weight with all kept originals put back, without touching the weight itself."""
    weight, columns = layer.base_layer.weight.detach().clone(), layer.base_layer.columns
    if columns._originals_of_merged is not None:
        columns._originals_of_merged.put_into(weight, columns.dim)
    elif columns.state.columns or columns.half_written:
        for kept in columns._all_kept(weight):
            kept.put_into(weight, columns.dim)
    return weight
