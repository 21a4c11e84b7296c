"""The accelerators that plans are made for without having one: what their makers say they can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paca.messages.errors import PacaError
from paca.messages.nearest import did_you_mean

if TYPE_CHECKING:
    import torch  # a misspelt name is found without it

GB = 10**9
_HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class Device:
    """One accelerator, as its maker's data sheet describes it."""

    name: str
    """As `--on` takes it."""
    title: str
    memory: int
    """Bytes. What a data sheet calls 80 GB is 80 GiB on the device; its driver keeps one to three percent."""
    usable: int
    """Bytes of it that programs get."""
    usable_source: str
    """Where that is from: an issue on GitHub that quotes what torch says of it, or that it is an estimate."""
    bandwidth: float
    """Bytes per second of its memory."""
    peak: Mapping[str, float]
    """By the dtype's name, floating-point operations per second of dense matrix products that are summed in float32."""
    cache: int
    """Bytes of the last cache before its memory."""
    units: int
    """Multiprocessors, over which the tiles of a product are spread; 1 where it has no such parts."""
    attention: float
    """Share of the peak that torch's fused attention reaches at best; see `paca.planning.device_time`."""
    source: str
    """Data sheet that the numbers are from."""

    def peak_of(self, dtype: torch.dtype) -> float:
        """Operations per second in `dtype`; that of float32 where nothing else is stated, as without units for it."""
        return self.peak.get(str(dtype).removeprefix("torch."), self.peak["float32"])

    @property
    def has_bfloat16(self) -> bool:
        """Whether it multiplies bfloat16. Volta and Turing don't: torch's products go through float32 there."""
        return "bfloat16" in self.peak


_USABLE = 0.98
"""Share that programs get where nobody was seen to say it; of the devices below 0.97 to 0.99."""
_CAPACITIES = {
    "a100-40gb": (39.50, "TianheWu/CoSeR issue 10"),
    "a100-80gb": (79.25, "HiDream-ai/VAREdit issue 6"),
    "h100": (79.11, "vllm-project/vllm issue 27508"),
    "a10": (21.99, "zai-org/CogVLM issue 236"),
    "l40": (44.40, "QwenLM/Qwen3-VL issue 2097"),
    "l40s": (44.42, "stepfun-ai/Step-Video-T2V issue 8"),
    "t4": (14.56, "Zheng-Chong/CatVTON issue 133"),
    "v100-32gb": (31.74, "haotian-liu/LLaVA issue 812"),
    "a5000": (23.68, "zai-org/GLM-4 issue 730"),
    "rtx3080": (9.78, "zai-org/CogVideo issue 34"),
    "rtx4090": (23.64, "ali-vilab/VGen issue 104"),
    "rtx5090": (31.36, "TrajectoryCrafter/TrajectoryCrafter issue 20"),
}
"""GiB that torch calls the total capacity in its message when memory is out, and an issue on GitHub that has it."""


def _device(
    name: str, title: str, memory: float, bandwidth: float, half: float, single: float, cache: float, units: int,
    source: str, attention: float = 0.5, halves: tuple[str, ...] = _HALF,
) -> Device:  # fmt: skip
    """Memory in GiB, bandwidth in GB/s, peaks in TFLOP/s: of 16 bits (`halves`: which of them it multiplies), and of
    float32 without TF32 (torch's default); the cache in MB."""
    peak = {**dict.fromkeys(halves, half * 1e12), "float32": single * 1e12}
    estimated = _USABLE * memory, f"an estimate: {100 * _USABLE:.0f} % of it"
    usable, seen = _CAPACITIES.get(name, estimated)
    return Device(
        name=name, title=title, memory=int(memory * 2**30), usable=int(usable * 2**30), usable_source=seen,
        bandwidth=bandwidth * GB, peak=peak, cache=int(cache * 1e6), units=units, attention=attention, source=source,
    )  # fmt: skip


_ECC = 15 / 16
"""Of GDDR6 that keeps its error correction in itself, as these cards are delivered: nvidia-smi shows that much."""

DEVICES = {
    device.name: device
    for device in (
        _device("a100-40gb", "NVIDIA A100 40 GB SXM", 40, 1555, 312, 19.5, 40, 108,
                "NVIDIA A100 Tensor Core GPU data sheet, June 2021"),
        _device("a100-80gb", "NVIDIA A100 80 GB SXM", 80, 2039, 312, 19.5, 40, 108,
                "NVIDIA A100 Tensor Core GPU data sheet, June 2021"),
        _device("h100", "NVIDIA H100 80 GB SXM", 80, 3350, 989.5, 67, 50, 132,
                "NVIDIA H100 Tensor Core GPU data sheet: half of the 1,979 TFLOPS with sparsity", 0.35),
        _device("h200", "NVIDIA H200 141 GB SXM", 141, 4800, 989.5, 67, 50, 132,
                "NVIDIA H200 Tensor Core GPU data sheet: half of the 1,979 TFLOPS with sparsity", 0.35),
        _device("gh200", "NVIDIA GH200 96 GB", 96, 4000, 989.5, 67, 50, 132,
                "NVIDIA GH200 Grace Hopper Superchip data sheet, with HBM3: half of the figures with sparsity", 0.35),
        _device("b200", "NVIDIA B200 180 GB", 180, 8000, 2250, 75, 126, 148,
                "NVIDIA DGX B200 data sheet: an eighth of it, half of the figures with sparsity", 0.35),
        _device("a10", "NVIDIA A10 24 GB", 24 * _ECC, 600, 125, 31.2, 6, 72,
                "NVIDIA A10 Tensor Core GPU data sheet"),
        _device("a10g", "NVIDIA A10G 24 GB (of AWS)", 24 * _ECC, 600, 70, 35, 6, 80,
                "NVIDIA A10G data sheet, by AWS"),
        _device("l4", "NVIDIA L4 24 GB", 24 * _ECC, 300, 121, 30.3, 48, 58,
                "NVIDIA L4 Tensor Core GPU data sheet: half of the 242 TFLOPS with sparsity"),
        _device("l40", "NVIDIA L40 48 GB", 48 * _ECC, 864, 181, 90.5, 96, 142,
                "NVIDIA L40 data sheet"),
        _device("l40s", "NVIDIA L40S 48 GB", 48 * _ECC, 864, 362, 91.6, 96, 142,
                "NVIDIA L40S data sheet"),
        _device("t4", "NVIDIA T4 16 GB", 16 * _ECC, 300, 65, 8.1, 4, 40,
                "NVIDIA T4 Tensor Core GPU data sheet", halves=("float16",)),
        _device("v100-16gb", "NVIDIA V100 16 GB SXM2", 16, 900, 125, 15.7, 6, 80,
                "NVIDIA V100 Tensor Core GPU data sheet", halves=("float16",)),
        _device("v100-32gb", "NVIDIA V100 32 GB SXM2", 32, 900, 125, 15.7, 6, 80,
                "NVIDIA V100 Tensor Core GPU data sheet", halves=("float16",)),
        _device("rtx6000ada", "NVIDIA RTX 6000 Ada 48 GB", 48, 960, 364.2, 91.1, 96, 142,
                "NVIDIA RTX 6000 Ada Generation data sheet: a quarter of the 1,457 TFLOPS of 8 bits with sparsity"),
        _device("a6000", "NVIDIA RTX A6000 48 GB", 48, 768, 154.8, 38.7, 6, 84,
                "NVIDIA RTX A6000 data sheet: half of the 309.7 TFLOPS with sparsity"),
        _device("a5000", "NVIDIA RTX A5000 24 GB", 24, 768, 111.1, 27.8, 6, 64,
                "NVIDIA RTX A5000 data sheet: half of the 222.2 TFLOPS with sparsity"),
        _device("rtx3080", "NVIDIA GeForce RTX 3080 10 GB", 10, 760, 59.5, 29.8, 5, 68,
                "NVIDIA Ampere GA102 GPU architecture white paper: sums in float32"),
        _device("rtx3090", "NVIDIA GeForce RTX 3090 24 GB", 24, 936, 71, 35.6, 6, 82,
                "NVIDIA Ampere GA102 GPU architecture white paper: sums in float32"),
        _device("rtx4080", "NVIDIA GeForce RTX 4080 16 GB", 16, 717, 97.5, 48.7, 64, 76,
                "NVIDIA Ada GPU architecture white paper: sums in float32"),
        _device("rtx4090", "NVIDIA GeForce RTX 4090 24 GB", 24, 1008, 165.2, 82.6, 72, 128,
                "NVIDIA Ada GPU architecture white paper: sums in float32"),
        _device("rtx5090", "NVIDIA GeForce RTX 5090 32 GB", 32, 1792, 209.5, 104.8, 96, 170,
                "NVIDIA RTX Blackwell GPU architecture white paper: sums in float32"),
        _device("mi300x", "AMD Instinct MI300X 192 GB", 192, 5300, 1307.4, 163.4, 256, 304,
                "AMD Instinct MI300X accelerator data sheet", 0.35),
        _device("mi250x", "AMD Instinct MI250X, one of its two dies, 64 GB", 64, 1600, 191.5, 47.9, 8, 110,
                "AMD Instinct MI250X data sheet: half of it, as torch sees two devices; matrix units", 0.35),
        _device("gaudi2", "Intel Gaudi 2 96 GB", 96, 2460, 432, 108, 48, 1,
                "Intel Gaudi 2 white paper: 16 bits and memory; float32 is not stated, a quarter is assumed"),
    )
}  # fmt: skip

_ALSO = {"a100": "a100-80gb", "h100-80gb": "h100", "h200-141gb": "h200", "v100": "v100-16gb", "rtxa6000": "a6000",
         "rtxa5000": "a5000", "3080": "rtx3080", "3090": "rtx3090", "4080": "rtx4080", "4090": "rtx4090",
         "5090": "rtx5090"}  # fmt: skip


def find_device(name: str) -> Device:
    """The device of that name, in any case, with or without blanks; PacaError, with the nearest name, for another."""
    plain = name.lower().replace(" ", "").replace("_", "-")
    plain = _ALSO.get(plain, plain)
    if plain not in DEVICES:
        raise PacaError(
            f"There is no device {name!r} in the table.{did_you_mean(plain, DEVICES)} Known are {', '.join(DEVICES)}. "
            "For another one leave out --on and --steps, and give its --rate, --bandwidth and --memory with "
            "--device cuda."
        )
    return DEVICES[plain]
