"""Draw the rooms of paca (the folders of `src/paca`) and which of them import which, for `docs/architecture.md`.

Run it as `python tools/draw_architecture.py` whenever a room or an arrow comes or goes; `tests/test_architecture.py`
says so. It reads the imports, types included, and writes the table in the page and the picture beside it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Arrows = dict[str, tuple[str, ...]]
"""Per room, the rooms that it imports from, by name."""

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "paca"
PAGE = ROOT / "docs" / "architecture.md"
PICTURE = ROOT / "docs" / "pictures" / "architecture.png"
BEGIN, END = "<!-- rooms:begin -->", "<!-- rooms:end -->"

ROOMS = {
    "bench": "methods side by side: time, memory, how far a budget reaches",
    "cli": "the program `paca`, one file per command; it parses, calls and prints",
    "columns": "what is trained: columns chosen, held in a weight, written, parked, sharded",
    "comparison": "the same run trained with several methods, and their results",
    "convert": "adapters for others, and from others: LoRA, merged, GGUF, PEFT's own PaCA",
    "data": "training data: read, recognized, shaped for TRL",
    "evaluation": "how good a model is, with and without its adapter",
    "functional": "the one autograd function of adapted layers, and one product per kind",
    "layers": "the adapted layers, one file per kind, above one base class",
    "lean": "blocks that keep less for the backward pass; the loss, and 16-bit products, made faster on CPUs",
    "messages": "paca's error, and the words that messages share",
    "planning": "memory and time of a training, before anything is loaded",
    "pretrained": "models, tokenizers, adapters, found and written: folders, hub, GGUF",
    "quantized": "quantized weights, one file per library",
    "training": "a run: its YAML (`training/config/`), folder (`training/folder/`) and reports (`training/reporting/`)",
    "tuner": "the method as PEFT knows it: adapters put in, saved, loaded, switched, rotated",
}
"""What each room is for. The table has those that exist."""

USED_BY_ALL = frozenset({"messages"})
"""Any room may import these, so the picture leaves the arrows to them out."""

CORE = frozenset({"columns", "functional", "layers", "messages", "quantized", "tuner"})
"""What runs when a model trains. The other rooms are around it."""


def arrows_in(source: Path) -> Arrows:
    """Read which rooms there are in `source`, and which import which. Files beside the rooms are none.

    Args:
        source: The folder of the package.
    """
    rooms = {path.name for path in source.iterdir() if (path / "__init__.py").is_file()}
    arrows: dict[str, set[str]] = {room: set() for room in sorted(rooms)}
    for room, found in arrows.items():
        for path in sorted((source / room).rglob("*.py")):
            names = (name.split(".") for name in _imports(path, source))
            found |= {name[1] for name in names if name[:1] == [source.name] and len(name) > 1}
    return {room: tuple(sorted(others & rooms - {room})) for room, others in arrows.items()}


def _imports(path: Path, source: Path) -> Iterator[str]:
    package = [source.name, *path.relative_to(source).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def levels_of(arrows: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """How high each room stands: 0 where it imports nothing, else one above the highest that it imports.

    Raises:
        ValueError: If rooms import each other, naming them.
    """
    levels: dict[str, int] = {}
    while len(levels) < len(arrows):
        ready = [room for room in arrows if room not in levels and all(other in levels for other in arrows[room])]
        if not ready:
            left = ", ".join(room for room in arrows if room not in levels)
            raise ValueError(
                f"Rooms import each other in a circle, among {left}. Dependencies point one way: move what both need "
                "into a room below them."
            )
        levels |= {room: max((levels[other] + 1 for other in arrows[room]), default=0) for room in ready}
    return levels


def direct(arrows: Mapping[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    """The arrows that the picture has: those that don't follow from others, and lead to no room that all may use.

    `cli` to `columns`, say, follows from `cli` to `tuner` to `columns`.
    """
    below: dict[str, set[str]] = {}
    for room in sorted(arrows, key=levels_of(arrows).__getitem__):
        below[room] = set(arrows[room]).union(*(below[other] for other in arrows[room]))
    return [
        (room, other)
        for room, others in arrows.items()
        for other in others
        if other not in USED_BY_ALL and not any(other in below[between] for between in others)
    ]


def table(arrows: Mapping[str, tuple[str, ...]]) -> str:
    """The rooms, lowest first, each with what it is for; Markdown. What it imports is the picture's.

    Raises:
        ValueError: For a room that `ROOMS` does not describe.
    """
    unknown = sorted(arrows.keys() - ROOMS.keys())
    if unknown:
        raise ValueError(f"Say in ROOMS (tools/draw_architecture.py) what the room {unknown[0]!r} is for.")
    levels = levels_of(arrows)
    lines = ["| room | what it is for |", "|---|---|"]
    for room in sorted(arrows, key=lambda room: (levels[room], room)):
        name = f"**`{room}`**" if room in CORE else f"`{room}`"
        lines.append(f"| {name} | {ROOMS[room]} |")
    return "\n".join(lines)


def table_in(page: str) -> str:
    """The table that stands in the page."""
    return page.partition(BEGIN)[2].partition(END)[0].strip()


def as_text(arrows: Mapping[str, tuple[str, ...]]) -> str:
    """All arrows in one line: what the picture says of itself in its file."""
    return "; ".join(f"{room} -> {' '.join(others)}" for room, others in sorted(arrows.items()))


def draw(arrows: Mapping[str, tuple[str, ...]], path: Path) -> None:
    """Draw the rooms in their levels, and the arrows that don't follow from others.

    Args:
        arrows: From `arrows_in`.
        path: Of the PNG file. Its `Description` is `as_text(arrows)`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    places = _places(arrows)
    width, height = max(x for x, _ in places.values()) + 2, max(y for _, y in places.values()) + 1
    figure, axes = pyplot.subplots(figsize=(1.15 * width, 0.95 * height))
    axes.set(xlim=(-1, width - 1), ylim=(-0.5, height - 0.5))
    axes.axis("off")
    for room, other in direct(arrows):
        (x, y), (to_x, to_y) = places[room], places[other]
        axes.annotate(
            "",
            xy=(to_x, to_y + 0.22),
            xytext=(x, y - 0.22),
            arrowprops={
                "arrowstyle": "-|>",
                "color": "#12908a" if {room, other} <= CORE else "#b5bac2",
                "shrinkA": 0,
                "shrinkB": 0,
                # Round the rooms of the levels between, on the side that it comes from.
                "connectionstyle": f"arc3,rad={0 if y - to_y < 2 else -0.3 if x > to_x else 0.3}",
            },
        )
    for room, (x, y) in places.items():
        core = room in CORE
        axes.text(
            x,
            y,
            room,
            ha="center",
            va="center",
            fontsize=11,
            color="white" if core else "#2b2f36",
            bbox={
                "boxstyle": "round,pad=0.45",
                "facecolor": "#12908a" if core else "#f1f3f5",
                "edgecolor": "#0b7a75" if core else "#8a8f98",
            },
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"Software": None, "Description": as_text(arrows)}
    figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white", metadata=about)
    pyplot.close(figure)


def _places(arrows: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[float, float]]:
    """Across and up, for each room: right below those that import it, and across so that arrows cross little."""
    levels, drawn = levels_of(arrows), direct(arrows)
    for room in sorted(arrows, key=levels.__getitem__, reverse=True):
        above = [levels[other] for other in arrows if room in arrows[other]]
        levels[room] = min(above) - 1 if above else max(levels.values())
    rows = [sorted(room for room in arrows if levels[room] == level) for level in range(max(levels.values()) + 1)]
    widest = max(map(len, rows))
    places: dict[str, tuple[float, float]] = {}

    def place(row: list[str]) -> None:
        for number, room in enumerate(row):
            places[room] = ((number - (len(row) - 1) / 2) * 2 + widest - 1, float(levels[room]))

    for row in rows:
        place(row)
    for _ in range(8):  # each room to the middle of its neighbours, again and again
        for row in rows:
            middles = {}
            for room in row:
                near = [places[b if a == room else a][0] for a, b in drawn if room in (a, b)]
                middles[room] = sum(near) / len(near) if near else places[room][0]
            row.sort(key=lambda room: (middles[room], room))
            place(row)
    return places


def main() -> None:
    """Write the page's table and the picture anew."""
    arrows = arrows_in(SOURCE)
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table(arrows)}\n{END}{after}", encoding="utf-8")
    draw(arrows, PICTURE)
    print(
        f"{PAGE.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)}: {len(arrows)} rooms, {len(direct(arrows))} arrows"
    )


if __name__ == "__main__":
    main()
