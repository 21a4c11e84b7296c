"""Untying the output layer of a language model from its input embedding, so that either can be adapted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from paca.layers import PacaLayer


def untie_embeddings(model: Any) -> bool:
    """Give the output layer of `model` a weight of its own: a copy of the input embedding's, which it shared.

    PaCA refuses to adapt a weight that two modules share, since training one would silently train the other. After
    this both are targets like any others, and the model computes what it did. Loading such a model with
    `tie_word_embeddings=False` is *not* the same: where the checkpoint has no output weight, transformers then
    starts it at random.

    Whoever loads an adapter that was trained so with PEFT has to untie its base model first, or is refused; the command
    line does it by itself.

    Args:
        model: A transformers model, not adapted yet. Its config is changed, so that it is saved and loaded untied.

    Returns:
        Whether they were tied.

    Raises:
        TypeError: If the model does not say which its embeddings are.
        ValueError: If it has no output layer with a weight, or is adapted already.
    """
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        raise TypeError(f"untie_embeddings needs a transformers model; got {type(model).__name__}.")
    if any(isinstance(module, PacaLayer) for module in model.modules()):
        raise ValueError("The model is adapted already. Untie its embeddings first, then add the adapter.")
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if getattr(outputs, "weight", None) is None:
        raise ValueError(f"{type(model).__name__} has no output layer whose weight could be untied.")
    tied = outputs.weight is inputs.weight
    if tied:
        whole = outputs.get_base_layer() if isinstance(outputs, BaseTunerLayer) else outputs
        whole.weight = nn.Parameter(inputs.weight.detach().clone(), requires_grad=inputs.weight.requires_grad)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    for module in model.modules():  # what transformers worked out from the config when it made the model
        if hasattr(module, "all_tied_weights_keys"):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)
    return tied


def untie_adapted(model: PeftModel) -> None:
    """Untie the embeddings of an adapted model if one of them has an adapter of another method than PaCA: a merge of it
    would change the other one too.
    """
    root: Any = model.get_base_model()
    try:
        ends = (root.get_input_embeddings(), root.get_output_embeddings())
    except (AttributeError, NotImplementedError):
        return
    # Single tokens that are trained stay those of both.
    adapted = [isinstance(one, BaseTunerLayer) and not isinstance(one, TrainableTokensLayer) for one in ends]
    if any(adapted) and getattr(ends[1], "weight", None) is ends[0].weight:
        untie_embeddings(root)


def untie_for(model: Any, tensor_names: Iterable[str]) -> bool:
    """Untie the embeddings of a base model (it may be on meta) for an adapter that has columns in one of them.

    Returns:
        Whether they were tied, and an adapter with these tensors needs them untied.
    """
    try:
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return False
    if getattr(outputs, "weight", None) is None or outputs.weight is not inputs.weight:
        return False
    embeddings = [f".{name}.paca_" for name, module in model.named_modules() if module is inputs or module is outputs]
    if not any(beginning in name for name in tensor_names for beginning in embeddings):
        return False
    return untie_embeddings(model)
