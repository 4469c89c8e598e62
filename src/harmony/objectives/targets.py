"""Teacher scores made into targets: sharpened, and kept from collapsing onto one prototype.

Shapes: M tokens, K prototypes.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from harmony import ranks

Centring = Annotated[
    Literal["momentum", "sinkhorn_knopp"],
    Field(description="subtract a running mean of the teacher's scores, or balance the batch (Sinkhorn-Knopp)"),
]
Momentum = Annotated[float, Field(ge=0, lt=1, description="share of the old centre kept at each step")]


class Centre(nn.Module):
    """Running mean of the teacher's scores (DINO, arXiv 2104.14294, equation 4).

    What a step observes is kept aside until the step's update has been made, so that all micro-batches of a step see
    the same centre and a skipped step leaves it alone.
    """

    mean: Tensor

    def __init__(self, prototypes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(prototypes))
        self._total: Tensor | None = None
        self._count: Tensor | None = None

    def observe(self, scores: Tensor) -> None:
        """Take note of (M, K) scores."""
        self.observe_mean(scores.detach().sum(0) / max(len(scores), 1), len(scores))

    def observe_mean(self, mean: Tensor, count: int | Tensor) -> None:
        """Take note of `count` scores through their mean (K,)."""
        total = mean.detach().to(self.mean.dtype) * count
        number = self.mean.new_ones(()) * count
        self._total = total if self._total is None else self._total + total
        self._count = number if self._count is None else self._count + number

    @property
    def prototypes(self) -> int:
        """K."""
        return len(self.mean)

    @torch.no_grad()
    def update(self) -> None:
        """mean <- momentum * mean + (1 - momentum) * what was observed on all ranks."""
        if self._total is None or self._count is None:
            return
        joined = ranks.total(torch.cat([self._total, self._count[None]]))
        observed = joined[:-1] / joined[-1].clamp(min=1)
        # A step that observed nothing (no word masked anywhere) leaves the centre as it is.
        self.mean.lerp_(torch.where(joined[-1] > 0, observed, self.mean), 1 - self.momentum)
        self._total = self._count = None


def full_precision(x: Tensor) -> Tensor:
    """At least float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def unit(vectors: Tensor) -> Tensor:
    """(..., E), each brought to length 1 in full precision."""
    return F.normalize(full_precision(vectors), dim=-1)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """(M, E) and (N, E) unit vectors -> (M, N), in full precision: a temperature multiplies what rounding leaves."""
    with torch.autocast(a.device.type, enabled=False):
        return full_precision(a) @ full_precision(b).T


def centred(scores: Tensor, centre: Centre, temperature: float) -> Tensor:
    """softmax((scores - centre) / temperature), (M, K)."""
    return ((full_precision(scores) - centre.mean) / temperature).softmax(dim=-1)


@torch.no_grad()
def sinkhorn_knopp(scores: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Targets (M, K) that use all prototypes alike over all ranks' tokens (SwAV, arXiv 2006.09882, section 3.1).

    A token whose scores are minus infinity takes no part; its target is zero.
    """
    # In logarithms, as at low temperatures most of the shares are smaller than the smallest number.
    q = full_precision(scores) / temperature
    for _ in range(iterations):
        q = q - _log_total(q)
        q = q - q.logsumexp(1, keepdim=True).nan_to_num(nan=float("nan"), neginf=0.0)
    return q.exp()


def _log_total(q: Tensor) -> Tensor:
    """(K,), the logarithm of the sum of exp(q) (M, K) over all ranks' tokens; 0 where that sum is none."""
    top = q.amax(0) if len(q) else q.new_full((q.shape[1],), float("-inf"))
    top = ranks.maximum(top).nan_to_num(nan=float("nan"), neginf=0.0)
    total = ranks.total((q - top).exp().sum(0))
    return torch.where(total == 0, 0.0, top + total.log())


@torch.no_grad()
def signs_of_collapse(targets: Tensor, cross_entropy: Tensor) -> dict[str, Tensor]:
    """How far targets (M, K) are from the two collapses: one prototype for all, or the same even guess for all.

    Returns:
        target_entropy: mean entropy of a target in nats, 0 when certain, log K when even.
        teacher_student_kl: mean KL divergence from target to student, `cross_entropy` (scalar) less the entropy.
        prototype_use: exp(entropy of the mean target) / K, 1 when all prototypes are used alike, 1 / K when one is.
    """
    entropy = -(targets * targets.clamp(min=1e-12).log()).sum(-1).sum() / max(len(targets), 1)
    average = ranks.total(targets.sum(0))
    average = average / average.sum().clamp(min=1e-12)
    spread = -(average * average.clamp(min=1e-12).log()).sum()
    return {
        "target_entropy": entropy,
        "teacher_student_kl": cross_entropy.detach() - entropy,
        "prototype_use": spread.exp() / targets.shape[-1],
    }
