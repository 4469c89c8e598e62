"""Generated scenes written to files, as an example of what one's own data may look like."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from harmony.data.sources import open_source
from harmony.data.sources.base import Example
from harmony.data.sources.scenes import ScenesSource
from harmony.disk import room_explained
from harmony.errors import UserError

SHARD = 1000
"""Examples a shard."""


def generate(uri: str, out_dir: Path | str) -> list[Path]:
    """Write the scenes of a `scenes:` URI as WebDataset shards `SPLIT-00000.tar`, ... and the class names beside them.

    Each example is KEY.jpg, KEY.txt (its first caption), KEY.cls (its class index) and KEY.json with key, captions,
    class, label, boxes (left, top, width, height in pixels) and box_labels. The same URI gives the same bytes.

    Returns:
        The shards, in order.

    Raises:
        UserError: the URI names no scenes, the folder is a file or holds shards already, or the disk is full.
    """
    source = open_source(uri)
    if not isinstance(source, ScenesSource):
        raise UserError(f"{uri} cannot be generated; give a URI such as scenes:train?count=1000&size=128")
    folder = Path(out_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --out")
    if any(folder.glob("*.tar")):
        raise UserError(f"{folder} holds shards already; choose a new folder")
    with room_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return _write_shards(source, folder)


def _write_shards(source: ScenesSource, folder: Path) -> list[Path]:
    starts = range(0, len(source), SHARD)
    shards = [folder / f"{source.settings.split}-{k:05d}.tar" for k in range(len(starts))]
    for shard, start in zip(shards, starts, strict=True):
        part = shard.with_suffix(".part")  # renamed when whole, so that a shard is never half a one
        try:
            with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
                for i in range(start, min(start + SHARD, len(source))):
                    _add(tar, source[i], source.class_names or [])
            part.rename(shard)
        finally:
            part.unlink(missing_ok=True)
    (folder / "classes.json").write_text(json.dumps({"classes": source.class_names}, indent=1) + "\n", encoding="utf-8")
    return shards


def _add(tar: tarfile.TarFile, example: Example, classes: list[str]) -> None:
    assert not isinstance(example.image, bytes)
    assert example.label is not None and example.objects is not None
    image = io.BytesIO()
    example.image.save(image, "JPEG", quality=92, subsampling=0)
    described: dict[str, Any] = {
        "key": example.key,
        "captions": example.captions,
        "class": classes[example.label],
        "label": example.label,
        "boxes": example.objects.boxes.tolist(),  # left, top, right, bottom
        "box_labels": example.objects.labels.tolist(),
    }
    files = {
        "jpg": image.getvalue(),
        "txt": example.captions[0].encode(),
        "cls": str(example.label).encode(),
        "json": json.dumps(described).encode(),
    }
    for ending, data in files.items():
        entry = tarfile.TarInfo(f"{example.key}.{ending}")
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))
