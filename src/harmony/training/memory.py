"""How much memory a step of a recipe takes, from a rehearsal of it: what is alive at its fullest moment.

The workspace of kernels, the fragments between allocations and what the driver keeps (about 1 GB on a GPU) come on
top.
"""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harmony.recipe import Recipe
from harmony.training.rehearsal import CLOCK, Rehearsal, rehearse

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the fullest moment of a step.

    Attributes:
        weights: student, teacher and heads, in fp32.
        optimiser: AdamW's two running means.
        groups: for each group of objectives, what else is alive at its fullest moment: activations, gradients so far,
            working copies of weights, the batch.
    """

    weights: int
    optimiser: int
    groups: dict[tuple[str, ...], int]

    @property
    def total(self) -> int:
        return self.weights + self.optimiser + max(self.groups.values())


def memory_of(recipe: Recipe, caption_tokens: int = 24, processes: int = 1) -> Memory:
    """Rehearse one step of a recipe, forward and backward as the trainer makes it; the arguments are `rehearse`'s."""
    rehearsal = rehearse(recipe, caption_tokens, processes)
    learner = rehearsal.learner
    with rehearsal.mode:
        groups = dict(_fullest_moments(rehearsal, _DTYPES[recipe.train.precision]))
    return Memory(
        weights=sum(tensor.nbytes for tensor in learner.state_dict().values()),
        optimiser=2 * sum(parameter.nbytes for parameter in learner.parameters() if parameter.requires_grad),
        groups=groups,
    )


def _fullest_moments(rehearsal: Rehearsal, dtype: torch.dtype) -> Iterator[tuple[tuple[str, ...], int]]:
    """For each group, the bytes alive at its fullest moment, weights apart."""
    with _Alive([*rehearsal.learner.state_dict().values()]) as alive:
        batch = rehearsal.batch.map(torch.clone)
        groups = rehearsal.learner.losses_by_group(batch, CLOCK)
        while True:
            alive.most = alive.now
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                group = next(groups, None)
            if group is None:
                return
            group.total().backward()
            yield group.objectives, alive.most


class _Alive(TorchDispatchMode):
    """Follows how many bytes of tensors are alive, those given apart.

    Attributes:
        now, most: bytes at this moment, and at the fullest since `most` was last set.
    """

    def __init__(self, apart: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in apart}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note the storages it made."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size
