"""Examples of training data as tokens: what a model is asked, and what it should answer."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from paca.data.choices import OPTIONS
from paca.data.conversion import ORIGIN
from paca.data.tokens import IGNORED, encode, prompt_tokens, render
from paca.evaluation.log_likelihood import Continuation
from paca.messages.errors import PacaError
from paca.messages.shown import shown

Example = dict[str, Any]


def question_of(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of the prompt: of a conversation, all before its last answer.

    Raises:
        PacaError: The example asks nothing, or the chat template refuses it.
    """
    asked = _asked(example)
    if isinstance(asked, list):
        tools = json.loads(example["tools"]) if example.get("tools") else None
        text = render(tokenizer, asked, example[ORIGIN], tools=tools, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return prompt_tokens(asked, tokenizer)


def question_text(example: Example) -> str:
    """The prompt as people read it: of a conversation, the last thing the user said before the answer.

    Raises:
        PacaError: The example asks nothing.
    """
    asked = _asked(example)
    if isinstance(asked, str):
        return asked
    return str(next((turn["content"] for turn in reversed(asked) if turn["role"] == "user"), asked[-1]["content"]))


def answer_of(example: Example) -> str:
    """The text of the reference answer: of a conversation, the last one."""
    answer = _halves(example)[1]
    return str(answer if isinstance(answer, str) else answer["content"])


def calls_a_tool(example: Example) -> bool:
    """Whether the reference answer does, so that its text is not all of it."""
    answer = _halves(example)[1]
    return isinstance(answer, dict) and bool(answer.get("tool_calls"))


def continuation_of(example: Example, tokenizer: PreTrainedTokenizerBase, answer: str | None = None) -> Continuation:
    """Prompt and answer as the model was trained on them, with the token that ends an answer.

    Args:
        example: A row of `paca.data.Examples`.
        tokenizer: The model's.
        answer: A text in place of the reference answer.

    Raises:
        PacaError: The chat template refuses the example, or nothing of it is an answer.
    """
    if "text" not in example:
        asked, given = _asked(example), _halves(example)[1] if answer is None else answer
        if isinstance(asked, list):
            given = [given if isinstance(given, dict) else {"role": "assistant", "content": given}]
        example = {"prompt": asked, "completion": given, "tools": example.get("tools"), ORIGIN: example[ORIGIN]}
    found = encode(example, tokenizer)
    # The first token is given, as nothing comes before it.
    start = next((index for index, label in enumerate(found.labels) if index and label != IGNORED), len(found.ids))
    if start == len(found.ids):
        raise PacaError(f"{example[ORIGIN]}: the question or the answer is empty once it is tokenized. Leave it out.")
    return Continuation(found.ids[:start], found.ids[start:])


def options_of(example: Example) -> list[str]:
    """All answers that could be given.

    Raises:
        PacaError: The example lists none, or its answer is not among them.
    """
    if not example.get(OPTIONS):
        raise PacaError(
            f"{example[ORIGIN]}: there are no options to choose from. eval.metric: choice needs data that brings them "
            "(question, choices and answer as in MMLU, question, choices and answerKey as in ARC, or `options` beside "
            "question and answer, or prompt and completion, one of which is the answer)."
        )
    if (answer := answer_of(example)) not in example[OPTIONS]:
        raise PacaError(
            f"{example[ORIGIN]}: the answer {shown(answer)} is not among the options {shown(example[OPTIONS])}. "
            "eval.metric: choice needs it to be one of them, letter for letter. Mend the record, or leave it out."
        )
    return list(example[OPTIONS])


def _asked(example: Example) -> Any:
    """A text, or messages."""
    if "text" in example:
        raise PacaError(
            f"{example[ORIGIN]}: plain text has no question, so nothing can be asked. Use eval.metric: loss or "
            "token_accuracy, or data with prompts."
        )
    asked = _halves(example)[0] if "messages" in example or "completion" in example else example["prompt"]
    if isinstance(asked, list) and not asked:
        raise PacaError(f"{example[ORIGIN]}: the conversation begins with its only answer, so nothing is asked.")
    return asked


def _halves(example: Example) -> tuple[Any, Any]:
    """All before the last answer, and that answer: two texts, or messages and a message."""
    if isinstance(example.get("prompt"), str):
        return example["prompt"], example["completion"]
    messages = example["messages"] if "messages" in example else example["prompt"] + example["completion"]
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:last], messages[last]
