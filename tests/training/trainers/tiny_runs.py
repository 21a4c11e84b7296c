"""Data and configs of runs by other trainers than SFT, so small that each takes seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    EfficientNetConfig,
    EfficientNetForImageClassification,
    EfficientNetImageProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from tiny_checkpoint import byte_tokenizer, save_base
from training.tiny_run import WORDS

COMMON = "max_steps: 4, per_device_train_batch_size: 2, per_device_eval_batch_size: 4, learning_rate: 1e-2"
CONFIGS = {
    "dpo": f"model: {{name: llama}}\ndata: {{train: pairs.jsonl, eval: 4}}\ntrain: {{trainer: dpo, {COMMON}}}\n",
    "grpo": (
        "model: {name: llama}\ndata: {train: questions.jsonl, eval: 2}\n"
        "train:\n  trainer: grpo\n  reward_funcs: [exact_match, rewards_of_tests:length]\n"
        "  num_generations: 4\n  max_completion_length: 6\n  max_steps: 3\n  per_device_train_batch_size: 4\n"
        "  learning_rate: 1e-2\n"
    ),
    "reward": f"model: {{name: qwen}}\ndata: {{train: pairs.jsonl, eval: 4}}\ntrain: {{trainer: reward, {COMMON}}}\n",
    "classification": (
        "model: {name: llama}\ndata: {train: labelled.jsonl, eval: 8}\n"
        f"train: {{trainer: classification, {COMMON}}}\n"
    ),
    "image_classification": (
        f"model: {{name: vit}}\ndata: {{train: images, eval: 8}}\ntrain: {{trainer: image_classification, {COMMON}}}\n"
    ),
}
REWARDS = "def length(completions, **kwargs):\n    return [len(str(c)) / 10 for c in completions]\n"


def save_workspace(folder: Path) -> Path:
    """Write models (`llama`, `qwen`, `vit`, `efficientnet`), data, reward functions and a config for each trainer.

    Returns:
        The folder.
    """
    save_base(folder / "llama", attention_dropout=0.2)  # so that the random generators matter
    _save_qwen(folder / "qwen")
    _save_vision_models(folder)
    words = random.Random(0)
    texts = [" ".join(words.choices(WORDS, k=4)) for _ in range(32)]
    _write(folder / "pairs.jsonl", [{"question": f"{t}?", "chosen": "yes", "rejected": f"no {t}"} for t in texts[:16]])
    _write(folder / "questions.jsonl", [{"question": f"{t}?", "answer": t.split()[0]} for t in texts[:12]])
    animals = {True: "animal", False: "other"}
    _write(folder / "labelled.jsonl", [{"text": t, "label": animals["cat" in t or "dog" in t]} for t in texts])
    for label, colour in (("red", (220, 30, 30)), ("blue", (20, 40, 230))):
        (folder / "images" / label).mkdir(parents=True)
        for number in range(16):
            shade = tuple(max(0, c - words.randrange(20)) for c in colour)
            Image.new("RGB", (20, 18), shade).save(folder / "images" / label / f"{number}.png")
    (folder / "rewards_of_tests.py").write_text(REWARDS)
    for name, text in CONFIGS.items():
        for file in ("llama", "qwen", "vit", "pairs.jsonl", "questions.jsonl", "labelled.jsonl", "images"):
            text = text.replace(f": {file}", f": {folder / file}")
        (folder / f"{name}.yaml").write_text(f"{text}paca: {{r: 4}}\noutput: {{dir: {folder / 'runs' / name}}}\n")
    return folder


def _write(file: Path, records: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def _save_qwen(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _save_vision_models(folder: Path) -> None:
    """Each with a head for 10 labels, which a run replaces."""
    torch.manual_seed(0)
    vit = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=10,
    )
    ViTForImageClassification(vit).save_pretrained(folder / "vit")
    size = {"height": 16, "width": 16}
    ViTImageProcessor(size=size).save_pretrained(folder / "vit")
    efficientnet = EfficientNetConfig(
        image_size=32,
        width_coefficient=0.1,
        depth_coefficient=0.1,
        hidden_dim=128,
        num_labels=10,
        initializer_range=0.3,
    )
    convolutional = EfficientNetForImageClassification(efficientnet).train()
    with torch.no_grad():  # running statistics of something: by those of no batch its outputs are all 0
        for _ in range(20):
            convolutional(torch.randn(16, 3, 32, 32))
    convolutional.save_pretrained(folder / "efficientnet")
    EfficientNetImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "efficientnet")
