"""PacaConfig: the one dataclass users fill in."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft.config import PeftConfig

from paca.columns.selection import check_strategy
from paca.tuner.adapter_file import check_adapter_file
from paca.tuner.registration import add_peft_type

_PEFT_TYPE = add_peft_type()
ROTATIONS = ("random", "random_blocks", "weight_norm")


@dataclass
class PacaConfig(PeftConfig):
    """Settings of a PaCA adapter (arXiv 2503.01905): `r` input columns of each target weight are trained in place.

    The names are those of PEFT's own PaCA (>= 0.22), whose files load. Ours load there too, unless they use what it has
    not: the adapter's card says so, and `paca export --to peft` writes one that does.

    Raises:
        ValueError: For a setting that can't work, naming it.
    """

    r: int = field(default=16, metadata={"help": "How many input columns of each target weight are trained."})
    paca_alpha: float = field(default=16, metadata={"help": "The columns move by paca_alpha / r times their delta."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (or endings of names) of the modules to adapt, a regular expression if one string, or "
            "'all-linear'. Default: all linear layers but the output layer, as in the paper."
        },
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names (or endings of names) of stacks of experts to adapt, such as ['experts.gate_up_proj', "
            "'experts.down_proj']. Without target_modules, nothing else is adapted then."
        },
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules left out of target_modules; same forms."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Adapt only the blocks with these numbers."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks that layers_to_transform counts, such as 'layers'."}
    )
    random_seed: int | None = field(
        default=0,
        metadata={
            "help": "Seed of the random selection of columns. With null, as PEFT's own PaCA has it by default, a new "
            "adapter draws a seed from torch's random state and keeps it here."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "Start the deltas at zero, so that the model starts unchanged. False is for tests."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained whole and saved with the adapter, such as a new head."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "r for particular modules: name or regular expression to number."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "paca_alpha for particular modules, as rank_pattern."}
    )
    selection: Literal[
        "random", "random_blocks", "weight_norm", "activation_norm", "activation_variance", "gradient_norm"
    ] = field(
        default="random_blocks",
        metadata={
            "help": "How columns are chosen, or were: for the last three, paca.select finds the indices from batches."
        },
    )
    indices: dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Columns chosen by hand or by paca.select: module name or regular expression to column numbers. "
            "Other modules follow selection; the number of columns given is that module's r."
        },
    )

    rotate_every: int | None = field(
        default=None,
        metadata={
            "help": "Every so many optimizer steps, fold the trained columns into the weight and train others "
            "(paca.RotateColumns, paca.rotate). The saved adapter is the union of all of them, and says null here."
        },
    )
    rotate_by: Literal["random", "random_blocks", "weight_norm"] = field(
        default="random_blocks", metadata={"help": f"How a rotation picks columns: {', '.join(ROTATIONS)}."}
    )
    original_weights: str | None = field(
        default=None,
        metadata={
            "help": "For quantized models: a folder or hub id of the original 16-bit weights. The trained columns "
            "start from their values there instead of the dequantized ones. Only used when the adapter is made: the "
            "saved adapter holds the difference, and null here."
        },
    )
    base_quantization: str | None = field(
        default=None,
        metadata={"help": "How the weights are quantized that the adapter was made for, or none; filled in."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # Not settings, so neither fields nor saved: what the tuner needs to take back an adapter that fails to load.
        self.loading = False
        self.folder: Path | None = None
        self.shapes: dict[str, Any] | None = None  # of the tensors in its file
        self.trainable_before: dict[str, bool] = {}
        self.union: dict[str, Any] | None = None  # a rotated adapter's fields, as its file has them
        self.peft_type = _PEFT_TYPE
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        self._check()

    def _check(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            if not isinstance(pattern, dict):
                raise ValueError(
                    f"{name} must map names of modules to numbers, such as {{'q_proj': 8}}; got {pattern!r}."
                )
            _check_expressions(name, pattern)
        for name, value in [("r", self.r), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())]:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of columns, 1 or more; got {value!r}.")
        alphas: list[tuple[str, Any]] = [
            ("paca_alpha", self.paca_alpha),
            *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items()),
        ]
        for name, value in alphas:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a positive number; got {value!r}.")
        check_strategy(self.selection)
        if isinstance(self.random_seed, bool) or not isinstance(self.random_seed, (int, type(None))):
            raise ValueError(
                f"random_seed must be a whole number, or null for one that is drawn; got {self.random_seed!r}."
            )
        every = self.rotate_every
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"rotate_every must be a whole number of steps, 1 or more, or null; got {every!r}.")
        if self.rotate_by not in ROTATIONS:
            raise ValueError(f"rotate_by={self.rotate_by!r} is unknown; choose one of {', '.join(ROTATIONS)}.")
        self._check_names()
        one_string = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if one_string and self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform can't go with target_modules given as one string: say in the expression which "
                "blocks are meant, or give target_modules as a list of names."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "layers_pattern says where layers_to_transform counts, but layers_to_transform is not set."
            )
        if self.indices is not None and (not isinstance(self.indices, dict) or not self.indices):
            raise ValueError("indices must map module names to lists of column numbers, such as {'q_proj': [0, 5]}.")
        for key, columns in (self.indices or {}).items():
            if columns is None or isinstance(columns, (str, int)):
                raise ValueError(f"indices[{key!r}] must be a list of column numbers, such as [0, 5]; got {columns!r}.")
        _check_expressions("indices", self.indices or {})

    def _check_names(self) -> None:
        stacks = "['experts.gate_up_proj', 'experts.down_proj']"
        for name, one, example in [
            ("target_modules", True, "['q_proj', 'down_proj']"),
            ("exclude_modules", True, "['lm_head']"),
            ("target_parameters", False, stacks),
            ("modules_to_save", False, "['classifier']"),
            ("layers_pattern", True, "['layers']"),
        ]:
            value = getattr(self, name)
            if one and isinstance(value, str):
                if value != "all-linear":
                    _check_expressions(name, [value])
            elif value is not None and not _all_are(str, value):
                text = " (or one text)" if one else ""
                raise ValueError(f"{name} must be a list of names{text}, such as {example}; got {value!r}.")
        blocks = self.layers_to_transform
        if blocks is not None and not _all_are(int, [blocks] if isinstance(blocks, int) else blocks):
            raise ValueError(
                f"layers_to_transform must be a list of numbers of blocks, such as [0, 1]; got {blocks!r}."
            )
        kinds: list[tuple[str, Any, str]] = [
            ("init_weights", bool, "true or false"),
            ("inference_mode", bool, "true or false"),
            ("original_weights", (str, type(None)), "a folder or hub id, or null"),
            ("base_quantization", (str, type(None)), "a text, or null"),
        ]
        for name, kind, words in kinds:
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise ValueError(f"{name} must be {words}; got {value!r}.")

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().to_dict()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(values[name], set):
                values[name] = sorted(values[name])  # a set's order differs from process to process
        values["original_weights"] = values["rotate_every"] = None  # about how it was trained, which is over
        return values | (self.union or {})

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> PacaConfig:
        config: PacaConfig = super().from_pretrained(*args, **kwargs)
        config.loading = True
        config.folder = folder = Path(str(args[0] if args else kwargs["pretrained_model_name_or_path"])) / (
            kwargs.get("subfolder") or ""
        )
        config.shapes = check_adapter_file(folder, config.modules_to_save, config.task_type)
        return config

    @classmethod
    def from_peft(cls, config: PeftConfig) -> PacaConfig:
        """Read another class's PaCA config (PEFT's own, >= 0.22); fields of the same name mean the same."""
        known = {f.name for f in dataclasses.fields(cls) if f.init} - {"peft_type"}
        return cls(**{k: v for k, v in dataclasses.asdict(config).items() if k in known})


def _all_are(kind: type, values: Any) -> bool:
    is_list = isinstance(values, (list, tuple, set, frozenset))
    return is_list and all(isinstance(value, kind) and not isinstance(value, bool) for value in values)


def _check_expressions(name: str, pattern: Iterable[str]) -> None:
    for key in pattern:
        try:
            re.compile(key)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"{name} has the key {key!r}, which is neither the name of a module nor a regular expression: {error}."
            ) from error
