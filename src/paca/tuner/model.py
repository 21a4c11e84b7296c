"""PacaModel: puts PaCA into a model, through PEFT's tuner interface."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections import Counter
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.integrations import init_empty_weights
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import Tensor, nn

from paca.config import PacaConfig
from paca.layers import PACA_CLASSES, RESIDENT_CLASSES, PacaExpertStack, PacaLayer, paca_layers
from paca.layers.experts import ExpertStack, put_parameter_back, stack_of
from paca.layers.modes import OVERLAID, is_offloaded, known_quantizations, mode_of, offloads
from paca.layers.overlaid import OverlaidLinear, check_writable
from paca.layers.plain import dequantize_model
from paca.layers.resident_weight import ResidentWeight
from paca.tuner import entry
from paca.tuner.adapter_checks import DELTA, check_adapter_tensors, check_indices_used, check_name, check_saved_modules
from paca.tuner.adapter_file import check_has_weights
from paca.tuner.adapter_names import mixed_batch
from paca.tuner.column_choice import choose_columns
from paca.tuner.expert_targets import expert_targets, unused_patterns
from paca.tuner.recorded_quantization import note_quantization
from paca.tuner.reference import REFERENCE, copied_adapter, copy_deltas
from paca.tuner.registration import PREFIX
from paca.tuner.rotation.files import with_unions, without_unions
from paca.tuner.safe_merge import check_deltas, merge_all_or_none
from paca.tuner.weighted import add_weighted_adapter


class PacaModel(BaseTuner):
    """A model whose target layers train some of their input columns in place.

    Made by ``peft.get_peft_model(model, PacaConfig(...))``; see ``PacaConfig``.
    """

    prefix = PREFIX
    tuner_layer_cls = PacaLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (PEFT reads it; ours targets all linear layers)

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        entry.install_in_holder(self, model)

    # -- putting adapters in ------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        if not isinstance(config, PacaConfig):
            config = self.peft_config[adapter_name] = PacaConfig.from_peft(config)
        trainable_before = {name: p.requires_grad for name, p in model.named_parameters()}
        try:
            check_name(adapter_name)
            if config.loading and config.folder is not None:
                check_has_weights(config.folder)
            check_saved_modules(model, adapter_name, config)
            with warnings.catch_warnings():
                if config.target_parameters:  # PEFT looks for these keys among the targeted modules only
                    warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
                    warnings.filterwarnings("ignore", "You have passed exclude_modules", UserWarning)
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            if config.original_weights is not None or _knows_quantized(model, config):
                note_quantization(model, adapter_name, config)
            else:
                config.base_quantization = "none"
            check_indices_used(model, adapter_name, config)
            check_saved_modules(model, adapter_name, config)  # now with the layers of this adapter
            if adapter_name == REFERENCE and (original := copied_adapter(self.peft_config, adapter_name)) is not None:
                copy_deltas(paca_layers(model), original)
            entry.install(model)
        except BaseException:
            self.peft_config.pop(adapter_name, None)
            remove_adapter(model, adapter_name, trainable_before)
            raise
        config.trainable_before = trainable_before
        if config.target_parameters:
            unused = unused_patterns(model, adapter_name, {**config.rank_pattern, **config.alpha_pattern})
            if unused:
                warnings.warn(f"rank_pattern or alpha_pattern: no adapted layer is called {unused}.", stacklevel=2)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None and peft_config.target_parameters:
            peft_config.target_modules = set()
        if peft_config.target_modules is None:
            chosen = "|".join(peft_config.indices or ())
            peft_config.target_modules = rf"(.*\.)?({chosen})" if chosen else "all-linear"
        if peft_config.layers_to_transform is not None and peft_config.target_modules == "all-linear":
            config: Any = copy.copy(peft_config)
            # PEFT filters blocks only where the targets are endings of names.
            config = _maybe_include_all_linear_layers(config, self.model)
            peft_config.target_modules = {name.rpartition(".")[2] for name in config.target_modules}
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,  # a PacaConfig
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, PacaLayer):
            original = copied_adapter(self.peft_config, adapter_name) if adapter_name == REFERENCE else None
            if original in target.paca_indices:
                indices = target.paca_indices[original].clone()
            else:
                indices = choose_columns(peft_config, target, target.in_features, current_key)
            layer: PacaLayer = target
        else:
            self._check_target(target, current_key)
            plain = type(target) in RESIDENT_CLASSES and type(target.weight) is nn.Parameter
            here = not _may_be_elsewhere(target, self.model)
            mode = "resident" if plain and here else mode_of(target, current_key, self.model)
            if mode == "resident":
                resident_class = self._resident_class(target, current_key)
                in_features = target.weight.shape[resident_class.input_dim]
                indices = choose_columns(peft_config, target, in_features, current_key)
                layer = PACA_CLASSES[type(target)](resident_class.adopt(target))  # from here on nothing may fail
            else:
                layer = OverlaidLinear(OVERLAID[mode].adopt(target))
                try:
                    indices = choose_columns(peft_config, layer, layer.in_features, current_key)
                except BaseException:
                    layer.base_layer.release()
                    raise
        alpha_key = get_pattern_key(list(peft_config.alpha_pattern), current_key)
        try:
            layer.update_layer(
                adapter_name,
                indices,
                paca_alpha=peft_config.alpha_pattern.get(alpha_key, peft_config.paca_alpha),
                init_weights=peft_config.init_weights,
                inference_mode=peft_config.inference_mode,
            )
        except BaseException:
            if layer is not target:  # not in the model yet, where it would be found and taken out
                layer.base_layer.release()
            raise
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            if isinstance(layer, PacaExpertStack):
                del parent._parameters[target_name]
            setattr(parent, target_name, layer)  # PEFT's own way would move the deltas to where the weight is stored

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        # A stack stands where a parameter was: target_modules must not find it when a second adapter comes.
        if isinstance(self.model.get_submodule(key), PacaExpertStack):
            return False
        return super()._check_target_module_exists(peft_config, key)

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        targets = expert_targets(model, peft_config)
        for key, experts, name in targets:
            target = experts._modules.get(name) or stack_of(experts, name)
            with init_empty_weights() if low_cpu_mem_usage else contextlib.nullcontext():
                self._create_and_replace(peft_config, adapter_name, target, name, experts, key, parameter_name=name)
        return [target.key for target in targets]

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: Any, child: Any) -> None:
        if isinstance(new_module, ExpertStack):
            put_parameter_back(parent, child_name, new_module)
        elif isinstance(child, PacaLayer):  # PEFT's own way is about attributes that quantized layers may lack
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_target(self, target: nn.Module, key: str) -> None:
        if isinstance(target, BaseTunerLayer):
            raise ValueError(
                f"{key} is already adapted by another method ({type(target).__name__}); unload that first."
            )
        names = [name for name, m in self.model.named_modules(remove_duplicate=False) if m is target]
        if len(names) > 1:
            raise ValueError(
                f"{key} is one module under {len(names)} names ({', '.join(names)}), which would all be trained. Leave "
                "it out of target_modules."
            )
        own = vars(target).get("forward")
        if own is not None and own == type(target).forward.__get__(target):
            del target.forward  # accelerate leaves the class's own on the instance when it takes a hook off
        if "forward" in vars(target) and "_old_forward" not in vars(target):
            raise ValueError(
                f"{key} has a forward of its own ({vars(target)['forward']!r}) in place of its class's, which would "
                "bypass PaCA. Undo that, or leave the layer out of target_modules."
            )

    def _resident_class(self, target: nn.Module, key: str) -> type[ResidentWeight]:
        resident_class = RESIDENT_CLASSES.get(type(target))
        if resident_class is None:
            above = next((c.__name__ for c in RESIDENT_CLASSES if isinstance(target, c)), None)
            reason = f" (a subclass of {above}, which may use the weight in a way of its own)" if above else ""
            raise ValueError(
                f"{key} is a {type(target).__module__}.{type(target).__qualname__}{reason}, which PaCA can't adapt "
                f"yet; it adapts {', '.join(c.__name__ for c in RESIDENT_CLASSES)} and {known_quantizations()}. Leave "
                "it out through target_modules or exclude_modules."
            )
        problem = resident_class.problem(target)
        if problem:
            raise ValueError(f"{key} {problem}")
        if _may_be_elsewhere(target, self.model) and is_offloaded(target, self.model):
            raise ValueError(
                f"{key} is offloaded by accelerate, and of the layers that PaCA adapts only linear ones can be. Load "
                "the model with a device_map that keeps this layer on one device, or leave it out of target_modules."
            )
        weight: Any = target.weight
        if not type(weight).__module__.startswith("torch."):
            raise ValueError(
                f"{key} has a weight of type {type(weight).__module__}.{type(weight).__qualname__}, which PaCA can't "
                f"write columns into; it adapts plain weights and {known_quantizations()}."
            )
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise ValueError(f"{key} has a weight of type {weight.dtype}; PaCA needs a float of 16 bits or more.")
        uses = Counter(_place(p) for m in self.model.modules() for p in m._parameters.values() if p is not None)
        if uses[_place(weight)] > 1:
            raise ValueError(
                f"{key} shares its weight with another module (tied weights), which would silently be trained along. "
                "Leave it out of target_modules, or, if they are a language model's input embedding and output layer, "
                "give each its own weight first: paca.untie_embeddings(model)."
            )
        return resident_class

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
        names = kwargs.get("adapter_names")
        return contextlib.nullcontext() if names is None else mixed_batch(self.model, names, kwargs)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """Add the weighted sum of adapters as a new adapter, which is exact: it has the union of their columns.

        With the sum active, the weights are what ``W0 + sum_i weights[i] * scale_i * delta_i`` rounds to, once the
        deltas' sums are rounded to float32; columns of one adapter only, with ``weights[i] * scale_i`` a power of two,
        need no such rounding. The new adapter is not active.

        Args:
            adapters: names of loaded adapters, whose ranks, columns and layers may differ.
            weights: one per adapter; negative ones subtract.
            adapter_name: of the sum.
            combination_type: ``"cat"`` or ``"linear"``, PEFT's names for sums: both are the same here.

        Raises:
            ValueError: for an unknown adapter, a name that is taken, weights that are no finite numbers, another kind
                of combination, or a module that several of the adapters trained whole.
        """
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type)

    # -- taking adapters out ------------------------------------------------------------------------------------

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        arguments = inspect.signature(super()._unload_and_optionally_merge).bind(*args, **kwargs).arguments
        if arguments.get("merge", True) and arguments.get("safe_merge"):
            self.merge_adapter(arguments.get("adapter_names"), safe_merge=True)
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        entry.remove(model)
        return model

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dequantize: bool = False,
    ) -> nn.Module:
        """Merge the adapters and give back the stock model.

        Args:
            progressbar: show one.
            safe_merge: check first that every value is finite.
            adapter_names: default: the active ones.
            dequantize: make plain layers of quantized ones, in the model's dtype, so that the merged columns keep their
                16 bits and the model can be saved as a plain checkpoint. Without it they are quantized like the rest.

        Raises:
            ValueError: if a weight can't be written, or ``safe_merge`` finds NaN or Inf.
        """
        check_writable(self.model, adapter_names)
        if dequantize:
            if safe_merge:
                check_deltas(self.model, adapter_names)
            dequantize_model(self.model, adapter_names)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        check_writable(self.model, adapter_names)
        merge = partial(super().merge_adapter, adapter_names, safe_merge=safe_merge)
        if safe_merge:
            merge_all_or_none(self.model, adapter_names, merge)
        else:
            merge()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for layer in paca_layers(self.model):
            layer.cast_deltas(adapter_name, autocast_adapter_dtype)

    # -- saving and loading -------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        chosen = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)
        if getattr(config, "union", None) is None and not _is_rotated(model, adapter_name):
            return chosen
        return with_unions(model, config, adapter_name, state_dict, chosen)

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
            if getattr(config, "loading", False):  # the adapter was only just put in, to be loaded into
                tuner = getattr(model, "base_model", None)
                root = tuner.model if isinstance(tuner, PacaModel) else model
                model.peft_config.pop(adapter_name, None)
                remove_adapter(root, adapter_name, config.trainable_before)
            raise
        config.loading, config.trainable_before = False, {}
        if hasattr(model, "hf_device_map") and offloads(model):
            for name, layer in model.named_modules():
                if isinstance(layer, OverlaidLinear) and adapter_name in layer.paca_delta:
                    layer.loaded_deltas[adapter_name] = checked[f"{name}.{DELTA}.{adapter_name}"]
        return checked


def _may_be_elsewhere(target: nn.Module, model: nn.Module) -> bool:
    """Whether accelerate has a hand in where a module's weight is."""
    return hasattr(target, "_hf_hook") or hasattr(model, "hf_device_map")


def _knows_quantized(model: nn.Module, config: PacaConfig) -> bool:
    """Whether weights are quantized, or were where the adapter was made."""
    made_for = config.base_quantization if config.loading else None
    return made_for not in (None, "none") or any(isinstance(m, OverlaidLinear) for m in model.modules())


def _is_rotated(model: nn.Module, adapter_name: str) -> bool:
    return any(adapter_name in layer.folded for layer in paca_layers(model))


def _place(parameter: nn.Parameter) -> tuple[Any, Any]:
    """What two parameters have in common that share memory."""
    return parameter.untyped_storage()._cdata, parameter.storage_offset()


def remove_adapter(model: nn.Module, adapter_name: str, trainable_before: dict[str, bool]) -> None:
    """Take an adapter that could not be put in or loaded out again, and restore what was trainable.

    Layers that have no other adapter become stock modules again.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._adapters:
            active = [other for other in module.active_adapters if other != adapter_name]
            module.delete_adapter(adapter_name, new_active_adapters=active)
            if not module._adapters:
                parent_name, _, child = name.rpartition(".")
                stock = module.unload_and_optionally_merge_module(False, False, None)
                setattr(model.get_submodule(parent_name), child, stock)
    for name, module in list(model.named_modules()):
        if not isinstance(module, PacaLayer):
            continue
        if adapter_name in module.r:  # it may have got no delta yet
            module.delete_adapter(adapter_name)
        if not module.paca_delta:
            parent_name, _, child = name.rpartition(".")
            stock = module.unload_and_optionally_merge_module(False, False, None)
            parent = model.get_submodule(parent_name)
            if isinstance(stock, ExpertStack):
                put_parameter_back(parent, child, stock)
            else:
                setattr(parent, child, stock)
    if paca_layers(model):
        entry.install(model)  # without the layers that went
    else:
        entry.remove(model)
        if getattr(model, "peft_config", None) == {}:
            del model.peft_config
    for name, parameter in model.named_parameters():
        if name in trainable_before:
            parameter.requires_grad_(trainable_before[name])
