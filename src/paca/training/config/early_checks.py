"""What can be refused before PEFT and TRL are imported, which takes seconds: keys of `paca` and `train`, and paths."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from paca.data import file_names
from paca.messages.errors import PacaError
from paca.pretrained import location
from paca.training.config.key_checks import WORDS_OF_TRAIN, Mistakes, Origins, check_section

OWN: dict[str, Any] = {
    "trainer": str,
    "autocast_adapter_dtype": bool,
    "factor_rank": int | None,
    "early_stopping_patience": int | None,
}
"""Keys of ours: which trainer, an argument of `peft.get_peft_model`, one of `paca.FactoredAdamW`, one of a callback."""

OWNED = {
    "output_dir": "the run folder is output.dir",
    "resume_from_checkpoint": "continue a run with `paca train CONFIG --resume`",
    "do_train": "this command always trains",
    "do_eval": "held-out data is given by data.eval",
    "do_predict": "this command does not predict",
    "eval_on_start": "the loss before training is eval.before",
    "disable_tqdm": "the progress line is chosen by whether the output is a terminal",
    "model_init_kwargs": "the model is described by the section model",
    "trust_remote_code": "it is model.trust_remote_code",
    "chat_template_path": "it is data.template: a name or a Jinja file",
    "dataset_text_field": "another column's name than text is data.columns: {text: NAME}",
    "dataset_kwargs": "a run prepares its data itself, and without TRL's part nothing would be cut or packed",
    "push_to_hub": "put the finished run on the hub with `paca train CONFIG --push-to-hub OWNER/NAME`",
    "hub_model_id": "it is `paca train CONFIG --push-to-hub OWNER/NAME`",
    "hub_strategy": "checkpoints are not put on the hub; the finished run is, with --push-to-hub",
    "hub_token": "a secret has no place in a config file; set the environment variable HF_TOKEN",
    "parallelism_config": "it is an object; use accelerate's own config (`accelerate launch`)",
    "local_rank": "the launcher (torchrun) sets it",
}
"""Fields of the trainers' settings that have another place, and which."""
REFUSED_EARLY = {*OWNED, *WORDS_OF_TRAIN}
"""Keys of `train`, by `check_early`."""


def check_early(method: str, sections: Mapping[str, Mapping[str, Any]], origins: Origins) -> None:
    """Refuse unknown keys of `paca`, and keys of `train` that are surely wrong.

    Args:
        method: The name of the run's method.
        sections: What was given.
        origins: Where.

    Raises:
        PacaError: There are some; a line for each.
    """
    mistakes = Mistakes()
    if method == "paca":
        with mistakes.noted():
            check_section("paca", sections["paca"], dict.fromkeys(paca_keys(), Any), origins)
    for name in sections["train"]:
        place = f"{origins.of(f'train.{name}')}:"
        with mistakes.noted():
            if name in OWNED:
                raise PacaError(f"{place} train.{name} can't be set here: {OWNED[name]}.")
            if name in WORDS_OF_TRAIN:
                raise PacaError(f"{place} there is no key train.{name}. Did you mean train.{WORDS_OF_TRAIN[name]}?")
    mistakes.tell()


def may_be_wrong(names: Iterable[str]) -> bool:
    """Whether the trainers' sources lack any of these keys of `train`: for that they are worth an import, which tells.

    Keys of ours that a trainer alone has, such as `reward_funcs`, may be right and are not found either.
    """
    known = set(OWN)
    for package, files in {"trl": "trainer/*_config.py", "transformers": "training_args.py"}.items():
        spec = find_spec(package)  # imports nothing
        for source in Path(spec.origin).parent.glob(files) if spec is not None and spec.origin is not None else ():
            known.update(re.findall(r"^    (\w+): ", source.read_text(encoding="utf-8"), re.MULTILINE))
    return not known.issuperset(names)


def missing_paths(sections: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Of the model and the data those that are paths by their form, and are not there: the key, and what to say."""
    data, images = sections["data"], sections["train"].get("trainer") == "image_classification"
    named: list[tuple[str, Any, Callable[[str], bool], Callable[[str], str]]] = [
        ("model.name", sections["model"].get("name"), location.is_path, location.not_there)
    ]
    for key in () if images else ("train", "eval"):
        names = data.get(key)
        for name in names if isinstance(names, list) else [names]:
            named.append((f"data.{key}", name, file_names.is_here_or_nowhere, file_names.not_there))
    for key, name, is_path, told in named:
        if isinstance(name, str) and is_path(name) and not _is_there(name):
            yield key, told(name)


def _is_there(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, `~` of nobody, null characters: whoever reads it tells
        return True


def paca_keys() -> list[str]:
    """The settings in `PacaConfig`, read from its source: with its class comes PEFT."""
    source = Path(__file__).parents[2] / "config.py"
    classes = [node for node in ast.parse(source.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    fields = [field.target for node in classes for field in node.body if isinstance(field, ast.AnnAssign)]
    return [name.id for name in fields if isinstance(name, ast.Name) and name.id != "base_quantization"]
