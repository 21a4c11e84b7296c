"""The named chat templates, as `apply_chat_template` renders them, and the tokens that end answers in them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from paca.data import end_of_turn, load_examples, set_chat_template, tokenize
from paca.data.chat_template import DEFAULT, NAMES, unprompted_header, unused_fields
from paca.data.tokens import IGNORED
from paca.messages.errors import PacaError
from tiny_checkpoint import byte_tokenizer

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Sure?"},
]
RENDERED = {
    "alpaca": (
        "Be brief.\n\n### Instruction:\n2+2?\n\n### Response:\n4</s>\n\n### Instruction:\nSure?\n\n",
        "### Response:\n",
    ),
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
        "4<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n",
        "<|im_start|>assistant\n",
    ),
    "gemma": (
        "<start_of_turn>user\nBe brief.\n\n2+2?<end_of_turn>\n<start_of_turn>model\n4<end_of_turn>\n"
        "<start_of_turn>user\nSure?<end_of_turn>\n",
        "<start_of_turn>model\n",
    ),
    "llama3": (
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "zephyr": (
        "<|system|>\nBe brief.</s>\n<|user|>\n2+2?</s>\n<|assistant|>\n4</s>\n<|user|>\nSure?</s>\n",
        "<|assistant|>\n",
    ),
}
ENDS = {"alpaca": "</s>", "chatml": "<|im_end|>", "gemma": "<end_of_turn>", "llama3": "<|eot_id|>", "zephyr": "</s>"}


@pytest.mark.parametrize("name", NAMES)
def test_a_named_template_renders_a_conversation(name: str) -> None:
    tokenizer = byte_tokenizer(None)
    tokenizer.add_special_tokens({"eos_token": "</s>", "additional_special_tokens": sorted(set(ENDS.values()))})
    set_chat_template(tokenizer, name)
    conversation, opening = RENDERED[name]
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == conversation
    assert tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True) == conversation + opening
    assert end_of_turn(tokenizer) == ENDS[name]
    answered = tokenizer.apply_chat_template([*TURNS, {"role": "assistant", "content": "Yes."}], tokenize=False)
    assert answered.startswith(conversation + opening + "Yes." + ENDS[name])


TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {"ort": {}}}}}
    for name in ("wetter", "zeit")
]
CALLS = [
    {"type": "function", "function": {"name": "wetter", "arguments": {"ort": "Köln", "tage": [1, 2]}}},
    {"name": "zeit", "arguments": {"ort": "Köln"}},  # without OpenAI's outer object
]


@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("said", ["", "One moment."])
def test_chatml_writes_tools_calls_and_what_tools_say(system: bool, said: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(None)
    set_chat_template(tokenizer, "chatml")
    messages: list[dict[str, Any]] = [
        *(TURNS[:1] if system else []),
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": said, "tool_calls": CALLS},
        {"role": "tool", "content": "rain"},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "Rain at noon."},
    ]
    text = tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False)
    first, question, call, rain, noon, answer = text.removesuffix("<|im_end|>\n").split("<|im_end|>\n")
    assert first.startswith("<|im_start|>system\n" + ("Be brief.\n\n" if system else "You can call"))
    told = re.search(r"<tools>\n(.*)\n</tools>", first, re.DOTALL)
    assert told is not None
    assert [json.loads(line) for line in told[1].splitlines()] == TOOLS
    assert question == "<|im_start|>user\nWeather?"
    # As the parsers of servers for Hermes and Qwen find them.
    calls = re.findall(r"<tool_call>\s*(.*?)\s*</tool_call>", call, re.DOTALL)
    assert [json.loads(one) for one in calls] == [CALLS[0]["function"], CALLS[1]]
    assert call.startswith(f"<|im_start|>assistant\n{said}{chr(10) if said else ''}<tool_call>\n")
    assert "Köln" in call
    assert rain == "<|im_start|>tool\n<tool_response>\nrain\n</tool_response>"
    assert noon == rain.replace("rain", "noon")
    assert answer == "<|im_start|>assistant\nRain at noon."
    assert "<tools>" not in tokenizer.apply_chat_template(TURNS, tokenize=False)
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": messages, "tools": TOOLS}))
    row = tokenize(load_examples(str(tmp_path / "data.jsonl")), tokenizer).dataset[0]
    learned = tokenizer.decode([token for token in row["labels"] if token != IGNORED])
    assert learned.count("<|im_end|>") == 2  # both answers, whole, and nothing else
    assert learned.startswith(call.removeprefix("<|im_start|>assistant\n") + "<|im_end|>")
    assert learned.rstrip().endswith("Rain at noon.<|im_end|>")


def test_a_template_begins_with_the_token_that_the_tokenizer_puts_before_a_text(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(None)
    set_chat_template(tokenizer, "chatml")
    assert "bos_token" not in str(tokenizer.chat_template)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    set_chat_template(tokenizer, DEFAULT)
    ids = tokenizer.apply_chat_template(TURNS[1:2], return_dict=True)["input_ids"]
    assert tokenizer.decode(ids) == "<|im_start|>### Instruction:\n2+2?\n\n"
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")
    set_chat_template(tokenizer, str(file))
    assert tokenizer.chat_template == file.read_text()


@pytest.mark.parametrize("name", ["alpaca", "gemma", "zephyr"])
def test_a_role_that_a_template_has_no_place_for_is_refused(name: str) -> None:
    tokenizer = byte_tokenizer(None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    set_chat_template(tokenizer, name)
    with pytest.raises(Exception, match=f"{name} has no place for a message of tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_a_template_whose_end_is_no_token_is_refused_and_the_old_one_stays(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    before = tokenizer.chat_template
    with pytest.raises(PacaError, match=r"in 'llama3' no token of this tokenizer ends an answer"):
        set_chat_template(tokenizer, "llama3")
    assert tokenizer.chat_template == before
    file = tmp_path / "broken.jinja"
    file.write_text("{% for m in messages %}{{ m[")
    with pytest.raises(PacaError, match="cannot render a question and its answer"):
        set_chat_template(tokenizer, str(file))
    assert tokenizer.chat_template == before


def test_a_template_that_leaves_out_the_question_is_refused_and_the_old_one_stays(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    before = tokenizer.chat_template
    file = tmp_path / "mistyped.jinja"
    file.write_text(before.replace("content", "contents"))
    with pytest.raises(PacaError, match="leaves out what the user says"):
        set_chat_template(tokenizer, str(file))
    assert tokenizer.chat_template == before
    file.write_text("{% for m in messages %}{{ m.content if m.role == 'user' }}{{ eos_token }}{% endfor %}")
    with pytest.raises(PacaError, match="leaves out what the assistant says"):
        set_chat_template(tokenizer, str(file))
    file.write_text("{% for m in messages %}{{ m.content | upper }}{{ eos_token }}{% endfor %}")
    set_chat_template(tokenizer, str(file))


def test_a_byte_order_mark_is_no_part_of_a_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    before = tokenizer.chat_template
    (tmp_path / "from_windows.jinja").write_text(before, encoding="utf-8-sig")
    set_chat_template(tokenizer, str(tmp_path / "from_windows.jinja"))
    assert tokenizer.chat_template == before


def test_a_header_that_the_model_has_to_write_itself_is_found() -> None:
    tokenizer = byte_tokenizer()
    assert unprompted_header(tokenizer) == ""
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    assert unprompted_header(tokenizer) == "assistant:"
    tokenizer.chat_template = "{{ raise_exception('whole ones alone') if messages | length < 2 }}{{ messages }}"
    assert unprompted_header(tokenizer) == ""


def test_fields_of_messages_that_the_template_does_not_name_are_found(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "b", "reasoning_content": "because", "weight": 0}
    record = {"messages": [{"role": "user", "content": "a"}, answer], "tools": [{"name": "look"}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    examples, tokenizer = load_examples(str(tmp_path / "data.jsonl")), byte_tokenizer()
    assert unused_fields(examples, tokenizer) == ["reasoning_content", "weight", "tools"]
    tokenizer.chat_template += "{{ messages[-1].reasoning_content }}"
    assert unused_fields(examples, tokenizer) == ["weight", "tools"]
