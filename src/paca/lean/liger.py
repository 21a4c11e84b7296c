"""Liger's Triton kernels, where the package is installed; used for CUDA tensors outside torch.compile."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


liger_rms_norm: Callable[..., Any] | None = None
liger_gated: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
"""Of each activation `(gate, up) -> (gate, up, product)` and `(gate, up, grad) -> (grad_gate, grad_up)`."""

try:
    from liger_kernel.ops.geglu import geglu_backward, geglu_forward
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward
except ImportError as error:
    logger.debug("Liger's kernels are not used: %s", error)
else:
    liger_rms_norm = LigerRMSNormFunction.apply
    liger_gated = {"silu": (swiglu_forward, swiglu_backward), "gelu_tanh": (geglu_forward, geglu_backward)}
