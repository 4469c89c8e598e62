"""The loader's promises: the same batches whoever makes them, every example once, and a clear end to bad data."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from itertools import islice, pairwise
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import encoded, pairs, picture, png, write_pairs, write_tar
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from harmony.chance import Chance
from harmony.data.batch import Batch, Mask
from harmony.data.captions import Tokenizer
from harmony.data.cutting import Cutter
from harmony.data.decode import Opened, decode
from harmony.data.loader import PairLoader
from harmony.data.masks import BlockMasks, RandomPatches, RandomWords
from harmony.data.photometric import PhotometricConfig, augment
from harmony.data.settings import DataConfig
from harmony.data.sources import Example, Source, open_source
from harmony.data.sources.base import Objects
from harmony.data.views import ViewConfig
from harmony.errors import UserError
from harmony.schedules import Clock, Schedule

VIEWS = {
    "global": ViewConfig(count=2, size=32, scale=(0.3, 1.0), photometric=["dino_first", "dino_second"]),
    "local": ViewConfig(count=3, size=16, scale=(0.05, 0.3), photometric="dino_local"),
}
MASKS = {
    "block": BlockMasks(view="global"),
    "random": RandomPatches(view="global"),
    "words": RandomWords(share=Schedule(shape="linear", start=0.0, stop=1.0)),
}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def loader(source: Source | str, *, batch_size: int = 6, steps: int = 8, seed: int = 0, **settings: Any) -> PairLoader:
    """A loader with `settings` of its own or of DataConfig."""
    data = {name: settings.pop(name) for name in list(settings) if name in DataConfig.model_fields}
    settings = {"views": VIEWS, "tokenizer": Tokenizer(), "masks": MASKS, "patch": 8} | settings
    return PairLoader(
        source if isinstance(source, Source) else open_source(source),
        DataConfig(batch_size=batch_size, **{"workers": 0, **data}),
        mean=MEAN,
        std=STD,
        seed=seed,
        steps=steps,
        **settings,
    )


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor and text in a batch, with its place."""
    if isinstance(value, Batch | Mask | Chance):
        for field in fields(value):
            yield from flat(getattr(value, field.name), f"{name}.{field.name}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from flat(item, f"{name}[{key}]")
    else:
        yield name, value


def assert_equal(one: Batch, other: Batch) -> None:
    """Bit for bit."""
    ones, others = dict(flat(one)), dict(flat(other))
    assert ones.keys() == others.keys()
    for name, value in ones.items():
        if isinstance(value, Tensor):
            assert value.dtype == others[name].dtype, name
            assert torch.equal(value, others[name]), name
        else:
            assert value == others[name], name


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """20 pairs with three captions each."""
    return write_pairs(tmp_path_factory.mktemp("pairs"), 20, shards=2, captions=3)


@pytest.mark.parametrize(("place", "starts"), [("worker", (0, 5)), ("device", (0, 1, 5))])
def test_workers_and_the_place_to_begin_do_not_change_a_batch(uri: str, place: str, starts: tuple[int, ...]) -> None:
    expected = list(loader(uri, augment=place).batches())
    assert len(expected) == 8
    for start in starts:
        for workers in (0, 1, 2):
            made = list(loader(uri, augment=place, workers=workers).batches(start))
            assert len(made) == 8 - start
            for one, other in zip(expected[start:], made, strict=True):
                assert_equal(one, other)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_generator_of_the_process_is_left_alone(uri: str, workers: int) -> None:
    before = torch.get_rng_state()
    list(loader(uri, steps=2, workers=workers).batches())
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_do_not_change_a_batch(uri: str) -> None:
    """The mean brightness of a large crop, which contrast needs, comes out differently on several threads."""
    large = {"large": ViewConfig(size=256, photometric=PhotometricConfig(jitter=1.0, contrast=0.9))}
    settings: dict[str, Any] = {"views": large, "masks": {}, "batch_size": 1, "steps": 20}
    expected = list(loader(uri, **settings).batches())
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for one, other in zip(expected, loader(uri, **settings).batches(), strict=True):
            assert_equal(one, other)
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_every_field_is_as_documented(uri: str) -> None:
    source = open_source(uri)
    for place, dtype in (("worker", torch.float32), ("device", torch.uint8)):
        batch = next(loader(source, augment=place).batches())
        assert len(batch) == len(batch.keys) == len(set(batch.keys)) == 6
        assert set(batch.keys) <= {source.key(i) for i in range(20)}
        assert batch.chance.keys.shape == (6,)
        for name, view in VIEWS.items():
            assert batch.images[name].shape == (view.count, 6, 3, view.size, view.size)
            assert batch.images[name].dtype == dtype
            assert batch.boxes[name].shape == (view.count, 6, 4)
            left, top, width, height = batch.boxes[name].unbind(-1)
            assert (left >= 0).all()
            assert (left + width <= 1 + 1e-6).all()
            assert (top + height <= 1 + 1e-6).all()
            assert ((width * height > 0) & (width * height <= 1)).all()
            assert batch.flips[name].shape == (view.count, 6)
            assert batch.flips[name].dtype == torch.bool
        assert torch.equal(batch.captions["caption"], Tokenizer().encode(batch.texts["caption"]))
        assert {name: mask.masked.shape for name, mask in batch.masks.items()} == {
            "block": (2, 6, 16),
            "random": (2, 6, 16),
            "words": tuple(batch.captions["caption"].shape),
        }
        assert batch.skipped == []
        assert not any(value.requires_grad for _, value in flat(batch) if isinstance(value, Tensor))


def test_captions_and_images_belong_to_the_keys(uri: str) -> None:
    whole = {"whole": ViewConfig(size=32, ratio=(40 / 32, 40 / 32), flip=0.0)}
    for batch in loader(uri, views=whole, masks={}, augment="device").batches():
        for b, key in enumerate(batch.keys):
            assert batch.texts["caption"][b].endswith(f" of picture {int(key)}")
            resized = F.interpolate(decode(png(int(key)))[None], (32, 32), mode="bicubic", antialias=True)
            assert torch.equal(batch.images["whole"][0, b], resized[0])


def test_a_batch_is_made_of_what_each_example_gives_alone(uri: str) -> None:
    """More examples than are decoded at once; the parts are made here one by one from the same streams."""
    source = open_source(uri)
    made = next(loader(source, batch_size=20, augment="device").batches())
    for b, key in enumerate(made.keys):
        chance = Chance.of_examples(0, 0, torch.tensor([int(key)]))
        assert torch.equal(made.chance.keys[b : b + 1], chance.keys)
        alone, image = Cutter(chance, VIEWS), decode(png(int(key)))
        alone.place([0], [image.shape[1:]])
        alone.cut(0, image)
        for name in VIEWS:
            assert torch.equal(made.images[name][:, b : b + 1], alone.images[name])
            assert torch.equal(made.boxes[name][:, b : b + 1], alone.relative_boxes()[name])
            assert torch.equal(made.flips[name][:, b : b + 1], alone.flips[name])
        clock = Clock(0, 8, 1)
        assert torch.equal(
            made.masks["block"].masked[:, b : b + 1], MASKS["block"].draw("block", chance, 2, (4, 4), clock).masked
        )


def test_augmenting_on_the_device_later_gives_what_the_worker_gives(uri: str) -> None:
    for here, later in zip(
        loader(uri, steps=2).batches(), loader(uri, steps=2, augment="device").batches(), strict=True
    ):
        assert_equal(here, augment(later, VIEWS, MEAN, STD))


def test_an_epoch_shows_every_example_once_in_an_order_of_its_own(uri: str) -> None:
    made = loader(uri, batch_size=6, steps=9)
    assert made.epoch_steps == 3  # two examples of each epoch are left out
    epochs = [[], [], []]
    for step, batch in enumerate(made.batches()):
        epochs[step // 3] += batch.keys
    assert all(len(set(keys)) == 18 for keys in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert sorted(set(epochs[0] + epochs[1] + epochs[2])) == [f"{number:05d}" for number in range(20)]
    assert made.seen == 20
    other = [key for batch in loader(uri, steps=3, seed=1).batches() for key in batch.keys]
    assert other != epochs[0]


class Empty(Source):
    """A number of examples, none of which can be read."""

    def __init__(self, count: int) -> None:
        self.uri, self.count = "empty:", count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Example:
        raise NotImplementedError

    def key(self, i: int) -> str:
        return str(i)

    def fingerprint(self) -> str:
        return str(self.count)


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 30), st.integers(0, 40), st.integers(0, 9)
)
def test_slots_cut_every_epoch_into_equal_slices(
    ranks: int, accumulate: int, part: int, more: int, step: int, seed: int
) -> None:
    batch_size = ranks * accumulate * part
    source = Empty(batch_size + more)
    loaders = [
        loader(
            source,
            batch_size=batch_size,
            seed=seed,
            accumulate=accumulate,
            rank=r,
            ranks=ranks,
            tokenizer=None,
            masks={},
        )
        for r in range(ranks)
    ]
    slots = [made.slot(step, one) for one in range(accumulate) for made in loaders]
    examples = torch.cat([slot.examples for slot in slots])
    epoch, inside = divmod(step, len(source) // batch_size)
    assert all(len(slot.examples) == part for slot in slots)
    assert torch.equal(examples, loaders[0].order(epoch)[inside * batch_size : (inside + 1) * batch_size])
    assert torch.equal(torch.cat([slot.streams for slot in slots]), Chance.of_examples(seed, epoch, examples).keys)


def test_orders_are_permutations_without_preference(uri: str) -> None:
    made = loader(uri)
    orders = torch.stack([made.order(epoch) for epoch in range(2000)])
    assert (orders.sort(1).values == torch.arange(20)).all()
    share = (orders[:, 0, None] == torch.arange(20)).float().mean(0)  # how often each comes first
    assert ((share - 0.05).abs() < 5 * (0.05 * 0.95 / 2000) ** 0.5).all()


def test_the_order_of_the_source_can_be_kept(uri: str) -> None:
    keys = [batch.keys for batch in loader(uri, shuffle=False, steps=4).batches()]
    expected = [f"{number:05d}" for number in range(18)]
    assert keys[0] + keys[1] + keys[2] == expected
    assert keys[3] == keys[0]


def test_an_example_meets_other_chances_each_epoch(uri: str) -> None:
    drawn: dict[str, list[Tensor]] = {}
    for batch in loader(uri, batch_size=20, steps=3, masks={}, augment="device").batches():
        for b, key in enumerate(batch.keys):
            drawn.setdefault(key, []).append(batch.boxes["global"][:, b])
    assert all(not torch.equal(one, other) for boxes in drawn.values() for one, other in pairwise(boxes))


def joined(batches: list[Batch]) -> dict[str, Any]:
    """The batches of several ranks or parts as one: names -> what does not depend on the longest caption of a part."""
    names = VIEWS
    return {
        "keys": [key for batch in batches for key in batch.keys],
        "texts": [text for batch in batches for text in batch.texts["caption"]],
        "chance": torch.cat([batch.chance.keys for batch in batches]),
        **{f"images {name}": torch.cat([batch.images[name] for batch in batches], 1) for name in names},
        **{f"boxes {name}": torch.cat([batch.boxes[name] for batch in batches], 1) for name in names},
        **{f"flips {name}": torch.cat([batch.flips[name] for batch in batches], 1) for name in names},
        **{
            f"mask {name}": torch.cat([batch.masks[name].masked for batch in batches], 1)
            for name in ("block", "random")
        },
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name], name


@pytest.mark.parametrize(("ranks", "accumulate"), [(2, 1), (1, 3), (2, 3), (3, 2)])
def test_ranks_and_parts_joined_are_the_batch_of_one_process(uri: str, ranks: int, accumulate: int) -> None:
    settings: dict[str, Any] = {"batch_size": 12, "steps": 3}
    whole = list(loader(uri, **settings).batches())
    parts = list(loader(uri, **settings, accumulate=accumulate).batches())
    slices = [
        list(loader(uri, **settings, accumulate=accumulate, rank=rank, ranks=ranks).batches()) for rank in range(ranks)
    ]
    assert all(len(one) == 3 * accumulate for one in [parts, *slices])
    for step in range(3):
        inside = range(step * accumulate, (step + 1) * accumulate)
        assert_same(joined([whole[step]]), joined([parts[part] for part in inside]))
        for part in inside:
            assert_same(joined([parts[part]]), joined([one[part] for one in slices]))


def test_chance_by_position_is_the_same_on_every_rank_and_new_each_step(uri: str) -> None:
    streams = [
        [
            batch.chance.keys
            for batch in loader(uri, batch_size=12, steps=3, chance="position", rank=r, ranks=2).batches()
        ]
        for r in range(2)
    ]
    for mine, yours in zip(*streams, strict=True):
        assert torch.equal(mine, yours)
    assert len(set(torch.cat(streams[0]).tolist())) == 18


def test_each_caption_of_an_image_is_drawn_equally_often(uri: str) -> None:
    made = loader(uri, batch_size=20, steps=60, views={"tiny": ViewConfig(size=8)}, masks={}, augment="device")
    drawn = torch.tensor([int(text.split()[1]) for batch in made.batches() for text in batch.texts["caption"]])
    share = torch.bincount(drawn) / len(drawn)
    assert len(drawn) == 1200
    assert ((share - 1 / 3).abs() < 5 * (2 / 9 / 1200) ** 0.5).all()


def test_masks_follow_the_clock_of_the_run(uri: str) -> None:
    """The share of hidden words rises from nothing to all."""
    hidden = [float(batch.masks["words"].masked.sum() / 6) for batch in loader(uri, steps=8).batches()]
    assert hidden[0] == 0
    assert hidden == sorted(hidden)
    assert hidden[-1] > 3


class Labelled(Source):
    """Another source whose examples carry labels and more besides."""

    def __init__(self, source: Source) -> None:
        self.uri, self._source = source.uri, source
        self.class_names = ["a", "b"]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> Example:
        numbers = np.full(2, 987)
        boxes, areas = np.full((2, 4), 987, dtype=np.float32), numbers.astype(np.float32)
        objects = Objects(boxes, numbers.astype(np.int64), numbers > 0, areas, image_id=987)
        mask = np.full((32, 32), 987, dtype=np.uint16)
        return replace(self._source[i], label=987_654_321 + i, mask=mask, objects=objects)

    def key(self, i: int) -> str:
        return self._source.key(i)

    def fingerprint(self) -> str:
        return "labelled"

    def has_captions(self) -> bool:
        return True


def test_no_label_enters_a_batch(uri: str) -> None:
    source = open_source(uri)
    for place in ("worker", "device"):
        for plain, labelled in zip(
            loader(source, augment=place).batches(), loader(Labelled(source), augment=place).batches(), strict=True
        ):
            assert_equal(plain, labelled)
            assert "987" not in repr([value for _, value in flat(labelled) if not isinstance(value, Tensor)])


def test_a_recipe_without_text_reads_no_captions(tmp_path: Path) -> None:
    members = [(f"{number}.png", png(number)) for number in range(8)]
    path = write_tar(tmp_path / "x.tar", members)
    made = loader(f"shards:{path}", tokenizer=None, masks={"block": MASKS["block"]})
    batch = next(made.batches())
    assert batch.captions == batch.texts == {}
    with pytest.raises(UserError, match="has a caption"):
        loader(f"shards:{path}")


def bad_members(count: int, bad: Mapping[int, str]) -> list[tuple[str, bytes]]:
    """Pairs of which some are bad in the given ways."""
    members = []
    for name, data in pairs(count):
        way = bad.get(int(name[:5]))
        if way == "caption":
            if name.endswith(".txt"):
                continue
        elif way and name.endswith(".png"):
            data = {"html": b"<html>", "cut": data[: len(data) // 2], "empty": b""}[way]
        members.append((name, data))
    return members


BAD = {3: "html", 8: "cut", 11: "empty", 17: "caption"}


@pytest.fixture(scope="module")
def bad_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"shards:{write_tar(tmp_path_factory.mktemp('bad') / 'x.tar', bad_members(20, BAD))}"


def test_bad_examples_are_replaced_counted_and_named(bad_uri: str) -> None:
    made = loader(bad_uri, batch_size=20, steps=2, max_bad_share=0.5)
    for batch in made.batches():
        assert len(batch.keys) == 20
        assert {int(key) for key in batch.keys}.isdisjoint(BAD)
        reasons = dict(batch.skipped)
        assert {int(key) for key in reasons} == set(BAD)
        assert reasons["00003"] == "is not an image (a web page)"
        assert reasons["00008"].startswith("is truncated")
        assert reasons["00011"] == "is empty (0 bytes)"
        assert reasons["00017"].startswith("has no caption in ")
    assert (made.seen, made.bad) == (20, 4)  # each counted once, though met in both epochs


def test_replacements_do_not_depend_on_workers_ranks_or_the_rest(bad_uri: str) -> None:
    settings: dict[str, Any] = {"batch_size": 10, "steps": 4, "max_bad_share": 0.5}
    whole = list(loader(bad_uri, **settings).batches())
    for other, expected in zip(loader(bad_uri, **settings, workers=2).batches(), whole, strict=True):
        assert_equal(other, expected)
    slices = [list(loader(bad_uri, **settings, rank=rank, ranks=2).batches()) for rank in range(2)]
    for step in range(4):
        assert_same(joined([whole[step]]), joined([one[step] for one in slices]))
        assert whole[step].skipped == slices[0][step].skipped + slices[1][step].skipped
    for other, expected in zip(loader(bad_uri, **settings).batches(2), whole[2:], strict=True):
        assert_equal(other, expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_examples_stop_the_run_and_say_why(bad_uri: str, workers: int) -> None:
    made = loader(bad_uri, batch_size=5, steps=100, max_bad_share=0.15, workers=workers)
    with pytest.raises(
        UserError, match=r"4 of the \d+ examples read from shards:.* are bad, .*max_bad_share=0.15"
    ) as error:
        list(made.batches())
    assert "a web page" in str(error.value) or "truncated" in str(error.value)
    assert len(list(loader(bad_uri, batch_size=5, steps=12, max_bad_share=0.2).batches())) == 12


def test_no_bad_example_at_all_may_be_asked_for(bad_uri: str) -> None:
    with pytest.raises(UserError, match=r"[1-4] of the \d+ examples"):
        list(loader(bad_uri, batch_size=5, max_bad_share=0.0).batches())


def test_a_few_bad_examples_early_on_do_not_stop_a_long_run(tmp_path: Path) -> None:
    """Three of the first five are bad, but of 200 that is little."""
    path = write_tar(tmp_path / "x.tar", bad_members(200, {0: "html", 1: "html", 2: "html"}))
    made = loader(f"shards:{path}", batch_size=5, steps=2, shuffle=False, views={"v": ViewConfig(size=8)}, masks={})
    assert sum(len(batch.skipped) for batch in made.batches()) >= 3


@pytest.mark.parametrize(("workers", "way", "reason"), [(0, "html", "not an image"), (1, "cut", "truncated")])
def test_data_that_is_bad_throughout_is_an_error_and_no_endless_search(
    tmp_path: Path, workers: int, way: str, reason: str
) -> None:
    path = write_tar(tmp_path / "x.tar", bad_members(6, dict.fromkeys(range(6), way)))
    made = loader(f"shards:{path}", batch_size=3, workers=workers, max_bad_share=1.0)
    with pytest.raises(UserError, match=rf"all 6 examples of .* are bad, the first: 0000\d: is {reason} .*; 0000"):
        next(made.batches())


class Broken(Labelled):
    """A source with a mistake in its program, or one that ends its process."""

    def __init__(self, source: Source, way: str) -> None:
        super().__init__(source)
        self.way = way

    def __getitem__(self, i: int) -> Example:
        if i == 7 and self.way == "mistake":
            raise ZeroDivisionError("a mistake")
        if i == 7 and self.way == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mistake_in_the_program_comes_out_as_itself(uri: str, workers: int) -> None:
    with pytest.raises(ZeroDivisionError, match="a mistake"):
        list(loader(Broken(open_source(uri), "mistake"), workers=workers, batch_size=20).batches())


def test_a_killed_worker_is_told_in_words(uri: str) -> None:
    with pytest.raises(RuntimeError, match=r"a data worker was killed, .*lower data\.workers"):
        list(loader(Broken(open_source(uri), "killed"), workers=1, batch_size=20).batches())


def test_workers_ignore_the_signals_that_the_trainer_handles(uri: str) -> None:
    expected = list(loader(uri, steps=9).batches())
    before = set(active_children())
    made = []
    batches = loader(uri, steps=9, workers=2).batches()
    made += islice(batches, 2)
    workers = set(active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        for name in ("INT", "TERM"):  # as they come from a terminal or a scheduler: not from the parent
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    made += batches
    for one, other in zip(expected, made, strict=True):
        assert_equal(one, other)


def test_workers_end_when_the_batches_are_closed(uri: str) -> None:
    before = set(active_children())
    batches = loader(uri, steps=1000, workers=2).batches()
    next(batches)
    workers = set(active_children()) - before
    assert len(workers) == 2
    batches.close()
    for worker in workers:
        worker.join(30)
        assert not worker.is_alive()


def test_a_process_that_ends_with_batches_open_takes_its_workers_along(uri: str) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from multiprocessing import active_children
from test_loader import loader
batches = loader({uri!r}, steps=1000, workers=2).batches()
next(batches)
print(*(worker.pid for worker in active_children()), flush=True)
raise KeyError
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    pids = ended.stdout.split()
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 21}, r"batch_size is 21, but .* has only 20 examples"),
        ({"batch_size": 6, "accumulate": 4}, r"batch_size=6 cannot be cut into train\.accumulate=4 equal parts; use 8"),
        ({"batch_size": 10, "ranks": 2, "accumulate": 2}, r"into 2 ranks times train\.accumulate=2 equal parts; use 8"),
        ({"batch_size": 1, "ranks": 2}, r"cannot be cut into 2 ranks .*; use 2"),
        (
            {"patch": 12},
            r"view 'global' has crops of 32 px, which is not a multiple of .* 12 px; use views\.global\.size=36",
        ),
        ({"patch": 32}, r"view 'local' has crops of 16 px, .* patch of 32 px; use views\.local\.size=32"),
        (
            {"masks": {"block": BlockMasks(view="globe")}},
            r"unknown view of the mask 'block': 'globe'; did you mean 'global'",
        ),
        ({"tokenizer": None}, "the mask 'words' hides words, but no captions are read"),
        ({"caption_key": "title"}, "looked in the json key 'title'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_at_once(uri: str, settings: dict[str, Any], message: str) -> None:
    key = settings.pop("caption_key", None)
    with pytest.raises(UserError, match=message):
        loader(f"{uri}?caption_key={key}" if key else uri, **settings)


def test_images_smaller_than_a_crop_are_enlarged(tmp_path: Path) -> None:
    members = [member for pair in zip(pairs(4), pairs(4), strict=True) for member in pair[:1]]
    tiny = [(name, png(0, (1, 1)) if name.endswith("png") else data) for name, data in members]
    batch = next(loader(f"shards:{write_tar(tmp_path / 'x.tar', tiny)}", batch_size=4, augment="device").batches())
    assert batch.images["global"].shape == (2, 4, 3, 32, 32)
    assert (batch.images["global"] == decode(png(0, (1, 1))).view(1, 1, 3, 1, 1)).all()


def test_large_photographs_are_decoded_smaller_whoever_makes_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = []
    for number in range(6):
        large = picture(number).resize((420, 330), Image.Resampling.BICUBIC)
        members += [(f"{number}.jpg", encoded(large, "JPEG")), (f"{number}.txt", b"a caption")]
    uri = f"shards:{write_tar(tmp_path / 'x.tar', members)}"
    views = {"global": ViewConfig(size=32, count=2, scale=(0.4, 1.0), photometric="dino_first")}
    settings: dict[str, Any] = {"views": views, "masks": {}, "batch_size": 6, "steps": 2, "augment": "device"}
    asked = []
    pixels = Opened.pixels

    def watched(self: Opened, reduction: int = 1) -> Tensor:
        asked.append(reduction)
        return pixels(self, reduction)

    monkeypatch.setattr(Opened, "pixels", watched)
    small = list(loader(uri, **settings).batches())
    assert len(asked) == 12
    assert set(asked) <= {4, 8}
    for one, other in zip(small, loader(uri, **settings, workers=1).batches(), strict=True):
        assert_equal(one, other)
    monkeypatch.setattr(Opened, "pixels", lambda self, reduction=1: pixels(self))
    for one, whole in zip(small, loader(uri, **settings).batches(), strict=True):
        assert torch.equal(one.flips["global"], whole.flips["global"])
        assert (one.boxes["global"] - whole.boxes["global"]).abs().max() <= 8 / 330
        assert (one.images["global"].int() - whole.images["global"].int()).abs().float().mean() < 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_sent_early_to_a_gpu_are_the_same(uri: str) -> None:
    for workers in (0, 1):
        sent = loader(uri, workers=workers, augment="device", device="cuda").batches()
        for here, there in zip(loader(uri, augment="device").batches(), sent, strict=True):
            assert there.images["global"].device.type == "cuda"
            assert_equal(here, there.to("cpu"))


def test_flickr8k_batches_are_the_same_whoever_makes_them(shared: Path) -> None:
    uri = f"shards:{shared}/data/captions/flickr8k/train-{{00000..00011}}.tar"
    expected = list(loader(uri, batch_size=24, steps=3).batches())
    for one, other in zip(expected, loader(uri, batch_size=24, steps=3, workers=2).batches(), strict=True):
        assert_equal(one, other)
    assert loader(uri, batch_size=96).epoch_steps == 62
    texts = [text for batch in expected for text in batch.texts["caption"]]
    assert len(set(texts)) > 60


def test_captions_are_changed_alike_whoever_makes_the_batch_and_nothing_else_is() -> None:
    def batches(**settings: Any) -> list[Batch]:
        return list(loader("scenes:train?count=12&size=32", steps=4, **settings).batches())

    plain, changed = batches(), batches(caption_augment={"delete": 0.3, "swap": 0.3})
    workers = batches(caption_augment={"delete": 0.3, "swap": 0.3}, workers=2)
    assert [batch.texts for batch in changed] == [batch.texts for batch in workers]
    for before, after in zip(plain, changed, strict=True):
        assert before.texts != after.texts
        assert torch.equal(after.captions["caption"], Tokenizer().encode(after.texts["caption"]))
        for text, new in zip(before.texts["caption"], after.texts["caption"], strict=True):
            assert set(new.split()) <= set(text.split())
        assert torch.equal(before.images["global"], after.images["global"])
        assert torch.equal(before.masks["block"].masked, after.masks["block"].masked)
