"""Write docs/notes/plan-on.md from the rows that `plan_on.py` and `plan_on_h100.py` left (seconds).

python benchmarks/plan_on_page.py
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import plan_on
import plan_on_h100

from paca.planning.device_time import Efficiency
from paca.planning.devices import DEVICES, GB, Device

PAGE = Path(__file__).parents[1] / "docs/notes/plan-on.md"

_HEAD = """# Simulated steps: how far they are off

`paca plan llama3-8b --on h100 --compare lora` says how long a step would take on a GPU that is not here. On an A100 and
an L40S most simulated times are within 15 % of published ones, and memory within 10 %. For other devices the error is
not known.

**Nothing on this page was measured by us on a GPU.** `python benchmarks/plan_on_page.py` writes it, from
`benchmarks/plan_on.csv` (published) and what `plan_on.py` and `plan_on_h100.py` beside it simulate.

## How it works

A step is traced on tensors without values, with two blocks and then three: the difference stands for each further one.
An operator takes a fixed time on the device (`kernel`), and the longer of two: its operations over peak × `product` ×
the share that its tiles fill (what one multiprocessor computes at a time), or its bytes over the bandwidth ×
`bandwidth`. What fits into half of the last cache moves at `cache_bandwidth`.

The host launches one operator after the other. In each phase (forward, backward, step) the slower of host and device
counts. *Launch-bound* is the share in which the device waits.

| parameter | value | where it is from |
| --- | ---: | --- |
"""

_PARAMETERS = (
    (("product", "bandwidth"), "{:.2f}", "fitted to what has its error in *italics* below"),
    (("kernel",), "{:.0e} s", "fitted to them"),
    (("cache_bandwidth",), "{:.0e} B/s", "fitted to one of them, LoRA on the L40S"),
    (
        ("host_forward", "host_backward", "view", "listed"),
        "{:.1e} s",
        "assumed. No row here is launch-bound, so **none of them checks it**",
    ),
)

_AFTER_PARAMETERS = """
Attention reaches at most 0.5 of the peak, and 0.35 on H100, H200, GH200, B200 and AMD's (as FlashAttention-2 does:
arXiv 2307.08691, 2407.08608).

## Published and simulated

Bold is off: a time beyond 15 %, memory beyond 10 %. Parameters were fitted to the *italics*; all else was held out.
`2, 4 × 512` is batches and tokens.

"""

_AFTER_TABLE = """
Where it is off, and why:

- **Seconds per 5,000 steps of PEFT's table** are its `train_time`. In PEFT's `run.py` (commits ec4739d and 026d1e0) it
  counts more than steps: loading the data, emptying torch's cache of memory, and answering the 1,319 test questions. In
  the newer one a loss on Wikipedia is added, twice. The rows *ms* are steps alone: 716 of DoRA's 1,209 s in 2026.
- **DoRA on the L40S in June 2025** is not explained. PEFT's script emptied torch's cache after each step, until its
  pull request 2894 of November 2025. But so it did for LoRA, MiSS and full, of June and August 2025, and parameters
  were fitted to that LoRA. What fits is DoRA's row of 2026, which has a newer PEFT and torch as well.
- **Largest batches**: not simulated are fragmentation, and DeepSpeed's float32 copies and buffers. So leave 5 to 10 %
  of the memory free.
- **One sequence of 512 tokens on the A100**: what small operators cost is not resolved.
- **Against LoRA**, much depends on LoRA's dropout, which the abstract does not name (the scripts: 0.1).

Sources:

- *authors' log*: `throughput/*_results.txt` of github.com/WooSunghyeon/paca (commit 9209009; 512 tokens, padded,
  bfloat16 through DeepSpeed). *Paper*: the abstract of arXiv 2503.01905.
- *PEFT's comparison*: `method_comparison/MetaMathQA/results` of github.com/huggingface/peft (2025; *2026*: PEFT
  0.18.1.dev0, torch 2.9.0): the sum of its `train time`, and its largest reserved memory. A step has 4 × 215 tokens,
  with padding. *PEFT's table*: its leaderboard later.

## On ourselves: an H100

All is simulated, with r 16 in all linear layers and the chunked loss. *Ratio* is to the tuned LoRA (QPaCA: to QLoRA).
*Slow host* is launch-bound with twice the seconds per operator.

"""

_END = """
What follows, with the gain that the simulation expects at most:

"""


_ABOUT_DEVICES = (
    "The figures were entered from memory, and compared with what others quote: check those that you rely on. "
    "*Programs* is the memory that they get: what torch says in the message that the link has, else 98 % of all. "
    "`t4`, `v100-16gb` and `v100-32gb` have no bfloat16, so models are planned in float16 there. On AMD's and Intel's "
    "devices paca was never tried."
)


def write() -> None:
    """Write the page."""
    efficiency = Efficiency()
    lines = [
        f"| {', '.join(f'`{name}`' for name in names)} | "
        f"{', '.join(form.format(getattr(efficiency, name)) for name in names)} | {source} |"
        for names, form, source in _PARAMETERS
    ]
    text = _HEAD + "\n".join(lines) + "\n" + _AFTER_PARAMETERS
    text += "\n".join(plan_on.table(plan_on.read_simulated())) + "\n" + _AFTER_TABLE
    rows = plan_on_h100.read_rows()
    if rows:
        text += "\n".join(h100_table(rows)) + "\n" + _END + "\n".join(map(_wrapped, findings(rows))) + "\n"
    text += "\n## Devices\n\n" + devices() + "\n"
    PAGE.write_text(text, encoding="utf-8")


def h100_table(rows: list[dict[str, str]]) -> list[str]:
    """One line for each model, shape and method."""
    lines = [
        "| model, tokens | method | ms | ratio | launches (LoRA's) | launch-bound, % | slow host |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        shares = ("launch_bound", "launch_bound_slow_host")
        lines.append(
            f"| {row['model']}, {row['batch']} × {row['length']} | `{row['method']}` | {row['ms']} | "
            f"{float(row['ratio']):.2f} | {row['launches']} ({row['launches_against']}) | "
            + " | ".join(f"{100 * float(row[name]):.0f}" for name in shares)
            + " |"
        )
    return lines


def findings(rows: list[dict[str, str]]) -> list[str]:
    """The list of remedies, with numbers from the rows."""
    bound = [row for row in rows if float(row["launch_bound"]) > 0.05]
    slower = [row for row in rows if float(row["ratio"]) > 1]
    four_bit = [row for row in rows if row["method"] == "qpaca"]
    long = [row for row in rows if row["method"] == "paca" and row["length"] == "1024"]
    slow = ", ".join(
        f"`{row['method']}` on {row['model']} at {row['batch']} × {row['length']} ({float(row['ratio']):.2f})"
        for row in slower
    )
    return [
        f"- **Launch-bound** (more than 5 %) are {len(bound)} of the {len(rows)} rows. Capture into CUDA graphs takes "
        f"the host out of it: up to {_most(bound, 'launch_bound')} of the step. So do larger batches. Set "
        "`train.torch_compile: true` and `train.torch_compile_mode: reduce-overhead` (not tried on a GPU).",
        f"- **Slower than LoRA**: {slow or 'nowhere here'}.",
        f"- **4 bits**: unpacking is {_range(four_bit, 'unpacking')} of a step, and the same for QLoRA. Scales "
        "that are not quantized once more (`bnb_4bit_use_double_quant: false`) save "
        f"{_range(four_bit, 'plain_scales')}, for 0.4 bits more per weight.",
        f"- **Large batches**: norms, activations and residuals are {_range(long, 'elementwise')} of a step. That "
        "bounds what fused kernels (Liger's, or `torch.compile`) can gain.",
    ]


def _wrapped(line: str, indent: str = "  ") -> str:
    return textwrap.fill(line, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _range(rows: list[dict[str, str]], name: str) -> str:
    values = [100 * float(row[name]) for row in rows]
    return f"{min(values):.0f} to {max(values):.0f} %" if values else "(not simulated)"


def _most(rows: list[dict[str, str]], name: str) -> str:
    return f"{max((100 * float(row[name]) for row in rows), default=0):.0f} %"


def devices() -> str:
    """The table of devices, and what it is."""
    lines = [
        "| `--on` | memory, GiB | programs, GiB | GB/s | TFLOP/s in 16 bits | in float32 | data sheet |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for device in DEVICES.values():
        peaks = (device.peak[dtype] / 1e12 for dtype in ("float16", "float32"))
        cells = [f"{device.memory / 2**30:g}", _programs(device), f"{device.bandwidth / GB:g}"]
        cells += [*(f"{peak:g}" for peak in peaks), device.source]
        lines.append(f"| `{device.name}` | {' | '.join(cells)} |")
    return "\n".join([_wrapped(_ABOUT_DEVICES, ""), "", *lines])


def _programs(device: Device) -> str:
    """With a link to the issue that it is from."""
    amount = device.usable / 2**30
    repository, issue, number = device.usable_source.rpartition(" issue ")
    return f"[{amount:.2f}](https://github.com/{repository}/issues/{number})" if issue else f"about {amount:.0f}"


if __name__ == "__main__":
    write()
