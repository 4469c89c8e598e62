"""Images with the things on them, and what changes both together.

Shapes: K things, H x W px of an image, S px a side of what the detector is given.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2 import functional as change
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Mask

from harmony.data.decode import decode
from harmony.data.sources import BadExample, Source
from harmony.models.settings import Colour

SMALLEST = 1.0
"""Side in px of the smallest box that is learned."""


@dataclass(frozen=True)
class Scene:
    """An image and its things.

    Attributes:
        image: (3, H, W) uint8.
        boxes: (K, 4) float32 px, left, top, right, bottom.
        labels: (K,) int64, from 0.
        crowd: (K,) bool.
        areas: (K,) float32 px, as annotated on the image as decoded.
        masks: (K, H, W) uint8, 0 or 1; or None.
        empty: boxes without an area, which were left out.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    areas: Tensor
    masks: Tensor | None
    empty: int = 0

    @property
    def sides(self) -> tuple[int, int]:
        """H, W."""
        return int(self.image.shape[-2]), int(self.image.shape[-1])

    def only(self, which: Tensor) -> "Scene":
        """With the things of a (K,) bool alone."""
        masks = None if self.masks is None else self.masks[which]
        return Scene(
            self.image, self.boxes[which], self.labels[which], self.crowd[which], self.areas[which], masks, self.empty
        )


def read(source: Source, position: int, max_pixels: int, with_masks: bool) -> Scene:
    """Example `position` of a source; boxes without an area are left out and counted.

    Raises:
        BadExample: the image cannot be read, or its things do not fit it.
    """
    example = source[position]
    image = decode(example.image, max_pixels, example.key)
    sides = (int(image.shape[-2]), int(image.shape[-1]))
    things = example.objects
    if things is None:
        none = torch.zeros(0, 4)
        masks = torch.zeros(0, *sides, dtype=torch.uint8) if with_masks else None
        return Scene(image, none, none[:, 0].long(), none[:, 0].bool(), none[:, 0], masks)
    boxes, labels = torch.from_numpy(things.boxes).float().reshape(-1, 4), torch.from_numpy(things.labels).long()
    names = len(source.object_names or ())
    if not (boxes.isfinite().all() and ((labels >= 0) & (labels < names)).all()):
        raise BadExample(example.key, f"has boxes that are not finite, or classes beyond the {names} that have names")
    masks = None
    if with_masks and things.masks is not None:
        masks = torch.from_numpy(things.masks()).to(torch.uint8)
        if masks.shape != (len(boxes), *sides):
            raise BadExample(example.key, f"has masks of shape {tuple(masks.shape)} for {len(boxes)} boxes")
    crowd, areas = torch.from_numpy(things.crowd).bool(), torch.from_numpy(things.areas).float()
    full = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return replace(Scene(image, boxes, labels, crowd, areas, masks).only(full), empty=int((~full).sum()))


def resized(scene: Scene, height: int, width: int) -> Scene:
    """At another size: the image bilinear with antialiasing, masks by the nearest pixel."""
    image = change.resize(scene.image, [height, width], antialias=True)
    boxes = change.resize(_boxes(scene), [height, width])
    masks = None if scene.masks is None else change.resize(Mask(scene.masks), [height, width]).as_subclass(Tensor)
    return replace(scene, image=image, boxes=boxes.as_subclass(Tensor), masks=masks)


def flipped(scene: Scene) -> Scene:
    """Mirrored left to right."""
    masks = None if scene.masks is None else scene.masks.flip(-1)
    boxes = change.horizontal_flip(_boxes(scene)).as_subclass(Tensor)
    return replace(scene, image=scene.image.flip(-1), boxes=boxes, masks=masks)


def cropped(scene: Scene, top: int, left: int, height: int, width: int) -> Scene:
    """A part of the image, with the things that are on it.

    A thing that is cut has the box of what is left of its mask, where there is one.
    """
    image = scene.image[:, top : top + height, left : left + width]
    masks = None if scene.masks is None else scene.masks[:, top : top + height, left : left + width]
    moved = scene.boxes - torch.tensor([left, top, left, top])
    most = torch.tensor([width, height, width, height])
    boxes = moved.clamp(min=0).minimum(most)
    if masks is not None:
        boxes = _as_left(boxes, masks, (boxes != moved).any(1))
    kept = (boxes[:, 2:] - boxes[:, :2] >= SMALLEST).all(1)
    return replace(scene, image=image, boxes=boxes, masks=masks).only(kept)


def _as_left(boxes: Tensor, masks: Tensor, cut: Tensor) -> Tensor:
    """Boxes, those of things that were cut drawn anew around their masks; without an area where nothing is left."""
    boxes = boxes.clone()
    boxes[cut] = 0
    some = cut & (masks > 0).flatten(1).any(1)
    # torchvision gives the last pixel's place, boxes end behind it.
    boxes[some] = masks_to_boxes(masks[some]).to(boxes) + torch.tensor([0.0, 0, 1, 1])
    return boxes


def padded(image: Tensor, size: int, fill: Tensor) -> Tensor:
    """(3, H, W) in the upper left corner of (3, S, S), the rest of one colour (3,) uint8."""
    out = fill.view(3, 1, 1).expand(3, size, size).clone()
    out[:, : image.shape[1], : image.shape[2]] = image
    return out


def jittered(scene: Scene, size: int, scale: tuple[float, float], flip: float) -> Scene:
    """Large-scale jitter (arXiv 2012.07177, 3): another size, a random part of it where it is larger than S, mirroring.

    Draws from torch's global generator.

    Args:
        scene: what is changed.
        size: S.
        scale: range of the longer side, as a share of S.
        flip: probability of mirroring.
    """
    drawn, down, right, mirror = torch.rand(4).tolist()
    scene = resized(scene, *fitted(scene.sides, size * (scale[0] + drawn * (scale[1] - scale[0]))))
    height, width = (min(side, size) for side in scene.sides)
    top, left = int(down * (scene.sides[0] - height + 1)), int(right * (scene.sides[1] - width + 1))
    scene = cropped(scene, top, left, height, width)
    return flipped(scene) if mirror < flip else scene


def fitted(sides: tuple[int, int], longer: float) -> tuple[int, int]:
    """Height and width whose longer one is `longer`, of the same shape."""
    factor = longer / max(sides)
    return max(1, round(sides[0] * factor)), max(1, round(sides[1] * factor))


def colour_of(mean: Colour) -> Tensor:
    """(3,) uint8, the colour that is nothing once it is normalised."""
    return (torch.tensor(mean) * 255).round().to(torch.uint8)


def _boxes(scene: Scene) -> BoundingBoxes:
    return BoundingBoxes(scene.boxes, format=BoundingBoxFormat.XYXY, canvas_size=scene.sides)
