"""What a look at a source tells: counts, sizes, captions, labels, and what is bad and why."""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor

from harmony.data.captions import Tokenizer
from harmony.data.decode import MAX_PIXELS, decode
from harmony.data.sheet import Picture, check_place, draw_sheet, thumbnail
from harmony.data.sources import Source, SourceOptions, open_source, parse_uri
from harmony.data.sources.base import BadExample, spread
from harmony.data.sources.index_cache import cache_places
from harmony.data.sources.places import find_files
from harmony.data.sources.shards import ShardSource
from harmony.data.workers import cores

LOOKED_AT = 1000
"""Examples read and decoded unless told otherwise, spread evenly over the data."""

NO_CLASS = "no class"
"""What pixels that a mask leaves out are called."""

_PICTURES = 24
_SHOWN = 20
"""Classes that are named; of masks, all are counted."""


@dataclass
class Inspection:
    """What was found in a source.

    Attributes:
        uri: the source.
        examples: how many it has.
        looked_at: how many of them were read and decoded; everything below but `problems` is of these.
        widths, heights, file_sizes: of the good ones, in pixels and bytes (no bytes for generated images).
        captions_each: number of captions of each one that could be read, whether its image is good or not.
        damaged_captions: how many of their captions have bytes that are not UTF-8, each read as U+FFFD.
        words, tokens: lengths of their captions; tokens include begin and end and are not cut.
        labels: class (or its index, when its name is not known) -> count.
        mask_pixels: class of pixels -> count, over all masks; `NO_CLASS` for those without.
        things: class of things -> count, crowds among them.
        things_each: number of things on each image, for sources that have things.
        crowds: how many of the things are crowds.
        object_masks: whether things have masks.
        has_captions: whether some example has a caption, read or not.
        fields: where captions might be, as the source saw it.
        bad: (key, reason) of those that cannot be used.
        problems: what is wrong with the source as a whole.
        pictures: a few of the good ones, small.
    """

    uri: str
    examples: int
    looked_at: int
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    file_sizes: list[int] = field(default_factory=list)
    captions_each: list[int] = field(default_factory=list)
    damaged_captions: int = 0
    words: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    mask_pixels: dict[str, int] = field(default_factory=dict)
    things: dict[str, int] = field(default_factory=dict)
    things_each: list[int] = field(default_factory=list)
    crowds: int = 0
    object_masks: bool = False
    has_captions: bool = False
    fields: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


@dataclass(frozen=True)
class _Look:
    """One example, read."""

    key: str
    size: tuple[int, int] = (0, 0)
    bytes: int | None = None
    captions: Sequence[str] | None = None
    label: int | None = None
    mask: NDArray[np.int64] | None = None  # pixels of each value
    things: NDArray[np.int64] | None = None
    crowds: int = 0
    bad: str | None = None
    small: Tensor | None = None


def inspect(
    uri: str, options: SourceOptions | None = None, most: int | None = LOOKED_AT, max_pixels: int = MAX_PIXELS
) -> Inspection:
    """Look at a source.

    Args:
        uri: the data.
        options: how it is to be opened.
        most: how many examples are read and decoded; all of them when None.
        max_pixels: largest image that is not bad.

    Raises:
        UserError: nothing is there, or it is not what the URI says.
    """
    source = open_source(uri, options)
    chosen = spread(len(source), most or len(source))
    shown = {chosen[i] for i in spread(len(chosen), _PICTURES)}
    with ThreadPoolExecutor(min(8, cores())) as pool:
        looks = list(pool.map(lambda i: _look(source, i, max_pixels, i in shown), chosen))
    good = [look for look in looks if look.bad is None]
    captions_each = [look.captions for look in looks if look.captions is not None]
    captions = [caption for several in captions_each for caption in several]
    names = dict(enumerate(source.class_names or []))
    labels = Counter(look.label for look in good if look.label is not None)
    return Inspection(
        uri=uri,
        examples=len(source),
        looked_at=len(looks),
        widths=[look.size[0] for look in good],
        heights=[look.size[1] for look in good],
        file_sizes=[look.bytes for look in good if look.bytes is not None],
        captions_each=[len(several) for several in captions_each],
        damaged_captions=sum("\ufffd" in caption for caption in captions),
        words=[len(caption.split()) for caption in captions],
        tokens=Tokenizer().lengths(captions),
        labels={names.get(one, str(one)): count for one, count in sorted(labels.items())},
        mask_pixels=_mask_pixels(source, [look.mask for look in good if look.mask is not None]),
        things=_things(source, [look.things for look in good if look.things is not None]),
        things_each=[len(look.things) for look in good if look.things is not None],
        crowds=sum(look.crowds for look in good),
        object_masks=source.has_object_masks,
        has_captions=bool(captions) or source.has_captions(),
        fields=source.caption_fields(),
        bad=[(_printable(look.key), look.bad) for look in looks if look.bad is not None],
        problems=[_printable(problem) for problem in source.problems()],
        pictures=[_picture(look.small, look, names) for look in good if look.small is not None],
    )


def _mask_pixels(source: Source, masks: Sequence[NDArray[np.int64]]) -> dict[str, int]:
    """Pixels of each class of a source, those of no class last; nothing where there are no masks."""
    if not masks or source.mask_names is None:
        return {}
    pixels = np.zeros(max(source.mask_ignore + 1, *(len(counts) for counts in masks)), dtype=np.int64)
    for counts in masks:
        pixels[: len(counts)] += counts
    return {**_named(source.mask_names, pixels), NO_CLASS: int(pixels[source.mask_ignore])}


def _things(source: Source, labels: Sequence[NDArray[np.int64]]) -> dict[str, int]:
    """Things of each class that has some."""
    names = source.object_names or []
    counts = np.bincount(np.concatenate(labels), minlength=len(names)) if labels else np.zeros(0, dtype=np.int64)
    return {name: count for name, count in _named(names, counts).items() if count}


def _named(names: Sequence[str], counts: NDArray[np.int64]) -> dict[str, int]:
    """Counts by name; classes of one name are counted together."""
    named: dict[str, int] = {}
    for name, count in zip(names, counts.tolist(), strict=False):
        named[name] = named.get(name, 0) + count
    return named


def _picture(small: Tensor, look: _Look, names: Mapping[int, str]) -> Picture:
    if look.captions:
        return Picture(small, look.captions[0])
    return Picture(small, _printable(look.key) if look.label is None else names.get(look.label, f"class {look.label}"))


def _printable(key: str) -> str:
    """A key without what stands for bytes that are no text."""
    return key.encode("utf-8", "replace").decode()


def _look(source: Source, i: int, max_pixels: int, shown: bool) -> _Look:
    try:
        example = source[i]
    except BadExample as error:
        return _Look(error.key, bad=error.reason)
    try:
        pixels = decode(example.image, max_pixels, example.key)
    except BadExample as error:
        return _Look(error.key, captions=example.captions, bad=error.reason)
    return _Look(
        key=example.key,
        size=(pixels.shape[2], pixels.shape[1]),
        bytes=len(example.image) if isinstance(example.image, bytes) else None,
        captions=example.captions,
        label=example.label,
        mask=None if example.mask is None else np.bincount(example.mask.ravel()),
        things=None if example.objects is None else example.objects.labels,
        crowds=0 if example.objects is None else int(example.objects.crowd.sum()),
        small=thumbnail(pixels) if shown else None,
    )


def show(
    uri: str,
    sheet: Path | None = None,
    options: SourceOptions | None = None,
    most: int | None = LOOKED_AT,
    console: Console | None = None,
) -> Inspection:
    """Look at a source, print what was found, and draw a sheet of its images when a file is named for it."""
    if sheet is not None:
        check_place(sheet)
    found = inspect(uri, options, most)
    console = console or Console(highlight=False)
    console.print(Text(uri, "bold"), soft_wrap=True)
    console.print(table(found))
    if sheet is not None:
        draw_sheet(found.pictures, sheet)
        console.print(Text(f"{len(found.pictures)} images on {sheet}"), soft_wrap=True)
    return found


def table(found: Inspection) -> Table:
    """What was found, to be printed."""
    rows = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    rows.add_column(style="cyan", no_wrap=True)
    rows.add_column(overflow="fold")
    for name, value in _facts(found):
        rows.add_row(name, Text(value))
    for problem in found.problems:
        rows.add_row("problem", Text(problem, "yellow"))
    for reason, count, key in _reasons(found.bad):
        rows.add_row("bad", Text(f"{count} x {reason}, as {key}", "red"))
    return rows


def _facts(found: Inspection) -> list[tuple[str, str]]:
    good = len(found.widths)
    facts = [("examples", f"{found.examples:,}")]
    if found.looked_at < found.examples:
        facts.append(("looked at", f"{found.looked_at:,}, spread evenly"))
    facts.append(("good", f"{good:,} of {found.looked_at:,}"))
    if good:
        facts.append(("width", _range(found.widths, " px")))
        facts.append(("height", _range(found.heights, " px")))
    if found.file_sizes:
        facts.append(("file size", _range([round(size / 1000) for size in found.file_sizes], " kB")))
    without = found.captions_each.count(0)
    if found.words:
        facts.append(("captions", f"{len(found.words):,}; {_range(found.captions_each)} an image; {without:,} without"))
        if found.damaged_captions:
            facts.append(("damaged captions", f"{found.damaged_captions:,} with bytes that are not UTF-8"))
        facts.append(("words", _range(found.words)))
        longer = sum(length > Tokenizer.context for length in found.tokens)
        facts.append(("tokens", f"{_range(found.tokens)}; {longer:,} longer than {Tokenizer.context}"))
    elif found.has_captions:
        facts.append(("captions", "none of the examples that could be read, but others have some"))
    else:
        facts.append(("captions", f"none; seen: {', '.join(found.fields) or 'only images'}"))
    if found.labels:
        facts.append(("classes", f"{len(found.labels)}: {_shown(found.labels, '{:,}')}"))
    if found.mask_pixels:
        total = sum(found.mask_pixels.values())
        shares = {name: 100 * count / total for name, count in found.mask_pixels.items()}
        seen = sum(count > 0 for name, count in found.mask_pixels.items() if name != NO_CLASS)
        facts.append(
            ("mask classes", f"{len(shares) - 1}, {seen} seen; pixels: {_shown(shares, '{:.1f} %', NO_CLASS)}")
        )
    if found.things_each:
        masks = "with masks" if found.object_masks else "boxes alone"
        total = sum(found.things_each)
        facts.append(("things", f"{total:,} ({masks}); {_range(found.things_each)} an image; {found.crowds:,} crowds"))
        facts.append(("thing classes", f"{len(found.things)}: {_shown(found.things, '{:,}')}"))
    return facts


def _shown(values: Mapping[str, float], form: str, always: str = "") -> str:
    """Names with their values, the first of them and the one that is always shown."""
    kept = [name for name in values if name != always][:_SHOWN] + [name for name in values if name == always]
    return ", ".join(f"{name} {form.format(values[name])}" for name in kept) + (
        ", ..." if len(kept) < len(values) else ""
    )


def _range(values: Sequence[int], unit: str = "") -> str:
    """Smallest, middle and largest in words."""
    low, high = min(values), max(values)
    middle = int(torch.tensor(values).median())
    return f"{low:,}{unit}" if low == high else f"{low:,} to {high:,}{unit}, median {middle:,}"


def _reasons(bad: Sequence[tuple[str, str]]) -> list[tuple[str, int, str]]:
    """(reason, how often, one key), the most frequent first."""
    first = {reason: key for key, reason in reversed(bad)}
    return [(reason, count, first[reason]) for reason, count in Counter(reason for _, reason in bad).most_common(20)]


@dataclass(frozen=True)
class Indexed:
    """What indexing did: how many shards and examples there are, and where the index of the first shard lies."""

    shards: int
    examples: int
    place: Path | None
    problems: list[str]


def index(uri: str, console: Console | None = None) -> Indexed:
    """Build the index of all shards up front, so that a run begins at once; other kinds need none and are only opened.

    Raises:
        UserError: nothing is there, or it is not what the URI says.
    """
    kind, place, query = parse_uri(uri)
    if kind != "shards":
        source = open_source(uri)
        return Indexed(0, len(source), None, source.problems())
    paths = find_files(place, uri, "shards", ".tar")
    with Progress(console=console or Console(), transient=True) as progress:
        task = progress.add_task("indexing", total=len(paths))
        source = ShardSource(
            place, SourceOptions().overridden(query), uri, lambda done, total: progress.update(task, completed=done)
        )
    where = next((cached for cached in cache_places(paths[0]) if cached.exists()), None)
    return Indexed(len(paths), len(source), where, source.problems())


def show_index(uri: str, console: Console | None = None) -> Indexed:
    """Build the index of a source and say what was done."""
    console = console or Console(highlight=False)
    done = index(uri, console)
    if done.shards == 0:
        console.print(Text(f"{done.examples:,} examples; this kind of data needs no index."))
    else:
        where = f"index of the first: {done.place}" if done.place else "the index could not be kept anywhere"
        console.print(
            Text(f"{done.shards:,} shards with {done.examples:,} examples are indexed; {where}"), soft_wrap=True
        )
    for problem in done.problems:
        console.print(Text(problem, "yellow"))
    return done
