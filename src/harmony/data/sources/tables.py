"""`table:` - a csv, tsv, jsonl or parquet file with a row for each image or for each caption.

The image is a path, relative to the table's folder, or (parquet) the encoded bytes. Rows with the same path are one
example with several captions.
"""

import os
import re
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from harmony.data.sources.base import BadExample, Example, Source, SourceOptions, spread, stamp_of, words_of
from harmony.data.sources.classes import find_class_list, label_of
from harmony.data.sources.places import find_files
from harmony.data.sources.table_files import SUFFIXES, column_names, read_columns
from harmony.data.sources.unpacked import EmbeddedImages, is_embedded
from harmony.errors import UserError, unknown

IMAGE_NAMES = (
    *("image", "image_path", "img_path", "image_file", "filepath", "file_path", "path", "filename", "file_name"),
    *("file", "image_name", "img", "picture", "jpg", "png", "image_bytes", "bytes"),
)
CAPTION_NAMES = ("captions", "caption", "text", "txt", "title", "sentence", "sentences", "description", "alt_text")
LABEL_NAMES = ("label", "class", "cls", "category", "target")
URL_NAMES = ("url", "image_url", "img_url", "urls")
"""Names looked for when no key is given, whatever their case, the first that a table has."""

_CHECKED_PATHS = 100


class TableSource(Source):
    """The images that a table lists, in the order of their first rows.

    Args:
        place: path of a table, or of several of one kind (brace ranges, wildcards), read one after the other.
        options: `caption_key`, `image_key` and `label_key` are columns; `images` is the folder paths are relative to.
        uri: for messages; made from `place` when None.

    Raises:
        UserError: no such file or column, a table of links, no rows, or none of the images is there.
    """

    def __init__(self, place: str, options: SourceOptions | None = None, uri: str | None = None) -> None:
        self.uri = uri or f"table:{place}"
        self.options = options or SourceOptions()
        self._paths = find_files(place, self.uri, "tables", ".parquet")
        self._columns = column_names(self._paths[0])
        image = self._column(self.options.image_key, IMAGE_NAMES)
        self._caption = self._column(self.options.caption_key, CAPTION_NAMES)
        label = self._column(self.options.label_key, LABEL_NAMES)
        if image is None:
            raise self._no_image_column()
        self._problems: list[str] = []
        self._embedded = EmbeddedImages(self._paths, image) if self._holds_images(image) else None
        self._other = {image, label}
        wanted = [name for name in (None if self._embedded else image, self._caption, label) if name]
        table = self._read(list(dict.fromkeys(wanted)))
        self._captions = _flat(table.column(self._caption)) if self._caption else None
        listed = find_class_list(self._paths[0].parent)
        self._written = listed.written if listed else None
        self._labels, self.class_names = _labels(table, label, listed.names if listed else None)
        self._group(None if self._embedded else texts(table.column(image)))
        if not len(self):
            raise UserError(f"{self.uri} has no rows with an image; check the table")
        self._folder = self._images_folder()
        if not self._embedded:
            self._check_paths()

    def _column(self, wanted: str | None, usual: Sequence[str]) -> str | None:
        if wanted is not None:
            if wanted not in self._columns:
                raise unknown(f"column of {self._paths[0].name}", wanted, self._columns)
            return wanted
        lower = {name.lower(): name for name in reversed(self._columns)}
        return next((lower[name] for name in usual if name in lower), None)

    def _no_image_column(self) -> UserError:
        if self._column(None, URL_NAMES):
            return self._only_links()
        seen = ", ".join(self._columns)
        return UserError(f"{self.uri} has no column with images: saw {seen}; name the right one with data.image_key")

    def _only_links(self) -> UserError:
        return UserError(f"{self.uri} lists links, not files; download them first (img2dataset does), then use shards:")

    def _holds_images(self, column: str) -> bool:
        if SUFFIXES[self._paths[0].suffix.lower()] != "parquet":
            return False
        return is_embedded(pa.parquet.read_schema(self._paths[0]).field(column).type)

    def _read(self, columns: list[str]) -> pa.Table:
        parts = []
        for path in self._paths:
            table, damaged = read_columns(path, columns)
            if damaged:
                self._problems.append(f"{path.name}: damaged lines (left out): {damaged}")
            parts.append(table)
        return pa.concat_tables(parts, promote_options="permissive")

    def _group(self, paths: pa.Array | None) -> None:
        """Which rows each example has: rows `_rows[_ends[i-1]:_ends[i]]`; and the examples' names."""
        if paths is None:
            assert self._embedded is not None
            self._rows = np.arange(len(self._embedded))
            self._ends, self._names = self._rows + 1, None
            return
        encoded = paths.dictionary_encode()
        codes = np.asarray(encoded.indices.fill_null(-1))
        empty = pa.compute.index(encoded.dictionary, "").as_py()
        codes = np.where(codes == empty, -1, codes) if empty >= 0 else codes
        if (codes < 0).any():
            self._problems.append(f"rows that name no image (left out): {int((codes < 0).sum())}")
        order = np.argsort(codes, kind="stable")
        self._rows = order[int((codes < 0).sum()) :]
        # Codes count the paths in the order of their first rows, so sorting by them keeps that order.
        found, counts = np.unique(codes[codes >= 0], return_counts=True)
        self._ends = np.cumsum(counts)
        self._names = encoded.dictionary.take(pa.array(found))

    def _images_folder(self) -> Path:
        if self.options.images is not None:
            return Path(self.options.images).expanduser()
        if len({path.parent for path in self._paths}) > 1 and not self._embedded:
            raise UserError(
                f"the tables of {self.uri} lie in several folders; say where the images are with ?images=FOLDER"
            )
        return self._paths[0].parent

    def _check_paths(self) -> None:
        first = self.key(0)
        if re.match(r"^https?://", first):
            raise self._only_links()
        if not any(self._path(i).is_file() for i in spread(len(self), _CHECKED_PATHS)):
            raise UserError(
                f"the images of {self.uri} are not there: looked for {self._path(0)}; paths are taken relative to the "
                "table's folder, another can be given with ?images=FOLDER"
            )

    def _path(self, i: int) -> Path:
        return self._folder / self.key(i)

    def __len__(self) -> int:
        return len(self._ends)

    def key(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(f"{i} is not in 0 .. {len(self) - 1}")
        return f"row {i + 1}" if self._names is None else str(self._names[i].as_py())

    def __getitem__(self, i: int) -> Example:
        key = self.key(i)
        rows = self._rows[self._ends[i - 1] if i else 0 : self._ends[i]]
        return Example(key, self._image(i, key), self._captions_of(rows), self._label(int(rows[0]), key))

    def _image(self, i: int, key: str) -> bytes:
        if self._embedded:
            data = self._embedded[i]
            if data is None:
                raise BadExample(key, "has no image in the table")
            return data
        try:
            return self._path(i).read_bytes()
        except OSError as error:
            raise BadExample(key, f"cannot be read: {os.strerror(error.errno or 0)}") from error

    def _captions_of(self, rows: np.ndarray) -> list[str]:
        if self._captions is None:
            return []
        return [caption for row in rows for caption in words_of(self._captions[int(row)].as_py())]

    def _label(self, row: int, key: str) -> int | None:
        if self._labels is None:
            return None
        written = self._labels[row].as_py()
        return label_of(written, self.class_names, key, self._written) if written else None

    def has_captions(self) -> bool:
        return self._captions is not None and any(words_of(value.as_py()) for value in self._captions)

    def has_labels(self) -> bool:
        return self._labels is not None

    def caption_fields(self) -> list[str]:
        return [f"column {name!r}" for name in self._columns if name not in self._other]

    def caption_place(self) -> str:
        return f"the column {self._caption!r}" if self._caption else f"the columns {', '.join(CAPTION_NAMES)}"

    def fingerprint(self) -> str:
        digest = blake2b(digest_size=16)
        for path in self._paths:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode("utf-8", "surrogateescape"))
        for i in () if self._embedded else spread(len(self), _CHECKED_PATHS):
            path = self._path(i)
            digest.update(f"{self.key(i)} {path.stat().st_size if path.is_file() else None}\n".encode())
        digest.update(f"{len(self)} {self.options.caption_key} {self.options.image_key}".encode())
        return digest.hexdigest()

    def stamp(self) -> str:
        images = () if self._embedded else map(self._path, range(len(self)))
        return stamp_of([path.absolute() for path in (*self._paths, *images)], self.options)

    def problems(self) -> list[str]:
        return list(self._problems)


def _flat(column: pa.ChunkedArray) -> pa.Array:
    """A column of text or of lists of text in one piece, with offsets of 64 bits, for there may be more than 2 GB."""
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        column = column.cast(pa.large_list(pa.large_string()))
    else:
        column = column.cast(pa.large_string())
    whole: Any = column.combine_chunks()
    return pa.concat_arrays(whole.chunks) if isinstance(whole, pa.ChunkedArray) else whole


def texts(column: pa.ChunkedArray) -> pa.Array:
    """A column of text, without blanks at the ends; of a list (as json lines give them), the first."""
    flat = _flat(column)
    if pa.types.is_large_list(flat.type):
        offsets = np.asarray(flat.offsets)
        flat = flat.values.take(pa.array(offsets[:-1], mask=offsets[1:] == offsets[:-1]))
    return pa.compute.utf8_trim_whitespace(flat)


def _labels(table: pa.Table, column: str | None, known: list[str] | None) -> tuple[pa.Array | None, list[str] | None]:
    """The labels as text, and the class names: those beside the table, or the texts seen unless they are numbers."""
    if column is None:
        return None, None
    written = texts(table.column(column))
    seen = sorted(value for value in written.unique().to_pylist() if value)
    if not seen:
        return None, None
    return written, known or (None if all(value.isdigit() for value in seen) else seen)
