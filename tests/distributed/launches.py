"""Trains in real processes, started as users start them, and compares with one process. The long form of
`test_launched.py`, with DeepSpeed if it is installed:

PYTHONPATH=src:tests python -m distributed.launches [--forked] [KIND ...]

With `--forked` the processes are forks that get what accelerate's launcher reads from the file, without starting it:
much sooner, as each start imports all libraries.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from accelerate.commands import launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from distributed import launched
from distributed.launched import VARIANTS
from forked_process import FORKS

ROOT = Path(__file__).parents[2]
KINDS = {
    "torchrun ddp": VARIANTS,
    "accelerate ddp": VARIANTS,
    "torchrun fsdp2": tuple(v for v in VARIANTS if v != "nf4"),  # a scenario of its own: sharded_scenarios.py
    "accelerate fsdp2": tuple(v for v in VARIANTS if v != "nf4"),
    **{f"accelerate deepspeed-zero{stage}": VARIANTS[:-2] for stage in (1, 2, 3)},
}
"""By launcher and method: the variants."""

EXACT = {"ddp": 1e-12, "fsdp2": 1e-12, "deepspeed": 1e-3}
"""How far the results may be from one process's, as a part of the largest value. DeepSpeed trains in float32, and Adam
divides by small gradients."""


def bound(kind: str, variant: str) -> float:
    """What the largest difference may be."""
    if variant in ("bf16", "nf4"):
        return 0.2  # sums of 16 (nf4: 32) bits in another order, and FSDP2 rounds deltas to 16 bits before the sum
    return EXACT[kind.partition("-")[0]]


def command(launcher: str, kind: str, world: int, output: Path, variants: tuple[str, ...]) -> list[str]:
    """What a user would type."""
    script = [str(ROOT / "tests/distributed/launched.py"), kind, str(output), *variants]
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), *script]
    config = str(ROOT / f"recipes/launch/{kind}.yaml")
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    return [*start, "--num_processes", str(world), "--mixed_precision", "no", *script]


def environment(launcher: str, kind: str) -> dict[str, str]:
    """As the launcher's process has it; torchrun gets from here what accelerate reads from the file."""
    path = f"{ROOT / 'src'}:{ROOT / 'tests'}"
    made = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}
    if launcher == "torchrun" and kind == "fsdp2":
        made |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
        made |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    return made


def from_file(kind: str, world: int) -> dict[str, str]:
    """What accelerate's launcher tells the processes that it starts with `recipes/launch/KIND.yaml`."""
    words = ["--config_file", str(ROOT / f"recipes/launch/{kind}.yaml"), "--num_processes", str(world)]
    arguments = launch.launch_command_parser().parse_args([*words, "--mixed_precision", "no", "launched.py"])
    arguments, defaults, _ = launch._validate_launch_command(arguments)
    if not arguments.use_deepspeed:
        return dict(prepare_multi_gpu_env(arguments))
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return dict(prepare_deepspeed_cmd_env(arguments)[1])


def _run(made: dict[str, str], words: list[str]) -> None:
    os.environ.update(made)
    sys.argv = ["launched.py", *words]
    launched.main()


def forked(kind: str, world: int, output: Path, variants: tuple[str, ...]) -> list[dict[str, Any]]:
    """Run in forks; what each process wrote."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made = {name: value for name, value in from_file(kind, world).items() if os.environ.get(name) != value}
    made |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu"}
    processes = []
    for rank in range(world):
        mine = {**made, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
        processes.append(FORKS.Process(target=_run, args=(mine, [kind, str(output), *variants])))
        processes[-1].start()
    for process in processes:
        process.join()
    return results_in(output, world, variants, "ended without a result")


def results_in(output: Path, world: int, variants: tuple[str, ...], otherwise: str) -> list[dict[str, Any]]:
    """What each process wrote; `otherwise` is the trouble of one that wrote nothing."""
    results = []
    for rank in range(world):
        file = Path(f"{output}-{rank}.json")
        results.append(json.loads(file.read_text()) if file.exists() else {variants[0]: {"trouble": otherwise}})
    return results


def verdict(kind: str, variant: str, results: list[dict[str, Any]]) -> str:
    """Empty if all processes agree with one; else what is wrong."""
    for rank, result in enumerate(results):
        found = result.get(variant, {"trouble": "did not come to it"})
        if "trouble" in found:
            return f"process {rank}: {found['trouble']}"
        # In 16 bits Adam makes whole steps of gradients that are rounding alone, so deltas may be anywhere.
        names = ("outputs", "losses") if variant == "bf16" else ("outputs", "adapter", "losses")
        far = {name: found[name] for name in names if name in found}
        if any(not value <= bound(kind, variant) for value in far.values()):
            return f"process {rank}: {far}"
    return ""


def main() -> int:
    """Run all, and print a table: the largest difference from one process, over outputs, adapter and losses."""
    forks = "--forked" in sys.argv
    kinds, failed = [word for word in sys.argv[1:] if word != "--forked"], 0
    for name, variants in KINDS.items():
        launcher, _, kind = name.partition(" ")
        if (kinds and kind not in kinds) or (forks and launcher == "torchrun"):
            continue
        if kind.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
            print(f"{name}: not run, DeepSpeed is not installed")
            continue
        for world in (2, 4):
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "result"
                if forks:
                    results = forked(kind, world, output, variants)
                else:
                    made = command(launcher, kind, world, output, variants)
                    ended = subprocess.run(made, env=environment(launcher, kind), capture_output=True, text=True)
                    results = results_in(output, world, variants, ended.stderr[-3000:])
            for variant in variants:
                wrong = verdict(kind, variant, results)
                failed += bool(wrong)
                shown = ("outputs", "losses") if variant == "bf16" else ("outputs", "adapter", "losses")
                numbers = [r[variant][name] for r in results for name in shown if name in r.get(variant, {})]
                found = f"{max(numbers):.1e}" if numbers else str(results[0].get(variant, {}).get("collectives", ""))
                print(f"{name:28} {world} processes  {variant:14} {found:10} {wrong or 'ok'}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    FORKS.set_forkserver_preload(["distributed.launched"])  # in place of what tests need
    sys.exit(main())
