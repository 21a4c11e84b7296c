"""Which input columns of a weight are trained, by a strategy's name: `r` indices, sorted, unique, int64."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from paca.messages.nearest import did_you_mean

STRATEGIES = ("random", "random_blocks", "weight_norm", "activation_norm", "activation_variance", "gradient_norm")
"""How columns are chosen. All but the first two take those with the largest scores."""
AT_RANDOM, FROM_BATCHES = STRATEGIES[:2], STRATEGIES[3:]
"""Those that need no scores, and those whose scores come from calibration batches."""
BLOCK = 16
"""Columns of a block: 32 bytes of a row in 16 bits, which is what a GPU reads at least; half a cache line of a CPU."""


def check_strategy(strategy: str) -> None:
    """Raise `ValueError` unless `strategy` is one of `STRATEGIES`, with the nearest of them."""
    if strategy not in STRATEGIES:
        hint = did_you_mean(str(strategy), STRATEGIES)
        raise ValueError(f"selection={strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}.{hint}")


def check_rank(r: int, in_features: int, module_name: str) -> None:
    """Raise `ValueError` unless `1 <= r <= in_features`."""
    if not 1 <= r <= in_features:
        raise ValueError(
            f"{module_name}: r={r} columns were asked for, but this layer has {in_features} input columns. "
            f"Choose r between 1 and {in_features}, give this layer its own rank in rank_pattern, or leave it out "
            "through exclude_modules."
        )


def random_columns(in_features: int, r: int, seed: int | None, module_name: str, strategy: str = "random") -> Tensor:
    """Draw `(r,)` columns, sorted, by one of `AT_RANDOM`, from `(seed, module_name)` alone: a model that is wrapped in
    parts, or in several processes, gets the same ones."""
    check_rank(r, in_features, module_name)
    return shuffled(strategy, in_features, column_generator(seed, module_name))[:r].sort().values


def shuffled(strategy: str, in_features: int, generator: torch.Generator) -> Tensor:
    """All columns `(in_features,)` in an order drawn from `generator`; the first `r` are a choice of `r`.
    `"random_blocks"`: blocks of `BLOCK` columns (0 to 15, 16 to 31, ...) in any order; `"random"`: single ones."""
    if strategy == "random":
        return torch.randperm(in_features, generator=generator, device="cpu")
    first = torch.randperm(-(-in_features // BLOCK), generator=generator, device="cpu") * BLOCK
    order = (first[:, None] + torch.arange(BLOCK, device="cpu")).flatten()
    return order[order < in_features]


def column_generator(seed: int | None, module_name: str) -> torch.Generator:
    """A generator on the CPU that depends on `(seed, module_name)` alone; None, of a loaded adapter, counts as 0."""
    digest = hashlib.sha256(f"{seed or 0}:{module_name}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def column_problem(indices: Tensor, in_features: int) -> str | None:
    """Say what is wrong with `indices (r,)`, or None: used for columns a user names and for those a file holds."""
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= in_features):
        wrong = indices[(indices < 0) | (indices >= in_features)]
        return f"column {int(wrong[0])} is out of range: this layer has columns 0 to {in_features - 1}"
    values, counts = indices.unique(return_counts=True)
    repeated = values[counts > 1]
    return f"column {int(repeated[0])} is named more than once" if repeated.numel() else None
