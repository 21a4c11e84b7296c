"""What `paca bench` measures: the model, the methods, the sizes and the measurements."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from paca.messages.errors import PacaError
from paca.messages.nearest import did_you_mean
from paca.pretrained.published_shapes import SHAPES, Shape, check_not_a_mistyped_shape

if TYPE_CHECKING:
    import torch

_CHOICES = {
    "dtype": ("bfloat16", "float16", "float32"),
    "scope": ("model", "blocks"),
    "loss": ("logits", "fused"),
    "measure": ("time", "memory", "saved", "switch", "launches", "max-seq", "max-batch"),
}
DEFAULT_METHODS = ("frozen", "paca", "paca+lean", "paca+lean+recompute", "lora", "lora-tuned")

_RESIZED = ("layers", "hidden", "intermediate", "vocab", "image_size")


class Point(NamedTuple):
    """The size of one batch."""

    batch: int
    """Sequences, or images."""
    seq: int
    """Tokens per sequence; 0 for images."""


@dataclass(frozen=True)
class BenchSettings:
    """One benchmark; PacaError for a value that can't work."""

    model: str = "llama3-8b"
    """A preset (random weights, no hub), a folder, a GGUF file or a hub id."""
    layers: int | None = None
    """Shrink a preset to so many blocks."""
    hidden: int | None = None
    """Shrink a preset's width; heads and MLP shrink along, the size of a head stays."""
    intermediate: int | None = None
    """Width of the MLP, instead of the one that goes with `hidden`."""
    vocab: int | None = None
    """Shrink a preset's vocabulary."""
    image_size: int | None = None
    """Height and width of the images of a vision preset, in pixels."""
    scope: str = "model"
    """`model`: the whole model with its loss. `blocks`: the transformer blocks and the final norm alone, fed with
    hidden states that require grad, backward from a fixed gradient; so all methods do what a block in the middle of a
    deep model does, whatever the depth measured here."""
    loss: str = "logits"
    """Loss of a language model. `logits`: the model's own. `fused`: the one of TRL's SFTTrainer, which never holds the
    logits of the whole batch."""
    dtype: str = "bfloat16"
    """Dtype of the weights, and of the computation."""
    device: str = "auto"
    """`auto`: cuda if there is one, else cpu."""
    methods: tuple[str, ...] = DEFAULT_METHODS
    """Names from the table, see `paca bench methods`, each with settings of its own after colons, if need be."""
    baseline: str | None = None
    """The method that ratios are taken against; by default `frozen`, or without it the first."""
    seq: tuple[int, ...] = (512,)
    """Sequence lengths, in tokens."""
    batch: tuple[int, ...] = (1,)
    """Batch sizes."""
    rank: int = 16
    """r of PaCA and of the LoRA family (`vera` keeps PEFT's default: its r means something else)."""
    measure: tuple[str, ...] = ("time", "saved", "memory")
    """Which of the measurements to take."""
    rounds: int = 10
    """Every round times every method once, in an order that rotates."""
    warmup: int = 2
    """Steps per method before the first round."""
    memory: int | None = None
    """The budget of `max-seq` and `max-batch` in bytes: weights, gradients, optimizer, activations; without what the
    interpreter and its libraries take before the model is made."""
    compile: bool = False
    """Also measure every method with the inner model compiled."""
    cuda_graphs: bool = False
    """Also measure it compiled into CUDA graphs (`mode="reduce-overhead"`)."""
    profile: bool = False
    """Also split the step into its phases and its kinds of operators."""
    seed: int = 0

    def __post_init__(self) -> None:
        for field, valid in _CHOICES.items():
            given = getattr(self, field)
            for value in [given] if isinstance(given, str) else given:
                if value not in valid:
                    close = did_you_mean(value, valid)
                    raise PacaError(f"{field} is {value!r}; it can be {', '.join(valid)}.{close}")
        for field in ("methods", "measure", "seq", "batch"):
            if not getattr(self, field):
                raise PacaError(f"{field} is empty; give at least one.")
        for field, least in (*((name, 1) for name in (*_RESIZED, "rank", "rounds", "memory")), ("warmup", 0)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise PacaError(f"{field} is {value}; it must be {least} or more.")
        if self.memory is not None and self.memory < 2**20:
            raise PacaError(f"memory is {self.memory} bytes, where nothing fits; give a unit, such as 24GiB or 320MiB.")
        for field in ("seq", "batch"):
            if min(getattr(self, field)) < 1:
                raise PacaError(f"{field} is {getattr(self, field)}; every size must be 1 or more.")
        if self.scope == "model" and self.loss == "logits" and min(self.seq) < 2:
            raise PacaError("seq must be 2 or more: one token has no next token to predict.")
        if self.variants[1:] and self.scope == "model" and self.loss == "fused":
            raise PacaError("The fused loss can't be compiled along. Measure compiled models with --loss logits.")
        searched = {"max-seq", "max-batch"} & {*self.measure}
        if self.memory is None and searched:
            raise PacaError("max-seq and max-batch need a budget: give --memory, such as --memory 2GiB.")
        if self.memory is not None and not searched:
            raise PacaError(
                "--memory is the budget of max-seq and max-batch, and would change nothing for "
                f"{', '.join(self.measure)}. Leave it out, or add one of them to --measure."
            )

    def shape(self) -> Shape | None:
        """The published shape that `model` names, in the sizes asked for; None for a checkpoint.

        Raises:
            PacaError: A mistyped name, a size that does not go with the model, or a scope that it does not have.
        """
        sizes = {name: getattr(self, name) for name in _RESIZED}
        shape = SHAPES.get(self.model)
        if shape is None:
            check_not_a_mistyped_shape(self.model)
            if changed := [name for name, size in sizes.items() if size]:
                raise PacaError(
                    f"{changed[0]} resizes presets only ({', '.join(SHAPES)}), and {self.model!r} is none of them."
                )
            return None
        if self.scope == "blocks" and shape.vision:
            raise PacaError(f"scope 'blocks' is for language models; {self.model} is a vision preset. Use 'model'.")
        return shape.resized(**sizes)

    @property
    def variants(self) -> list[str]:
        """How the models run: `eager`, and what was asked for besides."""
        return ["eager", *(["compiled"] if self.compile else []), *(["cuda-graphs"] if self.cuda_graphs else [])]

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch  # not above: wrong settings are refused without it

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def torch_device(self) -> torch.device:
        """The device to run on; PacaError if there is none such here."""
        import torch

        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise PacaError(f"device is {name!r}; it can be auto, cpu, cuda, cuda:1 and the like.") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise PacaError("device is 'cuda', but torch sees no CUDA device here. Use --device cpu.")
        return device

    def points(self, vision: bool) -> list[Point]:
        """Every batch size with every sequence length; images have no length."""
        return [Point(b, s) for b, s in itertools.product(self.batch, (0,) if vision else self.seq)]
