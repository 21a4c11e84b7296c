"""What a method of the benchmark is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from paca.messages.errors import PacaError


class MethodUnavailable(Exception):
    """The method can't run here; the text is the reason that the report shows."""


@dataclass(frozen=True)
class Adaptation:
    """What the methods are told about the model and the run."""

    rank: int
    targets: str | list[str]
    """Modules to adapt, as PEFT's `target_modules` takes them."""


@dataclass(frozen=True)
class Method:
    """One way to fine-tune. Each lives in a file of its own in `paca.bench.methods`, as `METHOD`."""

    name: str
    summary: str
    """One line for `paca bench methods`."""
    prepare: Callable[[nn.Module, Adaptation], nn.Module]
    """Takes a model whose parameters are all frozen, in place or not, to the model that trains. May raise
    MethodUnavailable, or the ValueError of the library that refuses."""
    four_bit: bool = False
    """Whether the linear layers of the model are quantized before `prepare`."""
    autocast_adapter_dtype: bool = True
    """Whether a second adapter gets float32 parameters above half-precision weights, as PEFT does by default."""


def apply_method(method: Method, model: nn.Module, adaptation: Adaptation) -> nn.Module:
    """Prepare `model` for `method`.

    Raises:
        MethodUnavailable: the method can't be put into this model, with the reason.
    """
    try:
        return method.prepare(model, adaptation)
    except (PacaError, ValueError, ImportError, NotImplementedError) as error:
        raise MethodUnavailable(str(error).strip().splitlines()[0]) from error
