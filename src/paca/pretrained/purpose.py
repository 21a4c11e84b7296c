"""What a saved model or adapter is for, by the class that the config beside it names, before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from paca.messages.errors import PacaError
from paca.pretrained.adapter_folder import json_object

_CLASSIFIERS = {"ForSequenceClassification": "texts", "ForImageClassification": "images"}
CLASSIFIERS = tuple(_CLASSIFIERS)
"""How the names of their classes end."""
_MOST_LABELS = 100_000


class Classifier(NamedTuple):
    """A model whose outputs are labels."""

    of: str
    """`"texts"` or `"images"`."""
    auto_class: str
    """The class of transformers that loads it."""
    labels: list[str]
    """In the order of its outputs."""

    @property
    def pipeline_tag(self) -> str:
        """What it does, by the hub's names."""
        return "text-classification" if self.of == "texts" else "image-classification"


def classifier_in(folder: str | Path) -> Classifier | None:
    """What a folder holds, if that is a classifier: a run, a model, or an adapter with its model's config beside it.

    Raises:
        PacaError: The config is broken.
    """
    places = (Path(folder).expanduser() / part / "config.json" for part in ("adapter", "model", ""))
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        return None
    config = json_object(file)
    architectures, names = config.get("architectures"), config.get("label_names")
    names = names if isinstance(names, list) and names else ["LABEL_0", "LABEL_1"]  # timm's form, and what is default
    labels = config.get("id2label") or {str(number): name for number, name in enumerate(names)}
    name = architectures[0] if isinstance(architectures, list) and architectures else ""
    if not isinstance(name, str) or not isinstance(labels, dict) or not all(map(_is_number, labels)):
        raise PacaError(f"{file} is broken: architectures or id2label are no names. Copy or save it again.")
    if len(labels) > _MOST_LABELS:
        raise PacaError(f"{file} names {len(labels):,} labels; {_MOST_LABELS:,} are the most.")
    for ending, of in _CLASSIFIERS.items():
        if name.endswith(ending):
            return Classifier(of, f"AutoModel{ending}", [str(labels[number]) for number in sorted(labels, key=int)])
    return None


def listed(labels: list[str]) -> str:
    """The first of them, for people."""
    return ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 10


def save_classifier_config(folder: Path, model: Any) -> None:
    """Write what `classifier_in` reads.

    Args:
        folder: Of an adapter.
        model: The classifier, with or without its adapter.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    plain.config.architectures = [type(plain).__name__]
    plain.config.save_pretrained(folder)


def loading_code(classifier: Classifier, folder: str, base: str, revision: str | None = None) -> str:
    """Python that puts a classifier's adapter on its base model. PEFT runs it once it knows the adapter's method.

    Args:
        classifier: What `classifier_in` found.
        folder: Of the adapter, with the config beside it.
        base: Name or path of the base model, whose own head may have other outputs.
        revision: Branch, tag or commit of the base model, for a hub id only.
    """
    here, of_base = quoted(folder), quoted(base) + ("" if revision is None else f", revision={quoted(revision)}")
    return f"""from peft import PeftModel
from transformers import AutoConfig, {classifier.auto_class}

config = AutoConfig.from_pretrained({here})  # with the labels
model = {classifier.auto_class}.from_pretrained({of_base}, config=config, ignore_mismatched_sizes=True)
model = PeftModel.from_pretrained(model, {here})"""


def quoted(text: str) -> str:
    """A text for Python code that people run, where somebody else chose it."""
    return json.dumps(text, ensure_ascii=False)


def check_answers(path: str | Path) -> None:
    """Refuse a classifier where a language model is needed.

    Raises:
        PacaError: Says what it is, and how it is used.
    """
    found = classifier_in(path)
    if found is None:
        return
    what, loaded = f"a classifier of {found.of}", f'pipeline("{found.pipeline_tag}", FOLDER), to label new {found.of}'
    if found.labels == ["reward"]:
        what, loaded = "a reward model", f"{found.auto_class}.from_pretrained"
    raise PacaError(
        f"{path} is {what} (labels: {listed(found.labels)}), which writes no text. `paca merge` makes it a plain "
        f"checkpoint, which transformers loads by {loaded}."
    )
