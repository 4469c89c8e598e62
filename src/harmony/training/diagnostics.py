"""What tells a healthy run from a sick one: signs of collapse, and forensics of numbers that are not finite.

Shapes: B examples, D width of a feature.
"""

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from harmony import ranks
from harmony.data.batch import Batch
from harmony.training import distributed
from harmony.training.distributed import StoppedElsewhere, TrainingError

_KEPT_FILES = 10
"""Batches saved a run at most, so that a sick run does not fill the disk."""

_NAMED_KEYS = 8
"""Examples named in a message; the saved file holds all."""


@torch.no_grad()
def feature_signs(features: Tensor) -> dict[str, Tensor]:
    """How much of their space features (B, D) use, over all ranks.

    Returns:
        rank: effective rank, see `effective_rank`; 1 when all examples look alike.
        std: standard deviation over the examples of unit-length features, averaged over channels, times the root of D:
            0 when all look alike, near 1 when they spread evenly (SimSiam, arXiv 2011.10566, section 4.1).
    """
    unit = F.normalize(ranks.gather(features), dim=1)
    spread = unit.std(dim=0, correction=0).mean() * unit.shape[1] ** 0.5
    return {"rank": effective_rank(unit), "std": spread}


@torch.no_grad()
def effective_rank(matrix: Tensor) -> Tensor:
    """exp(entropy of the singular values divided by their sum), from 1 to min(B, D) (Roy and Vetterli, EUSIPCO 2007).

    Singular values are the roots of the smaller Gram matrix's eigenvalues. What is not finite counts as zero, and a
    matrix of zeros has rank 0.
    """
    x = matrix.double().nan_to_num(0.0, 0.0, 0.0)
    x = x / x.abs().amax().clamp(min=1e-300)
    gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    # What rounding leaves of a zero eigenvalue would count, since the root makes it large.
    values = torch.where(values > values[-1] * len(values) * torch.finfo(torch.float32).eps ** 2, values, 0).sqrt()
    share = values / values.sum()
    return torch.special.entr(share).sum().exp().nan_to_num().to(matrix.dtype) * (values[-1] > 0)


class Watch:
    """Counts steps in a row that were not finite, saves their batches, and stops the run when there are too many.

    Attributes:
        skipped: updates left out in the whole run.
    """

    def __init__(self, most: int) -> None:
        """`most`: steps in a row that may be skipped."""
        self._most = most
        self._in_a_row = 0
        self.skipped = 0

    def fine(self) -> None:
        """The step's numbers were finite."""
        self._in_a_row = 0

    def skip(self, directory: Path, step: int, complaint: str, sick: bool, batches: Sequence[Batch]) -> str:
        """The step's numbers were not finite, on this rank or on another. All ranks must call this.

        Args:
            directory: where the batch is saved.
            step: the number of the step, counted from 1.
            complaint: what was not finite, see `complaint`.
            sick: whether it was on this rank, so that its examples may be to blame.
            batches: its examples, as loaded.

        Returns:
            A message for a step that is skipped.

        Raises:
            TrainingError: it was one step too many in a row.
        """
        self.skipped += 1
        self._in_a_row += 1
        path = _save(directory, step, batches) if sick else None
        blamed = distributed.everyones(([key for batch in batches for key in batch.keys], path) if sick else ([], None))
        keys = [key for keys, _ in blamed for key in keys]
        saved = ", ".join(str(path) for _, path in blamed if path)
        message = f"step {step}: {complaint}, with examples {_some(keys)}" + (f" (saved in {saved})" if saved else "")
        if self._in_a_row > self._most:
            if not ranks.is_main():
                raise StoppedElsewhere
            raise TrainingError(
                f"stopped at {message}, after {self._most} skipped steps; torch.load opens the batch, and a lower "
                "optim.lr or weight, or train.precision=fp32, often helps"
            )
        return f"{message}; its update is left out"


def _save(directory: Path, step: int, batches: Sequence[Batch]) -> str | None:
    """The file that the batches were saved in; None when there is no room, or when there are many files already."""
    path = directory / f"step-{step:08}-rank-{ranks.rank()}.pt"
    try:
        directory.mkdir(exist_ok=True)
        if len(list(directory.iterdir())) >= _KEPT_FILES:
            return None
        torch.save([plain(batch.to("cpu")) for batch in batches], path)
    except (OSError, RuntimeError):
        path.unlink(missing_ok=True)
        return None
    return str(path)


def complaint(losses: Mapping[str, float], norms: Mapping[str, float]) -> str | None:
    """Which losses are not finite, or else the gradients of which parts; None when all are finite."""
    for what, values in (("loss", losses), ("gradient", norms)):
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            return f"the {what} of {' and of '.join(bad)} is not finite"
    return None


def memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: what tensors took on a GPU, or what the process took on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def plain(batch: Batch) -> dict[str, object]:
    """A batch as tensors, lists, dicts and strings on the CPU, for torch.load(..., weights_only=True)."""
    return asdict(batch.to("cpu"))


def _some(keys: Sequence[str]) -> str:
    shown = ", ".join(keys[:_NAMED_KEYS])
    return shown if len(keys) <= _NAMED_KEYS else f"{shown} and {len(keys) - _NAMED_KEYS} more"
