"""Means and their standard errors, over the examples of a test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Mean = tuple[float, float | None]
"""A number and its standard error, where there is one."""
_Z = 1.96
"""Standard deviations of a normal distribution between which 95 % of it lie."""


def as_numbers(means: Mapping[str, Mean]) -> dict[str, float | None]:
    """For files: each number by its name, then each standard error by that name and `_stderr`."""
    values = {name: value for name, (value, _) in means.items()}
    return values | {f"{name}_stderr": error for name, (_, error) in means.items()}


def mean_with_error(values: Sequence[float]) -> Mean:
    """The mean, and the standard error of it: the sample's deviation (n - 1) by the root of n; None for one value."""
    return ratio_with_error(values, [1.0] * len(values))


def share_may_be_off(count: int) -> float:
    """How far the share behind `count` answers that are all right, or all wrong, may be from 1, or 0.

    The standard error of such answers is 0. This is the width of their interval at 95 % (Wilson, JASA 22, 1927).
    """
    return _Z**2 / (count + _Z**2)


def ratio_with_error(sums: Sequence[float], weights: Sequence[float]) -> Mean:
    """The ratio of two sums over examples, such as a loss per token, and its standard error.

    Examples are independent of each other and the tokens inside of one are not, so the error is that of a ratio
    estimator over examples: `sqrt(n / (n - 1) * sum((s_i - ratio * w_i) ** 2)) / sum(w)` (Cochran, Sampling Techniques,
    1977, equation 6.13). With equal weights it is the standard error of a mean.

    Args:
        sums: What each example adds, such as the loss summed over its tokens.
        weights: What each is divided by, such as its number of tokens.

    Returns:
        The ratio, and its standard error; None for a single example.
    """
    count, total = len(sums), math.fsum(weights)
    ratio = math.fsum(sums) / total
    if count < 2:
        return ratio, None
    squares = math.fsum((value - ratio * weight) ** 2 for value, weight in zip(sums, weights, strict=True))
    return ratio, math.sqrt(count / (count - 1) * squares) / total
