from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from paca.training.reporting.curves import curve, loss_curves, smoothed, thin
from paca.training.reporting.report import write_report

VOID = {"meta"}


@pytest.fixture(autouse=True)
def bare_runs() -> None:
    """Here reports are drawn."""


class Balance(HTMLParser):
    """Collects tags, checks that they nest, and notes everything that would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.fetched += [
            value or "" for name, value in attributes if name == "src" or (name == "href" and tag != "use")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


SUMMARY = {
    "name": "<script>alert(1)</script>",
    "command": "paca train 'a & b.yaml'",
    "model": {"name": "org/<model>", "parameters": 1_000_000},
    "data": {"train": "a & b.jsonl", "eval": None},
    "trainable_parameters": 2048,
    "trainable_percent": 0.2048,
    "eval_loss_before": 2.9,
    "eval_loss_after": 2.4,
    "steps": 4,
    "tokens": 1000,
    "seconds": 65.0,
    "tokens_per_second": 20.0,
    "peak_memory_bytes": 3 * 2**30,
    "peak_memory_of": "resident set of the process",
    "trainer": "sft",
    "counts": "tokens",
    "metrics": {"learning_rate": 1e-3, "mean_token_accuracy": 0.5},
    "config": {"train": {"seed": 1}},
}
ROWS = [
    {"step": 0, "eval_loss": 2.9},
    {"step": 1, "loss": 2.9, "grad_norm": 1.0, "learning_rate": 1e-4, "tokens_per_second": 20},
    {"step": 2, "loss": 2.8, "grad_norm": 1.0, "learning_rate": 1e-4, "tokens_per_second": 20},
    {"step": 3, "loss": None, "grad_norm": None, "learning_rate": 1e-4, "tokens_per_second": 20},
    {"step": 4, "eval_loss": 2.4},
]


def page(tmp_path: Path, summary: dict[str, object], rows: list[dict[str, object]]) -> tuple[str, Balance]:
    path = tmp_path / "report.html"
    write_report(path, summary, rows, "data:\n  train: <b>.jsonl\n")
    text = path.read_text()
    balance = Balance()
    balance.feed(text)
    assert balance.open == []
    return text, balance


def test_the_page_is_whole_and_fetches_nothing(tmp_path: Path) -> None:
    text, balance = page(tmp_path, SUMMARY, ROWS)
    assert balance.counts["svg"] == 4  # loss, learning rate, gradient norm, tokens per second
    assert balance.fetched == []
    assert "url(http" not in text
    assert "@import" not in text


def test_all_text_of_the_user_is_escaped(tmp_path: Path) -> None:
    text, balance = page(tmp_path, SUMMARY, ROWS)
    assert "script" not in balance.counts
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "org/&lt;model&gt;" in text
    assert "a &amp; b.jsonl" in text
    assert "train: &lt;b&gt;.jsonl" in text


def test_numbers_of_the_summary_are_shown(tmp_path: Path) -> None:
    text, _ = page(tmp_path, SUMMARY, ROWS)
    for number in ("2.9000 → 2.4000", "18.17 → 11.02", "3.00 GiB", "2,048", "1:05"):
        assert number in text


@pytest.mark.parametrize("rows", [[], [{"step": 1, "loss": 2.0}], [{"step": 1, "loss": None}]])
def test_a_run_without_evaluation_or_with_few_rows_has_a_page(tmp_path: Path, rows: list[dict[str, object]]) -> None:
    summary = SUMMARY | {"eval_loss_before": None, "eval_loss_after": None}
    text, balance = page(tmp_path, summary, rows)
    assert balance.counts["svg"] == 1
    assert "held-out perplexity" not in text
    assert "before → after" not in text


def test_pictures_follow_the_theme_and_keep_their_ids_apart() -> None:
    points = [(step, 1.0 / step) for step in range(1, 50)]
    pictures = [loss_curves(points, points[::10]), curve(points, "learning rate"), curve(points, "gradient norm")]
    ids: list[str] = []
    for picture in pictures:
        root = ElementTree.fromstring(picture)  # well-formed
        ids += [
            element.attrib["id"] for element in root.iter() if "clip" in element.tag.lower() and "id" in element.attrib
        ]
        assert "currentColor" in picture
        assert not re.search(r"(fill|stroke): ?#(000000|ffffff)", picture)
    assert len(ids) == len(set(ids)) > 0


def test_long_curves_are_thinned_to_their_ends() -> None:
    points = [(float(step), 0.0) for step in range(10_001)]
    kept = thin(points)
    assert len(kept) <= 802
    assert (kept[0], kept[-1]) == (points[0], points[-1])


def test_smoothing_is_a_running_mean() -> None:
    points = [(float(step), float(step)) for step in range(50)]  # a window of two
    assert smoothed(points)[0] == (0.0, 0.0)
    assert smoothed(points)[10] == (10.0, 9.5)
    assert smoothed(points[:5]) == points[:5]
