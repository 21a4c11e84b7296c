"""The model that a trainer of preferences or rewards holds the trained one against: the same, before training."""

from __future__ import annotations

from typing import Any

from paca.lean import make_lean
from paca.pretrained import load_pretrained
from paca.training.config.run_config import RunConfig
from paca.training.named_model import set_attention


def load_reference(config: RunConfig, policy: Any, tokenizer: Any) -> Any:
    """A second copy of `policy` as it came, for a run that trains the model itself: TRL's would be of the default
    revision, and without the code that the model brings.

    Raises:
        PacaError: It can't be loaded.
    """
    named = config.model
    path = policy.config._name_or_path  # of a GGUF file, where it was unpacked
    reference = load_pretrained(path, named.dtype, named.revision, named.trust_remote_code, tokenizer=tokenizer).model
    set_attention(reference, named)
    if named.lean:
        make_lean(reference, named.recompute)
    return reference


def told_of_reference(config: RunConfig) -> list[tuple[str, str]]:
    """What it is, as a line of the plan."""
    if config.model.adapter is not None:
        return [("reference", "the model with the adapter as it begins, of which a copy is held")]
    if config.method != "full":
        return [("reference", "the model without its adapter; no second copy is held")]
    if config.train.get("precompute_ref_log_probs"):
        return [("reference", "the model as it came; what it says of the pairs is computed before training")]
    return [("reference", "the model as it came: a second copy of it, held beside the one that is trained")]
