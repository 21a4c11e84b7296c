"""A few rows in place of each data set that recipes name: its configurations, splits, columns and their types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Pictures

ROWS = 6
TEXT, WHOLE, NUMBER = Value("string"), Value("int64"), Value("float64")
MESSAGES = List({"content": TEXT, "role": TEXT})


@dataclass(frozen=True)
class Hub:
    """A data set on the hub."""

    splits: tuple[str, ...]
    features: dict[str, Any]
    row: Callable[[int], dict[str, Any]]
    """Makes row number so and so."""
    config: str | None = None
    useless: Callable[[], list[dict[str, Any]]] = list
    """Makes rows that such public data holds too, and nothing can be learned from."""

    def load(self, config: str | None, split: str) -> Dataset:
        """What `datasets.load_dataset` gives.

        Raises:
            ValueError: There is no such configuration or split.
        """
        if config != self.config or split not in self.splits:
            raise ValueError(f"Unknown split {split!r} of configuration {config!r}.")
        rows = [self.row(number) for number in range(ROWS)] + self.useless()
        return Dataset.from_list(rows, features=Features(self.features))


LONG = "Too long. " * 900
"""Longer than `train.max_length` of any recipe, by a tokenizer of bytes."""


def _turns(number: int) -> list[dict[str, str]]:
    return [
        {"content": f"What is {number} and {number}?", "role": "user"},
        {"content": f"It is {2 * number}.", "role": "assistant"},
    ]


def _preference(number: int) -> dict[str, Any]:
    question, answer = _turns(number)
    wrong = {"content": "I do not know.", "role": "assistant"}
    return {"chosen": [question, answer], "rejected": [question, wrong], "score_chosen": 8.5, "score_rejected": 3.0}


def _oasst(number: int) -> dict[str, Any]:
    tree, answer = divmod(number, 2)
    return {
        "message_id": f"m{number}",
        "parent_id": f"m{number - 1}" if answer else None,
        "user_id": "u",
        "created_date": "2023-02-05T14:23:50.983374+00:00",
        "text": f"Answer {tree}." if answer else f"Question {tree}?",
        "role": "assistant" if answer else "prompter",
        "lang": "en",
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": 0 if answer else None,
        "synthetic": False,
        "message_tree_id": f"m{2 * tree}",
        "tree_state": "ready_for_export",
    }


_OASST_FEATURES = {
    **dict.fromkeys(("message_id", "parent_id", "user_id", "created_date", "text", "role", "lang"), TEXT),
    "review_count": Value("int32"),
    "review_result": Value("bool"),
    "deleted": Value("bool"),
    "rank": Value("int32"),
    "synthetic": Value("bool"),
    "message_tree_id": TEXT,
    "tree_state": TEXT,
}


def _picture(number: int) -> Pictures.Image:
    return Pictures.new("RGB", (20, 24), (40 * number, 120, 255 - 40 * number))


def _images(image: str, labels: dict[str, int], splits: tuple[str, ...] = ("train", "test"), **more: Any) -> Hub:
    """Labels by name of their column, with how many there are."""

    def row(number: int) -> dict[str, Any]:
        numbers = {name: number % count for name, count in labels.items()}
        return {image: _picture(number), **numbers, **dict.fromkeys(more, "x")}

    features = {name: ClassLabel(names=[f"{name}{n}" for n in range(count)]) for name, count in labels.items()}
    return Hub(splits, {image: Image(), **features, **more}, row)


HUB = {
    "cais/mmlu": Hub(
        ("auxiliary_train", "dev", "validation", "test"),
        {"question": TEXT, "subject": TEXT, "choices": List(TEXT), "answer": ClassLabel(names=["A", "B", "C", "D"])},
        lambda number: {
            "question": f"What is {number}?",
            "subject": "",
            "choices": ["one", "two", "three", "four"],
            "answer": number % 4,
        },
        "all",
        lambda: [{"question": LONG, "subject": "", "choices": ["one", "two", "three", "four"], "answer": 0}],
    ),
    "OpenAssistant/oasst1": Hub(
        ("train", "validation"),
        _OASST_FEATURES,
        _oasst,
        useless=lambda: [{**_oasst(ROWS), "text": LONG}, _oasst(ROWS + 1)],
    ),
    "timdettmers/openassistant-guanaco": Hub(
        ("train", "test"),
        {"text": TEXT},
        lambda number: {"text": f"### Human: What is {number}?### Assistant: " + "A number. " * 20},
    ),
    "meta-math/MetaMathQA": Hub(
        ("train",),
        dict.fromkeys(("type", "query", "original_question", "response"), TEXT),
        lambda number: {
            "type": "GSM_AnsAug",
            "query": f"What is {number} and 1?",
            "original_question": f"What is {number} and 1?",
            "response": f"It is one more.\n#### {number + 1}\nThe answer is: {number + 1}",
        },
        useless=lambda: [
            {"type": "MATH_AnsAug", "query": LONG, "original_question": LONG, "response": "The answer is: 1"},
        ],
    ),
    "openai/gsm8k": Hub(
        ("train", "test"),
        {"question": TEXT, "answer": TEXT},
        lambda number: {"question": f"What is {number} and 1?", "answer": f"One more.\n#### {number + 1}"},
        "main",
    ),
    "HuggingFaceH4/ultrachat_200k": Hub(
        ("train_sft", "test_sft", "train_gen", "test_gen"),
        {"prompt": TEXT, "prompt_id": TEXT, "messages": MESSAGES},
        lambda number: {"prompt": "What?", "prompt_id": str(number), "messages": _turns(number)},
        useless=lambda: [
            {"prompt": "What?", "prompt_id": "7", "messages": [{"content": LONG, "role": "user"}, _turns(7)[1]]},
            {"prompt": "What?", "prompt_id": "8", "messages": [_turns(8)[0], {"content": "", "role": "assistant"}]},
        ],
    ),
    "mlabonne/FineTome-100k": Hub(
        ("train",),
        {"conversations": List({"from": TEXT, "value": TEXT}), "source": TEXT, "score": NUMBER},
        lambda number: {
            "conversations": [
                {"from": "human", "value": f"What is {number}?"},
                {"from": "gpt", "value": "A number, and not a large one."},
            ],
            "source": "a",
            "score": 4.8,
        },
        useless=lambda: [
            {
                "conversations": [{"from": "human", "value": LONG}, {"from": "gpt", "value": "A number."}],
                "source": "a",
                "score": 4.8,
            }
        ],
    ),
    "tatsu-lab/alpaca": Hub(
        ("train",),
        dict.fromkeys(("instruction", "input", "output", "text"), TEXT),
        lambda number: {
            "instruction": "Double the number.",
            "input": str(number) if number % 2 else "",
            "output": str(2 * number),
            "text": "Below is an instruction. ### Response: ...",
        },
        useless=lambda: [{"instruction": "Double the number.", "input": "", "output": "", "text": "Below ..."}],
    ),
    "trl-lib/ultrafeedback_binarized": Hub(
        ("train", "test"),
        {"chosen": MESSAGES, "rejected": MESSAGES, "score_chosen": NUMBER, "score_rejected": NUMBER},
        _preference,
        useless=lambda: [
            {**_preference(7), "rejected": _preference(7)["chosen"]},
            {name: [{"content": LONG, "role": "user"}, _preference(8)[name][1]] for name in ("chosen", "rejected")},
        ],
    ),
    "stanfordnlp/imdb": Hub(
        ("train", "test", "unsupervised"),
        {"text": TEXT, "label": ClassLabel(names=["neg", "pos"])},
        lambda number: {"text": f"A film in {number} parts.", "label": number % 2},
    ),
    "uoft-cs/cifar10": _images("img", {"label": 10}),
    "uoft-cs/cifar100": _images("img", {"fine_label": 100, "coarse_label": 20}),
    "timm/oxford-iiit-pet": _images("image", {"label": 37, "label_cat_dog": 2}, image_id=TEXT),
    "dpdl-benchmark/oxford_flowers102": _images("image", {"label": 102}, ("train", "validation", "test")),
}
"""By hub id."""
