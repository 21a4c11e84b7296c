"""PaCA for linear layers: ``nn.Linear`` and transformers' ``Conv1D``."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from paca.layers.base import PacaLayer
from paca.layers.resident_weight import ResidentWeight
from paca.mixed_batch import MixedBatch, RowColumns, add_columns_by_row


class ResidentLinear(ResidentWeight, nn.Linear):
    """An ``nn.Linear`` with resident columns ``weight[:, indices]``."""

    stock_class = nn.Linear
    input_dim = 1


class ResidentConv1D(ResidentWeight, Conv1D):
    """A transformers ``Conv1D`` (GPT-2), whose weight is ``(in_features, out_features)``: columns are its rows."""

    stock_class = Conv1D
    input_dim = 0


RESIDENT_CLASSES: dict[type[nn.Module], type[ResidentWeight]] = {nn.Linear: ResidentLinear, Conv1D: ResidentConv1D}


class PacaLinear(PacaLayer):
    """The adapted layer: keeps each adapter's deltas and indices, and runs the base layer, which holds them."""

    runs_mixed_batches = True

    def add_mixed_batch(self, y: Tensor, x: Tensor, batch: MixedBatch) -> Tensor:
        """Add ``scale * x[..., indices] @ delta.T`` of each sample's adapter to ``y``.

        Args:
            y: ``(samples, ..., out_features)``, from the pretrained weight.
            x: ``(samples, ..., in_features)``.
            batch: which sample has which adapter; adapters that are not in this layer add nothing.

        Raises:
            ValueError: if ``x`` does not have one sample per name.
            RuntimeError: if another thread put columns into the weight meanwhile.
        """
        if self._disable_adapters:
            return y
        resident = self.base_layer.resident
        if resident.state.columns:
            raise RuntimeError(
                "Another thread ran the model with its active adapters while this one ran a mixed batch, so the result "
                "would be wrong. Give adapter_names in every thread, or in none."
            )
        if x.dim() < 2:
            raise ValueError(f"A mixed batch needs inputs (samples, ..., in_features); this one is {tuple(x.shape)}.")
        groups = [
            RowColumns(rows, self.paca_delta[name], self.paca_indices[name], self.scaling[name])
            for name, rows in batch.rows_of(x.shape[0], x.device).items()
            if name in self.paca_delta
        ]

        def may_change() -> None:
            resident.suspect = True

        return add_columns_by_row(y, x, groups, batch_tag=batch.tag, after_backward=may_change)
