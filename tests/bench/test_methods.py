"""The table, and that every method trains what its name says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.tiny_bench import prepared, settings
from paca.bench.base_model import build_base_model
from paca.bench.methods import METHODS, Adaptation, Method, MethodUnavailable, find_methods
from paca.lean import is_lean
from paca.messages.errors import PacaError

ISSUE_METHODS = {
    *("frozen", "paca", "paca+lean", "paca+lean+recompute", "lora", "lora-tuned", "dora", "lora-fa", "vera", "full"),
    *("qpaca", "qlora", "lora-same-parameters", "lora-tuned-same-parameters"),
}


def test_every_method_of_the_issue_is_in_the_table_under_its_own_name() -> None:
    assert set(METHODS) >= ISSUE_METHODS
    assert all(name == method.name and method.summary for name, method in METHODS.items())


def test_methods_are_found_in_the_order_asked_for() -> None:
    assert [method.name for method in find_methods(("lora", "frozen", "lora"))] == ["lora", "frozen"]
    assert {method.name for method in find_methods(("all",))} == set(METHODS)
    with pytest.raises(PacaError, match=r"'lora-tined'. Did you mean 'lora-tuned'\?"):
        find_methods(("lora-tined",))


def test_methods_train_what_their_name_says() -> None:
    base = build_base_model(settings(dtype="bfloat16"))
    layers = [m for m in base.model.modules() if isinstance(m, nn.Linear)]
    rows, both = sum(m.out_features for m in layers), sum(m.in_features + m.out_features for m in layers)
    trained: dict[str, int] = {}
    dtypes: dict[str, set[torch.dtype]] = {}
    for name in sorted(ISSUE_METHODS - {"qpaca", "qlora"}):
        parameters = [p for p in prepared(base, name).parameters() if p.requires_grad]
        trained[name], dtypes[name] = sum(p.numel() for p in parameters), {p.dtype for p in parameters}
    assert trained["frozen"] == 0
    assert trained["full"] == sum(p.numel() for p in base.model.parameters())
    assert trained["paca"] == trained["paca+lean"] == trained["paca+lean+recompute"] == 4 * rows
    assert trained["lora"] == trained["lora-tuned"] == 4 * both
    assert trained["lora-fa"] == 4 * rows
    assert trained["dora"] == 4 * both + rows
    assert trained["lora-same-parameters"] == round(4 * rows / both) * both == trained["lora-tuned-same-parameters"]
    assert dtypes["lora"] == {torch.float32}
    assert dtypes["lora-tuned"] == {torch.bfloat16}
    assert dtypes["vera"] == {torch.float32}


@pytest.mark.parametrize("name", ["qpaca", "qlora"])
def test_four_bit_methods_train_above_nf4_weights(name: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = build_base_model(settings(dtype="bfloat16"), four_bit=True)
    layers = [m for m in base.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    model = prepared(base, name)
    trained = [p for p in model.parameters() if p.requires_grad]
    rows, both = sum(m.out_features for m in layers), sum(m.in_features + m.out_features for m in layers)
    assert sum(p.numel() for p in trained) == 4 * (rows if name == "qpaca" else both)
    hidden = model(input_ids=torch.arange(16)[None]).last_hidden_state
    hidden.float().square().sum().backward()
    assert all(p.grad is not None for p in trained)
    assert {m.weight.dtype for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)} == {torch.uint8}


def test_only_the_lean_methods_are_lean() -> None:
    base = build_base_model(settings())
    lean = [name for name in ("paca", "paca+lean", "paca+lean+recompute", "lora") if is_lean(prepared(base, name))]
    assert lean == ["paca+lean", "paca+lean+recompute"]


def test_a_refusal_is_the_reason_why_a_method_is_unavailable() -> None:
    def refuse(model: nn.Module, adaptation: Adaptation) -> nn.Module:
        raise NotImplementedError("not for this shape\nand more lines")

    with pytest.raises(MethodUnavailable, match=r"^not for this shape$"):
        Method("x", "x", refuse).apply(nn.Linear(2, 2), 1)
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(MethodUnavailable, match="it targets none"):
        METHODS["lora-same-parameters"].apply(convolutions, 1)
    with pytest.raises(MethodUnavailable, match="can't be made lean"):
        METHODS["paca+lean"].apply(convolutions, 1)


def test_a_method_may_have_targets_and_a_rank_of_its_own() -> None:
    base = build_base_model(settings())
    adapted = prepared(base, "paca:r=6:target_modules=o_proj+down_proj")
    shapes = {name.split(".")[-3]: p.shape for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name: shape[1] for name, shape in shapes.items()} == {"o_proj": 6, "down_proj": 6}
    rows = sum(shape[0] for shape in shapes.values())
    equal = prepared(base, "lora-same-parameters:target_modules=o_proj+down_proj", rank=30)
    trained = [p for p in equal.parameters() if p.requires_grad]
    both = rows + 192 + 512
    assert sum(p.numel() for p in trained) == 2 * round(30 * rows / both) * both
    assert find_methods(["paca", "paca:r=6"])[1].name == "paca:r=6"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("paca:rank=6", "has no setting 'rank' of its own; of it, r and target_modules can be set"),
        ("full:r=6", "of it, nothing can be set"),
        ("vera:r=6", "of it, target_modules can be set"),
        ("paca:r=none", "r is 'none'; give a whole number"),
        ("paca:target_modules=", "names of modules"),
        ("all:r=6", "There is no method 'all'"),
    ],
)
def test_wrong_settings_of_a_method_are_named(text: str, message: str) -> None:
    with pytest.raises(PacaError, match=message):
        find_methods([text])
