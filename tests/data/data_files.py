"""Small data sets in every form, written for the tests."""

import gc
import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from PIL import Image


def picture(number: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """A picture of the given width and height that differs from those of other numbers everywhere."""
    drawn = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(drawn).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


def png(number: int, size: tuple[int, int] = (40, 32)) -> bytes:
    return encoded(picture(number, size))


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def pairs(count: int, captions: int = 1, start: int = 0) -> list[tuple[str, bytes]]:
    """The members of a tar with `count` samples, each an image, a text and, if it has several captions, their json."""
    members = []
    for number in range(start, start + count):
        key = f"{number:05d}"
        texts = [f"caption {c} of picture {number}" for c in range(captions)]
        members += [(f"{key}.png", png(number)), (f"{key}.txt", texts[0].encode())]
        if captions > 1:
            members.append((f"{key}.json", json.dumps({"key": key, "captions": texts}).encode()))
    return members


def write_pairs(folder: Path, count: int, shards: int = 1, captions: int = 1) -> str:
    """Shards of image-caption pairs in `folder`; returns their URI."""
    folder.mkdir(parents=True, exist_ok=True)
    each = -(-count // shards)
    for shard in range(shards):
        start = shard * each
        members = pairs(min(each, count - start), captions, start)
        write_tar(folder / f"part-{shard:05d}.tar", members)
    return f"shards:{folder}/part-{{00000..{shards - 1:05d}}}.tar"


def write_images(folder: Path, names: Sequence[str]) -> Path:
    """An image file for each name; picture number k for the k-th."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(number), "JPEG" if path.suffix in (".jpg", ".jpeg") else "PNG"))
    return folder


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def python_objects(root: object) -> int:
    """How many Python objects `root` holds, directly or through others (modules, classes and functions left out)."""
    known: dict[int, object] = {}
    new = [root]
    while new:
        found = {id(thing): thing for thing in gc.get_referents(*new)}
        new = [
            thing
            for name, thing in found.items()
            if name not in known and not isinstance(thing, type | ModuleType | FunctionType | MethodType)
        ]
        known.update((id(thing), thing) for thing in new)
    return len(known)
