"""A stock module with columns over its weight, which itself is never written.

The base layer is turned into a subclass of its own class while it is adapted, as with resident weights, so that hooks
on it go on running. The subclass is made when it is needed: most of the stock classes are in optional packages.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.pytorch_utils import Conv1D

from paca.columns.entry import in_other_mode
from paca.columns.fingerprints import compare_values, note_values
from paca.columns.kept import Kept, positions_of, sum_of
from paca.columns.lost import is_checkpointing, note_checkpointed
from paca.columns.resident import WRITING
from paca.columns.sharded import trained_through
from paca.columns.state import ActiveColumns, AdapterColumns, State
from paca.columns.stepping import STEPPING
from paca.functional.column_blocks import put_columns, version_of
from paca.functional.linear import LinearProduct
from paca.functional.product import WeightSource
from paca.functional.train_columns import in_dtype, train_columns
from paca.layers.mixed_batch import current_mixed_batch
from paca.layers.offloading_hooks import execution_device
from paca.layers.resident_weight import rebind_forward
from paca.quantized import QuantizedWeight, quantization_of

_PRODUCT = LinearProduct(1)
_SUBCLASSES: dict[tuple[type, type], type[nn.Module]] = {}


class OverlaidWeight(nn.Module):
    """Mixin in front of a stock module class."""

    stock_class: ClassVar[type[nn.Module]]  # what the module was, and becomes again
    input_dim = 1  # the dimension that runs over the input features, of the weight that it stands for
    columns: ActiveColumns
    owner: Callable[[], Any]

    @classmethod
    def adopt(cls, module: Any) -> Any:
        """Turn `module` into an instance of a subclass of its class and this one, in place."""
        module.__class__ = _subclass(cls, type(module))
        module.columns = ActiveColumns()
        module._set_up()
        return module

    def _set_up(self) -> None:
        self.owner = lambda: None  # the adapted layer above makes itself known
        rebind_forward(self)

    def release(self) -> None:
        """Turn back into the stock module, in place."""
        self.columns.base_changed()
        del self.columns, self.owner
        self.__class__ = self.stock_class  # type: ignore[assignment]
        rebind_forward(self)

    def product(self) -> LinearProduct:
        """What all of them compute."""
        return _PRODUCT

    def state_now(self) -> State:
        """What a forward pass sees."""
        owner, alone = self.owner(), in_other_mode(self.columns, self.training)
        alone = alone or threading.get_ident() in STEPPING  # a closure's pass
        with WRITING:  # other threads may want other columns (mixed batches)
            if owner is not None and (alone or owner.stale()):
                owner.write(compare=alone)
            self.columns.note_forward()
            return self.columns.state

    def __reduce__(self) -> Any:
        # Pickling finds classes by name, and a class that was made here has none that can be imported.
        kind = next(c for c in (PatchedWeight, AdditiveWeight) if isinstance(self, c))
        state = self.__dict__.copy()
        for made_anew in ("owner", "columns", "quantization", "_columns_kept", "_compiled_call_impl"):
            state.pop(made_anew, None)
        return _rebuild, (kind, self.stock_class), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.columns = ActiveColumns()
        self._set_up()


def _subclass(kind: type[OverlaidWeight], stock: type[nn.Module]) -> type[nn.Module]:
    if (kind, stock) not in _SUBCLASSES:
        name = f"{kind.__name__.removesuffix('Weight')}{stock.__name__}"
        content = {"stock_class": stock, "__module__": kind.__module__}
        _SUBCLASSES[kind, stock] = type(name, (kind, stock), content)
    return _SUBCLASSES[kind, stock]


def _rebuild(kind: type[OverlaidWeight], stock: type[nn.Module]) -> nn.Module:
    cls = _subclass(kind, stock)
    return cls.__new__(cls)


class ColumnsKept(NamedTuple):
    """What the last pass on a quantized weight put into it, 4 bytes a trained value."""

    packed: Tensor
    source: tuple[Any, ...]
    originals: Kept  # of `packed`, while that and `source` are the same
    state: State | None = None
    columns: Any = None  # those of `state`

    def is_of(self, state: State) -> bool:
        """Whether `columns` are those of a state, and were not written since as far as version counters tell."""
        return self.state is not None and self.state.key == state.key and self.state.unchanged()


class PatchedWeight(OverlaidWeight):
    """A quantized layer whose columns are written into what each matmul dequantizes."""

    quantization: QuantizedWeight
    _columns_kept: ColumnsKept | None = None

    def _set_up(self) -> None:
        super()._set_up()
        quantization = quantization_of(self)
        assert quantization is not None
        self.quantization = quantization
        quantization.adopt(self)

    def release(self) -> None:
        quantization = self.quantization
        super().release()
        del self.quantization
        self.__dict__.pop("_columns_kept", None)
        quantization.release(self)

    def weight_shape(self) -> tuple[int, int]:
        return self.quantization.shape(self)

    def weight_placement(self) -> tuple[torch.device, torch.dtype]:
        return self.quantization.packed(self).device, self.quantization.stored_dtype(self)

    def forward(self, x: Tensor) -> Tensor:
        state = self.state_now()
        if is_checkpointing(True):
            note_checkpointed(self.columns, state)
        if state.columns:
            return self._run_dequantized(x, state)
        owner = self.owner()
        batch = current_mixed_batch(owner)
        rows = [] if batch is None or owner is None else list(owner.rows_of(x, batch).values())
        if not rows:
            return super().forward(x)
        if self.quantization.stock_dequantizes:
            return self._run_dequantized(x, state)
        # The stock layer computes something else, which is what samples without columns have when they run alone.
        mine = torch.cat(rows)
        others = torch.ones(x.shape[0], dtype=torch.bool, device=x.device).index_fill_(0, mine, False).nonzero()[:, 0]
        parts = [self._run_dequantized(x.index_select(0, mine), state)]
        if others.numel():
            parts.append(super().forward(x.index_select(0, others)).to(parts[0].dtype))
        return torch.cat(parts).index_select(0, torch.cat([mine, others]).argsort())

    def _run_dequantized(self, x: Tensor, state: State) -> Tensor:
        """Multiply with the dequantized weight and the columns of `state`; nothing else of `x` is kept."""
        dtype, output_dtype = self.quantization.dtypes(self, x)
        bias: Any = None if self.bias is None else self.bias.to(dtype)
        autocast = torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
            source = PatchedPass(self, state, dtype)
            trained = trained_through(state, self.owner().paca_delta)
            y = train_columns(_PRODUCT, in_dtype(x, dtype), None, bias, trained, source)
            return in_dtype(y, output_dtype)

    def weight_of_pass(self, dtype: torch.dtype, state: State) -> Tensor:
        """The dequantized weight `(out_features, in_features)` in `dtype`, with the columns of `state` in it, rounded
        once. What it puts in is kept for the passes to come. Nothing of it is recorded."""
        quantization, kept = self.quantization, self._columns_kept
        if not state.columns:
            return quantization.weight(self, dtype)
        packed = quantization.packed(self)
        source = (version_of(packed), StorageWeakRef(packed.untyped_storage()), packed.device, state.places, dtype)
        if kept is None or kept.packed is not packed or kept.source != source:
            with torch.inference_mode(False):  # so that where they lie side by side is found once
                positions = positions_of(state.columns, packed.device)
            weight, values = quantization.weight_and_columns(self, dtype, positions)
            originals = Kept(positions, values.to(torch.promote_types(values.dtype, dtype)))
            kept = ColumnsKept(packed, source, originals)
        else:
            weight = quantization.weight(self, dtype)
        if not kept.is_of(state):
            kept = kept._replace(state=state, columns=sum_of(kept.originals, state.columns, 1).to(dtype))
        self._columns_kept = kept  # at once: other threads may read it
        put_columns(weight, 1, kept.originals.positions, kept.columns)
        return weight

    def patched_weight(self, dtype: torch.dtype, columns: tuple[AdapterColumns, ...]) -> Tensor:
        """The same for any `columns`, as their deltas are now: nothing that was kept of them is taken."""
        if self._columns_kept is not None:
            self._columns_kept = self._columns_kept._replace(state=None)
        return self.weight_of_pass(dtype, State(columns, self.columns.base))


class PatchedPass(WeightSource):
    """One pass on a dequantized weight: it is made anew for the backward pass, and none is kept."""

    def __init__(self, module: PatchedWeight, state: State, dtype: torch.dtype) -> None:
        self.module, self.state, self.dtype, self.columns, self.tag = module, state, dtype, module.columns, state.tag
        self.packed = module.quantization.packed(module)
        self.version = version_of(self.packed), StorageWeakRef(self.packed.untyped_storage())
        note_values(self.columns, state)

    def weight(self) -> Tensor:
        return self.module.weight_of_pass(self.dtype, self.state)

    def weight_again(self, saved_tag: Tensor, wanted: bool) -> Tensor | None:
        kept = self.module._columns_kept
        if kept is None or not kept.is_of(self.state):
            compare_values(self.columns, self.state)  # the deltas are read again
        self.columns.check_backward(self.state, saved_tag)
        now = self.module.quantization.packed(self.module)
        if now is not self.packed or (version_of(now), StorageWeakRef(now.untyped_storage())) != self.version:
            raise RuntimeError(
                "A quantized weight was merged into, loaded or moved between a forward pass and its backward pass. Run "
                "backward() first."
            )
        return self.weight() if wanted else None


class AddedPass(WeightSource):
    """There is no weight, but the columns of `state` must stay as they are until the backward pass.

    `batch_tag` says which samples of a mixed batch have which adapter.
    """

    def __init__(self, columns: ActiveColumns, state: State, batch_tag: int | None = None) -> None:
        self.columns, self.state = columns, state
        self.tag = state.tag if batch_tag is None else torch.tensor(hash((state.key, batch_tag)), device="cpu")
        note_values(columns, state)

    def weight(self) -> Tensor:
        raise AssertionError("columns are added to an output")

    def weight_again(self, saved_tag: Tensor, wanted: bool) -> None:
        if not self.columns.has_trust(self.state):
            compare_values(self.columns, self.state)  # the deltas are read again
        same = saved_tag is self.tag or int(saved_tag) == int(self.tag)
        self.columns.check_backward(self.state, self.state.tag if same else saved_tag)


class AdditiveWeight(OverlaidWeight):
    """A layer whose weight can't be read or written: its columns are added to what it computes."""

    def weight_shape(self) -> tuple[int, int]:
        return features(self)

    def weight_placement(self) -> tuple[torch.device, torch.dtype]:
        tensors = [*self.parameters(recurse=False), *self.buffers(recurse=False)]
        floats = [t.dtype for t in tensors if t.is_floating_point() and t.element_size() > 1]
        device = execution_device(self)
        if device is None:
            device = next((t.device for t in tensors if t.device.type != "meta"), torch.device("cpu"))
        return torch.device(device), floats[0] if floats else torch.float32

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state = self.state_now()
        if is_checkpointing(True):
            note_checkpointed(self.columns, state)
        y = super().forward(x, *args, **kwargs)
        if torch.is_grad_enabled() and x.requires_grad and not y.requires_grad:
            raise RuntimeError(
                f"A {self.stock_class.__module__}.{self.stock_class.__qualname__} gives no gradient with respect "
                "to its input, so the layers before it can't be trained. Its library offers this layer for inference "
                "only: choose a kernel of it that can be trained (for GPTQ, backend='torch' or 'triton'), or another "
                "quantization."
            )
        if not state.columns:
            return y
        source = AddedPass(self.columns, state)
        trained = trained_through(state, self.owner().paca_delta)
        return train_columns(_PRODUCT, x, None, None, trained, source, added_to=y)


def features(module: Any) -> tuple[int, int]:
    """`(out_features, in_features)` of a linear layer of any library; `ValueError` if it uses other names for them."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    for out_name, in_name in (("out_features", "in_features"), ("outfeatures", "infeatures")):
        sizes = getattr(module, out_name, None), getattr(module, in_name, None)
        if all(isinstance(size, int) for size in sizes):
            return cast("tuple[int, int]", sizes)
    kind = type(module)
    raise ValueError(
        f"its class {kind.__module__}.{kind.__qualname__} has no in_features and out_features, so PaCA can't adapt it."
    )
