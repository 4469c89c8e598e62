"""The crops of a batch: placed by chance, then cut from one image after the other and resized.

Pixels stay uint8 in the order of the decoder, one pixel's three values side by side, which is the order that resizing
is fast in; `photometric` lays them out by channel when it makes them float.

Shapes: B examples, V crops of a view, S pixels a side of a crop. An image is (3, H, W) uint8. A box is left, top,
width, height.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from harmony.chance import Chance
from harmony.data.views import ViewConfig, draw_boxes, draw_flips, relative_boxes

REDUCTIONS = (8, 4, 2)
"""How many times smaller a side libjpeg can decode at a gain."""


def cut(image: Tensor, box: Sequence[int], flip: bool, size: int) -> Tensor:
    """One crop: the box of `image` (3, H, W) uint8, resized to (3, size, size) uint8 (bicubic, antialiased)."""
    left, top, width, height = box
    crop = image[None, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
    crop = functional.interpolate(crop, (size, size), mode="bicubic", align_corners=False, antialias=True)[0]
    return crop.flip(-1) if flip else crop


class Cutter:
    """The crops of B images for every view, filled image by image.

    Attributes:
        images: view name -> (V, B, 3, S, S) uint8, in the memory order (V, B, S, S, 3).
        flips: view name -> (V, B) bool.
        boxes: view name -> (V, B, 4) int64, pixels of the image as it was decoded.
        sizes: (B, 2) int64, the image's height and width before that.
        reductions: (B,) int64, how many times smaller a side it was decoded.
    """

    def __init__(self, chance: Chance, views: Mapping[str, ViewConfig]) -> None:
        self._chance, self._views = chance, views
        count = len(chance)
        self.images = {
            name: torch.empty(view.count, count, view.size, view.size, 3, dtype=torch.uint8).permute(0, 1, 4, 2, 3)
            for name, view in views.items()
        }
        self.flips = {name: draw_flips(chance, name, view) for name, view in views.items()}
        self.boxes = {name: torch.zeros(view.count, count, 4, dtype=torch.int64) for name, view in views.items()}
        self.sizes = torch.zeros(count, 2, dtype=torch.int64)
        self.reductions = torch.ones(count, dtype=torch.int64)

    def place(self, places: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Draw where crops lie in the images at some places of the batch, of the given heights and widths.

        Returns:
            How many times smaller a side each may be decoded (1, 2, 4 or 8) so that no crop has fewer pixels than it
            is resized to.
        """
        which = torch.tensor(places)
        chance = Chance(self._chance.keys[which])
        self.sizes[which] = torch.tensor(sizes)
        spare = torch.full((len(places),), REDUCTIONS[0])
        for name, view in self._views.items():
            boxes = draw_boxes(chance, name, view, self.sizes[which])
            self.boxes[name][:, which] = boxes
            spare = torch.minimum(spare, boxes[..., 2:].amin((0, 2)) // view.size)
        return [next((one for one in REDUCTIONS if one <= most), 1) for most in spare.tolist()]

    def cut(self, place: int, image: Tensor, reduction: int = 1) -> None:
        """Cut the crops of the image at one place of the batch.

        Args:
            place: 0 .. B - 1.
            image: its pixels.
            reduction: what it was asked to be decoded with.
        """
        shape = (int(image.shape[1]), int(image.shape[2]))
        height, width = self.sizes[place].tolist()
        if reduction > 1 and shape == (-(-height // reduction), -(-width // reduction)):
            self._reduce(place, reduction)
        elif shape != (height, width):  # the header said another size
            self.place([place], [shape])
        for name, view in self._views.items():
            boxes, flips = self.boxes[name][:, place].tolist(), self.flips[name][:, place].tolist()
            for crop, box, flip in zip(self.images[name][:, place].unbind(0), boxes, flips, strict=True):
                crop.copy_(cut(image, box, flip, view.size))

    def _reduce(self, place: int, reduction: int) -> None:
        """Move the edges of boxes to the nearest pixels of the reduced image."""
        self.reductions[place] = reduction
        for boxes in self.boxes.values():
            left_top = boxes[:, place, :2]
            edges = torch.stack([left_top, left_top + boxes[:, place, 2:]])
            # Halves go up, never to even: else a box could lose a pixel of those that its share of sides leaves it.
            near = (2 * edges + reduction) // (2 * reduction)
            boxes[:, place] = torch.cat([near[0], near[1] - near[0]], 1)

    def relative_boxes(self) -> dict[str, Tensor]:
        """View name -> (V, B, 4) float32, the boxes as shares of their images."""
        times, limits = self.reductions[:, None], self.sizes.flip(1)
        shares = {}
        for name, boxes in self.boxes.items():
            left_top, right_low = boxes[..., :2] * times, (boxes[..., :2] + boxes[..., 2:]) * times
            whole = torch.cat([left_top, torch.minimum(right_low, limits) - left_top], -1)
            shares[name] = relative_boxes(whole, self.sizes)
        return shares
