"""PacaConfig: the one dataclass users fill in."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME

from paca.columns.selection import STRATEGIES, check_strategy
from paca.messages.adapter_notes import HOW_TO_LOAD
from paca.messages.shown import printable, shown
from paca.tuner.registration import add_peft_type
from paca.tuner.strange_expressions import MOST_NAMES, NAMED, check_blocks, check_unusual

_PEFT_TYPE = add_peft_type()
_UNUSUAL = re.compile(r"[^\w.\- ]")  # one of these is in all that are more than names
ROTATIONS = ("random", "random_blocks", "weight_norm")
LARGEST = 1e30  # of a scale: float32 ends at 3e38


@dataclass
class PacaConfig(PeftConfig):
    """Settings of a PaCA adapter (arXiv 2503.01905): `r` input columns of each target weight are trained in place.
    The names are those of PEFT's own PaCA (>= 0.22), whose files load. Ours load there too, unless they use what it has
    not: the card of a trained adapter says which, and `paca export --to peft` writes one that does.

    Raises:
        ValueError: For a setting that can't work, naming it.
    """

    r: int = 64
    """How many input columns of each target weight are trained."""
    paca_alpha: float = 16
    """The columns move by `paca_alpha / r` times their delta."""
    target_modules: list[str] | set[str] | str | None = None
    """Names (or endings of names) of the modules to adapt, a regular expression if one string, or "all-linear".
    Default: all linear layers but the output layer, as in the paper."""
    target_parameters: list[str] | None = None
    """Names (or endings of names) of stacks of experts to adapt, such as `["experts.gate_up_proj",
    "experts.down_proj"]`. Without `target_modules`, nothing else is adapted then."""
    exclude_modules: list[str] | set[str] | str | None = None
    """Modules left out of `target_modules`; same forms."""
    layers_to_transform: list[int] | int | None = None
    """Adapt only the blocks with these numbers."""
    layers_pattern: list[str] | str | None = None
    """Name of the list of blocks that `layers_to_transform` counts, such as "layers"."""
    random_seed: int | None = 0
    """Seed of the random selection of columns. With null, as PEFT's own PaCA has it by default, a new adapter draws a
    seed from torch's random state and keeps it here."""
    init_weights: bool = True
    """Start the deltas at zero, so that the model starts unchanged. False is for tests."""
    modules_to_save: list[str] | None = None
    """Modules trained whole and saved with the adapter, such as a new head."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """`r` for particular modules: name or regular expression to number."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """`paca_alpha` for particular modules, as `rank_pattern`."""
    selection: Literal[
        "random", "random_blocks", "weight_norm", "activation_norm", "activation_variance", "gradient_norm"
    ] = "random_blocks"
    """How columns are chosen, or were: for the last three, `paca.select` finds the indices from batches."""
    indices: dict[str, list[int]] | None = None
    """Columns chosen by hand or by `paca.select`: module name or regular expression to column numbers. Other modules
    follow `selection`; the number of columns given is that module's r."""
    rotate_every: int | None = None
    """Every so many optimizer steps, fold the trained columns into the weight and train others (`paca.RotateColumns`,
    `paca.rotate`). The saved adapter is the union of all of them, and says null here."""
    rotate_by: Literal["random", "random_blocks", "weight_norm"] = "random_blocks"
    """How a rotation picks columns."""
    original_weights: str | None = None
    """For quantized models: a folder or hub id of the original 16-bit weights. The trained columns start from their
    values there instead of the dequantized ones. Only used when the adapter is made: the saved one says null here."""
    base_quantization: str | None = None
    """How the weights are quantized that the adapter was made for, or none; filled in."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Tokens whose rows of the input embedding are trained as well, or of other layers: their names to tokens."""

    def __new__(cls, *values: Any, **settings: Any) -> PacaConfig:
        if not settings.keys() <= cls.__dataclass_fields__.keys():
            from paca.tuner.keywords_of_lora import told_of_unknown  # for this error alone

            raise TypeError(told_of_unknown(settings, cls.__dataclass_fields__))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        # Not settings, so neither fields nor saved: what the tuner needs to take back an adapter that fails to load.
        self.loading = False
        self.folder: Path | None = None
        self.reading: Path | None = None  # while the adapter there is put in
        self.shapes: dict[str, Any] | None = None  # of the tensors in its file
        self.trainable_before: dict[str, bool] = {}
        self.unusual = False  # names that are many, long, or expressions
        self.union: dict[str, Any] | None = None  # a rotated adapter's fields, as its file has them
        self.peft_type = _PEFT_TYPE
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), (list, tuple)) and _is_list_of(str, value):
                setattr(self, name, set(value))
        for name, right, words in _FORMS:
            value = getattr(self, name)
            if not right(value):
                raise ValueError(f"{name} must {words}; got {shown(value)}.")
            if value and name in _ENTRIES:
                of_one, words_of_one = _ENTRIES[name]
                for key, one in value.items():
                    if not of_one(one):
                        raise ValueError(f"{name}[{shown(key)}] must {words_of_one}; got {shown(one)}.")
        values = [[value] if isinstance(value := getattr(self, name), str) else value or () for name in NAMED]
        if len(named := " ".join(str(one) for value in values for one in value)) > 2_000 or _UNUSUAL.search(named):
            check_unusual(self)
        check_strategy(self.selection)
        if self.layers_to_transform is not None or self.layers_pattern:
            check_blocks(self)

    def to_dict(self) -> dict[str, Any]:
        # Sets are sorted: their order differs from process to process.
        values = {name: sorted(v) if isinstance(v, set) else v for name, v in super().to_dict().items()}
        values["original_weights"] = values["rotate_every"] = None  # about how it was trained, which is over
        return values | (self.union or {})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory, "README.md")
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        if "library_name: peft" in text and "import paca" not in text:  # PEFT wrote it a moment ago
            card.write_text(f"{text.rstrip()}\n\n{HOW_TO_LOAD}", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> PacaConfig:
        folder = Path(args[0] if args else kwargs["pretrained_model_name_or_path"], kwargs.get("subfolder") or "")
        try:
            config: PacaConfig = super().from_pretrained(*args, **kwargs)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(printable(f"{folder / CONFIG_NAME}: {error}")) from error
        config.loading, config.folder = True, folder
        return config


def _is(value: Any, *kinds: type) -> bool:
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)


def _is_list_of(kind: type, value: Any, most: float = 1e9) -> bool:
    listed = isinstance(value, (list, tuple, set, frozenset)) and len(value) <= most
    return value is None or (listed and all(_is(v, kind) for v in value))


_NAMES, _NUMBERS = "be a list of names, such as ", "map names of modules to numbers, such as {'q_proj': 8}"
_BLOCKS = f"be a list of block numbers, {MOST_NAMES:,} at most"
_TEXT_OR_NAMES = "be a list of names (or one text), such as "
_TOKENS = "be a list of tokens, such as [5], or map names of layers to such lists"
_are_tokens = partial(_is_list_of, int)
_TEXTS = ("base_model_name_or_path", "revision", "peft_version", "original_weights", "base_quantization")
_FORMS: tuple[tuple[str, Any, str], ...] = (
    *((f"{name}_pattern", lambda v: isinstance(v, dict), _NUMBERS) for name in ("rank", "alpha")),
    ("r", lambda v: _is(v, int) and v > 0, "be a whole number of columns, 1 or more"),
    ("paca_alpha", lambda v: _is(v, int, float) and 0 < v < LARGEST, "be a positive number, below 1e30"),
    ("random_seed", lambda v: v is None or _is(v, int), "be a whole number, or null for one that is drawn"),
    ("rotate_every", lambda v: v is None or (_is(v, int) and v > 0), "be a whole number of steps, 1 or more, or null"),
    ("target_modules", lambda v: _is(v, str) or _is_list_of(str, v), _TEXT_OR_NAMES + "['q_proj', 'down_proj']"),
    ("exclude_modules", lambda v: _is(v, str) or _is_list_of(str, v), _TEXT_OR_NAMES + "['lm_head']"),
    ("layers_pattern", lambda v: _is(v, str) or _is_list_of(str, v), _TEXT_OR_NAMES + "['layers']"),
    ("target_parameters", lambda v: _is_list_of(str, v), _NAMES + "['experts.gate_up_proj', 'experts.down_proj']"),
    ("modules_to_save", lambda v: _is_list_of(str, v), _NAMES + "['classifier']"),
    ("trainable_token_indices", lambda v: all(map(_are_tokens, getattr(v, "values", lambda: [v])())), _TOKENS),
    ("layers_to_transform", lambda v: _is(v, int) or _is_list_of(int, v, MOST_NAMES), _BLOCKS),
    ("indices", lambda v: v is None or (v and isinstance(v, dict)), "map modules to lists, such as {'q_proj': [5]}"),
    ("rotate_by", lambda v: v in ROTATIONS, f"be one of {', '.join(ROTATIONS)}"),
    *((name, lambda v: isinstance(v, bool), "be true or false") for name in ("init_weights", "inference_mode")),
    ("auto_mapping", lambda v: v is None or (_is(v, dict) and sum(map(str(v).count, "[{")) == 1), "be a flat mapping"),
    *((name, lambda v: _is(v, str, type(None)) and str(v).isprintable(), "be a text, or null") for name in _TEXTS),
    ("selection", lambda v: isinstance(v, str) and len(v) < 99, f"be one of {', '.join(STRATEGIES)}"),
)
"""What form each setting must have: its name, a test, and the words for a message."""

_ENTRIES: dict[str, tuple[Any, str]] = {
    "rank_pattern": (lambda v: _is(v, int) and v > 0, "be a whole number of columns, 1 or more"),
    "alpha_pattern": (lambda v: _is(v, int, float) and 0 < v < LARGEST, "be a positive number, below 1e30"),
    "indices": (lambda v: not isinstance(v, (str, int, type(None))), "be a list of column numbers, such as [0, 5]"),
}
