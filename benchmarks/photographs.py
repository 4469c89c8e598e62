"""JPEGs in shards that cost a decoder what photographs do, made from noise and generated scenes.

Noise whose amplitude falls with frequency, as that of photographs does, gives every block of a JPEG coefficients to
decode; scenes laid over it give edges and areas of one colour. At 500 x 375 px and quality 90 a file has about 95 kB.
"""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from harmony.data.sources import open_source
from harmony.data.sources.base import Source


def write_shard(folder: Path, count: int, size: tuple[int, int] = (500, 375), quality: int = 90, seed: int = 0) -> str:
    """Write `count` image-caption pairs of `size` (width, height) as one shard, if it is not there; returns its URI."""
    path = folder / f"{size[0]}x{size[1]}-quality{quality}-seed{seed}-{count}.tar"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        scenes = open_source(f"scenes:train?count={count}&size=256&seed={seed}")
        part = path.with_suffix(".part")
        with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(count):
                _add(tar, scenes, number, size, quality, seed)
        part.rename(path)
    return f"shards:{path}"


def photograph(scene: Image.Image, size: tuple[int, int], seed: int) -> Image.Image:
    """Noise of `size` (width, height) with a scene laid over it by half."""
    width, height = size
    random = np.random.default_rng(seed)
    bright, *tints = (_noise(random, width, height) for _ in range(3))
    grain = random.standard_normal((height, width, 1)) * 4
    noise = np.stack([bright, 0.9 * bright + 0.3 * tints[0], 0.8 * bright + 0.4 * tints[1]], -1) * 45 + 120 + grain
    pixels = (noise + np.asarray(scene.convert("RGB").resize(size, Image.Resampling.BICUBIC), dtype=np.float64)) / 2
    return Image.fromarray((pixels * 1.6 - 75).clip(0, 255).astype(np.uint8))


def _noise(random: np.random.Generator, width: int, height: int) -> NDArray[np.float64]:
    """(height, width) of mean 0 and deviation 1, with amplitude about one over frequency."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    spectrum = np.fft.rfft2(random.standard_normal((height, width))) / np.maximum(frequency, 1 / width) ** 1.1
    drawn = np.fft.irfft2(spectrum, (height, width))
    return np.asarray((drawn - drawn.mean()) / drawn.std())


def _add(tar: tarfile.TarFile, scenes: Source, number: int, size: tuple[int, int], quality: int, seed: int) -> None:
    example = scenes[number]
    assert isinstance(example.image, Image.Image)
    image = io.BytesIO()
    photograph(example.image, size, seed * 1_000_003 + number).save(image, "JPEG", quality=quality)
    key = f"{number:06d}"
    described = json.dumps({"key": key, "captions": example.captions}).encode()
    for ending, data in (("jpg", image.getvalue()), ("txt", example.captions[0].encode()), ("json", described)):
        entry = tarfile.TarInfo(f"{key}.{ending}")
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))
