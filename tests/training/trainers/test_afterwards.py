"""What is done with finished runs: `paca merge`, `paca chat`, `paca evaluate`, and plain PEFT."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    pipeline,
)
from typer.testing import CliRunner

from forked_process import run_forked
from paca.cli import app
from paca.convert.exported import export_adapter
from paca.convert.imported import import_adapter
from paca.convert.merged import merge_to_folder
from paca.messages.errors import PacaError
from paca.planning import estimate
from paca.planning.memory_estimate import FRAMEWORK_BYTES
from paca.pretrained.generation import load_for_generation, load_saved, stream_reply
from paca.pretrained.purpose import classifier_in
from paca.training import RunResult, load_run_config, train
from paca.training.planned_run import target_of_run
from paca.training.trainers import TRAINERS

Finished = Callable[..., RunResult]


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_a_language_model_answers_and_merges(finished: Finished, tmp_path: Path, name: str) -> None:
    folder = finished(name).folder
    loaded = load_for_generation(folder)
    assert isinstance("".join(stream_reply(loaded, [{"role": "user", "content": "a?"}], max_new_tokens=3)), str)
    merged = merge_to_folder(folder, tmp_path / "merged")
    assert merged.difference is not None
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_an_exported_classifier_keeps_its_labels_without_paca(
    workspace: Path, finished: Finished, tmp_path: Path
) -> None:
    """By the code that `paca export` prints, and by that in the README: three labels, where a new head has two."""
    labelled = [json.loads(line) for line in (workspace / "labelled.jsonl").read_text().splitlines()]
    rows = [{**row, "label": "third"} if number % 3 == 0 else row for number, row in enumerate(labelled)]
    (tmp_path / "three.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder, output = finished("classification", f"data.train={tmp_path / 'three.jsonl'}").folder, tmp_path / "lora"
    done = CliRunner().invoke(app, ["export", str(folder), "--to", "lora", "--output", str(output)])
    assert done.exit_code == 0, done.output
    card = (output / "README.md").read_text()
    assert "Its labels: animal, other, third." in card
    assert "pipeline_tag: text-classification" in card
    printed = done.output.partition("paca is not needed:\n\n")[2]
    on_card = card.partition("```python\n")[2].partition("```")[0].replace("path/to/this/folder", str(output))
    with torch.no_grad():
        expected = load_saved(folder).model(input_ids=torch.tensor([[5, 6, 7]])).logits
    script = """
import json, sys, torch
sys.modules["paca"] = None  # an import of it fails
for code in sys.argv[1:]:
    scope = {}
    exec(code, scope)
    with torch.no_grad():
        found = scope["model"].eval()(input_ids=torch.tensor([[5, 6, 7]])).logits
    print(json.dumps([list(scope["model"].config.id2label.values()), found.tolist()]))
"""
    run = run_forked(script, printed, on_card)
    assert run.returncode == 0, run.stderr
    for line in run.stdout.splitlines():
        labels, logits = json.loads(line)
        assert labels == ["animal", "other", "third"]
        assert torch.allclose(torch.tensor(logits), expected, rtol=1e-5, atol=1e-6)


def test_an_image_classifiers_export_answers_as_the_run_without_paca(finished: Finished, tmp_path: Path) -> None:
    folder, output = finished("image_classification").folder, tmp_path / "lora"
    export_adapter(folder, output, "lora")
    loaded, pixels = load_saved(folder).model, torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = loaded(pixel_values=pixels).logits
    code = (output / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    scope: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(output)), scope)
    with torch.no_grad():
        found = scope["model"].eval()(pixel_values=pixels).logits
    assert list(scope["model"].config.id2label.values()) == ["blue", "red"]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    import_adapter(output, tmp_path / "back", base_model=classifier_base((output / "README.md").read_text()))
    assert classifier_in(tmp_path / "back") == classifier_in(folder)


def test_a_run_on_a_model_of_timm_keeps_its_labels(finished: Finished, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    from recipes.tiny_models import save_stand_in

    base = save_stand_in("timm/tf_efficientnetv2_l.in21k", tmp_path / "base")
    folder = finished("image_classification", f"model.name={base}", "paca.target_modules=.*conv_pw").folder
    assert any("classifier.weight" in name for name in load_file(folder / "adapter" / "adapter_model.safetensors"))
    kind, loaded = TRAINERS["image_classification"], load_saved(folder)
    held_out = kind.read(load_run_config(folder / "config.yaml")).eval
    assert held_out is not None
    with torch.no_grad():
        loss = loaded.model.eval()(**kind.collator(loaded.tokenizer)([*held_out.dataset])).loss  # type: ignore[attr-defined]
    assert float(loss) == pytest.approx(json.loads((folder / "summary.json").read_text())["eval_loss_after"], rel=1e-4)
    found = classifier_in(folder)
    assert found is not None
    assert found.labels == ["blue", "red"]
    merge_to_folder(folder, tmp_path / "merged")
    assert classifier_in(tmp_path / "merged") == found
    done = CliRunner().invoke(app, ["evaluate", str(folder)])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("to", ["lora", "peft"])
@pytest.mark.parametrize("name", ["reward", "classification", "image_classification"])
def test_the_exported_forms_of_a_classifier_are_classifiers(
    finished: Finished, tmp_path: Path, name: str, to: Literal["lora", "peft"]
) -> None:
    folder = finished(name).folder
    export_adapter(folder, tmp_path / to, to)
    assert classifier_in(tmp_path / to) == classifier_in(folder)
    if to == "lora":
        base = classifier_base((tmp_path / "lora/README.md").read_text())
        import_adapter(tmp_path / "lora", tmp_path / "back", base_model=base)
        assert classifier_in(tmp_path / "back") == classifier_in(folder)


@pytest.mark.parametrize(
    ("name", "what", "labels"),
    [
        ("reward", "a reward model", ["reward"]),
        ("classification", "a classifier of texts", ["animal", "other"]),
        ("image_classification", "a classifier of images", ["blue", "red"]),
    ],
)
def test_a_classifier_says_what_it_is_and_merges(
    finished: Finished, tmp_path: Path, name: str, what: str, labels: list[str]
) -> None:
    folder = finished(name).folder
    with pytest.raises(PacaError, match=f"is {what} .labels: {', '.join(labels)}.*paca merge"):
        load_for_generation(folder)
    merged = merge_to_folder(folder, tmp_path / "merged")
    assert merged.difference is not None  # compared with the adapted model, and the same within rounding
    auto = AutoModelForImageClassification if name.startswith("image") else AutoModelForSequenceClassification
    model = auto.from_pretrained(tmp_path / "merged")
    assert list(model.config.id2label.values()) == labels
    with pytest.raises(PacaError, match=what):
        load_for_generation(tmp_path / "merged")
    if name.startswith("image"):
        AutoImageProcessor.from_pretrained(tmp_path / "merged")


@pytest.mark.parametrize("name", ["classification", "image_classification"])
def test_a_head_that_knows_the_labels_in_another_order_is_kept_by_their_names(
    finished: Finished, tmp_path: Path, name: str
) -> None:
    merge_to_folder(finished(name).folder, tmp_path / "merged")
    auto = AutoModelForImageClassification if name.startswith("image") else AutoModelForSequenceClassification
    model = auto.from_pretrained(tmp_path / "merged")
    head = model.classifier if name.startswith("image") else model.score
    for parameter in head.parameters():
        parameter.data = parameter.data.flip(0)
    model.config.id2label = dict(enumerate(reversed(model.config.id2label.values())))
    model.config.label2id = {label: number for number, label in model.config.id2label.items()}
    shutil.copytree(tmp_path / "merged", tmp_path / "turned")
    model.save_pretrained(tmp_path / "turned")
    results = [finished(name, f"model.name={tmp_path / kind}", "train.max_steps=1") for kind in ("merged", "turned")]
    found = [json.loads((result.folder / "summary.json").read_text()) for result in results]
    assert found[0]["eval_loss_before"] == pytest.approx(found[1]["eval_loss_before"], rel=1e-5)
    assert found[0]["eval_loss_after"] == pytest.approx(found[1]["eval_loss_after"], rel=1e-4)
    assert classifier_in(results[1].folder).labels == list(model.config.id2label.values())


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("reward", "AutoModelForSequenceClassification.from_pretrained."),
        ("classification", 'pipeline("text-classification", FOLDER), to label new texts.'),
        ("image_classification", 'pipeline("image-classification", FOLDER), to label new images.'),
    ],
)
def test_who_asks_a_classifier_is_told_how_it_is_used(finished: Finished, name: str, how: str) -> None:
    with pytest.raises(PacaError, match=re.escape(f"transformers loads by {how}")):
        load_for_generation(finished(name).folder)


def test_transformers_pipeline_gives_a_merged_classifiers_labels(finished: Finished, tmp_path: Path) -> None:
    """As the guide has it: texts are cut as in the run, and the labels are the run's own for them."""
    folder, texts = finished("classification").folder, ["the cat sat", "a stone", "dog " * 40]
    merge_to_folder(folder, tmp_path / "merged")
    label = pipeline("text-classification", str(tmp_path / "merged"), truncation=True, max_length=24, device="cpu")
    loaded = load_saved(folder)
    for text, found in zip(texts, label(texts), strict=True):
        ids = loaded.tokenizer(text, truncation=True, max_length=24, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = loaded.model(input_ids=ids).logits.softmax(-1)[0]
        assert found["label"] == classifier_in(folder).labels[int(expected.argmax())]
        assert found["score"] == pytest.approx(float(expected.max()), rel=1e-4)


def test_the_trained_head_is_what_the_saved_adapter_brings(finished: Finished) -> None:
    """By the code in the adapter's card: the base with a new head, then the adapter."""
    folder = finished("classification").folder / "adapter"
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "a few input columns were trained, and `score` whole." in card
    assert "AutoModelForSequenceClassification.from_pretrained(" in card
    base = str(classifier_base(card))
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(base, config=config, ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(model, folder).eval()
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, load_saved(folder).model(input_ids=tokens).logits)


def classifier_base(card: str) -> str:
    line = next(line for line in card.splitlines() if line.startswith("model = AutoModelFor"))
    return line.partition('("')[2].partition('"')[0]


def test_a_whole_model_of_a_full_run_says_what_it_is(workspace: Path, tmp_path: Path) -> None:

    (tmp_path / "a.yaml").write_text(
        (workspace / "classification.yaml").read_text().replace("paca: {r: 4}", "full: {}")
    )
    train(load_run_config(tmp_path / "a.yaml", [f"output.dir={tmp_path / 'run'}"]), console=Console(quiet=True))
    assert classifier_in(tmp_path / "run") is not None
    with pytest.raises(PacaError, match="is a classifier of texts"):
        load_for_generation(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "batch", "lengths"),
    [
        ("reward", (2, None), "the longest example of"),
        ("classification", (2, None), "the longest example of"),
        ("image_classification", (2, 1), None),
        ("dpo", (2, None), "the longest example of"),
        ("grpo", (4, None), "the longest example of"),
    ],
)
def test_a_plan_of_memory_is_of_the_run_that_is_trained(
    workspace: Path, finished: Finished, name: str, batch: tuple[int, int | None], lengths: str | None
) -> None:
    target = target_of_run(workspace / f"{name}.yaml", [], "cpu", None, None)
    summary = finished(name).summary
    assert summary is not None
    assert estimate(target.model, target.setting, target.adapter).trainable == summary["trainable_parameters"]
    assert target.setting.batch_size == batch[0]
    assert batch[1] is None or target.setting.sequence_length == batch[1]
    assert (target.lengths or "").startswith(lengths or "")
    assert target.counts == ("images" if lengths is None else "tokens")


def test_what_is_planned_for_a_gpu_multiplies_as_it_does_there(workspace: Path) -> None:
    """With weights in float32 a run there has autocast, also where the plan is made without a GPU."""
    settings = [target_of_run(workspace / "reward.yaml", [], device, 32, 2).setting for device in ("cpu", "cuda")]
    assert [setting.autocast for setting in settings] == [None, torch.bfloat16]


def test_data_that_is_not_here_leaves_the_length_and_the_labels_open(workspace: Path) -> None:
    changes = ["data.train=stanfordnlp/imdb", "data.eval=stanfordnlp/imdb[test]", "train.max_length=40"]
    target = target_of_run(workspace / "classification.yaml", changes, "cpu", None, None)
    assert target.setting.sequence_length == 40
    assert target.lengths == "train.max_length: stanfordnlp/imdb is not a local file, so it was not read"
    both = [f"data.train=[{workspace / 'labelled.jsonl'}, stanfordnlp/imdb]", *changes[1:]]
    assert target_of_run(workspace / "classification.yaml", both, "cpu", None, None).lengths == target.lengths
    assert target.model.config.num_labels == 2
    images = target_of_run(workspace / "image_classification.yaml", changes[:2], "cpu", None, None)
    assert images.lengths is None


def test_a_plan_of_images_counts_images(workspace: Path) -> None:
    command = ["plan", str(workspace / "image_classification.yaml"), "--rate", "1", "--bandwidth", "1"]
    printed = CliRunner().invoke(app, command)
    assert "2 images per pass" in printed.stdout
    assert "images/s" in printed.stdout
    refused = CliRunner().invoke(app, [*command, "--set", "model.name=llama3-8b"])
    assert "llama3-8b is a language model" in str(refused.exception)


def test_a_search_for_what_fits_leaves_a_classifiers_weights_as_they_are(workspace: Path) -> None:
    """In 4 bits they might fit sooner, but the new head would be quantized before it is trained."""
    command = ["plan", str(workspace / "image_classification.yaml"), "--rate", "1", "--bandwidth", "1"]
    just_above = f"{FRAMEWORK_BYTES['cpu'] // 2**20 + 1}MiB"
    found = CliRunner().invoke(app, [*command, "--memory", just_above, "--json"])
    assert found.exception is None
    assert {one["setting"]["quantization"] for one in json.loads(found.stdout)["candidates"]} == {None}
    refused = CliRunner().invoke(app, [*command, "--quantization", "nf4"])
    assert "not with classifiers" in str(refused.exception)
