"""DINO and iBOT from plain parts, as a reader of the papers would put them together with a library of parts.

timm's ViT as it is, one pass for the large crops and one for the small, a slow copy updated tensor by tensor, heads on
all tokens (`tokens="all"`, as iBOT's published code has it) or on those that the losses read (`"needed"`).

Shapes: V large crops, B images, N patches, K prototypes.
"""

import copy
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.step import MIDDLE, Work
from benchmarks.turns import Way, kept_by
from harmony.models.heads import HeadConfig
from harmony.models.trunk import changed_sizes
from harmony.objectives.dino import Dino
from harmony.recipe import Recipe

DIFFERS = {
    "dino": "plain parts: passes and heads are those of the paper; timm's own stochastic depth; all patches in every "
    "block; no norms of the gradient, no look at whether the loss is finite",
    "all": "plain parts: heads on class tokens and patches of all crops, scores of the teacher for all patches, as "
    "iBOT's published code has it; timm's own stochastic depth; no look at whether the loss is finite",
    "needed": "plain parts, but heads on class tokens and hidden patches alone, and the centre from these; timm's own "
    "stochastic depth; no look at whether the loss is finite",
}


class Head(nn.Module):
    """MLP with GELU, L2 normalisation, a linear layer whose rows are unit vectors times their lengths."""

    def __init__(self, width: int, config: HeadConfig) -> None:
        super().__init__()
        sizes = [width] + [config.hidden] * (config.layers - 1) + [config.bottleneck]
        layers: list[nn.Module] = []
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last = nn.Parameter(0.02 * torch.randn(config.prototypes, config.bottleneck))
        self.lengths = nn.Parameter(torch.ones(config.prototypes, 1), requires_grad=config.learn_lengths)

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.mlp(x), dim=-1)
        return F.linear(x, self.lengths * F.normalize(self.last, dim=-1))


class Network(nn.Module):
    """A ViT, its mask token and its head."""

    def __init__(self, recipe: Recipe, drop_path: float, head: HeadConfig) -> None:
        super().__init__()
        image = recipe.model.image
        self.vit: Any = timm.create_model(
            image.name,
            num_classes=0,
            img_size=image.size or recipe.largest_view,
            dynamic_img_size=True,
            drop_path_rate=drop_path,
            **changed_sizes(image),
        )
        self.mask_token = nn.Parameter(torch.zeros(self.vit.embed_dim))
        self.head = Head(self.vit.embed_dim, head)

    def tokens(self, pixels: Tensor, masked: Tensor | None = None) -> Tensor:
        """(B, 3, S, S) and (B, N) bool -> (B, 1 + N, D)."""
        x = self.vit.patch_embed(pixels)  # (B, rows, columns, D)
        if masked is not None:
            x = torch.where(masked.view(*x.shape[:3], 1), self.mask_token.to(x.dtype), x)
        x = self.vit.norm_pre(self.vit._pos_embed(x))
        return self.vit.norm(self.vit.blocks(x))


class Distillation:
    """Student, teacher, centres and optimiser; `step` trains them on a batch."""

    def __init__(self, work: Work, tokens: Literal["all", "needed"]) -> None:
        recipe = work.recipe
        dino = recipe.objectives["dino"]
        assert isinstance(dino, Dino.Config)
        self.work, self.tokens, self.mask = work, tokens, dino.mask
        self.student = Network(recipe, recipe.model.image.drop_path, dino.head).to(work.device).train()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.cls_centre, self.patch_centre = torch.zeros(2, dino.head.prototypes, device=work.device)
        self.momentum, self.clip_norm = recipe.teacher.momentum(MIDDLE), recipe.optim.clip_norm
        self.temperature, self.sharp = dino.student_temperature(MIDDLE), dino.teacher_temperature(MIDDLE)
        self.optimiser = torch.optim.AdamW(
            self.student.parameters(), lr=1e-5, betas=recipe.optim.betas, eps=recipe.optim.eps, fused=True
        )

    def step(self, number: int) -> Tensor:
        batch = self.work.batches[number % len(self.work.batches)]
        large, small = batch.images["global"], batch.images["local"]
        masked = batch.masks[self.mask].masked if self.mask else None
        with self.work.autocast():
            total = self.loss(large, small, masked)
        total.backward()
        if self.clip_norm:
            nn.utils.clip_grad_norm_(self.student.parameters(), self.clip_norm)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self._follow()
        return total.detach()

    def loss(self, large: Tensor, small: Tensor, masked: Tensor | None) -> Tensor:
        """The class tokens' loss and, where patches are hidden (V, B, N), theirs."""
        crops = len(large)
        flat = None if masked is None else masked.flatten(0, 1)
        with torch.no_grad():
            slow_cls, slow_patches = self._scores(self.teacher, self.teacher.tokens(large.flatten(0, 1)), flat)
        cls, patches = self._scores(self.student, self.student.tokens(large.flatten(0, 1), flat), flat)
        local = self.student.tokens(small.flatten(0, 1))
        local_cls, _ = self._scores(
            self.student, local, None if flat is None else flat.new_zeros(local.shape[:2])[:, 1:]
        )
        total = self._of_classes(slow_cls.chunk(crops), [*cls.chunk(crops), *local_cls.chunk(len(small))])
        if flat is not None:
            total = total + self._of_patches(slow_patches, patches, flat)
        return total

    def _scores(self, network: Network, tokens: Tensor, masked: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scores of the class tokens (n, K), and of the patches: (n, N, K), or of the hidden ones (M, K)."""
        if masked is None:
            return network.head(tokens[:, 0]), tokens
        if self.tokens == "all":
            scores = network.head(tokens)
            return scores[:, 0], scores[:, 1:]
        return network.head(tokens[:, 0]), network.head(tokens[:, 1:][masked])

    def _of_classes(self, slow: Iterable[Tensor], fast: list[Tensor]) -> Tensor:
        slow = list(slow)
        targets = [((scores - self.cls_centre) / self.sharp).softmax(-1) for scores in slow]
        predictions = [(scores / self.temperature).log_softmax(-1) for scores in fast]
        terms = [
            -(target * prediction).sum(-1).mean()
            for i, target in enumerate(targets)
            for j, prediction in enumerate(predictions)
            if i != j
        ]
        self.cls_centre = 0.9 * self.cls_centre + 0.1 * torch.cat(slow).mean(0)
        return torch.stack(terms).mean()

    def _of_patches(self, slow: Tensor, fast: Tensor, masked: Tensor) -> Tensor:
        target = ((slow - self.patch_centre) / self.sharp).softmax(-1)
        losses = -(target * (fast / self.temperature).log_softmax(-1)).sum(-1)
        share = 1 / masked.sum(-1, keepdim=True).clamp(min=1)
        self.patch_centre = 0.9 * self.patch_centre + 0.1 * slow.flatten(0, -2).mean(0)
        if self.tokens == "all":
            return (losses * masked * share).sum() / len(masked)
        return (losses * share.expand(masked.shape)[masked]).sum() / len(masked)

    @torch.no_grad()
    def _follow(self) -> None:
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.mul_(self.momentum).add_(fast, alpha=1 - self.momentum)

    def way(self) -> Way:
        return Way("plain parts", self.step, lambda: kept_by([self.student, self.teacher], self.optimiser))


def build(work: Work, tokens: Literal["all", "needed"]) -> Way:
    """The plain parts at the recipe's sizes, on our crops and masks."""
    return Distillation(work, tokens).way()
