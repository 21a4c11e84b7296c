"""The accelerators that plans are made for without having one: what their makers say they can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from paca.messages.errors import PacaError
from paca.messages.nearest import did_you_mean

GB = 10**9
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Device:
    """One accelerator, as its maker's data sheet describes it."""

    name: str
    """As `--on` takes it."""
    title: str
    memory: int
    """Bytes. What a data sheet calls 80 GB is 80 GiB on the device; its driver keeps one or two percent."""
    bandwidth: float
    """Bytes per second of its memory."""
    peak: Mapping[torch.dtype, float]
    """Floating-point operations per second of dense matrix products that are summed in float32."""
    cache: int
    """Bytes of the last cache before its memory."""
    units: int
    """Multiprocessors, over which the tiles of a product are spread; 1 where it has no such parts."""
    attention: float
    """Share of the peak that torch's fused attention reaches at best; see `paca.planning.device_time`."""
    source: str
    """Data sheet that the numbers are from."""

    def peak_of(self, dtype: torch.dtype) -> float:
        """Operations per second in `dtype`; that of float32 where nothing else is stated."""
        return self.peak.get(dtype, self.peak[torch.float32])


def _device(
    name: str, title: str, memory: float, bandwidth: float, half: float, single: float, cache: float, units: int,
    source: str, attention: float = 0.5,
) -> Device:  # fmt: skip
    """Memory in GiB, bandwidth in GB/s, peaks in TFLOP/s: of 16 bits, and of float32 without TF32 (torch's default);
    the cache in MB."""
    peak = {**dict.fromkeys(_HALF, half * 1e12), torch.float32: single * 1e12}
    return Device(name, title, int(memory * 2**30), bandwidth * GB, peak, int(cache * 1e6), units, attention, source)


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
        _device("b200", "NVIDIA B200 180 GB", 180, 8000, 2250, 75, 126, 148,
                "NVIDIA DGX B200 data sheet: an eighth of it, half of the figures with sparsity", 0.35),
        _device("l40s", "NVIDIA L40S 48 GB", 48, 864, 362, 91.6, 96, 142,
                "NVIDIA L40S data sheet"),
        _device("rtx3090", "NVIDIA GeForce RTX 3090 24 GB", 24, 936, 71, 35.6, 6, 82,
                "NVIDIA Ampere GA102 GPU architecture white paper: sums in float32"),
        _device("rtx4090", "NVIDIA GeForce RTX 4090 24 GB", 24, 1008, 165.2, 82.6, 72, 128,
                "NVIDIA Ada GPU architecture white paper: sums in float32"),
        _device("rtx5090", "NVIDIA GeForce RTX 5090 32 GB", 32, 1792, 209.5, 104.8, 96, 170,
                "NVIDIA RTX Blackwell GPU architecture white paper: sums in float32"),
        _device("gaudi2", "Intel Gaudi 2 96 GB", 96, 2460, 432, 108, 48, 1,
                "Intel Gaudi 2 white paper: 16 bits and memory; float32 is not stated, a quarter is assumed"),
    )
}  # fmt: skip

_ALSO = {"a100": "a100-80gb", "h100-80gb": "h100", "h200-141gb": "h200", "3090": "rtx3090", "4090": "rtx4090",
         "5090": "rtx5090"}  # fmt: skip


def find_device(name: str) -> Device:
    """The device of that name, in any case, with or without blanks; PacaError, with the nearest name, for another."""
    plain = name.lower().replace(" ", "").replace("_", "-")
    plain = _ALSO.get(plain, plain)
    if plain not in DEVICES:
        raise PacaError(
            f"There is no device {name!r} in the table.{did_you_mean(plain, DEVICES)} Known are {', '.join(DEVICES)}. "
            "For another one give --rate and --bandwidth."
        )
    return DEVICES[plain]
