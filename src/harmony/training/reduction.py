"""The one reduction of a step's gradients over ranks, on its way while the backward passes still run.

A step adds to a parameter's gradient as often as groups of objectives and micro-batches reach it. How often, and in
which order parameters are done, is learned from one step and expected of the next, since the graph of a loss does not
depend on the data. Gradients are laid end to end in buckets, in that order, and a bucket leaves as soon as all of its
gradients are final.

What keeps it safe:

- All ranks issue the same reductions in the same order: buckets leave strictly one after the other, their order is the
  first rank's, and what lets one leave is counted, never timed. Between them come the collectives of the losses, in
  their forward and backward; their places are the same on all ranks, because autograd runs equal graphs in one order.
- They use the process group of the losses. NCCL asks that collectives of two groups never overlap on a device.
- A step that is not as expected (the first one; one in which a loss begins or ends) is reduced as a whole after its
  backward passes, whatever has left already, and is what the next one is expected to be. So what a step gives depends
  on that step alone, and a resumed run, which has to learn anew, gives the same to the last bit.

Copies of the gradients that have left lie in memory until the end of the step: at most as much as the gradients take.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from harmony import ranks


class Reduction:
    """Averages the gradients of a step over ranks; with one rank it does nothing. Gradients are None before a step."""

    def __init__(self, parameters: Sequence[nn.Parameter], bucket_bytes: int = 25 * 2**20) -> None:
        """Watch the gradients of `parameters`.

        Args:
            parameters: the trained ones, each once, in an order that is the same on all ranks.
            bucket_bytes: how much a reduction takes, as DistributedDataParallel has it: small enough that most have
                left before the end, large enough that a network is at its full rate (arXiv 2006.15704).
        """
        self._parameters = list(parameters)
        self._bucket_bytes = bucket_bytes
        self._expected: list[int] = []
        self._buckets: list[list[nn.Parameter]] = []
        self._bucket_of: dict[nn.Parameter, int] = {}
        self._needed: list[int] = []
        self._watching = False
        if ranks.count() > 1:
            for index, parameter in enumerate(self._parameters):
                parameter.register_post_accumulate_grad_hook(partial(self._added, index))

    def begin(self) -> None:
        """Before the first backward pass of a step."""
        self._watching = True
        self._as_expected = bool(self._expected)
        self._counts = [0] * len(self._parameters)
        self._last = [0] * len(self._parameters)
        self._additions = 0
        self._missing = list(self._needed)
        self._sent: list[ranks.Averaging] = []

    def _added(self, index: int, parameter: nn.Parameter) -> None:
        """A backward pass has added to the gradient of a parameter."""
        if not self._watching:
            return
        self._counts[index] += 1
        self._additions += 1
        self._last[index] = self._additions
        self._as_expected = self._as_expected and self._counts[index] <= self._expected[index]
        if self._as_expected:
            self._missing[self._bucket_of[parameter]] -= 1
            while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
                self._send(self._buckets[len(self._sent)])

    def finish(self) -> None:
        """After the last backward pass of a step: every `.grad` becomes its mean over ranks."""
        self._watching = False
        if ranks.count() == 1:
            return
        if self._counts != self._expected:
            self._start_again()
        for averaging in self._sent:
            averaging.finish()
        self._sent = []

    def _start_again(self) -> None:
        """Lay out buckets as this step would have needed them, and send all gradients."""
        for averaging in self._sent:
            averaging.drop()
        last = torch.tensor(self._last)
        ranks.broadcast([last])
        order = [index for index in last.argsort().tolist() if last[index]]
        self._expected = self._counts
        self._buckets = ranks.buckets([self._parameters[index] for index in order], self._bucket_bytes)
        self._bucket_of = {parameter: place for place, bucket in enumerate(self._buckets) for parameter in bucket}
        self._needed = [0] * len(self._buckets)
        for index in order:
            self._needed[self._bucket_of[self._parameters[index]]] += self._expected[index]
        self._sent = []
        for bucket in self._buckets:
            self._send(bucket)

    def _send(self, bucket: Sequence[nn.Parameter]) -> None:
        self._sent.append(ranks.Averaging([_gradient(parameter) for parameter in bucket]))


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None, "the graph of a loss depends on the data: a gradient is missing on this rank"
    return parameter.grad
