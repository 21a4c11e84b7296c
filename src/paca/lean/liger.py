"""Liger's Triton kernels, where the package is installed; used for CUDA tensors outside torch.compile."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GatedKernels:
    """One gated linear unit: `(gate, up) -> (gate, up, product)` and `(gate, up, grad) -> (grad_gate, grad_up)`."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


liger_rms_norm: Callable[..., Any] | None = None
liger_gated: dict[str, GatedKernels] | None = None

try:
    from liger_kernel.ops.geglu import geglu_backward, geglu_forward
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward
except ImportError as error:
    logger.debug("Liger's kernels are not used: %s", error)
else:
    liger_rms_norm = LigerRMSNormFunction.apply
    liger_gated = {
        "silu": GatedKernels(swiglu_forward, swiglu_backward),
        "gelu_tanh": GatedKernels(geglu_forward, geglu_backward),
    }
