"""docs/dev/rooms.svg and docs/dev/rooms.md: the packages and loose modules of esm_neuron, drawn from their imports.

Everything is read from the code by `ast`: which rooms there are, what is in them, which room imports which. A room is a
package, or a module that lies beside the packages. It stands one floor above the highest room that it imports.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "esm_neuron"
BOX, STOP, GAP, FLOOR, LINE, TOP = 232, 10, 32, 56, 15, 48
"""Pixels: width of a box, of an arrow passing a floor; between both, between floors; per line of text, per name."""
STYLE = """
text { font-family: ui-sans-serif, "Helvetica Neue", Arial, sans-serif; fill: #1f2937; }
.room { fill: #eef2ff; stroke: #4f46e5; } .loose { fill: #fff7ed; stroke: #c2410c; }
.name { font-size: 15px; font-weight: 600; } .module { font-size: 12px; }
path { fill: none; stroke: #6b7280; stroke-width: 1.3; } marker path { fill: #6b7280; stroke: none; }
"""


@dataclass(frozen=True)
class Rooms:
    """What is in each room, and which rooms it imports."""

    modules: Mapping[str, Mapping[str, str]]
    """Room -> its modules (a loose module is its own) -> the first line of their docstrings."""
    imports: Mapping[str, frozenset[str]]
    """Room -> the rooms that it imports."""

    @cached_property
    def below(self) -> dict[str, frozenset[str]]:
        """Room -> all rooms that it needs, by whatever way. Raises RecursionError if rooms import each other."""

        def needs(room: str) -> frozenset[str]:
            return frozenset().union(*({one} | needs(one) for one in self.imports[room]))

        return {room: needs(room) for room in self.modules}

    @cached_property
    def arrows(self) -> list[tuple[str, str]]:
        """The imports that no longer way implies: a picture of all of them could not be read."""
        return [
            (room, to)
            for room in sorted(self.modules)
            for to in sorted(self.imports[room])
            if not any(to in self.below[other] for other in self.imports[room])
        ]

    @cached_property
    def height(self) -> dict[str, int]:
        """Room -> its floor: one above the highest room that it imports."""
        height: dict[str, int] = {}
        for room in sorted(self.modules, key=lambda room: len(self.below[room])):
            height[room] = 1 + max((height[one] for one in self.imports[room]), default=-1)
        return height

    @cached_property
    def ways(self) -> list[list[str]]:
        """Each arrow as the stops on its way down: a room, `from>to` on each floor that it passes, a room."""
        return [[one, *[f"{one}>{to}"] * (self.height[one] - self.height[to] - 1), to] for one, to in self.arrows]

    @cached_property
    def floors(self) -> list[list[str]]:
        """Rooms and stops by floor, from the top, in an order in which few arrows cross."""
        top = max(self.height.values())
        found: list[dict[str, None]] = [{} for _ in range(top + 1)]
        for room in sorted(self.modules):
            found[top - self.height[room]][room] = None
        for way in self.ways:
            for number, stop in enumerate(way):
                found[top - self.height[way[0]] + number][stop] = None
        floors = [list(floor) for floor in found]
        for sweep in range(8):  # down and up in turn: every stop goes where its neighbours on the floor before are
            down = sweep % 2 == 0
            for level in range(1, top + 1) if down else range(top - 1, -1, -1):
                before = floors[level - 1 if down else level + 1]
                floors[level] = self._by_neighbours(floors[level], before, down)
        return floors

    def _by_neighbours(self, floor: list[str], before: list[str], down: bool) -> list[str]:
        """Return a floor in the order of the mean places of what its stops are joined to on a neighbouring floor."""
        place = {stop: (number + 0.5) / len(before) for number, stop in enumerate(before)}
        own = {stop: (number + 0.5) / len(floor) for number, stop in enumerate(floor)}
        joined: dict[str, list[float]] = {stop: [] for stop in floor}
        for way in self.ways:
            for upper, lower in pairwise(way):
                stop, other = (lower, upper) if down else (upper, lower)
                if stop in joined and other in place:
                    joined[stop].append(place[other])
        return sorted(floor, key=lambda stop: sum(joined[stop]) / len(joined[stop]) if joined[stop] else own[stop])


def read(root: Path = ROOT) -> Rooms:
    """Read the rooms of the package below `root`."""
    trees = {
        file.relative_to(root).with_suffix("").parts: ast.parse(file.read_text(encoding="utf-8"))
        for file in sorted((root / PACKAGE).rglob("*.py"))
    }
    names = {parts[1] for parts in trees} - {"__init__"}
    modules: dict[str, dict[str, str]] = {name: {} for name in sorted(names)}
    imports: dict[str, set[str]] = {name: set() for name in names}
    for (_, room, *rest), tree in trees.items():
        if room not in names:
            continue
        if rest != ["__init__"]:
            modules[room][".".join(rest) or room] = (ast.get_docstring(tree) or "").split("\n")[0]
        imports[room] |= {to for to in imported(tree) if to in names and to != room}
    return Rooms(modules, {room: frozenset(to) for room, to in imports.items()})


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the names below the package that a module imports, but for those that only types need."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[1] for name in node.names if name.name.startswith(f"{PACKAGE}."))
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
            yield str(node.module).split(".")[1]
        else:
            yield from imported(node)


def is_loose(rooms: Rooms, room: str) -> bool:
    return list(rooms.modules[room]) == [room]


def picture(rooms: Rooms) -> str:
    """Return the picture as SVG: a box per room, floor by floor, and the arrows between them."""
    text = {room: [] if is_loose(rooms, room) else wrapped(rooms.modules[room]) for room in rooms.modules}
    tall = {room: TOP + LINE * len(lines) - (0 if lines else 8) for room, lines in text.items()}
    widths = [sum(BOX if stop in tall else STOP for stop in floor) + GAP * (len(floor) - 1) for floor in rooms.floors]
    width, y = max(widths) + 2 * GAP, float(GAP)
    spots: dict[tuple[int, str], Spot] = {}  # of each stop on each floor
    for level, (floor, own) in enumerate(zip(rooms.floors, widths, strict=True)):
        x = (width - own) / 2
        deep = max(tall.get(stop, 0) for stop in floor)
        for stop in floor:
            wide = BOX if stop in tall else STOP
            spots[level, stop] = Spot(x + wide / 2, y, y + tall.get(stop, deep), y + deep)
            x += wide + GAP
        y += deep + FLOOR
    parts = []
    for way in rooms.ways:
        first = len(rooms.floors) - 1 - rooms.height[way[0]]
        parts.append(arrow([spots[first + number, stop] for number, stop in enumerate(way)]))
    for (_, room), spot in spots.items():
        if room in tall:
            parts += box(room, is_loose(rooms, room), spot.x - BOX / 2, spot.top, tall[room], text[room])
    y += GAP - FLOOR
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {y:g}" width="{width:g}" height="{y:g}">'
    tip = (
        '<defs><marker id="tip" markerWidth="9" markerHeight="9" refX="8" refY="4" orient="auto">'
        '<path d="M0,0 L9,4 L0,8 z"/></marker></defs>'
    )
    back = f'<rect width="{width:g}" height="{y:g}" fill="white"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", tip, back, *parts, "</svg>", ""])


def box(room: str, loose: bool, x: float, top: float, tall: float, lines: list[str]) -> list[str]:
    """Return a room: its frame, its name, the modules in it."""
    frame = f'<rect class="{"loose" if loose else "room"}" x="{x:g}" y="{top:g}" width="{BOX}" height="{tall}" rx="6"/>'
    name = f'<text class="name" x="{x + 12:g}" y="{top + 25:g}">{escape(room)}{".py" if loose else "/"}</text>'
    places = (top + 46 + number * LINE for number in range(len(lines)))
    modules = [
        f'<text class="module" x="{x + 12:g}" y="{at:g}">{escape(line)}</text>'
        for at, line in zip(places, lines, strict=True)
    ]
    return [frame, name, *modules]


class Spot(NamedTuple):
    """Where an arrow meets a floor."""

    x: float
    top: float
    """Upper edge of the box, or of the floor where the arrow only passes it."""
    low: float
    """Lower edge of the same."""
    floor: float
    """Lower edge of the floor's tallest box."""


def arrow(spots: Sequence[Spot]) -> str:
    """Return a curve from the lower edge of the first box, past the stops between, to the upper edge of the last."""
    steps = [f"M{spots[0].x:g},{spots[0].low:g} V{spots[0].floor:g}"]
    for one, to in pairwise(spots):
        last = to is spots[-1]
        end = to.top - 2 if last else to.top
        half = (end - one.floor) / 2
        steps.append(f"C{one.x:g},{one.floor + half:g} {to.x:g},{end - half:g} {to.x:g},{end:g}")
        if not last:
            steps.append(f"V{to.floor:g}")
    return f'<path marker-end="url(#tip)" d="{" ".join(steps)}"/>'


def wrapped(modules: Mapping[str, str]) -> list[str]:
    """Return the names of modules in lines that fit a box."""
    return textwrap.wrap(", ".join(modules), 34, break_long_words=False)


def page(rooms: Rooms) -> str:
    """Return the page: each room with its modules and what it imports."""
    lines = [
        "# Rooms",
        "Made by `make pages` from the code: the first line of each module's docstring, floor by floor from the top.",
        "`make lint` fails when this page or the picture is not current.",
        "",
        "![The rooms of esm_neuron and the imports between them](rooms.svg)",
    ]
    for room in (stop for floor in rooms.floors for stop in floor if stop in rooms.modules):
        loose = is_loose(rooms, room)
        to = ", ".join(f"`{one}`" for one in sorted(rooms.imports[room])) or "nothing of this package"
        lines += ["", f"## {room}{'.py' if loose else ''}", f"Imports {to}."]
        if not loose:
            lines += ["", "| module | what it does |", "|---|---|"]
        for module, about in rooms.modules[room].items():
            shown = about.replace("|", "\\|")
            lines += ["", shown] if loose else [f"| `{module}` | {shown} |"]
    return "\n".join([*lines, ""])
