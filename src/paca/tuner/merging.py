"""Merging adapters into a model's weights, with `safe_merge` all layers or none."""

from __future__ import annotations

import warnings

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from paca.layers import PacaLayer, paca_layers
from paca.layers.overlaid import OverlaidLinear, dequantize_model
from paca.layers.peft_calls import refuse_merging_both
from paca.tuner.weighted import SumsAdapters


class MergesAdapters(SumsAdapters):
    """Mixin for `PacaModel`."""

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dequantize: bool = False,
    ) -> nn.Module:
        """Merge the adapters and give back the stock model.

        Args:
            progressbar: Show one.
            safe_merge: Check first that every value is finite.
            adapter_names: Default: the active ones.
            dequantize: Make plain layers of quantized ones, in the model's dtype, so that the merged columns keep their
                16 bits and the model can be saved as a plain checkpoint. Without it they are quantized like the rest.

        Raises:
            ValueError: If a weight can't be written, or `safe_merge` finds NaN or Inf.
        """
        check_mergeable(self.model, adapter_names, safe_merge)
        if dequantize:
            dequantize_model(self.model, adapter_names, safe=safe_merge)
        if safe_merge:
            self.merge_adapter(adapter_names, safe_merge=True)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge the adapters; with `safe_merge`, nothing is merged unless every sum is finite.

        Finite deltas can make a sum that is not: float16 ends at 65504.
        """
        check_mergeable(self.model, adapter_names, safe_merge)
        before = {layer: list(layer.merged_adapters) for layer in paca_layers(self.model)}
        try:
            super().merge_adapter(adapter_names, safe_merge=safe_merge)
        except ValueError:
            for layer, merged in before.items():
                if layer.merged_adapters != merged:
                    layer.unmerge()
                    if merged:
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore")
                            layer.merge(adapter_names=merged)
            raise


def check_mergeable(model: nn.Module, adapter_names: list[str] | None, safe_merge: bool) -> None:
    """Raise `ValueError` if an adapter (default: the active ones) can't be merged into a layer's weight, or, with
    `safe_merge`, a delta is not finite; names the layer. `RuntimeError` if another method's adapter lies above one."""
    for other in model.modules():
        of_others = isinstance(other, BaseTunerLayer) and not isinstance(other, PacaLayer)
        if of_others and not all(layer.merged for layer in paca_layers(other)):
            refuse_merging_both(other)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PacaLayer)}
    for name, layer in layers.items():
        for adapter in [a for a in adapter_names or layer.active_adapters if a in layer.paca_delta]:
            if isinstance(layer, OverlaidLinear) and layer.mode == "additive":
                raise ValueError(f"{name}: {layer.unwritable(adapter)}")
            if safe_merge and not bool(layer.paca_delta[adapter].isfinite().all()):
                raise ValueError(
                    f"Adapter {adapter!r} holds NaN or Inf in {name}, so nothing was merged. The adapter is broken: "
                    "train it again with a smaller learning rate, or use an earlier checkpoint."
                )
