"""A sheet of pictures under headings, drawn with Pillow alone."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

CELL_PX = (160, 512)  # smallest and largest longer side of a cell
INK, FAINT, PAPER = (34, 34, 34), (214, 214, 214), (255, 255, 255)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Sheet:
    """Where things stand on a sheet, in pixels."""

    cell_width_px: int
    row_heights_px: tuple[int, ...]  # of the pictures alone
    columns: int
    has_captions: bool

    @property
    def unit_px(self) -> int:
        """Height of the letters, and the measure of every gap."""
        return max(13, self.cell_width_px // 14)

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Left and top of a cell; the first column stands a little apart."""
        below_px = (3 if self.has_captions else 1) * self.unit_px
        left = self.unit_px + column * (self.cell_width_px + self.unit_px) + (self.unit_px if column else 0)
        return left, 3 * self.unit_px + sum(self.row_heights_px[:row]) + row * below_px

    @property
    def size_px(self) -> tuple[int, int]:
        """Width and height of the whole sheet."""
        return self.corner(0, self.columns)[0], self.corner(len(self.row_heights_px), 0)[1]


def lay_out(headings: Sequence[str], rows: Sequence[Sequence[Image.Image]], captions: Sequence[str]) -> Image.Image:
    """Rows of RGB pictures as one picture.

    The last picture of a row decides how large the row's cells are, the others are fitted into as much.

    Args:
        headings: one for each column.
        rows: as many pictures in each as there are headings.
        captions: one for each row; there is no room for any if all are empty.
    """
    shown = [[_fitted(picture, _cell_px(row[-1])) for picture in row] for row in rows]
    widest_px = max(picture.width for row in shown for picture in row)
    heights_px = tuple(max(picture.height for picture in row) for row in shown)
    sheet = Sheet(widest_px, heights_px, len(headings), any(captions))
    paper = Image.new("RGB", sheet.size_px, PAPER)
    draw, font = ImageDraw.Draw(paper), ImageFont.load_default(sheet.unit_px)
    for column, heading in enumerate(headings):
        left, top = sheet.corner(0, column)
        draw.text((left + widest_px / 2, top - 0.8 * sheet.unit_px), heading, INK, font, anchor="ms")
    for number, (row, caption) in enumerate(zip(shown, captions, strict=True)):
        for column, picture in enumerate(row):
            _place(paper, picture, sheet, number, column)
        left, top = sheet.corner(number, 0)
        text = _shortened(" ".join(caption.split()), font, paper.width - 2 * left)
        draw.text((left, top + heights_px[number] + 1.4 * sheet.unit_px), text, INK, font, anchor="ls")
    return paper


def _cell_px(picture: Image.Image) -> tuple[int, int]:
    """The size at which a picture is shown: a whole multiple if it is tiny, reduced if it is huge."""
    least, most = CELL_PX
    longer = max(picture.size)
    factor = math.ceil(least / longer) if longer < least else min(1, most / longer)
    return round(picture.width * factor), round(picture.height * factor)


def _fitted(picture: Image.Image, cell_px: tuple[int, int]) -> Image.Image:
    """The picture as large as it goes into a cell; a tiny one by a whole factor, pixel for pixel."""
    factor = min(cell_px[0] / picture.width, cell_px[1] / picture.height)
    tiny = max(picture.size) < CELL_PX[0] and factor >= 1
    factor = int(factor) if tiny else factor
    method = Image.Resampling.NEAREST if tiny else Image.Resampling.LANCZOS
    return picture.resize((round(picture.width * factor), round(picture.height * factor)), method)


def _place(paper: Image.Image, picture: Image.Image, sheet: Sheet, row: int, column: int) -> None:
    """Pastes a picture into the middle of its cell, in a thin frame that shows where a white one ends."""
    left, top = sheet.corner(row, column)
    left += (sheet.cell_width_px - picture.width) // 2
    top += (sheet.row_heights_px[row] - picture.height) // 2
    frame = (left - 1, top - 1, left + picture.width, top + picture.height)
    ImageDraw.Draw(paper).rectangle(frame, outline=FAINT)
    paper.paste(picture, (left, top))


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
