"""A small model that transformers and bitsandbytes quantized for real, as it is loaded."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig

from paca.pretrained.quantizing import quantization_config


def quantized_model(shape: PreTrainedConfig, quantization: str | BitsAndBytesConfig) -> Any:
    """The model with random weights, on the CPU.

    Args:
        shape: Of the model, with its dtype.
        quantization: A name as in `model.quantization`, or bitsandbytes' settings.
    """
    if isinstance(quantization, str):
        quantization = quantization_config(quantization, shape.dtype)
    with TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(shape).save_pretrained(Path(folder))
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=shape.dtype, quantization_config=quantization, device_map={"": "cpu"}
        )
    for parameter in model.parameters():
        if parameter.is_floating_point():  # a view of the mapped file, all of which was read and stays resident with it
            parameter.data = parameter.data.clone()
    return model
