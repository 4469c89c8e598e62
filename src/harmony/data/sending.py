"""Batches sent to a GPU while it computes."""

import torch
from torch import Tensor

from harmony.data.batch import Batch


class Sender:
    """Copies batches to a GPU on a stream of its own, so that the copy runs beside what the GPU still has to compute.

    The copy does not wait for what the caller has put on its own stream; what it puts there afterwards waits for the
    copy.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def send(self, batch: Batch) -> Batch:
        """The batch, whose tensors lie in pinned memory, on the GPU."""
        with torch.cuda.stream(self._stream):
            sent = batch.to(self._device)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        return sent.map(lambda tensor: _used_on(tensor, current))


def _used_on(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    """So that the memory, fetched for one stream, is not given away before the other is done with it."""
    tensor.record_stream(stream)
    return tensor
