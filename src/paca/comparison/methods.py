"""What is compared: each method is sections that are laid over the run's own YAML."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paca.comparison.own_keys import OWN, SEEDS
from paca.messages.errors import PacaError
from paca.messages.nearest import did_you_mean
from paca.training.config.adapter_settings import config_type
from paca.training.config.run_config import METHODS
from paca.training.config.strict_yaml import read_yaml

Sections = Mapping[str, Mapping[str, Any]]

NAMED = ("paca", "lora", "lora-tuned", "full")
"""Methods that have a name of their own here, besides PEFT's."""

_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
"""Fields of PEFT's configs that say where an adapter goes."""
_LORA_RANK = 8  # PEFT's default
_LAID_OVER = (*METHODS, "train", "model")
LOSS_SCOPE = ("completion_only_loss", "assistant_only_loss", "max_length", "truncation_mode")
JUDGING = {
    "train": (*LOSS_SCOPE, "trainer", "loss_type", "label_smoothing_factor", "answer_pattern", "reward_funcs",
              "reward_weights", "max_completion_length", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
              "generation_kwargs", "chat_template_kwargs"),
    "model": ("name", "revision", "tokenizer"),
    "data": ("template",),
}  # fmt: skip
"""Settings that change what a score means, by section. No method can have its own."""
_PLAIN = re.compile(r"[^\W_][\w.+-]*")
_ALPHAS = ("paca_alpha", "lora_alpha", "alpha")


@dataclass(frozen=True)
class Method:
    """One of the methods that are compared."""

    name: str
    sections: Sections
    """Laid over the sections that all methods share; one of them is the method's own."""

    @property
    def kind(self) -> str:
        """Name of its own section, such as `lora`."""
        return next(name for name in METHODS if name in self.sections)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The content of that section."""
        return self.sections[self.kind]

    def with_settings(self, section: str, **settings: Any) -> Method:
        """The same with some settings of a section changed."""
        changed = {**self.sections.get(section, {}), **settings}
        return dataclasses.replace(self, sections={**self.sections, section: changed})

    @property
    def rank(self) -> int | None:
        """Its `r`, or the default of its config class; None where it has none."""
        r = {**_defaults(self.kind, self.settings), **self.settings}.get("r")
        return r if isinstance(r, int) and r > 0 else None

    def with_rank(self, r: int) -> Method:
        """The same with another `r`. Its alpha, also where it is the default, keeps its ratio to `r`."""
        before = {**_defaults(self.kind, self.settings), **self.settings}
        changed: dict[str, Any] = {"r": r}
        for name in _ALPHAS:
            if isinstance(before.get(name), (int, float)):
                alpha = before[name] * r / before["r"]
                changed[name] = int(alpha) if alpha == int(alpha) else alpha
        return self.with_settings(self.kind, **changed)

    def laid_over(self, common: Sections) -> dict[str, dict[str, Any]]:
        """The sections of a run with this method."""
        sections = {name: dict(values) for name, values in common.items() if name not in METHODS}
        for name, values in self.sections.items():
            sections[name] = {**sections.get(name, {}), **values}
        return sections


def methods_of(text: str, common: Sections) -> list[Method]:
    """The methods that `--methods` names.

    Args:
        text: Names with commas between: `paca`, `lora`, `lora-tuned`, `full`, a method of PEFT such as `loha`, or
            `name=FILE.yaml` for one of the user's own.
        common: The sections of the run's YAML, its method section included.

    Raises:
        PacaError: A name that is not known or comes twice, or a file that holds other things than a method.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise PacaError("--methods names nothing. Give names with commas between, such as paca,lora,lora-tuned.")
    methods = []
    for word in words:
        name, _, file = word.partition("=")
        if file and name and not _PLAIN.fullmatch(name):
            raise PacaError(
                f"--methods: {name!r} can't be the name of a method, as folders are named by it. Use letters, digits, "
                "'.', '_', '+' and '-', and begin with a letter or digit."
            )
        methods.append(_from_file(name, Path(file), common) if file else _named(word, common))
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise PacaError(f"--methods names {name!r} twice. To compare two settings of it, give name=FILE.yaml.")
    return methods


def own_section(sections: Sections) -> str:
    """Which method section a run's YAML holds; `paca` where it holds none."""
    return next((name for name in METHODS if sections.get(name) is not None), "paca")


def _named(name: str, common: Sections) -> Method:
    name = name.lower() if name.lower() in NAMED else name
    own = own_section(common)
    kind = "lora" if name == "lora-tuned" else name
    if kind == own:
        section = dict(common.get(own, {}))
    elif kind == "paca":
        section = _targets(common, None)
    elif kind == "lora":
        section = _for_lora({"r": _LORA_RANK, "lora_alpha": 2 * _LORA_RANK, **_targets(common, "all-linear")}, common)
    elif kind == "full":
        section = {}
    else:
        kind, section = "peft", _of_peft(name, common)
    if kind == "paca":  # spelled out, as the rank may have to follow another method's
        from paca.config import PacaConfig  # and with it PEFT

        section = {"r": PacaConfig.r, "paca_alpha": PacaConfig.paca_alpha, **section}
    sections: dict[str, Mapping[str, Any]] = {kind: section}
    if name == "lora-tuned":
        sections["train"] = {"autocast_adapter_dtype": False}
    return Method(name, sections)


def _targets(common: Sections, all_linear: str | None) -> dict[str, Any]:
    """Where the run's own method goes, for another one to go there too; `all_linear` is that method's word for PaCA's
    default."""
    own = common.get(own_section(common), {})
    targets = {name: own[name] for name in _TARGETS if own.get(name) is not None}
    if all_linear is not None:
        targets.setdefault("target_modules", all_linear)
    return targets


def _for_lora(settings: dict[str, Any], common: Sections) -> dict[str, Any]:
    """The settings of a LoRA that goes where the run's method does, which it can't everywhere."""
    if settings.get("layers_to_transform") is not None and isinstance(settings.get("target_modules"), str):
        own = own_section(common)
        raise PacaError(
            f"{own}.layers_to_transform goes with a list of target_modules in LoRA. Name them in the run's YAML, "
            f"as in {own}.target_modules: [q_proj, v_proj]."
        )
    return settings


def _defaults(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the config class behind a method's section; a full training has none."""
    if kind == "full":
        return {}
    return {option.name: option.default for option in dataclasses.fields(config_type(kind, settings))}


def _of_peft(name: str, common: Sections) -> dict[str, Any]:
    from peft import PeftType

    types = {kind.value.lower().replace("_", "-"): kind for kind in PeftType}
    kind = types.get(name.lower().replace("_", "-"))
    if kind is None:
        if (setting := _of_lora(name)) is not None:
            raise PacaError(
                f"There is no method {name!r}, as it is a setting of LoRA. Give it a file of its own, with lora: "
                f"{{{setting}}} in it: --methods paca,{name}={name}.yaml."
            )
        known = [*NAMED, *(name for name in types if name not in NAMED)]
        hint = did_you_mean(name.lower(), known, likelier=NAMED)
        raise PacaError(
            f"There is no method {name!r}.{hint} It can be {', '.join(NAMED)}, a method "
            "of PEFT by its name (loha, ia3, ...), or name=FILE.yaml with a section of your own."
        )
    own = common.get("peft") or {}
    if str(own.get("peft_type", "")).upper() == kind.value:
        return dict(own)
    section: dict[str, Any] = {"peft_type": kind.value}
    defaults = _defaults("peft", section)
    if defaults.get("r"):  # spelled out, as for PaCA
        section |= {name: defaults[name] for name in ("r", *_ALPHAS) if name in defaults}
    return section | _targets_of_peft(common, defaults)


def _of_lora(name: str) -> str | None:
    """The setting of LoRA that goes by a name: one of its starts, or a variant, such as `dora`."""
    from paca.training.config.adapter_settings import adapter_fields, is_start

    name = name.lower().replace("-", "_")
    if is_start(name):
        return f"init_lora_weights: {name}"
    return f"use_{name}: true" if f"use_{name}" in adapter_fields("lora", {}) else None


def _targets_of_peft(common: Sections, defaults: Mapping[str, Any]) -> dict[str, Any]:
    if "feedforward_modules" in defaults:  # IA3's two lists go together; PEFT knows both for each architecture
        return {}
    return {name: value for name, value in _targets(common, "all-linear").items() if name in defaults}


def _from_file(name: str, path: Path, common: Sections) -> Method:
    if not name:
        raise PacaError(f"--methods ={path}: the name is missing. Give name={path}.")
    content = read_yaml(path)[0] or {}
    if not isinstance(content, dict) or not all(isinstance(values, (dict, type(None))) for values in content.values()):
        raise PacaError(f"{path} must hold sections of a run, such as lora: and train:.")
    for section in content:
        if section not in _LAID_OVER:
            raise PacaError(
                f"{path}: a method can't have the section {section!r}. It is laid over the run's YAML and can hold "
                f"{', '.join(_LAID_OVER)}; all else is the same for all methods."
            )
    sections: dict[str, dict[str, Any]] = {section: dict(values or {}) for section, values in content.items()}
    for section, names in JUDGING.items():
        for key in names:
            if key in sections.get(section, {}):
                raise PacaError(
                    f"{path}: {section}.{key} changes what a method is judged by, so scores would not be comparable. "
                    "Set it in the run's YAML, for all methods."
                )
    for setting, flag in (("train.learning_rate", "--lr"), *((one, "--seeds") for one in SEEDS)):
        section, _, key = setting.partition(".")
        if key in sections.get(section, {}):
            raise PacaError(f"{path}: {setting} comes from {flag}. Leave it out of the method's file.")
    for setting, why in {**OWN, "model.adapter": "the methods of a comparison all begin anew"}.items():
        section, _, key = setting.partition(".")
        if sections.get(section, {}).get(key) is not None:
            raise PacaError(f"{path}: {setting} has no place in a method's file: {why}. Leave it out.")
    if "data_seed" in sections.get("train", {}):
        raise PacaError(
            f"{path}: train.data_seed would give a method another order of the data than the others have. Set it in "
            "the run's YAML, for all methods."
        )
    given = [section for section in METHODS if section in sections]
    if len(given) > 1:
        raise PacaError(f"{path} holds the methods {' and '.join(given)}; it must hold one.")
    kind = given[0] if given else own_section(common)
    sections[kind] = _own_of_file(kind, sections.get(kind, {}), common)
    return Method(name, sections)


def _own_of_file(kind: str, given: Mapping[str, Any], common: Sections) -> dict[str, Any]:
    """A method's section of a file: laid over the YAML's, key by key, where that is of the same kind. Another one goes
    where the YAML's method goes, unless it says itself where."""
    own = own_section(common)
    before = common.get(own) or {}
    if "peft_type" in given:
        given = {**given, "peft_type": str(given["peft_type"]).upper()}
    if kind == own and given.get("peft_type") in (None, str(before.get("peft_type")).upper()):
        return {**before, **given}
    if kind == "full" or any(given.get(name) is not None for name in ("target_modules", "target_parameters")):
        return dict(given)
    if kind == "peft":
        from peft import PeftType

        known = given.get("peft_type") in {one.value for one in PeftType}  # else the run's config says what is wrong
        return {**(_targets_of_peft(common, _defaults(kind, given)) if known else {}), **given}
    if kind == "lora":
        return _for_lora({**_targets(common, "all-linear"), **given}, common)
    return {**_targets(common, None), **given}
