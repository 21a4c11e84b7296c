"""Every recipe runs: for two steps, with a tiny model of its architecture and rows with the schema of its data."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets
import pytest
from rich.console import Console
from safetensors.torch import load_file
from tools.plan_recipes import PAGE, Recipe, page_with, planned_memory, recipes, table

from paca.data.sources import HUB_SOURCE
from paca.evaluation.own_data import scorer
from paca.pretrained.published_shapes import SHAPES, TIMM, timm_config
from paca.training import load_run_config, train
from recipes.hub_rows import HUB
from recipes.tiny_models import MODELS, save_stand_in

RECIPES = {recipe.name: recipe for recipe in recipes() if recipe.path.stem != "demo"}  # the demo has tests of its own
ADVICE = "run: python tools/plan_recipes.py"
GATED = re.compile("meta-llama/|mistralai/|google/gemma")
SHORT = {
    "train.max_steps": 2,
    "train.per_device_train_batch_size": 2,
    "train.per_device_eval_batch_size": 2,
    "train.gradient_accumulation_steps": 1,
    "train.save_strategy": "no",
    "train.eval_strategy": "no",
    "train.dataloader_num_workers": 0,
    "eval.limit": 2,
}
BY_TRAINER = {"grpo": {"train.num_generations": 2, "train.max_completion_length": 4}}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the tiny model in place of a hub id."""
    folder = tmp_path_factory.mktemp("models")
    return functools.cache(lambda name: save_stand_in(name, folder / name.replace("/", "--")))


@pytest.fixture(autouse=True, scope="module")
def around() -> Iterator[None]:
    """Left out: the report and the plan of memory, which take most of the time, and have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("write_report", "memory_warning"):
            patch.setattr(import_module("paca.training.run"), name, lambda *_: None)
        yield


@pytest.fixture(autouse=True, scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Data sets of the hub are those of `hub_rows`."""
    load = datasets.load_dataset

    def load_dataset(name: str, config: str | None = None, *, split: str | None = None, **options: Any) -> Any:
        if name not in HUB:
            return load(name, config, split=split, **options)
        assert split is not None
        return HUB[name].load(config, split)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load_dataset)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache"))
        yield


def shortened(recipe: Recipe, model: Path, output: Path) -> list[str]:
    """What changes of a recipe for its test: names and sizes, nothing that decides how it is trained."""
    changes: dict[str, Any] = {"model.name": model, "output.dir": output, **SHORT}
    changes |= BY_TRAINER.get(recipe.content["train"].get("trainer", "sft"), {})
    if isinstance(recipe.content["data"]["eval"], int):
        changes["data.eval"] = 2
    if recipe.content.get("eval", {}).get("metric") == "exact_match":
        changes["eval.max_new_tokens"] = 4
    return [f"{key}={value}" for key, value in changes.items()]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(name: str, stand_in: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = RECIPES[name]
    model = stand_in(recipe.content["model"]["name"])
    config = load_run_config(recipe.path, shortened(recipe, model, tmp_path / "run"))
    result = train(config, console=Console(quiet=True), scorer=scorer(config.eval))
    assert result.summary is not None
    assert result.summary["steps"] == 2
    adapter = load_file(result.folder / "adapter" / "adapter_model.safetensors")
    learned = [value for key, value in adapter.items() if key.endswith(("paca_delta", "lora_B.weight"))]
    assert learned
    if recipe.content["train"].get("trainer") != "grpo":  # two random answers may be rewarded alike
        assert all(value.any() for value in learned)


def test_stand_ins_have_the_architecture_that_is_planned_for() -> None:
    for recipe in RECIPES.values():
        if recipe.plan is not None:
            stand_in = MODELS[recipe.content["model"]["name"]]
            planned_for = timm_config(recipe.shape) if recipe.shape in TIMM else SHAPES[recipe.shape]
            assert planned_for.model_type == stand_in.model_type, recipe.name


def test_there_are_no_stand_ins_without_a_recipe() -> None:
    sections = [recipe.content for recipe in RECIPES.values()]
    assert {section["model"]["name"] for section in sections} == set(MODELS)
    sources = [source for section in sections for source in (section["data"]["train"], section["data"]["eval"])]
    matches = [HUB_SOURCE.fullmatch(source) for source in sources if isinstance(source, str)]
    assert {match["id"] for match in matches if match is not None} == set(HUB)


@pytest.mark.parametrize("name", RECIPES)
def test_a_header_names_its_own_file_and_recipes_that_exist(name: str) -> None:
    recipe = RECIPES[name]
    header = recipe.text[: recipe.text.index("\nmodel:")]
    assert all(line.startswith("# ") for line in header.splitlines())
    assert "\n# Source: " in header
    assert ("\n# Licence: " in header) == bool(GATED.match(recipe.content["model"]["name"]))
    assert recipe.plan is not None
    assert recipe.plan["arguments"].startswith(f"{name} --set model.name=")
    assert set(re.findall(r"recipes/\S+[.]yaml", header)) <= {name}
    stems = {other.path.stem for other in RECIPES.values()}
    assert set(re.findall(r"runs/([^\s`]+)", header)) <= stems
    assert {Path(file).stem for file in re.findall(r"[^\s/]+[.]yaml", header)} <= stems


def test_no_two_recipes_write_into_one_run_folder() -> None:
    stems = [recipe.path.stem for recipe in RECIPES.values()]
    assert len(set(stems)) == len(stems)


@pytest.mark.parametrize(("folder", "card"), [("24gb", 24), ("80gb", 80)])
def test_a_recipe_for_a_card_fits_it_by_its_plan(folder: str, card: int) -> None:
    of_card = [recipe for recipe in RECIPES.values() if recipe.path.parent.name == folder]
    assert of_card
    for recipe in of_card:
        assert recipe.plan is not None
        assert float(recipe.plan["memory"].partition(" GiB")[0]) < card, recipe.name


@pytest.mark.parametrize(
    "name",
    [
        "recipes/24gb/gemma3-1b-sft.yaml",
        "recipes/24gb/qwen3-14b-sft.yaml",
        "recipes/paper/mmlu-llama3-8b-lora.yaml",
        "recipes/24gb/llama3.2-1b-classification.yaml",
        "recipes/24gb/qwen3-4b-dpo.yaml",
        "recipes/24gb/qwen3-4b-grpo.yaml",
    ],
)
def test_the_memory_in_a_header_is_what_is_planned(name: str) -> None:
    plan = RECIPES[name].plan
    assert plan is not None
    assert plan["memory"] == planned_memory(RECIPES[name]), ADVICE


def test_the_page_lists_all_recipes() -> None:
    assert PAGE.read_text() == page_with(table()), ADVICE
