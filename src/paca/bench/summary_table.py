"""Rows as one small table per setting, of ratios only: what a README has room for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from paca.bench.report import by_setting, newest, ratios_to
from paca.bench.rows import Row
from paca.bench.statistics import spread

_COLUMNS = {
    "step_time": "step time",
    "saved_per_token_and_layer": "saved activations",
    "peak_above_weights": "peak memory above the weights",
    "longest_sequence": "longest sequence",
}
_SAME_AT_ALL_LENGTHS = ("saved_per_token_and_layer", "longest_sequence")


def summary_tables(rows: Iterable[Row], baselines: Sequence[str]) -> str:
    """Median ratios, round by round: a column per metric and number of tokens, in it the ratio to each baseline.

    Args:
        rows: from any number of runs; of rows that measured the same thing the last one is shown.
        baselines: methods to show ratios against.
    """
    parts = []
    for setting, members in by_setting(newest(row for row in rows if row.variant == "eager")).items():
        columns = [
            (metric, seq)
            for metric in _COLUMNS
            for seq in _lengths(members, metric)
            if any(row.method in baselines and (row.metric, row.seq) == (metric, seq) for row in members)
        ]
        if not columns:
            continue
        cells = {(row.method, row.metric, row.seq): row for row in members}
        header = ["", *(_title(metric, seq) for metric, seq in columns)]
        lines = [_line(header), _line(["---", *["---:"] * len(columns)])]
        for method in dict.fromkeys(row.method for row in members if row.metric in _COLUMNS):
            values = []
            for metric, seq in columns:
                row = cells.get((method, metric, seq))
                ratios = [_ratio(row, cells.get((baseline, metric, seq))) for baseline in baselines]
                values.append(" / ".join(ratio or "–" for ratio in ratios) if any(ratios) else "")
            lines.append(_line([f"`{method}`", *values]))
        against = " / ".join(f"× `{baseline}`" for baseline in baselines)
        parts.append("\n".join([f"**{setting.title()}** ({against})", "", *lines, ""]))
    return "\n".join(parts)


def _lengths(rows: list[Row], metric: str) -> list[int]:
    found = sorted({row.seq for row in rows if row.metric == metric})
    return found[-1:] if metric in _SAME_AT_ALL_LENGTHS else found


def _ratio(row: Row | None, baseline: Row | None) -> str:
    ratios = ratios_to(row, baseline) if row is not None else []
    if not ratios:
        return ""
    found = spread(ratios)
    return f"{found.median:.2f}{' (noisy)' if found.noisy else ''}"


def _title(metric: str, seq: int) -> str:
    size = "" if metric in _SAME_AT_ALL_LENGTHS or not seq else f", {seq} tokens"
    return f"{_COLUMNS[metric]}{size}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
