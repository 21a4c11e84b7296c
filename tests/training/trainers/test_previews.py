"""The example that a dry run shows, for trainers other than SFT."""

from __future__ import annotations

import io
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM

from paca.messages.errors import PacaError
from paca.training import describe, load_run_config, train
from paca.training.plan import Plan
from paca.training.prepare import prepare
from paca.training.reporting.data_preview import sample_section, show_sample
from paca.training.trainers import TRAINERS
from training.trainers.tiny_runs import CONFIGS, save_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_workspace(tmp_path_factory.mktemp("previews"))


def preview(plan: Plan) -> str:
    assert plan.data.sample is not None
    console = Console(file=io.StringIO(), width=200)
    show_sample(plan.data.sample, console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("trainer", ["dpo", "reward"])
def test_a_pair_is_shown_with_both_answers_marked(
    workspace: Path, trainer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    plan = describe(load_run_config(workspace / f"{trainer}.yaml"))
    chosen, rejected = preview(plan).split("The same with the answer that is rejected:")
    (question,) = (line.partition("?")[0] for line in chosen.splitlines() if "?" in line)
    assert "⟦yes" in chosen
    assert f"⟦no {question}" in rejected
    assert f"{question}?" in rejected
    assert "% of them" not in rejected
    assert any(text.endswith("(2 pairs)") for _, text in plan.lines())
    page = sample_section(plan.data.sample.as_dict())  # type: ignore[union-attr]
    assert page.count("<mark>") == 3  # one of them in the words above
    assert "The same with the answer that is rejected" in page


@pytest.mark.parametrize("trainer", ["dpo", "reward"])
def test_lengths_of_pairs_are_those_of_the_trainer(
    workspace: Path, trainer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    kind, made, both = TRAINERS[trainer], [], []

    def stop(config: object, trainer: Any, data: object) -> None:
        made.extend(kind.lengths(trainer.train_dataset))
        for row in trainer.train_dataset:
            prompt = len(row.get("prompt_ids", []))
            both.append(2 * prompt + len(row["chosen_ids"]) + len(row["rejected_ids"]))
        raise PacaError("enough")

    monkeypatch.setattr(kind, "check_prepared", stop)
    config = load_run_config(
        workspace / f"{trainer}.yaml", ["eval.before=false", f"output.dir={workspace / 'stopped'}"]
    )
    with pytest.raises(PacaError, match="enough"):
        train(config)
    plan = describe(config)
    assert plan.data.sample is not None
    assert (plan.data.sample.shortest, plan.data.sample.longest) == (min(made), max(made))
    assert plan.tokens_per_step == round(2 * statistics.mean(both))


def test_a_prompt_is_shown_whose_answer_the_model_writes(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    plan = describe(load_run_config(workspace / "grpo.yaml"))
    text = preview(plan)
    assert "?" in text
    assert text.index("⟦… the model's own answer⟧") > text.index("assistant")
    assert plan.data.sample is not None
    assert (plan.data.sample.share, plan.data.sample.unanswered, plan.data.sample.limit) == (None, 0, None)
    assert plan.tokens_per_step is None  # the answers are yet to be made


def test_a_text_is_shown_with_its_label(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    config = load_run_config(workspace / "classification.yaml")
    plan = describe(config)
    shown = preview(plan).splitlines()
    at = next(number for number, line in enumerate(shown) if "→" in line)
    text, label = shown[at - 1], shown[at]
    assert label == ("→ ⟦animal⟧" if "cat" in text or "dog" in text else "→ ⟦other⟧")
    tokenizer = AutoTokenizer.from_pretrained(workspace / "llama")
    sample = plan.data.sample
    assert sample is not None
    assert 0 <= len(tokenizer(text)["input_ids"]) - sample.median <= 1  # the middle of an even number of texts
    texts = prepare(config, whole=False).plan.data.train.dataset["text"]
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    assert plan.tokens_per_step == round(2 * statistics.mean(lengths))


def test_texts_of_several_sources_have_their_own_labels(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    for label in ("good", "bad"):
        rows = [{"text": f"It was {label}.", "label": label}] * 4
        (workspace / f"{label}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = ["data.train=[good.jsonl, bad.jsonl]", "data.eval=2"]
    text = preview(describe(load_run_config(workspace / "classification.yaml", sources)))
    assert "It was good.\n→ ⟦good⟧" in text
    assert "It was bad.\n→ ⟦bad⟧" in text


def test_an_encoder_is_no_language_model(workspace: Path, tmp_path: Path) -> None:
    """Its tokens see those that they are to foretell, and the loss of a dry run would look like any other."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = BertForMaskedLM(BertConfig(vocab_size=300, **size))
    encoder.save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(workspace / "llama").save_pretrained(tmp_path / "bert")
    for trainer, said in (("dpo", "model.name: It is an encoder .bert."), ("grpo", "an encoder")):
        config = load_run_config(workspace / f"{trainer}.yaml", [f"model.name={tmp_path / 'bert'}"])
        with pytest.raises(PacaError, match=said):
            describe(config)
    describe(load_run_config(workspace / "classification.yaml", [f"model.name={tmp_path / 'bert'}"]))
    encoder.config.is_decoder = True  # with it, attention looks back alone
    encoder.config.save_pretrained(tmp_path / "bert")
    describe(load_run_config(workspace / "dpo.yaml", [f"model.name={tmp_path / 'bert'}"]))


def test_a_checkpoint_without_its_output_head_is_found_by_the_dry_run(workspace: Path, tmp_path: Path) -> None:
    """Before it, the run was planned, and failed when the weights were loaded."""
    AutoModel.from_pretrained(workspace / "llama").save_pretrained(tmp_path / "trunk")
    config = AutoConfig.from_pretrained(workspace / "llama", tie_word_embeddings=False)
    config.save_pretrained(tmp_path / "trunk")
    AutoTokenizer.from_pretrained(workspace / "llama").save_pretrained(tmp_path / "trunk")
    with pytest.raises(PacaError, match=r"model\.name: The checkpoint .*trunk.* lacks weights of .*: lm_head\.weight"):
        describe(load_run_config(workspace / "dpo.yaml", [f"model.name={tmp_path / 'trunk'}"]))
    (tmp_path / "trunk" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(PacaError, match=r"model\.name: .*trunk"):
        describe(load_run_config(workspace / "dpo.yaml", [f"model.name={tmp_path / 'trunk'}"]))


def test_tokens_to_learn_are_asked_for_by_name(workspace: Path) -> None:
    """PEFT multiplies the number that is not given, and says that of a NoneType."""
    config = load_run_config(workspace / "dpo.yaml")
    config.method, config.adapter = "peft", {"peft_type": "PROMPT_TUNING"}
    with pytest.raises(PacaError, match=r"peft\.num_virtual_tokens is missing.*such as 20"):
        describe(config)


def test_a_network_of_convolutions_names_its_layers(workspace: Path) -> None:
    """No layer is linear but its head, which is trained whole."""
    changed = [f"model.name={workspace / 'efficientnet'}"]
    with pytest.raises(PacaError, match=r"Name layers with target_modules\. Its layers with weights are .*expand_conv"):
        describe(load_run_config(workspace / "image_classification.yaml", changed))


@pytest.mark.parametrize("count", [2, 40])
def test_a_dry_run_opens_some_images(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.chdir(workspace)
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for number in range(count):
            (tmp_path / label / f"{number}.png").write_bytes(b"no picture")
    config = load_run_config(workspace / "image_classification.yaml", [f"data.train={tmp_path}", "data.eval=null"])
    with pytest.raises(PacaError, match=r"image 0 .*a/0\.png\) can't be read as an image.*Remove or replace it"):
        describe(config)


def test_a_run_opens_all_images_before_it_trains(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a damaged one it could not go on: other data is another run."""
    monkeypatch.chdir(workspace)
    images = Path(shutil.copytree(workspace / "images", tmp_path / "images"))
    (images / "red" / "11.png").write_bytes(b"no picture")  # not among the sixteen
    config = load_run_config(workspace / "image_classification.yaml", [f"data.train={images}", "data.eval=null"])
    describe(config)
    with pytest.raises(PacaError, match=r"red/11\.png\) can't be read as an image: its form is not known\. Remove or"):
        prepare(config)


def test_images_that_become_different_in_size_are_refused(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    config = load_run_config(workspace / "image_classification.yaml")
    config.model.name = str(shutil.copytree(config.model.name, tmp_path / "vision"))
    settings = json.loads((tmp_path / "vision" / "preprocessor_config.json").read_text())
    settings |= {"do_resize": False}
    (tmp_path / "vision" / "preprocessor_config.json").write_text(json.dumps(settings))
    config.data.train = str(shutil.copytree(config.data.train, tmp_path / "images"))
    Image.new("RGB", (30, 20)).save(tmp_path / "images" / "blue" / "0.png")
    with pytest.raises(PacaError, match=r"of several sizes: 30 × 20 pixels of .*, 20 × 18 pixels of .* A batch takes"):
        describe(config)


def test_a_vision_model_without_its_image_processor_is_found_by_the_dry_run(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    config = load_run_config(workspace / "image_classification.yaml")
    copied = Path(shutil.copytree(config.model.name, tmp_path / "vision"))
    config.model.name = str(copied)
    describe(config)
    (copied / "preprocessor_config.json").unlink()
    with pytest.raises(PacaError, match=r"model\.name: .*vision.*preprocessor_config\.json"):
        describe(config)


def test_images_are_not_shown(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    assert "image_classification" in CONFIGS
    assert describe(load_run_config(workspace / "image_classification.yaml")).data.sample is None
