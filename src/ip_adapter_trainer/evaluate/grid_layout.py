"""A sheet of pictures under headings, drawn with Pillow alone."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

CELL_PX = (160, 512)  # smallest and largest longer side of a cell
INK, FADED, FAINT, PAPER = (34, 34, 34), (110, 110, 110), (214, 214, 214), (255, 255, 255)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class GridLayout:
    """The places of a grid's cells and captions, in pixels."""

    cell_width_px: int
    row_heights_px: tuple[int, ...]  # of the pictures alone, in one block
    columns: int
    has_captions: bool
    blocks: int = 1  # side by side, each with all columns

    @property
    def unit_px(self) -> int:
        """Height of the letters, and the measure of every gap."""
        return max(13, self.cell_width_px // 14)

    @property
    def caption_px(self) -> int:
        """Height of the line above each row."""
        return 2 * self.unit_px if self.has_captions else 0

    @property
    def _block_px(self) -> int:
        """Width of a block and of the gap after it."""
        return self.columns * (self.cell_width_px + self.unit_px) + (self.unit_px if self.columns > 1 else 0)

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Return left and top of a cell; rows go on in the next block, and the first column stands a little apart."""
        block, row = divmod(row, len(self.row_heights_px))
        apart_px = (self.unit_px if column else 0) + 2 * self.unit_px * block
        left = self.unit_px + block * self._block_px + column * (self.cell_width_px + self.unit_px) + apart_px
        above_px = 2 * self.unit_px + (row + 1) * self.caption_px + row * self.unit_px
        return left, above_px + sum(self.row_heights_px[:row])

    @property
    def size_px(self) -> tuple[int, int]:
        """Width and height of the whole sheet."""
        width = self.unit_px + self.blocks * self._block_px + 2 * self.unit_px * (self.blocks - 1)
        rows = len(self.row_heights_px)
        return width, self.corner(rows - 1, 0)[1] + self.row_heights_px[-1] + self.unit_px


def draw_grid(
    headings: Sequence[str],
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[str],
    blocks: int = 1,
    cell_px: tuple[int, int] = CELL_PX,
) -> Image.Image:
    """Draw rows of RGB images as one image.

    The last image of a row decides how large the row's cells are, the others are fitted into as much.

    Args:
        headings: one for each column.
        rows: as many images in each as there are headings.
        captions: one for each row, over what was drawn with it: all but the first column; no room if all are empty.
        blocks: in which rows stand side by side, filled one after the other.
        cell_px: smallest and largest longer side of a cell.
    """
    shown = [[_fitted(image, *_cell_px(row[-1], cell_px)) for image in row] for row in rows]
    widest_px = max(image.width for row in shown for image in row)
    lines = math.ceil(len(rows) / blocks)
    heights_px = tuple(max(p.height for row in shown[line::lines] for p in row) for line in range(lines))
    grid = GridLayout(widest_px, heights_px, len(headings), any(captions), blocks)
    paper = Image.new("RGB", grid.size_px, PAPER)
    draw, font = ImageDraw.Draw(paper), ImageFont.load_default(grid.unit_px)
    for row, (images, caption) in enumerate(zip(shown, captions, strict=True)):
        for column, (image, heading) in enumerate(zip(images, headings, strict=True)):
            left, top = grid.corner(row, column)
            if row % lines == 0:
                above_px = grid.caption_px + 0.8 * grid.unit_px
                draw.text((left + widest_px / 2, top - above_px), heading, FADED, font, anchor="ms")
            left += (widest_px - image.width) // 2  # into the middle of its cell
            top += (heights_px[row % lines] - image.height) // 2
            frame = (left - 1, top - 1, left + image.width, top + image.height)
            draw.rectangle(frame, outline=FAINT)  # shows where a white picture ends
            paper.paste(image, (left, top))
        left, top = grid.corner(row, min(1, len(headings) - 1))
        quoted = f"“{' '.join(caption.split())}”" if caption else ""
        text = _shortened(quoted, font, grid.corner(row, len(headings))[0] - left - grid.unit_px)
        draw.text((left, top - 0.5 * grid.unit_px), text, INK, font, anchor="ls")
    return paper


def _cell_px(image: Image.Image, bounds_px: tuple[int, int]) -> tuple[int, int]:
    """The size at which a picture is shown: a whole multiple if it is tiny, reduced if it is huge."""
    least, most = bounds_px
    longer = max(image.size)
    factor = math.ceil(least / longer) if longer < least else min(1, most / longer)
    return round(image.width * factor), round(image.height * factor)


def _fitted(image: Image.Image, width_px: int, height_px: int) -> Image.Image:
    """The picture as large as it goes into a cell; a tiny one by a whole factor, pixel for pixel."""
    factor = min(width_px / image.width, height_px / image.height)
    tiny = max(image.size) < CELL_PX[0] and factor >= 1
    factor = int(factor) if tiny else factor
    method = Image.Resampling.NEAREST if tiny else Image.Resampling.LANCZOS
    return image.resize((round(image.width * factor), round(image.height * factor)), method)


def _shortened(text: str, font: Font, width_px: int) -> str:
    """Return the text if it fits, else as much of its beginning as does.

    No more letters than pixels are measured: of a caption of 64 kB each measurement takes a tenth of a second.
    """
    beginning = text[:width_px]
    if text == beginning and font.getlength(text) <= width_px:
        return text
    lengths = range(1, len(beginning) + 1)
    kept = bisect_right(lengths, float(width_px), key=lambda length: font.getlength(beginning[:length] + "…"))
    return beginning[:kept].rstrip() + "…"
