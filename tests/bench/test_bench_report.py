"""Tables, pictures and the README's block, from rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.row_maker import frame, row
from paca.bench.plots import write_plots
from paca.bench.report import replace_block, summary_tables, tables
from paca.messages.errors import PacaError

FROZEN, PACA, LORA = (1.0, 1.1, 1.2), (1.02, 1.1, 1.26), (1.5, 1.65, 1.8)


def rows() -> list:
    found = [
        row(FROZEN, method="frozen", baseline="frozen"),
        row(PACA, FROZEN, method="paca", baseline="frozen"),
        row(LORA, FROZEN, method="lora", baseline="frozen"),
        row((), method="qpaca", metric="method", status="unavailable", note="not built yet", batch=0, seq=0),
        row((), method="full", status="failed", note="out of memory"),
        row((5000.0,), metric="longest_sequence", seq=0, budget=2**29, baseline="lora"),
        row((2000.0,), metric="longest_sequence", seq=0, budget=2**29, baseline="lora", method="lora"),
    ]
    for phase, seconds in (("forward", 0.3), ("backward", 0.7)):
        found.append(row((seconds,), metric=f"phase: {phase}"))
    return found


def test_a_table_shows_medians_spread_and_ratios() -> None:
    text = tables(frame(rows()), ["frozen", "lora"])
    line = next(line for line in text.splitlines() if line.startswith("| `paca` | 1,000 | 1100.0"))
    assert line.split(" | ")[2:5] == ["1100.0 (1060.0–1180.0)", "1.020 (1.010–1.035)", "0.680 (0.673–0.690) |"]
    assert "- `qpaca` was not available: not built yet" in text
    assert "- `full`: step time: out of memory" in text
    assert "**Within 512.00 MiB, batch 1**" in text
    assert "| `paca` | 1,000 | 5,000 |  | 2.500 |" in text
    assert "| forward | 300.00 (30.0%) |" in text


def test_of_equal_measurements_the_last_counts_and_ratios_stay_within_one_run() -> None:
    newer = row((2.0, 2.0, 2.0), method="paca", run="later")
    text = tables(frame([*rows(), newer]), ["frozen"])
    line = next(line for line in text.splitlines() if line.startswith("| `paca` | 1,000 | 2000.0"))
    assert line == "| `paca` | 1,000 | 2000.0 (2000.0–2000.0) |  |"
    assert "1100.0 (1060.0–1180.0)" not in text.split("`paca`")[1]


def test_a_later_run_of_the_baseline_takes_no_ratio_away() -> None:
    text = tables(frame([*rows(), row((2.0, 2.0, 2.0), method="frozen", run="later")]), ["frozen"])
    line = next(line for line in text.splitlines() if line.startswith("| `paca` | 1,000 | 1100.0"))
    assert line.endswith("| 1.020 (1.010–1.035) |")


def test_a_ratio_that_varies_widely_is_called_noisy() -> None:
    wild = row((0.92, 0.9, 2.2), FROZEN, method="paca", baseline="frozen")
    text = tables(frame([*rows(), wild]), ["frozen"])
    assert next(line for line in text.splitlines() if line.startswith("| `paca` | 1,000 | 920")).endswith(" noisy |")
    assert text.count("- noisy: the middle half of the rounds") == 1
    assert "noisy" not in tables(frame(rows()), ["frozen"])
    assert "0.92 (noisy)" in summary_tables(frame([*rows(), wild]), ["frozen"])


def test_the_summary_has_a_column_per_quantity_with_the_ratio_to_each_baseline() -> None:
    lines = summary_tables(frame(row for row in rows() if row["budget"] == 0), ["frozen", "lora"]).splitlines()
    assert lines[0].endswith(" (× `frozen` / × `lora`)")
    assert lines[2] == "|  | step time, 512 tokens |"
    assert "| `paca` | 1.02 / 0.68 |" in lines


def test_other_settings_get_a_table_of_their_own() -> None:
    text = tables(frame([*rows(), row(dtype="float32", method="frozen")]))
    assert text.count("### llama3-8b blocks, 4 layers of width 1024") == 2


@pytest.mark.slow(reason="starts the program anew")
def test_pictures_are_drawn_for_ratios_and_lengths(tmp_path: Path) -> None:
    lengths = [
        row((1000.0 / seq,), metric="throughput", seq=seq, method=method)
        for seq in (128, 512)
        for method in ("paca", "lora")
    ]
    written = write_plots(frame([*rows(), *lengths]), tmp_path / "plots", "cpu")
    assert [path.name for path in written] == ["cpu.png", "cpu-throughput.png"]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000
    assert write_plots(frame([row((), method="qpaca", metric="method")]), tmp_path, "none") == []


def test_the_readme_keeps_everything_outside_its_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nrest\n")
    replace_block(readme, "new table\n")
    expected = "# Title\n<!-- bench:begin -->\nnew table\n<!-- bench:end -->\nrest\n"
    assert readme.read_text() == expected
    replace_block(readme, "new table")
    assert readme.read_text() == expected
    for text in ("none", "<!-- bench:end -->\n<!-- bench:begin -->", "<!-- bench:begin -->\n" * 2):
        readme.write_text(text)
        with pytest.raises(PacaError, match="needs one line"):
            replace_block(readme, "x")
        assert readme.read_text() == text
    with pytest.raises(PacaError, match="no file"):
        replace_block(tmp_path / "missing.md", "x")
