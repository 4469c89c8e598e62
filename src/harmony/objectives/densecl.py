"""Patches of one crop find the same place in another crop, beside the contrast of crops (DenseCL, arXiv 2011.09157).

Shapes: B images, N = rows * columns patches of a crop, D width of the encoder, E width of the projections, L keys in a
queue.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harmony.data.batch import Batch
from harmony.data.views import ViewConfig
from harmony.models.projectors import ProjectorConfig, projector
from harmony.models.towers import Towers, slow_copy
from harmony.objectives.base import Encoded, ImageRequest, Objective, ObjectiveConfig, Request
from harmony.objectives.queues import Queue
from harmony.objectives.targets import full_precision, unit
from harmony.schedules import At, Positive, Schedule, Share

AT_ONCE = 2**27
"""Similarities that exist at a time, 512 MiB of them in single precision."""

_HEAD = ProjectorConfig(norm="none")


class Densecl(Objective):
    """MoCo's contrast of crops and of patches, the first crop's queries with the teacher's keys of the second."""

    class Config(ObjectiveConfig):
        """Settings of both contrasts."""

        view: Annotated[str, Field(description="the view whose first two crops are compared")] = "global"
        head: Annotated[ProjectorConfig, Field(description="sizes of the class token's projector")] = _HEAD
        dense_head: Annotated[ProjectorConfig, Field(description="sizes of the patches' projector")] = _HEAD
        dense: Annotated[Share, Field(description="weight of the patches; the rest goes to the whole crops")] = (
            Schedule.constant(0.5)
        )
        temperature: Annotated[Positive, Field(description="temperature of the similarities")] = Schedule.constant(0.2)
        queue: Annotated[int, Field(ge=1, description="earlier keys that are negatives, in either contrast")] = 65536
        matching: Annotated[
            Literal["features", "geometry"],
            Field(
                description="a patch's partner in the other crop: the patch with the most similar feature (the "
                "paper's), or the one that shows the same place of the image, where there is one"
            ),
        ] = "features"

    config: Config

    def __init__(self, config: Config, towers: Towers, views: Mapping[str, ViewConfig]) -> None:
        super().__init__(config, towers, views)
        self.head = projector(towers.image.width, config.head)
        self.dense_head = projector(towers.image.width, config.dense_head)
        self.teacher_head, self.teacher_dense_head = slow_copy(self.head), slow_copy(self.dense_head)
        self.queue = Queue(config.queue, config.head.output)
        self.dense_queue = Queue(config.queue, config.dense_head.output)
        self.grid = towers.image.grid(views[config.view].size) if config.view in views else (1, 1)
        self.student = ImageRequest(config.view, crops=(0,))
        self.teacher = ImageRequest(config.view, crops=(1,), model="teacher")

    def requests(self) -> Sequence[Request]:
        return [self.teacher, self.student]

    def slow_twins(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        return [(self.head, self.teacher_head), (self.dense_head, self.teacher_dense_head)]

    def forward(self, batch: Batch, encoded: Encoded, at: At) -> dict[str, Tensor]:
        seen, slow = encoded.image(self.student).crop(0), encoded.image(self.teacher).crop(0)
        queries = unit(self.head(seen.cls))  # (B, E)
        patches = unit(_each(self.dense_head, seen.patches))  # (B, N, E)
        with torch.no_grad():
            keys = unit(self.teacher_head(slow.cls))
            projected = full_precision(_each(self.teacher_dense_head, slow.patches))
            partner, has_one = self.partners(batch, seen.patches, slow.patches)
            partners = unit(projected).gather(1, partner[..., None].expand(-1, -1, projected.shape[-1]))
            self.queue.observe(keys)
            # A negative of a patch is a whole crop of another image, as the mean of its patches (section 3.3).
            self.dense_queue.observe(unit(projected.mean(1)))
        whole, images_found = contrast(self.queue, queries, keys, at.temperature)
        each, found = contrast(self.dense_queue, patches.flatten(0, 1), partners.flatten(0, 1), at.temperature)
        # Averaged over the patches of each image that have a partner; an image without any adds zero.
        share = has_one / has_one.sum(1, keepdim=True).clamp(min=1)  # (B, N)
        dense = (each * share.flatten()).sum() / len(batch)
        if at.logged:
            self.signs = {
                "batch_accuracy": images_found.double().mean(),
                "patch_accuracy": (found & has_one.flatten()).sum() / has_one.sum().clamp(min=1),
                "matched": has_one.double().mean(),
            }
        return {"densecl": (1 - at.dense) * whole.mean() + at.dense * dense}

    def partners(self, batch: Batch, patches: Tensor, slow: Tensor) -> tuple[Tensor, Tensor]:
        """Which patch of the second crop belongs to each patch of the first.

        Args:
            batch: whose boxes and flips say where the crops lie.
            patches: (B, N, D), the student's features of the first crop.
            slow: (B, N, D), the teacher's features of the second.

        Returns:
            (B, N) int64, its index; and (B, N) bool, whether there is one.
        """
        if self.config.matching == "geometry":
            boxes, flips = batch.boxes[self.config.view], batch.flips[self.config.view]
            return same_places(boxes[:2], flips[:2], self.grid)
        with torch.autocast(patches.device.type, enabled=False):
            nearest = (unit(patches.detach()) @ unit(slow).transpose(1, 2)).argmax(2)  # (B, N)
        return nearest, torch.ones_like(nearest, dtype=torch.bool)

    def after_update(self, at: At) -> None:
        self.queue.update()
        self.dense_queue.update()


def same_places(boxes: Tensor, flips: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The patch of the second crop in which the centre of each patch of the first lies.

    Args:
        boxes: (2, B, 4), left, top, width and height of both crops as shares of the image.
        flips: (2, B) bool, which of them are mirrored left to right.
        grid: rows and columns of patches.

    Returns:
        (B, N) int64, its index, 0 where there is none; and (B, N) bool, whether the centre lies in the second crop.
    """
    rows, columns = grid
    left, top, width, height = boxes.double().unbind(-1)  # (2, B) each
    right_way = (torch.arange(columns, device=boxes.device, dtype=torch.float64) + 0.5) / columns
    down = (torch.arange(rows, device=boxes.device, dtype=torch.float64) + 0.5) / rows
    across = torch.where(flips[0, :, None], 1 - right_way, right_way)  # (B, columns), within the first crop's box
    # The same places within the second crop's box, then within the second crop as it is seen.
    x = (left[0, :, None] + across * width[0, :, None] - left[1, :, None]) / width[1, :, None]
    y = (top[0, :, None] + down * height[0, :, None] - top[1, :, None]) / height[1, :, None]
    x = torch.where(flips[1, :, None], 1 - x, x)
    inside = ((y >= 0) & (y < 1))[:, :, None] & ((x >= 0) & (x < 1))[:, None, :]  # (B, rows, columns)
    place = (y * rows).floor()[:, :, None] * columns + (x * columns).floor()[:, None, :]
    return torch.where(inside, place, 0).long().flatten(1), inside.flatten(1)


def contrast(queue: Queue, queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The cross-entropy of finding a query's own key among those of the queue (equations 1 and 2).

    Similarities exist for some queries at a time, and are computed again in the backward pass: all at once, those of
    the paper's patches take 13 GB.

    Args:
        queue: the other keys.
        queries: (M, E) unit vectors.
        keys: (M, E) unit vectors, each query's own.
        temperature: of the similarities.

    Returns:
        (M,) of the cross-entropies; and (M,) bool, whether its own is the most similar key.
    """

    def piece(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        similarity = queue.similarities(queries, keys)
        logits = similarity / temperature
        return logits.logsumexp(1) - logits[:, 0], similarity.argmax(1) == 0

    rows = max(1, AT_ONCE // len(queue.vectors))
    if len(queries) <= rows:
        return piece(queries, keys)
    pieces = zip(queries.split(rows), keys.split(rows), strict=True)
    losses, found = zip(
        *(checkpoint(piece, *each, use_reentrant=False, preserve_rng_state=False) for each in pieces), strict=True
    )
    return torch.cat(losses), torch.cat(found)


def _each(head: nn.Module, patches: Tensor) -> Tensor:
    """(B, N, D) -> (B, N, E); norms of the head, where it has any, see all patches of the batch."""
    projected: Tensor = head(patches.flatten(0, 1))
    return projected.unflatten(0, patches.shape[:2])
