"""report.html: one page without outside parts that shows how a run went."""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

from paca.messages.units import format_bytes, format_duration
from paca.training.reporting.curves import curve, loss_curves
from paca.training.reporting.data_preview import sample_section
from paca.training.reporting.scores import sample_table, score_lines

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --paper: #ffffff; --card: #f3f5f8; --line: #dbe0e8; --soft: #5b6675; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --paper: #12161c; --card: #1c222b; --line: #323b48; --soft: #9aa6b5; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
.sub { color: var(--soft); margin: .25rem 0 1.5rem; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .75rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.3rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .85rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .75rem; }
figure svg { display: block; height: auto; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: .75rem; margin-top: .75rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .4rem .75rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 500; color: var(--soft); white-space: nowrap; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.scroll th { white-space: normal; }
.scroll td { overflow-wrap: normal; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem; overflow-x: auto;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
"""


def write_report(path: Path, summary: dict[str, Any], rows: list[dict[str, Any]], config_text: str) -> None:
    """Write the report of a run.

    Args:
        path: The page.
        summary: The content of `summary.json`.
        rows: The rows of `metrics.jsonl`.
        config_text: The resolved config, as YAML.
    """
    unit = "nats per token" if summary["trainer"] == "sft" else None
    subtitle = f"{summary['model']['name']}, trained on {_cell(summary['data']['train'])}"
    body = f"""<div class="cards">{_cards(summary)}</div>
<h2>Loss</h2>
<figure>{loss_curves(_points(rows, "loss"), _points(rows, "eval_loss"), unit)}</figure>
<div class="curves">{_small_curves(rows, summary)}</div>
{sample_table(summary.get("scores"))}
{sample_section(summary["data"].get("sample"))}
<h2>Run</h2>
<div class="scroll"><table>{_table(summary)}</table></div>
<h2>Settings</h2>
<pre>{html.escape(config_text)}</pre>
"""
    path.write_text(whole_page(summary["name"], "paca run", subtitle, body), encoding="utf-8")


def whole_page(title: str, kind: str, subtitle: str, body: str) -> str:
    """An HTML page without outside parts.

    Args:
        title: Its heading, as text.
        kind: What kind of page it is, for its tab, as text.
        subtitle: Stands below the heading, as text.
        body: All else, as HTML.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}: {html.escape(kind)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<p class="sub">{html.escape(subtitle)}</p>
{body}</body>
</html>
"""


def _points(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _small_curves(rows: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    named = {"mean_token_accuracy": "share of tokens guessed right", "grad_norm": "gradient norm"}
    named |= {"learning_rate": "learning rate", "tokens_per_second": f"{summary['counts']} per second"}
    first = ["learning_rate", "grad_norm", "tokens_per_second"]
    others = (name.removeprefix("eval_") for name in summary["metrics"] if name not in first)
    figures = []
    for name in (*first, *dict.fromkeys(others)):
        train, held_out = _points(rows, name), _points(rows, f"eval_{name}")
        if train or held_out:
            picture = curve(train, named.get(name, name), held_out=held_out, from_zero=name in first)
            figures.append(f"<figure>{picture}</figure>")
    return "".join(figures)


def _cards(summary: dict[str, Any]) -> str:
    before, after = summary["eval_loss_before"], summary["eval_loss_after"]
    cards = []
    if after is not None:
        start = f"{before:.4f} → " if before is not None else ""
        cards.append((f"{start}{after:.4f}", "held-out loss before → after" if start else "held-out loss after"))
    if summary["trainer"] == "sft" and before is not None and after is not None and max(before, after) < 50:
        cards.append((f"{math.exp(before):,.2f} → {math.exp(after):,.2f}", "held-out perplexity"))
    cards += [(text, f"{name}, held-out data") for name, text in score_lines(summary.get("scores"))]
    cards += [
        (f"{summary['tokens_per_second']:,.0f}", f"{summary['counts']} per second"),
        (format_bytes(summary["peak_memory_bytes"]), f"peak memory ({summary['peak_memory_of']})"),
        (f"{summary['trainable_parameters']:,}", f"trained parameters ({summary['trainable_percent']:.3f} %)"),
        (
            format_duration(summary["seconds"]),
            f"for {summary['steps']:,} steps, {summary['tokens']:,} {summary['counts']}",
        ),
    ]
    return "".join(
        f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'
        for value, label in cards
    )


def _table(summary: dict[str, Any]) -> str:
    return "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(_cell(value))}</td></tr>"
        for name, value in _flat(summary)
        if name not in ("name", "config", "scores")
        and not name.startswith(("config.", "scores.", "metrics.", "data.sample."))
    )


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{name}.")
        else:
            pairs.append((prefix + name, value))
    return pairs


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
