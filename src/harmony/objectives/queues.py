"""A queue of what earlier steps saw, for losses that compare with more than the batch (MoCo, arXiv 1911.05722).

Shapes: L vectors in the queue, E width of a vector, B vectors of this rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmony import ranks
from harmony.objectives.targets import cosines


class Queue(nn.Module):
    """The newest unit vectors of all ranks, the same queue on each; random ones before there are enough.

    As with centres, what a step sees is kept aside until its update has been made: all micro-batches of a step see the
    same queue, and a skipped step leaves it alone.

    Attributes:
        vectors: (L, E), the newest first.
        filled: int64, how many of them were observed; the others are random.
    """

    vectors: Tensor
    filled: Tensor

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.register_buffer("vectors", F.normalize(torch.randn(length, width), dim=1))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self._seen: list[Tensor] = []

    def observe(self, vectors: Tensor) -> None:
        """Take note of (B, E) vectors; every rank must bring as many."""
        self._seen.append(vectors.detach().to(self.vectors.dtype))

    @torch.no_grad()
    def update(self) -> None:
        """Put what was observed on all ranks in front, and drop as many at the end."""
        if self._seen:
            newest = torch.cat([ranks.gather(vectors) for vectors in self._seen])
            self.vectors.copy_(torch.cat([newest, self.vectors])[: len(self.vectors)])
            self.filled.add_(len(newest)).clamp_(max=len(self.vectors))
        self._seen = []

    def similarities(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(M, E) unit vectors twice -> (M, 1 + L), cosines of each query with its own key and with the queue."""
        return torch.cat([(queries * keys).sum(1, keepdim=True), cosines(queries, self.vectors)], dim=1)

    def is_full(self) -> Tensor:
        """Bool, whether no random vector is left; asked on the device, so nothing waits for the answer."""
        return self.filled == len(self.vectors)

    def share(self) -> Tensor:
        """This rank's part of the queue, for what is totalled over ranks."""
        return self.vectors.tensor_split(ranks.count())[ranks.rank()]
