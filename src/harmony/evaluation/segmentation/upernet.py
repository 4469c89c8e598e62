"""UPerNet on a ViT: pyramid pooling on the last map, a feature pyramid on all four, one classifier on them together.

UPerNet (Xiao et al., arXiv 1807.10221) with the four maps that BEiT (arXiv 2106.08254, appendix) makes of a plain ViT,
which have one size, by deconvolution and pooling. Models with maps of several sizes are taken as they are.

Shapes: B images, C classes, K width of the head, maps (B, D, h, w).
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmony.errors import UserError
from harmony.evaluation.fitting import Group
from harmony.evaluation.layer_decay import head_groups, layer_groups
from harmony.evaluation.segmentation.heads import Segmenter, pixel_loss

BINS = (1, 2, 3, 6)
"""Pyramid pooling's grids (PSPNet, arXiv 1612.01105)."""

AUXILIARY_WEIGHT, AUXILIARY_CHANNELS = 0.4, 256
"""Of the second classifier, on the third map alone, which training has and prediction has not (PSPNet, 3.3)."""

DROPOUT = 0.1
"""Share of channels dropped before both classifiers (MMSegmentation's default, as in BEiT's and MAE's results)."""

MOST_CHANNELS = 1024


class UPerNet(Segmenter):
    """A timm model and the head, trained together.

    Args:
        backbone: offers `forward_intermediates`.
        depth: number of its blocks.
        size: side in px of its inputs.
        classes: C.
        channels: K; the last map's own, at most `MOST_CHANNELS`, if None.

    Raises:
        UserError: the model offers no four maps.
    """

    def __init__(self, backbone: nn.Module, depth: int, size: int, classes: int, channels: int | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.taps = [depth - 1]
        shapes = self._shapes(size, taps(depth))
        widths = [shape[0] for shape in shapes]
        self.width = channels or min(widths[-1], MOST_CHANNELS)
        plain = len({shape[1:] for shape in shapes}) == 1
        self.neck = nn.ModuleList(_rescaling(widths) if plain else [nn.Identity() for _ in widths])
        self.pool = nn.ModuleList(_convolution(widths[-1], self.width, 1) for _ in BINS)
        self.bottleneck = _convolution(widths[-1] + len(BINS) * self.width, self.width, 3)
        self.lateral = nn.ModuleList(_convolution(width, self.width, 1) for width in widths[:-1])
        self.smooth = nn.ModuleList(_convolution(self.width, self.width, 3) for _ in widths[:-1])
        self.fuse = _convolution(4 * self.width, self.width, 3)
        self.classify = _classifier(self.width, classes)
        self.auxiliary = nn.Sequential(
            _convolution(widths[2], AUXILIARY_CHANNELS, 3), _classifier(AUXILIARY_CHANNELS, classes)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return self._classified(self._maps(pixels))

    def loss(self, pixels: Tensor, masks: Tensor) -> Tensor:
        maps = self._maps(pixels)
        auxiliary: Tensor = self.auxiliary(maps[2])
        return pixel_loss(self._classified(maps), masks) + AUXILIARY_WEIGHT * pixel_loss(auxiliary, masks)

    def _maps(self, pixels: Tensor) -> list[Tensor]:
        """Four maps, the finest first."""
        return [rescale(one) for rescale, one in zip(self.neck, self._tapped(pixels), strict=True)]

    def _tapped(self, pixels: Tensor) -> list[Tensor]:
        backbone = cast(Any, self.backbone)
        wanted = sorted(set(self.taps))
        found = backbone.forward_intermediates(pixels, indices=wanted, intermediates_only=True)
        return [found[wanted.index(tap)] for tap in self.taps]

    def _classified(self, maps: Sequence[Tensor]) -> Tensor:
        top = self.bottleneck(torch.cat([maps[-1], *(self._pooled(maps[-1], i) for i in range(len(BINS)))], dim=1))
        levels = [lateral(one) for lateral, one in zip(self.lateral, maps[:-1], strict=True)] + [top]
        for level in range(len(levels) - 1, 0, -1):
            levels[level - 1] = levels[level - 1] + _enlarged(levels[level], levels[level - 1])
        smoothed = [smooth(one) for smooth, one in zip(self.smooth, levels[:-1], strict=True)] + [top]
        scores: Tensor = self.classify(self.fuse(torch.cat([_enlarged(one, smoothed[0]) for one in smoothed], dim=1)))
        return scores

    def _pooled(self, last: Tensor, place: int) -> Tensor:
        return _enlarged(self.pool[place](F.adaptive_avg_pool2d(last, BINS[place])), last)

    @torch.no_grad()
    def _shapes(self, size: int, wanted: list[int]) -> list[tuple[int, int, int]]:
        """(D, h, w) of each of the four maps; sets which blocks they come from."""
        backbone = cast(Any, self.backbone)
        blank = torch.zeros(1, 3, size, size, device=next(self.backbone.parameters()).device)
        training = self.backbone.training
        self.backbone.eval()
        try:
            every = backbone.forward_intermediates(blank, intermediates_only=True)
        except (AttributeError, TypeError, RuntimeError) as error:
            raise UserError(
                f"upernet needs a timm model that gives maps of its blocks, and this one fails: {error}"
            ) from None
        finally:
            self.backbone.train(training)
        if len({one.shape[-2:] for one in every}) > 1:
            if len(every) < 4:
                raise UserError(f"upernet needs four maps, and this model has {len(every)}; set head=linear")
            wanted = list(range(len(every) - 4, len(every)))
        self.taps = wanted
        return [tuple(every[tap].shape[1:]) for tap in wanted]


def taps(depth: int) -> list[int]:
    """Blocks that the four maps come from: those at 1/3, 1/2, 2/3 and all of the depth (of 12: 3, 5, 7, 11)."""
    return [max(0, round(depth * share) - 1) for share in (1 / 3, 1 / 2, 2 / 3, 1)]


def parameter_groups(model: UPerNet, layer_decay: float, lr_scale: float) -> list[Group]:
    """The encoder's blocks with learning rates that fall from `lr_scale` towards the input, the head with the full one.

    The norm behind the last block, which the head does not see, is counted one layer up.
    """
    layers = layer_groups(model.backbone, layer_decay)
    groups = [Group(one.parameters, one.lr_scale * lr_scale / layer_decay, one.decays) for one in layers]
    head = [value for name, value in model.named_parameters() if not name.startswith("backbone.")]
    return groups + head_groups(head)


def _rescaling(widths: Sequence[int]) -> list[nn.Module]:
    """From maps of one size to maps of 4, 2, 1 and 1/2 times the size."""
    four, two = widths[0], widths[1]
    return [
        nn.Sequential(
            nn.ConvTranspose2d(four, four, 2, 2), nn.BatchNorm2d(four), nn.GELU(), nn.ConvTranspose2d(four, four, 2, 2)
        ),
        nn.ConvTranspose2d(two, two, 2, 2),
        nn.Identity(),
        nn.MaxPool2d(2, ceil_mode=True),  # a map of one patch stays one
    ]


def _convolution(given: int, wanted: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv2d(given, wanted, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight)
    return nn.Sequential(convolution, nn.BatchNorm2d(wanted), nn.ReLU())


def _classifier(channels: int, classes: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, classes, 1)
    nn.init.normal_(convolution.weight, std=0.01)
    nn.init.zeros_(cast(Tensor, convolution.bias))
    return nn.Sequential(nn.Dropout2d(DROPOUT), convolution)


def _enlarged(small: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(small, like.shape[-2:], mode="bilinear", align_corners=False)
