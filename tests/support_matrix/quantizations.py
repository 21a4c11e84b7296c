"""The rows of the table of quantizations: real layers of the libraries, or stand-ins for those that need a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload
from torch import nn

from models import llama
from paca.quantized import quantization_of
from quantized_layers import Stack, forward_only_stack, quantized_linear, stack, stand_in
from support_matrix.subject import Refused, Subject, random_input

TARGETS = {"target_modules": ["lin1", "lin2"], "r": 16, "selection": "random_blocks"}

REAL = {
    "nf4": ("bitsandbytes", "bitsandbytes NF4"),
    "nf4-double": ("bitsandbytes", "bitsandbytes NF4, double quantization"),
    "fp4": ("bitsandbytes", "bitsandbytes FP4"),
    "int8": ("bitsandbytes", "bitsandbytes int8"),
    "torchao-int8": ("torchao", "torchao int8 weight-only, per row"),
    "torchao-int8-group": ("torchao", "torchao int8 weight-only, per group"),
    "torchao-int4": ("torchao", "torchao int4 weight-only (`IntxWeightOnlyConfig`)"),
    "hqq": ("hqq", "HQQ 4-bit"),
}
CAN_BE_OFFLOADED = ("torchao-int8", "torchao-int4")
STAND_INS = {
    "gptq": ("gptqmodel.nn_modules.qlinear.torch", "GPTQ (gptqmodel, auto_gptq)"),
    "awq": ("awq.modules.linear", "AWQ"),
    "eetq": ("transformers.integrations.eetq", "EETQ"),
    "aqlm": ("aqlm.inference", "AQLM"),
}


def plain_of(model: Any) -> nn.Module:
    """The `Stack` that a quantized one computes."""
    plain = Stack().eval()
    for name in ("lin1", "lin2"):
        layer, quantized = getattr(plain, name), getattr(model, name)
        library = quantization_of(quantized)
        weight = quantized.dequantized() if library is None else library.dequantize(quantized)
        layer.weight.data.copy_(weight)
        layer.bias.data.copy_(quantized.bias)
    return plain


def llama_of(quantize: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """A Llama model with its linear layers quantized."""
    model = llama(num_hidden_layers=1, hidden_size=64, intermediate_size=128, attention_bias=True, mlp_bias=True)
    for part in (model.model.layers[0].self_attn, model.model.layers[0].mlp):
        for name, layer in list(part.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(part, name, quantize(layer))
    return model


def _real(kind: str) -> Subject:
    package, title = REAL[kind]

    def base(folder: Path | None = None) -> nn.Module:
        return stack(kind, torch.float32).eval()

    return Subject(
        kind,
        title,
        frozenset({"patched"}),
        base,
        lambda: plain_of(base()),
        lambda: random_input(3, 4, 64),
        TARGETS,
        package=package,
        # On some processors bitsandbytes repacks 4-bit weights for inference; not those of adapted layers.
        stock_training=kind in ("nf4", "nf4-double", "fp4"),
        language_model=lambda folder: llama_of(lambda layer: quantized_linear(kind, layer)),
    )


def _offloaded(kind: str) -> Subject:
    package, title = REAL[kind]
    here = torch.device("cpu")
    return Subject(
        f"{kind}-cpu-offload",
        f"{title}, offloaded to the CPU",
        frozenset({"additive"}),
        lambda folder: cpu_offload(stack(kind, torch.float32).eval(), execution_device=here),
        lambda: plain_of(stack(kind, torch.float32)),
        lambda: random_input(3, 4, 64),
        TARGETS,
        package=package,
        language_model=lambda folder: cpu_offload(llama_of(lambda layer: quantized_linear(kind, layer)), here),
    )


def _stand_in(key: str) -> Subject:
    package, title = STAND_INS[key]

    def base(folder: Path | None = None) -> nn.Module:
        return forward_only_stack(package).eval()

    return Subject(
        key,
        f"{title} (stand-in)",
        frozenset({"additive"}),
        base,
        lambda: plain_of(base()),
        lambda: random_input(3, 4, 64),
        TARGETS,
        language_model=lambda folder: llama_of(stand_in(package)),
    )


def _inference_only(folder: Path | None = None) -> nn.Module:
    return forward_only_stack("gptqmodel.nn_modules.qlinear.marlin", trainable=False).eval()


INFERENCE_ONLY = Subject(
    "inference-only",
    "GPTQ with a kernel for inference only (stand-in)",
    frozenset({"additive"}),
    _inference_only,
    lambda: plain_of(_inference_only()),
    lambda: random_input(3, 4, 64),
    TARGETS,
    language_model=lambda folder: llama_of(
        lambda layer: stand_in("gptqmodel.nn_modules.qlinear.marlin")(layer, trainable=False)
    ),
)


QUANTIZATIONS = (*map(_real, REAL), *map(_offloaded, CAN_BE_OFFLOADED), *map(_stand_in, STAND_INS), INFERENCE_ONLY)

NOT_RUN = (
    (
        "torchao `Int4WeightOnlyConfig`",
        "its kernels need a GPU. It is taken as additive, as GPTQ is.",
    ),
    ("GPTQ, AWQ, EETQ and AQLM with their own kernels", "they need a GPU, and packages that are built for it."),
    ("anything on CUDA", "there is no GPU where the tests run."),
)
"""What no test touches, and why."""

# -- refused --------------------------------------------------------------------------------------------------------


def _int8_with_floats() -> nn.Module:
    import bitsandbytes as bnb

    return nn.ModuleDict({"lin1": bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=True)})


def _bitsandbytes_embedding() -> nn.Module:
    import bitsandbytes as bnb

    return nn.ModuleDict({"lin1": bnb.nn.Embedding4bit(16, 64)})


def _quantized_activations() -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.ModuleDict({"lin1": nn.Linear(64, 128)})
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def _float8() -> nn.Module:
    linear = nn.Linear(64, 128, bias=False)
    linear.weight = nn.Parameter(linear.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    return nn.ModuleDict({"lin1": linear})


def _no_sizes() -> nn.Module:
    layer: Any = stand_in("auto_gptq.nn_modules")(nn.Linear(64, 128))
    del layer.in_features, layer.out_features
    return nn.ModuleDict({"lin1": layer})


def _refused(key: str, title: str, base: Callable[[], nn.Module], package: str | None = None) -> Refused:
    return Refused(key, title, base, {"target_modules": ["lin1"]}, package)


def _refused_offloaded(kind: str) -> Refused:
    package, title = REAL[kind]
    return _refused(
        f"{kind}-cpu-offload",
        f"{title}, offloaded to the CPU",
        lambda: cpu_offload(stack(kind, torch.float32).eval(), torch.device("cpu")),
        package,
    )


REFUSED_QUANTIZATIONS = (
    _refused_offloaded("nf4"),
    _refused_offloaded("int8"),
    _refused_offloaded("hqq"),
    _refused("unknown", "a library that nobody knows", lambda: forward_only_stack("someones.quantizer")),
    _refused("int8-fp16", "bitsandbytes int8 with `has_fp16_weights=True`", _int8_with_floats, "bitsandbytes"),
    _refused("bnb-embedding", "bitsandbytes `Embedding4bit`", _bitsandbytes_embedding, "bitsandbytes"),
    _refused("torchao-activations", "torchao with quantized activations", _quantized_activations, "torchao"),
    _refused("float8", "plain weights in 8-bit floats", _float8),
    _refused("no-sizes", "a layer of a known library that does not say its sizes", _no_sizes),
)
