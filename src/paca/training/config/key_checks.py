"""Keys and values of a config, checked: messages name the place, what was expected and the nearest valid name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paca.messages.errors import PacaError
from paca.messages.nearest import did_you_mean, nearest
from paca.training.config.run_config import METHODS
from paca.training.config.typed_values import choices as named
from paca.training.config.typed_values import expected, matches, shown


class Origins:
    """Where each key was given, for messages: a file and line, or `--set`; and where else it may belong."""

    def __init__(self, path: Path, lines: Mapping[str, int]) -> None:
        self.path = path
        self.lines = dict(lines)
        self.overridden: set[str] = set()
        self.keys_of_all: Callable[[], Iterable[tuple[str, Iterable[str]]]] = tuple
        """Finds the keys of all sections, for one that is in the wrong section."""

    def of(self, key: str) -> str:
        """`"runs/a.yaml, line 7"` or `"--set"`, for a dotted key such as `train.optim`."""
        parent = key.rpartition(".")[0]  # an entry of a key that holds several is given with it
        if key in self.overridden or ("." in parent and parent in self.overridden):
            return "--set"
        line = self.lines.get(key) or self.lines.get(parent) or self.lines.get(key.partition(".")[0])
        return f"{self.path}, line {line}" if line else str(self.path)

    def rename(self, section: str, meant: str) -> None:
        """Its keys are going to be called those of the section that is meant."""
        for key in [key for key in self.lines if key.partition(".")[0] == section]:
            self.lines[meant + key.removeprefix(section)] = self.lines[key]

    def of_section(self, name: str) -> str:
        """The same for a whole section."""
        given = name not in self.lines and any(key.partition(".")[0] == name for key in self.overridden)
        return "--set" if given else self.of(name)


class Mistakes:
    """Of checks that do not need each other: told together, a line each, so that one run finds them all."""

    def __init__(self) -> None:
        self._found: list[PacaError] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """A block whose `PacaError` is kept."""
        try:
            yield
        except PacaError as error:
            self._found.append(error)

    def __bool__(self) -> bool:
        return bool(self._found)

    def tell(self) -> None:
        """Raise what was kept."""
        if len(self._found) == 1:
            raise self._found[0]
        if self._found:
            raise PacaError("\n".join(dict.fromkeys(map(str, self._found))))  # two checks may find the same


WORDS_OF_TRAIN = {
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "max_seq_length": "max_length",
}
"""What people call some keys of `train`, where spelling alone would find another one."""
_QUANTIZED = dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization_config"), " It is nf4, fp4 or int8.")
_OTHER_VALUES = {
    **dict.fromkeys(("4bit", "4-bit", "int4", "q4", "bnb_4bit", "bnb-4bit", "qlora"), "nf4"),
    **dict.fromkeys(("8bit", "8-bit", "q8", "bnb_8bit", "bnb-8bit"), "int8"),
}
"""Of `model.quantization`."""
OTHER_WORDS = {
    "rank": "r",
    **dict.fromkeys(_QUANTIZED, "quantization"),
    **dict.fromkeys(("validation", "valid", "val", "test", "dev"), "eval"),
    "path": "train",
    **WORDS_OF_TRAIN,
}
"""What people call keys of any section, and what they are."""
_SETTLED = {
    "task_type": "The task is that of train.trainer: leave it out.",
    "peft_type": "The section's name says the method; others of PEFT have the section peft.",
    "inference_mode": "A run trains its adapter: leave it out.",
    "base_model_name_or_path": "Did you mean model.name?",
}
"""Fields of PEFT's configs that a method's section has no say in."""
_NOT_OF_PACA = {"lora_dropout": "PaCA has no dropout. Leave it out."}


def check_section(
    section: str,
    settings: Mapping[str, Any],
    annotations: Mapping[str, Any],
    origins: Origins,
    choices: Mapping[str, Any] | None = None,
) -> None:
    """Refuse keys that a section does not have, values of another type, and values that a field does not list.

    Args:
        section: Its name.
        settings: What was given.
        annotations: The type of each key.
        origins: Where each was given.
        choices: For some keys, the only values.

    Raises:
        PacaError: A line for each: the dotted key, its place, what was expected and the nearest of it, and what was
            found.
    """
    mistakes = Mistakes()
    for name, value in settings.items():
        with mistakes.noted():
            _check_key(section, name, value, annotations, origins, choices or {})
    mistakes.tell()


def _check_key(
    section: str,
    name: str,
    value: Any,
    annotations: Mapping[str, Any],
    origins: Origins,
    choices: Mapping[str, Any],
) -> None:
    names, place = sorted(annotations), origins.of(f"{section}.{name}")
    if name not in annotations:
        settled = {**(_SETTLED if section in METHODS else {}), **(_NOT_OF_PACA if section == "paca" else {})}
        if name in settled:
            raise PacaError(f"{place}: there is no key {section}.{name}. {settled[name]}")
        # A plain misspelling needs no look at the others, for which libraries are imported. Those of them that are
        # most like a key of another section (`init_lora_weights`, `trainer`) are so by 0.83.
        meant = nearest(OTHER_WORDS.get(name, name), names, cutoff=0.85)
        swapped = any(sorted(name) == sorted(known) for known in names)  # `fromat`, alike by 0.83
        sure = meant is not None or swapped or f"{section}_{name}" in names  # paca_alpha
        others = dict({} if sure else origins.keys_of_all())
        others.pop(section, None)  # `names` leaves out keys of `train` that can't be set
        hint = _where_it_belongs(name, {section: names, **others}) + _QUANTIZED.get(name, "")
        if not names:
            hint += f" The section {section} has no keys."
        elif len(names) <= 20 and not sure:
            hint += f" The keys of {section} are {', '.join(names)}."
        raise PacaError(f"{place}: there is no key {section}.{name}.{hint}")
    if not matches(value, annotation := annotations[name]):
        hint = ""
        if isinstance(value, str):
            likely = _OTHER_VALUES.get(value.lower(), value) if name == "quantization" else value
            hint = did_you_mean(likely, named(annotation), "{}")
        if isinstance(value, dict) and matches("", annotation):
            hint = " A text that holds ': ' needs quotes within those of the shell: --set 'key=\"some: text\"'."
        if not hint and matches([value], annotation):
            hint = f" Did you mean [{value}]?"
        raise PacaError(f"{place}: {section}.{name} must be {expected(annotation)}, not {shown(value)}.{hint}")
    allowed = choices.get(name)
    if allowed and value is not None and value not in allowed:
        one_of = ", ".join(map(str, allowed))
        raise PacaError(f"{place}: {section}.{name} must be one of {one_of}, not {shown(value)}.")


def _where_it_belongs(name: str, sections: Mapping[str, Iterable[str]]) -> str:
    """The key that was meant: the same one of another section, or the nearest of this one, which comes first.

    `eval: {steps: 9}` means `train.eval_steps`. A key of another method may mean this method's, or that method.
    """
    own = next(iter(sections))
    method, _, rest = name.partition("_")  # `lora_rank`, `paca_r`
    rest = OTHER_WORDS.get(rest, rest)
    if method in METHODS and rest in sections.get(method, ()):
        return f" Did you mean {method}.{rest}?"
    for wanted in (f"{own}_{name}", f"per_device_{own}_{name}", OTHER_WORDS.get(name, name), name):
        for section, keys in sections.items():
            if wanted in keys:
                both = section != own and {own, section} <= set(METHODS)
                close = nearest(name, sections[own]) if both else None
                return f" Did you mean {f'{own}.{close} or ' if close else ''}{section}.{wanted}?"
    for number, (section, keys) in enumerate(sections.items()):
        close = nearest(name, keys, cutoff=0.7 if number else 0.5)
        if close is not None:
            return f" Did you mean {section}.{close}?"
    return ""
