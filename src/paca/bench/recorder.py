"""Turns measured samples into rows and writes them as soon as they are there."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paca.bench.base_model import BaseModel
from paca.bench.rows import Row, summarized
from paca.bench.settings import BenchSettings, Point
from paca.messages.provenance import row_provenance


class Recorder:
    """Knows what the rows of one run share.

    Args:
        settings: of the run.
        base: the model.
        write: takes rows as they are made.
    """

    def __init__(self, settings: BenchSettings, base: BaseModel, write: Callable[[list[Row]], None]) -> None:
        self._settings, self._write = settings, write
        self._shared: dict[str, Any] = {
            "run": secrets.token_hex(4),
            **row_provenance(settings.torch_device),
            "model": settings.model,
            "scope": settings.scope,
            "loss": settings.loss,
            "dtype": settings.dtype,
            "layers": base.layers,
            "hidden": base.hidden_size,
            "vocab": base.vocab_size,
            "image_size": base.image_size,
            "rank": settings.rank,
            "optimizer": settings.optimizer,
        }
        self.trainable: dict[str, int] = {}
        """Trainable parameters by method, where they are known."""

    def record(
        self,
        metric: str,
        unit: str,
        samples: Mapping[str, Sequence[float]],
        point: Point,
        *,
        variant: str = "eager",
        budget: int = 0,
        notes: Mapping[str, str] | None = None,
        failed: bool = False,
        compare: bool = True,
    ) -> None:
        """Write one row per method.

        Args:
            metric: what was measured.
            unit: of the samples.
            samples: by method; empty where there is no value, the reason is then in `notes`.
            point: size of the batch; 0 for what was searched.
            variant: eager or compiled.
            budget: bytes, for a search.
            notes: by method.
            failed: whether a method without samples could have had some.
            compare: whether a ratio to the baseline says anything.
        """
        notes = notes or {}
        baseline = (samples.get(self._settings.baseline) or None) if compare else None
        rows = []
        for method, values in samples.items():
            found = (
                {**summarized(values, baseline), "baseline": self._settings.baseline if baseline else ""}
                if values
                else {"status": "failed" if failed else "unavailable"}
            )
            rows.append(
                Row(
                    **self._shared,
                    batch=point.batch,
                    seq=point.seq,
                    budget=budget,
                    method=method,
                    variant=variant,
                    trainable=self.trainable.get(method, 0),
                    metric=metric,
                    unit=unit,
                    note=notes.get(method, ""),
                    **found,
                )
            )
        self._write(rows)
