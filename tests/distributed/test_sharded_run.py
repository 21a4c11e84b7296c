"""`paca train` with FSDP2 in two processes, through Trainer and accelerate."""

from __future__ import annotations

import gc
import io
import os
import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from rich.console import Console
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerState, TrainingArguments
from trl import SFTConfig

from distributed.as_accelerators import shard_on_cpus
from forked_process import FORKS
from models import adapt, llama
from paca.layers import PacaLayer
from paca.messages.errors import PacaError
from paca.training import load_run_config, sharding, train
from paca.training.config.train_settings import training_arguments
from paca.training.folder.checkpoints import load_if_finished
from paca.training.folder.run_folder import RunFolder
from paca.training.reporting import report
from paca.training.sharding import check_sharding, devices_warning, spare_buffers
from training.tiny_run import adapter, curve, place_of_curve, place_of_curves, save_workspace

ONE = ["train.per_device_train_batch_size=4", "train.max_steps=4", "train.save_steps=2"]
SHARDED = [
    "train.per_device_train_batch_size=2",
    "train.max_steps=4",
    "train.save_steps=2",
    "train.fsdp=true",
    "train.fsdp_config={transformer_layer_cls_to_wrap: [LlamaDecoderLayer]}",
]


def worker(
    rank: int, world: int, port: int, config: str, settings: list[str], output: str, resume: bool, accelerated: bool
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    gc.freeze()  # what was imported is not walked through again each time that garbage is collected
    report.curve, report.loss_curves = place_of_curve, place_of_curves
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    if accelerated:
        shard_on_cpus()
    sends, asked = DistributedDataParallel.will_sync_module_buffers, []
    DistributedDataParallel.will_sync_module_buffers = lambda self: asked.append(sends(self)) or asked[-1]
    with open(f"{output}-{rank}.txt", "w") as file:
        train(load_run_config(Path(config), settings), resume=resume, console=Console(file=file, width=300))
        print("DDP sent buffers in", sum(asked), "of", len(asked), "passes", file=file)
    torch.distributed.destroy_process_group()


def run_in_two(config, settings, output, resume=False, accelerated=True):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (2, port, str(config), settings, str(output), resume, accelerated)
    mp.start_processes(worker, arguments, 2, start_method=FORKS.get_start_method())
    return Path(f"{output}-0.txt").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A workspace with the same run twice: in one process, and sharded over two."""
    folder = tmp_path_factory.mktemp("runs")
    config = save_workspace(folder)
    (folder / "model" / "config.json").write_text(
        (folder / "model" / "config.json").read_text().replace('"attention_dropout": 0.2', '"attention_dropout": 0.0')
    )
    train(load_run_config(config, [*ONE, f"output.dir={folder}/one"]), console=Console(file=io.StringIO()))
    run_in_two(config, [*SHARDED, f"output.dir={folder}/sharded"], folder / "sharded")
    return folder


def close(one, other, rtol=1e-3, atol=1e-4):
    first, second = adapter(one), adapter(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=rtol, atol=atol)
    for row, expected in zip(curve(other), curve(one), strict=True):
        for value, other_value in zip(row, expected, strict=True):
            assert value == (other_value if other_value is None else pytest.approx(other_value, rel=1e-3))


@pytest.mark.slow(reason="trains in several processes")
def test_a_sharded_run_is_the_run_of_one_process(runs):
    close(runs / "one", runs / "sharded")
    assert "processes             2" in Path(f"{runs}/sharded-0.txt").read_text()
    assert "Warning" not in Path(f"{runs}/sharded-0.txt").read_text()


@pytest.mark.slow(reason="trains in several processes")
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_sharded_run_resumes(runs, tmp_path, kind):
    settings = [*SHARDED[:-1], f"train.fsdp_config={{state_dict_type: {kind}, {SHARDED[-1].split('{')[1]}"]
    run = tmp_path / "run"
    if kind == "FULL_STATE_DICT":
        as_after_step_2(runs / "sharded", run)
        settings = SHARDED
    else:
        run_in_two(runs / "config.yaml", [*settings, f"output.dir={run}"], tmp_path / "first")
        assert (run / "checkpoints/checkpoint-2/optimizer_0").is_dir()
        for part in ("adapter", "checkpoints/checkpoint-4"):
            shutil.rmtree(run / part)
        (run / "summary.json").unlink()
    output = run_in_two(runs / "config.yaml", [*settings, f"output.dir={run}"], tmp_path / "again", resume=True)
    assert "Resuming after step 2 of 4." in output
    close(runs / "sharded", run)


def as_after_step_2(run, copy):
    shutil.copytree(run, copy)
    for part in ("adapter", "checkpoints/checkpoint-4"):
        shutil.rmtree(copy / part)
    (copy / "summary.json").unlink()
    return copy


@pytest.mark.slow(reason="trains in several processes")
def test_a_run_goes_on_with_another_number_of_processes(runs, tmp_path):
    in_two = ["train.per_device_train_batch_size=2", *ONE[1:]]
    output = run_in_two(runs / "config.yaml", [*in_two, f"output.dir={tmp_path}/two"], tmp_path / "two", False, False)
    assert "processes             2" in output
    close(runs / "one", tmp_path / "two", rtol=1e-4, atol=1e-5)

    more = as_after_step_2(runs / "one", tmp_path / "more")
    output = run_in_two(runs / "config.yaml", [*in_two, f"output.dir={more}"], tmp_path / "out", True, False)
    assert "Resuming after step 2 of 4." in output
    close(runs / "one", more, rtol=1e-4, atol=1e-5)

    fewer, output = as_after_step_2(tmp_path / "two", tmp_path / "fewer"), io.StringIO()
    train(
        load_run_config(runs / "config.yaml", [*ONE, f"output.dir={fewer}"]), resume=True, console=Console(file=output)
    )
    assert "Resuming after step 2 of 4." in output.getvalue()
    close(runs / "one", fewer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("train.fsdp_config={version: 1}", "asks for FSDP 1.*FSDP2 .* is the default"),
        ("train.fsdp_config={activation_checkpointing: true}", "the saved adapter would be empty"),
        ("paca.modules_to_save=[lm_head]", "modules_to_save does not go with train.fsdp"),
        ("train.factor_rank=2", "factor_rank does not go with train.fsdp"),
        ("train.fsdp_config={cpu_ram_efficient_loading: true}", "cpu_ram_efficient_loading does not go with PaCA"),
    ],
)
def test_what_would_fail_later_is_refused_at_once(runs, tmp_path, monkeypatch, settings, message):
    config = load_run_config(runs / "config.yaml", ["train.fsdp=true", settings, f"output.dir={tmp_path}/run"])
    monkeypatch.setattr(SFTConfig, "world_size", 2)
    with pytest.raises(PacaError, match=message):
        train(config, console=Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()


def test_what_accelerates_launcher_asks_for_is_looked_at_too(runs, tmp_path, monkeypatch):
    config = load_run_config(runs / "config.yaml", [f"output.dir={tmp_path}/run"])
    monkeypatch.setattr(SFTConfig, "world_size", 2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # transformers leaves it behind
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    with pytest.raises(PacaError, match="the saved adapter would be empty"):
        train(config, console=Console(file=io.StringIO()))


def deepspeed(*mismatches):
    """Settings of a trainer that DeepSpeed works for, as far as they are looked at: it need not be installed."""
    told = SimpleNamespace(mismatches=list(mismatches))
    return SimpleNamespace(fsdp=None, deepspeed_plugin=object(), hf_deepspeed_config=told)


def test_settings_of_deepspeed_that_are_not_the_runs_are_refused_at_once(runs):
    config = load_run_config(runs / "config.yaml", [])
    check_sharding(deepspeed(), config)
    message = (
        r"DeepSpeed's bf16.enabled=True vs train.bf16=False\. Make them the same, or give DeepSpeed the value auto"
    )
    with pytest.raises(PacaError, match=message):
        check_sharding(deepspeed("- ds bf16.enabled=True vs hf bf16=False"), config)
    for setting in ("paca.rotate_every=2", "train.factor_rank=2"):
        with pytest.raises(PacaError, match=f"{setting[:-2]} does not go with DeepSpeed"):
            check_sharding(deepspeed(), load_run_config(runs / "config.yaml", [setting]))


@pytest.mark.parametrize("setting", ["paca.selection=weight_norm", "model.quantization=nf4"])
def test_what_needs_whole_weights_is_refused_under_zero_3(runs, monkeypatch, setting):
    config = load_run_config(runs / "config.yaml", [setting])
    check_sharding(deepspeed(), config)
    monkeypatch.setattr(sharding, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(PacaError, match=f"{setting.split('=')[0]}.* ZeRO-3.* ZeRO stage 1 or 2"):
        check_sharding(deepspeed(), config)
    check_sharding(deepspeed(), load_run_config(runs / "config.yaml", []))


def test_a_last_checkpoint_of_deepspeed_is_one_message(tmp_path):
    folder = RunFolder(tmp_path)
    checkpoint = folder.checkpoint(4)
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_model.safetensors").touch()
    args = SimpleNamespace(load_best_model_at_end=False)
    trainer = SimpleNamespace(is_deepspeed_enabled=True, model=SimpleNamespace(), args=args)
    with pytest.raises(PacaError, match=r"is one of shards or of DeepSpeed's.* Move it away; --resume goes on"):
        load_if_finished(trainer, TrainerState(global_step=4, max_steps=4), checkpoint, folder)


def test_processes_without_accelerators_say_that_nothing_is_sharded(runs, tmp_path):
    settings = [*SHARDED, "train.max_steps=1", f"output.dir={tmp_path}/run"]
    output = run_in_two(runs / "config.yaml", settings, tmp_path / "whole", accelerated=False)
    assert "Warning: train.fsdp has no effect" in output
    assert re.search(r"DDP sent buffers in 0 of [1-9]\d* passes", output)


def test_buffers_are_sent_where_the_user_says_so_or_batches_are_normalized():
    for given, layer, expected in (
        (None, torch.nn.Linear(2, 2), False),
        (None, torch.nn.BatchNorm1d(2), None),
        (True, torch.nn.Linear(2, 2), True),
    ):
        arguments = SFTConfig(output_dir="unused", use_cpu=True, report_to="none", ddp_broadcast_buffers=given)
        spare_buffers(arguments, torch.nn.Sequential(layer))
        assert arguments.ddp_broadcast_buffers is expected


def test_one_process_is_refused(runs, tmp_path):
    config = load_run_config(runs / "config.yaml", [*SHARDED, f"output.dir={tmp_path}/run"])
    with pytest.raises(PacaError, match=r"over several processes, but this run has one\. Start it with torchrun"):
        train(config, console=Console(file=io.StringIO()))


def test_a_process_that_sees_several_gpus_trains_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: vars(self).setdefault("_n_gpu", 3)))
    monkeypatch.setattr(SFTConfig, "__post_init__", lambda self: vars(self).update(_n_gpu=3))
    arguments = training_arguments({}, tmp_path)
    assert arguments.n_gpu == 1
    alone = SimpleNamespace(world_size=1, fsdp=None, device=torch.device("cuda"))
    assert devices_warning(alone, False) is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    told = str(devices_warning(alone, False))
    assert "3 GPUs are there, and one process trains on one of them." in told
    assert "torchrun --nproc-per-node 3 --no-python paca train" in told
    for other in ({"world_size": 3}, {"device": torch.device("cpu")}):
        assert devices_warning(SimpleNamespace(**vars(alone) | other), False) is None


def test_copies_of_data_parallel_are_refused_by_name() -> None:
    """nn.DataParallel itself replicates on GPUs alone."""
    layer = next(m for m in adapt(llama()).modules() if isinstance(m, PacaLayer))
    with pytest.raises(RuntimeError, match=r"DataParallel copies the model.*torchrun"):
        layer._replicate_for_data_parallel()
