"""Where examples come from, named by a URI: `shards:`, `table:`, `folder:`, `coco:` and the other KINDS."""

import re
from collections.abc import Callable
from urllib.parse import parse_qsl

from harmony.data.sources.base import BadExample, Example, Source, SourceOptions
from harmony.errors import UserError, unknown

__all__ = ["KINDS", "BadExample", "Example", "Source", "SourceOptions", "open_source", "parse_uri"]

# A question mark may be a wildcard of a path, so only `?name=value` (and `&name=value`) at the end is a query.
_QUERY = re.compile(r"^(.*?)\?([a-z_]+=[^?]*)$", re.DOTALL)


def parse_uri(uri: str) -> tuple[str, str, dict[str, str]]:
    """Kind, place and settings of a data URI: `table:a.csv?caption_key=title` -> ("table", "a.csv", {...}).

    Raises:
        UserError: it names no kind of source, or an unknown one.
    """
    kind, colon, rest = uri.partition(":")
    if not colon or not re.fullmatch(r"[a-z_0-9]+", kind):
        raise UserError(f"{uri!r} does not say what kind of data it is; write {_guess(uri)}")
    if kind not in KINDS:
        raise unknown("kind of data", kind, KINDS)
    match = _QUERY.match(rest)
    if not match:
        return kind, rest, {}
    return kind, match[1], dict(parse_qsl(match[2], keep_blank_values=True))


def _guess(uri: str) -> str:
    ending = uri.rpartition(".")[2].lower()
    tables = dict.fromkeys(("csv", "tsv", "jsonl", "parquet"), "table")
    kind = {"tar": "shards", "npz": "npz", "json": "coco", "token": "flickr", **tables}.get(ending, "folder")
    return f"{kind}:{uri}"


def open_source(uri: str, options: SourceOptions | None = None) -> Source:
    """Open the examples that `uri` names.

    Args:
        uri: `shards:train-{00000..00011}.tar`, `table:pairs.csv`, `folder:path`, ..., with settings behind a question
            mark if need be: the fields of SourceOptions for these three, the kind's own for others.
        options: settings that hold where the URI says nothing.

    Raises:
        UserError: nothing is there, or it is not what the URI says.
    """
    kind, place, query = parse_uri(uri)
    return KINDS[kind](place, query, options or SourceOptions(), uri)


def _shards(place: str, query: dict[str, str], options: SourceOptions, uri: str) -> Source:
    from harmony.data.sources.shards import ShardSource

    return ShardSource(place, options.overridden(query), uri)


def _table(place: str, query: dict[str, str], options: SourceOptions, uri: str) -> Source:
    from harmony.data.sources.tables import TableSource

    return TableSource(place, options.overridden(query), uri)


def _folder(place: str, query: dict[str, str], options: SourceOptions, uri: str) -> Source:
    from harmony.data.sources.folders import FolderSource

    return FolderSource(place, options.overridden(query), uri)


def _npz(place: str, query: dict[str, str], options: SourceOptions, uri: str) -> Source:
    from harmony.data.sources.npz import NpzSource

    return NpzSource(place, query, uri)


def _torchvision(place: str, query: dict[str, str], options: SourceOptions, uri: str) -> Source:
    from harmony.data.sources.torchvision_sets import TorchvisionSource

    return TorchvisionSource(place, query, uri)


def _coco(place: str, query: dict[str, str], options: SourceOptions, uri: str) -> Source:
    from harmony.data.sources.coco import CocoSource

    return CocoSource(place, query, uri)


def _flickr(place: str, query: dict[str, str], options: SourceOptions, uri: str) -> Source:
    from harmony.data.sources.flickr import FlickrSource

    return FlickrSource(place, query, uri)


def _masks(place: str, query: dict[str, str], options: SourceOptions, uri: str) -> Source:
    from harmony.data.sources.masks import MaskSource

    return MaskSource(place, query, uri)


def _scenes(place: str, query: dict[str, str], options: SourceOptions, uri: str) -> Source:
    from harmony.data.sources.scenes import ScenesSource

    return ScenesSource(place, query, uri)


KINDS: dict[str, Callable[[str, dict[str, str], SourceOptions, str], Source]] = {
    "shards": _shards,
    "table": _table,
    "folder": _folder,
    "npz": _npz,
    "torchvision": _torchvision,
    "coco": _coco,
    "flickr": _flickr,
    "masks": _masks,
    "scenes": _scenes,
}
"""How each kind of source is opened, from (place, query, options, uri)."""
