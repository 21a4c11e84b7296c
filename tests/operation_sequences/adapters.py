"""Operations that change which adapters there are, and which are active."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

import paca
from operation_sequences.checks import COUNTS, Checked
from operation_sequences.expected import Adapter, Columns
from operation_sequences.subjects import logits_of, tokens

NAMES = ["k", "l", "m", "n"]
NAME = st.integers(0, 3)
SETTINGS = st.fixed_dictionaries(
    {
        "r": st.integers(1, 3),
        "paca_alpha": st.sampled_from([1, 3, 8]),
        "random_seed": st.integers(0, 5),
        "selection": st.sampled_from(["random", "random_blocks", "weight_norm"]),
    }
)


class Adapters(Checked):
    """Add, delete, switch, disable, merge, rotate, save, load, hot swap."""

    def name(self, number: int) -> str:
        """A loaded adapter."""
        names = sorted(self.expected.adapters)
        return names[number % len(names)]

    def written(self) -> None:
        """A call wrote what is active."""
        self.at_once, self.may_be_parked = not self.doubtful, False

    @precondition(lambda self: len(self.expected.adapters) < len(NAMES))
    @rule(settings=SETTINGS, part=st.booleans())
    def add(self, settings: dict[str, Any], part: bool) -> None:
        name = next(n for n in NAMES if n not in self.expected.adapters)
        if part:  # of the layers
            kind, targets = next(iter(self.subject.targets.items()))
            settings = {**settings, kind: targets[-1:]}
        self.model.add_adapter(name, self.config(settings))
        self.expected.adapters[name] = self.read(name)
        self.unmerged_by_peft()

    def unmerged_by_peft(self) -> None:
        """A new adapter, or a switch: PEFT unmerges then."""
        if self.expected.merged:
            self.touched[""] += 1
            self.expected.merged = {}

    @precondition(lambda self: len(self.expected.adapters) > 1)
    @rule(number=NAME)
    def delete(self, number: int) -> None:
        name = self.name(number)
        if name in self.expected.merged:
            with pytest.raises(ValueError, match="merged"):
                self.model.delete_adapter(name)
            return
        self.model.delete_adapter(name)
        del self.expected.adapters[name]
        self.touched[name] += 1
        self.gradients = {key: g for key, g in self.gradients.items() if key[1] != name}
        left = [n for n in self.expected.active if n != name] or [sorted(self.expected.adapters)[0]]
        self.switch_to(left)  # PEFT may choose others in layers that this adapter alone was in

    def switch_to(self, names: list[str]) -> None:
        self.unmerged_by_peft()
        if len(names) == 1:
            self.model.set_adapter(names[0])
        else:
            self.model.base_model.set_adapter(names)
        self.expected.active = list(names)
        self.doubtful = False
        self.written()
        for key, delta in self.deltas():
            assert delta.requires_grad == (key[1] in names)

    @rule(numbers=st.lists(NAME, min_size=1, max_size=3))
    def switch(self, numbers: list[int]) -> None:
        self.switch_to(list(dict.fromkeys(self.name(n) for n in numbers)))

    @rule(number=st.integers(0, 3), fails=st.booleans())
    def disable_for_a_while(self, number: int, fails: bool) -> None:
        x = tokens(number)
        try:
            with self.model.disable_adapter():
                was = self.note_disabled()
                self.close(self.run(x), self.expected.forward(x), "output")
                if fails:
                    raise KeyError("planned")
        except KeyError:
            assert fails
        self.passes += 1
        self.note_enabled(was)

    @rule()
    def disable(self) -> None:
        self.model.base_model.disable_adapter_layers()
        self.note_disabled()

    @rule()
    def enable(self) -> None:
        self.model.base_model.enable_adapter_layers()
        self.note_enabled()

    # -- merging -------------------------------------------------------------------------------------------------------

    @rule(numbers=st.lists(NAME, max_size=2), safe=st.booleans())
    def merge(self, numbers: list[int], safe: bool) -> None:
        names = list(dict.fromkeys(self.name(n) for n in numbers)) or list(self.expected.active)
        self.model.merge_adapter(names if numbers else None, safe_merge=safe)
        self.expected.merge(names)
        self.touched[""] += 1
        self._wrote_merged_layers()

    def _wrote_merged_layers(self) -> None:
        """Other layers may be parked for the moment as before."""
        parked, merged = self.may_be_parked, {layer for adapter in self.expected.merged.values() for layer in adapter}
        self.written()
        self.may_be_parked = parked and merged != set(self.layers())

    @rule()
    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        if self.expected.merged:
            self.touched[""] += 1
            self._wrote_merged_layers()
            self.expected.merged = {}

    # -- rotation ------------------------------------------------------------------------------------------------------

    @rule(number=NAME, pick=st.sampled_from(["random", "random_blocks", "weight_norm"]), with_optimizer=st.booleans())
    def rotate(self, number: int, pick: str, with_optimizer: bool) -> None:
        name = self.name(number)
        if self.expected.merged:
            with pytest.raises(ValueError, match="merged"):
                paca.rotate(self.model, None, 1, adapter_name=name)
            return
        self.rotations += 1
        mine = {id(p) for _, p in self.deltas(name)}
        found = [o for o in self.optimizers.values() if mine <= {id(p) for _, p in o[2]}] if with_optimizer else []
        paca.rotate(self.model, found[0][0] if found else None, self.rotations, pick=pick, adapter_name=name)
        if found:
            for (key, _), plain in zip(found[0][2], found[0][3], strict=True):
                if key[1] == name:
                    found[0][1].state.pop(plain, None)
        indices = {key: layer.paca_indices[name] for key, layer in self.layers().items() if name in layer.r}
        for key, columns in self.expected.adapters[name].items():
            assert indices[key].shape == columns.indices.shape
        self.expected.rotate(name, indices)
        self.touched[name] += 1
        self.touched[""] += name in self.expected.active
        self.gradients = {key: g for key, g in self.gradients.items() if key[1] != name}
        for _, delta in self.deltas(name):
            assert delta.grad is None

    # -- files ---------------------------------------------------------------------------------------------------------

    @rule(number=NAME)
    def save(self, number: int) -> None:
        name = self.name(number)
        folder = self.folder / str(len(self.saved))
        self.model.save_pretrained(folder, selected_adapters=[name])
        dim, adapter = self.subject.delta_dim, {}
        for key, columns in self.expected.adapters[name].items():  # a file has the union of all columns
            union = sorted(columns.union(dim).items())
            own = self.layers()[key]
            scale = own.paca_alpha[name] / own.r[name]  # factors that were set afterwards are not saved
            adapter[key] = Columns(torch.tensor([c for c, _ in union]), torch.stack([v for _, v in union], dim), scale)
        self.saved.append((folder / name, adapter))
        self.may_be_parked = True

    def _loaded(self, saved: Adapter) -> Adapter:
        """As a model of the present dtype has it."""
        dtype = torch.promote_types(self.expected.dtype, torch.float32)
        return {key: Columns(c.indices.clone(), c.delta.to(dtype), c.scale) for key, c in saved.items()}

    @precondition(lambda self: self.saved and len(self.expected.adapters) < len(NAMES))
    @rule(number=NAME)
    def load(self, number: int) -> None:
        """Under a new name."""
        folder, saved = self.saved[number % len(self.saved)]
        name = next(n for n in NAMES if n not in self.expected.adapters)
        self.model.load_adapter(folder, name)
        self.expected.adapters[name] = self._loaded(saved)
        self._check_scales(name)
        self.unmerged_by_peft()

    @precondition(lambda self: self.saved)
    @rule(number=NAME, into=NAME, swap=st.booleans())
    def load_over(self, number: int, into: int, swap: bool) -> None:
        """In the place of a loaded adapter: by `load_adapter`, or by a hot swap."""
        (folder, saved), name = self.saved[number % len(self.saved)], self.name(into)
        mine = self.expected.adapters[name]
        fits = mine.keys() == saved.keys() and all(len(mine[k].indices) == len(c.indices) for k, c in saved.items())
        if not fits or name in self.expected.merged or any(c.folded for c in mine.values()):
            if swap:
                with pytest.raises(ValueError):  # noqa: PT011  (one of several reasons; nothing may change)
                    paca.hotswap_adapter(self.model, folder, name)
            return
        if swap:
            paca.hotswap_adapter(self.model, folder, name)
            self.gradients = {key: g for key, g in self.gradients.items() if key[1] != name}
        else:
            self.model.load_adapter(folder, name)
        for key, columns in mine.items():
            columns.indices, columns.delta = saved[key].indices.clone(), saved[key].delta.to(columns.delta.dtype)
            if swap:
                columns.scale = saved[key].scale
            else:  # PEFT gives all deltas of an adapter that it loads float32 or more
                columns.delta = columns.delta.to(torch.promote_types(self.expected.dtype, torch.float32))
        self.touched[name] += 1
        self.doubtful = False
        COUNTS["hot swaps" if swap else "loads over an adapter"] += 1

    def _check_scales(self, name: str) -> None:
        """A union's scale may differ from the saved one in its last bit (no float may exist for its alpha)."""
        for key, columns in self.read(name).items():
            wanted = self.expected.adapters[name][key]
            assert abs(columns.scale - wanted.scale) <= 1e-15 * abs(wanted.scale)
            wanted.scale = columns.scale

    @precondition(lambda self: self.saved)
    @rule(number=NAME)
    def load_into_a_fresh_model(self, number: int) -> None:
        folder, saved = self.saved[number % len(self.saved)]
        fresh: Any = peft.PeftModel.from_pretrained(self._stock(), Path(folder))
        with torch.no_grad():
            found = logits_of(fresh(tokens(0)))
            want = self.expected.run(tokens(0), {"saved": self._loaded(saved)})
        self.close(found, want, "output")

    def _stock(self) -> Any:
        """A stock model with the present pretrained weights."""
        stock = self.subject.stock()
        stock.load_state_dict(self.expected.stock.state_dict())
        return stock.to(self.expected.dtype)
