"""The methods that are measured against each other: one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from paca.messages.errors import PacaError
from paca.messages.nearest import did_you_mean

if TYPE_CHECKING:
    from torch import nn  # libraries are imported where models are made: a misspelt method is found without them

_OPTIONS = ("r", "target_modules")


class MethodUnavailable(Exception):
    """The method can't run here; the text is the reason that the report shows."""


@dataclass(frozen=True)
class Adaptation:
    """What is put into a model."""

    r: int
    target_modules: str | list[str] = "all-linear"
    """As PEFT takes them."""


@dataclass(frozen=True)
class Method:
    """One way to fine-tune."""

    name: str
    summary: str
    """One line for `paca bench methods`."""
    prepare: Callable[[Any, Adaptation], nn.Module]
    """Takes a model whose parameters are all frozen, in place or not, to the model that trains. May raise
    MethodUnavailable, or the ValueError of the library that refuses."""
    four_bit: bool = False
    """Whether the linear layers of the model are quantized before `prepare`."""
    autocast_adapter_dtype: bool = True
    """Whether the adapter gets float32 parameters above half-precision weights, as PEFT does by default."""
    options: tuple[str, ...] = _OPTIONS
    """What can be set for it alone, after its name."""
    chosen: tuple[tuple[str, Any], ...] = ()
    """What was set so."""

    def apply(self, model: nn.Module, rank: int) -> nn.Module:
        """Prepare the frozen `model`, with `rank` unless the method has its own; MethodUnavailable if it can't."""
        try:
            return self.prepare(model, replace(Adaptation(rank), **dict(self.chosen)))
        except (PacaError, ValueError, ImportError, NotImplementedError) as error:
            raise MethodUnavailable(str(error).strip().splitlines()[0]) from error


def _frozen(model: Any, adaptation: Adaptation) -> nn.Module:
    # The backward pass then goes through the whole model.
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    return model


def _paca(model: Any, adaptation: Adaptation, **more: Any) -> nn.Module:
    import peft

    from paca.config import PacaConfig

    return peft.get_peft_model(model, PacaConfig(r=adaptation.r, target_modules=adaptation.target_modules, **more))


def _lean(model: Any, adaptation: Adaptation, recompute: Any = None) -> nn.Module:
    from paca.lean import make_lean

    return _paca(make_lean(model, recompute), adaptation)


def _lora(model: Any, adaptation: Adaptation, autocast_adapter_dtype: bool = True, **more: Any) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=adaptation.r, target_modules=adaptation.target_modules, **more)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)


_TUNED: Any = {"autocast_adapter_dtype": False}
_lora_tuned: Any = partial(_lora, **_TUNED)


def _lora_fa(model: Any, adaptation: Adaptation) -> nn.Module:
    adapted = _lora(model, adaptation)
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return adapted


def _vera(model: Any, adaptation: Adaptation) -> nn.Module:
    import peft

    # PEFT's default r of 256 stays: it counts shared projections, not trained columns.
    return peft.get_peft_model(model, peft.VeraConfig(target_modules=adaptation.target_modules))


def _qlora(model: Any, adaptation: Adaptation) -> nn.Module:
    model.is_loaded_in_4bit = True  # how PEFT tells such a model
    return _lora(model, adaptation)


def _equal(model: nn.Module, adaptation: Adaptation) -> Adaptation:
    """With the rank at which LoRA, `r × (in + out)` per layer, comes closest to PaCA's `r × out`; at least 1."""
    from torch import nn
    from transformers import PreTrainedModel

    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    wanted = adaptation.target_modules
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not output
        and (isinstance(wanted, str) or any(f".{name}".endswith(f".{suffix}") for suffix in wanted))
    ]
    if not layers:
        raise MethodUnavailable("an equal number of parameters is defined for linear layers, and it targets none")
    columns = sum(layer.out_features for layer in layers)
    both = sum(layer.in_features + layer.out_features for layer in layers)
    return replace(adaptation, r=max(1, round(adaptation.r * columns / both)))


METHODS = {
    method.name: method
    for method in (
        Method("frozen", "the floor: all frozen, the first layer's output requires grad", _frozen, options=()),
        Method("full", "every parameter is trained", lambda model, a: model.requires_grad_(True), options=()),
        Method("paca", "PaCA, stock blocks", _paca),
        Method(
            "paca-random",
            "PaCA, stock blocks, columns drawn one by one, as the paper and PEFT draw them",
            partial(_paca, selection="random"),
        ),
        Method("paca+lean", "PaCA, lean RMSNorm and MLP", _lean),
        Method(
            "paca+lean+recompute",
            "PaCA, lean blocks, gate and up computed twice",
            partial(_lean, recompute="mlp"),
        ),
        Method("qpaca", "PaCA on NF4 weights, patched columns", _paca, four_bit=True),
        Method("lora", "LoRA, PEFT's defaults, same rank", _lora),
        Method("lora-tuned", "LoRA, adapters in the weights' dtype, same rank", _lora_tuned, **_TUNED),
        Method(
            "lora-same-parameters",
            "LoRA, PEFT's defaults, as many parameters as PaCA",
            lambda model, a: _lora(model, _equal(model, a)),
        ),
        Method(
            "lora-tuned-same-parameters",
            "LoRA, adapters in the weights' dtype, as many parameters as PaCA",
            lambda model, a: _lora_tuned(model, _equal(model, a)),
            **_TUNED,
        ),
        # Zhang et al. 2023, arXiv 2308.03303: A stays at its random start, so its input is not kept.
        Method("lora-fa", "LoRA with A frozen, PEFT's defaults", _lora_fa),
        Method("dora", "DoRA, PEFT's defaults, same rank", partial(_lora, use_dora=True)),
        Method("vera", "VeRA, PEFT's defaults (r=256)", _vera, options=("target_modules",)),
        Method("qlora", "LoRA on NF4 weights, PEFT's defaults, same rank", _qlora, four_bit=True),
    )
}


def find_methods(names: Sequence[str]) -> list[Method]:
    """The methods of those names; `all` stands for every one.

    A name may bring settings of its own after colons, several modules joined by plus signs:
    `paca:r=72:target_modules=o_proj+down_proj`. The whole text is then the method's name.

    Raises:
        PacaError: There is no method of that name, or it has no such setting.
    """
    found: dict[str, Method] = {}
    for text in names:
        name, *settings = text.split(":")
        if name == "all" and not settings:
            found.update(METHODS)
        elif name in METHODS:
            chosen = tuple(_setting(METHODS[name], setting) for setting in settings)
            found[text] = replace(METHODS[name], name=text, chosen=chosen)
        else:
            raise PacaError(
                f"There is no method {name!r}.{did_you_mean(name, METHODS)} Known are: all, {', '.join(METHODS)}."
            )
    return list(found.values())


def check_baseline(baseline: str | None, methods: Sequence[Method]) -> None:
    """PacaError if ratios can't be taken against it, as it is none of the methods."""
    names = [method.name for method in methods]
    if baseline is not None and baseline not in names:
        raise PacaError(
            f"The baseline {baseline!r} is not among the methods ({', '.join(names)}). Add it, or choose another with "
            "--baseline."
        )


def _setting(method: Method, text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    if key not in method.options:
        known = " and ".join(method.options) or "nothing"
        raise PacaError(
            f"{method.name} has no setting {key!r} of its own; of it, {known} can be set, as in "
            "paca:r=72:target_modules=o_proj+down_proj."
        )
    if key == "target_modules" and value:
        return key, value.split("+")
    if key == "r" and value.isdecimal() and int(value) > 0:
        return key, int(value)
    wanted = "a whole number from 1 on" if key == "r" else "names of modules joined by plus signs"
    raise PacaError(f"{method.name}: {key} is {value!r}; give {wanted}.")
