"""The images that results speak of, by their positions in the data they were measured on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from harmony.data.decode import MAX_PIXELS, decode
from harmony.data.sources import BadExample, Source, SourceOptions, open_source
from harmony.errors import UserError
from harmony.evaluation.crops import Crops, Read
from harmony.evaluation.report.pictures import data_uri


@dataclass(frozen=True)
class Images:
    """Images of one source.

    Attributes:
        source: None when it can no longer be opened.
        max_pixels: larger ones are not read.
    """

    source: Source | None
    max_pixels: int = MAX_PIXELS

    @classmethod
    def of(cls, uri: str, options: SourceOptions | None = None, max_pixels: int = MAX_PIXELS) -> "Images":
        """Those of the data that a URI names, wherever they still are."""
        try:
            return cls(open_source(uri, options), max_pixels)
        except UserError:
            return cls(None)

    def squares(self, positions: Sequence[int], side: int) -> dict[int, str]:
        """The central squares of those that can be read, as data URIs by position."""
        if self.source is None:
            return {}
        wanted = [place for place in positions if 0 <= place < len(self.source)]
        read = squares(self.source, wanted, side, self.max_pixels)
        crops = [] if read.pixels is None else list(read.pixels)
        return {index: data_uri(crop) for index, crop in zip(read.indices, crops, strict=True)}

    def whole(self, position: int, width: int, height: int) -> str | None:
        """One whole image in this size, as a data URI; None when it cannot be read."""
        if self.source is None or not 0 <= position < len(self.source):
            return None
        try:
            example = self.source[position]
            pixels = decode(example.image, self.max_pixels, example.key)
        except BadExample:
            return None
        return data_uri(_resized(pixels, width, height))


def squares(source: Source, positions: Sequence[int], side: int, max_pixels: int = MAX_PIXELS) -> Read:
    """Those of the examples that can be read, cut to squares of `side` px."""
    return Crops(source, positions, side, max_pixels, len(positions))[0] if positions else Read()


def _resized(pixels: Tensor, width: int, height: int) -> Tensor:
    if tuple(pixels.shape[1:]) == (height, width):
        return pixels
    made = F.interpolate(pixels[None].float(), (height, width), mode="bicubic", align_corners=False, antialias=True)
    return made[0].round().clamp(0, 255).byte()
