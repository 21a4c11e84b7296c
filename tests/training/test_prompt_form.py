"""The form of prompts, from the YAML through a run to chatting, merging and exporting."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cli.paca_process import forked_paca
from paca.data import end_of_turn
from paca.messages.errors import PacaError
from paca.pretrained.conversation import opening, other_form, unknown_form
from paca.pretrained.generation import load_for_generation, stream_reply
from paca.training import load_run_config, train
from paca.training.plan import Plan
from paca.training.prepare import describe
from tiny_checkpoint import save_run

RECORD = {"instruction": "What does the cat do?", "input": "", "output": "It sleeps on a tree."}
CONFIG = """\
model:
  name: {folder}/model
data:
  train: {folder}/alpaca.jsonl
paca:
  r: 64
  paca_alpha: 64
train:
  max_steps: 30
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 1
  learning_rate: 1e-2
  lr_scheduler_type: constant
  max_length: 128
output:
  dir: {folder}/run
"""


def save_model(folder: Path, *special: str) -> None:
    """A random Llama, and a byte-level tokenizer without a chat template, trained on the record."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", *special], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*RECORD.values()] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("form")
    save_model(folder / "model", "<|im_start|>", "<|im_end|>")
    (folder / "alpaca.jsonl").write_text(json.dumps(RECORD) + "\n")
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
    return folder


def plan_of(workspace: Path, *overrides: str) -> Plan:
    return describe(load_run_config(workspace / "config.yaml", overrides))


@pytest.fixture(scope="module")
def run(workspace: Path) -> Path:
    train(load_run_config(workspace / "config.yaml"), console=Console(quiet=True))
    return workspace / "run"


@pytest.fixture(scope="module")
def chatml_run(workspace: Path) -> Path:
    overrides = [f"output.dir={workspace / 'chatml'}", "data.template=chatml"]
    train(load_run_config(workspace / "config.yaml", overrides), console=Console(quiet=True))
    return workspace / "chatml"


@pytest.mark.slow(reason="trains several times")
@pytest.mark.parametrize("name", ["run", "chatml_run"])
def test_a_model_without_a_template_learns_an_answer_that_chat_gives_and_stops(
    name: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    done = forked_paca("chat", folder, "--prompt", RECORD["instruction"], "--max-new-tokens", 100)
    assert done.returncode == 0, done.stderr
    assert done.stdout == RECORD["output"] + "\n"
    assert done.stderr == ""


@pytest.mark.parametrize(("name", "end"), [("run", "</s>"), ("chatml_run", "<|im_end|>")])
def test_template_and_end_of_turn_come_out_of_merge_and_export(
    name: str, end: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(name)
    saved = AutoTokenizer.from_pretrained(folder / "adapter")
    assert (saved.eos_token, end_of_turn(saved)) == (end, end)
    for form in ("merged", "lora", "peft"):
        done = forked_paca("export", folder, "--to", form, "--output", tmp_path / form)
        assert done.returncode == 0, done.stderr
        found = AutoTokenizer.from_pretrained(tmp_path / form)
        assert (found.chat_template, found.eos_token) == (saved.chat_template, end)
    assert saved.eos_token_id in GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id
    merged = load_for_generation(tmp_path / "merged")
    question: dict[str, Any] = {"role": "user", "content": RECORD["instruction"]}
    assert "".join(stream_reply(merged, [question], max_new_tokens=100)) == RECORD["output"]


def test_the_plan_says_which_template_and_why(workspace: Path, tmp_path: Path) -> None:
    plan = plan_of(workspace)
    assert plan.data.template.startswith("alpaca, as the tokenizer has none; data.template names another (chatml, ")
    assert plan.data.template.endswith("</s> ends an answer")
    assert plan.config.data.template == "alpaca"
    assert "eos_token" not in plan.config.train
    chatml = plan_of(workspace, "data.template=chatml")
    assert chatml.data.template == "chatml (data.template); <|im_end|> ends an answer"
    assert chatml.config.train["eos_token"] == "<|im_end|>"
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")
    assert plan_of(workspace, f"data.template={file}").data.template == f"{file} (data.template); </s> ends an answer"


def test_text_is_trained_as_it_stands_and_has_no_place_for_a_template(workspace: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "2+2=", "completion": "4"}\n')
    plan = plan_of(workspace, f"data.train={file}")
    assert plan.data.template.startswith("none: ")
    assert plan.config.data.template is None
    with pytest.raises(PacaError, match=r"pairs\.jsonl holds plain text .*Leave data\.template out"):
        plan_of(workspace, f"data.train={file}", "data.template=chatml")


def test_texts_with_prompts_are_saved_without_the_models_template(workspace: Path, tmp_path: Path) -> None:
    model = workspace / "with-a-template"
    shutil.copytree(workspace / "model", model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")
    pairs, documents = tmp_path / "pairs.jsonl", tmp_path / "documents.jsonl"
    pairs.write_text('{"prompt": "2+2=", "completion": "4"}\n')
    documents.write_text('{"text": "2+2=4"}\n')
    for file, kept in ((pairs, False), (documents, True)):
        settings = (f"model.name={model}", f"data.train={file}", f"output.dir={tmp_path / file.stem}")
        assert ("left out, and not saved" in plan_of(workspace, *settings).data.template) is not kept
        train(load_run_config(workspace / "config.yaml", (*settings, "train.max_steps=1")), console=Console(quiet=True))
        loaded = load_for_generation(tmp_path / file.stem)
        assert (loaded.tokenizer.chat_template is not None) is kept
    assert AutoTokenizer.from_pretrained(model).chat_template is not None


def test_a_loss_on_all_tokens_is_asked_for_by_the_setting_of_the_form(workspace: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    chats.write_text(json.dumps({"messages": turns}) + "\n")
    of_form = {
        f"data.train={chats}": ("train.assistant_only_loss=false", "train.completion_only_loss=false"),
        f"data.train={workspace / 'alpaca.jsonl'}": (
            "train.completion_only_loss=false",
            "train.assistant_only_loss=false",
        ),
    }
    for data, (right, wrong) in of_form.items():
        assert plan_of(workspace, data, right).data.loss == "every token"
        said = plan_of(workspace, data, wrong).data.loss
        assert said.endswith(f"({wrong[:-6]} tells nothing of this form of data, {right[:-6]} does)")
        assert plan_of(workspace, data, right, wrong).data.loss == "every token"


def test_a_split_that_a_file_has_not_is_said(workspace: Path) -> None:
    said = plan_of(workspace, "data.split=validation").data.train.description
    assert said.endswith("; data.split: validation tells nothing here, as a file has no splits")
    assert "tells nothing" not in plan_of(workspace).data.train.description


@pytest.mark.parametrize(("trainer", "kept"), [("dpo", False), ("reward", True)])
def test_pairs_of_texts_are_learned_without_the_models_template(
    workspace: Path, tmp_path: Path, trainer: str, kept: bool
) -> None:
    model, pairs = workspace / "with-a-template", tmp_path / "pairs.jsonl"
    shutil.copytree(workspace / "model", model, dirs_exist_ok=True)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")
    pairs.write_text('{"prompt": "2+2=", "chosen": "4", "rejected": "5"}\n')
    settings = (
        f"model.name={model}",
        f"data.train={pairs}",
        f"train.trainer={trainer}",
        f"output.dir={tmp_path / 'run'}",
    )
    config = load_run_config(workspace / "config.yaml", (*settings, "train.max_steps=1"))
    assert ("left out, and not saved" in describe(config).data.template) is not kept  # type: ignore[operator]
    folder = train(config, console=Console(quiet=True)).folder
    assert (AutoTokenizer.from_pretrained(folder / "adapter").chat_template is not None) is kept


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.template=alpacca", r"no template and no file 'alpacca'\. Did you mean 'alpaca'\?"),
        ("data.template=missing.jinja", r"no file 'missing\.jinja'\. Named ones are alpaca, chatml"),
        ("data.template=llama3", r"in 'llama3' no token of this tokenizer ends an answer.*such as alpaca"),
        ("train.eos_token=<end>", r"train\.eos_token is '<end>', which is no token"),
        ("train.chat_template_path=x.jinja", r"can't be set here: it is data\.template"),
    ],
)
def test_a_form_that_cannot_work_is_refused(workspace: Path, override: str, message: str) -> None:
    with pytest.raises(PacaError, match=message):
        plan_of(workspace, override)


def test_a_run_keeps_the_system_message_that_all_its_data_begins_with(workspace: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Look"}, {"role": "assistant", "content": "Yes"}]
    rows = [{"messages": [{"role": "system", "content": "Be brief."}, *turns]}] * 2
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [f"output.dir={tmp_path / 'run'}", "train.max_steps=1", "data.template=chatml"]
    result = train(
        load_run_config(workspace / "config.yaml", [*overrides, f"data.train={tmp_path / 'chats.jsonl'}"]),
        console=Console(quiet=True),
    )
    assert result.summary is not None
    assert result.summary["data"]["system"] == "Be brief."
    assert opening(load_for_generation(result.folder), None) == rows[0]["messages"][:1]
    assert opening(load_for_generation(result.folder / "adapter"), "") == []


def test_chat_says_that_an_adapters_form_is_unknown(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / file).write_bytes((run / "adapter" / file).read_bytes())
    done = forked_paca("chat", folder, "--prompt", "a", "--max-new-tokens", 1)
    assert done.returncode == 0, done.stderr
    assert "No chat template is saved with this adapter" in done.stderr
    assert "continues each text as it stands" in done.stderr


def test_chat_says_that_a_template_may_not_be_the_adapters_own(run: Path, tmp_path: Path) -> None:
    bare = save_run(tmp_path / "bare")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (bare / "adapter" / file).unlink()  # as PEFT saves it
    assert unknown_form(load_for_generation(bare)) == (
        "No tokenizer is saved with this adapter, so the form that it was trained in is unknown. It is asked in the "
        f"chat template of {bare / 'base'}."
    )
    loaded = load_for_generation(run)
    assert unknown_form(loaded) is None
    summary = json.loads((run / "summary.json").read_text())
    shutil.copytree(run, tmp_path / "texts")
    summary["data"]["template"] = "none: the texts are trained as they stand, and the end-of-text token after each"
    (tmp_path / "texts" / "summary.json").write_text(json.dumps(summary))
    said = unknown_form(dataclasses.replace(loaded, adapter=tmp_path / "texts" / "adapter"))
    assert said == "It was trained on texts as they stand, but is asked in the chat template of its model."


def test_tasks_in_another_form_than_the_trainings_are_told_of(run: Path, tmp_path: Path) -> None:
    loaded = load_for_generation(run)
    assert other_form(loaded, in_template=True) is None
    assert str(other_form(loaded, in_template=False)).startswith("Asked in plain text. The run trained in a chat")
    shutil.copytree(run, tmp_path / "texts")
    summary = json.loads((run / "summary.json").read_text())
    summary["data"]["template"] = "none: the texts are trained as they stand, and the end-of-text token after each"
    texts = dataclasses.replace(loaded, adapter=tmp_path / "texts" / "adapter")
    (tmp_path / "texts" / "summary.json").write_text(json.dumps(summary))
    assert other_form(texts, in_template=False) is None
    assert str(other_form(texts, in_template=True)).startswith("Asked in the chat template. The run trained on texts")
    assert unknown_form(texts, base=True) is None
    (tmp_path / "texts" / "summary.json").write_text("{")  # no reason not to answer
    assert other_form(texts, in_template=True) is None
    assert unknown_form(texts) is None
