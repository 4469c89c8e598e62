"""AdamW over two groups of parameters, the schedules of its numbers, and the norm of the gradient.

Shapes: P trained tensors.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from harmony.errors import UserError
from harmony.schedules import Clock, Schedule
from harmony.training.settings import OptimConfig

_SPARED = ("bias", "token", "pos_embed", "positional_embedding", "positions", "scale", "temperature")
"""Ends of the names of parameters that are no weights, whatever their shape."""


def decays(name: str, parameter: nn.Parameter, rule: Literal["weights_only", "published"]) -> bool:
    """Whether weight decay pulls on a parameter.

    `weights_only`: the matrices of linear, convolution and embedding layers, and lengths of prototypes where they are
    trained, as in DINO's code. Never norms, biases, class, register and mask tokens, positions, temperatures.
    `published`: all but one-dimensional tensors and biases, as the published code has it (its quirk C16); its mask
    tokens have leading dimensions that ours lack, so they count as weights.
    """
    leaf = name.rsplit(".", 1)[-1]
    if rule == "published":
        return leaf.endswith("token") or not (parameter.ndim == 1 or leaf == "bias")
    return parameter.ndim > 1 and not leaf.endswith(_SPARED)


def adamw(learner: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over the trained parameters of `learner`, in a group that decays and one that does not.

    The groups carry parameter names, which end up in the optimiser's state. Learning rate and decay are set before
    every step, see `set_rates`.

    Raises:
        UserError: nothing is to be trained.
    """
    trained = [(name, p) for name, p in learner.named_parameters() if p.requires_grad]
    if not trained:
        raise UserError("every parameter is frozen, so there is nothing to train; unfreeze a tower or add an objective")
    groups = {True: [], False: []}  # type: dict[bool, list[tuple[str, nn.Parameter]]]
    for name, parameter in trained:
        groups[decays(name, parameter, optim.decay)].append((name, parameter))
    return torch.optim.AdamW(
        [{"params": members, "decays": key} for key, members in groups.items() if members],
        lr=0.0,
        betas=optim.betas,
        eps=optim.eps,
        fused=True,
    )


def learning_rate(optim: OptimConfig, clock: Clock, batch_size: int) -> float:
    """The learning rate of the step that starts at `clock`.

    Grows in equal parts over the warm-up, to lr * batch_size / 256 (the linear rule of arXiv 1706.02677) in its last
    step, then falls along half a cosine to `final_lr`, which the last step of the run has.
    """
    peak = optim.lr * batch_size / 256
    warmup = optim.warmup.steps(clock)
    place = clock.step + 1
    if place < warmup:
        return peak * place / warmup
    rise = math.ceil(warmup)
    fall = Schedule(shape="cosine", start=peak, stop=optim.final_lr)
    return fall(Clock(step=place - rise, steps=clock.steps - rise, epoch_steps=1))


def set_rates(optimiser: torch.optim.Optimizer, learning_rate: float, weight_decay: float) -> None:
    """Give every group its learning rate, and the decaying one its decay."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def update(optimiser: torch.optim.AdamW, made: Tensor) -> None:
    """One step of the optimiser; on the device, nothing at all where `made`, a truth value of no dimension, is false.

    The fused AdamW is told of gradients that are not finite by the attribute through which torch's own scaler tells it.
    """
    optimiser.found_inf = (~made).float()  # type: ignore[attr-defined]
    optimiser.step()


class Gradients:
    """The gradients of all trained parameters: their norms by part, and clipping. Nothing here waits for the device.

    Attributes:
        parts: names of the parts (image, text, one for each objective), in the order of `by_part`.
        parameters: the trained parameters, each once.
        bytes: what they take.
    """

    def __init__(self, parts: Mapping[str, Sequence[nn.Parameter]], optim: OptimConfig) -> None:
        self.parts = list(parts)
        owner: dict[nn.Parameter, int] = {}
        for index, members in enumerate(parts.values()):
            for parameter in members:
                if parameter.requires_grad:
                    owner.setdefault(parameter, index)
        self.parameters = list(owner)
        self.bytes = sum(parameter.nbytes for parameter in self.parameters)
        self._owner = torch.tensor(list(owner.values()), device=self.parameters[0].device)
        self._max_norm = optim.clip_norm
        self._clipped_alone: set[nn.Parameter] | None = None
        if optim.clip_scope == "image_tensors":
            self._clipped_alone = set(parts["image"])

    def norms(self) -> Tensor:
        """(P,), the Euclidean norm of each parameter's gradient; zero where there is none."""
        found = iter(torch._foreach_norm([p.grad for p in self.parameters if p.grad is not None]))
        none = self.parameters[0].new_zeros(())
        return torch.stack([none if p.grad is None else next(found) for p in self.parameters])

    def by_part(self, norms: Tensor) -> Tensor:
        """(parts,), the norm of each part's gradient."""
        squares = norms.new_zeros(len(self.parts)).index_add_(0, self._owner, norms.square())
        return squares.sqrt()

    def clip(self, norms: Tensor) -> None:
        """Shorten gradients that are longer than `clip_norm`, in place.

        `all`: one factor for all, from the norm over every trained parameter. `image_tensors`: a factor for each tensor
        of the image tower from its own norm, and none for the others (the published code's quirk C18).

        Args:
            norms: (P,), what `norms` returned.
        """
        if self._max_norm is None:
            return
        if self._clipped_alone is None:
            factor = self._factor(norms.square().sum().sqrt())
            torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], factor)
            return
        for parameter, factor in zip(self.parameters, self._factor(norms).unbind(), strict=True):
            if parameter.grad is not None and parameter in self._clipped_alone:
                parameter.grad *= factor

    def _factor(self, norm: Tensor) -> Tensor:
        """What shortens gradients of the given norms, as torch.nn.utils.clip_grad_norm_ has it."""
        assert self._max_norm is not None
        return (self._max_norm / (norm + 1e-6)).clamp(max=1.0)
