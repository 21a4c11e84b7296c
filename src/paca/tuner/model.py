"""PacaModel: puts PaCA into a model, through PEFT's tuner interface."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any, cast

from torch import Tensor, nn, strided
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from paca.config import PacaConfig
from paca.layers import PACA_CLASSES, RESIDENT_CLASSES, PacaExpertStack, PacaLayer, paca_layers
from paca.layers.experts import ExpertStack, put_parameter_back
from paca.layers.overlaid import keep_for_dispatch
from paca.tuner import entry
from paca.tuner.adapter_checks import check_adapter_tensors, check_name
from paca.tuner.adapter_file import folder_being_read, shapes_in
from paca.tuner.adapter_names import mixed_batch
from paca.tuner.column_choice import choose_columns, for_layer
from paca.tuner.expert_targets import AdaptsStacks, quiet_about_stacks
from paca.tuner.merging import MergesAdapters
from paca.tuner.offloaded_files import refuse_overwriting
from paca.tuner.recorded_quantization import note_quantization
from paca.tuner.reference import REFERENCE, columns_of_original, copy_original
from paca.tuner.registration import PREFIX, as_ours
from paca.tuner.removal import refuse_to_generate, remove_adapter, remove_unloaded, replacing
from paca.tuner.rotation.files import with_unions, without_unions
from paca.tuner.saved_modules import check_saved_modules
from paca.tuner.strange_expressions import try_expressions
from paca.tuner.target_names import tell_of_layers, warn_of_names
from paca.tuner.targets import adapted_after_all, all_linear
from paca.tuner.unused_names import check_indices_used, warn_of_unused


class PacaModel(AdaptsStacks, MergesAdapters):
    """A model whose target layers train some of their input columns in place: `get_peft_model(model, PacaConfig())`."""

    prefix = PREFIX
    tuner_layer_cls = PacaLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (PEFT reads it; ours targets all linear layers)

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        with replacing(model, *args, **kwargs) if hasattr(model, "peft_config") else contextlib.nullcontext():
            super().__init__(model, *args, **kwargs)
        entry.install_in_holder(self, model, refuse_to_generate)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        if not isinstance(config, PacaConfig):  # PEFT's own (>= 0.22)
            config = self.peft_config[adapter_name] = as_ours(config, PacaConfig)
        config.reading = folder_being_read() or (config.folder if config.loading else None)
        config.trainable_before = {name: p.requires_grad for name, p in model.named_parameters()}
        # How many names a module has, and how many parameters and buffers are in one memory.
        self._uses: Counter[Any] = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
        tensors: Any = (t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values()))
        self._uses.update(_memory_of(t) for t in tensors if type(t) in (nn.Parameter, Tensor) and t.layout == strided)
        try:
            check_name(adapter_name)
            if config.reading is not None:
                config.shapes = shapes_in(config.reading, 3 * len(self._uses) + 100)
                if "disk" in getattr(model, "hf_device_map", {}).values():
                    refuse_overwriting(model)
                if config.unusual:
                    try_expressions(vars(config), model, config.reading)
            if config.modules_to_save or config.trainable_token_indices:
                check_saved_modules(model, config)
            with quiet_about_stacks() if config.target_parameters else contextlib.nullcontext():
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            made_for = config.base_quantization if config.reading else None
            others = any(layer.mode != "resident" for layer in paca_layers(model))
            if config.original_weights or made_for not in (None, "none") or others:
                note_quantization(model, adapter_name, config)
            else:
                config.base_quantization = "none"
            ends = {end for name in self.targeted_module_names for end in (name, name.rpartition(".")[2])}
            names = None if config.reading or config.inference_mode else config.target_modules
            if isinstance(names, set) and not names <= ends:  # a saved adapter may name more
                warn_of_names(names, model)
            if config.indices and not config.reading:
                check_indices_used(model, adapter_name, config.indices)
            if config.modules_to_save or config.trainable_token_indices:
                check_saved_modules(model, config, tell=True)  # now with the layers of this adapter
            if adapter_name == REFERENCE:
                copy_original(self.peft_config, paca_layers(model))
            entry.install(model)
        except BaseException as error:
            remove_adapter(model, self.peft_config, adapter_name, config)
            tell_of_layers(error, model, config.target_modules)
            raise
        if config.target_parameters or config.layers_to_transform is not None:
            warn_of_unused(model, adapter_name, config)

    def _prepare_adapter_config(self, config: Any, model_config: dict[str, Any]) -> Any:
        if config.target_modules is None:
            keys = "|".join(config.indices or ())
            config.target_modules = set() if config.target_parameters else rf"(.*\.)?({keys})" if keys else "all-linear"
        if config.target_modules == "all-linear":
            config.target_modules = all_linear(config, self.model)
        return config

    def _create_and_replace(  # type: ignore[override]
        self, config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, current_key: str, **_: Any
    ) -> None:
        if isinstance(target, PacaLayer):
            layer = target
        elif self._is_plain(target):
            layer = PACA_CLASSES[type(target)](RESIDENT_CLASSES[type(target)].adopt(target))
        else:
            layer = adapted_after_all(target, current_key, self.model)
        alpha = for_layer(current_key, config.alpha_pattern, config.paca_alpha)
        try:
            indices = columns_of_original(self.peft_config, layer) if adapter_name == REFERENCE else None
            if indices is None:
                indices = choose_columns(config, layer, layer.in_features, current_key)
            layer.update_layer(adapter_name, indices, alpha, config.init_weights, config.inference_mode)
        except BaseException:
            if layer is not target:  # not in the model yet, where it would be found and taken out
                layer.base_layer.release()
            raise
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            parent._parameters.pop(target_name, None)  # a stack of experts was one
            setattr(parent, target_name, layer)  # PEFT's own way would move the deltas to where the weight is stored

    def _is_plain(self, target: Any) -> bool:
        """Whether nothing about a module has to be looked at closer, or refused."""
        resident_class = RESIDENT_CLASSES.get(type(target))
        return (
            resident_class is not None
            and type(target.weight) is nn.Parameter
            and target.weight.is_floating_point()
            and target.weight.element_size() > 1
            and resident_class.problem(target) is None
            and self._uses[id(target)] < 2
            and self._uses[_memory_of(target.weight)] < 2
            and 0 not in target.weight.stride()
            and not hasattr(self.model, "hf_device_map")
            and not hasattr(target.weight, "ds_id")  # of DeepSpeed's ZeRO-3
            and not is_deepspeed_zero3_enabled()
            and not vars(target).keys() & {"forward", "_hf_hook"}
        )

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        # A stack stands where a parameter was: target_modules must not find it when a second adapter comes.
        stack = isinstance(self.model.get_submodule(key), PacaExpertStack)
        return False if stack else super()._check_target_module_exists(peft_config, key)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
        names = kwargs.get("adapter_names")
        return contextlib.nullcontext() if names is None else mixed_batch(self.model, names, kwargs)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        entry.remove(model := cast(nn.Module, super()._unload_and_optionally_merge(*args, **kwargs)))
        return model

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: Any, child: Any) -> None:
        if isinstance(new_module, ExpertStack):
            put_parameter_back(parent, child_name, new_module)
        elif isinstance(child, PacaLayer) or not isinstance(new_module, PacaLayer):  # which may lack what PEFT copies
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for layer in paca_layers(self.model):
            layer.cast_deltas(adapter_name, autocast_adapter_dtype)
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)  # rows of single tokens

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        chosen = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)
        missing = {name.replace(".paca_delta.", ".paca_indices.") for name in chosen} - chosen.keys()
        if missing:  # parameters alone were given
            chosen |= {name: buffer for name, buffer in model.named_buffers() if name in missing}
        rotated = getattr(config, "union", None) is not None or _is_rotated(model, adapter_name)
        return with_unions(model, config, adapter_name, state_dict, chosen) if rotated else chosen

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        tensors = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        try:
            rotating = getattr(config, "rotate_every", None) is not None
            checked = check_adapter_tensors(model, adapter_name, tensors, rotating=rotating)
            if rotating or _is_rotated(model, adapter_name):
                checked = without_unions(model, adapter_name, checked)
        except BaseException:
            if getattr(config, "reading", None):
                remove_unloaded(model, adapter_name, config)
            raise
        config.loading, config.reading, config.trainable_before, config.replaced = False, None, {}, None
        if hasattr(model, "hf_device_map"):
            keep_for_dispatch(model, adapter_name, checked)
        return checked


def _is_rotated(model: nn.Module, adapter_name: str) -> bool:
    return any(adapter_name in layer.folded for layer in paca_layers(model))


def _memory_of(parameter: Tensor) -> Any:
    """What two parameters have in common that share memory, or are views of the same."""
    return parameter.untyped_storage()._cdata
