"""Turns measured samples into rows and writes them as soon as they are there."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from paca.bench.base_model import BaseModel
from paca.bench.rows import Row, summarized
from paca.bench.settings import BenchSettings, Point
from paca.messages.provenance import row_provenance


@dataclass
class Measured:
    """One metric of several methods, at one size."""

    metric: str
    unit: str
    point: Point
    """Size of the batch; 0 for what was searched."""
    variant: str = "eager"
    budget: int = 0
    """Bytes, for a search."""
    compare: bool = True
    """Whether a ratio to the baseline says anything."""
    missing: str = "failed"
    """Status of a method without samples; `unavailable` where it could not have had any."""
    samples: dict[str, Sequence[float]] = field(default_factory=dict)
    """By method; empty where there is no value, the reason is then in `notes`."""
    notes: dict[str, str] = field(default_factory=dict)

    def add(self, method: str, samples: Sequence[float], note: str | None = None) -> None:
        """Note what one method gave."""
        self.samples[method], self.notes[method] = samples, note or ""


class Recorder:
    """Knows what the rows of one run share.

    Args:
        settings: Of the run.
        base: The model.
        write: Takes rows as they are made.
    """

    def __init__(self, settings: BenchSettings, base: BaseModel, write: Callable[[list[Row]], None]) -> None:
        self._write = write
        self._shared: dict[str, Any] = {
            "run": secrets.token_hex(4),
            **row_provenance(settings.torch_device),
            **{name: getattr(settings, name) for name in ("model", "scope", "loss", "dtype", "rank", "optimizer")},
            "layers": base.layers,
            "hidden": base.hidden_size,
            "vocab": base.vocab_size,
            "image_size": base.image_size,
        }
        self.baseline = ""
        """The method that ratios are taken against."""
        self.trainable: dict[str, int] = {}
        """Trainable parameters by method, where they are known."""

    def record(self, *measured: Measured) -> None:
        """Write one row per method of each."""
        self._write([row for one in measured for row in self._rows(one)])

    def _rows(self, measured: Measured) -> Iterable[Row]:
        baseline = (measured.samples.get(self.baseline) or None) if measured.compare else None
        for method, values in measured.samples.items():
            found = summarized(values, baseline) if values else {"status": measured.missing}
            yield {
                **self._shared,
                **measured.point._asdict(),
                "budget": measured.budget,
                "method": method,
                "variant": measured.variant,
                "trainable": self.trainable.get(method, 0),
                "metric": measured.metric,
                "unit": measured.unit,
                "baseline": self.baseline if values and baseline else "",
                "note": measured.notes.get(method, ""),
                **found,
            }
