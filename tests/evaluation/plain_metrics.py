"""Metrics written down as they are defined, one pair at a time, to compare with; and small sources and encoders."""

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from harmony.data.sources import BadExample, Example, Source
from harmony.errors import UserError
from harmony.evaluation.encoder import Encoder, Encoding, Layer
from harmony.evaluation.settings import EvaluationConfig
from harmony.evaluation.task import Setup

PALETTE = [(230, 40, 40), (40, 200, 60), (50, 70, 220), (240, 220, 40), (20, 20, 20), (250, 250, 250), (200, 60, 200)]
NAMES = ["red", "green", "blue", "yellow", "black", "white", "purple"]


def similarity(a: Tensor, b: Tensor) -> float:
    return sum(float(x) * float(y) for x, y in zip(a.double(), b.double(), strict=True))


def rank(query: Tensor, candidates: Sequence[Tensor], right: set[int]) -> int:
    """One more than the number of wrong candidates that are at least as similar as the best right one (to 1e-6)."""
    best = max(similarity(query, candidates[i]) for i in right)
    wrong = [similarity(query, c) for i, c in enumerate(candidates) if i not in right]
    return 1 + sum(1 for s in wrong if not s < best - 1e-6)


def recall(ranks: Sequence[int], k: int) -> float:
    return sum(1 for r in ranks if r <= k) / len(ranks)


def chance_recall(right: int, pool: int, k: int) -> float:
    """One minus the share of all k-subsets that hold no right candidate."""
    if k >= pool:
        return 1.0
    return 1 - math.comb(pool - right, k) / math.comb(pool, k)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


class Colours(Source):
    """Flat images of one colour, whose class and captions are the colour's name; some cannot be read."""

    def __init__(self, labels: Sequence[int | None], bad: Sequence[int] = (), names: list[str] | None = NAMES) -> None:
        self.uri = "colours:"
        self.class_names = names
        self.labels = list(labels)
        self.bad = set(bad)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Example:
        if i in self.bad:
            raise BadExample(self.key(i), "is truncated (test)")
        label = self.labels[i]
        colour = PALETTE[label or 0]
        captions = [f"a {NAMES[label or 0]} square", f"{NAMES[label or 0]} all over, number {i}"]
        return Example(self.key(i), Image.new("RGB", (40, 30), colour), captions, label)

    def key(self, i: int) -> str:
        return f"colour-{i}"

    def fingerprint(self) -> str:
        return f"{self.labels} {sorted(self.bad)}"


class ColourEncoder(Encoder):
    """A perfect predictor: an image lies at the palette's nearest colour, a text at the colour that it names."""

    def __init__(self, reads_text: bool = True, wrong: bool = False) -> None:
        self.name = "colour encoder"
        self.size, self.patch, self.depth = 8, 8, 2
        self.mean, self.std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
        self.embed = self.width = len(NAMES)
        self.reads_text = reads_text
        self.device = torch.device("cpu")
        self.wrong = wrong

    def fingerprint(self) -> str:
        return f"{type(self).__name__} {self.wrong}"

    def encode(self, pixels: Tensor, layers: int = 0) -> Encoding:
        seen = self.see(pixels)
        grid = [side // self.patch for side in pixels.shape[-2:]]
        return Encoding(seen, [Layer(seen, seen[:, :, None, None].expand(-1, -1, *grid))] * layers)

    def backbone(self, size: int, drop_path: float = 0.0) -> nn.Module:
        raise UserError(f"{self.name} is no timm model")

    def see(self, pixels: Tensor) -> Tensor:
        colours = (pixels.mean(dim=(2, 3)) * torch.tensor(self.std) + torch.tensor(self.mean)) * 255
        nearest = torch.cdist(colours, torch.tensor(PALETTE, dtype=torch.float32)).argmin(dim=1)
        return 3.0 * torch.eye(self.embed)[(nearest + self.wrong) % self.embed]

    def texts(self, texts: Sequence[str]) -> Tensor:
        named = [next(i for i, name in enumerate(NAMES) if name in text) for text in texts]
        return 0.5 * torch.eye(self.embed)[named]


def setup(encoder: Encoder, data: Source, config: EvaluationConfig | None = None, train: Source | None = None) -> Setup:
    """What a task is given, in this process and in small batches."""
    return Setup(encoder, data, train, config or EvaluationConfig(workers=0, batch_size=4))


class ConstantEncoder(ColourEncoder):
    """Sees and reads the same in everything: a collapsed model."""

    def see(self, pixels: Tensor) -> Tensor:
        return torch.ones(len(pixels), self.embed)

    def texts(self, texts: Sequence[str]) -> Tensor:
        return torch.ones(len(texts), self.embed)
