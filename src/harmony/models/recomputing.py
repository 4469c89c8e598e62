"""What a transformer's blocks keep for the backward pass, and what they compute again.

`pointwise` keeps the results of matrix products and of attention, and computes what lies between them again: norms,
activation functions, tokens laid end to end. That is a small part of the time and four tenths of the memory. `blocks`
keeps nothing but what enters a block, and computes all of it again: another forward pass.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Checkpointing = Literal["none", "pointwise", "blocks"]


class Recomputing(nn.Module):
    """A module of blocks that obeys the setting."""

    checkpointing: Checkpointing = "none"


def set_checkpointing(module: nn.Module, how: Checkpointing) -> None:
    """Have all parts of a module obey."""
    for part in module.modules():
        if isinstance(part, Recomputing):
            part.checkpointing = how


def through(block: Callable[..., Tensor], how: Checkpointing, *arguments: Any) -> Tensor:
    """The output of a block, a function of the arguments that takes `lean` too: whether to keep little."""
    if not torch.is_grad_enabled() or how == "none":
        return block(*arguments, lean=False)
    if how == "pointwise":
        return block(*arguments, lean=True)
    return keeping_inputs(block, *arguments)


def keeping_inputs(function: Callable[..., Tensor], *arguments: Any, lean: bool = True) -> Tensor:
    """The value of a function of which, where `lean`, only the arguments are kept.

    It is computed again up to the last value that backward needs. Of a product of matrices that is what enters it, so
    a function that ends in one does not repeat it. Nothing in it may be drawn by chance.
    """
    if not lean:
        return function(*arguments)
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result
