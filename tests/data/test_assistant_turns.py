"""Finding the assistant's tokens in conversations whose chat template does not mark them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from paca.data import Examples, load_examples, mark_assistant_turns
from paca.data.assistant_turns import marks_assistant_turns
from paca.messages.errors import PacaError
from tiny_checkpoint import CHAT_TEMPLATE, byte_tokenizer

# The same rendering as CHAT_TEMPLATE, with the markers that transformers reads.
MARKED_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|im_start|>assistant\n{% generation %}"
    "{{ message['content'] }}<|im_end|>\n{% endgeneration %}{% else %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Renders an assistant message without what comes before </think>, once another message follows.
FORGETFUL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if loop.last or message['role'] != 'assistant' %}{{ message['content'] }}"
    "{% else %}{{ message['content'].split('</think>')[-1] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, which trims white space from its offsets as GPT-2's does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the user asks the assistant\n\n  the answer to the question"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def prefixing_tokenizer() -> PreTrainedTokenizerFast:
    """One that puts a token before every text, which a rendered conversation must not get twice."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    return tokenizer


def load(tmp_path: Path, *conversations: list[tuple[str, str]]) -> Examples:
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in conversations]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_examples(str(path))


CONVERSATIONS = [
    [("user", "the question"), ("assistant", "the answer")],
    [
        ("system", "be brief"),
        ("user", "  é? "),
        ("assistant", " ñ 漢字 😀"),
        ("user", "\n\nwhy"),
        ("assistant", "\n\n  the\n"),
    ],
    [("user", "asks"), ("assistant", "a  "), ("user", "the"), ("assistant", "é"), ("user", "trailing question")],
]


@pytest.mark.parametrize(
    "tokenizer", [byte_tokenizer(), merging_tokenizer(), prefixing_tokenizer()], ids=["bytes", "merges", "prefix"]
)
def test_the_mask_is_the_one_of_a_template_with_markers(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    marked = mark_assistant_turns(load(tmp_path, *CONVERSATIONS), tokenizer)
    for example in marked.dataset:
        expected = tokenizer.apply_chat_template(
            example["messages"],
            chat_template=MARKED_TEMPLATE,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert example["input_ids"] == expected["input_ids"]
        assert example["assistant_masks"] == expected["assistant_masks"]


def test_answers_are_trained_with_their_end_of_turn_token_and_nothing_else_is(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    marked = mark_assistant_turns(load(tmp_path, CONVERSATIONS[1]), tokenizer)
    (example,) = marked.dataset
    trained = [token for token, bit in zip(example["input_ids"], example["assistant_masks"], strict=True) if bit]
    assert tokenizer.decode(trained) == " ñ 漢字 😀<|im_end|>\n\n\n  the\n<|im_end|>\n"
    assert "found by rendering each conversation" in marked.description


def test_a_space_that_ends_a_turn_is_trained_although_it_is_trimmed_from_the_offsets(tmp_path: Path) -> None:
    tokenizer = merging_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>\n", "<|im_end|> ")
    (example,) = mark_assistant_turns(load(tmp_path, CONVERSATIONS[2]), tokenizer).dataset
    trained = [token for token, bit in zip(example["input_ids"], example["assistant_masks"], strict=True) if bit]
    assert tokenizer.decode(trained) == "a  <|im_end|> é<|im_end|> "


def test_a_turn_that_is_rendered_differently_later_on_is_left_out_and_counted(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(FORGETFUL_TEMPLATE)
    turns = [("user", "a"), ("assistant", "hm</think>b"), ("user", "c"), ("assistant", "so</think>d")]
    marked = mark_assistant_turns(load(tmp_path, turns), tokenizer)
    (example,) = marked.dataset
    trained = [token for token, bit in zip(example["input_ids"], example["assistant_masks"], strict=True) if bit]
    assert tokenizer.decode(trained) == "so</think>d<|im_end|>\n"
    assert marked.description.endswith("1 turns left out because the template renders them differently later on")


def test_what_trl_can_mark_by_itself_comes_back_unchanged(tmp_path: Path) -> None:
    examples = load(tmp_path, CONVERSATIONS[0])
    assert mark_assistant_turns(examples, byte_tokenizer(MARKED_TEMPLATE)) is examples
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    pairs = load_examples(str(path))
    assert mark_assistant_turns(pairs, byte_tokenizer()) is pairs


def test_a_template_that_trl_has_a_marked_version_of_is_left_to_trl() -> None:
    import trl.chat_template_utils

    known = trl.chat_template_utils.qwen3_chat_template
    assert "{% generation" not in known
    assert marks_assistant_turns(byte_tokenizer(known)) is True
    assert marks_assistant_turns(byte_tokenizer(CHAT_TEMPLATE)) is False
    assert marks_assistant_turns(byte_tokenizer(None)) is False


@pytest.mark.parametrize(
    ("template", "turns", "expected"),
    [
        (None, [("user", "a"), ("assistant", "b")], "no chat template"),
        (CHAT_TEMPLATE, [("assistant", "hello")], r"chat\.jsonl, line 1: no assistant turn can be found"),
        ("{{ raise_exception('roles must alternate') }}", [("user", "a"), ("assistant", "b")], "line 1.*roles must"),
    ],
)
def test_what_cannot_be_marked_is_an_error_that_says_why(
    tmp_path: Path, template: str | None, turns: list[tuple[str, str]], expected: str
) -> None:
    with pytest.raises(PacaError, match=expected):
        mark_assistant_turns(load(tmp_path, turns), byte_tokenizer(template))


def test_tools_reach_the_template(tmp_path: Path) -> None:
    template = "{% if tools %}[{{ tools[0]['name'] }}]{% endif %}" + CHAT_TEMPLATE
    rows: list[dict[str, Any]] = [
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "tools": [{"name": "adder"}],
        }
    ]
    path = tmp_path / "tools.jsonl"
    path.write_text(json.dumps(rows[0]))
    tokenizer = byte_tokenizer(template)
    (example,) = mark_assistant_turns(load_examples(str(path)), tokenizer).dataset
    assert tokenizer.decode(example["input_ids"]).startswith("[adder]<|im_start|>user")
