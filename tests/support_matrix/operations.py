"""The columns of the matrix: what users do with an adapted model, each with the check that it did so.

An operation raises `AssertionError` if the result is wrong, and `Explained` if there is nothing that it could do.
Whatever else it raises must be paca's refusal.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import paca
from paca.convert.lora import save_as_lora
from paca.layers import PacaLayer
from support_matrix import choosing, llama_cpp, sharded
from support_matrix.case import Case, Explained, gradients, run, stock, stock_output
from support_matrix.case import close as _close

MIXED = ["second", "__base__", "default"]
"""The adapters of the three samples."""


def train(case: Case) -> None:
    """Output and gradients are autograd's through dense float64 weights, also after a step, and of two adapters at \
once."""
    model, x = case.model, case.x
    assert {layer.mode for layer in case.layers().values()} == case.subject.modes
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        y = run(model, x)
        y.square().mean().backward()
        want, want_gradients = case.reference(default=1.0)
        _close(y, want)
        _check_gradients(case, want_gradients)
        before = y.detach()
        optimizer.step()
    assert not torch.equal(run(model, x), before)
    case.add_second()
    model.base_model.set_adapter(["default", "second"])
    model.zero_grad()
    run(model, x).square().mean().backward()
    _check_gradients(case, case.reference(default=1.0, second=1.0)[1])


def _check_gradients(case: Case, want: dict[tuple[str, str], Tensor]) -> None:
    for (name, adapter), gradient in want.items():
        _close(case.layers()[name].paca_delta[adapter].grad, gradient)


def checkpointing(case: Case) -> None:
    """Activation checkpointing, re-entrant and not, gives bitwise the same gradients."""
    run(case.model, case.x).square().mean().backward()
    want = gradients(case.model)
    for reentrant in (False, True):
        case.model.zero_grad()
        start = torch.ones(1, requires_grad=True)  # what re-entrant checkpointing needs to see
        y = checkpoint(lambda x, start: run(case.model, x) * start, case.x, start, use_reentrant=reentrant)
        y.square().mean().backward()
        for found, expected in zip(gradients(case.model), want, strict=True):
            assert torch.equal(found, expected)


def autocast(case: Case) -> None:
    """To bfloat16's precision, output and gradients of the stock model with the columns in its weights."""
    twin = case.dense({"default": 1.0}, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = run(twin, case.x)
        y = run(case.model, case.x)
    unit = torch.finfo(torch.bfloat16).eps
    _close(y, want, 8 * unit)
    want.float().square().mean().backward()
    y.float().square().mean().backward()
    for name, layer in case.layers().items():
        _close(layer.paca_delta["default"].grad, case.column_gradient(twin, name, "default"), 8 * unit)


def compiled(case: Case) -> None:
    """Output and gradients of the eager model, also after a change of the deltas; the base model's output under \
`disable_adapter()`."""
    eager, model, x = case.adapted(), case.model, case.x
    fast = model.get_base_model()
    torch._dynamo.reset()
    try:
        parts = case.subject.compiled(fast)
        for part in parts:
            part.compile(backend="aot_eager")
        if not parts:
            fast = torch.compile(fast, backend="aot_eager")
        for _ in range(2):
            want, y = run(eager, x), run(fast, x)
            _close(y, want)
            for output in (want, y):
                output.square().mean().backward()
            for found, expected in zip(gradients(model), gradients(eager), strict=True):
                _close(found, expected)
            for layer in (*case.layers().values(), *case.layers(eager).values()):
                with torch.no_grad():
                    layer.paca_delta["default"].mul_(2)
        with model.disable_adapter():
            _close(run(fast, x), stock_output(case))
    finally:
        torch._dynamo.reset()


def save_and_load(case: Case) -> None:
    """`save_pretrained`, then `PeftModel.from_pretrained` on the base model: the same output."""
    folder = case.folder / "saved"
    want = run(case.model, case.x)
    case.model.save_pretrained(folder)
    base = case.subject.base(case.folder)
    again = peft.PeftModel.from_pretrained(base, folder, **case.subject.loading(case.folder)).eval()
    assert case.layers(again).keys() == case.layers().keys()
    _close(run(again, case.x), want)


def disable(case: Case) -> None:
    """The base model's output bit for bit, and the adapter's again after it."""
    want = run(case.model, case.x)
    with case.model.disable_adapter():
        assert torch.equal(run(case.model, case.x), stock_output(case))
    assert not torch.equal(want, stock_output(case))
    assert torch.equal(run(case.model, case.x), want)


def several(case: Case) -> None:
    """A second adapter of another rank: switched to, both at once (their sum), and deleted."""
    case.add_second()
    model, x = case.model, case.x
    model.set_adapter("second")
    _close(run(model, x), case.reference(second=1.0)[0])
    model.base_model.set_adapter(["default", "second"])
    _close(run(model, x), case.reference(default=1.0, second=1.0)[0])
    model.delete_adapter("second")
    model.set_adapter("default")
    _close(run(model, x), case.reference(default=1.0)[0])


def mixed_batch(case: Case) -> None:
    """Two adapters and `__base__`: each sample as with its adapter alone."""
    case.add_second()
    y = run(case.model, case.x, adapter_names=MIXED)
    _close(y[1], run(stock(case), case.x[1:2])[0])
    for row in (0, 2):
        _close(y[row], case.reference(**{MIXED[row]: 1.0})[0][row])


def train_mixed_batch(case: Case) -> None:
    """The same with gradients: each adapter's come from its own samples."""
    case.add_second()
    case.model.base_model.set_requires_grad(["default", "second"])
    run(case.model, case.x, adapter_names=MIXED).square().sum().backward()
    for row in (0, 2):
        _check_gradients(case, case.reference(rows=[row], **{MIXED[row]: 1.0})[1])


def hot_swap(case: Case) -> None:
    """Other columns and values in the same tensors, nothing of the old ones left."""
    other = case.adapted(seed=5, random_seed=9, paca_alpha=8)
    want = run(other, case.x)
    other.save_pretrained(case.folder / "other")
    run(case.model, case.x)
    paca.hotswap_adapter(case.model, case.folder / "other", "default")
    _close(run(case.model, case.x), want)
    with case.model.disable_adapter():
        assert torch.equal(run(case.model, case.x), stock_output(case))


def weighted_sum(case: Case) -> None:
    """With a negative weight: the exact sum."""
    case.add_second()
    case.model.add_weighted_adapter(["default", "second"], [1.0, -0.5], "sum")
    case.model.set_adapter("sum")
    _close(run(case.model, case.x), case.reference(default=1.0, second=-0.5)[0])


def merge(case: Case) -> None:
    """The adapter's effect is in the weight (requantized, it is nearer to it than the base model); unmerging is \
bitwise."""
    model, x = case.model, case.x
    want = run(model, x)
    model.merge_adapter()
    _merged(case, run(model, x), want)
    model.unmerge_adapter()
    assert torch.equal(run(model, x), want)


def merge_and_unload(case: Case) -> None:
    """A model of stock layers with the adapter's effect."""
    want = run(case.model, case.x)
    merged = case.model.merge_and_unload()
    _stock(merged)
    _merged(case, run(merged, case.x), want)


def _merged(case: Case, found: Tensor, want: Tensor) -> None:
    if case.subject.modes == {"patched"}:
        assert (found - want).norm() < 0.5 * (stock_output(case) - want).norm()
    else:
        _close(found, want)


def unload(case: Case) -> None:
    """The stock model, bit for bit."""
    run(case.model, case.x)
    unloaded = case.model.unload()
    _stock(unloaded)
    assert torch.equal(run(unloaded.train(case.subject.stock_training), case.x), stock_output(case))


def _stock(model: nn.Module) -> None:
    ours = [name for name, m in model.named_modules() if any(c.__module__.startswith("paca.") for c in type(m).__mro__)]
    assert not ours, ours


def merged_checkpoint(case: Case) -> None:
    """`merge_and_unload(dequantize=True)`, saved: a checkpoint that the unquantized model loads without paca."""
    want = case.reference(default=1.0)[0]
    merged = case.model.merge_and_unload(safe_merge=True, dequantize=True)
    plain: nn.Module = case.subject.plain()
    if isinstance(merged, PreTrainedModel):
        merged.save_pretrained(case.folder / "merged")
        plain = type(merged).from_pretrained(case.folder / "merged").eval()
    else:
        save_file(merged.state_dict(), case.folder / "merged.safetensors")
        plain.load_state_dict(load_file(case.folder / "merged.safetensors"))
    _close(run(plain, case.x), want)


def export_lora(case: Case) -> None:
    """`--to lora`: PEFT's own LoRA, on the unquantized model, gives the same output."""
    want = case.reference(default=1.0)[0]
    save_as_lora(case.model, case.folder / "lora")
    assert peft.PeftConfig.from_pretrained(case.folder / "lora").peft_type == "LORA"
    lora = peft.PeftModel.from_pretrained(case.subject.plain(), case.folder / "lora").eval()
    assert not any(isinstance(m, PacaLayer) for m in lora.modules())
    _close(run(lora, case.x), want)


def state_dict(case: Case) -> None:
    """The base model's state dict is the pretrained one bit for bit, by its own names, while the adapter is active."""
    run(case.model, case.x)
    found = peft.utils.save_and_load.get_base_model_state_dict(case.model)
    want = case.subject.base(case.folder / "again").state_dict()
    assert set(found) == set(want)
    for name, tensor in want.items():
        other = found[name]
        assert type(other) is type(tensor), name
        if not isinstance(tensor, Tensor):
            assert pickle.dumps(other) == pickle.dumps(tensor), name
        elif tensor.device.type != "meta":
            assert torch.equal(other.dequantize(), tensor.dequantize()), name


def copies(case: Case) -> None:
    """`copy.deepcopy` and `pickle`: a model of its own that computes the same."""
    want = run(case.model, case.x)
    one = copy.deepcopy(case.model)
    _independent(case, one, want)
    try:
        pickle.dumps(case.subject.base(case.folder / "again"))
    except Exception as error:
        reason = "the stock model can't be pickled, so neither can the adapted one"
        raise Explained(f"`deepcopy` works; {reason}: {type(error).__name__}") from error
    _independent(case, pickle.loads(pickle.dumps(case.model)), want)


def _independent(case: Case, other: Any, want: Tensor) -> None:
    assert torch.equal(run(other, case.x), want)
    for layer in case.layers(other).values():
        layer.paca_delta["default"].data.zero_()
    paca.refresh(other)
    assert not torch.equal(run(other, case.x), want)
    assert torch.equal(run(case.model, case.x), want)


OPERATIONS: dict[str, Callable[[Case], None]] = {
    "select by weight": choosing.by_weight,
    "select by activations": choosing.by_activations,
    "select by gradients": choosing.by_gradients,
    "train": train,
    "rotation": choosing.rotate,
    "checkpointing": checkpointing,
    "autocast": autocast,
    "`torch.compile`": compiled,
    "FSDP2": sharded.fully_sharded,
    "save, load": save_and_load,
    "disable": disable,
    "several adapters": several,
    "mixed batch": mixed_batch,
    "train on a mixed batch": train_mixed_batch,
    "hot swap": hot_swap,
    "weighted sum": weighted_sum,
    "merge, unmerge": merge,
    "merge and unload": merge_and_unload,
    "unload": unload,
    "merged checkpoint": merged_checkpoint,
    "to LoRA": export_lora,
    "to GGUF": llama_cpp.export,
    "state dict": state_dict,
    "copies": copies,
}
"""By the title of the column, in its order."""

WITH_GRADIENTS = {
    "train",
    "rotation",
    "checkpointing",
    "autocast",
    "`torch.compile`",
    "FSDP2",
    "train on a mixed batch",
}
"""The others run under `no_grad`."""
