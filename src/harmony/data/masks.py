"""Which patches and words are hidden, drawn from each example's own chance for a whole batch at once.

Shapes: B examples, V crops of a view, N = rows * columns patches of a crop, T caption tokens.
A sampler is a small frozen value: an objective makes it from its settings, the loader's workers draw with it.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer
from torch import Tensor

from harmony.chance import Chance
from harmony.data.batch import Mask
from harmony.data.ranges import PositiveRange, UnitRange
from harmony.errors import UserError, unknown
from harmony.schedules import Clock, Schedule, Share
from harmony.validation import validated

PROPOSALS = 64
"""Blocks tried an image before single patches fill what is missing."""

PLACEMENTS = 16
"""Placements of all blocks tried an image before the targets are laid over each other."""

Numbers = NDArray[np.float32]

_UnitShare = Annotated[float, Field(ge=0, le=1)]


class PatchSampler(BaseModel):
    """Hides patches of every crop of one view."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    view: Annotated[str, Field(description="name of the view; given by the objective, not by the recipe")] = "global"
    stream: ClassVar[None] = None
    equal_counts: ClassVar[bool] = False
    """Whether equally many patches are left of every crop, so that these alone can be encoded."""

    @property
    def kind(self) -> str:
        """What a recipe calls this kind of mask."""
        return next(name for name, known in PATCH_SAMPLERS.items() if type(self) is known)

    def on(self, view: str) -> Self:
        """The same sampler for another view."""
        return self.model_copy(update={"view": view})

    def draw(self, name: str, chance: Chance, crops: int, grid: tuple[int, int], clock: Clock) -> Mask:
        """Draw for a batch.

        Args:
            name: the mask's name; masks of different names are independent.
            chance: streams of the B examples, on the CPU.
            crops: V, how many crops the view has.
            grid: (rows, columns) of patches in a crop.
            clock: the place in the run, for samplers with a schedule.

        Returns:
            A mask of shape (V, B, N), patches in row order.
        """
        raise NotImplementedError


class BlockMasks(PatchSampler):
    """Block-wise masks of iBOT (arXiv 2111.07832, after BEiT, arXiv 2106.08254, algorithm 1).

    Of the images, `share` are masked; each of those hides exactly round(ratio * N) patches, its ratio uniform in
    `ratio`. Rectangles are proposed one after the other: area uniform between `smallest` and what remains to be hidden,
    aspect log-uniform, place uniform; one is taken when it fits the grid and adds at least one patch and no more than
    remain. After 64 proposals, single patches at random places make up what is missing. (The published
    code stops short instead, so that its images hide a few patches fewer than drawn.)
    """

    ratio: Annotated[UnitRange, Field(description="range of the share of patches hidden in a masked image")] = (
        0.1,
        0.5,
    )
    share: Annotated[_UnitShare, Field(description="share of the images that are masked at all")] = 0.5
    aspect: Annotated[PositiveRange, Field(description="range of a block's height over its width")] = (0.3, 1 / 0.3)
    smallest: Annotated[
        int, Field(ge=1, description="patches of the smallest block, unless fewer are left to hide; BEiT has 16")
    ] = 4

    def draw(self, name: str, chance: Chance, crops: int, grid: tuple[int, int], clock: Clock) -> Mask:
        rows, columns = grid
        missing = self._counts(name, chance, crops, rows * columns).flatten()  # (B * V), patches still to be hidden
        proposals = chance.uniform(f"{name}/blocks", crops, PROPOSALS, 4).flatten(0, 1)  # (B * V, proposals, 4)
        hidden, missing = self._place_blocks(missing, proposals, grid)
        filled = hidden | _lowest(chance.uniform(f"{name}/rest", crops, rows * columns), ~hidden, missing)
        return Mask.of(_crop_major(filled, crops))

    def _place_blocks(self, missing: Tensor, proposals: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Take what fits of the proposed blocks: the patches hidden, (R, N) bool, and how many are missing still, (R).

        One proposal after the other, for the R images that miss some: many steps on few numbers, so in numpy. Numbers
        are those of 32 bits that torch would compute.
        """
        low, high = math.log(self.aspect[0]), math.log(self.aspect[1])
        ratios = (low + proposals[..., 1] * (high - low)).exp().numpy()
        areas, _, places_y, places_x = proposals.numpy().transpose(2, 1, 0)
        rest = missing.numpy().astype(np.float32)
        hidden = np.zeros((len(rest), *grid), dtype=bool)
        row, column = (np.arange(side, dtype=np.float32) for side in grid)
        for step, (area, place_y, place_x) in enumerate(zip(areas, places_y, places_x, strict=True)):
            some = np.flatnonzero(rest)
            if not len(some):
                break
            height, width = self._sides(area[some], ratios[some, step], rest[some])
            top = np.floor(place_y[some] * (grid[0] - height + 1))[:, None]
            left = np.floor(place_x[some] * (grid[1] - width + 1))[:, None]
            tall, wide = (
                (row >= top) & (row < top + height[:, None]),
                (column >= left) & (column < left + width[:, None]),
            )
            new = tall[:, :, None] & wide[:, None, :] & ~hidden[some]
            added = np.count_nonzero(new, (1, 2))
            fits = (height >= 1) & (height <= grid[0]) & (width >= 1) & (width <= grid[1])
            taken = fits & (added >= 1) & (added <= rest[some])
            hidden[some[taken]] |= new[taken]
            rest[some[taken]] -= added[taken]
        return torch.from_numpy(hidden).flatten(1), torch.from_numpy(rest).long()

    def _counts(self, name: str, chance: Chance, crops: int, patches: int) -> Tensor:
        """(B, V) int64, how many patches each image hides."""
        ratio = self.ratio[0] + (self.ratio[1] - self.ratio[0]) * chance.uniform(f"{name}/ratio", crops).double()
        chosen = chance.uniform(f"{name}/share", crops) < self.share
        return torch.where(chosen, (ratio * patches).round().long(), 0)

    def _sides(self, area: Numbers, ratio: Numbers, missing: Numbers) -> tuple[Numbers, Numbers]:
        """Height and width in patches of one block an image: a uniform number, the aspect, and what is missing."""
        smallest = np.minimum(missing, np.float32(self.smallest))
        patches = smallest + area * (missing - smallest)
        return np.rint(np.sqrt(patches * ratio)), np.rint(np.sqrt(patches / ratio))


def check_share_removed(setting: str, share: float, count: int, view: str, parts: str = "patches") -> None:
    """UserError, naming the setting, when removing a share of a view's parts leaves none of them, or all."""
    kept = kept_patches(count, share)
    if not 0 < kept < count:
        raise UserError(
            f"{setting} {share:g} keeps {kept} of the {count} {parts} of view {view!r}; it must keep some and remove "
            "some"
        )


def kept_patches(patches: int, ratio: float) -> int:
    """int(patches * (1 - ratio)), how many stay when a share is removed."""
    # Rounding guards against 1 - 0.9 = 0.0999...98: of 10 patches one must stay, not none.
    return int(round(patches * (1 - ratio), 6))


class RandomPatches(PatchSampler):
    """Hides single patches at random, equally many in every crop (MAE, arXiv 2111.06377).

    int(N * (1 - ratio)) patches stay, those with the smallest noise; `Mask.kept` lists them.
    """

    equal_counts: ClassVar[bool] = True

    ratio: Annotated[Share, Field(description="share of the patches hidden")] = Schedule.constant(0.75)

    def draw(self, name: str, chance: Chance, crops: int, grid: tuple[int, int], clock: Clock) -> Mask:
        patches = grid[0] * grid[1]
        visible = kept_patches(patches, self.ratio(clock))
        noise = chance.uniform(f"{name}/noise", crops, patches)
        order = noise.argsort(dim=-1, stable=True)
        hidden = torch.ones_like(noise, dtype=torch.bool).scatter_(-1, order[..., :visible], False)
        return Mask.of(_crop_major(hidden.flatten(0, 1), crops), equal_counts=True)


class MultiBlockMasks(PatchSampler):
    """A context block, and target blocks that are cut out of it (I-JEPA, arXiv 2301.08243, section 3 and appendix A).

    The sides of the blocks, in patches, are drawn once a step, as in the published code: one size for all targets, and
    one for the context. They are a function of the step alone, so all ranks and micro-batches have the same. Where the
    blocks lie is each image's own chance.

    The context must hold equally many patches of every image, and its size varies with the overlaps. The published code
    cuts all images to the smallest context of the batch on one device, always at the bottom of the image; an image
    then depends on its neighbours and on the number of devices. Here the count is a function of the grid alone,
    round(seen * N) patches (fewer on grids so small that the blocks leave fewer). 0.3 is the mean of what the published
    way leaves of 14 x 14 patches in batches of 128. Images with more lose some at random; a placement that leaves fewer
    is drawn anew, one in forty at these settings, and the last of 16 lays all targets over each other.

    `Mask.kept` lists the context, `Mask.blocks` the targets.
    """

    equal_counts: ClassVar[bool] = True

    targets: Annotated[int, Field(ge=1, description="target blocks of an image")] = 4
    scale: Annotated[UnitRange, Field(description="range of a target's area as a share of the crop")] = (0.15, 0.2)
    aspect: Annotated[PositiveRange, Field(description="range of a target's height over its width")] = (0.75, 1.5)
    context_scale: Annotated[UnitRange, Field(description="range of the square context's area, likewise")] = (0.85, 1.0)
    seen: Annotated[float, Field(gt=0, lt=1, description="share of the crop's patches that the encoder sees")] = 0.3

    def draw(self, name: str, chance: Chance, crops: int, grid: tuple[int, int], clock: Clock) -> Mask:
        target, context = self.sides(name, grid, clock.step)
        count = self.count(grid, target, context)
        if count < 1:
            raise self.too_large(grid)
        places = chance.uniform(f"{name}/places", crops, PLACEMENTS, 1 + self.targets, 2).flatten(0, 1)
        places[:, -1, 2:] = places[:, -1, 1:2]  # what the context is then left with is at least its count
        blocks = _rectangles(places[:, :, 1:], target, grid)  # (B * V, placements, targets, rows, columns)
        visible = _rectangles(places[:, :, 0], context, grid) & ~blocks.any(2)
        first = (visible.sum((2, 3)) >= count).int().argmax(1)
        image = torch.arange(len(first), device=first.device)
        blocks, visible = blocks[image, first], visible[image, first].flatten(1)
        noise = chance.uniform(f"{name}/seen", crops, visible.shape[1])
        seen = _lowest(noise, visible, torch.full_like(first, count))
        inside = blocks.flatten(2).nonzero()[:, -1].view(-1, crops, self.targets, target[0] * target[1])
        mask = Mask.of(_crop_major(~seen, crops), equal_counts=True)
        return replace(mask, blocks=inside.transpose(0, 1).contiguous())

    def sides(self, name: str, grid: tuple[int, int], step: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(rows, columns) of a target block and of the context block at a step."""
        drawn = Chance(torch.tensor([step])).uniform(f"{name}/sides", 3)[0].tolist()
        scale, aspect, context_scale = (
            low + share * (high - low)
            for share, (low, high) in zip(drawn, (self.scale, self.aspect, self.context_scale), strict=True)
        )
        return _block_sides(grid, scale, aspect), _block_sides(grid, context_scale, 1.0)

    def count(self, grid: tuple[int, int], target: tuple[int, int], context: tuple[int, int]) -> int:
        """Patches of the context that every image keeps; 0 when the blocks may leave none."""
        left = context[0] * context[1] - target[0] * target[1]
        return max(0, min(left, max(1, round(self.seen * grid[0] * grid[1]))))

    def check(self, grid: tuple[int, int]) -> None:
        """Refuse settings whose largest target may cover the smallest context of a grid.

        Raises:
            UserError: they do.
        """
        context = _block_sides(grid, self.context_scale[0], 1.0)
        for aspect in (*self.aspect, 1.0):
            if self.count(grid, _block_sides(grid, self.scale[1], aspect), context) < 1:
                raise self.too_large(grid)

    def too_large(self, grid: tuple[int, int]) -> UserError:
        return UserError(
            f"target blocks of up to {self.scale[1]:g} of a crop may leave nothing of the context block in "
            f"{grid[0]} x {grid[1]} patches; lower multi_block.scale or give the view a larger size"
        )


def _block_sides(grid: tuple[int, int], scale: float, aspect: float) -> tuple[int, int]:
    """Rows and columns of a block of a share of the grid and a height over width, within 1 and the grid's."""
    area = scale * grid[0] * grid[1]
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    return min(max(height, 1), grid[0]), min(max(width, 1), grid[1])


def _rectangles(places: Tensor, sides: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Blocks of one size, (..., rows, columns) bool, from two uniform numbers each, (..., 2)."""
    inside = []
    for place, side, length in zip(places.double().unbind(-1), sides, grid, strict=True):
        start = (place * (length - side + 1)).floor()[..., None]
        position = torch.arange(length, device=places.device)
        inside.append((position >= start) & (position < start + side))
    return inside[0][..., :, None] & inside[1][..., None, :]


class WordSampler(BaseModel):
    """Hides words of one caption stream."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stream: Annotated[str, Field(description="name of the caption stream; given by the objective")] = "caption"
    view: ClassVar[None] = None

    def draw(self, name: str, chance: Chance, tokens: Tensor, clock: Clock) -> Mask:
        """Draw for the captions `tokens` (B, T) int64; returns a mask of shape (B, T)."""
        raise NotImplementedError


class RandomWords(WordSampler):
    """Hides round(share * words) words of each caption, at least one where there is a word (none when share is 0).

    The words are the tokens between begin and end. What follows the end token is padding, as are zeros at the end of a
    caption that was cut before its end token; a zero between words is a word ("!" is token 0 of CLIP's vocabulary).
    """

    share: Annotated[Share, Field(description="share of the words hidden")] = Schedule.constant(0.2)
    begin: Annotated[int, Field(description="id of the begin token")] = 49406
    end: Annotated[int, Field(description="id of the end token")] = 49407

    def draw(self, name: str, chance: Chance, tokens: Tensor, clock: Clock) -> Mask:
        words = self.words(tokens)
        share = self.share(clock)
        count = words.sum(1)
        hide = torch.zeros_like(count) if share == 0 else (count * share).round().long().clamp(min=1).minimum(count)
        noise = chance.uniform(f"{name}/noise", tokens.shape[1])
        return Mask.of(_lowest(noise, words, hide))

    def words(self, tokens: Tensor) -> Tensor:
        """(B, T) bool, where `tokens` (B, T) are words."""
        before_end = (tokens == self.end).cumsum(1) == 0
        before_padding = (tokens != 0).flip(1).cumsum(1).flip(1) > 0
        return before_end & before_padding & (tokens != self.begin)


MaskSampler = PatchSampler | WordSampler

PATCH_SAMPLERS: dict[str, type[PatchSampler]] = {
    "block": BlockMasks,
    "random": RandomPatches,
    "multi_block": MultiBlockMasks,
}


def patch_sampler(value: Any) -> PatchSampler:
    """A patch sampler from what a recipe says: `block`, or `{block: {ratio: [0.1, 0.5], share: 0.5}}`."""
    if isinstance(value, PatchSampler):
        return value
    if isinstance(value, str):
        value = {value: {}}
    if not (isinstance(value, Mapping) and len(value) == 1):
        raise ValueError(f"{value!r} is not a mask; write one kind and its settings, as in {{block: {{share: 0.5}}}}")
    kind, settings = next(iter(value.items()))
    try:
        sampler = PATCH_SAMPLERS[kind]
    except KeyError:
        raise ValueError(str(unknown("kind of mask", str(kind), PATCH_SAMPLERS))) from None
    if isinstance(settings, Mapping) and "view" in settings:
        raise ValueError("a mask's view is the view of its objective; leave `view` out of the mask")
    try:
        return validated(sampler, settings or {}, kind)
    except UserError as error:  # one sentence; pydantic takes the ValueError for the mask's own
        raise ValueError(str(error)) from None


def _written(sampler: PatchSampler) -> dict[str, Any]:
    return {sampler.kind: sampler.model_dump(mode="json", exclude={"view"})}


PatchMasks = Annotated[PatchSampler, BeforeValidator(patch_sampler), PlainSerializer(_written)]
"""The field of an objective's settings that names a kind of mask; `.on(view)` gives its sampler."""


def _lowest(noise: Tensor, allowed: Tensor, count: Tensor) -> Tensor:
    """In each row, the `count` allowed places with the smallest noise: (R, N) bool from (R, N), (R, N), (R,)."""
    noise = noise.reshape(len(count), -1).masked_fill(~allowed.reshape(len(count), -1), math.inf)
    rank = noise.argsort(dim=1, stable=True).argsort(dim=1)
    return rank < count[:, None]


def _crop_major(hidden: Tensor, crops: int) -> Tensor:
    """(B * V, ...) with the crops of an example side by side, to (V, B, N)."""
    return hidden.view(-1, crops, hidden[0].numel() if len(hidden) else 0).transpose(0, 1).contiguous()
