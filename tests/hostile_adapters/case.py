"""One case: an adapter that was damaged, one of the ways to take it, and whether what came of it is right."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import paca
from hostile_adapters import damage
from hostile_adapters.watch import watching
from paca.convert.exported import export_adapter
from paca.convert.imported import import_adapter
from paca.convert.merged import merge_to_folder
from paca.layers import paca_layers
from paca.pretrained.generation import load_for_generation, stream_reply
from tiny_checkpoint import byte_tokenizer, save_adapter, save_base

WAYS = ("load", "load", "load", "chat", "merge", "lora", "peft", "gguf", "import")
SOURCE = str(Path(paca.__file__).parent)


class Result(NamedTuple):
    """What came of a case."""

    way: str
    outcome: str
    """`"loaded"`, `"refused"`, `"peft"` (an error of PEFT's, before paca was asked), or what is wrong."""
    right: bool
    seconds: float
    """Of processor time."""
    told: str


class World:
    """The base model and the whole adapters, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = save_base(folder / "base")
        self.secret = folder / "secret"
        self.secret.write_text("a key")
        ours = save_adapter(folder / "ours", self.base)
        byte_tokenizer().save_pretrained(ours)
        export_adapter(ours, folder / "lora", "lora")
        _save_authors(folder / "authors", ours)
        self.model = LlamaForCausalLM.from_pretrained(self.base)
        self.before = look_of(self.model)
        self.whole = {
            name: {file.name: file.read_bytes() for file in (folder / name).iterdir() if file.suffix != ".md"}
            for name in ("ours", "lora", "authors")
        }
        self.listed = self.listing()

    def listing(self) -> list[tuple[str, int, int]]:
        """All files outside of the cases' folder."""
        places = (place for place in self.folder.rglob("*") if "case" not in place.relative_to(self.folder).parts)
        return sorted((str(place), place.stat().st_size, place.stat().st_mtime_ns) for place in places)

    def run(self, seed: int, number: int) -> Result:
        """Make the case `number` of a `seed`, take the adapter in one way, and judge."""
        random = Random(f"{seed}:{number}")
        way = random.choice(WAYS)
        kind = (
            random.choice(["lora", "authors"]) if way == "import" else random.choice(["ours", "ours", "ours", "lora"])
        )
        files = dict(self.whole[kind])
        if random.random() < 0.98:  # else whole, which must load
            damage.damage(random, files)
        case = self.folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        adapter = case / "adapter"
        adapter.mkdir(parents=True)
        for name, content in files.items():
            (adapter / name).write_bytes(content)
        if random.random() < 0.06:
            damage.change_entries(random, adapter, self.secret)
        base_model = None if random.random() < 0.2 else str(self.base)
        started = time.process_time()
        with watching(case, Path("/tmp/torchinductor")) as watch, _quietly():
            outcome, told = self._take(way, adapter, base_model)
        seconds = time.process_time() - started
        problems = [*watch.seen, *(["unlisted"] if self.listing() != self.listed else [])]
        problems += [f"asked {host}" for host in watch.asked if not _names_hub(files)]
        if look_of(self.model) != self.before:
            problems.append("the base model changed")
            self.model = LlamaForCausalLM.from_pretrained(self.base)
        if problems:
            outcome, told = "; ".join(problems[:3]), f"{outcome}: {told}"
        return Result(way, outcome, outcome in ("loaded", "refused", "peft"), seconds, told)

    def _take(self, way: str, adapter: Path, base_model: str | None) -> tuple[str, str]:
        output = adapter.parent / "output"
        ways: dict[str, Callable[[], Any]] = {
            "load": lambda: self._load(adapter),
            "chat": lambda: _answer(adapter, base_model),
            "merge": lambda: merge_to_folder(adapter, output, base_model=base_model, verify=False),
            "lora": lambda: export_adapter(adapter, output, "lora", base_model=base_model),
            "peft": lambda: export_adapter(adapter, output, "peft", base_model=base_model),
            "gguf": lambda: export_adapter(adapter, output / "a.gguf", "gguf", base_model=base_model),
            "import": lambda: import_adapter(adapter, output, base_model=base_model),
        }
        try:
            ways[way]()
        except paca.PacaError as error:
            return "refused", str(error)
        except ValueError as error:
            return ("refused" if way == "load" else f"{type(error).__name__} without advice"), str(error)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            frames = traceback.extract_tb(error.__traceback__)
            told = f"{type(error).__name__}: {error} at {frames[-1].filename}:{frames[-1].lineno}"
            ours = way != "load" or any(frame.filename.startswith(SOURCE) for frame in frames)
            return (f"{type(error).__name__} that says nothing" if ours else "peft"), told
        return "loaded", ""

    def _load(self, adapter: Path) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
            file = adapter / damage.CONFIG
            if file.is_file() and json.loads(file.read_text()).get("peft_type") != "PACA":
                return  # paca is not asked
        model = PeftModel.from_pretrained(self.model, adapter)
        try:
            _check_columns(model, self.before)
        finally:
            self.model = model.unload()
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)


def look_of(model: Any) -> dict[str, Any]:
    """Classes and bits."""
    look: dict[str, Any] = {name: type(module) for name, module in model.named_modules()}
    return look | {f"{name}.": parameter.detach().numpy().tobytes() for name, parameter in model.named_parameters()}


def _check_columns(model: Any, before: dict[str, Any]) -> None:
    """A loaded adapter's weights are the base's, with its columns added."""
    for name, layer in model.get_base_model().named_modules():
        if layer in paca_layers(model):
            weight = layer.base_layer.weight.detach()
            stored = torch.frombuffer(bytearray(before[f"{name}.weight."]), dtype=weight.dtype).view_as(weight)
            expected = stored.double()
            delta = layer.paca_delta["default"].detach().double() * layer.scaling["default"]
            expected[:, layer.paca_indices["default"]] += delta
            assert torch.equal(weight, expected.to(weight.dtype)) or torch.allclose(
                weight.double(), expected, rtol=1e-6, equal_nan=True
            ), f"the columns of {name} are others"


def _answer(adapter: Path, base_model: str | None) -> str:
    loaded = load_for_generation(adapter, base_model=base_model)
    return "".join(stream_reply(loaded, [{"role": "user", "content": "Hello there"}], max_new_tokens=2))


def _names_hub(files: dict[str, bytes]) -> bool:
    """Whether the config names a base model that could be the hub's."""
    try:
        base = json.loads(files[damage.CONFIG])["base_model_name_or_path"]
        validate_repo_id(base)
    except (HFValidationError, KeyError, ValueError, TypeError, RecursionError):
        return False
    return not os.path.isdir(base)


@contextlib.contextmanager
def _quietly() -> Any:
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _save_authors(folder: Path, ours: Path) -> None:
    """A checkpoint as the original authors' code writes it: the columns themselves, over the scale."""
    folder.mkdir()
    tensors = load_file(ours / damage.WEIGHTS)
    named = {name.replace("paca_delta", "paca_w"): value for name, value in tensors.items()}
    save_file(named, folder / damage.WEIGHTS)
    config = json.loads((ours / damage.CONFIG).read_text())
    kept = ("base_model_name_or_path", "r", "paca_alpha", "target_modules", "task_type", "peft_type")
    (folder / damage.CONFIG).write_text(json.dumps({name: config[name] for name in kept}))
