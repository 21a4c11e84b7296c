from __future__ import annotations

import importlib.util
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

import paca
from paca.cli import app
from paca.cli.plan_tables import show_simulated
from paca.messages.units import format_bytes
from paca.training.planned_run import target_of_run
from tiny_checkpoint import WIDE, save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_base(tmp_path_factory.mktemp("base"), num_hidden_layers=1, **WIDE)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()  # a plan needs the configuration only
    return folder


def plan(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments], terminal_width=200, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def plan_json(*arguments: str) -> dict[str, Any]:
    rate = () if "--rate" in arguments else ("--rate", "1")  # to measure it takes seconds
    return json.loads(plan(*arguments, *rate, "--json", "--device", "cpu"))


def test_a_folder_without_weights_is_planned(base: Path) -> None:
    text = plan(str(base), "--seq", "64", "--device", "cpu", "--rate", "1")
    for part in (
        "Peak memory of paca,",
        "weights",
        "original columns",
        "optimizer state",
        "activations: MLP",
        "total",
        "Time floor",
    ):
        assert part in text


def test_json_adds_up(base: Path) -> None:
    content = plan_json(str(base), "--seq", "64", "--batch-size", "2", "--r", "4", "--lean", "--rate", "2")
    assert content["total"] == sum(content["memory"].values())
    assert content["setting"]["lean"]
    assert content["setting"]["batch_size"] == 2
    assert content["trainable"] == 4 * (64 + 32 + 32 + 64 + 112 + 112 + 64)  # r, outputs of each layer
    assert content["seconds_per_step"] == 0.97 * (content["flops_per_step"] / 2e12)  # lean blocks on a CPU


@pytest.mark.slow(reason="simulates models over and over")
def test_a_budget_finds_a_setting_that_fits(base: Path) -> None:
    # With recomputed MLPs alone: one technique to search.
    arguments = (str(base), "--seq", "256", "--global-batch", "2", "--loss", "full", "--recompute")
    roomy = plan_json(*arguments, "--memory", "100GiB")
    assert roomy["setting"]["batch_size"] == 2
    tight = plan_json(*arguments, "--memory", str(roomy["total"] - 1))
    assert tight["total"] < roomy["total"]
    assert tight["total"] == tight["candidates"][0]["total"]
    assert tight["setting"]["batch_size"] * tight["setting"]["gradient_accumulation"] == 2
    assert tight["weights"] == "float32"
    assert "nf4" in tight["weights_reason"]
    text = plan(str(base), "--seq", "256", "--memory", "100GiB", "--device", "cpu", "--rate", "1")
    assert "per_device_train_batch_size: 16" in text
    assert "nothing has to be computed twice" in text


def test_a_search_goes_on_without_bitsandbytes_and_says_so(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find_spec(name, *rest)
    )
    options = (str(base), "--seq", "64", "--global-batch", "1", "--device", "cpu", "--rate", "1", "--lean")
    roomy = json.loads(plan(*options, "--memory", "100GiB", "--json"))
    assert "nothing has to be computed twice" in roomy["weights_reason"]
    tight = plan(*options, "--memory", str(roomy["total"] - 1))
    assert "Not considered: nf4: quantized weights need bitsandbytes." in tight


def test_quantized_weights_are_planned_and_chosen_when_asked(base: Path) -> None:
    pytest.importorskip("bitsandbytes")
    arguments = (str(base), "--seq", "64", "--rate", "1", "--bandwidth", "1", "--quantization", "nf4")
    content = plan_json(*arguments)
    assert content["weights"] == content["setting"]["quantization"] == "nf4"
    assert content["memory"]["weights"] < plan_json(str(base), "--seq", "64", "--rate", "1")["memory"]["weights"]
    unpacking = content["bytes_to_unpack_weights_per_step"] / 1e9
    assert content["seconds_per_step"] == content["flops_per_step"] / 1e12 + unpacking
    text = plan(*arguments, "--memory", "100GiB", "--device", "cpu")
    assert "    quantization: nf4" in text
    assert "weights in nf4" in text
    assert "1.0 GB/s, as given" in " ".join(text.split())
    with pytest.raises(paca.PacaError, match="--quantization must be"):
        plan(str(base), "--quantization", "auto")


@pytest.mark.parametrize(("changes", "steps"), [({"eval": 2}, 3), ({"eval": None}, 4)])
def test_the_steps_of_a_run_are_counted_and_told_with_their_time(
    base: Path, tmp_path: Path, changes: dict[str, Any], steps: int
) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"text": "x" * length}) + "\n" for length in range(5, 12)))
    path = tmp_path / "run.yaml"
    train = {"num_train_epochs": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    run = {"model": {"name": str(base)}, "data": {"train": str(data), **changes}, "train": train}
    path.write_text(yaml.safe_dump(run))
    assert plan_json(str(path))["steps"] == steps
    assert plan_json(str(path), "--set", "train.max_steps=9")["steps"] == 9
    told = f"Its {steps} steps take at least 0:00, without evaluations"
    assert told in plan(str(path), "--rate", "1", "--device", "cpu")


def test_a_run_is_as_long_as_its_longest_example(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"text": "x" * length}) + "\n" for length in (5, 40, 17)))
    path = tmp_path / "run.yaml"
    content = {"model": {"name": str(base)}, "data": {"train": str(data)}, "train": {"max_length": 128}}
    content["train"]["per_device_train_batch_size"] = 4
    path.write_text(yaml.safe_dump(content))
    planned = plan_json(str(path), "--rate", "1", "--set", "model.quantization=nf4")
    assert planned["setting"]["sequence_length"] == 40 + 1  # bytes, and the end of the text
    assert planned["weights"] == "nf4"
    assert "longest example" in planned["lengths"]
    # Time is that of batches of 4 padded to their longest: 41 in 65 of 81 cases, 18 in 15, 6 in 1.
    assert planned["typical_sequence_length"] == round((65 * 41 + 15 * 18 + 6) / 81)
    given = plan_json(str(path), "--rate", "1", "--set", "model.quantization=nf4", "--seq", "36")
    assert planned["flops_per_step"] == given["flops_per_step"]
    for change, given_length, length in (("max_length=16", None, 16), ("packing=true", None, 128), ("seed=0", 64, 64)):
        target = target_of_run(path, [f"train.{change}"], "cpu", given_length, None)
        assert target.setting.sequence_length == length


@pytest.mark.parametrize("unusable", ["refuse", "leave_out"])
def test_what_a_run_leaves_out_does_not_count_as_its_longest_example(base: Path, tmp_path: Path, unusable: str) -> None:
    """One prompt over the limit made a plan more than five times as large as the run."""
    data, path = tmp_path / "train.jsonl", tmp_path / "run.yaml"
    texts = [{"prompt": "p" * prompt, "completion": "c" * 5} for prompt in (6, 20, 300)]
    data.write_text("".join(json.dumps(text) + "\n" for text in texts))
    content = {"model": {"name": str(base)}, "data": {"train": str(data)}, "train": {"max_length": 128}}
    content["data"]["unusable"] = unusable
    path.write_text(yaml.safe_dump(content))
    expected = {"refuse": 128, "leave_out": 20 + 5 + 1}[unusable]
    assert target_of_run(path, [], "cpu", None, None).setting.sequence_length == expected


def test_data_that_cannot_be_read_is_told_as_a_warning(base: Path, tmp_path: Path) -> None:
    """`paca train` refuses it, and `train.max_length` may be many times the length of its examples."""
    data, path = tmp_path / "train.jsonl", tmp_path / "run.yaml"
    data.write_text(json.dumps({"messages": [{"role": "bot", "content": "a"}]}) + "\n")
    content = {"model": {"name": str(base)}, "data": {"train": str(data)}, "train": {"max_length": 128}}
    path.write_text(yaml.safe_dump(content))
    text = plan(str(path), "--device", "cpu", "--rate", "1")
    assert "Warning: The length is that of train.max_length: the examples could not be read (train.jsonl" in text
    assert "Mend that, or give the longest one's (--seq)." in text
    assert plan_json(str(path))["warning"].startswith("The length is that of train.max_length: ")
    for fine in (["--seq", "64"], ["--set", "data.train=to-be-written.jsonl"]):
        assert "Warning: " not in plan(str(path), "--device", "cpu", "--rate", "1", *fine)
    with pytest.raises(paca.PacaError, match=r"max_length is null, and .* could not be read .*'bot'.* --seq\.$"):
        plan(str(path), "--set", "train.max_length=null")


def test_a_run_is_planned_with_its_own_settings(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    content = {
        "model": {"name": str(base)},
        "data": {"train": "not-read.jsonl"},
        "paca": {"r": 2},
        "train": {"max_length": 128, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    }
    path.write_text(yaml.safe_dump(content))
    planned = plan_json(str(path), "--rate", "1", "--set", "train.gradient_checkpointing=true")
    setting = planned["setting"]
    assert (setting["sequence_length"], setting["batch_size"], setting["gradient_accumulation"]) == (128, 2, 3)
    assert setting["checkpointing"]
    assert setting["padded"]
    assert planned["trainable"] == 2 * (64 + 32 + 32 + 64 + 112 + 112 + 64)
    assert plan_json(str(path), "--rate", "1", "--seq", "64")["setting"]["sequence_length"] == 64


@pytest.fixture
def run(base: Path, tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    model = {"name": str(base), "dtype": "bfloat16", "lean": True, "recompute": "mlp"}
    train = {"max_length": 256, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    content = {"model": model, "data": {"train": "not-read.jsonl"}, "paca": {"r": 2}, "train": train}
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_what_a_search_recommends_takes_as_much_once_it_is_in_the_run(run: str) -> None:
    arguments = (run, "--device", "cuda", "--rate", "1")
    text = plan(*arguments, "--memory", "100GiB")
    printed = yaml.safe_load(text.partition("In a run's YAML:\n")[2])
    assert printed["train"]["per_device_train_batch_size"] == 8
    assert printed["model"] == {"lean": False, "recompute": None}
    changes = [f"{name}.{key}={value}" for name, values in printed.items() for key, value in values.items()]
    given = [option for change in changes for option in ("--set", change.replace("None", "null"))]
    found = json.loads(plan(*arguments, "--memory", "100GiB", "--json"))
    assert json.loads(plan(*arguments, *given, "--json"))["total"] == found["total"]
    assert found["setting"]["padded"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--checkpointing", "--lean"], "lean blocks, activation checkpointing"),
        (["--recompute"], "lean blocks, MLP recomputed"),
        (["--recompute", "--checkpointing"], "lean blocks, MLP recomputed, activation checkpointing"),
    ],
)
def test_a_search_has_what_is_asked_for(base: Path, options: list[str], words: str) -> None:
    arguments = (str(base), "--seq", "64", "--memory", "100GiB", "--device", "cpu", "--rate", "1", "--batch-size", "3")
    text = plan(*arguments, "--quantization", "none", *options)
    assert f"3 x 64 tokens per pass, 5 passes per step, on cpu; to save memory: {words}, chunked loss" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--r", "60", "--dtype", "bfloat16"], r"--r and --dtype .* --set paca\.r=60 .* --set model\.dtype=bfloat16"),
        (["--global-batch", "64"], "--global-batch would change nothing without a budget.* --memory"),
        (["--loss", "any"], "--loss any would change nothing"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(run: str, options: list[str], message: str) -> None:
    with pytest.raises(paca.PacaError, match=message):
        plan(run, *options)


def test_a_published_shape_is_planned_without_a_hub() -> None:
    content = plan_json("smollm2-135m", "--seq", "128", "--rate", "1")
    assert content["parameters"] == 134515008
    with pytest.raises(paca.PacaError, match="image model"):
        plan("vit-b16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "lots"], "24GiB"),
        (["--memory", "24"], "Did you mean 24GiB"),
        (["--loss", "huge"], "chunked, full or any"),
        (["--dtype", "int3"], "int3"),
        (["--seq", "0"], "sequence_length"),
        (["--set", "train.max_length=3"], "--set"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_mistakes_are_explained(base: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(paca.PacaError, match=message):
        plan(str(base), *arguments)


def test_a_device_that_is_not_here_is_simulated_and_says_so(base: Path) -> None:
    text = plan(str(base), "--seq", "64", "--on", "h100", "--steps", "500")
    assert "Simulated on NVIDIA H100 80 GB SXM: nothing here was measured" in text
    assert "500 steps" in text
    assert "Time floor" not in text
    assert "79.11 GiB" in text  # of 80
    assert "Programs get 79.11 GiB of the device's 80.00 GiB (vllm-project/vllm issue 27508)." in text
    content = json.loads(plan(str(base), "--seq", "64", "--on", "H100", "--json"))
    assert content["seconds_per_step"] is None
    assert content["simulated"]["measured"] is False
    (row,) = content["simulated"]["methods"].values()
    assert row["tokens_per_second"] == 64 / row["seconds_per_step"]
    assert row["hours"] == 1000 * row["seconds_per_step"] / 3600
    assert row["fits"]


def test_for_a_device_without_bfloat16_a_model_is_planned_in_float16(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    text = plan(str(tmp_path), "--seq", "64", "--on", "t4")
    assert "weights in float16" in text
    assert "The NVIDIA T4 16 GB has no units for bfloat16. This is planned in float16." in " ".join(text.split())


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_of_a_simulation_is_whole_in_80_columns(width: int) -> None:
    time = SimpleNamespace(total=123.4567, launch_bound=1.0, waits=0)
    row = SimpleNamespace(
        method="lora-tuned",
        adapter="r 16, alpha 16",
        estimate=SimpleNamespace(total=1023 * 2**30),
        time=time,
        tokens_per_second=1234567,
        hours=lambda steps: steps * time.total / 3600,
    )
    device = SimpleNamespace(name="mi300x", title="AMD", usable=2**30, source="a sheet")
    console = Console(file=io.StringIO(), width=width)
    simulated: Any = SimpleNamespace(device=device, rows=[row], refused=(), notes=())
    show_simulated(console, simulated, 100_000)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    cells = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in text.splitlines()[2:]]
    assert cells[0] == ["", "", "ms per", "", "hours of", "launch-"]
    assert cells[1] == ["method", "memory", "step", "tokens/s", "100,000 steps", "bound"]
    assert cells[3] == ["lora-tuned", "1023.00 GiB", "123,457", "1,234,567", "3,429.35", "100 %"]
    assert cells[4][1] == "(too much)"
    assert "lora-tuned: r 16, alpha 16." in text
    show_simulated(console, simulated, 3)
    again = console.file.getvalue().removeprefix(text)  # type: ignore[attr-defined]
    assert "minutes of" in again
    assert " 6.17 " in again


@pytest.mark.slow(reason="simulates models over and over")
def test_a_run_is_simulated_at_its_typical_length_for_its_steps(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"text": "x" * length}) + "\n" for length in (5, 40, 17)))
    path = tmp_path / "run.yaml"
    train = {"max_steps": 300, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    path.write_text(yaml.safe_dump({"model": {"name": str(base)}, "data": {"train": str(data)}, "train": train}))
    content = json.loads(plan(str(path), "--on", "l40s", "--compare", "lora", "--json"))
    simulated = content["simulated"]
    assert simulated["steps"] == 300
    assert [*simulated["methods"]] == ["paca", "lora", "lora-tuned", "qpaca", "qlora"]
    paca_row = simulated["methods"]["paca"]
    assert (paca_row["trainable"], paca_row["layers"]) == (content["trainable"], 7)
    assert all(row["alpha"] for row in simulated["methods"].values())
    assert [simulated["methods"][name]["r"] for name in ("paca", "qpaca")] == [paca.PacaConfig().r] * 2
    for row in simulated["methods"].values():
        assert row["trainable"] == pytest.approx(paca_row["trainable"], rel=0.02)
    assert paca_row["total"] == content["total"]
    tokens = paca_row["tokens_per_second"] * paca_row["seconds_per_step"]
    assert tokens == pytest.approx(6 * content["typical_sequence_length"])


def test_loras_memory_on_this_machine_stands_beside_pacas(base: Path) -> None:
    options = (str(base), "--seq", "32", "--batch-size", "2", "--device", "cpu", "--rate", "1", "--compare", "lora")
    content = json.loads(plan(*options, "--json"))
    methods = content["methods"]
    assert "simulated" not in content
    named = [f"{method}: " for method in ("qpaca", "qlora")]
    assert [*methods][:3] == ["paca", "lora", "lora-tuned"]
    assert all(any(name in line for line in content["left_out"]) or name[:-2] in methods for name in named)
    assert methods["paca"]["total"] == content["total"]
    assert methods["lora"]["saved_activations"] >= methods["lora-tuned"]["saved_activations"]
    assert methods["lora-tuned"]["saved_activations"] > methods["paca"]["saved_activations"]
    assert methods["lora"]["trainable"] == pytest.approx(methods["paca"]["trainable"], rel=0.05)
    text = plan(*options)
    for method, row in list(methods.items())[:3]:
        assert re.search(rf"│ {method} +│ +{re.escape(format_bytes(row['total']))} │", text)
    assert "compare` measures their time, and what they learn." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--on", "h10"], "Did you mean 'h100'"),
        (["--on", "h100", "--rate", "3"], "--rate"),
        (["--on", "h100", "--device", "cpu"], "--device"),
        (["--on", "h100", "--compare", "dora"], "--compare must be lora"),
        (["--steps", "3"], "--on h100"),
        (["--on", "h100", "--steps", "0"], "1 or more"),
    ],
)
def test_mistakes_about_devices_are_explained(base: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(paca.PacaError, match=message):
        plan(str(base), *arguments)
