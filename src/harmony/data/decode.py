"""From an encoded image to pixels, whatever its mode, and a clear reason when it cannot be done."""

from contextlib import suppress
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from harmony.data.sources.base import BadExample

MAX_PIXELS = 2**26
"""Pixels of the largest image that is decoded unless told otherwise: 67 million, below Pillow's own warning."""

LARGEST_LIMIT = 2 * 89_478_485
"""Pillow refuses larger images by itself, whatever limit is asked for."""

_ORIENTATION = 0x0112
_UPRIGHT = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = (5, 6, 7, 8)


def decode(image: bytes | Image.Image, max_pixels: int = MAX_PIXELS, key: str = "an image") -> Tensor:
    """Decode an image as RGB.

    Greyscale, palette, CMYK and 16-bit images are converted, transparency is laid on white, EXIF rotation is undone,
    and of an animation the first frame is taken.

    Args:
        image: an encoded file in any format that Pillow reads, or a picture.
        max_pixels: largest width times height; larger ones are refused by their header, before memory is taken.
        key: the example's name, for the error.

    Returns:
        (3, H, W) uint8, whose memory is in the order (H, W, 3).

    Raises:
        BadExample: it is no image, truncated, damaged, or larger than `max_pixels`.
    """
    return Opened(image, max_pixels, key).pixels()


class Opened:
    """An image of which the header alone has been read. Arguments and errors are those of `decode`.

    Attributes:
        size: the height and width that its pixels will have, as far as the header says.
    """

    def __init__(self, image: bytes | Image.Image, max_pixels: int = MAX_PIXELS, key: str = "an image") -> None:
        opened = _open(image, key) if isinstance(image, bytes) else image
        self._image: Image.Image | None = opened
        self._key = key
        width, height = opened.size
        if width * height > max_pixels:
            raise BadExample(key, f"is {width} x {height} px, more than the limit of {max_pixels} px (data.max_pixels)")
        # Pillow tells the size of a TIFF as it will be once it is upright.
        turned = opened.format != "TIFF" and _orientation(opened) in _ON_ITS_SIDE
        self.size = (width, height) if turned else (height, width)

    def pixels(self, reduction: int = 1) -> Tensor:
        """The pixels, (3, H, W) uint8 in the memory order (H, W, 3); to be asked for once.

        Args:
            reduction: 1, 2, 4 or 8. A JPEG is then decoded at so much less a side (rounded up), from the lower
                frequencies of its blocks, in less time; other images ignore it.
        """
        image, self._image = self._image, None  # Pillow's own pixels shall not outlive this call
        assert image is not None
        try:
            if reduction > 1:
                image.draft(None, (image.width // reduction, image.height // reduction))
            pixels = np.array(_rgb(_upright(image)))
        except MemoryError:
            raise
        except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, zlib.error, ...
            raise BadExample(self._key, _reason(error)) from error
        return torch.from_numpy(pixels).permute(2, 0, 1)


def _open(data: bytes, key: str) -> Image.Image:
    if not data:
        raise BadExample(key, "is empty (0 bytes)")
    try:
        return Image.open(BytesIO(data))
    except Image.DecompressionBombError as error:
        raise BadExample(key, f"is larger than {LARGEST_LIMIT} px, the most that can be decoded") from error
    except Image.UnidentifiedImageError as error:
        raise BadExample(key, f"is not an image ({_looks_like(data)})") from error
    except MemoryError:
        raise
    except Exception as error:
        raise BadExample(key, _reason(error)) from error


def _looks_like(data: bytes) -> str:
    start = data[:256].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return "a web page"
    return f"it begins with {data[:12]!r}"


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    cut_short = isinstance(error, EOFError) or any(sign in text.lower() for sign in ("truncated", "broken data stream"))
    return f"is truncated ({text})" if cut_short else f"is damaged ({text})"


def _orientation(image: Image.Image) -> int:
    with suppress(Exception):  # broken EXIF says nothing about the pixels; they are taken as they lie
        return int(image.getexif().get(_ORIENTATION, 1))
    return 1


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    method = _UPRIGHT.get(_orientation(image))
    return image if method is None else _with_info(image.transpose(method), image)


def _with_info(image: Image.Image, original: Image.Image) -> Image.Image:
    image.info = original.info
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        return _on_white(image)
    if image.mode in ("1", "L", "P", "RGB") and "transparency" in image.info:
        return _on_white(image)
    if image.mode.startswith("I"):
        return _eight_bits(image).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey values (also when Pillow hands them out as 32-bit integers), 0 .. 65535 to 0 .. 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise ValueError("its pixels are 32-bit numbers of unknown range")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def decoded_size(image: bytes | Image.Image) -> tuple[int, int] | None:
    """Width and height that `decode` gives an image, from its header alone; None when it is no image."""
    try:
        height, width = Opened(image, LARGEST_LIMIT).size
    except BadExample:  # whatever is wrong with it, decoding tells
        return None
    return width, height
