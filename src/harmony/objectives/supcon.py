"""Crops of one class find each other among those of all classes (SupCon, arXiv 2004.11362): supervised."""

from typing import ClassVar

from torch import Tensor

from harmony.data.batch import Batch
from harmony.objectives.simclr import Simclr


class Supcon(Simclr):
    """SimCLR in which images of one class belong together (L_out, equation 2).

    The published code multiplies the loss by temperature / 0.07, which is left to the weight here.
    """

    needs_labels: ClassVar[bool] = True

    def identities(self, batch: Batch) -> Tensor:
        """(B,) int64, the classes of the images."""
        assert batch.labels is not None
        return batch.labels
