"""Draw the package's parts and their imports: `python -m tools.draw_house` writes `docs/house.svg`.

A part is a package or a module at the top of `ip_adapter_trainer`. Parts stand in rows by rank, high ranks on top, so
every import goes down. An arrow is left out where a chain of other arrows leads to the same part. The picture depends
on the imports, the ranks and the first lines of docstrings alone.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path

from tools.ranks import PACKAGE, RANKS, imports, unit

FILE = PACKAGE.parents[1] / "docs" / "house.svg"
HIDDEN = {"__init__", "__main__"}  # they import nothing, or `cli` alone
WIDTH, MARGIN, LABEL = 1000, 12, 26  # pixels; LABEL is the column of the rank numbers on the left
BOX, GAP, BEND = 180, 12, 16  # widths of a box, of the space between neighbours, and of an arrow that passes a row
TITLE, LINE, PAD, BETWEEN = 20, 15, 8, 42  # heights: a box's title, a line of its text, its padding, the space below
FONT = 12
PACKAGE_FILL, MODULE_FILL = "#e6effb", "#fdf1dc"
STYLE = f"""
  text {{ font: {FONT}px -apple-system, "Segoe UI", Helvetica, Arial, "DejaVu Sans", sans-serif; fill: #3e4c59; }}
  .name {{ font-size: 15px; font-weight: 600; fill: #1f2933; }}
  .rank {{ fill: #9aa5b1; text-anchor: middle; }}
  .arrow {{ fill: none; stroke: #7b8794; stroke-width: 1.2; }}
"""


@dataclass(eq=False)
class Spot:
    """A place in a row: a part's box, or (without a name) a point at which an arrow passes the row."""

    rank: int
    name: str = ""
    lines: list[str] = field(default_factory=list)
    up: list[Spot] = field(default_factory=list)
    down: list[Spot] = field(default_factory=list)
    x: float = WIDTH / 2

    @property
    def width(self) -> int:
        """Width in pixels, with half of the space to each neighbour."""
        return (BOX if self.name else BEND) + GAP


def wrap(text: str) -> list[str]:
    """Cut a text into lines that fit a box, by the widths of letters in a wide sans-serif font."""
    narrow, wide = set("fijlrtI .,:;'`|()[]"), set("mwMW@")
    lines, used = [""], 0.0
    for word in text.split():
        width = FONT * sum(0.35 if c in narrow else 0.9 if c in wide else 0.59 for c in f" {word}")
        if used and used + width > BOX - 2 * PAD:
            lines, used = [*lines, ""], 0.0
        lines[-1], used = f"{lines[-1]} {word}".strip(), used + width
    return lines


def first_line(file: Path) -> str:
    """Return the first line of a module's docstring, without its full stop and backquotes."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0].removesuffix(".").replace("`", "")


def parts() -> dict[str, tuple[str, set[str]]]:
    """Return, by name, each part's description and the other parts that it imports."""
    found: dict[str, tuple[str, set[str]]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        name = unit(file)
        if name in HIDDEN:
            continue
        text, uses = found.get(name, ("", set()))
        if file in (PACKAGE / f"{name}.py", PACKAGE / name / "__init__.py"):
            text = first_line(file)
        found[name] = text, uses | {other for other in imports(file) if other != name}
    return found


def arrows(uses: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Return the imports that no chain of other imports implies, as pairs (importing part, imported part)."""

    def reached(name: str) -> set[str]:
        return uses[name].union(*map(reached, uses[name]))

    return [(a, b) for a in sorted(uses) for b in sorted(uses[a]) if not any(b in reached(c) for c in uses[a])]


def rows_of(found: dict[str, tuple[str, set[str]]], pairs: list[tuple[str, str]]) -> list[list[Spot]]:
    """Return the rows from the lowest rank up, with a spot in every row that an arrow passes."""
    ranks = sorted({RANKS[name] for name in found})
    boxes = {name: Spot(ranks.index(RANKS[name]), name, wrap(found[name][0])) for name in found}
    rows = [[box for box in boxes.values() if box.rank == rank] for rank in range(len(ranks))]
    for above, below in pairs:
        end = boxes[below]
        bends = [Spot(rank) for rank in range(boxes[above].rank - 1, end.rank, -1)]
        for upper, lower in pairwise([boxes[above], *bends, end]):
            upper.down.append(lower)
            lower.up.append(upper)
        for bend in bends:
            rows[bend.rank].append(bend)
    return rows


def crossings(rows: list[list[Spot]]) -> int:
    """Count the pairs of arrows that cross between neighbouring rows."""
    place = {spot: i for row in rows for i, spot in enumerate(row)}
    total = 0
    for row in rows:
        ends = [(place[spot], place[lower]) for spot in row for lower in spot.down]
        total += sum((a - c) * (b - d) < 0 for i, (a, b) in enumerate(ends) for c, d in ends[:i])
    return total


def order(rows: list[list[Spot]]) -> list[list[Spot]]:
    """Return the rows in an order with few crossings: by the mean place of neighbours, then by swaps that help."""
    best = rows = [list(row) for row in rows]
    for sweep in range(24):
        upward = sweep % 2 == 0
        place = {spot: i / len(row) for row in rows for i, spot in enumerate(row)}
        for row in rows if upward else reversed(rows):
            means = {}
            for spot in row:
                near = (spot.down if upward else spot.up) or [spot]
                means[spot] = sum(place[other] for other in near) / len(near)
            row.sort(key=means.__getitem__)
            place |= {spot: i / len(row) for i, spot in enumerate(row)}
        if crossings(rows) < crossings(best):
            best = [list(row) for row in rows]
    return swap(best)


def swap(rows: list[list[Spot]]) -> list[list[Spot]]:
    """Swap neighbours in a row as long as that takes crossings away."""
    fewest, again = crossings(rows), True
    while again:
        again = False
        for row in rows:
            for i in range(len(row) - 1):
                row[i], row[i + 1] = row[i + 1], row[i]
                now = crossings(rows)
                if now < fewest:
                    fewest, again = now, True
                else:
                    row[i], row[i + 1] = row[i + 1], row[i]
    return rows


def spread(row: list[Spot], wanted: list[tuple[float, float]]) -> None:
    """Place a row's spots as near to the wanted (middle, weight) as their widths allow, by least squares.

    Taking the widths of the spots before it from each position leaves a sequence that must not fall: neighbours that
    break this share their mean.
    """
    starts = [sum(spot.width for spot in row[:i]) + row[i].width / 2 for i in range(len(row))]
    blocks: list[tuple[float, float, int]] = []  # (mean, weight, number of spots)
    for (x, weight), start in zip(wanted, starts, strict=True):
        mean, count = x - start, 1
        while blocks and blocks[-1][0] >= mean:
            other, more, spots = blocks.pop()
            mean, weight, count = (mean * weight + other * more) / (weight + more), weight + more, count + spots
        blocks.append((mean, weight, count))
    low, high = LABEL + MARGIN, WIDTH - MARGIN - sum(spot.width for spot in row)
    shifts = [min(max(mean, low), high) for mean, _, count in blocks for _ in range(count)]
    for spot, shift, start in zip(row, shifts, starts, strict=True):
        spot.x = shift + start


def place(rows: list[list[Spot]]) -> None:
    """Set every spot's x: near to the mean of its neighbours, where an arrow that passes rows pulls itself straight."""
    for row in rows:
        spread(row, [(LABEL + (WIDTH - LABEL) * (i + 0.5) / len(row), 1.0) for i in range(len(row))])
    for sweep in range(200):
        for row in rows if sweep % 2 else reversed(rows):
            wanted = []
            for spot in row:
                near = spot.up + spot.down or [spot]
                pulls = [(1.0, 2.0, 16.0)[(not spot.name) + (not other.name)] for other in near]
                mean = sum(pull * other.x for pull, other in zip(pulls, near, strict=True)) / sum(pulls)
                wanted.append((mean, sum(pulls)))
            spread(row, wanted)


def path(points: list[tuple[float, float]]) -> str:
    """Return an arrow through points from top to bottom: straight down past a row, curved between rows."""
    text = f"M{points[0][0]:.0f} {points[0][1]:.0f}"
    for i, ((x, y), (to_x, to_y)) in enumerate(pairwise(points)):
        middle = (y + to_y) / 2
        text += f" V{to_y:.0f}" if i % 2 else f" C{x:.0f} {middle:.0f} {to_x:.0f} {middle:.0f} {to_x:.0f} {to_y:.0f}"
    return f'<path class="arrow" marker-end="url(#head)" d="{text}"/>'


def port(spot: Spot, other: Spot, side: list[Spot]) -> float:
    """Return the x at which the arrow between a box and another spot meets the box, side by side with its others."""
    place = sorted(side, key=lambda s: s.x).index(other)
    return spot.x + (place - (len(side) - 1) / 2) * min(18, (BOX - 24) / len(side))


def arrow_paths(rows: list[list[Spot]], tops: list[int], heights: list[int]) -> list[str]:
    """Return the arrows of all boxes; `tops` and `heights` are those of the rows."""
    drawn = []
    for spot in (spot for row in rows for spot in row if spot.name):
        for lower in spot.down:
            before, now = spot, lower
            points = [(port(spot, lower, spot.down), float(tops[spot.rank] + box_height(spot)))]
            while not now.name:
                points += [(now.x, float(tops[now.rank])), (now.x, float(tops[now.rank] + heights[now.rank]))]
                before, now = now, now.down[0]
            drawn.append(path([*points, (port(now, before, now.up), tops[now.rank] - 2.0)]))
    return drawn


def box_height(spot: Spot) -> int:
    """Return the height of a box in pixels."""
    return 2 * PAD + TITLE + LINE * len(spot.lines)


def box(spot: Spot, top: int) -> list[str]:
    """Return the elements of one box."""
    left, fill = round(spot.x - BOX / 2), PACKAGE_FILL if (PACKAGE / spot.name).is_dir() else MODULE_FILL
    shape = f'width="{BOX}" height="{box_height(spot)}" rx="6" fill="{fill}" stroke="#9fb3c8"'
    x, y = left + PAD, top + PAD + TITLE
    lines = [f'<text x="{x}" y="{y + LINE * i + 11}">{escape(line)}</text>' for i, line in enumerate(spot.lines)]
    name = f'<text class="name" x="{x}" y="{y - 6}">{spot.name}</text>'
    return [f'<rect x="{left}" y="{top}" {shape}/>', name, *lines]


def draw() -> str:
    """Return the picture as SVG text."""
    found = parts()
    rows = order(rows_of(found, arrows({name: uses for name, (_, uses) in found.items()})))
    place(rows)
    heights = [max(box_height(spot) for spot in row if spot.name) for row in rows]
    tops = [MARGIN + 30 + sum(h + BETWEEN for h in heights[rank + 1 :]) for rank in range(len(rows))]
    note = "Blue: packages; yellow: single modules; numbers: ranks. Imports go to lower ranks only. "
    note += "An arrow is left out where others lead to the same part."
    body = arrow_paths(rows, tops, heights)
    for row in rows:
        for spot in (spot for spot in row if spot.name):
            body += box(spot, tops[spot.rank])
        rank = next(RANKS[spot.name] for spot in row if spot.name)
        body.append(f'<text class="rank" x="{LABEL}" y="{tops[row[0].rank] + PAD + TITLE - 5}">{rank}</text>')
    height = tops[0] + heights[0] + MARGIN
    head = 'viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"'
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
        f"<style>{STYLE}</style>",
        f'<defs><marker id="head" {head}><path d="M0 0 L8 4 L0 8 z" fill="#7b8794"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LABEL + MARGIN}" y="{MARGIN + 12}">{note}</text>', *body, "</svg>", "",
    ])  # fmt: skip


if __name__ == "__main__":
    FILE.write_text(draw(), encoding="utf-8")
    print(FILE)
