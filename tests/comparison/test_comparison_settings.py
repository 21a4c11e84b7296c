"""A folder holds one comparison: who comes with another is told what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from comparison.small_comparison import COMMON, small_comparison
from paca.comparison.flags import Rates
from paca.comparison.methods import Method
from paca.comparison.schedule import Job
from paca.comparison.settings import Comparison, SettingsFile, load_common, run_sections
from paca.messages.errors import PacaError

KEPT = {"paca": {"sections": {"paca": {"r": 16}}, "measured": {}, "note": ""}}


def begun(folder: Path, **settings: Any) -> Comparison:
    comparison = small_comparison(folder, **settings)
    SettingsFile(comparison).write(KEPT)
    (folder / "runs").mkdir()
    return comparison


def test_the_same_comparison_finds_what_came_out(tmp_path: Path) -> None:
    assert SettingsFile(begun(tmp_path)).read() == KEPT


@pytest.mark.parametrize("changed", [{"rates": Rates([5e-3])}, {"seeds": [0, 1, 2]}, {"methods": "paca,lora,full"}])
def test_rates_seeds_and_methods_may_be_added(tmp_path: Path, changed: dict[str, Any]) -> None:
    begun(tmp_path)
    assert SettingsFile(small_comparison(tmp_path, **changed)).read() == KEPT


def test_methods_of_an_earlier_call_stay_known(tmp_path: Path) -> None:
    begun(tmp_path)
    file = SettingsFile(small_comparison(tmp_path, "full"))
    file.read()
    file.write({"full": KEPT["paca"]})
    other = small_comparison(tmp_path)
    other.methods[1] = other.methods[1].with_rank(99)
    with pytest.raises(PacaError, match=r"methods\.lora\.lora\.r: 8 → 99"):
        SettingsFile(other).read()


def test_another_config_is_refused_with_what_differs(tmp_path: Path) -> None:
    begun(tmp_path)
    other = small_comparison(tmp_path, equal=("time",))
    other.common = {**COMMON, "train": {"max_steps": 7, "optim": "sgd"}}
    with pytest.raises(PacaError) as caught:
        SettingsFile(other).read()
    message = str(caught.value)
    assert "  run.train.max_steps: 6 → 7" in message
    assert "  run.train.optim: null → sgd" in message
    assert "  equal: null → time" in message
    assert "Give another --output" in message


def test_settings_without_effect_may_come_and_go(tmp_path: Path) -> None:
    """Whoever reads that they have none takes them out, and an earlier state kept them."""
    comparison = small_comparison(tmp_path)
    seeded = {**COMMON["paca"], "random_seed": 7}
    comparison.common = {**COMMON, "train": {"max_steps": 6, "seed": 7}, "paca": seeded, "eval": {"after": False}}
    comparison.methods[0] = Method("paca", {"paca": seeded})
    SettingsFile(comparison).write(KEPT)
    (tmp_path / "runs").mkdir()
    plain = small_comparison(tmp_path)
    plain.common = {**COMMON, "eval": {}}
    assert SettingsFile(plain).read() == KEPT


@pytest.mark.parametrize("key", ["train", "one of train", "eval", "template"])
def test_data_whose_content_has_changed_is_refused_by_its_name(tmp_path: Path, key: str) -> None:
    file = tmp_path / "file.jsonl"
    file.write_text('{"text": "one"}\n')
    named = {"train": ["some/data", str(file)]} if key == "one of train" else {key: str(file)}
    common = {**COMMON, "data": {**COMMON["data"], **named}}
    comparison = small_comparison(tmp_path / "compared")
    comparison.common = common
    SettingsFile(comparison).write(KEPT)
    (comparison.path / "runs").mkdir()
    assert SettingsFile(comparison).read() == KEPT
    file.write_text('{"text": "two"}\n')
    with pytest.raises(PacaError, match=f"the content of {file} is not what it was") as caught:
        SettingsFile(comparison).read()
    assert "Give another --output" in str(caught.value)


def test_a_model_whose_weights_have_changed_is_refused(tmp_path: Path) -> None:
    weights = tmp_path / "model" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(bytes(100_000))
    comparison = small_comparison(tmp_path / "compared")
    comparison.common = {**COMMON, "model": {"name": str(weights.parent)}}
    SettingsFile(comparison).write(KEPT)
    (comparison.path / "runs").mkdir()
    assert SettingsFile(comparison).read() == KEPT
    weights.write_bytes(bytes(50_000) + b"\1" + bytes(49_999))
    with pytest.raises(PacaError, match=f"the content of {weights.parent} is not what it was"):
        SettingsFile(comparison).read()


def test_rows_are_runs_too(tmp_path: Path) -> None:
    """After their folders were deleted for the space, rows of other settings were taken for those asked for."""
    SettingsFile(small_comparison(tmp_path)).write(KEPT)
    (tmp_path / "runs.jsonl").touch()
    assert SettingsFile(small_comparison(tmp_path)).read() == KEPT
    with pytest.raises(PacaError, match="holds a comparison with other settings"):
        SettingsFile(small_comparison(tmp_path, equal=("time",))).read()
    (tmp_path / "settings.json").unlink()
    with pytest.raises(PacaError, match="holds the rows of runs"):
        SettingsFile(small_comparison(tmp_path)).read()
    (tmp_path / "summary.json").touch()
    with pytest.raises(PacaError, match="is the folder of a run"):
        SettingsFile(small_comparison(tmp_path)).read()


@pytest.mark.parametrize("content", [b'{"asked": ', b"[1]", b"\xff", b"{}"])
def test_damaged_settings_are_told(tmp_path: Path, content: bytes) -> None:
    comparison = begun(tmp_path)
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(PacaError, match=r"settings\.json is damaged.* Give another --output"):
        SettingsFile(comparison).read()


def test_without_runs_another_comparison_takes_the_folder_and_the_same_one_what_was_measured(tmp_path: Path) -> None:
    SettingsFile(small_comparison(tmp_path)).write(KEPT)
    assert SettingsFile(small_comparison(tmp_path)).read() == KEPT
    assert SettingsFile(small_comparison(tmp_path, equal=("time",))).read() == {}


def test_factors_for_more_columns_than_the_default_may_be_shared(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"  # a method's own file says how many columns there are
    config.write_text("model: {name: some/model}\ndata: {train: some/data, eval: 2}\ntrain: {factor_rank: 64}\n")
    assert load_common(config)[0]["train"] == {"factor_rank": 64}


def test_a_run_without_held_out_data_cannot_be_compared(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: {name: some/model}\ndata: {train: some/data}\n")
    with pytest.raises(PacaError, match=r"data\.eval is missing"):
        load_common(config)


def test_the_model_as_it_came_is_scored_once(tmp_path: Path) -> None:
    comparison = small_comparison(tmp_path)
    comparison.common = {**COMMON, "eval": {"metric": "exact_match", "before": True}}
    jobs = [Job("paca", 1e-3, 0), Job("paca", 3e-3, 0), Job("lora", 1e-3, 0), Job("paca", 1e-3, 1)]
    configs = [yaml.safe_load(comparison.config_file(job).read_text()) for job in jobs]
    assert [config["eval"]["before"] for config in configs] == [True, False, False, False]
    assert all(config["eval"]["after"] for config in configs)


def test_a_run_that_has_begun_keeps_what_it_scores_and_follows_its_folder(tmp_path: Path) -> None:
    common = {**COMMON, "eval": {"metric": "exact_match", "before": True}}
    before, after = (
        small_comparison(tmp_path / "before"),
        small_comparison(tmp_path / "after", rates=Rates([3e-3, 1e-3])),
    )
    before.common = after.common = common
    job = Job("paca", 1e-3, 0)
    before.config_file(job)
    before.folder(job).path.mkdir(parents=True)
    (tmp_path / "before").rename(tmp_path / "after")
    config = yaml.safe_load(after.config_file(job).read_text())
    assert config["eval"]["before"]  # it was the first one, and is not any more
    assert config["output"]["dir"] == str(after.folder(job).path)


@pytest.mark.parametrize(
    ("method", "rate", "expected"),
    [
        (Method("paca", {"paca": {"r": 4, "paca_alpha": 4, "target_modules": ["q"]}}), None, 0.5),
        (Method("wide", {"paca": {"r": 64, "paca_alpha": 4, "target_modules": ["q"]}}), None, "auto"),
        (Method("lora", {"lora": {"r": 4}}), None, "auto"),
        (Method("paca", {"paca": {"r": 4}}), 1e-3, 1e-3),
    ],
)
def test_without_a_rate_the_yaml_s_own_method_takes_the_yaml_s(
    tmp_path: Path, method: Method, rate: float | None, expected: float | str
) -> None:
    common = {**COMMON, "paca": {"r": 4, "target_modules": ["q"]}, "train": {"learning_rate": 0.5}}
    sections = run_sections(common, method, rate, 0, tmp_path)
    assert sections["train"]["learning_rate"] == expected
