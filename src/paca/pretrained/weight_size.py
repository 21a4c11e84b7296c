"""How large a model's weights are, by a few of them: read before anything is loaded, or taken from a loaded model."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import constants
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from torch import Tensor, nn

from paca.pretrained import gguf
from paca.pretrained.hub import without_waiting
from paca.pretrained.location import Location

logger = logging.getLogger(__name__)

_BLOCKS = 4
"""Blocks of the model, spread evenly: each kind of layer counts alike."""
_ROWS = 64
"""Of each of their weights, in its middle."""
_LEAST = 32  # rows and columns of a layer's weight, at least: smaller ones are factors, gates or depthwise
_OTHERS = re.compile(r"embed|embd|wte|wpe|lm_head|^output|norm|router|position|score|classifier|vision|visual", re.I)
_BESIDE = ("bias", "scale", "scales", "scale_inv", "zeros", "absmax")  # what is in float of quantized weights
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_PICKLED_INDEX, _PICKLED = "pytorch_model.bin.index.json", "pytorch_model.bin"
_KEPT = "weight_size.json"  # beside what is kept of a GGUF file: its reader takes seconds


def weight_size(location: Location, revision: str | None = None, *, fetch: bool = False) -> float | None:
    """The root mean square of the values in a model's linear weights and 2-D convolutions.

    None where its files don't tell: quantized ones other than GGUF, other files than safetensors and
    `pytorch_model.bin`, a hub's model that is not here, weights of zeros or NaN.

    Args:
        location: Of the model.
        revision: Branch, tag or commit, for a hub id only.
        fetch: Of the hub, fetch the files that are read: loading the model would fetch them too.
    """
    try:
        if location.source == "gguf":
            return _size_of_gguf(location.name_or_path)
        return _mean(_tensors(finder(location, revision, fetch)))
    except Exception as error:  # of files of any kind, and of the hub's client: the model's loader says more
        logger.info("The size of the weights of %s can't be read: %s", location.name_or_path, error)
        return None


def size_of_loaded(model: nn.Module) -> float | None:
    """The same of a model in memory, as its weights are now, without those that an adapter adds.

    Returns:
        None where no weight is a plain one: they are quantized, sharded or on the meta device.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    weights = dict(_base_weights(model))
    try:
        return _mean(rows.detach().cpu() for name in _chosen(weights) for rows in _rows_of(weights[name]))
    except ValueError:  # of `_is_whole`
        return None


def _base_weights(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """By the names that they have without adapters."""
    if isinstance(module, BaseTunerLayer):
        yield from _base_weights(module.get_base_layer(), path)
    elif isinstance(module, AuxiliaryTrainingWrapper):
        yield from _base_weights(module.original_module, path)
    else:
        yield from ((path + name, parameter) for name, parameter in module.named_parameters(recurse=False))
        for name, child in module.named_children():
            yield from _base_weights(child, f"{path}{name}.")


def _rows_of(weight: nn.Parameter) -> Iterator[Tensor]:
    if type(weight) is not nn.Parameter or weight.is_meta:  # those of quantized layers are of classes of their own
        return
    if _is_whole(weight):
        yield from (weight[place] for place in _middles(weight.shape))


def in_cache(name: str) -> bool:
    """Whether the cache has anything of a model on the hub: its config, or a file of its weights."""
    files = ("config.json", _INDEX, _SINGLE, _PICKLED_INDEX, _PICKLED)
    return any(isinstance(huggingface_hub.try_to_load_from_cache(name, file), str) for file in files)


def _mean(weights: Iterator[Tensor]) -> float | None:
    squares = [weight.float().square().mean() for weight in weights]
    size = float(torch.stack(squares).mean().sqrt()) if squares else 0.0
    return size if 0 < size < math.inf else None


def _chosen(names: Iterable[str]) -> list[str]:
    """The weights in some blocks; of a model without blocks all."""
    blocks: dict[int, list[str]] = {}
    for name in names:
        number = re.search(r"(?:^|[._])(\d+)\.", name)
        if not _OTHERS.search(name) and not name.endswith(_BESIDE):
            blocks.setdefault(int(number[1]) if number else -1, []).append(name)
    numbers = sorted(blocks)
    if len(numbers) > _BLOCKS:
        numbers = [numbers[len(numbers) * (2 * n + 1) // (2 * _BLOCKS)] for n in range(_BLOCKS)]
    return [name for number in numbers for name in blocks[number]]


def finder(location: Location, revision: str | None = None, fetch: bool = False) -> Callable[[str], Path]:
    """What finds a model's files by their names, or raises `FileNotFoundError` (arguments as of `weight_size`)."""
    if location.source == "hub":
        return _on_the_hub(location.name_or_path, revision, fetch)
    return Path(location.name_or_path).joinpath


def places_of(find: Callable[[str], Path]) -> dict[str, str]:
    """The tensors of a model's safetensors, and the file that each is in."""
    places = _places_in(find, _INDEX)
    if not places:
        with safe_open(find(_SINGLE), framework="pt") as file:
            places = dict.fromkeys(file.keys(), _SINGLE)
    return places


def _places_in(find: Callable[[str], Path], index: str) -> dict[str, str]:
    """What an index says; empty where there is none."""
    try:
        places: dict[str, str] = json.loads(find(index).read_text(encoding="utf-8"))["weight_map"]
        return places
    except FileNotFoundError:
        return {}


def _tensors(find: Callable[[str], Path]) -> Iterator[Tensor]:
    try:
        places = places_of(find)
    except FileNotFoundError:
        yield from _pickled_tensors(find)
        return
    for name in _chosen(places):
        with safe_open(find(places[name]), framework="pt") as file:
            weight = file.get_slice(name)
            rows = (weight[place] for place in _middles(weight.get_shape()))
            yield from (some for some in rows if _is_whole(some))


def _pickled_tensors(find: Callable[[str], Path]) -> Iterator[Tensor]:
    places = _places_in(find, _PICKLED_INDEX) or dict.fromkeys(_mapped(find(_PICKLED)), _PICKLED)
    chosen = _chosen(places)
    for part in dict.fromkeys(places[name] for name in chosen):
        tensors = _mapped(find(part))
        weights = (tensors[name] for name in chosen if places[name] == part)
        yield from (weight[place] for weight in weights for place in _middles(weight.shape) if _is_whole(weight))


def _is_whole(weight: Tensor) -> bool:
    """Whether its values are the weight's; those of integers, which others are quantized to, are passed over.

    Raises:
        ValueError: They are floats of 8 bits, whose scales lie elsewhere. What is not so may be routers alone.
    """
    if weight.is_floating_point() and weight.element_size() == 1:
        raise ValueError(f"weights are {weight.dtype}")
    return weight.dtype in _FLOATS


def _mapped(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch's; their values are read where they are looked at."""
    found: dict[str, Tensor] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return found


def _middles(shape: Sequence[int]) -> Iterator[tuple[int | slice, ...]]:
    """Where the rows lie in a weight that counts: in one of experts (3 dimensions), in each of them."""
    experts = len(shape) == 3
    rows, *others = shape[experts:] or (0,)
    if len(shape) in (2, 3, 4) and min(rows, math.prod(others)) >= _LEAST:  # 4: of a convolution
        yield from ((number, _middle(rows)) for number in range(shape[0])) if experts else [(_middle(rows),)]


def _middle(rows: int) -> slice:
    first = max(0, rows - _ROWS) // 2
    return slice(first, first + _ROWS)


def _on_the_hub(name: str, revision: str | None, fetch: bool) -> Callable[[str], Path]:
    def find(file: str) -> Path:
        if not fetch or constants.HF_HUB_OFFLINE:
            found = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
            if not isinstance(found, str):
                raise FileNotFoundError(file)
            return Path(found)
        with without_waiting(name, revision):
            try:
                return Path(huggingface_hub.hf_hub_download(name, file, revision=revision))
            except huggingface_hub.errors.EntryNotFoundError as error:
                raise FileNotFoundError(file) from error

    return find


def _size_of_gguf(path: str) -> float | None:
    kept = gguf.kept_of(path) / _KEPT
    with suppress(OSError, ValueError):  # not kept, or cut short while it was written
        found: float | None = json.loads(kept.read_text(encoding="utf-8"))
        return found
    package = gguf.require_gguf()
    tensors = {tensor.name: tensor for tensor in gguf.quick_reader()(path).tensors}
    matrices = [name for name, tensor in tensors.items() if len(tensor.shape) == 2 and min(tensor.shape) >= _LEAST]
    chosen = (tensors[name] for name in _chosen(matrices))
    rows = ((tensor.data[_middle(len(tensor.data))], tensor.tensor_type) for tensor in chosen)
    size = _mean(torch.from_numpy(package.quants.dequantize(*some).copy()) for some in rows)
    with suppress(OSError):  # for one, where nothing else is kept
        kept.write_text(json.dumps(size), encoding="utf-8")
    return size
