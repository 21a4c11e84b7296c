"""`model.adapter`: a run goes on from what another one learned, with its columns, settings and tokenizer."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

from paca.comparison.settings import load_common
from paca.evaluation.own_data import scorer
from paca.evaluation.own_run import config_of_run, held_out_of
from paca.evaluation.sides import told_of_base
from paca.messages.errors import PacaError
from paca.planning import estimate
from paca.planning.step_trace import WEIGHTS
from paca.pretrained.generation import load_for_generation
from paca.training import RunResult, describe, load_run_config, train
from paca.training import run as run_module
from paca.training.planned_run import target_of_run
from paca.training.prepare import prepare
from paca.training.prompt_form import tokenizer_of
from pretrained.test_pretrained import mergeable_base, write_gguf  # noqa: F401 - the first is a fixture
from training.test_run import SignalAtStep
from training.tiny_run import adapter, curve, rows, same_adapter
from training.trainers.conftest import workspace  # noqa: F401 - a fixture

Finished = Callable[..., RunResult]
LORA = ("paca=null", "lora.r=4", "lora.lora_alpha=4", "lora.target_modules=[q_proj, v_proj]")


def train_on(config_file: Path, first: Path, folder: Path, *overrides: str, **options: Any) -> RunResult:
    config = load_run_config(config_file, [f"model.adapter={first}", f"output.dir={folder}", *overrides])
    return train(config, console=Console(quiet=True), **options)


def held_out_losses(run: Path) -> list[float]:
    return [row["eval_loss"] for row in rows(run) if row.get("eval_loss") is not None]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((), ()),
        (("paca.r=6", "paca.selection=gradient_norm"), ("paca=null",)),
        (("model.dtype=bfloat16", "train.autocast_adapter_dtype=false"), ("train.autocast_adapter_dtype=false",)),
        (LORA, LORA),
        (("paca=null", "peft.peft_type=IA3"), ("paca=null",)),
        (
            ("paca=null", "peft.peft_type=ADAPTION_PROMPT", "peft.adapter_len=4", "peft.adapter_layers=2"),
            ("paca=null",),
        ),
        ((), ("train.factor_rank=2",)),
    ],
    ids=["paca", "columns-by-data", "16-bits", "lora", "ia3", "adaption_prompt", "factors"],
)
def test_it_begins_where_the_other_ended(first, then, config_file: Path, finished: Finished, tmp_path: Path) -> None:
    begun = finished(*first).folder
    folder = train_on(config_file, begun, tmp_path / "on", *then, "train.max_steps=2").folder
    was, losses = held_out_losses(begun), held_out_losses(folder)
    assert losses[0] == pytest.approx(was[-1], rel=1e-5)
    assert losses[0] != pytest.approx(was[0], rel=2e-4)
    before, after = adapter(begun), adapter(folder)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == name.endswith("paca_indices"), name
        assert tensor.dtype == after[name].dtype
    assert load_for_generation(folder).adapter == folder / "adapter"
    assert f"Trained on from the adapter in `{begun / 'adapter'}`" in (folder / "adapter" / "README.md").read_text()


def test_the_section_of_the_method_and_the_model_need_not_be_given(finished: Finished, tmp_path: Path) -> None:
    first = finished("paca.r=6", "paca.paca_alpha=3", "train.max_steps=1").folder
    given = yaml.safe_load((first / "config.yaml").read_text())
    config = tmp_path / "on.yaml"
    config.write_text(yaml.safe_dump({"model": {"adapter": str(first)}, "data": {"train": given["data"]["train"]}}))
    found = load_run_config(config)
    assert found.method == "paca"
    assert (found.adapter["r"], found.adapter["paca_alpha"]) == (6, 3)
    assert found.model.name == given["model"]["name"]
    assert found.model.adapter == str(first / "adapter")
    assert found.model.dtype == "float32"
    plan = dict(describe(found).lines())
    assert str(first / "adapter") in plan["trained on from"]
    assert "columns" not in plan
    assert (
        describe(found).trainable_parameters == json.loads((first / "summary.json").read_text())["trainable_parameters"]
    )


@pytest.mark.slow(reason="trains several times")
def test_a_stopped_one_goes_on_to_the_same_bits(
    config_file: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = finished().folder
    train_on(config_file, first, tmp_path / "whole")
    monkeypatch.setattr(run_module, "StopOnSignal", SignalAtStep)
    monkeypatch.setattr(SignalAtStep, "step", 4)
    assert train_on(config_file, first, tmp_path / "parts").resume_command is not None
    monkeypatch.setattr(SignalAtStep, "step", -1)
    train_on(config_file, first, tmp_path / "parts", resume=True)
    assert same_adapter(tmp_path / "whole", tmp_path / "parts")
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")


@pytest.mark.slow(reason="trains several times")
def test_it_is_not_resumed_from_another_adapter(
    config_file: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = shutil.copytree(finished().folder, tmp_path / "first")
    monkeypatch.setattr(run_module, "StopOnSignal", SignalAtStep)
    monkeypatch.setattr(SignalAtStep, "step", 1)
    train_on(config_file, first, tmp_path / "on", "train.max_steps=2")
    other = {name: tensor * 2 if "delta" in name else tensor for name, tensor in adapter(first).items()}
    save_file(other, first / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(PacaError, match=r"The content of model\.adapter .* is no longer"):
        train_on(config_file, first, tmp_path / "on", "train.max_steps=2", resume=True)


@pytest.mark.slow(reason="trains several times")
def test_scores_before_training_are_those_of_the_first_adapter(
    config_file: Path, finished: Finished, tmp_path: Path
) -> None:
    first, wanted = finished().folder, ("eval.metric=token_accuracy", "eval.max_new_tokens=2")
    config = load_run_config(config_file, [f"output.dir={tmp_path / 'scored'}", *wanted])
    scored = train(config, scorer=scorer(config.eval), console=Console(quiet=True)).summary
    folder = tmp_path / "on"
    on = load_run_config(config_file, [f"model.adapter={first}", f"output.dir={folder}", *wanted, "train.max_steps=1"])
    summary = train(on, scorer=scorer(on.eval), console=Console(quiet=True)).summary
    assert scored is not None
    assert summary is not None
    accuracy = [side["scores"][when]["token_accuracy"] for side in (scored, summary) for when in ("before", "after")]
    assert accuracy[2] == pytest.approx(accuracy[1], abs=1e-6)
    assert accuracy[2] != pytest.approx(accuracy[0], abs=1e-6)
    assert set(load_file(folder / "adapter" / "adapter_model.safetensors")) == set(adapter(first))


def test_a_finished_run_is_measured_without_the_adapter_that_it_began_with(
    config_file: Path, finished: Finished, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    shutil.copytree(finished().folder, first)
    folder = train_on(config_file, first, tmp_path / "on", "train.max_steps=1").folder
    shutil.rmtree(first)
    held_out, _ = held_out_of(folder, config_of_run(folder))
    assert len(held_out.dataset) == 8


@pytest.fixture(scope="module")
def short_dpo(
    workspace: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """The folder of a run of one step on pairs, with some settings changed."""

    @functools.cache
    def run(*overrides: str) -> Path:
        return finished_dpo(workspace, tmp_path_factory.mktemp("dpo") / "run", "train.max_steps=1", *overrides)

    return run


@pytest.mark.slow(reason="trains several times")
def test_preferences_are_held_against_the_adapter_as_it_was(
    workspace: Path,  # noqa: F811
    short_dpo: Callable[..., Path],
    tmp_path: Path,
) -> None:
    first = short_dpo()
    on = finished_dpo(workspace, tmp_path / "on", f"model.adapter={first}")
    log = rows(on)
    begun = next(row for row in log if row["step"] == 0)
    assert begun["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)  # the same model as its reference
    assert begun["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)
    for folder in (on / "adapter", *(on / "checkpoints").iterdir()):
        assert not (folder / "ref").exists()
    moved = adapter(on)
    assert any(not torch.equal(tensor, moved[name]) for name, tensor in adapter(first).items())
    lines = dict(describe(load_run_config(on / "config.yaml")).lines())
    assert "adapter as it begins" in lines["reference"]


@pytest.mark.slow(reason="simulates models over and over")
@pytest.mark.parametrize("method", ["paca", "lora"])
def test_the_copy_of_the_adapter_is_planned(
    method: str,
    workspace: Path,  # noqa: F811
    short_dpo: Callable[..., Path],
) -> None:
    config, settings = workspace / "dpo.yaml", LORA if method == "lora" else ()
    first = short_dpo(*settings)
    begins = [f"model.adapter={first}", *(["paca=null"] if method == "lora" else [])]
    planned = [target_of_run(config, changes, "cpu", None, None) for changes in (settings, begins)]
    anew, goes_on = (estimate(one.model, one.setting, one.adapter) for one in planned)
    copied = sum(tensor.numel() * tensor.element_size() for tensor in adapter(first).values())
    assert goes_on.trainable == anew.trainable
    assert goes_on.parameters == anew.parameters
    assert goes_on.parts[WEIGHTS] - anew.parts[WEIGHTS] == pytest.approx(copied, rel=0.02)
    made = prepare(load_run_config(config, begins))  # of which a run foretells its memory
    assert estimate(made.outline, planned[1].setting).parts[WEIGHTS] == goes_on.parts[WEIGHTS]
    told_before = replace(
        planned[1].setting, reference=None
    )  # train.precompute_ref_log_probs: TRL holds it all the same
    assert estimate(planned[1].model, told_before, planned[1].adapter).parts[WEIGHTS] == goes_on.parts[WEIGHTS]


def finished_dpo(workspace: Path, folder: Path, *overrides: str) -> Path:  # noqa: F811
    config = load_run_config(workspace / "dpo.yaml", [f"output.dir={folder}", *overrides])
    return train(config, console=Console(quiet=True)).folder


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ((), ("paca.r=8",), r"--set: paca\.r is 8, and 4 in the adapter"),
        ((), LORA, r"the section lora|method is paca\. Leave the section lora out"),
        ((), ("paca.rotate_every=3",), r"paca\.rotate_every is 3, and null in the adapter"),
        ((), ("paca.rank=4",), r"--set: there is no key paca\.rank\. Did you mean paca\.r\?"),
        ((), ("paca.target_modules=[k_proj]",), r"paca\.target_modules is \['k_proj'\], and \['model\.layers"),
        (LORA, ("paca=null", "lora.target_modules=7"), r"--set: lora\.target_modules must be a list"),
        (
            LORA,
            ("paca=null", "lora.learning_rate=7"),
            r"no key lora\.learning_rate\. Did you mean train\.learning_rate",
        ),
        (LORA, ("paca=null", "lora.target_modules=[q_proj]"), r"\['q_proj'\], and \['\w_proj', '\w_proj'\] in the ad"),
        (
            ("paca=null", "peft.peft_type=P_TUNING", "peft.num_virtual_tokens=4"),
            ("paca=null",),
            r"can't be trained on \(P_TUNING\): PEFT loads learned tokens",
        ),
        ((), ("train.trainer=classification",), r"model\.adapter is for the task CAUSAL_LM"),
    ],
    ids=[
        *("other-r", "other-method", "rotating", "no-key", "other-layers", "no-layers", "other-section"),
        *("fewer-layers", "p_tuning", "other-task"),
    ],
)
def test_what_does_not_go_on_is_refused_by_name(
    first, then, message: str, config_file: Path, finished: Finished
) -> None:
    begun = finished(*first).folder
    with pytest.raises(PacaError, match=message):
        load_run_config(config_file, [f"model.adapter={begun}", *then])


def test_the_same_settings_in_other_words_go_on(config_file: Path, finished: Finished) -> None:
    first = finished("paca=null", "peft.peft_type=IA3").folder
    assert load_run_config(config_file, ["paca=null", "peft.peft_type=ia3", f"model.adapter={first}"]).method == "peft"
    on = [f"model.adapter={finished().folder}", "paca.selection=gradient_norm", "paca.target_modules="]
    for layers in ("all-linear", "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"):
        assert load_run_config(config_file, [*on[:2], on[2] + layers]).adapter["r"] == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"r": "four"}, r"first/adapter_config\.json: lora\.r must be a whole number"),
        ({"init_lora_weights": "pissa_niter_4"}, r"pissa_niter_4, and PEFT did not save what that takes out"),
        ({"use_dora": None}, r"lora\.use_dora is true, and false in the adapter"),
    ],
    ids=["broken", "not-saved", "older"],
)
def test_an_adapters_own_config_is_looked_at(
    changed: dict[str, Any], message: str, config_file: Path, finished: Finished, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    shutil.copytree(finished(*LORA).folder / "adapter", first)
    settings = json.loads((first / "adapter_config.json").read_text()) | changed
    saved = {name: value for name, value in settings.items() if value is not None}
    (first / "adapter_config.json").write_text(json.dumps(saved))
    with pytest.raises(PacaError, match=message):
        load_run_config(config_file, ["paca=null", "lora.use_dora=true", f"model.adapter={first}"])


def test_a_base_named_again_is_loaded_as_it_was(config_file: Path, finished: Finished, tmp_path: Path) -> None:
    first = tmp_path / "first"
    shutil.copytree(finished(*LORA).folder / "adapter", first)
    settings = json.loads((first / "adapter_config.json").read_text())
    (first / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": "owner/model", "revision": "a1b2"})
    )
    on = ["paca=null", f"model.adapter={first}"]
    assert load_run_config(config_file, [*on, "model.name=owner/model"]).model.revision == "a1b2"
    assert load_run_config(config_file, [*on, "model.name=owner/other"]).model.revision is None


def test_a_model_or_nothing_is_refused_as_an_adapter(config_file: Path) -> None:
    model = load_run_config(config_file).model.name
    with pytest.raises(PacaError, match=r"model\.adapter: .* is no adapter\. To train a whole model on"):
        load_run_config(config_file, [f"model.adapter={model}"])
    with pytest.raises(PacaError, match=r"model\.adapter: No such folder.* Give a run of `paca train` or an adapter's"):
        load_run_config(config_file, ["model.adapter=./nowhere"])


def test_a_comparison_refuses_it(config_file: Path, finished: Finished) -> None:
    with pytest.raises(PacaError, match=r"model\.adapter has no place in a comparison"):
        load_common(config_file, [f"model.adapter={finished().folder}"])


@pytest.mark.slow(reason="trains several times")
def test_quantized_weights_are_quantized_again_and_deltas_not_rounded(
    config_file: Path, finished: Finished, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    first = finished("model.quantization=nf4").folder
    on = [f"model.adapter={first}", f"output.dir={tmp_path / 'on'}", "train.max_steps=1"]
    config = load_run_config(config_file, on)
    assert config.model.quantization == "nf4"
    folder = train(config, console=Console(quiet=True)).folder
    assert held_out_losses(folder)[0] == pytest.approx(held_out_losses(first)[-1], rel=1e-6)
    lora = (
        finished("model.quantization=nf4", *LORA, "train.max_steps=1").folder / "checkpoints"
    )  # whose own config does not say it
    for checkpoint in lora.iterdir():
        assert load_run_config(config_file, [f"model.adapter={checkpoint}", *LORA]).model.quantization == "nf4"


@pytest.mark.slow(reason="trains several times")
def test_a_gguf_file_is_unpacked_for_each_run(
    config_file: Path,
    tmp_path: Path,
    mergeable_base: Path,  # noqa: F811
) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", mergeable_base)
    named = [f"model.name={source}", "train.max_steps=1"]
    first = train(
        load_run_config(config_file, [*named, f"output.dir={tmp_path / 'first'}"]), console=Console(quiet=True)
    ).folder
    short = tmp_path / "short.yaml"
    sections = yaml.safe_load(config_file.read_text()) | {"model": {"adapter": str(first)}}
    short.write_text(yaml.safe_dump(sections))
    config = load_run_config(short, [f"output.dir={tmp_path / 'on'}", "train.max_steps=1"])
    assert config.model.name == str(source)
    folder = train(config, console=Console(quiet=True)).folder
    assert held_out_losses(folder)[0] == pytest.approx(held_out_losses(first)[-1], rel=1e-5)
    shutil.rmtree(first)
    assert load_for_generation(folder).base == str(folder / "base")


def test_the_form_of_the_first_run_is_that_of_the_second(config_file: Path, tmp_path: Path) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"question": f"a {n}", "answer": f"b {n}"}) + "\n" for n in range(12)))
    named = [f"data.train={data}", "data.eval=4", "train.max_steps=1"]
    config = load_run_config(config_file, [*named, "data.template=zephyr", f"output.dir={tmp_path / 'first'}"])
    first = train(config, console=Console(quiet=True)).folder
    folder = train_on(config_file, first, tmp_path / "on", *named).folder
    assert held_out_losses(folder)[0] == pytest.approx(held_out_losses(first)[-1], rel=1e-5)
    template = "adapter/chat_template.jinja"
    assert "<|assistant|>" in (first / template).read_text()
    assert (folder / template).read_text() == (first / template).read_text()
    assert told_of_base(first) is None
    assert str(first / "adapter") in str(told_of_base(folder))
    shutil.rmtree(first)
    assert "<|assistant|>" in str(tokenizer_of(config_of_run(folder)).chat_template)  # paca evaluate


def test_labels_must_be_those_of_the_classifier(workspace: Path, tmp_path: Path) -> None:  # noqa: F811
    first = load_run_config(
        workspace / "classification.yaml", [f"output.dir={tmp_path / 'first'}", "train.max_steps=1"]
    )
    train(first, console=Console(quiet=True))
    other = tmp_path / "other.jsonl"
    text = Path(str(first.data.train)).read_text()
    other.write_text(text.replace('"other"', '"thing"'))
    on = [f"model.adapter={tmp_path / 'first'}", f"output.dir={tmp_path / 'on'}", "train.max_steps=1"]
    with pytest.raises(PacaError, match=r"tells apart \['animal', 'other'\], and the data \['animal', 'thing'\]"):
        describe(load_run_config(workspace / "classification.yaml", [*on, f"data.train={other}"]))
    folder = train(load_run_config(workspace / "classification.yaml", on), console=Console(quiet=True)).folder
    assert held_out_losses(folder)[0] == pytest.approx(held_out_losses(tmp_path / "first")[-1], rel=1e-4)
