"""Draw what PaCA trains and what a step keeps, for `docs/method.md`, by running both.

Run it as `python tools/draw_method.py` when columns are drawn otherwise or a layer keeps something else;
`tests/test_method_picture.py` says so. Nothing in the picture is typed in: a layer is trained for some steps and its
weight is compared with the pretrained one, and the blocks of a Llama are run and asked what they keep.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import paca
from paca.bench.saved_activations import measure_saved_activations

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "pictures" / "method.png"
IN, OUT, COLUMNS = 48, 24, 6
HIDDEN, TOKENS = 128, 64
GREEN, GREY = "#12908a", "#b5bac2"


class Facts(NamedTuple):
    """What is drawn."""

    moved: Tensor
    """`|W - W₀|` of a trained layer, `(OUT, IN)`."""
    columns: list[int]
    """Which columns the adapter has."""
    kept: dict[str, float]
    """By method, what a block keeps for the backward pass, in units of a hidden state."""

    def as_text(self) -> str:
        """What the picture says of itself in its file."""
        kept = ", ".join(f"{name} {size:.1f}" for name, size in self.kept.items())
        return f"columns {' '.join(map(str, self.columns))}; kept {kept}"


def facts() -> Facts:
    """Run a layer and the blocks.

    Raises:
        AssertionError: A column moved that the adapter does not have.
    """
    moved, columns = _trained_layer()
    assert sorted(moved.any(0).nonzero().flatten().tolist()) == columns
    return Facts(moved, columns, {name: _kept(name) for name in ("LoRA", "LoRA, tuned", "PaCA", "frozen")})


def _trained_layer() -> tuple[Tensor, list[int]]:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(IN, OUT))
    before = model[0].weight.detach().clone()
    config = paca.PacaConfig(r=COLUMNS, paca_alpha=COLUMNS, target_modules=["0"], selection="random", random_seed=2)
    model = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    teacher = torch.randn(IN, OUT) / IN**0.5
    for _ in range(20):
        x = torch.randn(64, IN)
        (model(x) - x @ teacher).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    layer = model.base_model.model[0]
    return (layer.base_layer.weight.detach() - before).abs(), layer.paca_indices["default"].tolist()


def _kept(method: str) -> float:
    """Two blocks less one, in units of a hidden state in bfloat16: one `(TOKENS, HIDDEN)`."""
    two, one = (_saved(method, blocks) for blocks in (2, 1))
    return (two - one) / (TOKENS * HIDDEN * 2)


def _saved(method: str, blocks: int) -> int:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN * 7 // 2,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=32,
    )
    model: Any = LlamaModel(config).bfloat16()
    model.requires_grad_(False)
    lora = peft.LoraConfig(r=8, target_modules="all-linear")
    if method == "PaCA":
        model = peft.get_peft_model(model, paca.PacaConfig(r=16))
    elif method != "frozen":
        model = peft.get_peft_model(model, lora, autocast_adapter_dtype=method == "LoRA")
    hidden = torch.randn(1, TOKENS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    return measure_saved_activations(lambda: model(inputs_embeds=hidden).last_hidden_state, model).bytes


def draw(found: Facts, path: Path) -> None:
    """Draw both panels.

    Args:
        found: From `facts`.
        path: Of the PNG file. Its `Description` is `found.as_text()`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.4), width_ratios=(1.5, 1))
    left.imshow(found.moved, cmap="BuGn", aspect="auto")
    left.set_title(f"How far each number of a weight moved ({COLUMNS} of {IN} columns trained)", fontsize=10)
    left.set(xlabel="input", ylabel="output")
    left.set_xticks(found.columns)
    left.tick_params(labelsize=8)
    names = list(found.kept)
    bars = right.barh(names, list(found.kept.values()), color=[GREEN if name == "PaCA" else GREY for name in names])
    right.bar_label(bars, fmt="%.1f", padding=3)
    right.set_title("What a Llama block keeps for the backward pass", fontsize=10)
    right.set(xlabel="hidden states (bfloat16)", xlim=(0, max(found.kept.values()) * 1.15))
    right.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    about: dict[str, Any] = {"Software": None, "Description": found.as_text()}
    figure.savefig(path, dpi=150, facecolor="white", metadata=about)
    pyplot.close(figure)


if __name__ == "__main__":
    drawn = facts()
    draw(drawn, PICTURE)
    print(f"{PICTURE.relative_to(ROOT)}: {drawn.as_text()}")
