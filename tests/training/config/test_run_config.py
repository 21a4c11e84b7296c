from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from paca.cli.plan_tables import yaml_lines
from paca.messages.errors import PacaError
from paca.planning import Setting
from paca.planning.target import Target
from paca.training import load_run_config
from paca.training.config.run_config import RunConfig

MINIMAL = "model: {name: some/model}\ndata: {train: some/data}\n"


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    file = tmp_path / "my run.yaml"
    file.write_text(text)
    return load_run_config(file, overrides)


def test_a_minimal_config_gets_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(tmp_path, MINIMAL)
    assert (config.model.name, config.model.dtype, config.data.eval) == ("some/model", "auto", None)
    assert config.output.dir == str(tmp_path / "runs" / "my run")  # named for the file
    assert config.adapter == config.train == {}


def test_set_overrides_the_file_with_values_typed_as_yaml(tmp_path: Path) -> None:
    text = MINIMAL + "train: {learning_rate: 0.1, seed: 3}\n"
    overrides = [
        "train.learning_rate=1e-4",
        "paca.target_modules=[q_proj, v_proj]",
        "train.save_strategy=no",
        "data.eval=0.1",
    ]
    config = load(tmp_path, text, *overrides)
    assert config.train == {"learning_rate": 1e-4, "seed": 3, "save_strategy": "no"}
    assert config.adapter == {"target_modules": ["q_proj", "v_proj"]}
    assert config.data.eval == 0.1


def test_existing_paths_become_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").touch()
    config = load(tmp_path, "model: {name: org/model}\ndata: {train: data.jsonl, eval: missing.jsonl}\n")
    assert config.model.name == "org/model"
    assert config.data.train == str(tmp_path / "data.jsonl")
    assert config.data.eval == "missing.jsonl"
    config = load(tmp_path, "model: {name: org/model}\ndata: {train: [data.jsonl, org/data, data.jsonl]}\n")
    assert config.data.train == [str(tmp_path / "data.jsonl"), "org/data", str(tmp_path / "data.jsonl")]
    assert {name for key, name in config.paths_used() if key == "data.train"} == {str(tmp_path / "data.jsonl")}


def test_a_list_of_data_names_something_and_no_images(tmp_path: Path) -> None:
    with pytest.raises(
        PacaError, match=r"--set: data.train is an empty list; name at least one file, folder or hub id"
    ):
        load(tmp_path, MINIMAL, "data.train=[]")
    with pytest.raises(PacaError, match=r"data.train is a list; of images give one folder, Parquet file or hub id"):
        load(tmp_path, MINIMAL, "data.train=[a, b]", "train.trainer=image_classification")


def test_a_text_with_a_colon_that_became_a_mapping_needs_quotes(tmp_path: Path) -> None:
    text = MINIMAL.replace("some/data", "some/data, eval: 4") + "eval: {metric: exact_match}\n"
    with pytest.raises(PacaError, match=r"not a mapping .*\. A text that holds ': ' needs quotes within those of the"):
        load(tmp_path, text, "eval.answer_pattern=Answer: (.+)")
    assert load(tmp_path, text, 'eval.answer_pattern="Answer: (.+)"').eval.compared == " of what Answer: (.+) finds"
    assert load(tmp_path, text).eval.compared == " of the whole answer"


@pytest.mark.parametrize("name", ["loss", "eval_loss", "mean_token_accuracy"])
def test_the_best_model_is_chosen_by_what_is_measured_while_training(tmp_path: Path, name: str) -> None:
    text = MINIMAL.replace("some/data", "some/data, eval: 4") + "eval: {metric: exact_match}\n"
    load(tmp_path, f"{text}train: {{metric_for_best_model: {name}}}\n")
    with pytest.raises(PacaError, match=r"is exact_match, and what is measured while training is loss, .*Give one"):
        load(tmp_path, text + "train: {metric_for_best_model: exact_match}\n")


def test_a_run_says_which_files_and_folders_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model", "original", "rewards", "train"):
        (tmp_path / name).mkdir()
    (tmp_path / "acc.json").write_text("{}")
    text = (
        "model: {name: model}\ndata: {train: some/data}\npaca: {original_weights: original}\n"
        "train: {trainer: grpo, reward_funcs: [exact_match, rewards], accelerator_config: acc.json}\n"
    )
    used = {"model.name": "model", "paca.original_weights": "original", "train.reward_funcs": "rewards"}
    config = load(tmp_path, text)
    assert dict(config.paths_used()) == {
        key: str(tmp_path / name) for key, name in {**used, "train.accelerator_config": "acc.json"}.items()
    }
    config.model.name = "train"  # as Python may change it
    assert ("model.name", "train") in config.paths_used()
    config.model.name = str(tmp_path / "model")
    monkeypatch.chdir("/")
    assert load(tmp_path, config.to_yaml()) == config  # runs from anywhere


def test_the_written_config_reads_back_as_the_same_run(tmp_path: Path) -> None:
    config = load(
        tmp_path, MINIMAL + "train: {learning_rate: 1e-5, warmup_steps: 0.1}\npaca: {rank_pattern: {q_proj: 8}}\n"
    )
    assert load(tmp_path, config.to_yaml()) == config


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("modle: {}\ndata: here\ntrian: {}\n", ["line 1: there is no", "line 2: the section data", "line 3: there"]),
        (
            "model: {name: a, dype: b}\ndata: {train: c}\npacca:\n  ranc: 8\ntrain: {max_stepz: 1, optim: 3}\n",
            [
                "3: there is no section 'pacca'",
                "1: there is no key model.dype",
                "4: there is no key paca.ranc",
                "5: there is no key train.max_stepz",
                "5: train.optim must",
            ],
        ),
        (
            "paca: {}\nlora: {rr: 4}\nmodel_name_or_path: a\ndata: {trian: b}\neval: {metric: loss}\n",
            ["3: there is no section 'model_name_or_path'", "a run has one method", "4: there is no key data.trian"],
        ),
        (
            "model: {nmae: a}\ndata: {train: b, limit: no}\npaca: {rank: 8}\ntrain:\n  lr: 3\n  epochs: 4\n",
            ["1: there is no key model.nmae", "2: data.limit must", "3: there is no key paca", "5: there", "6: "],
        ),
        (
            MINIMAL + "eval: {limit: 0, metric: loss}\n",
            ["line 3: eval.limit is 0", "line 3: eval.metric is measured on held-out data"],
        ),
        (
            MINIMAL + "paca: {r: -3, selection: 4}\ntrain: {adam_beta: 1, optim: adam}\n",
            ["line 3: paca.selection must", "line 4: there is no key train.adam_b", "line 4: train.optim must"],
        ),
        (
            MINIMAL + "train: {max_steps: 0, seed: -1}\npaca: {r: -3}\n",
            ["line 4: paca.r must be a whole", "line 3: train.max_steps must be", "line 3: train.seed must be"],
        ),
        (
            MINIMAL + "train: {beta: 0.1, num_iterations: 2, max_stepz: 3, save_steps: -2}\n",
            [
                "train.beta is a setting of",
                "train.num_iterations is a setting of",
                "no key train.max_s",
                "train.save_s",
            ],
        ),
        (
            MINIMAL + "lora: {r: 4, bbias: 1}\ncalibration: {sequences: 0}\n",
            ["line 4: calibration.sequences is 0", "line 3: there is no key lora.bbias"],
        ),
        (
            MINIMAL + "calibration: {sequence: 9}\npeft: {peft_type: LOHA, rr: 4}\ntrain: {lr: 1}\n",
            ["no key calibration.sequence.", "line 5: there is no key train.lr", "line 4: there is no key peft.rr"],
        ),
        (
            MINIMAL + "train: {packing: true, max_length: null, report_to: wandbb}\n",
            ["line 3: train.max_length: null does not go", "line 3: train.report_to: there is no tracker wandbb"],
        ),
    ],
)
def test_all_mistakes_that_do_not_need_each_other_are_told(tmp_path: Path, text: str, lines: list[str]) -> None:
    with pytest.raises(PacaError) as error:
        load(tmp_path, text)
    told = str(error.value).splitlines()
    assert len(told) == len(lines)
    for line, expected in zip(told, lines, strict=True):
        assert expected in line


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        ("train:\n  learning_rat: 1\n", "line 4: there is no key train.learning_rat. Did you mean train.learning_rate"),
        ("paca:\n  paca_alph: 4\n", "line 4: there is no key paca.paca_alph. Did you mean paca.paca_alpha?"),
        ("paca: {peft_type: LORA}\n", "no key paca.peft_type. The section's name says the method; others of PEFT"),
        ("lora: {task_type: CAUSAL_LM}\n", "no key lora.task_type. The task is that of train.trainer: leave it out."),
        ("model: {name: x, load_in_4bit: true}\n", "no key model.load_in_4bit. Did you mean model.quantization?"),
        ("r: 8\n", "there is no section 'r'. Did you mean the key paca.r? It stands below paca:"),
        ("learning_rate: 1e-4\n", "Did you mean the key train.learning_rate? It stands below train:"),
        ("packing: true\n", "Did you mean the key train.packing? It stands below train:"),
        ("metric: loss\n", "Did you mean the key eval.metric? It stands below eval:"),
        ("rank: 8\n", "Did you mean the key paca.r? It stands below paca:"),
        ("evla: {before: true}\n", "line 3: there is no section 'evla'. Did you mean eval?"),
        ("train: 3\n", "line 3: the section train must hold keys, not the number 3."),
        ("train: {learning_rate: fast}\n", "train.learning_rate must be a number or auto, not the text 'fast'."),
        ("train: {max_steps: 10.5}\n", "line 3: train.max_steps must be a whole number, not the number 10.5."),
        ("train: {packing: 1}\n", "line 3: train.packing must be true or false, not the number 1."),
        ("train: {eval_strategy: step}\n", "must be one of no, steps, epoch, not the text 'step'. Did you mean steps?"),
        ("train: {trainer: dpo, loss_type: ipo}\n", "a list of texts, not the text 'ipo'. Did you mean [ipo]?"),
        ("train: {packing_strategy: best}\n", "must be one of bfd, bfd_split, wrapped, not the text 'best'."),
        ("train: {output_dir: x}\n", "line 3: train.output_dir can't be set here: the run folder is output.dir."),
        ("train: {hub_token: x}\n", "HF_TOKEN"),
        ("train: {gradient_accumulation_steps: 0}\n", "train.gradient_accumulation_steps must be above zero, not 0."),
        ("train: {include_num_input_tokens_seen: no}\n", "line 3: train.include_num_input_tokens_seen can't be off: a"),
        ("train: {optim: adamv}\n", "train.optim must be one of adamw_torch, "),
        ("train: {learning_rate: -1}\n", "train.learning_rate must be zero or more, not -1."),
        ("train: {max_steps: 0}\n", "train.max_steps must be 1 or more (or -1: as many as the epochs), not 0."),
        ("train: {adam_beta2: 1}\n", "train.adam_beta2 must be zero or more and less than 1, not 1."),
        ("train: {weight_decay: .nan}\n", "train.weight_decay must be zero or more, not nan."),
        ("train: {save_steps: .inf}\n", "train.save_steps must be above zero, not inf."),
        ("train: {load_best_model_at_end: true}\n", "train.load_best_model_at_end is True: the best one is that"),
        ("train: {save_strategy: best}\n", "train.save_strategy is best: the best one is that of held-out data. Give"),
        ("train: {packing: true, max_length: null}\n", "train.max_length: null does not go with train.packing, which"),
        ("paca: {ranc: 4}\n", "line 3: there is no key paca.ranc. The keys of paca are "),
        ("data: {train: x, max_length: 9}\n", "no key data.max_length. Did you mean train.max_length?"),
        ("model: {name: x, max_length: 9}\n", "no key model.max_length. Did you mean train.max_length?"),
        ("model: {name: x, r: 9}\n", "no key model.r. Did you mean paca.r?"),
        ("lora: {}\ndata: {train: x, r: 9}\n", "no key data.r. Did you mean lora.r?"),
        ("train: {lora_rank: 4}\n", "no key train.lora_rank. Did you mean lora.r?"),
        ("data: {train: x, paca_r: 4}\n", "no key data.paca_r. Did you mean paca.r?"),
        ("train: {lora_alpha: 4}\n", "no key train.lora_alpha. Did you mean lora.lora_alpha?"),
        ("train: {target_modules: [a]}\n", "no key train.target_modules. Did you mean paca.target_modules?"),
        ("lora: {}\ntrain: {target_modules: [a]}\n", "train.target_modules. Did you mean lora.target_modules?"),
        ("paca: {lora_alpha: 4}\n", "no key paca.lora_alpha. Did you mean paca.paca_alpha or lora.lora_alpha?"),
        ("lora: {paca_alpha: 4}\n", "no key lora.paca_alpha. Did you mean lora.lora_alpha or paca.paca_alpha?"),
        ("train: {train: x}\n", "no key train.train. Did you mean data.train?"),
        ("data: {train: x, trainer: dpo}\n", "no key data.trainer. Did you mean train.trainer?"),
        ("eval: {eval_steps: 9}\n", "no key eval.eval_steps. Did you mean train.eval_steps?"),
        ("eval: {steps: 9}\n", "no key eval.steps. Did you mean train.eval_steps?"),
        ("eval: {batch_size: 2}\n", "no key eval.batch_size. Did you mean train.per_device_eval_batch_size?"),
        ("eval: {strategy: no}\n", "no key eval.strategy. Did you mean train.eval_strategy?"),
        ("train: {dtype: float32}\n", "no key train.dtype. Did you mean model.dtype?"),
        ("train: {template: x}\n", "no key train.template. Did you mean data.template?"),
        ("data: {validation: x}\n", "no key data.validation. Did you mean data.eval?"),
        ("model: {name: x, quantization: int4}\n", "not the text 'int4'. Did you mean nf4?"),
        ("model: {name: x, quantization: 8bit}\n", "not the text '8bit'. Did you mean int8?"),
        ("train: {quantization: nf4}\n", "no key train.quantization. Did you mean model.quantization?"),
        ("train: {limit: 4}\n", "no key train.limit. Did you mean data.limit?"),
        ("paca: {template: x}\n", "no key paca.template. Did you mean data.template?"),
        ("lora: {dtype: x}\n", "no key lora.dtype. Did you mean model.dtype?"),
        ("full: {r: 4}\n", "no key full.r. Did you mean paca.r? The section full has no keys."),
        ("peft: {peft_type: nosuch}\ndata: {train: x, r: 4}\n", "no key data.r."),
        ("paca: {rotate_by: norm}\n", "paca.rotate_by must be one of random, random_blocks, weight_norm, not the text"),
        ("paca: {indices: {}}\n", "line 3: paca.indices must map modules to lists, such as {'q_proj': [5]}"),
        ("paca: {r: 0}\n", "line 3: paca.r must be a whole number of columns, 1 or more; got 0."),
        ("paca: {r: many}\n", "line 3: paca.r must be a whole number, not the text 'many'."),
        ("eval: {before: 1}\n", "line 3: eval.before must be true or false, not the number 1."),
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_is_refused_with_its_place(tmp_path: Path, addition: str, message: str) -> None:
    given = "".join(line for line in MINIMAL.splitlines(True) if line.partition(" ")[0] not in addition)
    with pytest.raises(PacaError) as caught:
        load(tmp_path, given + addition)
    assert str(caught.value).startswith(str(tmp_path / "my run.yaml"))
    assert message in str(caught.value)


def test_an_override_can_be_one_entry_of_a_key_that_holds_several(tmp_path: Path) -> None:
    given = MINIMAL + "paca: {rank_pattern: {q_proj: 4}}\n"
    entries = ("data.columns.question=prompt", r"paca.rank_pattern.layers\.0\.mlp=8", "train.lr_scheduler_kwargs.a=1")
    config = load(tmp_path, given, *entries)
    assert config.data.columns == {"question": "prompt"}
    assert config.adapter["rank_pattern"] == {"q_proj": 4, r"layers\.0\.mlp": 8}
    assert config.train["lr_scheduler_kwargs"] == {"a": 1}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps.a=3", "--set: train.max_steps must be a whole number, not a mapping"),
        ("train.max_steps", "expected section.key=value"),
        ("train.max_steps.=3", "expected section.key=value"),
        ("model.name.a=3", "--set model.name.a=3: model.name is the text"),
        ("output=runs/mine", "such as --set output.dir=runs/mine"),
        ("max_steps=3", "such as --set train.max_steps=3"),
        ("trian.max_steps=3", "there is no section 'trian'. Did you mean train?"),
        ("train.max_stps=3", "--set: there is no key train.max_stps. Did you mean train.max_steps?"),
        ("train.max_steps={", "--set train.max_steps={: '{' is not a valid YAML value"),
        ("model.dtype=float61", "--set: model.dtype must be one of auto, bfloat16, float16, float32, not"),
        ("data.eval=1.5", "--set: data.eval is 1.5; to hold out a part"),
        ("data.eval=0", "--set: data.eval is 0; a count of records must be 1 or more."),
        ("data.limit=-1", "--set: data.limit is -1;"),
        ("model.lean=1", "--set: model.lean must be true or false, not the number 1."),
        ("model.recompute=mlp", "--set: model.recompute is a part of the lean blocks; give model.lean: true too."),
        ("model.recompute=all", "--set: model.recompute must be mlp or null, not the text 'all'."),
    ],
)  # fmt: skip
def test_a_wrong_override_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(PacaError) as caught:
        load(tmp_path, MINIMAL, override)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; it needs at least model.name and data.train."),
        ("- model\n", "must hold sections (model:, data:, ...), not a list"),
        ("model: {name: x}\n", "data.train is missing; it must be given."),
        ("data: {train: x}\n", "model.name is missing; it must be given."),
    ],
)
def test_what_a_config_needs_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(PacaError, match=r"my run\.yaml") as caught:
        load(tmp_path, text)
    assert message in str(caught.value)


def test_all_wrong_overrides_are_told_with_what_else_is_wrong(tmp_path: Path) -> None:
    """They were told one at a time, and before the file's own mistakes."""
    with pytest.raises(PacaError) as error:
        load(tmp_path, MINIMAL + "eval: {befor: true}\n", "trian.seed=3", "train.seed", "data.limt=3")
    told = str(error.value).splitlines()
    expected = ["section 'trian'", "--set train.seed: expected", "--set: there is no key data.limt", "eval.befor."]
    assert len(told) == len(expected)
    assert all(part in line for part, line in zip(expected, told, strict=True))


def test_set_gives_a_whole_section(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL, "full={}").method == "full"
    assert load(tmp_path, MINIMAL + "lora: {r: 4, lora_alpha: 9}\n", "lora={r: 2}").adapter == {"r": 2}
    with pytest.raises(
        PacaError, match=r"these are given: paca \(.*line 3\) and full \(--set\).*--set paca=null leaves"
    ):
        load(tmp_path, MINIMAL + "paca: {}\n", "full={}")
    assert load(tmp_path, MINIMAL + "paca: {r: 3}\n", "paca=null", "lora.r=2").adapter == {"r": 2}


def test_our_own_sections_are_checked_before_the_trainer_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("adapter_settings", "train_settings"):
        monkeypatch.setitem(sys.modules, f"paca.training.config.{name}", None)  # importing it now fails
    with pytest.raises(PacaError, match=r"eval\.befor\. Did you mean eval\.before"):
        load(tmp_path, MINIMAL + "eval: {befor: true}\ntrain: {trainer: grpo, seed: 3, beta: 0.1, factor_rank: 4}\n")
    with pytest.raises(ImportError):
        load(tmp_path, MINIMAL)


@pytest.mark.parametrize(
    ("method", "used"),
    [
        ("paca: {selection: random}", False),
        ("paca: {selection: activation_norm}", True),
        ("lora: {init_lora_weights: olora}", False),
        ("lora: {init_lora_weights: eva}", True),
        ("peft: {peft_type: LOHA}", False),
        ("full: {}", False),
    ],
)
def test_a_calibration_that_nothing_goes_by_is_refused(tmp_path: Path, method: str, used: bool) -> None:
    """It passed in silence. What a run writes names the defaults, and a comparison's may be another method's."""
    file = tmp_path / "run.yaml"
    file.write_text(f"{MINIMAL}{method}\ncalibration: {{sequences: 64}}\n")
    if used:
        load_run_config(file, all_used=True)
    else:
        with pytest.raises(PacaError, match=r"line 4: calibration has no effect: no columns are chosen by the data"):
            load_run_config(file, all_used=True)
    load_run_config(file)
    load_run_config(file, ["calibration.sequences=128"], all_used=True)


def test_lean_blocks_do_not_go_with_another_librarys_blocks(tmp_path: Path) -> None:
    with pytest.raises(PacaError, match=r"--set: train\.use_liger_kernel replaces the blocks that model\.lean"):
        load(tmp_path, MINIMAL, "model.lean=true", "train.use_liger_kernel=true")


def printed_for(setting: Setting, own: Setting, **target: Any) -> dict[str, dict[str, Any]]:
    """The YAML that a plan of a run prints, whose own setting is `own`."""
    run: Any = Target("run.yaml", None, None, own, **target)  # type: ignore[arg-type]
    return yaml.safe_load("\n".join(yaml_lines(setting, run)[1:]))


@pytest.mark.parametrize("key", ["gradient_checkpointing", "activation_checkpointing"])
def test_a_plan_spells_out_what_a_run_has_and_the_planned_setting_has_not(key: str) -> None:
    own = Setting(512, lean=True, recompute="mlp", checkpointing=True, quantization="nf4")
    printed = printed_for(Setting(512, lean=True), own, checkpointing_key=key)
    assert printed["model"] == {"quantization": None, "lean": True, "recompute": None}
    assert printed["train"][key] is False
    printed = printed_for(Setting(512), replace(own, recompute=None))
    assert printed["model"] == {"quantization": None, "lean": False}
    assert "model" not in printed_for(Setting(512), Setting(512))


@pytest.mark.parametrize("recompute", [None, "mlp"])
def test_what_a_plan_prints_is_accepted(tmp_path: Path, recompute: Any) -> None:
    setting = Setting(sequence_length=512, batch_size=2, lean=True, recompute=recompute, checkpointing=True)
    printed = printed_for(setting, Setting(sequence_length=512))
    config = load(
        tmp_path, yaml.safe_dump({"model": {"name": "some/model"} | printed["model"], "data": {"train": "x"}})
    )
    assert (config.model.lean, config.model.recompute) == (True, recompute)
    config = load(tmp_path, MINIMAL + yaml.safe_dump({"train": printed["train"]}))
    assert config.train["max_length"] == 512


def test_a_key_that_came_later_is_shown_but_not_compared_while_it_has_no_effect(tmp_path: Path) -> None:
    """Runs and comparisons that were begun before compare their config with today's."""
    file = tmp_path / "run.yaml"
    file.write_text("model: {name: some/model}\ndata: {train: some/data}\n")
    assert not {"unusable", "columns"} & load_run_config(file).as_dict()["data"].keys()
    named = load_run_config(file, ["data.columns={question: input}"]).as_dict()["data"]
    assert named["columns"] == {"question": "input"}
    assert yaml.safe_load(load_run_config(file).to_yaml())["data"]["unusable"] == "refuse"
    assert load_run_config(file, ["data.unusable=leave_out"]).as_dict()["data"]["unusable"] == "leave_out"
