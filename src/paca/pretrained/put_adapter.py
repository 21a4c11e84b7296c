"""An adapter from its folder, onto the model that it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel

from paca.messages.errors import PacaError
from paca.pretrained.adapter_folder import is_in, tensor_names, weight_file
from paca.pretrained.base_weights import warn_of_other_base
from paca.pretrained.foreign_methods import check_method, without_asking
from paca.pretrained.generation_settings import find_learned_cache
from paca.pretrained.tied_weights import untie_for


def put_adapter_on(
    model: PreTrainedModel | PeftModel,
    adapter: Path,
    base: str,
    name: str = "default",
    *,
    cast: bool | None = None,
    trainable: bool = False,
) -> PeftModel:
    """Put an adapter on its base model, beside those that are on it already, and make it the active one.

    Args:
        model: The base model, or the same one with other adapters.
        adapter: Its folder.
        base: Name or path of the model, which `warn_of_other_base` looks at.
        name: What the model calls the adapter.
        cast: Let it be float32 on 16-bit weights; None where its file is in more than the model's 16 bits.
        trainable: Of one that is alone: it is to be trained.

    Raises:
        PacaError: A broken file, or an adapter that does not fit the model, or not beside the others.
    """
    weights = weight_file(adapter)
    warn_of_other_base(adapter, base)
    try:
        if cast is None:  # one that was trained in the model's 16 bits rounds as they do
            cast = not is_in(str(model.dtype), weights)
        untie_for(model, tensor_names(weights))
        check_method(adapter, model)
        with without_asking():
            if not isinstance(model, PeftModel):
                options: Any = {"is_trainable": trainable, "autocast_adapter_dtype": cast}
                adapted = PeftModel.from_pretrained(model, str(adapter), name, **options).eval()
                find_learned_cache(adapted)
                return adapted
            model.load_adapter(str(adapter), name, autocast_adapter_dtype=cast)
        model.set_adapter(name)
        return model.eval()
    except (SafetensorError, EOFError) as error:
        raise PacaError(f"{weights} is broken: {error}. Copy the file again, or train again.") from error
    except Exception as error:  # whatever PEFT raises where a config or a file is not what it expects
        reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise PacaError(f"The adapter in {adapter} cannot be put on the model {base}: {reason}") from error
