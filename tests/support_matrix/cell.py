"""Runs a cell, and tells paca's refusals from crashes."""

from __future__ import annotations

import os
import traceback
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import paca
from models import adapt
from support_matrix.case import Case, Explained, run
from support_matrix.operations import OPERATIONS, WITH_GRADIENTS
from support_matrix.subject import Refused, Subject

LIBRARY = str(Path(paca.__file__).parent)
ACCEPTABLE = ("works", "refused", "explained")


class Outcome(NamedTuple):
    """Of a cell: one of `ACCEPTABLE`, or a "crash" or a "wrong" result."""

    kind: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}" if self.reason else self.kind

    @classmethod
    def of(cls, text: str) -> Outcome:
        """Undo `str`."""
        kind, _, reason = text.partition(": ")
        return cls(kind, reason)


def run_cell(subject: Subject, operation: str, folder: Path) -> Outcome:
    """Do `operation` on a fresh model of `subject`."""
    case: Case | None = None
    before = None
    here = Path.cwd()
    os.chdir(folder)  # PEFT writes the offload index of a dispatched model into the working directory
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case = Case(subject, folder)
            with torch.no_grad():
                before = run(case.model, case.x)
            with torch.set_grad_enabled(operation in WITH_GRADIENTS):
                OPERATIONS[operation](case)
    except Exception as error:
        outcome = _judged(error, folder)
        if outcome.kind == "refused" and case is not None and before is not None:
            return _after_refusal(case, before, outcome)
        return outcome
    finally:
        os.chdir(here)
    return Outcome("works")


def run_refused(subject: Refused, folder: Path) -> Outcome:
    """Try to adapt what can't be."""
    model = subject.base()
    before = _structure(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapt(model, **{"r": 1, **subject.targets})
    except Exception as error:
        outcome = _judged(error, folder)
        return outcome if _structure(model) == before else Outcome("wrong", f"the model was changed ({outcome})")
    return Outcome("works")


def _structure(model: nn.Module) -> list[tuple[str, type, bool]]:
    return [
        *((name, type(module), module.training) for name, module in model.named_modules()),
        *((name, type(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()),
    ]


def _judged(error: Exception, folder: Path) -> Outcome:
    message = " ".join(str(error).replace(str(folder), "FOLDER").split())
    if isinstance(error, Explained):
        return Outcome("explained", message)
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{type(error).__name__} in {frames[-1].filename}:{frames[-1].lineno}: {message}"
    if isinstance(error, AssertionError):
        return Outcome("wrong", where)
    if isinstance(error, (ValueError, RuntimeError)) and frames[-1].filename.startswith(LIBRARY):
        return Outcome("refused", message)
    return Outcome("crash", where)


def _after_refusal(case: Case, before: torch.Tensor, outcome: Outcome) -> Outcome:
    """A refusal leaves the model as it was."""
    try:
        with torch.no_grad():
            case.model.set_adapter("default")
            after = run(case.model, case.x)
    except Exception as error:
        return Outcome("wrong", f"after the refusal the model does not run: {error!r} ({outcome.reason})")
    if not torch.equal(before, after):
        return Outcome("wrong", f"the refusal changed the model ({outcome.reason})")
    return outcome
