"""What a recipe costs, counted before anything is trained.

The recipe's own learner makes its own step on tensors without contents, so nothing is estimated by formula.
Floating-point operations are what PyTorch's FlopCounterMode sees: a multiply-add is two, and what a kernel computes
again in backward to save memory does not count.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harmony.data.batch import Batch
from harmony.models.encodings import ImageEncoding, TextEncoding
from harmony.objectives.base import Encoded, ImageRequest, Objective, Request
from harmony.recipe import Recipe
from harmony.schedules import At
from harmony.training.learner import Learner
from harmony.training.memory import Memory, memory_of
from harmony.training.plan import Passes, encode
from harmony.training.rehearsal import CLOCK, rehearse

Result = TypeVar("Result")


@dataclass(frozen=True)
class Pass:
    """One encoder pass.

    Attributes:
        model: "student", "teacher" or the name of a frozen model.
        request: what is encoded.
        asked_by: the objectives it serves.
        tokens: tokens an example.
        flops: operations an example, forward and, for the student, backward.
    """

    model: str
    request: Request
    asked_by: tuple[str, ...]
    tokens: float
    flops: float


@dataclass(frozen=True)
class Cost:
    """What a recipe costs.

    Attributes:
        name: the recipe's.
        examples: image-caption pairs one process encodes at a time.
        caption_tokens: tokens of every caption, begin and end included.
        precision: of the passes.
        trained: trained parameters by part.
        slow: parameters of the slow copies.
        frozen: parameters of the frozen models by name.
        passes: all encoder passes of a step.
        heads: by objective, operations an example of its heads and loss, forward and backward.
        memory: of one process.
    """

    name: str
    examples: int
    caption_tokens: int
    precision: str
    trained: dict[str, int]
    slow: int
    frozen: dict[str, int]
    passes: list[Pass]
    heads: dict[str, float]
    memory: Memory

    @property
    def flops(self) -> float:
        """Operations an example in all."""
        return sum(one.flops for one in self.passes) + sum(self.heads.values())

    def flops_of(self, objective: str) -> float:
        """Operations an example of one objective: its heads, and its even share of every pass it asked for."""
        shares = (one.flops / len(one.asked_by) for one in self.passes if objective in one.asked_by)
        return self.heads[objective] + sum(shares)


def cost_of(recipe: Recipe, caption_tokens: int = 24, processes: int = 1) -> Cost:
    """Count one step of a recipe.

    Args:
        recipe: its data need not be given.
        caption_tokens: tokens of the longest caption of a batch, to which all are padded; about 24 for web captions.
        processes: over how many the batch is spread.

    Raises:
        UserError: something in the recipe does not fit together.
    """
    rehearsal = rehearse(recipe, caption_tokens, processes)
    learner, batch = rehearsal.learner, rehearsal.batch
    with rehearsal.mode:
        batch = _with_guided_masks(learner, batch)
        passes, heads = list(_passes(learner, batch)), dict(_heads(learner, batch))
    frozen = {name: sum(p.numel() for p in model.parameters()) for name, model in learner.frozen.items()}
    return Cost(
        name=recipe.name,
        examples=len(batch),
        caption_tokens=next((tokens.shape[1] for tokens in batch.captions.values()), 0),
        precision=recipe.train.precision,
        trained={part: sum(p.numel() for p in parameters) for part, parameters in learner.parts().items()},
        slow=sum(p.numel() for p in learner.parameters() if not p.requires_grad) - sum(frozen.values()),
        frozen=frozen,
        passes=passes,
        heads=heads,
        memory=memory_of(recipe, caption_tokens, processes),
    )


def flops_of_a_pair(recipe: Recipe, caption_tokens: int = 24) -> float:
    """As `cost_of(recipe).flops`, without the rest."""
    rehearsal = rehearse(recipe, caption_tokens)
    with rehearsal.mode:
        batch = _with_guided_masks(rehearsal.learner, rehearsal.batch)
        passes = sum(one.flops for one in _passes(rehearsal.learner, batch))
        return passes + sum(flops for _, flops in _heads(rehearsal.learner, batch))


def _with_guided_masks(learner: Learner, batch: Batch) -> Batch:
    return learner.plan.with_guided(batch, learner.given(batch))


def _active(learner: Learner) -> list[str]:
    return [name for group in learner.plan.groups for name in group.objectives]


def _objective(learner: Learner, name: str) -> Objective:
    objective = learner.objectives[name]
    assert isinstance(objective, Objective)
    return objective


def _passes(learner: Learner, batch: Batch) -> Iterator[Pass]:
    """Every merged request, encoded by itself; packed into one pass they cost the same."""
    for passes in (*(group.student for group in learner.plan.groups), learner.plan.teacher, *learner.plan.frozen):
        requests: list[Request] = [*passes.images, *passes.texts]
        for request in requests:
            encoding, flops = _counted(partial(_encode_alone, learner, passes.model, request, batch))
            yield Pass(
                passes.model,
                request,
                tuple(name for name in _active(learner) if _asks(learner, name, request, passes)),
                tokens=encoding.tokens[..., 0, 0].numel() * encoding.length / len(batch),
                flops=flops / len(batch),
            )


def _asks(learner: Learner, objective: str, merged: Request, passes: Passes) -> bool:
    return any(passes.asked.get(request) == merged for request in learner.plan.asked[objective])


def _encode_alone(learner: Learner, model: str, request: Request, batch: Batch) -> ImageEncoding | TextEncoding:
    is_student = model == "student"
    images, texts = ([request], []) if isinstance(request, ImageRequest) else ([], [request])
    with torch.set_grad_enabled(is_student):
        encoding = encode(Passes(model, images, texts, {request: request}), learner.model(model), batch)[request]
    if is_student:
        encoding.tokens.sum().backward()
    return encoding


def _heads(learner: Learner, batch: Batch) -> Iterator[tuple[str, float]]:
    """By objective, operations an example of its heads and loss, forward and backward down to the encodings."""
    given = learner.given(batch)
    with torch.no_grad():
        fast = [encode(group.student, learner.student, batch) for group in learner.plan.groups]
    for group, encodings in zip(learner.plan.groups, fast, strict=True):
        encoded = given.joined(Encoded({request: _leaf(encodings[request]) for request in encodings}))
        for name in group.objectives:
            _, flops = _counted(partial(_differentiate, _objective(learner, name), batch, encoded))
            yield name, flops / len(batch)


def _differentiate(objective: Objective, batch: Batch, encoded: Encoded) -> None:
    losses = objective(batch, encoded, At(objective.config, CLOCK))
    torch.stack(list(losses.values())).sum().backward()


def _leaf(encoding: ImageEncoding | TextEncoding) -> ImageEncoding | TextEncoding:
    return replace(encoding, tokens=encoding.tokens.detach().requires_grad_())


def _counted(run: Callable[[], Result]) -> tuple[Result, int]:
    """What `run` gives, and the floating-point operations it made."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = run()
    return result, counter.get_total_flops()
