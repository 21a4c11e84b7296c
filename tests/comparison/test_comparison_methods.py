"""What `--methods` names becomes sections of a run's YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paca.comparison.methods import Method, methods_of
from paca.messages.errors import PacaError

COMMON: dict[str, Any] = {
    "model": {"name": "m"},
    "paca": {"r": 32, "paca_alpha": 64, "exclude_modules": ["down_proj"]},
    "train": {"max_steps": 5},
}


def sections(text: str, common: dict[str, Any] = COMMON) -> dict[str, Any]:
    (method,) = methods_of(text, common)
    assert method.name == text.partition("=")[0]
    return dict(method.sections)


def test_paca_is_the_runs_own_section() -> None:
    assert sections("paca") == {"paca": COMMON["paca"]}
    assert [method.name for method in methods_of("PaCA,LoRA", COMMON)] == ["paca", "lora"]


def test_lora_has_pefts_rank_twice_that_as_alpha_and_the_same_targets() -> None:
    expected = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "exclude_modules": ["down_proj"]}
    assert sections("lora") == {"lora": expected}
    assert sections("lora-tuned") == {"lora": expected, "train": {"autocast_adapter_dtype": False}}


def test_lora_of_the_runs_own_section_leads_and_paca_goes_where_it_goes() -> None:
    common = {"model": {"name": "m"}, "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}}
    assert sections("lora", common) == {"lora": common["lora"]}
    assert sections("lora-tuned", common)["lora"] == common["lora"]
    assert sections("paca", common) == {"paca": {"r": 64, "paca_alpha": 16, "target_modules": ["q_proj"]}}


def test_full_and_methods_of_peft_by_their_names() -> None:
    assert sections("full") == {"full": {}}
    assert sections("loha")["peft"] == {
        "peft_type": "LOHA", "r": 8, "alpha": 8, "target_modules": "all-linear", "exclude_modules": ["down_proj"],
    }  # fmt: skip
    assert sections("ia3")["peft"] == {"peft_type": "IA3"}
    assert sections("prefix-tuning")["peft"]["peft_type"] == "PREFIX_TUNING"


def test_a_file_brings_a_method_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "dora.yaml"
    file.write_text("lora: {r: 4, use_dora: true}\ntrain: {optim: sgd}\n")
    goes = {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}  # as `lora` by its name does
    assert sections(f"dora={file}") == {"lora": {**goes, "r": 4, "use_dora": True}, "train": {"optim": "sgd"}}
    file.write_text("train: {optim: adafactor}\n")
    assert sections(f"adafactor={file}") == {"paca": COMMON["paca"], "train": {"optim": "adafactor"}}


PACA = {"r": 16, "paca_alpha": 32, "target_modules": ["q_proj", "v_proj"], "selection": "random"}


@pytest.mark.parametrize(
    ("run", "content", "expected"),
    [
        ({"paca": PACA}, "paca: {r: 32}", {"paca": {**PACA, "r": 32}}),  # it had all linear layers, and an alpha of 16
        ({"paca": PACA}, "paca:\ntrain: {optim: sgd}", {"paca": PACA, "train": {"optim": "sgd"}}),
        ({}, "paca: {r: 32}", {"paca": {"r": 32}}),
        ({"paca": PACA}, "lora: {r: 4}", {"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}),
        ({"paca": PACA}, "lora: {r: 4, target_modules: [o_proj]}", {"lora": {"r": 4, "target_modules": ["o_proj"]}}),
        ({"paca": PACA}, "full: {}", {"full": {}}),
        ({"lora": {"target_modules": ["o_proj"]}}, "paca: {r: 4}", {"paca": {"r": 4, "target_modules": ["o_proj"]}}),
        ({"full": {}}, "lora: {r: 4}", {"lora": {"r": 4, "target_modules": "all-linear"}}),
        ({"full": {}}, "paca: {r: 4}", {"paca": {"r": 4}}),
        ({"peft": {"peft_type": "LOHA", "r": 8}}, "peft: {peft_type: loha, r: 4}", {"peft_type": "LOHA", "r": 4}),
        ({"peft": {"peft_type": "LOHA", "r": 8}}, "peft: {r: 4}", {"peft_type": "LOHA", "r": 4}),
        (
            {"peft": {"peft_type": "LOHA", "r": 8, "target_modules": ["o_proj"]}},
            "peft: {peft_type: lokr}",
            {"peft_type": "LOKR", "target_modules": ["o_proj"]},
        ),
        ({"paca": PACA}, "peft: {peft_type: IA3}", {"peft_type": "IA3"}),
        ({"paca": PACA}, "peft: {peft_type: nosuch}", {"peft_type": "NOSUCH"}),  # which a run's config refuses
        ({"paca": PACA}, "peft: {r: 4}", {"peft": {"r": 4}}),
    ],
)
def test_a_file_is_laid_over_the_yaml_key_by_key(
    tmp_path: Path, run: dict[str, Any], content: str, expected: dict[str, Any]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    found = sections(f"mine={file}", {"model": {"name": "m"}, **run})
    assert found == ({"peft": expected} if "peft_type" in expected else expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("data: {train: x}\n", "can't have the section 'data'"),
        ("train: {learning_rate: 1}\n", "train.learning_rate comes from --lr"),
        ("train: {seed: 1}\n", "train.seed comes from --seeds"),
        ("paca: {random_seed: 1}\n", "paca.random_seed comes from --seeds"),
        ("train: {data_seed: 1}\n", "train.data_seed would give a method another order"),
        ("train: {early_stopping_patience: 2}\n", "train.early_stopping_patience has no place .* makes all its steps"),
        ("model: {adapter: runs/a}\n", "model.adapter has no place in a method's file: .* begin anew"),
        ("train: {max_length: 38}\n", "train.max_length changes what a method is judged by"),
        ("train: {completion_only_loss: false}\n", "train.completion_only_loss changes what"),
        ("train: {truncation_mode: keep_end}\n", "train.truncation_mode changes what"),
        ("train: {reward_weights: [10.0]}\n", "train.reward_weights changes what"),
        ("train: {trainer: dpo}\n", "train.trainer changes what"),
        ("model: {name: other}\n", "model.name changes what"),
        ("lora: {}\nfull: {}\n", "holds the methods lora and full"),
        ("lora: 3\n", "must hold sections"),
    ],
)
def test_a_file_that_holds_other_things_is_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "method.yaml"
    file.write_text(content)
    with pytest.raises(PacaError, match=message):
        methods_of(f"mine={file}", COMMON)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("paca,lara", "no method 'lara'. Did you mean 'lora'"),
        ("paca,lroa", "no method 'lroa'. Did you mean 'lora'"),
        ("laro", "Did you mean 'lora'"),
        ("raod", "Did you mean 'road'"),
        (
            "paca,eva",
            r"a setting of LoRA. Give it a file of its own, with lora: {init_lora_weights: eva} in it: --methods",
        ),
        ("pissa-niter-4", "with lora: {init_lora_weights: pissa_niter_4} in it"),
        ("dora", "with lora: {use_dora: true} in it: --methods paca,dora=dora.yaml"),
        ("adlora", "Did you mean 'adalora'"),
        ("lora,lora", "names 'lora' twice"),
        (" ,", "--methods names nothing"),
        ("=x.yaml", "the name is missing"),
        ("../../x=f.yaml", "can't be the name of a method"),
        (".x=f.yaml", "can't be the name of a method"),
        ("a/b=f.yaml", "can't be the name of a method"),
        ("mine=missing.yaml", "There is no file missing.yaml"),
    ],
)
def test_names_that_cannot_be_are_refused(text: str, message: str) -> None:
    with pytest.raises(PacaError, match=message):
        methods_of(text, COMMON)


def test_alpha_keeps_its_ratio_to_r() -> None:
    method = Method("paca", {"paca": {"r": 16, "paca_alpha": 32}})
    assert method.with_rank(24).settings == {"r": 24, "paca_alpha": 48}
    assert method.with_rank(3).settings == {"r": 3, "paca_alpha": 6}
    assert method.settings["r"] == 16


def test_r_and_alpha_that_are_not_given_are_those_of_the_config_class() -> None:
    lora = Method("mine", {"lora": {"target_modules": "all-linear"}})
    assert lora.rank == 8
    assert lora.with_rank(16).settings == {"target_modules": "all-linear", "r": 16, "lora_alpha": 16}
    two = Method("rs", {"lora": {"r": 2, "use_rslora": True}})
    assert two.with_rank(4).settings == {"r": 4, "use_rslora": True, "lora_alpha": 16}
    assert Method("mine", {"paca": {}}).with_rank(8).settings == {"r": 8, "paca_alpha": 2}
    assert Method("mine", {"peft": {"peft_type": "LOHA"}}).rank == 8
    assert Method("mine", {"peft": {"peft_type": "IA3"}}).rank is None
    assert Method("full", {"full": {}}).rank is None


def test_sections_are_laid_over_the_common_ones() -> None:
    laid = Method("lora-tuned", {"lora": {"r": 8}, "train": {"autocast_adapter_dtype": False}}).laid_over(COMMON)
    assert laid == {
        "model": {"name": "m"}, "lora": {"r": 8}, "train": {"max_steps": 5, "autocast_adapter_dtype": False},
    }  # fmt: skip


def test_blocks_need_named_modules_for_methods_of_peft() -> None:
    blocks: Any = {"paca": {"r": 16, "layers_to_transform": [0]}}
    with pytest.raises(PacaError, match=r"paca\.layers_to_transform goes with a list of target_modules in LoRA"):
        methods_of("paca,lora", blocks)
    assert len(methods_of("paca,full,vera", blocks)) == 3
    blocks["paca"]["target_modules"] = ["q_proj"]
    assert methods_of("paca,lora", blocks)[1].settings["layers_to_transform"] == [0]


def test_the_case_of_a_peft_type_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("peft: {peft_type: LOHA}\n")
    (method,) = methods_of(f"own={file}", {"peft": {"peft_type": "loha", "r": 8}})
    assert (method.settings["r"], method.settings["peft_type"]) == (8, "LOHA")
