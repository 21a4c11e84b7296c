"""Examples as tokens, and which of them count in the loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from paca.data import Examples, encode, load_examples, tokenize, training_template
from paca.data.tokens import IGNORED, WHY_LEFT_OUT, as_template_wants
from paca.evaluation.encoding import answer_of, continuation_of, question_of, question_text
from paca.messages.errors import PacaError
from paca.pretrained.ends_of_texts import ends_texts
from tiny_checkpoint import CHAT_TEMPLATE, byte_tokenizer, ending_tokenizer

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
    marked = tokenize(load(tmp_path, *CONVERSATIONS), tokenizer)
    for example in marked.dataset:
        expected = tokenizer.apply_chat_template(
            example["messages"],
            chat_template=MARKED_TEMPLATE,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert example["input_ids"] == expected["input_ids"]
        assert [int(label != IGNORED) for label in example["labels"]] == expected["assistant_masks"]


def test_answers_are_trained_with_their_end_of_turn_token_and_nothing_else_is(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    marked = tokenize(load(tmp_path, CONVERSATIONS[1]), tokenizer)
    (example,) = marked.dataset
    trained = [label for label in example["labels"] if label != IGNORED]
    assert tokenizer.decode(trained) == " ñ 漢字 😀<|im_end|>\n\n\n  the\n<|im_end|>\n"


def test_a_space_that_ends_a_turn_is_trained_although_it_is_trimmed_from_the_offsets(tmp_path: Path) -> None:
    tokenizer = merging_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>\n", "<|im_end|> ")
    (example,) = tokenize(load(tmp_path, CONVERSATIONS[2]), tokenizer).dataset
    trained = [label for label in example["labels"] if label != IGNORED]
    assert tokenizer.decode(trained) == "a  <|im_end|> é<|im_end|> "


def test_a_turn_that_is_rendered_differently_later_on_is_left_out_and_counted(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(FORGETFUL_TEMPLATE)
    turns = [("user", "a"), ("assistant", "hm</think>b"), ("user", "c"), ("assistant", "so</think>d")]
    marked = tokenize(load(tmp_path, turns), tokenizer)
    (example,) = marked.dataset
    trained = [label for label in example["labels"] if label != IGNORED]
    assert tokenizer.decode(trained) == "so</think>d<|im_end|>\n"
    assert marked.description.endswith(f"1 turns left out: {WHY_LEFT_OUT}")


def test_earlier_answers_count_where_the_template_closes_the_whole_conversation(tmp_path: Path) -> None:
    closing = "{% if not add_generation_prompt %}<|pad|>{% endif %}"
    tokenizer = byte_tokenizer(CHAT_TEMPLATE + closing)
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    (example,) = tokenize(load(tmp_path, turns), tokenizer).dataset
    trained = [label for label in example["labels"] if label != IGNORED]
    assert tokenizer.decode(trained) == "b<|im_end|>\nd<|im_end|>\n<|pad|>"


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma3", "phi3"])
def test_every_answer_of_a_template_that_trl_knows_counts_with_its_end(name: str) -> None:
    """Among them those that drop reasoning from earlier answers, or mark none themselves."""
    import trl.chat_template_utils

    tokenizer = byte_tokenizer(getattr(trl.chat_template_utils, f"{name}_chat_template"))
    turns = ["ask one", "reply one", "ask two", "reply two"]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    found = encode({"messages": messages, "origin": ""}, tokenizer, template=training_template(tokenizer))
    trained = str(tokenizer.decode([label for label in found.labels if label != IGNORED]))
    assert found.left_out == 0
    assert "ask" not in trained
    for text in ("reply one", "reply two"):
        after = trained.split(text)[1]
        assert after.strip().startswith(("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"))


def test_a_completion_of_several_messages_counts_where_the_assistant_speaks() -> None:
    messages = [("assistant", "calls"), ("tool", "result"), ("assistant", "says")]
    completion = [{"role": role, "content": text} for role, text in messages]
    example = {"prompt": [{"role": "user", "content": "a"}], "completion": completion, "origin": ""}
    tokenizer = byte_tokenizer()
    trained = [label for label in encode(example, tokenizer).labels if label != IGNORED]
    assert tokenizer.decode(trained) == "calls<|im_end|>\nsays<|im_end|>\n"
    assert encode(example, tokenizer, everything=True).labels == encode(example, tokenizer).ids


@pytest.mark.parametrize("tokenizer", [merging_tokenizer(), prefixing_tokenizer()], ids=["merges", "prefix"])
@pytest.mark.parametrize("prompt", ["the question\n", "", "é "])
def test_plain_text_is_tokenized_as_trl_does(tokenizer: PreTrainedTokenizerFast, prompt: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": prompt, "completion": "the answer"}))
    examples = load_examples(str(path))
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    trainer = SFTTrainer(model=model, args=config, train_dataset=examples.dataset, processing_class=tokenizer)
    expected: Any = trainer.train_dataset[0]
    found = encode(examples.dataset[0], tokenizer)
    assert (found.ids, found.labels) == (expected["input_ids"], expected["labels"])


def test_a_tokenizer_that_ends_every_text_ends_an_example_once_and_no_question() -> None:
    plain, ending = byte_tokenizer(chat_template=None), ending_tokenizer()
    assert ending("a")["input_ids"] == [*plain("a")["input_ids"], plain.eos_token_id]
    pair, text = {"prompt": "2+2=", "completion": "4", "origin": ""}, {"text": "a b", "origin": ""}
    for example in (pair, text):
        assert encode(example, ending) == encode(example, plain)
    assert question_of(pair, ending) == question_of(pair, plain) == plain("2+2=")["input_ids"]
    assert continuation_of(pair, ending) == continuation_of(pair, plain)


def test_a_text_that_a_tokenizer_does_not_know_is_no_end_that_it_adds() -> None:
    unknown = Tokenizer(models.WordLevel({"<end>": 0, "ACG": 1}, unk_token="<end>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=unknown, eos_token="<end>", unk_token="<end>")
    without = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<end>": 0})), eos_token="<end>")
    assert not ends_texts(tokenizer)
    assert not ends_texts(without)  # it has no token for an unknown word
    assert ends_texts(ending_tokenizer())


def test_a_tokenizer_without_offsets_finds_the_same_tokens() -> None:
    tokenizer = merging_tokenizer()
    turns = [{"role": role, "content": text} for role, text in CONVERSATIONS[1]]
    examples: list[dict[str, Any]] = [{"messages": turns, "origin": ""}, {"prompt": "the ", "completion": "answer"}]
    expected = [encode(example, tokenizer) for example in examples]

    class Slow(PreTrainedTokenizerFast):
        is_fast = False

    tokenizer.__class__ = Slow
    assert [encode(example, tokenizer) for example in examples] == expected


@pytest.mark.parametrize(
    ("template", "turns", "expected"),
    [
        (None, [("user", "a"), ("assistant", "b")], r"line 1 holds messages.*no chat template.*data\.template"),
        (CHAT_TEMPLATE, [("assistant", "hello")], r"chat\.jsonl, line 1: no assistant turn can be found"),
        ("{{ raise_exception('roles must alternate') }}", [("user", "a"), ("assistant", "b")], "line 1.*roles must"),
    ],
)
def test_what_cannot_be_marked_is_an_error_that_says_why(
    tmp_path: Path, template: str | None, turns: list[tuple[str, str]], expected: str
) -> None:
    with pytest.raises(PacaError, match=expected):
        tokenize(load(tmp_path, turns), byte_tokenizer(template))


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
    (example,) = tokenize(load_examples(str(path)), tokenizer).dataset
    assert tokenizer.decode(example["input_ids"]).startswith("[adder]<|im_start|>user")


def test_text_needs_a_token_that_ends_it() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(PacaError, match="end-of-text"):
        encode({"text": "a"}, tokenizer)


CALL = [{"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}]


@pytest.mark.parametrize("content", ["", "I look."])
def test_a_template_that_leaves_tool_calls_out_is_refused(tmp_path: Path, content: str) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content, "tool_calls": CALL}]
    (tmp_path / "calls.jsonl").write_text(json.dumps({"messages": messages}))
    example = load_examples(str(tmp_path / "calls.jsonl")).dataset[0]
    tokenizer = byte_tokenizer()
    with pytest.raises(PacaError, match=r"^calls.jsonl, line 1: an answer calls a tool.* begins \W+% for message in"):
        encode(example, tokenizer)
    named = "{{ message.tool_calls[0].function.name if message.tool_calls else message['content'] }}"
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ message['content'] }}", named)
    assert "look<|im_end|>" in tokenizer.decode(encode(example, tokenizer).ids)


def calling_tokenizer(written: str) -> PreTrainedTokenizerFast:
    """Its template writes the calls of a message so."""
    call = "{% for call in message.tool_calls %}{{ call.function.WRITTEN }}{% endfor %}"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("message['content']", "(message['content'] or '')").replace(
        "<|im_end|>", call.replace("WRITTEN", written) + "<|im_end|>", 1
    )
    return tokenizer


@pytest.mark.parametrize("arguments", ['{"city": "Rome"}', {"city": "Rome"}])
@pytest.mark.parametrize("written", ["arguments | tojson", "arguments", "arguments + ''"])
def test_calls_are_rendered_as_the_template_wants_their_arguments(
    tmp_path: Path, arguments: object, written: str
) -> None:
    """Most write an object as JSON, some the text as it is given; both may be in the data."""
    tokenizer = calling_tokenizer(written)
    calls = [{"type": "function", "function": {"name": "weather", "arguments": arguments}}]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    (tmp_path / "calls.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (example,) = tokenize(load_examples(str(tmp_path / "calls.jsonl")), tokenizer).dataset
    trained = tokenizer.decode([label for label in example["labels"] if label != IGNORED])
    assert trained == '{"city": "Rome"}<|im_end|>\n'


def test_an_answer_that_begins_a_conversation_is_counted_as_left_out(tmp_path: Path) -> None:
    turns = [("assistant", "hello"), ("user", "a"), ("assistant", "b")]
    marked = tokenize(load(tmp_path, turns), byte_tokenizer())
    (example,) = marked.dataset
    assert byte_tokenizer().decode([label for label in example["labels"] if label != IGNORED]) == "b<|im_end|>\n"
    assert marked.description.endswith(f"1 turns left out: {WHY_LEFT_OUT}")


def test_of_a_completion_of_several_messages_the_last_answer_is_what_is_scored(tmp_path: Path) -> None:
    """As of the same conversation that is given whole."""
    turns = [{"role": role, "content": text} for role, text in CONVERSATIONS[1]]
    last = max(n for n, turn in enumerate(turns) if turn["role"] == "assistant")
    first = next(n for n, turn in enumerate(turns) if turn["role"] == "assistant")
    assert first < last
    tokenizer, found = byte_tokenizer(), []
    for row in ({"messages": turns}, {"prompt": turns[:first], "completion": turns[first:]}):
        (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
        (example,) = load_examples(str(tmp_path / "x.jsonl")).dataset
        scored = continuation_of(example, tokenizer)
        assert question_of(example, tokenizer) == scored.prompt
        assert answer_of(example) == turns[last]["content"]
        found.append((scored, question_text(example)))
    assert found[0] == found[1]
    assert tokenizer.decode(found[0][0].answer).startswith(turns[last]["content"])


def test_words_that_look_like_arguments_change_no_call(tmp_path: Path) -> None:
    """The form that a template wants is a matter of the template."""
    tokenizer = calling_tokenizer("arguments | tojson")
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
    messages = [
        {"role": "user", "content": "{'city': 'Rome'}"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "ok"},
        {"role": "assistant", "content": "{'city': 'Rome'}"},
    ]
    (tmp_path / "calls.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (example,) = tokenize(load_examples(str(tmp_path / "calls.jsonl")), tokenizer).dataset
    trained = tokenizer.decode([label for label in example["labels"] if label != IGNORED])
    assert trained == "{\"city\": \"Rome\"}<|im_end|>\n{'city': 'Rome'}<|im_end|>\n"


@pytest.mark.parametrize(
    ("written", "kept"), [("arguments | tojson", {"city": "Rome"}), ("arguments", '{"city": "Rome"}')]
)
def test_trainers_that_render_get_the_form_that_the_template_wants(tmp_path: Path, written: str, kept: object) -> None:
    calls = [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]
    prompt = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "ok"},
    ]
    (tmp_path / "calls.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
    examples = as_template_wants(
        load_examples(str(tmp_path / "calls.jsonl"), family="prompts"), calling_tokenizer(written)
    )
    assert examples.dataset[0]["prompt"][1]["tool_calls"][0]["function"]["arguments"] == kept


def test_tokenize_given_something_else_says_what_it_takes(tmp_path: Path) -> None:
    examples = load(tmp_path, CONVERSATIONS[1])
    with pytest.raises(TypeError, match=r"whole \(not its .dataset\), and got a Dataset"):
        tokenize(examples.dataset, byte_tokenizer())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not its name: AutoTokenizer"):
        tokenize(examples, "tiny")  # type: ignore[arg-type]
