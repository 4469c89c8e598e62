"""The teacher: slow copies that follow the student as a moving average (mean teacher, arXiv 1703.01780)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Teacher:
    """Keeps (module, slow copy) pairs together: towers and the heads that want a slow twin."""

    def __init__(self, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        self._fast: list[Tensor] = []
        self._slow: list[Tensor] = []
        for fast, slow in pairs:
            # Persistent buffers count too, or those of a norm, say, would stay as they were at the start.
            own = slow.state_dict(keep_vars=True)
            for name, tensor in fast.state_dict(keep_vars=True).items():
                if tensor.is_floating_point():
                    self._fast.append(tensor)
                    self._slow.append(own[name])

    @torch.no_grad()
    def update(self, momentum: float, made: Tensor) -> None:
        """Slow <- momentum * slow + (1 - momentum) * fast, or as it was where `made`, a scalar boolean, is false."""
        if self._slow:
            weights = {dtype: made.to(dtype) * (1 - momentum) for dtype in {slow.dtype for slow in self._slow}}
            torch._foreach_lerp_(self._slow, self._fast, [weights[slow.dtype] for slow in self._slow])
