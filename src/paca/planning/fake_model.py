"""Models whose tensors have shapes, dtypes and a device, but no values and no memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import islice
from typing import Any
from unittest.mock import patch

import torch
import transformers.masking_utils
from torch import Tensor, nn
from torch._subclasses.fake_impls import op_implementations_dict
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from trl.kernels import chunked_logprob

from paca.columns import lost, resident, state
from paca.columns.kept import Kept
from paca.columns.selection import BLOCK
from paca.columns.state import ALONE
from paca.lean import cache_blocks, gated_linear_unit, pointwise, rms_norm, token_log_probs
from paca.lean.loss import every_position, in_blocks
from paca.planning.attention_kernels import attention_of
from paca.planning.quantized_layers import dequantized_product, fake_states
from paca.planning.unseen_values import fake_places, not_looked_at

_TORCH_RAND = torch.rand
_SINGLE: tuple[Any, ...] = ((1,), ([],), ((),))


def make_fake(model: nn.Module) -> None:
    """Turn all parameters and buffers of `model`, which is on the meta device, into fake ones on the CPU, in place.

    To be called under `without_values`. Tied weights stay tied: one parameter, with one gradient.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}  # with the original, so that its id is not given away

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            made[id(tensor)] = (tensor, empty)
        return made[id(tensor)][1]

    tied = _tied(model)
    with _each_module_once(model), patch.object(resident, "write_together", _as_if_written):
        model._apply(fake)
    for (module, name), *others in tied:
        for other, own in others:
            other._parameters[own] = module._parameters[name]
    fake_states(model, fake)
    fake_places(model, fake)


def _tied(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """The places of each parameter that has several, of which `_apply` makes a new one each."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    return [found for found in places.values() if len(found) > 1]


def _as_if_written(jobs: Iterable[Any]) -> None:
    """What holds once columns are written: their originals are kept. Without values there is nothing to write."""
    with resident.WRITING, ALONE, torch.inference_mode(False), torch.no_grad():
        for columns, weight, wanted in jobs:
            if (state := columns.prepare(weight, wanted)) is not None:
                columns.wrote(weight, state)


def _as_if_compared(columns: resident.ResidentColumns, weight: Tensor) -> None:
    """What holds once columns were found to be as they were written."""
    columns.unaccounted = columns.unaccounted and not torch.is_grad_enabled()


@contextmanager
def _each_module_once(model: nn.Module) -> Iterator[None]:
    """Layers of some methods of PEFT share modules, whose tensors can't be replaced twice."""
    seen: set[int] = set()
    repeated: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None and id(child) in seen:
                repeated.append((parent, name, child))
            seen.add(id(child))
    for parent, name, _ in repeated:
        parent._modules[name] = None
    try:
        yield
    finally:
        for parent, name, child in repeated:
            parent._modules[name] = child


@contextmanager
def without_values(device: str) -> Iterator[None]:
    """Tensors made in here are fake; code that looks at values, or loops over rows of them, does what fits that.

    They are all on the CPU, and stand for those of `device`: `"cpu"` or `"cuda"`.
    """
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(patch.object(functional, "scaled_dot_product_attention", attention_of(device)))
        # All rounds of the lean blocks' loops over rows allocate the same, and a long batch has thousands of them.
        # What is written there was allocated before the loop, and without values it needs no writing.
        for module in (rms_norm, gated_linear_unit, pointwise):
            stack.enter_context(patch.object(module, "row_blocks", _first_block))
        # Weights without values are written within the mode, where it is seen what that takes.
        stack.enter_context(patch.object(lost, "beside_checkpointing", nullcontext))
        # Columns without values are those that were written.
        stack.enter_context(patch.object(Kept, "equal", lambda kept, other: True))
        stack.enter_context(patch.object(resident.ResidentColumns, "compare", _as_if_compared))
        stack.enter_context(patch.object(state, "runs_of", _blocks))
        # Positions without values might be those of packed sequences, and transformers would make a mask for them.
        stack.enter_context(patch.object(transformers.masking_utils, "find_packed_sequence_indices", lambda _: None))
        stack.enter_context(patch.object(torch, "rand", _rand))
        stack.enter_context(patch.dict(op_implementations_dict, {torch.ops.aten._grouped_mm.default: _grouped_product}))
        stack.enter_context(not_looked_at())
        if importlib.util.find_spec("bitsandbytes") is not None:
            import bitsandbytes  # noqa: F401  # defines the operator

            stack.enter_context(patch.object(torch.ops.bitsandbytes.gemm_4bit, "default", dequantized_product))
        stack.enter_context(every_position())
        if device == "cuda":
            _use_fused_loss_kernels(stack)
        else:
            stack.enter_context(in_blocks(torch.device(device)))
            stack.enter_context(patch.object(token_log_probs, "pieces", _first_piece))
        yield


def _rand(*size: Any, **options: Any) -> Any:
    """`torch.rand`; a single number, by which LoHa, LoKr and some models leave a layer out, is 1: it is never left
    out."""
    return 1.0 if size in _SINGLE and not options else _TORCH_RAND(*size, **options)


def _grouped_product(
    mode: FakeTensorMode,
    operator: Any,
    rows: Tensor,
    matrices: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The experts' products. Torch's own stand-in takes bfloat16 alone, while its kernels take what experts are in."""
    summed_by_group = offs is not None and rows.dim() == matrices.dim() == 2  # as for the gradient of the matrices
    groups = offs.shape if offs is not None and summed_by_group else rows.shape[:-2]
    return rows.new_empty((*groups, rows.shape[-2], matrices.shape[-1]), dtype=out_dtype)


def _blocks(indices: Tensor) -> tuple[tuple[int, int], ...] | None:
    """Columns without values are taken to lie in blocks, as they do where nothing else was asked for."""
    count = indices.numel()
    return tuple((first, min(BLOCK, count - first)) for first in range(0, count, BLOCK)) if count >= BLOCK else None


def _first_block(rows: Tensor, elements_per_thread: int) -> Iterator[slice]:
    return islice(cache_blocks.row_blocks(rows, elements_per_thread), 1)


def _first_piece(length: int, size: int) -> Iterator[slice]:
    return iter([slice(0, min(size, length))])


def _use_fused_loss_kernels(stack: ExitStack) -> None:
    """On CUDA, TRL's chunked loss works in place on each tile of logits, by Triton kernels that allocate nothing."""
    for name in ("_forward_tile", "_backward_tile"):
        stack.enter_context(patch.object(chunked_logprob, name, lambda *args, **kwargs: None))
    if hasattr(chunked_logprob, "_addmm_fp32"):
        stack.enter_context(patch.object(chunked_logprob, "_addmm_fp32", _add_half_precision_product))


def _add_half_precision_product(total: Tensor, first: Tensor, second: Tensor) -> None:
    """CUDA adds a product of 16-bit matrices to a float32 one as it is; a CPU would make float32 copies of both."""
    torch.mm(first, second, out=total.view(first.dtype)[:, : total.shape[1]])
