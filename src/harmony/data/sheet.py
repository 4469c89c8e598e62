"""A sheet of images with their captions, to see at a glance what a source holds."""

import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from harmony.errors import UserError

SIDE = 168
"""Pixels of the longer side of an image on the sheet."""

_COLUMNS = 6
_MARGIN = 12
_LINES, _LINE_HEIGHT, _LETTERS = 4, 14, 27


@dataclass(frozen=True)
class Picture:
    """One image of the sheet: pixels (3, H, W) uint8 of at most SIDE px, and the words below it."""

    pixels: Tensor
    words: str


def thumbnail(pixels: Tensor) -> Tensor:
    """An image (3, H, W) uint8 brought to the size it has on the sheet."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    scale = SIDE / max(image.size)
    # ImageOps.contain would round the short side of a very thin image to no pixel at all.
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*image.size[::-1], 3).permute(2, 0, 1)


def draw_sheet(pictures: Sequence[Picture], path: Path) -> None:
    """Draw the pictures and the words below them into a PNG file.

    Raises:
        UserError: the file cannot be written, as when its folder is not there.
    """
    check_place(path)
    width, height = SIDE + _MARGIN, SIDE + _LINES * _LINE_HEIGHT + 2 * _MARGIN
    rows = max(1, -(-len(pictures) // _COLUMNS))
    sheet = Image.new("RGB", (_COLUMNS * width + _MARGIN, rows * height + _MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for place, picture in enumerate(pictures):
        left, top = _MARGIN + place % _COLUMNS * width, _MARGIN + place // _COLUMNS * height
        image = Image.fromarray(picture.pixels.permute(1, 2, 0).contiguous().numpy())
        sheet.paste(image, (left + (SIDE - image.width) // 2, top + (SIDE - image.height) // 2))
        lines = textwrap.wrap(picture.words, _LETTERS, max_lines=_LINES, placeholder=" ...")
        for number, line in enumerate(lines):
            pen.text((left, top + SIDE + 4 + number * _LINE_HEIGHT), line, "black", font)
    _save(sheet, path)


def check_place(path: Path) -> None:
    """Raise UserError when a sheet could not be written to `path`: before the look, which may take minutes."""
    if not path.parent.is_dir():
        raise UserError(f"the sheet cannot be written to {path}: there is no folder {path.parent}; name another file")
    if path.is_dir():
        raise UserError(f"the sheet cannot be written to {path}, which is a folder; name a file in it")


def _save(sheet: Image.Image, path: Path) -> None:
    """Write aside and rename: the old sheet stays until the new one is whole."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".sheet-", suffix=".png", delete=False) as file:
            sheet.save(file, format="PNG")
        Path(file.name).chmod(0o644)
        Path(file.name).replace(path)
    except OSError as error:
        raise UserError(f"the sheet cannot be written to {path} ({error.strerror}); name another file") from error
