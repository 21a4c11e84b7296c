"""Which input columns of a weight are trained: numbers for each column -> ``r`` indices, sorted, unique, int64."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from paca.messages.nearest import did_you_mean

STRATEGIES = ("random", "random_blocks", "weight_norm", "activation_norm", "activation_variance", "gradient_norm")
"""How columns are chosen. All but the first two take those with the largest scores."""
AT_RANDOM = ("random", "random_blocks")
"""The strategies that need no scores."""
FROM_BATCHES = ("activation_norm", "activation_variance", "gradient_norm")
"""The strategies whose scores come from calibration batches."""

BLOCK = 16
"""Columns of a block: 32 bytes of a row in 16 bits, which is what a GPU reads at least; half a cache line of a CPU."""

_ROWS_AT_ONCE = 2**20  # values converted to float64 at a time


def check_strategy(strategy: str) -> None:
    """Raise ``ValueError`` unless ``strategy`` is one of ``STRATEGIES``, with the nearest of them."""
    if strategy not in STRATEGIES:
        hint = did_you_mean(str(strategy), STRATEGIES)
        raise ValueError(f"selection={strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}.{hint}")


def check_rank(r: int, in_features: int, module_name: str) -> None:
    """Raise ``ValueError`` unless ``1 <= r <= in_features``."""
    if not 1 <= r <= in_features:
        raise ValueError(
            f"{module_name}: r={r} columns were asked for, but this layer has {in_features} input columns. "
            f"Choose r between 1 and {in_features}, or give this layer its own rank in rank_pattern."
        )


def random_columns(in_features: int, r: int, seed: int | None, module_name: str, strategy: str = "random") -> Tensor:
    """Draw ``r`` distinct columns by one of ``AT_RANDOM``, reproducibly from ``(seed, module_name)`` alone.

    Neither the global random state nor the order in which layers are made has any influence, so a model that is
    wrapped in parts, or in several processes, gets the same columns.

    Returns:
        ``(r,)`` int64, sorted, on CPU.
    """
    return select_columns(
        strategy, r, in_features=in_features, generator=column_generator(seed, module_name), module_name=module_name
    )


def shuffled(strategy: str, in_features: int, generator: torch.Generator) -> Tensor:
    """All columns ``(in_features,)`` in an order drawn from ``generator``; the first ``r`` are a choice of ``r``.

    ``"random"``: any order, so that every choice is as likely. ``"random_blocks"``: the blocks of ``BLOCK`` columns
    (0 to 15, 16 to 31, ...) in any order, each of them whole.
    """
    if strategy == "random":
        return torch.randperm(in_features, generator=generator, device="cpu")
    first = torch.randperm(-(-in_features // BLOCK), generator=generator, device="cpu") * BLOCK
    order = (first[:, None] + torch.arange(BLOCK)).flatten()
    return order[order < in_features]


def column_generator(seed: int | None, module_name: str) -> torch.Generator:
    """A generator on the CPU that depends on ``(seed, module_name)`` alone; None, of a loaded adapter, counts as 0."""
    digest = hashlib.sha256(f"{seed or 0}:{module_name}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def select_columns(
    strategy: str,
    r: int,
    *,
    in_features: int,
    module_name: str,
    scores: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose ``r`` of a layer's ``in_features`` columns.

    Args:
        strategy: one of ``STRATEGIES``.
        r: how many.
        in_features: how many there are.
        module_name: of the layer, for messages.
        scores: ``(in_features,)``, for every strategy but those ``AT_RANDOM``: the norm of each column of the weight
            (``weight_norms``), or what calibration batches gave for it. The largest win; of equal ones the first.
        generator: on the CPU, for those ``AT_RANDOM``.

    Returns:
        ``(r,)`` int64, sorted, on CPU.

    Raises:
        ValueError: for an unknown strategy, a rank that the layer has not, or scores that are NaN or infinite.
    """
    check_strategy(strategy)
    check_rank(r, in_features, module_name)
    if strategy in AT_RANDOM:
        assert generator is not None
        return shuffled(strategy, in_features, generator)[:r].sort().values
    assert scores is not None
    assert scores.shape == (in_features,)
    on_cpu = scores.detach().to("cpu", torch.float64)
    wrong = (~on_cpu.isfinite()).nonzero().flatten()
    if wrong.numel():
        source = "weight holds" if strategy == "weight_norm" else "statistics over the batches hold"
        raise ValueError(
            f"{module_name}: its {source} NaN or infinite values ({wrong.numel()} columns, the first is "
            f"{int(wrong[0])}), so that {strategy} can't rank its columns. Check the weights and the batches; in "
            "float16, load the model in bfloat16 or float32."
        )
    return on_cpu.sort(descending=True, stable=True).indices[:r].sort().values


def weight_norms(weight: Tensor, input_dim: int) -> Tensor:
    """The Euclidean norm of each column, over all dimensions but ``input_dim``.

    Args:
        weight: two or more dimensions, any float type.
        input_dim: the one that runs over the input features.

    Returns:
        ``(in_features,)`` in float64 (float32 where the device has no float64), computed piece by piece.
    """
    columns = weight.detach().movedim(input_dim, -1)  # (..., in_features)
    total = torch.zeros(columns.shape[-1], dtype=widest(weight.device), device=weight.device)
    for part in columns.split(max(1, _ROWS_AT_ONCE // max(1, columns[0].numel()))):
        total += part.to(total.dtype).square().flatten(0, -2).sum(0)
    return total.sqrt()


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device without it."""
    return torch.float32 if device.type == "mps" else torch.float64


def explicit_columns(columns: Sequence[int] | Tensor, in_features: int, module_name: str) -> Tensor:
    """Check and sort columns that the user names.

    Returns:
        ``(r,)`` int64, sorted, on CPU.

    Raises:
        ValueError: if there are none, one is repeated, or one is outside ``[0, in_features)``.
    """
    try:
        indices = torch.as_tensor(columns, device="cpu")
    except (TypeError, ValueError, RuntimeError):  # a string, None, lists of different lengths, numbers past int64
        indices = torch.empty(0)
    if indices.dim() != 1 or indices.numel() == 0 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"{module_name}: columns must be a non-empty list of whole numbers, got {columns!r}.")
    indices = indices.to(torch.int64).sort().values
    problem = column_problem(indices, in_features)
    if problem:
        raise ValueError(f"{module_name}: {problem}.")
    return indices


def column_problem(indices: Tensor, in_features: int) -> str | None:
    """Say what is wrong with ``indices (r,)``, or None: used for columns a user names and for those a file holds."""
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= in_features):
        wrong = indices[(indices < 0) | (indices >= in_features)]
        return f"column {int(wrong[0])} is out of range: this layer has columns 0 to {in_features - 1}"
    values, counts = indices.unique(return_counts=True)
    if values.numel() != indices.numel():
        return f"column {int(values[counts > 1][0])} is named more than once"
    return None
