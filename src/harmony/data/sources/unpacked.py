"""Images embedded in parquet files, unpacked once into Arrow files that are mapped into memory.

A parquet file is compressed in groups of rows, so reading one image means unpacking hundreds, and examples are read in
random order. The unpacked copy takes as much disk as the images, lies where a shard's index would, and is made anew
when the table has changed.
"""

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from harmony.data.sources.index_cache import cache_places, stamp
from harmony.errors import UserError

_ROWS_AT_ONCE = 64


class EmbeddedImages:
    """The bytes of the images in column `column` of several parquet files, by row over all of them.

    Raises:
        UserError: there is no room for the unpacked copy.
    """

    def __init__(self, paths: Sequence[Path], column: str) -> None:
        self._unpacked = [_unpacked(path, column) for path in paths]
        self._ends = np.cumsum([len(_mapped(place)) for place in self._unpacked])
        self._tables: list[pa.ChunkedArray] | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, row: int) -> bytes | None:
        """The encoded image of a row; None where the table has none."""
        if self._tables is None:
            self._tables = [_mapped(place) for place in self._unpacked]
        file = int(np.searchsorted(self._ends, row, side="right"))
        value = self._tables[file][row - (int(self._ends[file - 1]) if file else 0)].as_py()
        return value if value is None else bytes(value)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_tables": None}  # the map would be pickled as a copy of all images


def is_embedded(kind: pa.DataType) -> bool:
    """Whether a column of that type holds encoded images: bytes, or (Hugging Face) a struct with a field "bytes"."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _mapped(place: Path) -> pa.ChunkedArray:
    return pa.ipc.open_file(pa.memory_map(str(place))).read_all().column("image")


def _unpacked(path: Path, column: str) -> Path:
    """The Arrow file with the images of one parquet file, made if need be."""
    wanted = {b"stamp": f"{column} {stamp(path).tolist()}".encode()}
    places = [place.with_suffix(".arrow") for place in cache_places(path)]
    for place in places:
        with contextlib.suppress(OSError, pa.ArrowInvalid):
            if pa.ipc.open_file(pa.memory_map(str(place))).schema.metadata == wanted:
                return place
    problem: OSError | None = None
    for place in places:
        try:
            _unpack(path, column, place, wanted)
        except OSError as error:
            problem = error
        else:
            return place
    raise UserError(
        f"the images in {path} cannot be unpacked to {places[-1].parent} ({problem}); make room there, "
        "or set XDG_CACHE_HOME to a folder with room"
    )


def _unpack(path: Path, column: str, place: Path, metadata: dict[bytes, bytes]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("image", pa.large_binary())], metadata=metadata)
    with tempfile.NamedTemporaryFile(dir=place.parent, prefix=".images-", suffix=".arrow", delete=False) as file:
        aside = Path(file.name)
    try:
        with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for rows in pa.parquet.ParquetFile(path).iter_batches(_ROWS_AT_ONCE, columns=[column]):
                values = rows.column(0)
                if pa.types.is_struct(values.type):
                    values = pa.compute.struct_field(values, "bytes")
                writer.write_batch(pa.record_batch([values.cast(pa.large_binary())], schema=schema))
        aside.chmod(0o644)
        aside.replace(place)
    finally:
        aside.unlink(missing_ok=True)
