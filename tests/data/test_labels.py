"""What SFTTrainer makes of tokenized examples, and the check that some token of each counts in the loss."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from paca.data import Examples, check_labels, load_examples, tokenize
from paca.data.labels import raise_or_shorten
from paca.messages.errors import PacaError
from tiny_checkpoint import byte_tokenizer, save_base

SHORT = {"instruction": "Hi.", "output": "Hello."}
LONG = {"instruction": "Read this. " + "Once upon a time. " * 20, "output": "Done."}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def load(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Examples:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_examples(str(path), **options)


def make_trainer(
    base: Path, folder: Path, examples: Examples, tokenizer: PreTrainedTokenizerFast, **settings: Any
) -> tuple[SFTTrainer, Examples]:
    examples = tokenize(examples, tokenizer)
    config = SFTConfig(
        output_dir=str(folder / "out"),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
        completion_only_loss=False,
        **settings,
    )
    model = LlamaForCausalLM.from_pretrained(base)
    return SFTTrainer(model=model, args=config, train_dataset=examples.dataset, processing_class=tokenizer), examples


def check(trainer: SFTTrainer, examples: Examples) -> None:
    check_labels(examples, trainer.args.to_dict(), packed=trainer.args.packing)


def trained_text(trainer: SFTTrainer, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    batch = next(iter(trainer.get_train_dataloader()))
    return sorted(tokenizer.decode(labels[labels != -100]) for labels in batch["labels"])


def test_the_loss_falls_on_the_answer_of_a_prompt(base: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    examples = load(tmp_path, [SHORT, {"instruction": "Bye.", "output": "See you."}])
    trainer, examples = make_trainer(base, tmp_path, examples, tokenizer)
    assert trained_text(trainer, tokenizer) == ["Hello.<|im_end|>\n", "See you.<|im_end|>\n"]
    check(trainer, examples)


def test_the_loss_falls_on_all_assistant_turns_found_by_rendering(base: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    examples = load(tmp_path, rows)
    trainer, examples = make_trainer(base, tmp_path, examples, tokenizer)
    assert trained_text(trainer, tokenizer) == ["b<|im_end|>\nd<|im_end|>\n"]
    check(trainer, examples)


def test_plain_text_is_trained_whole_and_plain_answers_alone(base: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    examples = load(tmp_path, [{"text": "abc"}])
    trainer, examples = make_trainer(base, tmp_path, examples, tokenizer)
    assert trained_text(trainer, tokenizer) == ["abc<|im_end|>"]
    examples = load(tmp_path, [{"prompt": "2+2=", "completion": "4"}])
    trainer, examples = make_trainer(base, tmp_path, examples, tokenizer)
    assert trained_text(trainer, tokenizer) == ["4<|im_end|>"]


def test_the_end_of_an_answer_is_trained_even_when_it_is_also_the_padding(base: Path, tmp_path: Path) -> None:
    """paca.pretrained pads with the end-of-text token where a tokenizer has no other, and relies on this."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    examples = load(tmp_path, [SHORT, {"instruction": "Count.", "output": "one, two, three, four, five"}])
    trainer, examples = make_trainer(base, tmp_path, examples, tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["attention_mask"] == 0).any()
    assert trained_text(trainer, tokenizer) == ["Hello.<|im_end|>\n", "one, two, three, four, five<|im_end|>\n"]


@pytest.mark.parametrize(
    "long", [LONG, {"prompt": LONG["instruction"], "completion": "Done."}], ids=["messages", "text"]
)
@pytest.mark.parametrize("packing", [False, True])
def test_an_example_whose_answer_is_cut_off_is_named(
    base: Path, tmp_path: Path, long: dict[str, str], packing: bool
) -> None:
    tokenizer = byte_tokenizer()
    short = dict(zip(long, SHORT.values(), strict=True))
    examples = load(tmp_path, [short, long, short])
    trainer, examples = make_trainer(base, tmp_path, examples, tokenizer, max_length=100, packing=packing)
    assert packing or len(trainer.train_dataset) == 2  # TRL dropped it
    expected = (
        r"(?s)1 of 3 examples has no token.*max_length = 100 .*line 2: 'Read this\. Once upon.*"
        r"the longest example has \d{3} tokens"
    )
    with pytest.raises(PacaError, match=expected):
        check(trainer, examples)


@pytest.mark.parametrize("packing", [False, True])
def test_a_conversation_whose_answers_are_cut_off_is_named(base: Path, tmp_path: Path, packing: bool) -> None:
    tokenizer = byte_tokenizer()
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes."}]}
        for question in ("Short?", "Long? " * 50)
    ]
    examples = load(tmp_path, rows)
    trainer, examples = make_trainer(base, tmp_path, examples, tokenizer, max_length=100, packing=packing)
    with pytest.raises(PacaError, match=r"1 of 2 examples.*\n  data\.jsonl, line 2: 'Long\? Long\?"):
        check(trainer, examples)


def test_every_example_cut_off_is_counted_and_some_are_listed(base: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    examples = load(tmp_path, [LONG] * 5)
    trainer, examples = make_trainer(base, tmp_path, examples, tokenizer, max_length=50)
    with pytest.raises(PacaError, match=r"(?s)5 of 5 examples have.*line 1.*line 2.*line 3.*and 2 more"):
        check(trainer, examples)


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_packing_that_loses_no_token_is_not_complained_about(base: Path, tmp_path: Path, strategy: str) -> None:
    tokenizer = byte_tokenizer()
    examples = load(tmp_path, [SHORT, LONG, SHORT])
    trainer, examples = make_trainer(
        base, tmp_path, examples, tokenizer, max_length=100, packing=True, packing_strategy=strategy
    )
    rows = trainer.train_dataset
    assert any(all(label == -100 for label in row["labels"]) for row in rows)  # it would have been easy to complain
    check(trainer, examples)


def test_packing_of_examples_that_fit_is_not_complained_about(base: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    examples = load(tmp_path, [SHORT] * 7)
    trainer, examples = make_trainer(base, tmp_path, examples, tokenizer, max_length=200, packing=True)
    check(trainer, examples)


def test_an_answer_that_is_left_in_by_cutting_at_the_start_is_fine(base: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    examples = load(tmp_path, [SHORT, LONG])
    trainer, examples = make_trainer(base, tmp_path, examples, tokenizer, max_length=60, truncation_mode="keep_end")
    check(trainer, examples)


def test_the_check_agrees_with_a_plain_loop(tmp_path: Path) -> None:
    """Over several batches, with empty, one-token and unlabelled examples."""
    generator = random.Random(0)
    rows: list[dict[str, Any]] = []
    for index in range(2500):
        tokens = [generator.randrange(256) for _ in range(generator.randrange(6))]
        keep = [generator.randrange(3) == 0 for _ in tokens]
        labels = [token if kept else -100 for token, kept in zip(tokens, keep, strict=True)]
        rows.append({"input_ids": tokens, "labels": labels, "origin": f"data.jsonl, line {index + 1}", "keep": keep})
    unlabelled = [row["origin"] for row in rows if not any(row["keep"][1:])]
    dataset = Dataset.from_list(rows).remove_columns("keep").add_column("text", ["x"] * len(rows))
    with pytest.raises(PacaError) as error:
        check_labels(Examples(dataset, "text", "data.jsonl", ""), {}, packed=False)
    assert str(error.value).startswith(f"{len(unlabelled):,} of 2,500 examples")
    assert all(f"  {origin}: 'x'" in str(error.value) for origin in unlabelled[:3])
    fine = dataset.select([index for index, row in enumerate(rows) if any(row["keep"][1:])])
    check_labels(Examples(fine, "text", "data.jsonl", ""), {}, packed=False)


def test_no_length_beyond_the_models_context_is_advised() -> None:
    assert raise_or_shorten(512, 900, None) == "Raise train.max_length (the longest example has 900 tokens), or shorten"
    assert raise_or_shorten(512, 900, 900) == raise_or_shorten(512, 900, None)
    assert raise_or_shorten(512, 900, 800).startswith("Raise train.max_length, up to the 800 positions that the model")
    assert raise_or_shorten(512, 900, 512) == "The model was made for 512 positions: shorten"
