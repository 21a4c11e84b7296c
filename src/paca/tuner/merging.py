"""Merging adapters into a model's weights, with `safe_merge` all layers or none; and sums of adapters."""

from __future__ import annotations

import warnings
from functools import partial

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from paca.layers import PacaLayer
from paca.layers.overlaid import check_writable
from paca.layers.plain import dequantize_model
from paca.tuner.weighted import add_weighted_adapter


class MergesAdapters(BaseTuner):
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
        check_writable(self.model, adapter_names)
        if safe_merge:
            _check_deltas(self.model, adapter_names)
        if dequantize:
            dequantize_model(self.model, adapter_names)
        if safe_merge:
            self.merge_adapter(adapter_names, safe_merge=True)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge the adapters; with `safe_merge`, nothing is merged unless every sum is finite.

        Finite deltas can make a sum that is not: float16 ends at 65504.
        """
        check_writable(self.model, adapter_names)
        merge = partial(super().merge_adapter, adapter_names, safe_merge=safe_merge)
        if not safe_merge:
            merge()
            return
        _check_deltas(self.model, adapter_names)
        before = {layer: list(layer.merged_adapters) for _, layer in _adapted(self.model)}
        try:
            merge()
        except ValueError:
            for layer, merged in before.items():
                if layer.merged_adapters != merged:
                    layer.unmerge()
                    if merged:
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore")
                            layer.merge(adapter_names=merged)
            raise

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """Add the weighted sum of adapters as a new adapter, which is exact: it has the union of their columns.

        With the sum active, the weights are what `W0 + sum_i weights[i] * scale_i * delta_i` rounds to, once the
        deltas' sums are rounded to float32; columns of one adapter only, with `weights[i] * scale_i` a power of two,
        need no such rounding. The new adapter is not active.

        Args:
            adapters: Names of loaded adapters, whose ranks, columns and layers may differ.
            weights: One per adapter; negative ones subtract.
            adapter_name: Of the sum.
            combination_type: `"cat"` or `"linear"`, PEFT's names for sums: both are the same here.

        Raises:
            ValueError: For an unknown adapter, a name that is taken, weights that are no finite numbers, another kind
                of combination, or a module that several of the adapters trained whole.
        """
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type)


def _check_deltas(model: nn.Module, adapter_names: list[str] | None) -> None:
    """Raise `ValueError` naming the layer if a delta to be merged is not finite."""
    for name, layer in _adapted(model):
        for adapter in adapter_names or layer.active_adapters:
            if adapter in layer.paca_delta and not bool(layer.paca_delta[adapter].isfinite().all()):
                raise ValueError(
                    f"Adapter {adapter!r} holds NaN or Inf in {name}, so nothing was merged. The adapter is broken: "
                    "train it again with a smaller learning rate, or use an earlier checkpoint."
                )


def _adapted(model: nn.Module) -> list[tuple[str, PacaLayer]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, PacaLayer)]
