"""What a run may not be continued with, each named: another model by content, data, columns, seed, or steps."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PhobertTokenizer

from paca.data import Examples, load_images
from paca.messages.errors import PacaError
from paca.pretrained.content import model_content
from paca.training import RunResult, load_run_config, train
from paca.training.config.adapter_settings import with_defaults
from paca.training.config.run_config import (
    CalibrationSection,
    DataSection,
    EvalSection,
    ModelSection,
    OutputSection,
    RunConfig,
)
from paca.training.folder import same_run
from paca.training.folder.run_folder import RunFolder
from paca.training.folder.same_run import check_same_run, check_same_settings, inputs_of, told_of_finished

Resume = Callable[..., RunResult]


@pytest.fixture(scope="module")
def begun(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a model of its own, and a run that died after its two steps."""
    place = tmp_path_factory.mktemp("begun")
    shutil.copytree(config_file.parent / "model", place / "model")
    resume_in(place, config_file, resume=False)
    return place


def resume_in(
    place: Path, config_file: Path, *overrides: str, resume: bool = True, console: Console | None = None
) -> RunResult:
    settings = [
        "train.max_steps=2",
        "train.save_steps=1",
        f"model.name={place / 'model'}",
        f"output.dir={place / 'run'}",
    ]
    return train(
        load_run_config(config_file, [*settings, *overrides]), resume=resume, console=console or Console(quiet=True)
    )


@pytest.fixture
def resume(begun: Path, config_file: Path) -> Iterator[Resume]:
    kept = {file: file.read_bytes() for file in (begun / "model").iterdir()}
    (begun / "run" / "summary.json").unlink(missing_ok=True)
    yield lambda *overrides, **options: resume_in(begun, config_file, *overrides, **options)
    for file, content in kept.items():
        file.write_bytes(content)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("paca.selection=weight_norm", r"paca\.selection: random_blocks → weight_norm"),
        ("paca.random_seed=5", r"paca\.random_seed: \S+ → 5"),
        ("train.seed=5", r"train\.seed: 42 → 5"),
        ("data.eval=4", r"data\.eval: 8 → 4"),
    ],
)
def test_another_selection_seed_or_share_of_the_data_is_refused(resume: Resume, override: str, named: str) -> None:
    with pytest.raises(PacaError, match=rf"(?m)^  {named}$"):
        resume(override)


def test_other_settings_are_refused_before_the_plan_of_them_is_shown(resume: Resume) -> None:
    shown = io.StringIO()
    with pytest.raises(PacaError, match=r"(?s)The settings differ from those.*config\.yaml --resume\. To train"):
        resume("train.seed=5", console=Console(file=shown))
    assert shown.getvalue() == ""


def change_a_weight(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def change_the_config(model: Path) -> None:
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "attention_dropout": 0.1}))


def change_the_tokenizer(model: Path) -> None:
    file = model / "tokenizer.json"
    file.write_text(file.read_text().replace('"a":', '"?":').replace('"b":', '"a":').replace('"?":', '"b":'))


@pytest.mark.parametrize("change", [change_a_weight, change_the_config, change_the_tokenizer])
def test_another_model_of_the_same_name_is_refused(resume: Resume, begun: Path, change: Callable[[Path], None]) -> None:
    change(begun / "model")
    with pytest.raises(PacaError, match=r"The content of model\.name \(.*model: .*\) is no longer what the run in"):
        resume()


def test_a_tokenizer_that_is_written_in_python_counts(tmp_path: Path) -> None:
    (tmp_path / "bpe.codes").write_text("a b 1\n")
    found = set()
    for words in ("a 1\nb 1\n", "b 1\na 1\n"):
        (tmp_path / "vocab.txt").write_text(words)
        tokenizer = PhobertTokenizer(str(tmp_path / "vocab.txt"), str(tmp_path / "bpe.codes"))
        found.add(model_content(nn.Linear(1, 1, device="meta"), tokenizer))
    assert len(found) == 2


def test_the_number_of_processes_may_change_if_a_step_stays_what_it_is(resume: Resume, begun: Path) -> None:
    file = RunFolder(begun / "run").inputs
    began = file.read_text()
    file.write_text(json.dumps({**json.loads(began), "processes": "2"}))
    with pytest.raises(PacaError, match=r"began with 2 processes and 16 sequences per step; with 1 this would be 8"):
        resume()
    assert resume("train.gradient_accumulation_steps=2").summary is not None
    file.write_text(began)


def test_without_its_config_a_run_is_not_continued(resume: Resume, begun: Path) -> None:
    config = RunFolder(begun / "run").config
    kept = config.read_text()
    config.unlink()
    with pytest.raises(PacaError, match=r"config\.yaml is not there"):
        resume()
    config.write_text(kept)


@pytest.mark.parametrize(
    "left", ["", "[]", "train: 3", "train: {per_device_train_batch_size: many}", "model: {name: a}"]
)
def test_a_damaged_config_is_named(resume: Resume, begun: Path, left: str) -> None:
    config = RunFolder(begun / "run").config
    kept = config.read_text()
    config.write_text(left)
    with pytest.raises(PacaError, match=r"config\.yaml"):
        resume()
    config.write_text(kept)


NUMBERS = ("two", "", "-1", "9" * 5000)
PROCESSES = [json.dumps({"data.train": "0", "model.name": "0", "processes": number}) for number in NUMBERS]


@pytest.mark.parametrize("left", [None, "", "[]", "{}", '{"data.train": "0", "processes": "1"}', *PROCESSES])
def test_without_its_hashes_a_run_is_not_continued(resume: Resume, begun: Path, left: str | None) -> None:
    hashes = RunFolder(begun / "run").inputs
    kept = hashes.read_text()
    hashes.unlink()
    if left is not None:
        hashes.write_text(left)
    with pytest.raises(PacaError, match=r"inputs\.json is not there or damaged.*Put it back, or start anew"):
        resume()
    hashes.write_text(kept)


def test_images_in_files_count_by_their_bytes(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        Image.new("RGB", (2, 2)).save(tmp_path / label / "0.bmp")

    def content() -> str:
        return load_images(str(tmp_path)).content()

    before, file = content(), tmp_path / "b" / "0.bmp"
    assert content() == before
    kept = file.read_bytes()
    file.write_bytes(kept[:-1] + b"1")  # as long as before, and as old
    os.utime(file, ns=(0, 0))
    assert content() != before
    file.write_bytes(kept)
    assert content() == before


EXAMPLES = Examples(Dataset.from_dict({"prompt": ["a"]}), "prompts", "a.jsonl", "")


def begin(place: Path, settings: dict[str, Any]) -> tuple[RunFolder, RunConfig, dict[str, str]]:
    """A run folder as it is at the first step, its config and what its hashes are."""
    config = RunConfig(
        model=ModelSection("llama"),
        data=DataSection("/data/a.jsonl"),
        calibration=CalibrationSection(),
        eval=EvalSection(),
        output=OutputSection(str(place / "run")),
        train=settings,
    )
    folder = RunFolder(place / "run")
    began = {**inputs_of(config, EXAMPLES, None), "model.name": "0"}
    folder.clear(began)
    folder.config.write_text(config.to_yaml())
    check_same_run(folder, config, began)
    return folder, config, began


@pytest.mark.parametrize("key", ["accelerator_config", "deepspeed", "fsdp_config"])
def test_the_file_that_a_setting_names_counts(tmp_path: Path, key: str) -> None:
    file = tmp_path / "settings.json"
    file.write_text('{"use_seedable_sampler": true}')
    folder, config, began = begin(tmp_path, {key: str(file), "generation_kwargs": "{}", "run_name": str(file)})
    file.write_text('{"use_seedable_sampler": false}')
    now = inputs_of(config, EXAMPLES, None)
    with pytest.raises(PacaError, match=rf"The content of train\.{key} \({file}\) is no longer what the run in"):
        check_same_run(folder, config, now)
    folder.inputs.write_text(json.dumps({name: began[name] for name in began if name != f"train.{key}"}))
    check_same_run(folder, config, now)  # begun before it was kept


def test_sources_that_were_named_from_the_working_folder_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config, began = begin(tmp_path, {"seed": 1})
    monkeypatch.chdir(tmp_path)
    config.data.train = ["a/x.jsonl", "b/x.jsonl"]
    folder.config.write_text(config.to_yaml())
    config.data.train = [str(tmp_path / "a/x.jsonl"), str(tmp_path / "b/x.jsonl")]
    check_same_run(folder, config, began)
    config.data.train = [*config.data.train[:1], str(tmp_path / "c/x.jsonl")]
    with pytest.raises(PacaError, match=r"data\.train: "):
        check_same_run(folder, config, began)


def test_processes_with_other_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, config, _ = begin(tmp_path, {"learning_rate": 1e-3, "seed": 1})
    check_same_settings(config)
    other = copy.deepcopy(config)
    other.output.dir, other.data.train, other.train["dataloader_num_workers"] = "b", str(tmp_path), 2
    monkeypatch.setattr(same_run, "gather_object", lambda mine: [*mine, *mine, other.as_dict()])
    check_same_settings(config)  # a folder may have another name on another machine
    config.data.train, other.data.train = ["/a/x", "/a/y"], ["/b/x", "/b/y"]
    check_same_settings(config)
    other.data.train = ["/b/x"]
    with pytest.raises(PacaError, match=r"data\.train is \['/a/x', '/a/y'\] in process 0, and \['/b/x'\] in process 2"):
        check_same_settings(config)
    config.data.train, other.data.train = "/a", "/b"
    other.train["learning_rate"] = 2e-3
    with pytest.raises(PacaError, match=r"train\.learning_rate is 0\.001 in process 0, and 0\.002 in process 2\."):
        check_same_settings(config)


def test_the_file_of_a_reward_function_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    rewards = tmp_path / "rewards_that_change.py"
    rewards.write_text("def short(completions): return [1.0 for _ in completions]\n")
    settings = {"trainer": "grpo", "reward_funcs": ["exact_match", "rewards_that_change:short"]}
    folder, config, began = begin(tmp_path, settings)
    folder.config.write_text(config.to_yaml().replace("  unusable: refuse\n", ""))  # begun before the key was there
    check_same_run(folder, config, began)
    rewards.write_text("def short(completions): return [2.0 for _ in completions]\n")
    with pytest.raises(
        PacaError, match=r"content of train\.reward_funcs \(rewards_that_change:short, .*change\.py\) is"
    ):
        check_same_run(folder, config, inputs_of(config, EXAMPLES, None))


@pytest.mark.parametrize("part", ["", "adapter"])
def test_the_files_of_a_reward_model_count(tmp_path: Path, part: str) -> None:
    weights = tmp_path / "scorer" / part / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"1")
    (tmp_path / "scorer" / "log.txt").touch()
    settings = {"trainer": "grpo", "reward_funcs": [str(tmp_path / "scorer"), "exact_match"]}
    folder, config, began = begin(tmp_path, settings)
    check_same_run(folder, config, began)
    (tmp_path / "scorer" / "log.txt").write_text("more")
    check_same_run(folder, config, inputs_of(config, EXAMPLES, None))
    weights.write_bytes(b"2")
    with pytest.raises(PacaError, match=r"content of train\.reward_funcs \(.*scorer, .*model\.safetensors\) is"):
        check_same_run(folder, config, inputs_of(config, EXAMPLES, None))


def test_a_finished_run_is_told_of_unless_other_settings_are_asked_for(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    config = RunConfig(
        model=ModelSection("llama"),
        data=DataSection("a.jsonl"),
        calibration=CalibrationSection(),
        eval=EvalSection(),
        output=OutputSection(str(tmp_path)),
        adapter={"r": 8},
        train={"activation_checkpointing": True, "learning_rate": 1e-3, "max_steps": 2},
    )
    folder.config.write_text(replace(config, adapter=with_defaults("paca", {"r": 8})).to_yaml())
    folder.summary.write_text('{"steps": 2}')
    for given in ({}, {"learning_rate": "auto"}, {"gradient_checkpointing": True}):
        told = told_of_finished(folder, replace(config, train={**given, "max_steps": 2}))
        assert told.endswith("after 2 steps with the settings in its config.yaml; there is nothing to resume.")
    chosen = with_defaults("paca", {"r": 8, "target_modules": ["q_proj", "v_proj"]})
    folder.config.write_text(replace(config, adapter=chosen).to_yaml())
    for names in (["v_proj", "q_proj"], ["q_proj", "v_proj"]):  # a set of them
        given = {"r": 8, "target_modules": names}
        assert "nothing to resume" in told_of_finished(folder, replace(config, adapter=given))
    with pytest.raises(PacaError, match=r"other settings:\n  train.max_steps: 2 → 9\n.*--set model.adapter=") as error:
        told_of_finished(folder, replace(config, adapter=chosen, train={"max_steps": 9}))
    assert f"--set model.adapter={tmp_path}" in str(error.value)
    with pytest.raises(PacaError, match=r"other settings:\n  paca.target_modules: .* → \[k_proj\]\n"):
        told_of_finished(folder, replace(config, adapter={"r": 8, "target_modules": ["k_proj"]}))
    with pytest.raises(PacaError, match=r"other settings:\n  train.max_steps: 2 → 3\n"):
        told_of_finished(folder, replace(config, adapter=chosen, train={"max_steps": 3}))


def test_a_finished_run_is_not_that_of_a_file_from_which_keys_were_taken(tmp_path: Path) -> None:
    folder, given = RunFolder(tmp_path), {"train": {"max_steps": 2}, "adapter": {"r": 8, "paca_alpha": 4}}
    run = {"model": ModelSection("llama", dtype="float32"), "data": DataSection("a.jsonl", limit=9), **given}
    rest = (CalibrationSection(), EvalSection(metric="loss"), OutputSection(str(tmp_path)))
    sections = dict(zip(("calibration", "eval", "output"), rest, strict=True))
    config = RunConfig(**run, **sections)
    resolved = replace(
        config, data=replace(config.data, template="chatml"), adapter=with_defaults("paca", given["adapter"])
    )
    folder.config.write_text(resolved.to_yaml())
    folder.summary.write_text('{"steps": 2}')
    assert "nothing to resume" in told_of_finished(folder, config)  # the template is one that the run found
    for key, other in {
        "train.max_steps: 2 → -1": {"train": {}},
        "paca.r: 8 → 64": {"adapter": {"paca_alpha": 4}},
        "data.limit: 9 → null": {"data": DataSection("a.jsonl")},
        "eval.metric: loss → null": {"eval": EvalSection()},
        "lora.r: null → 8": {"method": "lora", "adapter": {}},
    }.items():
        with pytest.raises(PacaError, match=rf"other settings:\n(.*\n)*  {key}\n"):
            told_of_finished(folder, replace(config, **other))
