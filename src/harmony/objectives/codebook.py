"""A codebook of directions, learned as moving averages of the features that are nearest to each: k-means on the sphere.

The codes are moved as in the vector quantisation of BEiT v2 (arXiv 2208.06366; van den Oord et al., arXiv
1711.00937, appendix A.1): towards the normalised mean of what a step assigned to them. What a step observes is kept
aside until the step's update has been made, so that all micro-batches of a step see the same codes and a skipped step
leaves them alone.

Shapes: M features, K codes, D width.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmony import ranks
from harmony.objectives.targets import cosines

_AT_ONCE = 8192
"""Features compared with all codes at a time, which bounds the memory of their similarities."""


class Codebook(nn.Module):
    """K unit vectors.

    A code that is dead, used less than `dead` of an even share, is put onto an observed feature drawn by chance, alike
    on all ranks. At the start all are dead, so that the first update puts every code onto a feature.

    Attributes:
        codes: (K, D) of unit length.
        use: (K), moving average of each code's share of the features.
    """

    codes: Tensor
    use: Tensor

    def __init__(self, count: int, width: int, decay: float, dead: float) -> None:
        super().__init__()
        self.decay, self.dead = decay, dead
        self.register_buffer("codes", F.normalize(torch.randn(count, width), dim=-1))
        self.register_buffer("use", torch.zeros(count))
        self._seen: _Seen | None = None

    @torch.no_grad()
    def nearest(self, features: Tensor) -> Tensor:
        """(M, D) of unit length -> (M,) int64, the code of the largest cosine."""
        return torch.cat([cosines(piece, self.codes).argmax(1) for piece in features.split(_AT_ONCE)])

    @torch.no_grad()
    def observe(self, features: Tensor, code: Tensor, lot: Tensor) -> None:
        """Take note of features and their codes.

        Args:
            features: (M, D) of unit length.
            code: (M,) int64, as `nearest` gives them.
            lot: (M,) in [0, 1), by chance; the features of the smallest are where dead codes go.
        """
        features = features.to(self.codes.dtype)
        ones = torch.ones_like(code, dtype=self.use.dtype)
        seen = _Seen(
            sums=torch.zeros_like(self.codes).index_add_(0, code, features),
            counts=torch.zeros_like(self.use).index_add_(0, code, ones),
            lots=lot,
            drawn=features,
        )
        self._seen = (seen if self._seen is None else self._seen.joined(seen)).first(len(self.use))

    @torch.no_grad()
    def update(self) -> None:
        """Move the codes by what was observed on all ranks."""
        if self._seen is None:
            return
        counts, sums = ranks.total(self._seen.counts), ranks.total(self._seen.sums)
        candidates, there = _candidates(self._seen, len(self.use))
        dead = self.use < self.dead / len(self.use)
        moved = F.normalize(torch.lerp(F.normalize(sums, dim=-1), self.codes, self.decay), dim=-1)
        codes = torch.where((counts > 0)[:, None], moved, self.codes)
        use = torch.lerp(counts / counts.sum().clamp(min=1), self.use, self.decay)
        place = (dead.cumsum(0) - 1).clamp(min=0)
        replaced = dead & there[place]
        self.codes.copy_(torch.where(replaced[:, None], candidates[place], codes))
        self.use.copy_(torch.where(replaced, 1 / len(self.use), use))
        self._seen = None


@dataclass(frozen=True)
class _Seen:
    """What this rank has observed since the last update.

    Attributes:
        sums, counts: (K, D) and (K), of the features of each code.
        lots, drawn: (n) and (n, D), the features with the smallest lots, n up to K.
    """

    sums: Tensor
    counts: Tensor
    lots: Tensor
    drawn: Tensor

    def joined(self, other: "_Seen") -> "_Seen":
        lots, drawn = torch.cat([self.lots, other.lots]), torch.cat([self.drawn, other.drawn])
        return _Seen(self.sums + other.sums, self.counts + other.counts, lots, drawn)

    def first(self, count: int) -> "_Seen":
        """With `count` features at most."""
        order = self.lots.argsort(stable=True)[:count]
        return replace(self, lots=self.lots[order], drawn=self.drawn[order])


def _candidates(seen: _Seen, count: int) -> tuple[Tensor, Tensor]:
    """(K, D), the features with the smallest lots on all ranks, in order; and (K,) bool, where there is one."""
    own = len(seen.lots)
    lots = seen.lots.new_full((count,), 2.0)
    lots[:own] = seen.lots
    every = ranks.gather(lots)
    order = every.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    mine = place[ranks.rank() * count :][:own]  # where this rank's lots stand among all
    candidates = seen.drawn.new_zeros(count + 1, seen.drawn.shape[1])
    candidates[mine.clamp(max=count)] = seen.drawn  # what comes too late goes into the row that is left out
    return ranks.total(candidates[:count]), every[order[:count]] < 1
