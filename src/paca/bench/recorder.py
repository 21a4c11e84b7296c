"""Turns measured samples into rows and writes them as soon as they are there."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paca.bench.base_model import BaseModel
from paca.bench.rows import Row, summarized
from paca.bench.settings import BenchSettings, Point
from paca.training.folder.provenance import row_provenance

Found = Mapping[str, tuple[Sequence[float], str | None]]
"""By method: its samples, none where there is no value, and a note: the reason, or how they were counted."""


class Recorder:
    """Knows what the rows of one run share, and gives rows to `write` as they are made."""

    def __init__(self, settings: BenchSettings, base: BaseModel, write: Callable[[list[Row]], None]) -> None:
        self._write = write
        self._shared: dict[str, Any] = {
            "run": secrets.token_hex(4),
            **row_provenance(settings.torch_device),
            **{name: getattr(settings, name) for name in ("model", "scope", "loss", "dtype", "rank")},
            "optimizer": "adamw",  # torch's fused one, the Trainer's default
            "layers": base.layers,
            "hidden": base.hidden_size,
            "vocab": base.vocab_size,
            "image_size": base.image_size,
        }
        self.baseline = ""
        """The method that ratios are taken against."""
        self.trainable: dict[str, int] = {}
        """Trainable parameters by method, where they are known."""

    def record(
        self,
        metric: str,
        unit: str,
        point: Point,
        found: Found,
        *,
        variant: str = "eager",
        budget: int = 0,
        compare: bool = True,
        missing: str = "failed",
    ) -> None:
        """Write one row per method.

        Args:
            metric: What was measured.
            unit: Of the samples.
            point: Size of the batch; 0 for what was searched.
            found: The samples.
            variant: How the models ran.
            budget: Bytes, for a search.
            compare: Whether a ratio to the baseline says anything.
            missing: Status of a method without samples; `unavailable` where it could not have had any.
        """
        baseline = found.get(self.baseline, ((), None))[0] if compare else ()
        shared = self._shared | point._asdict() | {"budget": budget, "variant": variant, "metric": metric, "unit": unit}
        self._write(
            [
                shared
                | {"method": method, "trainable": self.trainable.get(method, 0), "note": note or ""}
                | {"baseline": self.baseline if samples and baseline else ""}
                | (summarized(samples, baseline or None) if samples else {"status": missing})
                for method, (samples, note) in found.items()
            ]
        )
