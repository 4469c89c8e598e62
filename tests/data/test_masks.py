"""Masks: how many places they hide, which ones, and that each example's mask is its own."""

import math
import pickle
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from harmony.chance import Chance
from harmony.data.batch import Mask
from harmony.data.masks import BlockMasks, MultiBlockMasks, PatchMasks, RandomPatches, RandomWords
from harmony.schedules import Clock, Schedule

CLOCK = Clock(step=5, steps=10, epoch_steps=5)
BEGIN, END = 49406, 49407
grids = st.tuples(st.integers(1, 16), st.integers(1, 16))
seeds = st.integers(0, 2**31)


def streams(count: int, seed: int = 0) -> Chance:
    return Chance.of_examples(seed, 0, torch.arange(count))


def check_consistent(mask: Mask) -> None:
    assert torch.equal(mask.index, mask.masked.flatten().nonzero()[:, 0])


# Blocks


@given(grids, st.floats(0, 1), seeds)
def test_every_masked_image_hides_exactly_the_rounded_share(grid: tuple[int, int], ratio: float, seed: int) -> None:
    sampler = BlockMasks(ratio=(ratio, ratio), share=1.0)
    mask = sampler.draw("block", streams(6, seed), 2, grid, CLOCK)
    patches = grid[0] * grid[1]
    assert mask.masked.shape == (2, 6, patches)
    assert set(mask.masked.sum(-1).flatten().tolist()) == {round(ratio * patches)}
    check_consistent(mask)


@given(grids, st.floats(0, 1), st.floats(0, 1), seeds)
def test_a_ratio_stays_within_its_range(grid: tuple[int, int], one: float, two: float, seed: int) -> None:
    low, high = sorted((one, two))
    hidden = BlockMasks(ratio=(low, high), share=1.0).draw("block", streams(8, seed), 1, grid, CLOCK).masked.sum(-1)
    patches = grid[0] * grid[1]
    assert hidden.min() >= round(low * patches)
    assert hidden.max() <= round(high * patches)


def test_the_share_of_masked_images_and_the_spread_of_ratios() -> None:
    count, patches = 6000, 14 * 14
    masked = BlockMasks(ratio=(0.1, 0.5), share=0.3).draw("block", streams(count), 1, (14, 14), CLOCK).masked[0]
    counts = masked.sum(-1)
    chosen = counts > 0
    assert abs(chosen.float().mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / count)
    # A uniform ratio: the counts of masked images fill ten equal bins of [0.1, 0.5] evenly.
    bins = torch.histc(counts[chosen] / patches, bins=10, min=0.1, max=0.5) / chosen.sum()
    assert (bins - 0.1).abs().max() < 5 * math.sqrt(0.1 * 0.9 / int(chosen.sum()))


def beit_blocks(target: int, rows: int, columns: int, aspect: tuple[float, float], smallest: int) -> torch.Tensor:
    """BEiT's algorithm 1 for one image, written plainly: blocks until the target is met or ten in a row do not fit."""
    hidden = torch.zeros(rows, columns, dtype=torch.bool)
    failures = 0
    while (left := target - int(hidden.sum())) > 0 and failures < 10:
        area = random.uniform(min(smallest, left), left)
        ratio = math.exp(random.uniform(math.log(aspect[0]), math.log(aspect[1])))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        failures += 1
        if 1 <= height <= rows and 1 <= width <= columns:
            top, start = random.randint(0, rows - height), random.randint(0, columns - width)
            trial = hidden.clone()
            trial[top : top + height, start : start + width] = True
            if 0 < int(trial.sum() - hidden.sum()) <= left:
                hidden, failures = trial, 0
    return hidden


@pytest.mark.parametrize(
    ("grid", "ratio", "smallest"),
    [((14, 14), 0.4, 4), ((14, 14), 0.15, 4), ((6, 6), 0.3, 4), ((8, 20), 0.3, 4), ((14, 14), 0.383, 16)],
)
def test_blocks_look_like_those_of_the_plain_algorithm(grid: tuple[int, int], ratio: float, smallest: int) -> None:
    random.seed(0)
    rows, columns = grid
    target = round(ratio * rows * columns)
    sampler = BlockMasks(ratio=(ratio, ratio), share=1.0, smallest=smallest)
    ours = sampler.draw("block", streams(400), 1, grid, CLOCK).masked[0].view(-1, rows, columns)
    plain = torch.stack([beit_blocks(target, rows, columns, sampler.aspect, smallest) for _ in range(400)])
    scattered = torch.rand(400, rows * columns).argsort().argsort().lt(target).view(-1, rows, columns)

    def touching(masks: torch.Tensor) -> torch.Tensor:
        """Pairs of hidden neighbours a hidden patch, for each image."""
        beside = (masks[:, :, 1:] & masks[:, :, :-1]).sum((1, 2)) + (masks[:, 1:] & masks[:, :-1]).sum((1, 2))
        return beside / masks.sum((1, 2))

    error = (touching(ours).var() / 400 + touching(plain).var() / 400).sqrt()
    assert abs(touching(ours).mean() - touching(plain).mean()) < 4 * error
    assert touching(ours).mean() > touching(scattered).mean() + 0.3
    # The plain algorithm gives up on some images, and never by much.
    assert plain.sum((1, 2)).max() == target
    # Where they lie: the same share of each of nine parts of the grid.
    thirds = [torch.nn.functional.adaptive_avg_pool2d(masks[:, None].float(), 3).mean(0) for masks in (ours, plain)]
    assert (thirds[0] - thirds[1]).abs().max() < 0.06


# Patches left out


@given(grids, st.floats(0, 1), seeds)
def test_random_patches_keep_equally_many_of_every_crop(grid: tuple[int, int], ratio: float, seed: int) -> None:
    patches = grid[0] * grid[1]
    mask = RandomPatches(ratio=ratio).draw("mae", streams(4, seed), 3, grid, CLOCK)
    assert mask.kept is not None
    kept = mask.kept
    assert kept.shape[:2] == (3, 4)
    # int(N * (1 - ratio)), save that a product which is a whole number but for rounding counts as that number.
    assert kept.shape[2] in {int(patches * (1 - ratio)), math.floor(patches * (1 - ratio) + 1e-6)}
    assert (kept.diff(dim=-1) > 0).all()
    rebuilt = torch.ones(3, 4, patches, dtype=torch.bool).scatter(-1, kept, False)
    assert torch.equal(mask.masked, rebuilt)
    check_consistent(mask)


@pytest.mark.parametrize(("patches", "ratio", "visible"), [(196, 0.75, 49), (10, 0.9, 1), (64, 0.6, 25), (9, 0.5, 4)])
def test_the_number_kept_is_the_one_of_the_papers(patches: int, ratio: float, visible: int) -> None:
    mask = RandomPatches(ratio=ratio).draw("mae", streams(2), 1, (1, patches), CLOCK)
    assert mask.kept is not None
    assert mask.kept.shape == (1, 2, visible)


def test_every_patch_is_hidden_equally_often() -> None:
    masked = RandomPatches(ratio=0.75).draw("mae", streams(4000), 2, (4, 4), CLOCK).masked
    assert (masked.float().mean(1) - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / 4000)
    agree = (masked[0] == masked[1]).float().mean()  # two crops of an image are masked independently
    assert abs(agree - (0.75**2 + 0.25**2)) < 0.02


def test_a_ratio_may_follow_a_schedule() -> None:
    sampler = RandomPatches(ratio={"linear": {"from": 0.5, "to": 0.75}})
    kept = [sampler.draw("mae", streams(1), 1, (4, 4), Clock(step, 10, 5)).kept for step in (0, 10)]
    assert [k.shape[-1] for k in kept if k is not None] == [8, 4]


# Context and target blocks


def as_rectangle(places: torch.Tensor, columns: int) -> tuple[int, int]:
    """Rows and columns of a rectangle of places; fails when they are none."""
    row, column = places // columns, places % columns
    height, width = int(row.max() - row.min()) + 1, int(column.max() - column.min()) + 1
    assert len(places) == len(set(places.tolist())) == height * width
    return height, width


@given(st.tuples(st.integers(2, 16), st.integers(2, 16)), st.integers(0, 10**6), seeds)
def test_targets_are_blocks_of_one_size_and_the_context_has_none_of_them(grid, step: int, seed: int) -> None:
    sampler = MultiBlockMasks()
    mask = sampler.draw("m", streams(5, seed), 2, grid, Clock(step, 2 * 10**6, 5))
    assert mask.kept is not None and mask.blocks is not None
    assert mask.blocks.shape[:3] == (2, 5, 4)
    sides = {as_rectangle(block, grid[1]) for block in mask.blocks.flatten(0, 2)}
    target, context = sampler.sides("m", grid, step)
    assert sides == {target}
    assert mask.kept.shape[2] == sampler.count(grid, target, context) >= 1
    for kept, blocks in zip(mask.kept.flatten(0, 1), mask.blocks.flatten(0, 1), strict=True):
        assert not set(kept.tolist()) & set(blocks.flatten().tolist())
        rows, columns = kept // grid[1], kept % grid[1]
        assert rows.max() - rows.min() < context[0] and columns.max() - columns.min() < context[1]
    rebuilt = torch.ones(2, 5, grid[0] * grid[1], dtype=torch.bool).scatter(-1, mask.kept, False)
    assert torch.equal(mask.masked, rebuilt)
    check_consistent(mask)


def test_sizes_of_blocks_are_those_of_the_paper_and_the_context_is_a_function_of_the_grid() -> None:
    sampler = MultiBlockMasks()
    drawn = [sampler.sides("m", (14, 14), step) for step in range(400)]
    assert {sampler.count((14, 14), *sides) for sides in drawn} == {round(0.3 * 196)}
    targets, contexts = {target for target, _ in drawn}, {context for _, context in drawn}
    assert contexts == {(13, 13), (14, 14)}  # sqrt(196 * 0.85) = 12.9
    # Rounding a side to whole patches moves an area by at most about one side.
    assert all(0.15 * 196 - 6 < rows * columns < 0.2 * 196 + 6 for rows, columns in targets)
    assert all(0.75 / 1.3 < rows / columns < 1.5 * 1.3 for rows, columns in targets)
    assert len(targets) > 5


def test_few_placements_are_refused_and_targets_lie_everywhere() -> None:
    sampler, same = MultiBlockMasks(), []
    for step in range(20):
        mask = sampler.draw("m", streams(300), 1, (14, 14), Clock(step, 20, 20))
        (height, width), _ = sampler.sides("m", (14, 14), step)
        drawn = streams(300).uniform("m/places", 1, 16, 5, 2)[:, 0, 0, 1:].double()  # of the first placement
        starts = (drawn * torch.tensor([15 - height, 15 - width])).floor() @ torch.tensor([14.0, 1.0]).double()
        same.append((mask.blocks[0, :, :, 0] == starts).all(1).float().mean())
    assert 0.95 < torch.stack(same).mean() < 1
    often = torch.bincount(mask.blocks[0, :, :, 0].flatten(), minlength=196) / (300 * 4)
    possible = (15 - height) * (15 - width)
    assert int((often > 0).sum()) == possible and float(often.max()) < 2.5 / possible


def test_an_impossible_placement_ends_in_targets_over_each_other() -> None:
    """The context wants nearly all that one target leaves: only targets in one place leave that much."""
    sampler = MultiBlockMasks(seen=0.75, context_scale=(1.0, 1.0))
    mask = sampler.draw("m", streams(200), 1, (8, 8), CLOCK)
    target, context = sampler.sides("m", (8, 8), CLOCK.step)
    assert mask.kept.shape[2] == sampler.count((8, 8), target, context) == 48
    assert (mask.blocks == mask.blocks[:, :, :1]).all((2, 3)).float().mean() > 0.5


# Words

captions = st.lists(
    st.tuples(st.lists(st.sampled_from([0, 1, 267, 49405]), max_size=9), st.booleans()), min_size=1, max_size=6
)


def encoded(words: list[list[int]], ended: list[bool]) -> torch.Tensor:
    """Token ids (B, T): begin, words, end unless the caption was cut, zeros."""
    rows = [[BEGIN, *some, *([END] if whole else [])] for some, whole in zip(words, ended, strict=True)]
    length = max(map(len, rows))
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


@given(captions, st.floats(0.01, 1), seeds)
def test_words_hidden_are_words_and_as_many_as_asked(
    drawn: list[tuple[list[int], bool]], share: float, seed: int
) -> None:
    words, ended = [some for some, _ in drawn], [whole for _, whole in drawn]
    tokens = encoded(words, ended)
    mask = RandomWords(share=share).draw("mlm", streams(len(words), seed), tokens, CLOCK)
    for row, some, whole in zip(mask.masked, words, ended, strict=True):
        # Zeros at the end of a caption that was cut cannot be told from padding.
        length = len(some) if whole else max((k + 1 for k, word in enumerate(some) if word), default=0)
        assert not row[0]
        assert not row[1 + length :].any()
        assert int(row.sum()) == min(length, max(1, round(float(torch.tensor(share)) * length)))
    check_consistent(mask)


def test_every_word_is_hidden_equally_often() -> None:
    tokens = encoded([[5, 0, 7, 8, 9]] * 4000, [True] * 4000)
    often = RandomWords(share=0.2).draw("mlm", streams(4000), tokens, CLOCK).masked.float().mean(0)
    assert often[0] == often[-1] == 0
    assert (often[1:-1] - 0.2).abs().max() < 5 * math.sqrt(0.2 * 0.8 / 4000)


def test_a_share_of_zero_hides_nothing() -> None:
    assert not RandomWords(share=0).draw("mlm", streams(2), encoded([[1, 2], [3]], [True] * 2), CLOCK).masked.any()


# Whose chance it is


def test_an_example_keeps_its_masks_in_any_batch() -> None:
    everyone, some = streams(12), torch.tensor([7, 2, 10])
    few = Chance(everyone.keys[some])
    tokens = encoded([list(range(1, 2 + k)) for k in range(12)], [True] * 12)
    for sampler in (BlockMasks(share=0.7), RandomPatches(), MultiBlockMasks()):
        whole = sampler.draw("m", everyone, 2, (7, 9), CLOCK)
        part = sampler.draw("m", few, 2, (7, 9), CLOCK)
        assert torch.equal(part.masked, whole.masked[:, some])
        if whole.blocks is not None:
            assert torch.equal(part.blocks, whole.blocks[:, some])
    whole = RandomWords(share=0.4).draw("m", everyone, tokens, CLOCK).masked
    shorter = tokens[[7, 2]][:, :10]  # a batch of shorter captions is padded less
    part = RandomWords(share=0.4).draw("m", Chance(everyone.keys[[7, 2]]), shorter, CLOCK).masked
    assert torch.equal(part, whole[[7, 2]][:, :10])


@pytest.mark.parametrize("sampler", [BlockMasks(share=1.0), RandomPatches(), MultiBlockMasks()])
def test_masks_of_different_names_differ(sampler: BlockMasks | RandomPatches) -> None:
    one, two = (sampler.draw(name, streams(4), 1, (8, 8), CLOCK).masked for name in ("ibot", "mae"))
    assert not torch.equal(one, two)


# What a recipe may say


class Settings(BaseModel):
    masks: PatchMasks = BlockMasks()


@pytest.mark.parametrize(
    ("written", "sampler"),
    [
        ({"block": {"ratio": [0.2, 0.4], "share": 0.9}}, BlockMasks(ratio=(0.2, 0.4), share=0.9)),
        ({"block": None}, BlockMasks()),
        ("block", BlockMasks()),
        ({"multi_block": {"targets": 2}}, MultiBlockMasks(targets=2)),
        ({"random": {"ratio": 0.6}}, RandomPatches(ratio=Schedule.constant(0.6))),
    ],
)
def test_a_recipe_names_a_kind_of_mask(written: object, sampler: BlockMasks | RandomPatches) -> None:
    settings = Settings(masks=written)
    assert settings.masks == sampler
    assert Settings(**settings.model_dump(mode="json")) == settings
    assert settings.masks.on("local").view == "local"
    assert pickle.loads(pickle.dumps(settings.masks)) == sampler


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ({"blok": {}}, "did you mean 'block'"),
        ({"block": {"ratio": [0.5, 0.1]}}, r"write \[low, high\]"),
        ({"block": {"ratio": [0.1, 1.5]}}, "at most 1, not 1.5"),
        ({"block": {"shares": 0.5}}, "did you mean 'block.share'"),
        ({"block": {"view": "global"}}, "leave `view` out"),
        ({"random": {"ratio": 1.5}}, "from 0 to 1"),
        ({"block": {}, "random": {}}, "one kind"),
        (0.5, "one kind"),
    ],
)
def test_a_wrong_mask_is_explained(written: object, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        Settings(masks=written)
