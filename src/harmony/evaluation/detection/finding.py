"""What a detector finds on the images of a source, in pixels of those images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from harmony import ranks
from harmony.data.sources import BadExample, Source
from harmony.data.workers import count_workers, start_worker
from harmony.evaluation.detection.detector import Detector
from harmony.evaluation.detection.evaluator import Page, encoded
from harmony.evaluation.detection.heads import Sizes
from harmony.evaluation.detection.masks import paste
from harmony.evaluation.detection.things import Scene, colour_of, fitted, padded, read, resized
from harmony.evaluation.encoder import Encoder
from harmony.evaluation.progress import track
from harmony.training.distributed import everyones


@dataclass
class Views:
    """Images (B, 3, S, S) uint8, longer sides at S, their sizes within the squares, their pages, and the bad ones."""

    pixels: Tensor
    sizes: Sizes
    pages: list[Page]
    bad: list[tuple[str, str]]


class WholeImages(Dataset[Views]):
    """Batches of images as they are measured.

    Args:
        source: the examples.
        positions: which of them.
        size: S.
        fill: colour around images.
        max_pixels: images with more pixels count as bad.
        with_masks: whether masks are measured.
        batch_size: images a batch.
    """

    def __init__(
        self,
        source: Source,
        positions: Sequence[int],
        size: int,
        fill: Tensor,
        max_pixels: int,
        with_masks: bool,
        batch_size: int,
    ) -> None:
        self.source, self.positions, self.size, self.fill = source, positions, size, fill
        self.max_pixels, self.with_masks, self.batch_size = max_pixels, with_masks, batch_size

    def __len__(self) -> int:
        return -(-len(self.positions) // self.batch_size)

    def __getitem__(self, batch: int) -> Views:
        views, pixels = Views(torch.empty(0), [], [], []), []
        for position in self.positions[batch * self.batch_size : (batch + 1) * self.batch_size]:
            try:
                scene = read(self.source, position, self.max_pixels, self.with_masks)
            except BadExample as bad:
                views.bad.append((bad.key, bad.reason))
                continue
            views.pages.append(page_of(scene, position))
            small = resized(scene.only(torch.zeros_like(scene.crowd)), *fitted(scene.sides, self.size))
            pixels.append(padded(small.image, self.size, self.fill))
            views.sizes.append(small.sides)
        views.pixels = torch.stack(pixels) if pixels else torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8)
        return views


def page_of(scene: Scene, position: int) -> Page:
    """A scene's things as the evaluator takes them."""
    height, width = scene.sides
    page = Page(position, height, width, empty=scene.empty)
    for place, (box, label) in enumerate(zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True)):
        thing: dict[str, Any] = {"category_id": label, "bbox": _wide(box), "iscrowd": int(scene.crowd[place])}
        thing["area"] = float(scene.areas[place])
        if scene.masks is not None:
            thing["segmentation"] = encoded(scene.masks[place].numpy())
        page.truth.append(thing)
    return page


def find(
    detector: Detector,
    encoder: Encoder,
    source: Source,
    positions: Sequence[int],
    size: int,
    batch_size: int,
    workers: int | str,
    max_pixels: int,
    autocast: bool = False,
) -> tuple[list[Page], list[tuple[str, str]]]:
    """Truth and findings of every image that can be read, and (key, reason) of the others; shared among ranks."""
    own = list(positions)[ranks.rank() :: ranks.count()]
    with_masks = detector.masks is not None
    images = WholeImages(source, own, size, colour_of(encoder.mean), max_pixels, with_masks, batch_size)
    count = count_workers(workers, batch_size * 3 * size**2)  # type: ignore[arg-type]
    loader = DataLoader(
        images,
        batch_size=None,  # a dataset item is a whole batch
        num_workers=min(count, max(0, len(images) - 1)),
        worker_init_fn=start_worker,
    )
    pages: list[Page] = []
    bad: list[tuple[str, str]] = []
    detector.eval()
    for views in track(loader, len(images), f"detecting on {len(positions):,} images"):
        bad += views.bad
        if not views.pages:
            continue
        with torch.autocast(encoder.device.type, torch.bfloat16, enabled=autocast):
            pixels = encoder.normalise(views.pixels.to(encoder.device))
            found = detector.detect(pixels, views.sizes)
        for page, sides, one in zip(views.pages, views.sizes, found, strict=True):
            put_back(page, sides, {name: value.float().cpu() for name, value in one.items()})
            pages.append(page)
    joined = [page for part in everyones(pages) for page in part]
    return sorted(joined, key=lambda page: page.position), [one for part in everyones(bad) for one in part]


def put_back(page: Page, sides: tuple[int, int], found: dict[str, Tensor]) -> None:
    """Write findings on an image of `sides` px to its page, in the image's own pixels."""
    factor = torch.tensor([page.width / sides[1], page.height / sides[0]] * 2)
    most = torch.tensor([page.width, page.height] * 2)
    boxes = (found["boxes"] * factor).clamp(min=0).minimum(most)
    for place, (box, label, score) in enumerate(
        zip(boxes, found["labels"].long().tolist(), found["scores"].tolist(), strict=True)
    ):
        thing: dict[str, Any] = {"category_id": label - 1, "bbox": _wide(box.tolist()), "score": score}
        if "masks" in found:
            thing["segmentation"] = encoded(paste(found["masks"][place], box, page.height, page.width))
        page.found.append(thing)


def _wide(box: Sequence[float]) -> list[float]:
    """Left, top, right, bottom -> left, top, width, height."""
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]
