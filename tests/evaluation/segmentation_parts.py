"""Sources with masks that are read in a moment, and encoders of patches that know colours, or nothing."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import plain_metrics as plain
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from harmony.data.sources import BadExample, Example, Source, open_source
from harmony.evaluation.encoder import Encoding, Layer
from harmony.evaluation.settings import EvaluationConfig

SCENES = "scenes:{split}?things=colour&size=48&count={count}"


class Kept(Source):
    """Examples in memory."""

    def __init__(self, examples: Sequence[Example], names: list[str] | None, uri: str = "kept:", ignore: int = 255):
        self.examples = list(examples)
        self.mask_names = names
        self.uri = uri
        self.mask_ignore = ignore
        self.reading: Callable[[int], None] = lambda i: None

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Example:
        self.reading(i)
        return self.examples[i]

    def key(self, i: int) -> str:
        return self.examples[i].key

    def fingerprint(self) -> str:
        return f"{self.uri} {len(self)}"


def scenes(split: str, count: int, **changes: object) -> Kept:
    source = open_source(SCENES.format(split=split, count=count) + "".join(f"&{k}={v}" for k, v in changes.items()))
    return Kept([source[i] for i in range(count)], list(source.mask_names or []), source.uri)


def shuffled(source: Kept) -> Kept:
    """Each image with the mask of another, so that nothing can be learned but which class is frequent."""
    masks = [example.mask for example in source.examples]
    return Kept([Example(e.key, e.image, mask=masks[i - 13]) for i, e in enumerate(source.examples)], source.mask_names)


def squares(count: int, height: int = 40, width: int = 56, seed: int = 0) -> Kept:
    """A rectangle of one of the palette's colours on another one, with exact masks; some pixels have no class."""
    random = np.random.default_rng(seed)
    examples = []
    for i in range(count):
        ground, thing = random.choice(len(plain.PALETTE), 2, replace=False)
        top, left = random.integers(0, height // 2), random.integers(0, width // 2)
        mask = np.full((height, width), ground, dtype=np.uint8)
        mask[top : top + height // 2, left : left + width // 3] = thing
        image = np.array(plain.PALETTE, dtype=np.uint8)[mask]
        mask[:2] = 255
        examples.append(Example(f"square-{i}", Image.fromarray(image), mask=mask))
    return Kept(examples, list(plain.NAMES), "squares:")


class PatchColours(plain.ColourEncoder):
    """Sees the mean colour of each patch, its squares and products: enough for a linear head to tell colours apart."""

    def __init__(self, blind: bool = False) -> None:
        super().__init__()
        self.name = "patch colours"
        self.size, self.patch, self.depth, self.width = 48, 4, 2, 9
        self.mean, self.std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
        self.blind = blind

    def fingerprint(self) -> str:
        return f"patch colours {self.blind}"

    def encode(self, pixels: Tensor, layers: int = 0) -> Encoding:
        rgb = F.avg_pool2d(pixels, self.patch)
        maps = torch.cat([rgb, rgb**2, rgb * rgb.roll(1, dims=1)], dim=1)
        if self.blind:
            maps = torch.ones_like(maps)
        whole = maps.mean(dim=(2, 3))
        return Encoding(whole, [Layer(whole, maps * (i + 1)) for i in range(layers)])

    def shared(self, patches: Tensor) -> Tensor:
        """The palette's nearest colour, as one of the words that `texts` knows."""
        colours = (patches[:, :3] * 0.25 + 0.5).movedim(1, -1) * 255
        nearest = torch.cdist(colours.flatten(0, 2), torch.tensor(plain.PALETTE, dtype=torch.float32)).argmin(1)
        return torch.eye(self.embed)[nearest].view(*colours.shape[:3], -1).movedim(-1, 1)


def config(**segmentation: object) -> EvaluationConfig:
    """Short and in this process; what is not given is easy to learn from."""
    usual = {"steps": 40, "train_batch_size": 8, "lr": 0.03, "photometric": False, "seed": 3}
    return EvaluationConfig(workers=0, batch_size=16, segmentation=usual | segmentation)


def camvid(folder: Path, split: str, count: int) -> Kept:
    """Some images and masks of a split."""
    source = open_source(f"masks:{folder / split}.tar")
    some = range(0, len(source), len(source) // count)
    return Kept([source[i] for i in some[:count]], source.mask_names, source.uri, source.mask_ignore)


class Broken(Kept):
    """Images that cannot be read."""

    def __getitem__(self, i: int) -> Example:
        raise BadExample(f"broken-{i}", "is truncated (test)")
