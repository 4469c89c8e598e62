"""The contract of an objective: what it needs encoded, as data; its heads; its losses.

An objective never calls an encoder. It lists requests, and the plan (harmony.training.plan) merges the requests of all
objectives into the fewest passes and hands every objective the encodings it asked for.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from harmony.data.batch import Batch, Mask
from harmony.data.masks import MaskSampler
from harmony.data.views import ViewConfig
from harmony.models.encodings import ImageEncoding, TextEncoding
from harmony.models.towers import Towers
from harmony.models.vision import ImageTower
from harmony.schedules import At, NonNegative, Schedule

ModelName = str
"""What encodes: "student", "teacher", or the name of a frozen model, which sees whole images and reads nothing."""


@dataclass(frozen=True)
class ImageRequest:
    """Crops of one view, encoded by one model.

    Attributes:
        view: the view's name.
        crops: which of its crops, in order; all of them when None.
        model: "student", "teacher" or the name of a frozen model.
        replace: name of a mask whose patches are replaced by the mask token.
        keep: name of a mask whose hidden patches are left out of the sequence altogether.
        layers: indices of blocks whose outputs are wanted as well.
        attention: whether the class token's attention over the patches is wanted as well.
        pooled: whether of the output nothing but the class token is read, so that the last block makes no other.
    """

    view: str
    crops: tuple[int, ...] | None = None
    model: ModelName = "student"
    replace: str | None = None
    keep: str | None = None
    layers: tuple[int, ...] = ()
    attention: bool = False
    pooled: bool = False


@dataclass(frozen=True)
class TextRequest:
    """Captions of one stream, read by one model.

    Attributes:
        stream: the caption stream's name.
        model: "student", "teacher" or the name of a frozen model.
        replace: name of a mask whose words are replaced by the mask token.
        attention: whether a word sees the words before it, or those on both sides.
        pooled: whether of the output nothing but the end token is read.
    """

    stream: str = "caption"
    model: ModelName = "student"
    replace: str | None = None
    attention: Literal["causal", "bidirectional"] = "causal"
    pooled: bool = False


Request = ImageRequest | TextRequest


@dataclass(frozen=True)
class GuidedMask:
    """Keeps the patches that the teacher's class token attends to most, equally many of every crop.

    It is drawn after the teacher's passes and before the student's, and so can hide patches from the student alone.

    Attributes:
        view: the view whose crops are masked.
        kept: K, patches left of each crop, a multiple of `side` times `side`.
        grid: rows and columns of patches, multiples of `side`.
        side: patches a side of the squares that are kept or hidden as one.
    """

    view: str
    kept: int
    grid: tuple[int, int]
    side: int = 1

    @property
    def request(self) -> ImageRequest:
        """What the teacher must encode for it."""
        return ImageRequest(self.view, model="teacher", attention=True)

    def draw(self, encoding: ImageEncoding) -> Mask:
        """From the encoding that was requested, (V, B, N) weights; of equal weights the first squares stay."""
        assert encoding.attention is not None
        rows, columns = self.grid
        split = (rows // self.side, self.side, columns // self.side, self.side)
        patches = torch.arange(rows * columns, device=encoding.attention.device)
        inside = patches.view(split).transpose(1, 2).reshape(-1, self.side**2)  # (squares, patches of each)
        attended = encoding.attention.unflatten(-1, split).mean((-3, -1)).flatten(-2)  # (V, B, squares)
        order = attended.argsort(dim=-1, descending=True, stable=True)
        kept = inside[order[..., : self.kept // self.side**2]].flatten(-2)  # (V, B, K)
        return Mask.keeping(kept.sort(dim=-1).values, rows * columns)


class Encoded:
    """The encodings of one step, looked up by the request that asked for them."""

    def __init__(self, encodings: Mapping[Request, ImageEncoding | TextEncoding]) -> None:
        self._encodings = dict(encodings)

    def joined(self, other: "Encoded") -> "Encoded":
        """These encodings and those."""
        return Encoded(self._encodings | other._encodings)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._encodings)

    def __getitem__(self, request: Request) -> ImageEncoding | TextEncoding:
        return self._encodings[request]

    def image(self, request: ImageRequest) -> ImageEncoding:
        encoding = self._encodings[request]
        assert isinstance(encoding, ImageEncoding)
        return encoding

    def text(self, request: TextRequest) -> TextEncoding:
        encoding = self._encodings[request]
        assert isinstance(encoding, TextEncoding)
        return encoding


class ObjectiveConfig(BaseModel):
    """Settings every objective has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Annotated[str, Field(description="the kind of objective; its name in the recipe when left out")] = ""
    weight: Annotated[NonNegative, Field(description="factor of its losses in the sum")] = Schedule.constant(1.0)


class Objective(nn.Module):
    """One method's losses and heads.

    A subclass defines `Config`, `requests` and `forward`, and whichever of the others it needs. It builds its heads
    from the sizes of the towers but never keeps or calls them.
    """

    Config: ClassVar[type[ObjectiveConfig]] = ObjectiveConfig
    needs_labels: ClassVar[bool] = False
    """Whether it is supervised: only then does `Batch.labels` hold the examples' classes."""
    compares_images: ClassVar[bool] = False
    """Whether it needs another image beside each: a part of a step that has one on all ranks would teach it nothing."""
    within_rank: ClassVar[bool] = False
    """Whether that other image must be on the same rank."""
    config: Any
    signs: dict[str, Tensor]
    """Detached scalars for the log, filled by `forward` on logged steps."""

    def __init__(self, config: ObjectiveConfig, towers: Towers, views: Mapping[str, ViewConfig]) -> None:
        super().__init__()
        self.config = config
        self.signs = {}

    def meet(self, frozen: Mapping[str, ImageTower]) -> None:
        """Take the sizes of the frozen models it asks for; called once, before `borrow`."""

    def borrow(self, others: Mapping[str, "Objective"]) -> None:
        """Take what belongs to other objectives (a shared head); called once all are built."""

    def masks(self) -> Mapping[str, MaskSampler]:
        """Masks to be drawn each step, by name."""
        return {}

    def guided_masks(self) -> Mapping[str, GuidedMask]:
        """Masks to be drawn each step from what the teacher sees, by name."""
        return {}

    def requests(self) -> Sequence[Request]:
        """What must be encoded for `forward`."""
        raise NotImplementedError

    def forward(self, batch: Batch, encoded: Encoded, at: At) -> dict[str, Tensor]:
        """Losses by name, unweighted scalars; the trainer multiplies them by `at.weight` and adds them up."""
        raise NotImplementedError

    def slow_twins(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        """(module, slow copy) pairs; the teacher updates the copy as it updates the towers."""
        return ()

    def before_update(self, at: At) -> None:
        """After the gradients are complete, before they are clipped and used."""

    def after_update(self, at: At) -> None:
        """After the optimiser: centres, queues, bounds of parameters.

        Of a step that was not finite, whose update is left out, everything that this changes in parameters and buffers
        is put back. Nobody waits to know whether it was, so this is called after every step: what the step left pending
        is used up here.
        """
