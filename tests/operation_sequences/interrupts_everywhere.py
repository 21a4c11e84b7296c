"""Ctrl-C at every line of paca and PEFT that an operation runs: afterwards all can be put back, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import paca
from models import adapt
from operation_sequences.expected import loss_of
from operation_sequences.interrupts import interrupted_at
from operation_sequences.subjects import Subject, logits_of, tokens
from paca.layers import PacaLayer
from paca.layers.mixed_batch import Running

Operation = tuple[Callable[[Any], Any], Callable[[Any], Any]]
"""What comes before, and what is interrupted; both get the model."""
UNCHANGING = {"infer", "mixed batch", "mixed generation"}
"""Operations after which no call has to say again what is to be active."""
MIXED = ["default", "other", "__base__"]


def two_adapters(subject: Subject) -> Any:
    """An adapted model with the adapters `default` (active) and `other`."""
    model = adapt(subject.stock(), **subject.targets).eval()
    model.add_adapter("other", other(subject))
    return model


def other(subject: Subject, seed: int = 4) -> paca.PacaConfig:
    return paca.PacaConfig(r=2, random_seed=seed, init_weights=False, selection="random", **subject.targets)


def _train(model: Any) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    loss_of(logits_of(model(tokens(0)))).backward()
    optimizer.step()


def _infer(model: Any, **settings: Any) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(model(tokens(0), **settings))


def _generate(model: Any) -> torch.Tensor:
    return model.generate(input_ids=tokens(0), adapter_names=MIXED, max_new_tokens=1, pad_token_id=0)


def operations(subject: Subject, folder: Path) -> dict[str, Operation]:
    """By name."""
    two_adapters(subject).save_pretrained(folder)

    def nothing(model: Any) -> None:
        pass

    return {
        "train": (nothing, _train),
        "infer": (lambda m: m.state_dict(), _infer),
        "mixed batch": (nothing, lambda m: _infer(m, adapter_names=MIXED)),
        "mixed generation": (nothing, _generate if subject.is_transformer else nothing),
        "switch": (nothing, lambda m: m.base_model.set_adapter(["default", "other"])),
        "disable": (nothing, lambda m: m.base_model.disable_adapter_layers()),
        "enable": (lambda m: m.base_model.disable_adapter_layers(), lambda m: m.base_model.enable_adapter_layers()),
        "merge": (nothing, lambda m: m.merge_adapter(["default", "other"])),
        "safe merge": (nothing, lambda m: m.merge_adapter(safe_merge=True)),
        "unmerge": (lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter()),
        "rotate": (lambda m: paca.rotate(m, None, 1), lambda m: paca.rotate(m, None, 2)),
        "hot swap": (nothing, lambda m: paca.hotswap_adapter(m, folder, "default")),
        "load": (nothing, lambda m: m.load_adapter(folder, "new")),
        "add": (nothing, lambda m: m.add_adapter("new", other(subject, 5))),
        "delete": (nothing, lambda m: m.delete_adapter("other")),
        "state dict": (nothing, lambda m: m.state_dict()),
        "copy": (nothing, copy.deepcopy),
        "cast": (nothing, lambda m: m.double()),
    }


def interrupt_everywhere(subject: Subject, name: str, operation: Operation, lines: range) -> Iterator[tuple[str, str]]:
    """Interrupt the operation `name` at each of `lines`, as far as it has so many.

    Yields:
        Where it was interrupted, and what was wrong when it had been recovered from (nothing: empty).
    """
    before, run = operation
    prepared = two_adapters(subject)
    before(prepared)
    originals = {name: p.detach() for name, p in subject.stock().named_parameters()}
    passes = ({"adapter_names": MIXED}, {}, {"adapter_names": MIXED})
    wanted = [_infer(copy.deepcopy(prepared), **settings) for settings in passes if name in UNCHANGING]
    for line in lines:
        model = copy.deepcopy(prepared)
        with interrupted_at(line) as report:
            run(model)
        if report.where is None:
            return
        wrong = ""
        if name in UNCHANGING:
            first = line // lines.step % 2
            wrong = wrong_passes(model, passes[first:], wanted[first:])
            if not wrong and patches(model) != patches(prepared):
                wrong = "patches are left"
        yield report.where, wrong or wrong_after_recovery(model, originals)


def wrong_passes(model: Any, passes: Any, wanted: list[torch.Tensor]) -> str:
    """Mixed batches and plain passes have to give what they gave before, bit for bit, and leave the model as it was."""
    try:
        found = [_infer(model, **settings) for settings in passes]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not all(map(torch.equal, found, wanted)):
        return "another output"
    return "a mixed batch is left" if Running.batches or Running.count else ""


def patches(model: Any) -> list[tuple[str, int]]:
    """What a mixed batch may leave on modules."""
    return [(name, len(m._forward_pre_hooks) + ("forward" in vars(m))) for name, m in model.named_modules()]


def wrong_after_recovery(model: Any, originals: dict[str, torch.Tensor]) -> str:
    """Disable, enable, switch, run: the base has to be there bit for bit, and every call to work."""
    try:
        model.base_model.disable_adapter_layers()
        for name, layer in model.get_base_model().named_modules():
            if isinstance(layer, PacaLayer):
                original = originals[name if name in originals else f"{name}.weight"]
                if not torch.equal(layer.base_layer.weight, original):
                    return f"{name} is not the pretrained one"
        model.base_model.enable_adapter_layers()
        model.set_adapter("default")
        _infer(model)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
