"""Mean, energy and centred energy of each input channel, from rows that come in pieces; torch only."""

from __future__ import annotations

import torch
from torch import Tensor

from paca.columns.selection import widest

_AT_ONCE = 2**20  # values converted to the accumulators' type at a time: 8 MiB


class Moments:
    """Streaming moments of ``channels`` channels: three numbers each, whatever comes in.

    Pieces are merged by Chan, Golub and LeVeque's update (1979), so that a channel whose mean is far from zero keeps
    its variance.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        """Rows so far."""
        self._mean = torch.zeros(channels, dtype=torch.float64)
        self._centred = torch.zeros(channels, dtype=torch.float64)

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Take in ``rows (n, channels)`` of any dtype."""
        if self.count == 0:
            self._mean = self._mean.to(rows.device, widest(rows.device))
            self._centred = self._centred.to(self._mean)
        for piece in rows.split(max(1, _AT_ONCE // max(1, rows.shape[1]))):
            n = piece.shape[0]
            if n == 0:
                continue
            values = piece.to(device=self._mean.device, dtype=self._mean.dtype)
            mean = values.mean(0)
            shift = mean - self._mean
            self._centred += (values - mean).square_().sum(0)
            self._centred += shift.square() * (self.count * n / (self.count + n))
            self._mean += shift * (n / (self.count + n))
            self.count += n

    def norms(self) -> Tensor:
        """The Euclidean norm of each channel over all rows, ``(channels,)``."""
        return (self._centred + self.count * self._mean.square()).sqrt()

    def variances(self) -> Tensor:
        """The mean square of each channel's distance from its mean, ``(channels,)``."""
        return self._centred / max(1, self.count)
