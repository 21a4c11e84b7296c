"""The local page of `paca runs`, made with Gradio: a tab with the curves, and one for answers side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from paca.training.reporting.answers import BASE, SideBySide

_FRAME = "width: 100%; height: calc(100vh - 5rem); border: 0"
_MOST_TOKENS = 4096


def page_of(sides: SideBySide, curves: str) -> Any:
    """The page, as a `gradio.Blocks`.

    Args:
        sides: What answers.
        curves: The address of the page with the curves, as seen from this one.
    """
    with gr.Blocks(title="paca runs", analytics_enabled=False, fill_width=True) as page:
        with gr.Tab("Curves"):
            gr.HTML(f'<iframe title="Curves" src="{curves}" style="{_FRAME}"></iframe>', padding=False)
        with gr.Tab("Answers"):
            with gr.Row():
                chosen = [gr.Dropdown(label=side, interactive=True) for side in ("Left", "Right")]
            with gr.Row():
                prompt = gr.Textbox(label="Prompt", lines=3, placeholder="Shift+Enter sends it.", scale=8)
                with gr.Column(min_width=100):
                    ask, stop = gr.Button("Ask", variant="primary"), gr.Button("Stop")
            shown = []
            with gr.Row():
                for side in ("Left", "Right"):
                    with gr.Column():
                        box = gr.Textbox(
                            label=f"{side} answer", lines=12, max_lines=30, buttons=["copy"], elem_id=f"{side}-answer"
                        )
                        shown.append(box)
                        shown.append(gr.Textbox(label=f"{side} note", max_lines=6))
            with gr.Accordion("Settings", open=False):
                system = gr.Textbox(label="System message", placeholder="When empty, that of a run's training data.")
                without = gr.Checkbox(label="No system message, although the training data began with one")
                length = gr.Slider(1, _MOST_TOKENS, 256, step=1, label="Longest answer, in tokens")
                temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature: 0 takes the likeliest token each time")

        def answers(
            left: str, right: str, prompt: str, system: str, without: bool, length: int, temperature: float
        ) -> Iterator[tuple[str, ...]]:
            said = "" if without else system or None
            for one, other in sides.answers(
                left, right, prompt, system=said, max_new_tokens=int(length), temperature=temperature
            ):
                yield *one, *other

        given = [*chosen, prompt, system, without, length, temperature]
        gr.on([ask.click, prompt.submit], answers, given, shown, show_progress="hidden", api_visibility="private")
        stop.click(sides.stop, queue=False, api_visibility="private")
        page.load(lambda: _dropdowns(sides), outputs=chosen, show_progress="hidden", api_visibility="private")
    return page


def _dropdowns(sides: SideBySide) -> list[Any]:
    """Both lists with what is there now; chosen are the newest run that can answer, and its base model."""
    found = sides.choices()
    choices = [*found, (f"({BASE})", BASE)]
    return [gr.Dropdown(choices=choices, value=found[0][1] if found else None), gr.Dropdown(choices, value=BASE)]
