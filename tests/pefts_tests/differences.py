"""Where PaCA differs from what PEFT's tests ask of its methods, and why: each has to fail, or the line goes."""

from __future__ import annotations

import re

IN_PLACE = "columns are trained in the base weight itself, which these tests want unchanged"
WORDS = "refused with other words"
POOLER = "by default the pooler is adapted too, which this loss does not reach"
DIFFERENCES = {
    r"test_custom_models.*MHA ": "nn.MultiheadAttention is refused",
    r"mixed.*_mha": "nn.MultiheadAttention is refused",
    r"nn\.Parameter": "weights that are no layer's are refused, but for stacks of experts",
    r"test_disable_adapter\[.*tiny-Llama4": "frozen, the stock model too writes scores with other last bits",
    r"test_only_params_are_updated": IN_PLACE,
    r"test_get_base_model_state_dict": "base weights are written while columns are in them, which is refused",
    r"test_save_load_roundtrip_fsdp_wrapped": "FSDP1 is refused",
    r"test_hotswap_works": "PEFT's hotswap_adapter takes LoRA alone; paca.hotswap_adapter is for PaCA",
    r"test_training(_gradient_checkpointing)?\[.*tiny-random-(Bert|Roberta)Model": POOLER,
    r"test_default_target_modules": "by default all linear layers are adapted, of any architecture",
    r"test_merge_layers_nan|mixed_adapter_batches_(training|merged|lora_wrong|length)": WORDS,
    r"test_config.*(runtime_config|sanity_check)": "PEFT's version of a config with an unknown key is refused",
    r"test_config.*test_from_pretrained(_cache_dir)?\[": "asks the hub",
    r"test_error_raised_if_rank_not_divisible.*kwargs2": "PaCA has no groups",
    r"test_base_model_module_named_like_peft_prefix": "its table has PEFT's own methods alone",
}
"""What a test's id has in it, as an expression: why it fails."""


def difference(test: str) -> str | None:
    """Why a test fails by design, or None."""
    return next((why for pattern, why in DIFFERENCES.items() if re.search(pattern, test)), None)
