"""Regular expressions and long lists of names in a config; those of an adapter that somebody else made are bounded.

Python's `re` can neither be interrupted nor bounded, and PEFT matches the expressions of a config in many places. So
all of them are matched with all names once, by the same `re`, in another process, which can be ended. What ended in
time there, ends here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from paca.messages.shown import shown
from paca.tuner.bounded_process import SECONDS, BoundedProcess, TookTooLong, WorkFailed

MOST_NAMES, LONGEST_NAME = 5_000, 1_000
"""Of a list (PEFT takes 1.3 s for 5,000, and four times as long for twice as many), and characters."""
MOST_EXPRESSIONS, LONGEST = 500, 10_000
"""In all of a config, names of the model's modules not counted, and their characters together."""

# How PEFT puts them together (0.21: tuners_utils.check_target_module_exists, utils.other.get_pattern_key).
_WHOLE, _ENDING = "{}", r"(.*\.)?({})$"
_FORMS = {
    "target_modules": _WHOLE,
    "exclude_modules": _WHOLE,
    "feedforward_modules": _WHOLE,
    "rank_pattern": _ENDING,
    "alpha_pattern": _ENDING,
    "indices": _ENDING,
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
}
NAMED = (*(name for name in _FORMS if name != "feedforward_modules"), "target_parameters")
"""Settings of `PacaConfig` that name modules."""
_LISTS = ("modules_to_save", "layers_pattern")  # of which entries are expressions too
_PROGRAM = """
import re, time
def work(request):
    match = getattr(re.compile(request["expression"]), "fullmatch" if request["whole"] else "match")
    for name in request["names"]:
        match(name)
    return time.process_time()
"""
# `(?i)` with a wide class takes `re` 5 ms to compile, others microseconds.
_SLOW_TO_COMPILE = re.compile(r"\(\?[a-zA-Z]*i")
_NAMES = re.compile(r"\^?(?:[\w.\-|]|\\[^\w\s])*\$?")


def check_unusual(config: Any) -> None:
    """Note in a config that its names are many, or long, or expressions; `ValueError` if one is no expression."""
    config.unusual = True
    for setting in NAMED:
        value = getattr(config, setting) or ()
        entries = [value] if isinstance(value, str) else list(value)
        for one in entries if isinstance(value, (str, dict)) or setting in _LISTS else ():
            if one != "all-linear" and not (isinstance(one, str) and _SLOW_TO_COMPILE.search(one)):
                _compile(setting, one)


def check_blocks(config: Any) -> None:
    """`ValueError` for settings that say which blocks are adapted, and fit no others of the config."""
    targets = config.target_modules
    if config.layers_to_transform is None:
        raise ValueError("layers_pattern says where layers_to_transform counts, but that is not set.")
    if isinstance(targets, str) and targets != "all-linear":
        raise ValueError(
            "layers_to_transform can't go with target_modules given as one string: say in the expression which blocks "
            "are meant, or give target_modules as a list of names."
        )


def _compile(setting: str, expression: Any) -> None:
    try:
        re.compile(expression)
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{setting} has the key {shown(expression)}, no module's name nor a regular expression: {error}."
        ) from error


def try_expressions(settings: Mapping[str, Any], model: nn.Module, place: str | Path | None) -> None:
    """Match all expressions of an adapter's settings with all names in a base model, elsewhere. Raise `ValueError` if
    there are too many names or expressions, or one is none, is too long, or takes too long; names it, its setting and
    `place`, the config's file."""
    for setting in (*_FORMS, "target_parameters", "layers_to_transform"):
        value = settings.get(setting)
        entries = value if isinstance(value, (list, tuple, set)) else ()
        longest = max((len(one) for one in entries if isinstance(one, str)), default=0)
        if len(entries) > MOST_NAMES or longest > LONGEST_NAME:
            raise ValueError(
                f"{place}: {setting} has {len(entries):,} names, the longest of {longest:,} characters. "
                f"{MOST_NAMES:,} of {LONGEST_NAME:,} are the most. Give endings of names."
            )
    names = [*(name for name, _ in model.named_modules()), *(name for name, _ in model.named_parameters())]
    ours = {*names, *(f"^{re.escape(name)}" for name in names)}
    found = [(setting, one) for setting, one in _expressions(settings) if one not in ours]
    strange = [pair for pair in found if len(pair[1]) > LONGEST_NAME or not _NAMES.fullmatch(pair[1])]
    if len(found) > MOST_EXPRESSIONS or sum(len(one) for _, one in strange if not _NAMES.fullmatch(one)) > LONGEST:
        setting, one = max(found, key=lambda pair: len(pair[1]))
        raise ValueError(
            f"{place}: there are {len(found):,} regular expressions, such as {shown(one)} in {setting}. "
            f"{MOST_EXPRESSIONS} with {LONGEST:,} characters together are the most; name the modules instead."
        )
    left = SECONDS
    for setting, one in strange:
        form = _FORMS[setting]
        request = {"expression": form.format(one), "whole": form == _WHOLE, "names": names}
        try:
            left -= _process().ask(request, max(left, 0.01))
        except TookTooLong:
            reason = "takes too long to match with the names of this model's modules"
        except WorkFailed as error:
            reason = f"is no regular expression ({error})"
        except OSError as error:
            reason = f"can't be tried, since no Python process can be started here ({error})"
        else:
            continue
        raise ValueError(f"{place}: {shown(one)} in {setting} {reason}. Name the modules instead.")


def _expressions(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What PEFT matches as expressions, with the settings they stand in."""
    found = []
    for setting, form in _FORMS.items():
        value = settings.get(setting)
        lists = () if form == _WHOLE else (list, tuple, set, Mapping)
        several = value if isinstance(value, lists) else [value]
        found += [(setting, one) for one in several if isinstance(one, str) and one != "all-linear"]
    return found


@functools.cache
def _process() -> BoundedProcess:
    return BoundedProcess(_PROGRAM)
