"""What a command can say without a model, it says before torch and the libraries around it are imported.

One process that has imported nothing but the program is forked for each command: that is sooner than to start each.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import paca_command
from paca.cli import main
from paca.cli.chat import chat, typed_lines
from paca.cli.starting import ON_A_BUSY_ONE, ON_A_FREE_MACHINE, send_no_telemetry
from paca.messages.errors import PacaError
from paca.training.folder.run_folder import RunFolder

HEAVY = ("torch", "transformers", "huggingface_hub", "peft", "trl", "datasets", "accelerate", "matplotlib")
SERVER = f"""
import json, os, sys, traceback
from paca_command import enter_package, main
enter_package()
import paca.cli
print([name for name in {(*HEAVY, "yaml")!r} if name in sys.modules], flush=True)
for line in sys.stdin:
    arguments, cwd, output, errors = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(cwd)
        sys.argv, sys.stdout, sys.stderr = ["-c", *arguments], open(output, "w"), open(errors, "w")
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
            status = 99
        print("\\ntelemetry off:", os.environ.get("HF_HUB_DISABLE_TELEMETRY"))
        print("imported:", [name for name in {HEAVY!r} if name in sys.modules])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
Run = Callable[..., subprocess.CompletedProcess[str]]
FREED_MEMORY = Path(paca_command.__file__).with_name("paca") / "training" / "freed_memory.py"
MODEL_AND_DATA = "model: {name: some/model}\ndata: {train: some/data}\n"


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "[]\n"
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def run(server: subprocess.Popen[str], tmp_path: Path) -> Run:
    """Runs the program with these arguments in `tmp_path`."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        assert server.stdin is not None
        assert server.stdout is not None
        streams = [tmp_path / "stdout", tmp_path / "stderr"]
        server.stdin.write(json.dumps([arguments, str(tmp_path), *map(str, streams)]) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(arguments, status, *(stream.read_text() for stream in streams))

    return run


@pytest.mark.parametrize("command", ["", "train", "compare", "evaluate", "chat", "merge", "plan", "bench"])
def test_help_imports_nothing_heavy(run: Run, command: str) -> None:
    done = run(*([command] if command else []), "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert "<bool>" not in done.stdout  # a switch takes no value
    assert done.stdout.endswith("imported: []\n")


def test_ctrl_c_while_the_command_line_loads_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("paca.cli.main", interrupted)
    with pytest.raises(SystemExit) as end:
        paca_command.main()
    assert end.value.code == 130


def test_ctrl_c_before_a_command_begins_its_work_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as while the libraries are imported, for seconds: it ended without a word."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["paca.cli.train"], "check_launchers_variables", interrupted)
    monkeypatch.setattr("sys.argv", ["paca", "train", "run.yaml"])
    with pytest.raises(SystemExit) as end:
        paca_command.main()
    assert end.value.code == 130
    assert capsys.readouterr().err == "Stopped.\n"


def test_no_library_is_to_tell_its_makers_unless_the_user_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # What counts is what huggingface_hub finds when it is imported, after this.
    assert run("--version").stdout.endswith("telemetry off: 1\nimported: []\n")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    send_no_telemetry()
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "There is no file"),
        ("model: {name: some/model}\n", "data.train is missing"),
        ("model: some/model\n", "must hold keys, not the text 'some/model'. Give it as model: {name: some/model}"),
        (MODEL_AND_DATA + "trian: {seed: 1}\n", "there is no section 'trian'. Did you mean train?"),
        (MODEL_AND_DATA + "paca: {rank: 3}\n", "line 3: there is no key paca.rank. Did you mean paca.r?"),
        (MODEL_AND_DATA + "paca: {paca_alph: 3}\n", "there is no key paca.paca_alph. Did you mean paca.paca_alpha?"),
        (MODEL_AND_DATA + "paca: {alpha: 3}\n", "there is no key paca.alpha. Did you mean paca.paca_alpha?"),
        (
            MODEL_AND_DATA + "paca: {lora_dropout: 0.1}\n",
            "no key paca.lora_dropout. PaCA has no dropout. Leave it out.",
        ),
        ("model: {name: m}\ndata: {path: a.jsonl}\n", "there is no key data.path. Did you mean data.train?"),
        (MODEL_AND_DATA + "train: {lr: 1}\n", "there is no key train.lr. Did you mean train.learning_rate?"),
        (MODEL_AND_DATA + "train: {output_dir: a}\n", "can't be set here: the run folder is output.dir."),
        (MODEL_AND_DATA + "eval: {befor: true}\n", "there is no key eval.befor. Did you mean eval.before?"),
        (MODEL_AND_DATA + "eval: {meitrc: loss}\n", "there is no key eval.meitrc. Did you mean eval.metric?"),
        ("model: [\n", "line 2, column 1: not valid YAML"),
        (MODEL_AND_DATA + "calibration: {sequences: 0}\n", "calibration.sequences is 0; it must be 1 or more."),
        (
            "base_model: m\n",
            "no section 'base_model'. Did you mean the key model.name? It stands below model:",
        ),
        (
            MODEL_AND_DATA + "adapter: lora\n",
            "no section 'adapter'. The method is a section: paca:, lora:, peft:",
        ),
        (
            "model: {name: m, load_in_4bit: true}\ndata: {train: a/b}\n",
            "model.quantization? It is nf4, fp4 or int8.",
        ),
        (MODEL_AND_DATA + "learning_rate: 3\n", "Did you mean the key train.learning_rate? It stands below train:"),
        (
            "model: {name: some/model}\ndata: {train: run.jsonl}\n",
            "line 2: data.train: There is no data file or folder",
        ),
        (
            "model: {name: ./model}\ndata: {train: some/data}\n",
            "line 1: model.name: No model at './model': there is no",
        ),
        ("model: {name: m.gguf}\ndata: {train: a/b, eval: no.csv}\n", "line 2: data.eval: There is no data file or"),
        (
            "model: {name: m}\ndata: {train: [a/b, ~/no/such]}\n",
            "data.train: There is no data file or folder '~/no/such'",
        ),
    ],
)
def test_a_config_that_is_wrong_by_itself_is_refused_before_anything_heavy_is_imported(
    run: Run, tmp_path: Path, text: str | None, message: str
) -> None:
    config = tmp_path / "run.yaml"
    if text is not None:
        config.write_text(text)
    done = run("train", str(config))
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stdout.endswith("imported: []\n")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "runs/done already holds a finished run. Give another output.dir, or start over with"),
        (["--set", "output.overwrite=true", "--set", "model.name=runs/done"], "model.name is runs/done, in the folder"),
        (["--set", "output.dir=run.yaml/new"], "run.yaml/new (output.dir) can't be made or written: not a directory."),
        (["--set", "output.dir=run.yaml"], "run.yaml (output.dir) can't be made or written: file exists."),
        (["--resume", "--set", "output.dir=runs/none"], "There is nothing to resume: runs/none has no complete"),
        (["--resume", "--set", "output.dir=runs"], "There is nothing to resume: runs has no complete"),
    ],
)
def test_a_folder_that_a_run_can_not_have_is_refused_before_anything_heavy_is_imported(
    run: Run, tmp_path: Path, settings: list[str], message: str
) -> None:
    (tmp_path / "run.yaml").write_text(MODEL_AND_DATA + "output: {dir: runs/done}\n")
    (tmp_path / "runs" / "done").mkdir(parents=True)
    (tmp_path / "runs" / "done" / "summary.json").write_text("{}")
    done = run("train", "run.yaml", *settings)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stdout.endswith("imported: []\n")
    assert [path.name for path in (tmp_path / "runs").rglob("*")] == ["done", "summary.json"]


@pytest.mark.parametrize("switches", [[], ["--resume"]])
def test_a_folder_that_another_run_has_is_refused_before_anything_heavy_is_imported(
    run: Run, tmp_path: Path, switches: list[str]
) -> None:
    (tmp_path / "run.yaml").write_text(MODEL_AND_DATA)
    with RunFolder(tmp_path / "runs" / "run").in_use():
        done = run("train", "run.yaml", *switches)
    assert done.returncode == 1
    assert "runs/run is in use: process" in done.stderr
    assert done.stdout.endswith("imported: []\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "Missing argument"),
        (["train", "--stpes"], "No such option"),
        (["train", "answers.yaml", "--lr", "1"], "No such option: --lr, which is one of paca compare. A key of"),
        (["evaluate", "runs/a", "--metric", "loss"], "SECTION.KEY=VALUE, as --set eval.metric=exact_match."),
        (["merge", "runs/a", "--dry-run"], "No such option: --dry-run, which is one of paca train"),
        (["plan", "answers.yaml", "--probe"], "No such option: --probe, which is one of paca train"),
        (["train", "answers.yaml", "--learning-rate", "1"], "is set with --set SECTION.KEY=VALUE, as --set train.lea"),
        (["trian"], "No such command"),
        (["--dry-run", "train", "a.yaml"], "option: --dry-run. It belongs behind train: paca train --dry-run a.yaml"),
        (["--set", "a.b=c d", "train"], "option: --set. It belongs behind train: paca train --set 'a.b=c d'"),
        (["--probe", "plan", "a.yaml"], "No such option: --probe"),
        (["train", "answers.yaml", "--set"], "--set needs a value: SECTION.KEY=VALUE."),
        (["compare", "answers.yaml", "--seeds", "0"], "--output is missing: The folder for runs and report."),
        (["compare", "answers.yaml", "--output"], "--output needs a value: The folder for runs and report."),
        (["chat", "runs/answers", "--beside"], "--beside needs a value: RUN_OR_ADAPTER|base. Also show the answers of"),
        (["chat", "runs/answers", "--beside", "--prompt", "hi"], "--beside needs a value"),
        (["chat", "runs/answers", "--base", "other"], "--base takes no value, and 'other' was given. For a value"),
        (["chat", "--base", "other", "runs/answers"], "there is --base-model: The base model: a folder or a hub id."),
        (
            ["chat", "runs/answers", "--base=other"],
            "--base takes no value, and 'other' was given. For a value there is",
        ),
        (["train", "answers.yaml", "--dry-run", "true"], "--dry-run takes no value, and 'true' was given. Leave it"),
        (
            ["compare", "answers.yaml", "--equal", "params", "--output", "out"],
            "Invalid value for '--equal': 'params' is not one of 'parameters', 'time', 'memory', 'parameters,time', "
            "'memory,time'. Did you mean 'parameters'?",
        ),
        (["train", "answers.yaml", "--dry-run", "--set", "a.b=c", "d.e=f"], "(d.e=f) Give --set again for each key."),
        (["train", "answers.yaml", "--output", "out"], "as --set output.dir=FOLDER."),
        (["chat", "runs/answers", "hello"], "argument(s) (hello) Give a question with --prompt."),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_heavy_is_imported(
    run: Run, arguments: list[str], message: str
) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.replace("│", "").split())
    assert done.stdout.endswith("imported: []\n")


@pytest.mark.parametrize(
    ("override", "example"),
    [
        ("r=8", "paca.r=8"),
        ("learning_rate=3", "train.learning_rate=3"),
        ("limit=9", "data.limit=9"),
        ("name=m", "model."),
    ],
)
def test_a_setting_without_its_section_is_told_before_anything_heavy_is_imported(
    run: Run, tmp_path: Path, override: str, example: str
) -> None:
    (tmp_path / "run.yaml").write_text(MODEL_AND_DATA)
    done = run("train", "run.yaml", "--set", override)
    assert done.returncode == 1
    assert f"--set {override}: expected section.key=value, such as --set {example}" in done.stderr
    assert done.stdout.endswith("imported: []\n")


def test_a_word_behind_a_switch_may_be_the_argument(run: Run) -> None:
    done = run("chat", "--base", "missing")
    assert done.returncode == 1
    assert "No such folder: missing." in done.stderr


OUTPUT = ["--output", "written"]
WITHOUT_GRADIO = pytest.mark.skipif(find_spec("gradio") is not None, reason="gradio is installed: the page would open")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["chat", "missing"], "No such folder: missing. Give a run of `paca train`, an adapter's folder or a model's."),
        (["chat", "answer"], "No such folder: answer. Did you mean 'runs/answers'? Give a run"),
        (["chat", "answers"], "No such folder: answers. Did you mean 'runs/answers'? Give a run"),
        (["chat", "runs/answer"], "No such folder: runs/answer. Did you mean 'runs/answers'? Give a run"),
        (["chat", "adapter", "--beside", "bse"], "Did you mean base, the model without the adapter?"),
        (["chat", "broken"], "broken/adapter_config.json is broken: Expecting"),
        (["merge", "broken", *OUTPUT], "It should be a JSON object; copy or save it again."),
        (["train", "runs/answers"], "is a folder; a YAML file was expected. Did you mean 'runs/answers/config.yaml'?"),
        (["train", "run.yml"], "There is no file run.yml. Did you mean 'run.yaml'?"),
        (["compare", "rum.yaml", *OUTPUT], "no folder of that name. Did you mean 'run.yaml'? Give a run's YAML"),
        (["evaluate", "missing", "--tasks", "arc_easy", *OUTPUT], "No such folder: missing."),
        (["evaluate", "adapter", *OUTPUT], "There is nothing to evaluate adapter on: it is no folder of a run"),
        (["merge", "missing", *OUTPUT], "No such folder: missing. Give a run of `paca train` or an adapter's folder."),
        (["export", "missing", "--to", "lora", *OUTPUT], "Give a run of `paca train` or an adapter's folder."),
        (["export", "adapter", "--to", "foo", *OUTPUT], "--to is 'foo'; it can be lora, merged, gguf, peft."),
        (["export", "adapter", "--to", "lroa", *OUTPUT], "it can be lora, merged, gguf, peft. Did you mean lora?"),
        (["export", "adapter", "--to", "lora", "--output", "model"], "model exists and is not empty."),
        (["export", "adapter", "--to", "gguf", "--output", "model"], "should be a file whose name ends in .gguf."),
        (["export", "model", "--to", "merged", *OUTPUT], "model is a whole model, not an adapter."),
        (["merge", "adapter", "--output", "model"], "model exists and is not empty."),
        (["merge", "adapter", "--output", "w\udcfcrde"], "has a name that is not UTF-8. Give another output."),
        (["export", "adapter", "--to", "gguf", "--output", "w\udcfcrde.gguf"], "has a name that is not UTF-8."),
        (["import", "missing", *OUTPUT], "No such file or folder: missing."),
        (
            ["import", "run.yaml", *OUTPUT],
            "run.yaml is a file of type '.yaml', which is no checkpoint. Give the folder",
        ),
        (["import", "adapter", "--output", "model"], "model exists and is not empty."),
        (["plan", "model", "--loss", "chunkd"], "not 'chunkd'. Did you mean chunked?"),
        (["plan", "model", "--quantization", "nf3"], "not 'nf3'. Did you mean nf4?"),
        (["plan", "model", "--memory", "much"], "'much' is no amount of memory."),
        (["plan", "model", "--on", "h900"], "There is no device 'h900' in the table. Did you mean 'h200'?"),
        (["plan", "model", "--loss", "half"], "--loss must be chunked, full or any, not 'half'."),
        (["runs", "run"], "No such folder: run. Did you mean 'runs'? Give a folder with runs of `paca train`, or one"),
        (["runs", "model"], "There are no runs in model: no metrics.jsonl in it, nor in its folders."),
        pytest.param(["runs", "runs"], ': pip install "./paca[runs]"', marks=WITHOUT_GRADIO),
        (["bench", "--hidden", "300"], "hidden is 300; this shape has heads of 128 in groups of 4, so it must be a"),
        (["bench", "--model", "llama9"], "There is no model 'llama9' here, and no preset of that name. Did you mean"),
        (["bench", "--model", "./model", "--layers", "2"], "layers resizes presets only"),
        (["bench", "--methods", "paca,nope"], "There is no method 'nope'."),
        (["bench", "--methods", "paca:r=0"], "paca: r is '0'; give a whole number from 1 on."),
    ],
)
def test_what_can_not_work_is_refused_before_anything_heavy_is_imported(
    run: Run, tmp_path: Path, command: list[str], message: str
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text('{"peft_type": ')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "runs" / "answers").mkdir(parents=True)
    for name in ("run.yaml", "runs/answers/config.yaml", "runs/answers/metrics.jsonl"):
        (tmp_path / name).touch()
    done = run(*command)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stdout.endswith("imported: []\n")


def test_a_deleted_working_folder_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deleted").mkdir()
    monkeypatch.chdir(tmp_path / "deleted")
    (tmp_path / "deleted").rmdir()
    monkeypatch.setattr("sys.argv", ["paca", "merge", "missing", *OUTPUT])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("Error: The working folder is gone: it was deleted.")


def test_chat_needs_an_open_standard_input_with_text_in_its_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(PacaError, match=r"Standard input is closed.* Give the question with --prompt\."):
        chat("missing")
    with pytest.raises(PacaError, match="No such folder: missing"):
        chat("missing", prompt="Hi")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("na\nja \xfc".encode("latin-1")), encoding="utf-8"))
    with pytest.raises(PacaError, match="What came on standard input is not text in utf-8"):
        list(typed_lines())


@pytest.mark.parametrize(
    ("given", "load", "expected"),
    [
        ({}, 0.2, ON_A_FREE_MACHINE),
        ({}, 3.0, ON_A_BUSY_ONE),
        ({}, None, ON_A_BUSY_ONE),
        ({"OMP_WAIT_POLICY": "active"}, 0.2, None),
        ({"GOMP_SPINCOUNT": "7"}, 0.2, "7"),
    ],
)
def test_waiting_threads_soon_sleep_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], load: float | None, expected: str | None
) -> None:
    def load_average() -> tuple[float, float, float]:
        if load is None:
            raise OSError("not known")
        return load, load, load

    monkeypatch.setattr(os, "getloadavg", load_average)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that it is put back as it was
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["paca", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


HOLDS = """
import runpy, sys
keep_freed_memory = runpy.run_path(sys.argv[1])["keep_freed_memory"]  # without what the package imports

def resident():  # pages
    return int(open("/proc/self/statm").read().split()[1])

told, before = keep_freed_memory(), resident()
block = bytearray(2**28)
del block
print(told, (resident() - before) * 4096 > 2**27)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is told")
@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "True True"), ({"MALLOC_ARENA_MAX": "2"}, "False False"), ({"GLIBC_TUNABLES": ""}, "False False")],
)
def test_training_keeps_freed_memory_unless_the_user_says_otherwise(given: dict[str, str], expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", HOLDS, FREED_MEMORY], env=environment | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected


def test_memory_that_ran_out_is_one_line_and_other_failures_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(message: str) -> None:
        def raises(**_: str) -> None:
            raise RuntimeError(message)

        monkeypatch.setattr("paca.cli.app", raises)

    fails("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.")
    with pytest.raises(SystemExit):
        main()
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.startswith("Error: Memory ran out (CUDA error: out of memory). Free some; where a GPU is too small")
    fails("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):
        main()
