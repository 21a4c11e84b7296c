"""Every way of training in several processes, by real launchers, against one process. `make launches`; or

PYTHONPATH=src:tests python -m distributed.launches [--forked] [KIND ...]

A row is a strategy, a launcher, a number of processes and a variant of the training. All variants run in the same
processes, one after the other (`launched.py`). ZeRO is run where DeepSpeed is installed. With `--forked` the processes
are forks that get what accelerate's launcher reads from the file, without starting it: much sooner, as each start
imports all libraries. `test_launched.py` is the short form.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from accelerate.commands import launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from distributed import launched
from distributed.launched import REFUSED, VARIANTS
from forked_process import FORKS

ROOT = Path(__file__).parents[2]
COMPARED = ("columns", "adapter", "outputs", "losses")
WAIT = 1800
"""Seconds after which processes that did not end are stopped."""


def bound(kind: str, variant: str) -> float:
    """How far the results may be from one process's, as a part of the largest value."""
    if variant == "bf16" and kind.startswith("deepspeed"):
        return 0.06  # DeepSpeed keeps float32 copies of what it trains, which the one process has not
    if variant == "bf16":
        return 0.03  # 8 units of the last place: sums in another order, and FSDP2 rounds deltas before they are added
    if variant == "nf4" or kind.startswith("deepspeed"):
        return 1e-3  # float32, and Adam divides by small gradients
    return 1e-12


def command(launcher: str, kind: str, world: int, output: Path, variants: tuple[str, ...]) -> list[str]:
    """What a user would type."""
    script = [str(ROOT / "tests/distributed/launched.py"), kind, str(output), *variants]
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), *script]
    config = str(ROOT / f"recipes/launch/{kind}.yaml")
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    return [*start, "--num_processes", str(world), "--main_process_port", "0", *script]


def started(launcher: str, kind: str, world: int, output: Path, variants: tuple[str, ...]) -> list[dict[str, Any]]:
    """Run by the launcher; what each process wrote."""
    path = f"{ROOT / 'src'}:{ROOT / 'tests'}"
    made = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}
    words = command(launcher, kind, world, output, variants)
    with subprocess.Popen(words, env=made, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            said = process.communicate(timeout=WAIT)[0]
        except subprocess.TimeoutExpired:
            process.terminate()  # a launcher stops what it started
            said = f"not ended after {WAIT} s: {process.communicate()[0]}"
    return results_in(output, world, variants, said[-3000:])


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


def farthest(found: dict[str, Any]) -> float:
    """The largest difference from one process."""
    return max((found[name] for name in COMPARED if name in found), default=0.0)


def verdict(kind: str, variant: str, results: list[dict[str, Any]]) -> str:
    """Empty if all processes agree with one, or refuse what they have to; else what is wrong."""
    refusal = REFUSED.get(kind, {}).get(variant)
    for rank, result in enumerate(results):
        found = result.get(variant, {"trouble": "did not come to it"})
        if refusal:
            if refusal not in found.get("said", ""):
                return f"process {rank} has to be refused with {refusal!r}: {found}"
        elif "trouble" in found:
            return f"process {rank}: {found['trouble']}"
        elif not farthest(found) <= bound(kind, variant):
            return f"process {rank}, bound {bound(kind, variant)}: {found}"
    return ""


def shown(kind: str, variant: str, results: list[dict[str, Any]]) -> str:
    """What came of a row that is right."""
    found = results[0][variant]
    if variant in REFUSED.get(kind, {}):
        return f"refused  {found['said']}"
    if "collectives" in found:
        return f"ok       {found['collectives']}"
    return f"ok       {max(farthest(result[variant]) for result in results):.0e} of {bound(kind, variant):.0e}"


def main() -> int:
    """Run all, and print a row for each."""
    forks = "--forked" in sys.argv
    kinds = [word for word in sys.argv[1:] if word != "--forked"] or list(VARIANTS)
    counts: Counter[str] = Counter()
    for kind in kinds:
        if kind.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
            print(f"{kind}: not run. DeepSpeed is not installed (DS_BUILD_OPS=0 pip install deepspeed)")
            continue
        for launcher in ("forks",) if forks else ("torchrun", "accelerate launch"):
            for world in (2, 4):
                with tempfile.TemporaryDirectory() as folder:
                    output, variants = Path(folder) / "result", VARIANTS[kind]
                    if forks:
                        results = forked(kind, world, output, variants)
                    else:
                        results = started(launcher, kind, world, output, variants)
                for variant in variants:
                    wrong = verdict(kind, variant, results)
                    said = f"FAILED   {wrong}" if wrong else shown(kind, variant, results)
                    counts[said.split()[0]] += 1
                    print(f"{launcher:18}{kind:17}{world} processes  {variant:15}{said}", flush=True)
    print(
        f"{counts.total()} rows: {counts['ok']} ok, {counts['refused']} refused as they should be, "
        f"{counts['FAILED']} failed"
    )
    return int(counts["FAILED"] > 0)


if __name__ == "__main__":
    FORKS.set_forkserver_preload(["distributed.launched"])  # in place of what tests need
    sys.exit(main())
