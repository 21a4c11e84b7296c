"""The picture of docs/method.md shows what the code does."""

from __future__ import annotations

from PIL import Image
from tools.draw_method import PICTURE, facts


def test_it_was_drawn_from_what_the_code_does() -> None:
    with Image.open(PICTURE) as picture:
        assert picture.info["Description"] == facts().as_text(), "run: python tools/draw_method.py"
